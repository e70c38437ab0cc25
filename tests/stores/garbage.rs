//! Servers that reply with garbage. The store returns an error in good time, never panics, never
//! reports a key as absent, and works again when the server does.

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use sqlx::postgres::PgPoolOptions;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, IfLost, Nonce, Outcome, Owner, Status, StorageKey, StoredResponse,
};
use tower_idempotency::{Error, ErrorKind, PostgresStore, RedisStore, Store};

use crate::support::garbling_proxy::{Garbage, GarblingProxy};
use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;

const HOUR: Duration = Duration::from_secs(3_600);

/// The time that the stores allow a server.
const SHORT: Duration = Duration::from_millis(500);

/// Much longer than all time limits of a store together. An operation that takes longer hangs.
const HANGING: Duration = Duration::from_secs(30);

/// Garbage for clients of any protocol: bytes that are no reply, and the beginnings of impossible
/// replies.
fn garbage() -> Vec<Garbage> {
    const HTTP: &str = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nno\n";
    let mut replies: Vec<Bytes> = vec![
        HTTP.into(),
        "SSH-2.0-OpenSSH_9.2\r\n".into(),
        vec![0; 4_096].into(),
        vec![0xff; 4_096].into(),
        // Redis: impossible lengths, endless nesting, and replies to other commands.
        "$9223372036854775807\r\n".into(),
        "$-2\r\n".into(),
        "*2147483647\r\n".into(),
        "%9223372036854775807\r\n".into(),
        "*1\r\n".repeat(20_000).into(),
        "+OK\r\n$-1\r\n*0\r\n:1\r\n".into(),
        // PostgreSQL: messages with an impossible length, of an unknown kind, and from another part
        // of the conversation.
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
    replies.extend((0..4).map(random_bytes));
    let replies = replies
        .into_iter()
        .flat_map(|bytes| [Garbage::Bytes(bytes.clone()), Garbage::BytesThenClose(bytes)]);
    [Garbage::Close, Garbage::Half].into_iter().chain(replies).collect()
}

/// The same bytes in every run, so that a failure can be repeated.
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

fn stored() -> Outcome {
    Outcome::Stored(StoredResponse {
        head: "head".into(),
        body: "body".into(),
    })
}

/// Returns the reply of a server whose replies pass the proxy unchanged. The store allows little time, and a busy machine may need
/// several attempts.
async fn reply_in_the_end<T>(operation: impl AsyncFn() -> Result<T, Error>) -> T {
    for _ in 0..20 {
        match operation().await {
            Ok(reply) => return reply,
            Err(error) => assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{error}"),
        }
    }
    panic!("the proxy passes everything on, but no reply comes");
}

async fn held(store: &impl Store) -> (StorageKey, Owner) {
    let key = StorageKey::from_bytes(rand::random());
    let claim = claim(&key);
    match reply_in_the_end(async || store.claim(&claim).await).await {
        Decision::Execute(grant) => (key, grant.owner),
        other => panic!("{other:?}"),
    }
}

/// Checks that the operation ends in time, with the error of an unusable server.
async fn assert_refused<T: std::fmt::Debug>(
    what: &str,
    garbage: &Garbage,
    operation: impl Future<Output = Result<T, Error>>,
) {
    let shown = format!("{garbage:?}");
    let shown = &shown[..shown.len().min(80)];
    let Ok(done) = tokio::time::timeout(HANGING, operation).await else {
        panic!("{what} hangs at {shown}")
    };
    match done {
        Ok(value) => panic!("{what} accepts {shown}: {value:?}"),
        Err(error) => {
            let kind = error.kind();
            let fits = matches!(kind, ErrorKind::StoreUnavailable | ErrorKind::Configuration);
            assert!(fits, "{what} at {shown}: {error:?}");
        }
    }
}

/// Repeats an operation until the store has found its server again.
async fn reconnected(store: &impl Store) {
    let connecting = async {
        while store.peek(&StorageKey::from_bytes([0; 32])).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(HANGING, connecting)
        .await
        .expect("the store reconnects");
}

/// Checks each operation of a store whose server sends garbage in the middle of a conversation.
async fn survives(store: &impl Store, proxy: &GarblingProxy, garbage: &Garbage) {
    let (key, owner) = held(store).await;
    let fresh = claim(&StorageKey::from_bytes(rand::random()));
    proxy.garble(garbage);
    assert_refused("claim", garbage, store.claim(&fresh)).await;
    proxy.pass_on();
    reconnected(store).await;
    // No other caller has the key, whether or not the first claim reached the server.
    let claimed = reply_in_the_end(async || store.claim(&fresh).await).await;
    assert!(matches!(claimed, Decision::Execute(grant) if grant.attempt == 1));
    proxy.garble(garbage);
    assert_refused("peek", garbage, store.peek(&key)).await;
    proxy.pass_on();
    reconnected(store).await;
    proxy.garble(garbage);
    assert_refused("complete", garbage, store.complete(&key, owner, &stored(), HOUR)).await;
    // The store cannot even connect.
    assert_refused("peek", garbage, store.peek(&key)).await;
    proxy.pass_on();
    reconnected(store).await;
    let done = reply_in_the_end(async || store.complete(&key, owner, &stored(), HOUR).await).await;
    assert_eq!(done, Completion::Completed);
    let seen = reply_in_the_end(async || store.peek(&key).await).await;
    assert_eq!(seen.unwrap().status, Status::Completed(stored()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_replies_garbage_is_no_redis() {
    let server = RedisServer::start();
    let connecting = garbage().into_iter().map(async |garbage| {
        let proxy = GarblingProxy::before(([127, 0, 0, 1], server.port()).into()).await;
        proxy.garble(&garbage);
        let url = server.url_by(proxy.address.port());
        let connect = RedisStore::builder().with_response_timeout(SHORT).connect(&url);
        assert_refused("connect", &garbage, connect).await;
    });
    join_all(connecting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_store_survives_garbage_and_works_again() {
    let server = RedisServer::start();
    let surviving = garbage().into_iter().map(async |garbage| {
        let proxy = GarblingProxy::before(([127, 0, 0, 1], server.port()).into()).await;
        let url = server.url_by(proxy.address.port());
        let builder = RedisStore::builder().with_response_timeout(SHORT);
        let store = builder.connect(&url).await.unwrap();
        survives(&store, &proxy, &garbage).await;
    });
    join_all(surviving).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_replies_garbage_is_no_postgres() {
    let server = PostgresServer::start();
    let connecting = garbage().into_iter().map(async |garbage| {
        let proxy = GarblingProxy::before(([127, 0, 0, 1], server.port()).into()).await;
        proxy.garble(&garbage);
        let url = server.url_by(proxy.address.port());
        let connect = PostgresStore::builder().with_timeout(SHORT).connect(&url);
        assert_refused("connect", &garbage, connect).await;
    });
    join_all(connecting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_store_survives_garbage_and_works_again() {
    let server = PostgresServer::start();
    PostgresStore::connect(&server.url()).await.unwrap();
    let surviving = garbage().into_iter().map(async |garbage| {
        let proxy = GarblingProxy::before(([127, 0, 0, 1], server.port()).into()).await;
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .acquire_timeout(SHORT * 2)
            .test_before_acquire(false);
        let pool = pool.connect(&server.url_by(proxy.address.port())).await.unwrap();
        let store = PostgresStore::builder().with_timeout(SHORT).with_pool(pool).unwrap();
        survives(&store, &proxy, &garbage).await;
    });
    join_all(surviving).await;
}
