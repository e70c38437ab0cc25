//! Deferred writes: the writes that a process owes its store after the caller has its response.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tower_idempotency::protocol::Status;
use tower_idempotency::{IdempotencyLayer, Store};
use tower_layer::Layer;

use crate::check;
use crate::handler::{Handler, send};
use crate::remote::RemoteStore;

/// Sends two duplicates to a store with faults, and drains the layer. The key must then be free or
/// completed, because the drain also waits for the deferred writes.
fn with_faults(store: RemoteStore) {
    let handler = Handler::default();
    let layer = IdempotencyLayer::new(store.clone())
        .with_wait(Duration::MAX)
        .with_completion_timeout(Duration::from_secs(1));
    let (drain, key) = (layer.drain(), layer.storage_key(None, "k").unwrap());
    let service = layer.layer(handler.clone());
    let is_over = Arc::<AtomicBool>::default();
    let clock = store.spawn_clock(&is_over);
    shuttle::future::block_on(async {
        let callers: Vec<_> = (0..2).map(|_| tokio::spawn(send(service.clone(), "pay"))).collect();
        for caller in callers {
            let (status, body) = caller.await.unwrap();
            match status.as_u16() {
                201 => assert_eq!(&body[..], b"run 0"),
                status => assert_eq!(status, 503, "{body:?}"),
            }
        }
        drain.wait().await;
        assert_eq!(
            (drain.running(), handler.is_running()),
            (0, false),
            "nothing is left (I11)"
        );
        let status = store.peek(&key).await.unwrap().map(|seen| seen.status);
        assert!(matches!(status, None | Some(Status::Completed(_))), "{status:?}");
        store.end_faults();
        let (status, body) = send(service, "pay").await;
        assert_eq!((status.as_u16(), &body[..]), (201, &b"run 0"[..]));
        assert_eq!(handler.runs(), 1);
        is_over.store(true, Ordering::SeqCst);
        clock.await.unwrap();
    });
}

#[test]
fn a_claim_that_got_no_reply_is_released() {
    check(|| with_faults(RemoteStore::losing_claims(2)));
}

#[test]
fn an_outcome_that_the_store_did_not_take_is_recorded_later() {
    // The caller's own tries end before the faults do.
    check(|| with_faults(RemoteStore::failing_completions(10)));
}
