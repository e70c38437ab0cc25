//! The subjects of the benchmark: the layer over a store, the store alone, and the bare server.
//! They do the same round trips.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, LOCATION, USER_AGENT};
use http::{HeaderValue, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, IntoConnectionInfo, ProtocolVersion, Script};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower::util::ServiceFn;
use tower::{Layer, ServiceExt};
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, IfLost, Nonce, Outcome, StorageKey, StoredResponse,
};
use tower_idempotency::{Idempotency, IdempotencyLayer, PostgresStore, RedisStore, Store};

/// The size of the body of a request and of a response, in bytes.
const SIZE: usize = 200;

/// The timeout of every operation. It is long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The number of executions of the handler. Replays do not count.
pub(crate) static EXECUTED: AtomicU64 = AtomicU64::new(0);

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The request has a new key.
    First,
    /// The request has a key whose response is stored.
    Replay,
}

/// One side of the comparison.
pub(crate) trait Subject: Clone + Send + Sync + 'static {
    /// The input of one request, built before the clock starts.
    type Job: Send + 'static;

    /// Builds the job for the key with this number.
    fn job(&self, key: u64) -> Self::Job;

    /// Does the job.
    fn run(&self, kind: Kind, job: Self::Job) -> impl Future<Output = ()> + Send;
}

type Request = http::Request<Full<Bytes>>;
type Responded = Ready<Result<Response<Full<Bytes>>, Infallible>>;

/// The layer around a handler that returns its response at once.
pub(crate) struct Layered<St>(Idempotency<Handler, St>);

type Handler = ServiceFn<fn(Request) -> Responded>;

impl<St: Store> Layered<St> {
    pub(crate) fn over(store: St) -> Self {
        let pay: fn(Request) -> Responded = pay;
        Self(IdempotencyLayer::new(store).layer(tower::service_fn(pay)))
    }
}

fn pay(request: Request) -> Responded {
    drop(request);
    EXECUTED.fetch_add(1, Ordering::Relaxed);
    let response = Response::builder()
        .status(StatusCode::CREATED)
        .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
        .header(LOCATION, "/payments/4711")
        .body(Full::new(Bytes::from_static(&[b'x'; SIZE])));
    ready(Ok(response.expect("every part of the response is valid")))
}

impl<St> Clone for Layered<St> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<St: Store> Subject for Layered<St> {
    type Job = Request;

    fn job(&self, key: u64) -> Request {
        // The values are static, because in a real server they are slices of the read buffer and
        // not allocations of their own.
        let value = HeaderValue::from_static;
        let request = http::Request::post(Uri::from_static("/payments"))
            .header(HOST, value("api.example.com"))
            .header(USER_AGENT, value("payments-client/1.4.2"))
            .header(ACCEPT, value("application/json"))
            .header(AUTHORIZATION, value("Bearer 3f1c9a7e5b2d48f0a6c4e8d2b0f1a3c5"))
            .header(CONTENT_TYPE, value("application/json"))
            .header("idempotency-key", format!("4b1c9a7e-5b2d-48f0-a6c4-{key:012x}"))
            .body(Full::new(Bytes::from_static(&[b'y'; SIZE])));
        request.expect("every part of the request is valid")
    }

    async fn run(&self, _kind: Kind, request: Request) {
        let Ok(response) = self.0.clone().oneshot(request).await;
        assert_eq!(response.status(), StatusCode::CREATED);
        let body = response.into_body().collect().await;
        assert_eq!(body.map(|body| body.to_bytes().len()), Ok(SIZE));
    }
}

/// The store alone. Its claims are built before the clock starts.
pub(crate) struct Stored<St> {
    store: Arc<St>,
    outcome: Arc<Outcome>,
}

impl<St: Store> Stored<St> {
    /// Creates a subject that stores responses of `size` bytes.
    pub(crate) fn over(store: St, size: usize) -> Self {
        let outcome = Outcome::Stored(StoredResponse {
            head: vec![b'h'; size.saturating_sub(SIZE)].into(),
            body: vec![b'x'; SIZE].into(),
        });
        Self {
            store: Arc::new(store),
            outcome: Arc::new(outcome),
        }
    }
}

impl<St> Clone for Stored<St> {
    fn clone(&self) -> Self {
        Self {
            store: Arc::clone(&self.store),
            outcome: Arc::clone(&self.outcome),
        }
    }
}

/// The default retention of the layer: one day.
const RETENTION: Duration = Duration::from_secs(86_400);

impl<St: Store> Subject for Stored<St> {
    type Job = Claim;

    fn job(&self, key: u64) -> Claim {
        Claim {
            key: StorageKey::from_bytes(spread(key)),
            fingerprint: Fingerprint::of(b"pay"),
            nonce: Nonce::random(),
            lease: Duration::from_secs(30),
            retention: RETENTION,
            if_lost: IfLost::Refuse,
            max_attempts: 5,
        }
    }

