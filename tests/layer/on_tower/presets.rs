//! Presets behave as the SDKs of their providers expect, and the application can render refusals.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderName, Request, Response, StatusCode};
use tower::{Layer, ServiceExt};
use tower_idempotency::{DoNotStore, IdempotencyLayer, MemoryStore, OnError, OnLost, Refusal, Scope, StoreResponse};

use crate::support::{AnyBody, Fault, Got, Handler, RemoteStore, advance, full, post, send, start, text};

type Preset = fn(IdempotencyLayer<RemoteStore>) -> IdempotencyLayer<RemoteStore>;

fn stripe() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new()).stripe()
}

fn with(headers: &[(&str, &str)]) -> Request<AnyBody> {
    let mut request = Request::post("/charges");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(full("amount=100")).unwrap()
}

fn advice(got: &Got) -> Option<&str> {
    got.head
        .headers
        .get("stripe-should-retry")
        .map(|value| value.to_str().unwrap())
}

/// stripe-node retries 409 and 5xx unless the header field is `false`. It made four attempts in
/// vain.
#[tokio::test]
async fn a_stored_failure_advises_stripe_sdks_against_a_retry() {
    for status in [402, 409, 500, 503] {
        let failing = move |_| text(StatusCode::from_u16(status).unwrap(), "failed");
        let service = stripe().layer(Handler::new().responding(failing));
        let first = send(&service, post("k", "x")).await;
        let again = send(&service, post("k", "x")).await;
        assert!(again.is_replay(), "{status}");
        for got in [&first, &again] {
            assert_eq!((got.status(), advice(got)), (status, Some("false")));
        }
    }
}

#[tokio::test]
async fn a_stored_panic_and_a_response_marked_as_stored_advise_stripe_sdks_against_a_retry() {
    let panics = stripe().layer(Handler::new().responding(|_| panic!("handler")));
    for _ in 0..2 {
        let got = send(&panics, post("k", "x")).await;
        assert_eq!((got.status(), advice(&got)), (500, Some("false")));
    }
    let marked = |_| {
        let mut response = text(StatusCode::TOO_MANY_REQUESTS, "never again");
        response.extensions_mut().insert(StoreResponse);
        response
    };
    let service = stripe().layer(Handler::new().responding(marked));
    assert_eq!(advice(&send(&service, post("k", "x")).await), Some("false"));
}

/// Without advice, an SDK decides by the status, and its retry runs again.
#[tokio::test]
async fn a_response_that_frees_its_key_or_succeeds_gives_no_advice() {
    for (layer, status) in [
        (stripe(), 200),
        (stripe(), 429),
        (stripe().on_error(OnError::Release), 500),
    ] {
        let service = layer.layer(Handler::new().responding(move |_| text(StatusCode::from_u16(status).unwrap(), "x")));
        assert_eq!(advice(&send(&service, post("k", "x")).await), None, "{status}");
    }
    let vetoed = |_| {
        let mut response = text(StatusCode::SERVICE_UNAVAILABLE, "later");
        response.extensions_mut().insert(DoNotStore);
        response
    };
    let service = stripe().layer(Handler::new().responding(vetoed));
    assert_eq!(advice(&send(&service, post("k", "x")).await), None);
    // The other presets give no advice either.
    let service = IdempotencyLayer::new(MemoryStore::new()).stripe().ietf();
    let missing = send(&service.layer(Handler::new()), with(&[])).await;
    assert_eq!((missing.status(), advice(&missing)), (400, None));
}

#[tokio::test]
async fn a_failure_of_unknown_outcome_advises_stripe_sdks_against_a_retry() {
    let failing = |_| text(StatusCode::BAD_GATEWAY, "failed");
    let service = stripe()
        .on_error(OnError::Unknown)
        .layer(Handler::new().responding(failing));
    for status in [502, 409, 409] {
        let got = send(&service, post("k", "x")).await;
        assert_eq!((got.status(), advice(&got)), (status, Some("false")));
    }
}

