//! The conformance kit.

use std::sync::{Arc, Mutex};

use tower_idempotency::BoxStore;
use tower_idempotency::protocol::StorageKey;
use tower_idempotency::store::conformance;

use super::{RedisServer, connect};
use crate::support::sequences;

#[tokio::test(flavor = "multi_thread")]
async fn the_store_meets_the_contract() {
    let server = RedisServer::start();
    let store = connect(&server).await;
    conformance::all(&store).await;
    conformance::all(&Arc::new(store.clone())).await;
    conformance::all(&BoxStore::new(store.clone())).await;
    conformance::differential(&store, sequences(), 1).await;
    let damage = |key: StorageKey| {
        let hex: String = key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        server.command::<()>(&format!("SETRANGE idempotency:{hex} 0 9"));
        std::future::ready(())
    };
    conformance::unreadable_is_not_absent(&store, damage).await;
    let url = server.url();
    let server = Mutex::new(server);
    let reopen = || async {
        server.lock().unwrap().kill();
        server.lock().unwrap().restart();
        tower_idempotency::RedisStore::connect(&url).await.unwrap()
    };
    conformance::durable(store, reopen).await;
}
