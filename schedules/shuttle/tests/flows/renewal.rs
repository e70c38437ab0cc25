//! Renewal of leases, while handlers run and while they end.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use shuttle::future::yield_now;
use tower_idempotency::protocol::{Snapshot, Status, StorageKey};
use tower_idempotency::{Idempotency, IdempotencyLayer, OnError, Store};
use tower_layer::Layer;
use tower_service::Service;

use crate::check;
use crate::handler::Body;
use crate::remote::RemoteStore;

/// A handler that runs until the store has seen a renewal of its key.
#[derive(Clone)]
struct Slow {
    store: RemoteStore,
    key: StorageKey,
    status: StatusCode,
}

impl Service<Request<Body>> for Slow {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let before = this.store.renewals(&this.key);
            while this.store.renewals(&this.key) == before {
                yield_now().await;
            }
            let mut response = Response::new(Full::from("done"));
            *response.status_mut() = this.status;
            Ok(response)
        })
    }
}

async fn send(mut service: Idempotency<Slow, RemoteStore>, key: &'static str) -> u16 {
    let request = Request::post("/payments")
        .header("Idempotency-Key", key)
        .body(Body::default())
        .unwrap();
    service.call(request).await.unwrap().status().as_u16()
}

/// Sends keys one after the other, each at once after the response of the one before. The task that
/// renews leases may be about to end at that time.
async fn send_all(store: RemoteStore, layer: IdempotencyLayer<RemoteStore>, names: &[&'static str]) {
    for name in names {
        let key = layer.storage_key(None, name).unwrap();
        let slow = Slow {
            store: store.clone(),
            key,
            status: StatusCode::CREATED,
        };
        assert_eq!(send(layer.layer(slow), name).await, 201);
    }
}

fn renewed() {
    let (store, is_over) = (RemoteStore::default(), Arc::<AtomicBool>::default());
    let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(1));
    let clock = store.spawn_clock(&is_over);
    let other = tokio::spawn(send_all(store.clone(), layer.clone(), &["k3"]));
    shuttle::future::block_on(async {
        send_all(store, layer, &["k1", "k2"]).await;
        other.await.unwrap();
        is_over.store(true, Ordering::SeqCst);
        clock.await.unwrap();
    });
}

#[test]
fn the_lease_of_every_running_handler_is_renewed() {
    check(renewed);
}

/// A handler fails while a renewal is in flight, so that its attempt is given up. The renewal may
/// reach the store later.
fn given_up() {
    let (store, is_over) = (RemoteStore::default(), Arc::<AtomicBool>::default());
    let layer = IdempotencyLayer::new(store.clone())
        .with_lease(Duration::from_secs(1))
        .on_error(OnError::Unknown);
    let key = layer.storage_key(None, "k").unwrap();
    let slow = Slow {
        store: store.clone(),
        key,
        status: StatusCode::BAD_GATEWAY,
    };
    let clock = store.spawn_clock(&is_over);
    shuttle::future::block_on(async {
        assert_eq!(send(layer.layer(slow), "k").await, 502);
        // No time passes from here on, so that the lease does not end by itself.
        is_over.store(true, Ordering::SeqCst);
        clock.await.unwrap();
        while !matches!(
            store.peek(&key).await,
            Ok(Some(Snapshot {
                status: Status::Lost,
                ..
            }))
        ) {
            yield_now().await;
        }
    });
}

#[test]
fn a_renewal_in_flight_does_not_prolong_a_lease_that_is_given_up() {
    check(given_up);
}