    async fn run(&self, kind: Kind, claim: Claim) {
        match self.store.claim(&claim).await {
            Ok(Decision::Replay(response)) => assert_eq!((kind, response.body.len()), (Kind::Replay, SIZE)),
            Ok(Decision::Execute(grant)) => {
                let completion = self.store.complete(&claim.key, grant.owner, &self.outcome, RETENTION);
                assert_eq!(
                    (kind, completion.await.ok()),
                    (Kind::First, Some(Completion::Completed))
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Returns a key whose bytes are spread like the hashes that the store gets.
fn spread(key: u64) -> [u8; 32] {
    let mixed = |n: u64| n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    let mut bytes = [0; 32];
    for (at, part) in bytes.chunks_exact_mut(8).enumerate() {
        part.copy_from_slice(&mixed(key.rotate_left(u32::try_from(at).unwrap_or(0) * 16)));
    }
    bytes
}

pub(crate) async fn redis_store(url: &str) -> RedisStore {
    let builder = RedisStore::builder().with_response_timeout(TIMEOUT);
    builder.connect(url).await.expect("the new server accepts connections")
}

/// The bare Redis: one minimal script for each claim and one for each completion, on a connection
/// like that of the store.
#[derive(Clone)]
pub(crate) struct RawRedis {
    connection: ConnectionManager,
    scripts: Arc<RawScripts>,
}

struct RawScripts {
    claim: Script,
    complete: Script,
    /// As many bytes as a record of the layer in flight.
    claimed: Vec<u8>,
    /// As many bytes as a record of the layer with its response.
    completed: Vec<u8>,
}

impl RawRedis {
    pub(crate) async fn connect(url: &str, claimed: usize, completed: usize) -> redis::RedisResult<Self> {
        let info = url.into_connection_info()?;
        let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        let client = Client::open(info.set_redis_settings(redis).set_tcp_settings(tcp))?;
        let config = ConnectionManagerConfig::new().set_response_timeout(Some(TIMEOUT));
        let scripts = RawScripts {
            claim: Script::new(
                "local stored = redis.call('GET', KEYS[1]) if stored then return stored end \
                 redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return false",
            ),
            complete: Script::new("redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 1"),
            claimed: vec![b'x'; claimed],
            completed: vec![b'y'; completed],
        };
        Ok(Self {
            connection: ConnectionManager::new_with_config(client, config).await?,
            scripts: Arc::new(scripts),
        })
    }

    async fn call<T: redis::FromRedisValue>(&self, script: &Script, key: &str, value: &[u8]) -> T {
        const DAY: u64 = 86_400_000;
        let mut call = script.key(key);
        call.arg(value).arg(DAY);
        let reply = call.invoke_async(&mut self.connection.clone()).await;
        reply.expect("the server replies")
    }
}

impl Subject for RawRedis {
    type Job = String;

    fn job(&self, key: u64) -> String {
        format!("rawraw:rawra:{key:064x}")
    }

    async fn run(&self, kind: Kind, key: String) {
        let scripts = &*self.scripts;
        let stored: Option<Bytes> = self.call(&scripts.claim, &key, &scripts.claimed).await;
        assert_eq!(stored.is_some(), kind == Kind::Replay);
        if stored.is_none() {
            let done: u64 = self.call(&scripts.complete, &key, &scripts.completed).await;
            assert_eq!(done, 1);
        }
    }
}

/// Creates a pool like that of an application. sqlx tests each connection that returns to the pool.
pub(crate) async fn pool(url: &str) -> sqlx::Result<PgPool> {
    let options = PgPoolOptions::new().max_connections(16).acquire_timeout(TIMEOUT);
    options.test_before_acquire(false).connect(url).await
}

/// Creates the store and its table. The store has a pool of its own, or with `--shared-pool` uses a
/// pool of the application.
pub(crate) async fn postgres_store(url: &str) -> PostgresStore {
    let builder = PostgresStore::builder().with_timeout(TIMEOUT);
    let store = if std::env::args().any(|argument| argument == "--shared-pool") {
        let pool = pool(url).await.expect("the new server accepts connections");
        builder.with_pool(pool).expect("the name of the table is the default")
    } else {
        builder.connect(url).await.expect("the new server accepts connections")
    };
    store.migrate().await.expect("the role may create tables");
    store
}

/// The bare PostgreSQL: one minimal statement for each claim and one for each completion, on a pool
/// of as many connections as that of the store.
#[derive(Clone)]
pub(crate) struct RawPostgres {
    pool: PgPool,
    claimed: Bytes,
    completed: Bytes,
}

impl RawPostgres {
    /// The name of the table.
    pub(crate) const TABLE: &'static str = "raw_records";

    pub(crate) async fn connect(url: &str, claimed: usize, completed: usize) -> sqlx::Result<Self> {
        let pool = pool(url).await?;
        let table = "CREATE TABLE IF NOT EXISTS raw_records (key bytea PRIMARY KEY, record bytea NOT NULL)";
        sqlx::query(table).execute(&pool).await?;
        Ok(Self {
            pool,
            claimed: vec![b'x'; claimed].into(),
            completed: vec![b'y'; completed].into(),
        })
    }

    async fn query(&self, statement: &'static str, key: &[u8; 32], value: Option<&Bytes>) -> Option<Vec<u8>> {
        let mut query = sqlx::query_scalar(statement).bind(&key[..]);
        if let Some(value) = value {
            query = query.bind(&value[..]);
        }
        query.fetch_optional(&self.pool).await.expect("the server replies")
    }
}

impl Subject for RawPostgres {
    type Job = [u8; 32];

    fn job(&self, key: u64) -> [u8; 32] {
        spread(key)
    }

    async fn run(&self, kind: Kind, key: [u8; 32]) {
        const CLAIM: &str = "INSERT INTO raw_records VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING key";
        const COMPLETE: &str = "UPDATE raw_records SET record = $2 WHERE key = $1 RETURNING key";
        const REPLAY: &str = "SELECT record FROM raw_records WHERE key = $1";
        let done = match kind {
            Kind::First => {
                assert!(self.query(CLAIM, &key, Some(&self.claimed)).await.is_some());
                self.query(COMPLETE, &key, Some(&self.completed)).await
            }
            Kind::Replay => self.query(REPLAY, &key, None).await,
        };
        assert!(done.is_some());
    }
}
