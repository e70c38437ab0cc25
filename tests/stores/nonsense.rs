//! Servers that talk nonsense: an error in good time, never a panic, never "absent"; and no harm once they talk sense again.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use sqlx::postgres::PgPoolOptions;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, IfLost, Nonce, Outcome, Owner, Status, StorageKey, StoredResponse,
};
use tower_idempotency::{Error, ErrorKind, PostgresStore, RedisStore, Store};

use crate::support::liar::{Liar, Nonsense};
use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;

const HOUR: Duration = Duration::from_secs(3_600);

/// What the stores give a server.
const SHORT: Duration = Duration::from_millis(500);

/// Much longer than all time limits of a store together: whatever takes so long hangs.
const HANGING: Duration = Duration::from_secs(30);

/// Nonsense for clients of any protocol: what is no reply at all, and what is the beginning of an impossible one.
fn nonsense() -> Vec<Nonsense> {
    const HTTP: &str = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nno\n";
    let mut sayings: Vec<Bytes> = vec![
        HTTP.into(),
        "SSH-2.0-OpenSSH_9.2\r\n".into(),
        vec![0; 4_096].into(),
        vec![0xff; 4_096].into(),
        // Redis: lengths that nothing has, nesting without end, answers to other questions.
        "$9223372036854775807\r\n".into(),
        "$-2\r\n".into(),
        "*2147483647\r\n".into(),
        "%9223372036854775807\r\n".into(),
        "*1\r\n".repeat(20_000).into(),
        "+OK\r\n$-1\r\n*0\r\n:1\r\n".into(),
        // PostgreSQL: messages of an impossible length, of an unknown kind, and from another part of the conversation.
        b"R\0\0\0\0".as_slice().into(),
        b"D\0\0\0\x03".as_slice().into(),
        b"T\x7f\xff\xff\xff".as_slice().into(),
        b"D\xff\xff\xff\xff\0\x01".as_slice().into(),
        b"D\0\0\0\x0a\x7f\xff\0\0\0\x01".as_slice().into(),
        b"T\0\0\0\x06\xff\xff".as_slice().into(),
        b"?\0\0\0\x04".as_slice().into(),
        b"R\0\0\0\x08\0\0\0\x63".as_slice().into(),
        b"E\0\0\0\x05\0".as_slice().into(),
        b"E\0\0\0\x08SXX\xfe".as_slice().into(),
    ];
    sayings.extend((0..4).map(random_bytes));
    let said = sayings
        .into_iter()
        .flat_map(|bytes| [Nonsense::Say(bytes.clone()), Nonsense::SayAndClose(bytes)]);
    [Nonsense::Close, Nonsense::Half].into_iter().chain(said).collect()
}

/// The same in every run: whoever sees a failure can see it again.
fn random_bytes(seed: u64) -> Bytes {
    let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..512).flat_map(|_| next()).collect()
}

fn claim(key: &StorageKey) -> Claim {
    Claim {
        key: *key,
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::random(),
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Refuse,
        max_attempts: 5,
    }
}

fn kept() -> Outcome {
    Outcome::Stored(StoredResponse {
        head: "head".into(),
        body: "body".into(),
    })
}

/// The reply of an honest server. The store is given little time, and a busy machine may need more.
async fn answered<T>(operation: impl AsyncFn() -> Result<T, Error>) -> T {
    for _ in 0..20 {
        match operation().await {
            Ok(reply) => return reply,
            Err(error) => assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}"),
        }
    }
    panic!("the server is honest and does not answer");
}

async fn held(store: &impl Store) -> (StorageKey, Owner) {
    let key = StorageKey::from_bytes(rand::random());
    let claim = claim(&key);
    match answered(async || store.claim(&claim).await).await {
        Decision::Execute(grant) => (key, grant.owner),
        other => panic!("{other:?}"),
    }
}

