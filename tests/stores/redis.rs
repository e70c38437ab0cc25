//! The Redis store against its contract, against the pure record, and against servers that fail.

mod cluster;
mod contract;
mod faults;
mod kit;
mod layers;
mod logins;
mod network;
mod oracle;
mod replicas;
mod rights;
mod roles;
mod servers;

use std::time::Duration;

use bytes::Bytes;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, StorageKey, StoredResponse,
};
use tower_idempotency::{RedisStore, Store};

use crate::support::redis::RedisServer;

const HOUR: Duration = Duration::from_secs(3_600);

fn claim(key: u8, nonce: u8) -> Claim {
    Claim {
        key: StorageKey::from_bytes([key; 32]),
        fingerprint: Fingerprint::of(b"pay"),
        nonce: Nonce::from_bytes([nonce; 16]),
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Refuse,
        max_attempts: 5,
    }
}

fn stored(body: impl Into<Bytes>) -> Outcome {
    Outcome::Stored(StoredResponse {
        head: "head".into(),
        body: body.into(),
    })
}

/// The name of a record's key on the server.
fn name(key: u8) -> String {
    format!("idempotency:{}", format!("{key:02x}").repeat(32))
}

async fn connect(server: &RedisServer) -> RedisStore {
    // A busy machine may need longer for a reply than the 500 ms of the default.
    let builder = RedisStore::builder().with_response_timeout(Duration::from_secs(5));
    builder.connect(&server.url()).await.unwrap()
}

async fn granted(store: &RedisStore, claim: &Claim) -> Grant {
    match store.claim(claim).await.unwrap() {
        Decision::Execute(grant) | Decision::Recover(grant) => grant,
        other => panic!("the claim is not granted: {other:?}"),
    }
}

async fn completed(store: &RedisStore, key: u8, body: &str) {
    let grant = granted(store, &claim(key, 0)).await;
    let done = store
        .complete(&claim(key, 0).key, grant.owner, &stored(body.to_owned()), HOUR)
        .await;
    assert_eq!(done.unwrap(), Completion::Completed);
}

async fn replayed(store: &RedisStore, key: u8) -> StoredResponse {
    match store.claim(&claim(key, 99)).await.unwrap() {
        Decision::Replay(response) => response,
        other => panic!("the response is not replayed: {other:?}"),
    }
}

/// Repeats an operation until it succeeds. A server needs some time to come back.
async fn eventually<T, E: std::fmt::Debug, F: Future<Output = Result<T, E>>>(mut attempt: impl FnMut() -> F) -> T {
    for _ in 0..40 {
        if let Ok(value) = attempt().await {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    attempt().await.unwrap()
}
