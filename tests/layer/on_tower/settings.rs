//! Each setter and each preset of the layer has the effect that its documentation promises.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, Request, Response};
use tower::Layer;
use tower_idempotency::protocol::KeySyntax;
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnError, Scope};

use crate::support::{
    AnyBody, Fault, Handler, Play, RemoteStore, Timer, frames, full, post, request, send, start, text,
};

type Preset = fn(IdempotencyLayer<MemoryStore>) -> IdempotencyLayer<MemoryStore>;

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new())
}

const fn name(name: &'static str) -> HeaderName {
    HeaderName::from_static(name)
}

#[test]
fn a_preset_replaces_every_setting_that_it_promises() {
    // None of these values is that of a preset.
    let contrary = || {
        layer()
            .store_if(|_| false)
            .with_methods([Method::PUT])
            .on_error(OnError::Unknown)
            .with_retention(Duration::from_secs(1))
            .with_wait(Duration::from_secs(1))
            .with_key_syntax(KeySyntax::Raw)
    };
    let same = |preset: Preset, other| assert_eq!(format!("{:?}", preset(other)), format!("{:?}", preset(layer())));
    same(IdempotencyLayer::stripe, contrary().require_key());
    let refusals = layer()
        .with_wait(Duration::from_secs(1))
        .with_key_syntax(KeySyntax::Raw)
        .with_refusals(|_, _| Response::default())
        .with_should_retry_header(Some(name("x-retry")));
    same(IdempotencyLayer::ietf, refusals);
    let webhooks = contrary()
        .dangerously_run_unprotected_when_the_store_fails()
        .with_header(name("x-key"))
        .with_key_validator(|_| false)
        .with_scope(|_| Scope::from("own"));
    same(IdempotencyLayer::webhooks, webhooks);
    #[cfg(feature = "tonic")]
    same(
        IdempotencyLayer::grpc,
        layer()
            .store_if(|_| false)
            .with_methods([Method::PUT])
            .with_header(name("x-key"))
            .with_json_fingerprint(tower_idempotency::protocol::CanonicalJson::new()),
    );
}

/// An application may exclude the fields of a response that only its first caller may see.
#[tokio::test]
async fn a_replay_has_no_excluded_header_and_every_included_one() {
    let handler = Handler::new().responding(|_| {
        let mut response = text(http::StatusCode::CREATED, "paid");
        for field in ["x-secret", "x-open", "set-cookie"] {
            response.headers_mut().insert(field, HeaderValue::from_static("1"));
        }
        response
    });
    let changed = layer()
        .exclude_response_header(name("x-secret"))
        .include_response_header(name("set-cookie"));
    for (layer, expected) in [(layer(), [true, true, false]), (changed, [false, true, true])] {
        let service = layer.layer(handler.clone());
        for (is_replay, expected) in [(false, [true; 3]), (true, expected)] {
            let got = send(&service, post("k", "pay")).await;
            let found = ["x-secret", "x-open", "set-cookie"].map(|field| got.head.headers.contains_key(field));
            assert_eq!((got.is_replay(), found), (is_replay, expected));
        }
    }
}

#[tokio::test]
async fn two_uploads_with_other_boundaries_are_one_request_only_if_the_setting_says_so() {
    let upload = |boundary: &str| {
        let part = "content-disposition: form-data; name=\"amount\"\r\n\r\n100";
        Request::post("/uploads")
            .header("idempotency-key", "k")
            .header("content-type", format!("multipart/form-data; boundary={boundary}"))
            .body(full(format!("--{boundary}\r\n{part}\r\n--{boundary}--\r\n")))
            .unwrap()
    };
    for (layer, code) in [(layer(), "key-reused"), (layer().with_multipart_fingerprint(), "")] {
        let service = layer.layer(Handler::new());
        assert_eq!(send(&service, upload("one")).await.status(), 201);
        let again = send(&service, upload("two")).await;
        assert_eq!((again.code(), again.is_replay()), (code, code.is_empty()));
    }
}

#[tokio::test]
async fn a_key_may_be_as_long_as_the_setting_allows() {
    for (layer, length) in [
        (layer(), 255),
        (layer().with_max_key_length(9), 9),
        (layer().with_max_key_length(0), 1),
    ] {
        let service = layer.layer(Handler::new());
        assert_eq!(send(&service, post(&"k".repeat(length), "pay")).await.status(), 201);
        let too_long = send(&service, post(&"k".repeat(length + 1), "pay")).await;
        assert_eq!(too_long.code(), "key-invalid");
    }
}

#[tokio::test(start_paused = true)]
async fn a_time_limit_is_as_long_as_its_setting() {
    const TIME: Duration = Duration::from_secs(3);
    async fn take(layer: IdempotencyLayer<RemoteStore>, request: Request<AnyBody>) -> (Duration, &'static str) {
        let timer = Timer::start();
        let got = send(&layer.layer(Handler::new()), request).await;
        (timer.elapsed(), got.code())
    }
    let stalled = || request("k", frames(vec![Play::Stall]));
    let timed_out = take(
        IdempotencyLayer::new(RemoteStore::new()).with_body_timeout(TIME),
        stalled(),
    )
    .await;
    assert_eq!(timed_out, (TIME, "body-timeout"));

    // The layer claims twice.
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Hang; 2]);
    let failed = take(IdempotencyLayer::new(store).with_store_timeout(TIME), post("k", "pay")).await;
    assert_eq!(failed, (2 * TIME, "store-unavailable"));

    let store = RemoteStore::new();
    store.fail("complete", [Fault::Before; 1_000]);
    let layer = IdempotencyLayer::new(store).at_least_once();
    let (time, code) = take(layer.with_completion_timeout(TIME), post("k", "pay")).await;
    assert_eq!((time.as_secs(), code), (TIME.as_secs(), "outcome-unknown"));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_asks_for_a_retry_after_the_time_of_the_setting() {
    for (layer, seconds) in [(layer(), "1"), (layer().with_retry_after(Duration::from_secs(7)), "7")] {
        let service = layer
            .with_wait(Duration::ZERO)
            .layer(Handler::new().taking(Duration::from_secs(1)));
        let owner = start(&service, post("k", "pay"));
        tokio::time::sleep(Duration::from_millis(10)).await;
        let refused = send(&service, post("k", "pay")).await;
        assert_eq!(
            (refused.code(), refused.head.headers["retry-after"].to_str().unwrap()),
            ("request-outstanding", seconds)
        );
        assert_eq!(owner.await.unwrap().status(), 201);
    }
}

/// Without the setting, the second request is refused.
#[tokio::test]
async fn at_least_once_runs_a_request_of_unknown_outcome_again() {
    for (layer, runs) in [(layer(), 1), (layer().at_least_once(), 2)] {
        let handler = Handler::new().responding(|_| text(http::StatusCode::BAD_GATEWAY, "failed"));
        let service = layer.on_error(OnError::Unknown).layer(handler.clone());
        for _ in 0..2 {
            send(&service, post("k", "pay")).await;
        }
        assert_eq!(handler.runs(), runs);
    }
}
