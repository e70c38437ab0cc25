//! Nested layers that see the same key.

use std::time::Duration;

use tower::Layer;
use tower_idempotency::{BoxStore, IdempotencyLayer, MemoryStore, Store};

use crate::support::{Fault, Handler, RemoteStore, Timer, post, send, start};

/// Each of two processes has an outer layer over its own store and an inner layer over a shared
/// store. The inner layer took the key of the outer layer for its own and passed the request on
/// unguarded.
#[tokio::test]
async fn an_inner_layer_guards_its_store_when_outer_layers_guard_other_stores() {
    let shared = RemoteStore::new();
    let handler = Handler::new();
    let process = |layers: usize| {
        let mut service =
            tower::util::BoxCloneService::new(IdempotencyLayer::new(shared.clone()).layer(handler.clone()));
        for _ in 0..layers {
            service = tower::util::BoxCloneService::new(IdempotencyLayer::new(MemoryStore::new()).layer(service));
        }
        service
    };
    for layers in [1, 2, 0] {
        assert_eq!(send(&process(layers), post("k", "pay 100")).await.status(), 201);
    }
    assert_eq!((handler.runs(), shared.calls("claim")), (1, 3));
}

/// Another request holds the key in the inner layer, and did not pass the outer one.
#[tokio::test(start_paused = true)]
async fn an_inner_layer_guards_its_store_while_another_request_holds_the_key_in_it() {
    for (inner, outer) in [
        (BoxStore::new(MemoryStore::new()), BoxStore::new(MemoryStore::new())),
        (BoxStore::new(RemoteStore::new()), BoxStore::new(RemoteStore::new())),
    ] {
        let handler = Handler::new().taking(Duration::from_secs(1));
        let within = IdempotencyLayer::new(inner).layer(handler.clone());
        let around = IdempotencyLayer::new(outer).layer(within.clone());
        let first = start(&within, post("k", "pay"));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let second = send(&around, post("k", "pay")).await;
        assert_eq!((first.await.unwrap().status(), second.status()), (201, 201));
        assert_eq!((second.is_replay(), handler.runs()), (true, 1));
    }
}

/// Several handles may reach the same store: clones, boxes, or two connections.
#[tokio::test(start_paused = true)]
async fn an_inner_layer_steps_aside_for_an_outer_one_that_reaches_the_same_store_by_another_handle() {
    async fn check<In: Store, Out: Store>(inner: In, outer: Out) {
        let handler = Handler::new();
        let inner = IdempotencyLayer::new(inner).layer(handler.clone());
        let service = IdempotencyLayer::new(outer).layer(inner);
        let timer = Timer::start();
        let first = send(&service, post("k", "pay")).await;
        let again = send(&service, post("k", "pay")).await;
        assert_eq!((first.status(), again.is_replay(), handler.runs()), (201, true, 1));
        assert!(
            timer.elapsed() < Duration::from_secs(1),
            "the layers waited for each other"
        );
    }
    let memory = MemoryStore::new();
    check(memory.clone(), memory).await;
    let remote = RemoteStore::new();
    check(remote.clone(), remote).await;
    let memory = MemoryStore::new();
    check(BoxStore::new(memory.clone()), std::sync::Arc::new(memory)).await;
    let remote = RemoteStore::new();
    check(BoxStore::new(BoxStore::new(remote.clone())), remote).await;
}

#[tokio::test(start_paused = true)]
async fn an_inner_layer_steps_aside_for_the_outermost_layer_on_its_store() {
    let (store, between) = (RemoteStore::new(), RemoteStore::new());
    let handler = Handler::new();
    let layer = |store: &RemoteStore| IdempotencyLayer::new(store.clone());
    let service = layer(&store).layer(layer(&between).layer(layer(&store).layer(handler.clone())));
    let timer = Timer::start();
    let first = send(&service, post("k", "pay")).await;
    assert!(send(&service, post("k", "pay")).await.is_replay());
    assert_eq!(
        (
            first.status(),
            handler.runs(),
            store.calls("claim"),
            between.calls("claim")
        ),
        (201, 1, 2, 1)
    );
    assert!(
        timer.elapsed() < Duration::from_secs(1),
        "the layers waited for each other"
    );
}

#[tokio::test(start_paused = true)]
async fn an_inner_layer_that_cannot_read_its_store_runs_nothing() {
    let (outer, inner) = (RemoteStore::new(), RemoteStore::new());
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(inner.clone());
    let service = IdempotencyLayer::new(outer).layer(layer.layer(handler.clone()));
    inner.fail("peek", [Fault::Before, Fault::Before]);
    let refused = send(&service, post("k", "pay")).await;
    assert_eq!(
        (refused.status(), refused.code(), handler.runs()),
        (503, "store-unavailable", 0)
    );
    // After one failure the layer looks again. The outer layer did not store the refusal.
    inner.fail("peek", [Fault::Before]);
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    assert_eq!(handler.runs(), 1);
}

/// A clone shares the table of its process with the layer, so the store need not be asked.
#[tokio::test]
async fn a_clone_of_a_layer_steps_aside_for_it_without_a_look_at_the_store() {
    let (store, handler) = (RemoteStore::new(), Handler::new());
    let layer = IdempotencyLayer::new(store.clone());
    let service = layer.clone().layer(layer.layer(handler.clone()));
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    assert_eq!((handler.runs(), store.calls("claim"), store.calls("peek")), (1, 1, 0));
}

#[tokio::test]
async fn a_clone_of_a_layer_guards_the_other_key_that_its_own_settings_name() {
    let (store, handler) = (RemoteStore::new(), Handler::new());
    let layer = IdempotencyLayer::new(store.clone());
    let within = layer.clone().with_namespace("within").layer(handler.clone());
    let service = layer.layer(within.clone());
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    assert!(send(&within, post("k", "pay")).await.is_replay());
    assert_eq!((handler.runs(), store.len()), (1, 2));
}

#[tokio::test]
async fn an_inner_layer_that_cannot_read_its_store_runs_unprotected_only_during_an_outage() {
    for (fault, status, peeks) in [(Fault::Before, 201, 2), (Fault::Corrupt, 500, 1)] {
        let (inner, handler) = (RemoteStore::new(), Handler::new());
        let layer = IdempotencyLayer::new(inner.clone()).dangerously_run_unprotected_when_the_store_fails();
        let service = IdempotencyLayer::new(RemoteStore::new()).layer(layer.layer(handler.clone()));
        inner.fail("peek", [fault; 2]);
        assert_eq!(send(&service, post("k", "pay")).await.status(), status);
        assert_eq!(
            (handler.runs(), inner.calls("peek")),
            (usize::from(status == 201), peeks)
        );
    }
}
