//! Executions whose callers leave at any time.

use std::pin::pin;
use std::task::Poll;

use futures::poll;
use shuttle::rand::Rng;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Store};
use tower_layer::Layer;

use crate::check;
use crate::handler::{Guarded, Handler, send};

/// Sends a request, and leaves after a few polls.
async fn send_and_leave<St: Store>(service: Guarded<St>) {
    let mut sending = pin!(send(service, "pay"));
    let polls = shuttle::rand::thread_rng().gen_range(0..4);
    for _ in 0..polls {
        if let Poll::Ready((status, body)) = poll!(sending.as_mut()) {
            assert_eq!((status.as_u16(), &body[..]), (201, &b"run 0"[..]));
            return;
        }
        shuttle::future::yield_now().await;
    }
}

fn abandoned() {
    let (store, handler) = (MemoryStore::new(), Handler::default());
    let layer = IdempotencyLayer::new(store.clone());
    let drain = layer.drain();
    let service = layer.layer(handler.clone());
    shuttle::future::block_on(async {
        let leaving: Vec<_> = (0..2).map(|_| tokio::spawn(send_and_leave(service.clone()))).collect();
        let staying = tokio::spawn(send(service.clone(), "pay"));
        for caller in leaving {
            caller.await.unwrap();
        }
        let (status, body) = staying.await.unwrap();
        assert_eq!((status.as_u16(), &body[..]), (201, &b"run 0"[..]));
        drain.wait().await;
        assert_eq!(handler.runs(), 1);
        assert_nothing_is_left(&store, &handler, drain.running());
    });
}

#[test]
fn duplicates_of_an_abandoned_request_get_its_response() {
    check(abandoned);
}

fn drained() {
    let (store, handler) = (MemoryStore::new(), Handler::default());
    let layer = IdempotencyLayer::new(store.clone());
    let drain = layer.drain();
    let service = layer.layer(handler.clone());
    shuttle::future::block_on(async {
        let leaving: Vec<_> = (0..3).map(|_| tokio::spawn(send_and_leave(service.clone()))).collect();
        for caller in leaving {
            caller.await.unwrap();
        }
        drain.wait().await;
        assert_nothing_is_left(&store, &handler, drain.running());
        let runs = handler.runs();
        assert!(runs <= 1);
        assert_eq!(&send(service, "pay").await.1[..], b"run 0");
        assert_eq!(handler.runs(), 1, "the run is recorded (I6)");
    });
}

#[test]
fn a_drain_waits_for_all_abandoned_executions() {
    check(drained);
}

fn assert_nothing_is_left(store: &MemoryStore, handler: &Handler, running: usize) {
    let stats = store.stats();
    let left = (stats.in_flight, stats.waiters, handler.is_running(), running);
    assert_eq!(left, (0, 0, false, 0), "after draining nothing is left (I11)");
}
