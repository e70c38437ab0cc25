//! What is measured: the layer over a store, the store alone, and the bare server, in the same round trips.

use std::convert::Infallible;
use std::future::{ready, Future, Ready};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
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

/// Bytes of a request's body, and of an answer's.
const SIZE: usize = 200;

/// Long enough for a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers given by the handler; what was replayed does not count.
pub(crate) static EXECUTED: AtomicU64 = AtomicU64::new(0);

/// What a request is to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It has a key that was never seen.
    First,
    /// It has a key whose answer is kept.
    Replay,
}

/// One side of the comparison.
pub(crate) trait Subject: Clone + Send + Sync + 'static {
    /// All that can be made ready before the clock runs.
    type Job: Send + 'static;

    /// What is to be done for the key of this number.
    fn job(&self, key: u64) -> Self::Job;

    /// Does it.
    fn run(&self, kind: Kind, job: Self::Job) -> impl Future<Output = ()> + Send;
}

type Request = http::Request<Full<Bytes>>;
type Responded = Ready<Result<Response<Full<Bytes>>, Infallible>>;

/// The layer around a handler that answers at once.
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
    let answer = Response::builder()
        .status(StatusCode::CREATED)
        .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
        .header(LOCATION, "/payments/4711")
        .body(Full::new(Bytes::from_static(&[b'x'; SIZE])));
    ready(Ok(answer.expect("every part of the answer is valid")))
}

impl<St> Clone for Layered<St> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<St: Store> Subject for Layered<St> {
    type Job = Request;

    fn job(&self, key: u64) -> Request {
        // As from a server's connection: names and values are slices of what was read, not allocations of their own.
        let given = HeaderValue::from_static;
        let request = http::Request::post(Uri::from_static("/payments"))
            .header(HOST, given("api.example.com"))
            .header(USER_AGENT, given("payments-client/1.4.2"))
            .header(ACCEPT, given("application/json"))
            .header(AUTHORIZATION, given("Bearer 3f1c9a7e5b2d48f0a6c4e8d2b0f1a3c5"))
            .header(CONTENT_TYPE, given("application/json"))
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

/// The store with nothing around it: what it is asked is made before the clock runs.
pub(crate) struct Stored<St> {
    store: Arc<St>,
    outcome: Arc<Outcome>,
}

impl<St: Store> Stored<St> {
    /// Keeps answers of so many bytes.
    pub(crate) fn over(store: St, answer: usize) -> Self {
        let outcome = Outcome::Stored(StoredResponse {
            head: vec![b'h'; answer.saturating_sub(SIZE)].into(),
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

/// A day, as the layer keeps answers.
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
            Ok(Decision::Replay(answer)) => assert_eq!((kind, answer.body.len()), (Kind::Replay, SIZE)),
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

/// A key as the store's are: spread like a hash.
fn spread(key: u64) -> [u8; 32] {
    let mixed = |n: u64| n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    let mut bytes = [0; 32];
    for (at, part) in bytes.chunks_exact_mut(8).enumerate() {
        part.copy_from_slice(&mixed(key.rotate_left(u32::try_from(at).unwrap_or(0) * 16)));
    }
    bytes
}

pub(crate) async fn redis_store(url: &str) -> RedisStore {
    let builder = RedisStore::builder().with_response_timeout(PATIENCE);
    builder.connect(url).await.expect("the server that was just started")
}

/// One minimal script per claim and one per completion, on a connection like the store's.
#[derive(Clone)]
pub(crate) struct RawRedis {
    connection: ConnectionManager,
    scripts: Arc<RawScripts>,
}

struct RawScripts {
    claim: Script,
    complete: Script,
    /// As many bytes as the layer's record has: in flight, and with its answer.
    claimed: Vec<u8>,
    completed: Vec<u8>,
}

impl RawRedis {
    pub(crate) async fn connect(url: &str, claimed: usize, completed: usize) -> redis::RedisResult<Self> {
        let info = url.into_connection_info()?;
        let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        let client = Client::open(info.set_redis_settings(redis).set_tcp_settings(tcp))?;
        let config = ConnectionManagerConfig::new().set_response_timeout(Some(PATIENCE));
        let scripts = RawScripts {
            claim: Script::new(
                "local kept = redis.call('GET', KEYS[1]) if kept then return kept end \
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
        reply.expect("the server answers")
    }
}

impl Subject for RawRedis {
    type Job = String;

    fn job(&self, key: u64) -> String {
        format!("rawraw:rawra:{key:064x}")
    }

    async fn run(&self, kind: Kind, key: String) {
        let scripts = &*self.scripts;
        let kept: Option<Bytes> = self.call(&scripts.claim, &key, &scripts.claimed).await;
        assert_eq!(kept.is_some(), kind == Kind::Replay);
        if kept.is_none() {
            let done: u64 = self.call(&scripts.complete, &key, &scripts.completed).await;
            assert_eq!(done, 1);
        }
    }
}

/// A pool as an application makes it. sqlx tests each connection that comes back to it.
pub(crate) async fn pool(url: &str) -> sqlx::Result<PgPool> {
    let options = PgPoolOptions::new().max_connections(16).acquire_timeout(PATIENCE);
    options.test_before_acquire(false).connect(url).await
}

/// The store with its table, on a pool of its own, or with `--shared-pool` on one of the application.
pub(crate) async fn postgres_store(url: &str) -> PostgresStore {
    let builder = PostgresStore::builder().with_timeout(PATIENCE);
    let store = if std::env::args().any(|argument| argument == "--shared-pool") {
        let pool = pool(url).await.expect("the server that was just started");
        builder.with_pool(pool).expect("the name of the table is the default")
    } else {
        builder.connect(url).await.expect("the server that was just started")
    };
    store.migrate().await.expect("the role may make tables");
    store
}

/// One minimal statement per claim and one per completion, on a pool of as many connections as the store's.
#[derive(Clone)]
pub(crate) struct RawPostgres {
    pool: PgPool,
    claimed: Bytes,
    completed: Bytes,
}

impl RawPostgres {
    /// The name of its table.
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

    async fn ask(&self, statement: &'static str, key: &[u8; 32], value: Option<&Bytes>) -> Option<Vec<u8>> {
        let mut query = sqlx::query_scalar(statement).bind(&key[..]);
        if let Some(value) = value {
            query = query.bind(&value[..]);
        }
        query.fetch_optional(&self.pool).await.expect("the server answers")
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
                assert!(self.ask(CLAIM, &key, Some(&self.claimed)).await.is_some());
                self.ask(COMPLETE, &key, Some(&self.completed)).await
            }
            Kind::Replay => self.ask(REPLAY, &key, None).await,
        };
        assert!(done.is_some());
    }
}
