//! The layer over a boxed store, which the application chooses at run time.

use std::time::Duration;

use tower::Layer;
use tower_idempotency::{BoxStore, IdempotencyLayer};

use crate::support::{Handler, RemoteStore, post, send};

#[tokio::test]
async fn a_layer_works_with_any_boxed_store() {
    for store in [
        BoxStore::from_url("memory:").await.unwrap(),
        BoxStore::new(RemoteStore::new()),
    ] {
        let handler = Handler::new();
        let layer: IdempotencyLayer<BoxStore> = IdempotencyLayer::new(store);
        let service = layer.layer(handler.clone());
        let first = send(&service, post("k", "100")).await;
        let again = send(&service, post("k", "100")).await;
        assert!(again.is_replay());
        assert_eq!((first.body, handler.runs()), (again.body, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn owners_renew_their_leases_through_the_box() {
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(BoxStore::new(store.clone())).with_lease(Duration::from_secs(3));
    let service = layer.layer(Handler::new().taking(Duration::from_secs(20)));
    assert_eq!(send(&service, post("k", "100")).await.status(), 201);
    assert!(store.calls("renew") > 0);
}