/// Stripe saves no result of a request that failed its validation.
#[tokio::test]
async fn only_the_stripe_preset_frees_the_key_of_a_failed_validation() {
    for status in [400, 422] {
        for (layer, runs) in [(stripe(), 2), (IdempotencyLayer::new(MemoryStore::new()), 1)] {
            let failing = move |_| text(StatusCode::from_u16(status).unwrap(), "invalid");
            let handler = Handler::new().responding(failing);
            let service = layer.layer(handler.clone());
            for _ in 0..2 {
                assert_eq!(send(&service, post("k", "x")).await.status(), status);
            }
            assert_eq!(handler.runs(), runs, "{status}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn presets_store_responses_as_long_as_they_promise() {
    const HOUR: Duration = Duration::from_secs(60 * 60);
    let stripe: Preset = IdempotencyLayer::stripe;
    for (preset, retention) in [(stripe, 24 * HOUR), (IdempotencyLayer::webhooks, 7 * 24 * HOUR)] {
        let handler = Handler::new();
        let service = preset(IdempotencyLayer::new(RemoteStore::new())).layer(handler.clone());
        assert_eq!(send(&service, post("k", "x")).await.status(), 201);
        tokio::time::sleep(retention - HOUR / 60).await;
        assert!(send(&service, post("k", "x")).await.is_replay());
        tokio::time::sleep(HOUR / 30).await;
        assert!(!send(&service, post("k", "x")).await.is_replay());
        assert_eq!(handler.runs(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_advises_stripe_sdks_whether_a_retry_can_help() {
    let service = stripe()
        .require_key()
        .with_key_validator(|key| key != "bad")
        .layer(Handler::new().taking(Duration::from_secs(1)));
    let running = start(&service, with(&[("idempotency-key", "k")]));
    advance(Duration::from_millis(1)).await;
    let in_use = send(&service, with(&[("idempotency-key", "k")])).await;
    assert_eq!((in_use.status(), advice(&in_use)), (409, Some("true")));
    assert_eq!(running.await.unwrap().status(), 201);
    for headers in [&[("idempotency-key", "bad")][..], &[]] {
        let refused = send(&service, with(headers)).await;
        assert_eq!((refused.status(), advice(&refused)), (400, Some("false")));
    }
    let mismatch = send(&service, post("k", "another amount")).await;
    assert_eq!((mismatch.status(), advice(&mismatch)), (400, Some("false")));
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Before, Fault::Before, Fault::Misconfigured]);
    let service = IdempotencyLayer::new(store).stripe().layer(Handler::new());
    for (status, wanted) in [(503, "true"), (500, "false")] {
        let refused = send(&service, post("k", "x")).await;
        assert_eq!((refused.status(), advice(&refused)), (status, Some(wanted)));
    }
}

#[tokio::test]
async fn the_should_retry_header_can_have_another_name() {
    let service = stripe()
        .with_should_retry_header(Some(HeaderName::from_static("x-should-retry")))
        .layer(Handler::new().responding(|_| text(StatusCode::INTERNAL_SERVER_ERROR, "x")));
    let got = send(&service, post("k", "x")).await;
    assert_eq!(
        (&got.head.headers["x-should-retry"], advice(&got)),
        (&"false".parse().unwrap(), None)
    );
}

#[tokio::test]
async fn only_the_stripe_preset_accepts_keys_with_spaces() {
    let spaced = || with(&[("idempotency-key", "order 7, \"first\"")]);
    let service = stripe().layer(Handler::new());
    assert_eq!(send(&service, spaced()).await.status(), 201);
    assert!(send(&service, spaced()).await.is_replay());
    let two = send(&service, with(&[("idempotency-key", "order  7, \"first\"")])).await;
    assert!(!two.is_replay(), "two spaces make another key");
    for layer in [
        IdempotencyLayer::new(MemoryStore::new()),
        stripe().ietf(),
        IdempotencyLayer::new(MemoryStore::new()).webhooks(),
    ] {
        let refused = send(&layer.layer(Handler::new()), spaced()).await;
        assert_eq!((refused.status(), refused.code()), (400, "key-invalid"));
    }
}

#[tokio::test]
async fn another_stripe_account_never_gets_the_response_for_the_first_account() {
    let of = |account: Option<&'static str>| {
        let mut headers = vec![("idempotency-key", "k"), ("authorization", "Bearer platform")];
        headers.extend(account.map(|account| ("stripe-account", account)));
        with(&headers)
    };
    for layer in [stripe(), stripe().with_scope(|_| Scope::from("platform"))] {
        let handler = Handler::new();
        let service = layer.layer(handler.clone());
        assert_eq!(send(&service, of(Some("acct_1"))).await.status(), 201);
        assert!(send(&service, of(Some("acct_1"))).await.is_replay());
        for other in [Some("acct_2"), None] {
            let refused = send(&service, of(other)).await;
            assert_eq!((refused.status(), refused.code()), (400, "key-reused"));
        }
        assert_eq!(handler.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_name_the_configured_header_field() {
    for layer in [
        IdempotencyLayer::new(MemoryStore::new()),
        IdempotencyLayer::new(MemoryStore::new()).stripe(),
    ] {
        let service = layer
            .with_header(HeaderName::from_static("x-request-key"))
            .require_key()
            .with_wait(Duration::ZERO)
            .layer(Handler::new().taking(Duration::from_secs(1)));
        let running = start(&service, with(&[("x-request-key", "k")]));
        advance(Duration::from_millis(1)).await;
        for (headers, title) in [
            (&[][..], "x-request-key is missing"),
            (&[("x-request-key", "a\tb")][..], "x-request-key is invalid"),
            (
                &[("x-request-key", "k")][..],
                "A request is outstanding for this x-request-key",
            ),
        ] {
            let refused = send(&service, with(headers)).await;
            let body = std::str::from_utf8(&refused.body).unwrap();
            assert!(body.contains(title) && !body.contains("Idempotency-Key"), "{body}");
            assert_eq!(refused.head.extensions.get::<Refusal>().unwrap().title(), title);
        }
        running.await.unwrap();
        let reused = send(&service, with(&[("x-request-key", "k"), ("host", "other.example")])).await;
        assert!(
            std::str::from_utf8(&reused.body)
                .unwrap()
                .contains("x-request-key is already used")
        );
    }
}

/// Adds a renderer that writes the code of the refusal and the request id, and records the paths.
fn with_ids<St: tower_idempotency::Store>(
    layer: IdempotencyLayer<St>,
) -> (IdempotencyLayer<St>, Arc<Mutex<Vec<String>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let paths = Arc::clone(&seen);
    let render = move |refusal: &Refusal, head: &Parts| {
        paths.lock().unwrap().push(format!("{} {}", head.method, head.uri));
        let id = head.headers.get("x-id").map_or("none", |id| id.to_str().unwrap());
        let mut response = Response::new(Bytes::from(format!("{} {id}", refusal.code())));
        *response.status_mut() = refusal.status();
        response
    };
    (layer.with_refusals(render), seen)
}

fn identified(key: &str, id: &str, body: &'static str) -> Request<AnyBody> {
    let request = Request::post("/pay?x=1")
        .header("idempotency-key", key)
        .header("x-id", id);
    request.body(full(body)).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_renderer_gets_the_head_of_every_refused_request() {
    let (layer, seen) = with_ids(IdempotencyLayer::new(MemoryStore::new()).with_body_limit(10));
    let panics = || Handler::new().responding(|_| panic!("handler"));
    // The layer refuses a request for its head, its body or its fingerprint.
    let service = layer.clone().require_key().layer(Handler::new());
    assert_eq!(send(&service, with(&[("x-id", "1")])).await.body, "key-missing 1");
    let scoped = layer.clone().with_scope(|_| None::<Scope>).layer(Handler::new());
    assert_eq!(send(&scoped, identified("k", "2", "x")).await.body, "scope-missing 2");
    let long = send(&service, identified("k", "3", "longer than 10")).await;
    assert_eq!(long.body, "body-too-large 3");
    assert_eq!(send(&service, identified("k", "4", "x")).await.status(), 201);
    assert_eq!(send(&service, identified("k", "5", "y")).await.body, "key-reused 5");
    // The layer refuses a request after the handler has run.
    let failed = send(&layer.clone().layer(panics()), identified("a", "6", "x")).await;
    assert_eq!(failed.body, "handler-failed 6");
    let stored = layer.clone().on_error(OnError::Store).layer(panics());
    for id in ["7", "8"] {
        let failed = send(&stored, identified("b", id, "x")).await;
        assert_eq!(
            failed.body, "handler-failed 7",
            "the failure is rendered once, for the first request"
        );
    }
    // The layer refuses a duplicate in this process.
    let slow = layer
        .with_wait(Duration::from_secs(1))
        .layer(Handler::new().taking(Duration::from_secs(5)));
    let running = start(&slow, identified("c", "9", "x"));
    advance(Duration::from_millis(1)).await;
    assert_eq!(
        send(&slow, identified("c", "10", "x")).await.body,
        "request-outstanding 10"
    );
    running.await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen[0], "POST /charges");
    assert!(seen[1..].iter().all(|path| path == "POST /pay?x=1"), "{seen:?}");
    assert_eq!(seen.len(), 7);
}

#[tokio::test(start_paused = true)]
async fn a_renderer_gets_the_head_of_a_request_that_waited_for_another_process_or_the_store() {
    let store = RemoteStore::new();
    let (layer, _) = with_ids(IdempotencyLayer::new(store.clone()).with_wait(Duration::from_secs(2)));
    let owner = layer.clone().layer(Handler::new().taking(Duration::from_secs(9)));
    let elsewhere = IdempotencyLayer::new(store.clone()).layer(Handler::new().taking(Duration::from_secs(9)));
    let running = start(&elsewhere, identified("k", "1", "x"));
    advance(Duration::from_millis(1)).await;
    assert_eq!(
        send(&owner, identified("k", "2", "x")).await.body,
        "request-outstanding 2"
    );
    running.await.unwrap();
    store.fail("claim", [Fault::Before, Fault::Before]);
    assert_eq!(
        send(&owner, identified("l", "3", "x")).await.body,
        "store-unavailable 3"
    );
}

/// A clone would keep the values of the application in the extensions alive, and it would cost
/// every request.
#[tokio::test]
async fn a_head_is_copied_only_for_a_renderer() {
    #[derive(Clone)]
    struct Counted {
        _count: Arc<()>,
    }

    for (renders, copies) in [(false, 1), (true, 2)] {
        let count = Arc::new(());
        let witness = Arc::downgrade(&count);
        let inner = tower::service_fn(move |request: Request<AnyBody>| {
            // The test itself holds one reference.
            let in_extensions = witness.strong_count() - 1;
            drop(request);
            async move { Ok::<_, std::convert::Infallible>(text(StatusCode::OK, in_extensions.to_string())) }
        });
        let mut layer = IdempotencyLayer::new(MemoryStore::new());
        if renders {
            layer = with_ids(layer).0;
        }
        let mut request = post("k", "x");
        request.extensions_mut().insert(Counted {
            _count: Arc::clone(&count),
        });
        let response = layer.layer(inner).oneshot(request).await.unwrap();
        let body = crate::support::got(response).await.body;
        assert_eq!(body, copies.to_string());
    }
}

/// If a retry can run, the SDK must send it.
#[tokio::test]
async fn a_failure_whose_retry_can_run_gives_no_advice() {
    let failing = || Handler::new().responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let execute = stripe().on_error(OnError::Unknown).on_lost(OnLost::Execute);
    let forgets = stripe().with_retention(Duration::ZERO);
    for layer in [execute, forgets] {
        let handler = failing();
        let service = layer.layer(handler.clone());
        for _ in 0..2 {
            let got = send(&service, post("k", "x")).await;
            assert_eq!((got.status(), advice(&got)), (502, None));
        }
        assert_eq!(handler.runs(), 2);
    }
}

/// The `Clone` of the application panicked between the claim and its guard, so the key stayed
/// claimed.
#[tokio::test]
async fn an_extension_that_panics_when_it_is_cloned_leaves_no_key_claimed() {
    struct Fragile;
    impl Clone for Fragile {
        fn clone(&self) -> Self {
            panic!("cannot be copied")
        }
    }
    let render =
        |refusal: &Refusal, _: &Parts| Response::builder().status(refusal.status()).body(Bytes::new()).unwrap();
    let layer = IdempotencyLayer::new(MemoryStore::new()).with_refusals(render);
    let service = layer.layer(Handler::new());
    let mut fragile = post("k", "x");
    fragile.extensions_mut().insert(Fragile);
    let panicked = tokio::spawn(service.clone().oneshot(fragile)).await;
    assert!(panicked.is_err_and(|error| error.is_panic()));
    assert_eq!(send(&service, post("k", "x")).await.status(), 201);
}
