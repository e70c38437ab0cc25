//! Which attempts are counted, and which refusals are stored.

use std::convert::Infallible;
use std::future::ready;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::MemoryStore;
use tower_idempotency::client::{Done, Failure, OnceError, OnceLayer, ProviderProfile, once};
use tower_idempotency::receiver::{Receipt, ReceiverLayer};

use crate::support::{Fault, RemoteStore};

/// An attempt that released its key is not counted until an attempt was lost. From then on every
/// attempt is counted, because the record must stay as evidence.
#[tokio::test(start_paused = true)]
async fn attempts_are_counted_once_one_was_lost() {
    let store = RemoteStore::new();
    let numbers = Arc::new(Mutex::new(Vec::new()));
    for end in [
        Failure::NotDone("0"),
        Failure::Unknown("lost"),
        Failure::NotDone("1"),
        Failure::NotDone("2"),
        Failure::NotDone("3"),
    ] {
        let seen = Arc::clone(&numbers);
        let call = once(store.clone(), "k").at_least_once();
        let done: Result<Done<usize>, OnceError<usize, &str>> = call
            .run(move |attempt| {
                seen.lock().unwrap().push(attempt.number());
                ready(Err(end))
            })
            .await;
        assert!(done.is_err());
    }
    assert_eq!(*numbers.lock().unwrap(), [1, 1, 2, 3, 4]);
}

/// When the store fails at the claim, nothing runs, so the claim must not use up an attempt.
#[tokio::test(start_paused = true)]
async fn claims_that_fail_use_up_no_attempts() {
    let store = RemoteStore::new();
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let layer = ReceiverLayer::new(store.clone(), "c")
        .with_id(|id: &u64| *id)
        .at_least_once();
    let receiver = layer
        .on_error(tower_idempotency::OnError::Unknown)
        .layer(service_fn(move |_: u64| {
            let first = counted.fetch_add(1, Ordering::SeqCst) == 0;
            ready(if first { Err("reset") } else { Ok(()) })
        }));
    assert!(receiver.clone().oneshot(7).await.is_err());
    for _ in 0..4 {
        // Neither the claim nor its retry reaches the store.
        store.fail("claim", [Fault::Before, Fault::Before]);
        assert!(receiver.clone().oneshot(7).await.is_err());
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    let last = receiver.oneshot(7).await;
    assert!(matches!(last, Ok(Receipt::First(()))), "{last:?}");
}

/// A load balancer in front of the third party redirects to https, so the third party has done
/// nothing.
#[tokio::test]
async fn a_redirect_of_a_gateway_is_not_stored_as_the_response() {
    for status in [StatusCode::TEMPORARY_REDIRECT, StatusCode::PERMANENT_REDIRECT] {
        let calls = Arc::new(AtomicUsize::new(0));
        let http = service_fn(move |_: Request<Full<Bytes>>| {
            let first = calls.fetch_add(1, Ordering::SeqCst) == 0;
            let mut response = Response::new(Full::<Bytes>::from("done"));
            if first {
                *response.status_mut() = status;
            }
            ready(Ok::<_, Infallible>(response))
        });
        let client = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft()).layer(http);
        let request = || {
            let request = Request::post("https://a.example/pay").header("idempotency-key", "k");
            request.body(Full::<Bytes>::from("100")).unwrap()
        };
        client.clone().oneshot(request()).await.unwrap();
        let again = client.oneshot(request()).await.unwrap();
        assert_eq!(again.status(), StatusCode::OK);
    }
}