/// The operation ends in time, with the error of a server that cannot be used.
async fn assert_refused<T: std::fmt::Debug>(
    what: &str,
    nonsense: &Nonsense,
    operation: impl Future<Output = Result<T, Error>>,
) {
    let shown = format!("{nonsense:?}");
    let shown = &shown[..shown.len().min(80)];
    let Ok(done) = tokio::time::timeout(HANGING, operation).await else {
        panic!("{what} hangs at {shown}")
    };
    match done {
        Ok(told) => panic!("{what} believes {shown}: {told:?}"),
        Err(error) => {
            let kind = error.kind();
            let fits = matches!(kind, ErrorKind::StoreUnavailable | ErrorKind::Configuration);
            assert!(fits, "{what} at {shown}: {error:?}");
        }
    }
}

/// Asks until the store has found its server again.
async fn reconnected(store: &impl Store) {
    let asking = async {
        while store.peek(&StorageKey::from_bytes([0; 32])).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(HANGING, asking)
        .await
        .expect("the store does not connect again");
}

/// A store that is lied to in the middle of a conversation, at each of its operations.
async fn bears(store: &impl Store, liar: &Liar, nonsense: &Nonsense) {
    let (key, owner) = held(store).await;
    let fresh = claim(&StorageKey::from_bytes(rand::random()));
    liar.lie(nonsense);
    assert_refused("claim", nonsense, store.claim(&fresh)).await;
    liar.be_honest();
    reconnected(store).await;
    // Arrived or not, nobody else has it.
    let claimed = answered(async || store.claim(&fresh).await).await;
    assert!(matches!(claimed, Decision::Execute(grant) if grant.attempt == 1));
    liar.lie(nonsense);
    assert_refused("peek", nonsense, store.peek(&key)).await;
    liar.be_honest();
    reconnected(store).await;
    liar.lie(nonsense);
    assert_refused("complete", nonsense, store.complete(&key, owner, &kept(), HOUR)).await;
    // Not even the connection is made.
    assert_refused("peek", nonsense, store.peek(&key)).await;
    liar.be_honest();
    reconnected(store).await;
    let done = answered(async || store.complete(&key, owner, &kept(), HOUR).await).await;
    assert_eq!(done, Completion::Completed);
    let seen = answered(async || store.peek(&key).await).await;
    assert_eq!(seen.unwrap().status, Status::Completed(kept()));
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_not_taken_for_what_it_is_not() {
    let server = RedisServer::start();
    let connecting = nonsense().into_iter().map(async |nonsense| {
        let liar = Liar::before(([127, 0, 0, 1], server.port()).into()).await;
        liar.lie(&nonsense);
        let url = server.url_by(liar.address.port());
        let connect = RedisStore::builder().with_response_timeout(SHORT).connect(&url);
        assert_refused("connect", &nonsense, connect).await;
    });
    join_all(connecting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_may_talk_nonsense_and_sense_again() {
    let server = RedisServer::start();
    let bearing = nonsense().into_iter().map(async |nonsense| {
        let liar = Liar::before(([127, 0, 0, 1], server.port()).into()).await;
        let url = server.url_by(liar.address.port());
        let builder = RedisStore::builder().with_response_timeout(SHORT);
        let store = builder.connect(&url).await.unwrap();
        bears(&store, &liar, &nonsense).await;
    });
    join_all(bearing).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_not_taken_for_what_it_is_not() {
    let server = PostgresServer::start();
    let connecting = nonsense().into_iter().map(async |nonsense| {
        let liar = Liar::before(([127, 0, 0, 1], server.port()).into()).await;
        liar.lie(&nonsense);
        let url = server.url_by(liar.address.port());
        let connect = PostgresStore::builder().with_timeout(SHORT).connect(&url);
        assert_refused("connect", &nonsense, connect).await;
    });
    join_all(connecting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_may_talk_nonsense_and_sense_again() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let bearing = nonsense().into_iter().map(async |nonsense| {
        let liar = Liar::before(([127, 0, 0, 1], server.port()).into()).await;
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .acquire_timeout(SHORT * 2)
            .test_before_acquire(false);
        let pool = pool.connect(&server.url_by(liar.address.port())).await.unwrap();
        let store = PostgresStore::builder().with_timeout(SHORT).with_pool(pool).unwrap();
        bears(&store, &liar, &nonsense).await;
    });
    join_all(bearing).await;
}
