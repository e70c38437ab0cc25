//! Webhooks over HTTP: the layer verifies each before anything is recorded, runs it once, and gives
//! duplicates the same response.

mod bits;
mod senders;
mod signer;
mod twilio;
mod vectors;

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, post};
use bytes::Bytes;
use data_encoding::{BASE64, HEXLOWER};
use futures::future::join_all;
use futures::stream;
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::Full;
use sha2::Sha256;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::protocol::Status;
use tower_idempotency::receiver::webhooks::{
    GitHubWebhooks, InvalidWebhook, StandardWebhooks, StripeWebhooks, VerifyWebhook, Webhook, WebhookLayer,
};
use tower_idempotency::receiver::{MessageId, ids};
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnError, Refusal, RefusalKind, Scope, Store, StoreResponse};

use crate::support;
use crate::support::{Fault, RemoteStore};

const SECRET: [u8; 24] = [7; 24];

fn mac(secret: &[u8], content: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap();
    mac.update(content);
    mac.finalize().into_bytes().to_vec()
}

#[expect(clippy::disallowed_methods, reason = "webhooks carry the time of day")]
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn at(seconds: u64, id: &str, body: &str) -> Request<Body> {
    let signature = BASE64.encode(&mac(&SECRET, format!("{id}.{seconds}.{body}").as_bytes()));
    Request::post("/webhooks")
        .header("webhook-id", id)
        .header("webhook-timestamp", seconds)
        .header("webhook-signature", format!("v1,{signature}"))
        .body(Body::from(body.to_owned()))
        .unwrap()
}

fn webhook(id: &str, body: &str) -> Request<Body> {
    at(now(), id, body)
}

fn standard() -> WebhookLayer {
    WebhookLayer::new("a", StandardWebhooks::new([BASE64.encode(&SECRET)]).unwrap())
}

/// An application that counts the requests that reach its handler, and the records of its store.
struct App {
    router: Router,
    runs: Arc<AtomicUsize>,
    store: MemoryStore,
}

impl App {
    /// Makes an application whose handler returns `respond(n)` in its n-th run. `change` changes
    /// the settings of `webhooks()`.
    fn responding(
        change: impl FnOnce(IdempotencyLayer<MemoryStore>) -> IdempotencyLayer<MemoryStore>,
        respond: impl Fn(usize) -> Response + Clone + Send + Sync + 'static,
    ) -> Self {
        let (runs, store) = (Arc::new(AtomicUsize::new(0)), MemoryStore::new());
        let counted = Arc::clone(&runs);
        let handler = move || async move { respond(counted.fetch_add(1, Ordering::SeqCst) + 1) };
        let layers = ServiceBuilder::new()
            .layer(standard())
            .layer(change(IdempotencyLayer::new(store.clone()).webhooks()));
        let router = Router::new().route("/webhooks", any(handler)).layer(layers);
        Self { router, runs, store }
    }

    fn new(webhooks: WebhookLayer) -> Self {
        let (runs, store) = (Arc::new(AtomicUsize::new(0)), MemoryStore::new());
        let counted = Arc::clone(&runs);
        let handler = move |headers: HeaderMap, body: Bytes| async move {
            let run = counted.fetch_add(1, Ordering::SeqCst) + 1;
            assert_eq!(headers["idempotency-key"].len(), 64);
            if body == "slow" {
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            if body == "fails once" && run == 1 {
                return StatusCode::INTERNAL_SERVER_ERROR.into_response();
            }
            (StatusCode::ACCEPTED, format!("run {run} of {} bytes", body.len())).into_response()
        };
        let layers = ServiceBuilder::new()
            .layer(webhooks)
            .layer(IdempotencyLayer::new(store.clone()).webhooks());
        let router = Router::new().route("/webhooks", post(handler)).layer(layers);
        Self { router, runs, store }
    }

    async fn send(&self, request: Request<Body>) -> (StatusCode, HeaderMap, Bytes, Option<RefusalKind>) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let refusal = head.extensions.get::<Refusal>().map(Refusal::kind);
        (
            head.status,
            head.headers,
            to_bytes(body, 1 << 20).await.unwrap(),
            refusal,
        )
    }

    async fn is_refused(&self, request: Request<Body>) {
        let (status, headers, body, refusal) = self.send(request).await;
        assert_eq!(
            (status, refusal),
            (StatusCode::UNAUTHORIZED, Some(RefusalKind::InvalidWebhook))
        );
        assert_eq!(headers["content-type"], "application/problem+json");
        assert!(body.starts_with(b"{\"type\":\"urn:problem-type:idempotency:webhook-invalid\""));
    }

    fn counts(&self) -> (usize, u64) {
        (self.runs.load(Ordering::SeqCst), self.store.stats().records)
    }
}

#[tokio::test(start_paused = true)]
async fn a_webhook_has_as_much_time_as_the_setting_allows() {
    let app = App::new(standard().with_body_timeout(Duration::from_secs(3)));
    let timer = support::Timer::start();
    let mut stalled = webhook("m", "");
    *stalled.body_mut() = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
    let response = app.router.oneshot(stalled).await.unwrap();
    assert_eq!((response.status().as_u16(), timer.elapsed().as_secs()), (408, 3));
}

/// The layer inside reads the body a second time, with a limit of its own.
#[tokio::test]
async fn a_webhook_may_be_longer_than_the_layer_inside_allows() {
    let body = "x".repeat(3 << 20);
    for (layer, status) in [(standard(), 413), (standard().with_body_limit(4 << 20), 202)] {
        let handler =
            service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(StatusCode::ACCEPTED.into_response()) });
        let inside = IdempotencyLayer::new(MemoryStore::new()).webhooks().layer(handler);
        let response = layer.layer(inside).oneshot(webhook("m", &body)).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
    }
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_gets_the_same_response_and_runs_nothing() {
    let app = App::new(standard());
    let (status, _, first, _) = app.send(webhook("msg_1", "paid")).await;
    assert_eq!((status, &first[..]), (StatusCode::ACCEPTED, &b"run 1 of 4 bytes"[..]));
    // A webhook that is sent again later has another timestamp and another signature.
    for seconds in [now() - 60, now(), now() + 60] {
        let (status, headers, again, _) = app.send(at(seconds, "msg_1", "paid")).await;
        assert_eq!((status, &again), (StatusCode::ACCEPTED, &first));
        assert_eq!(headers["idempotent-replayed"], "true");
    }
    // Providers change insignificant parts of the body when they send again.
    let (status, _, again, _) = app.send(webhook("msg_1", "paid, and sent again")).await;
    assert_eq!((status, &again), (StatusCode::ACCEPTED, &first));
    app.send(webhook("msg_2", "paid")).await;
    assert_eq!(app.counts(), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_forged_webhook_reaches_nothing_and_leaves_no_record() {
    let app = App::new(standard());
    let altered = |change: &dyn Fn(&mut Request<Body>)| {
        let mut request = webhook("msg_1", "paid");
        change(&mut request);
        request
    };
    for name in ["webhook-id", "webhook-timestamp", "webhook-signature"] {
        app.is_refused(altered(&|request| drop(request.headers_mut().remove(name))))
            .await;
        app.is_refused(altered(&|request| {
            drop(request.headers_mut().insert(name, "1".parse().unwrap()));
        }))
        .await;
    }
    app.is_refused(altered(&|request| *request.body_mut() = Body::from("paid twice")))
        .await;
    app.is_refused(at(now() - 301, "msg_1", "paid")).await;
    app.is_refused(at(now() + 302, "msg_1", "paid")).await;
    app.is_refused(at(u64::MAX, "msg_1", "paid")).await;
    assert_eq!(app.counts(), (0, 0));
    // A forged copy of a handled webhook does not get its response either.
    let (status, ..) = app.send(webhook("msg_1", "paid")).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    app.is_refused(altered(&|request| *request.body_mut() = Body::from("forged")))
        .await;
    app.is_refused(at(now() - 301, "msg_1", "paid")).await;
    assert_eq!(app.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_the_sender_has_set_is_ignored() {
    let app = App::new(standard());
    for key in ["a", "b"] {
        let mut request = webhook("msg_1", "paid");
        request.headers_mut().append("idempotency-key", key.parse().unwrap());
        request
            .headers_mut()
            .append("idempotency-key", "twice".parse().unwrap());
        assert_eq!(app.send(request).await.0, StatusCode::ACCEPTED);
    }
    assert_eq!(app.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_in_flight_gets_409_and_a_failed_webhook_runs_again() {
    let app = App::new(standard());
    let all = join_all((0..5).map(|_| app.send(webhook("msg_1", "slow")))).await;
    let accepted = all
        .iter()
        .filter(|(status, ..)| *status == StatusCode::ACCEPTED)
        .count();
    let conflicts = all
        .iter()
        .filter(|(status, headers, ..)| *status == StatusCode::CONFLICT && headers.contains_key("retry-after"));
    assert_eq!((accepted, conflicts.count()), (1, 4));

    let app = App::new(standard());
    assert_eq!(
        app.send(webhook("msg_2", "fails once")).await.0,
        StatusCode::INTERNAL_SERVER_ERROR
    );
    assert_eq!(app.send(webhook("msg_2", "fails once")).await.0, StatusCode::ACCEPTED);
    assert_eq!(app.send(webhook("msg_2", "fails once")).await.0, StatusCode::ACCEPTED);
    assert_eq!(app.counts(), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn bodies_are_bounded_in_length_and_time() {
    let app = App::new(
        standard()
            .with_body_limit(1_000)
            .with_body_timeout(Duration::from_secs(10)),
    );
    assert_eq!(
        app.send(webhook("msg_1", &"x".repeat(1_000))).await.0,
        StatusCode::ACCEPTED
    );
    let (status, _, _, refusal) = app.send(webhook("msg_2", &"x".repeat(1_001))).await;
    assert_eq!(
        (status, refusal),
        (StatusCode::PAYLOAD_TOO_LARGE, Some(RefusalKind::BodyTooLarge))
    );
    let mut stalled = webhook("msg_3", "x");
    *stalled.body_mut() = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
    assert_eq!(app.send(stalled).await.0, StatusCode::REQUEST_TIMEOUT);
    let mut broken = webhook("msg_4", "x");
    let lost = stream::iter([Err::<Bytes, _>(std::io::Error::other("lost"))]);
    *broken.body_mut() = Body::from_stream(lost);
    assert_eq!(app.send(broken).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(app.counts(), (1, 1));
}

/// The layer inside had a limit of its own, so a webhook that was within the limit of the layer
/// outside got 413 all the same.
#[tokio::test(start_paused = true)]
async fn one_setting_bounds_the_body_for_both_layers() {
    let bounded = |inner: fn(IdempotencyLayer<MemoryStore>) -> IdempotencyLayer<MemoryStore>| {
        let inner = inner(IdempotencyLayer::new(MemoryStore::new()).webhooks());
        let layers = ServiceBuilder::new()
            .layer(
                standard()
                    .with_body_limit(3 << 20)
                    .with_body_timeout(Duration::from_secs(10)),
            )
            .layer(inner);
        Router::new()
            .route("/webhooks", post(|| async { "thanks" }))
            .layer(layers)
    };
    for app in [bounded(|layer| layer), bounded(|layer| layer.with_body_limit(1_000))] {
        let long = webhook("msg_1", &"x".repeat(3 << 20));
        assert_eq!(app.clone().oneshot(long).await.unwrap().status(), StatusCode::OK);
        let too_long = webhook("msg_2", &"x".repeat((3 << 20) + 1));
        let refused = app.oneshot(too_long).await.unwrap();
        assert_eq!(refused.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    // The bounds still hold inside for a body that a layer in between has replaced.
    let replaced = |bytes: usize| {
        let layers = ServiceBuilder::new()
            .layer(
                standard()
                    .with_body_limit(1_000)
                    .with_body_timeout(Duration::from_secs(10)),
            )
            .map_request(move |request: Request<Body>| request.map(|_| Body::from("x".repeat(bytes))))
            .layer(IdempotencyLayer::new(MemoryStore::new()).webhooks());
        Router::new()
            .route("/webhooks", post(|| async { "thanks" }))
            .layer(layers)
    };
    for (bytes, status) in [(1_000, StatusCode::OK), (1_001, StatusCode::PAYLOAD_TOO_LARGE)] {
        let response = replaced(bytes).oneshot(webhook("msg_1", "paid")).await.unwrap();
        assert_eq!(response.status(), status);
    }
}

#[tokio::test(start_paused = true)]
async fn a_challenge_by_get_passes_without_a_key_where_it_is_allowed() {
    let (store, runs) = (MemoryStore::new(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&runs);
    let handler = move |method: Method, headers: HeaderMap| async move {
        counted.fetch_add(1, Ordering::SeqCst);
        assert_eq!(headers.contains_key("idempotency-key"), method == Method::POST);
        "the challenge"
    };
    let layers = ServiceBuilder::new()
        .layer(standard().pass_challenges())
        .layer(IdempotencyLayer::new(store.clone()).webhooks());
    let app = Router::new().route("/webhooks", any(handler)).layer(layers);
    let challenge = |method: Method| {
        let request = Request::builder().method(method).uri("/webhooks?hub.challenge=1");
        let request = request.header("idempotency-key", "a").header("idempotency-key", "b");
        request.body(Body::empty()).unwrap()
    };
    for _ in 0..2 {
        for method in [Method::GET, Method::HEAD] {
            let response = app.clone().oneshot(challenge(method)).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            assert!(!response.headers().contains_key("idempotent-replayed"));
        }
    }
    assert_eq!((runs.load(Ordering::SeqCst), store.stats().records), (4, 0));
    for method in [Method::PUT, Method::DELETE, Method::OPTIONS] {
        let response = app.clone().oneshot(challenge(method)).await.unwrap();
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(response.headers()["allow"], "GET, HEAD, POST");
    }
    let unsigned = app.clone().oneshot(challenge(Method::POST)).await.unwrap();
    assert_eq!(unsigned.status(), StatusCode::UNAUTHORIZED);
    let genuine = app.oneshot(webhook("msg_1", "paid")).await.unwrap();
    assert_eq!(genuine.status(), StatusCode::OK);
    assert_eq!((runs.load(Ordering::SeqCst), store.stats().records), (5, 1));
    // A layer inside that guards GET as well claims nothing for a challenge.
    let guarded = IdempotencyLayer::new(store.clone()).with_methods([Method::GET, Method::POST]);
    let layers = ServiceBuilder::new().layer(standard().pass_challenges()).layer(guarded);
    let app = Router::new().route("/webhooks", any(|| async {})).layer(layers);
    app.oneshot(challenge(Method::GET)).await.unwrap();
    assert_eq!(store.stats().records, 1);
}

#[tokio::test(start_paused = true)]
async fn other_providers_are_verified_as_they_sign() {
    let app = App::new(WebhookLayer::new("a", GitHubWebhooks::new(["hush"]).unwrap()));
    let github = |delivery: &str, body: &'static str| {
        let signature = HEXLOWER.encode(&mac(b"hush", body.as_bytes()));
        Request::post("/webhooks")
            .header("x-github-delivery", delivery)
            .header("x-hub-signature-256", format!("sha256={signature}"))
            .body(Body::from(body))
            .unwrap()
    };
    for _ in 0..2 {
        assert_eq!(app.send(github("1", "push")).await.0, StatusCode::ACCEPTED);
    }
    assert_eq!(app.counts(), (1, 1));
    app.is_refused(github("", "push")).await;

    let app = App::new(WebhookLayer::new("a", StripeWebhooks::new(["old", "new"]).unwrap()));
    let stripe = |secret: &str, body: &'static str| {
        let seconds = now();
        let signature = HEXLOWER.encode(&mac(secret.as_bytes(), format!("{seconds}.{body}").as_bytes()));
        Request::post("/webhooks")
            .header("stripe-signature", format!("t={seconds},v1={signature}"))
            .body(Body::from(body))
            .unwrap()
    };
    for (secret, body) in [
        ("old", r#"{"id":"evt_1","pending_webhooks":2}"#),
        ("new", r#"{"id":"evt_1","pending_webhooks":1}"#),
    ] {
        assert_eq!(app.send(stripe(secret, body)).await.0, StatusCode::ACCEPTED);
    }
    assert_eq!(app.counts(), (1, 1));
    app.is_refused(stripe("other", r#"{"id":"evt_1"}"#)).await;
    app.is_refused(stripe("new", "{}")).await;
}

/// A provider of the application's own that takes the body as the id.
struct Trusting;

impl VerifyWebhook for Trusting {
    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        Ok(MessageId::from(webhook.body()))
    }
}

#[tokio::test(start_paused = true)]
async fn ids_of_any_bytes_become_keys_and_impossible_ones_do_not() {
    let app = App::new(WebhookLayer::new("a", Trusting));
    let send = |body: Vec<u8>| app.send(Request::post("/webhooks").body(Body::from(body)).unwrap());
    for body in [vec![0xff, 0], vec![b'"'], vec![b'x'; 4_096]] {
        assert_eq!(send(body.clone()).await.0, StatusCode::ACCEPTED);
        assert_eq!(send(body).await.0, StatusCode::ACCEPTED);
    }
    assert_eq!(app.counts(), (3, 3));
    assert_eq!(send(vec![b'x'; 4_097]).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(send(Vec::new()).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(app.counts(), (3, 3));
}

/// A refusal was stored for 7 days, so a handler that was corrected never got the webhook that it
/// had refused.
#[tokio::test(start_paused = true)]
async fn a_webhook_that_its_handler_refused_runs_again() {
    for refused in [422, 404, 302] {
        let refused = StatusCode::from_u16(refused).unwrap();
        let app = App::responding(
            |layer| layer,
            move |run| match run {
                1 => refused.into_response(),
                _ => "mended".into_response(),
            },
        );
        assert_eq!(app.send(webhook("msg_1", "paid")).await.0, refused);
        for _ in 0..2 {
            let (status, _, body, _) = app.send(webhook("msg_1", "paid")).await;
            assert_eq!((status, &body[..]), (StatusCode::OK, &b"mended"[..]));
        }
        assert_eq!(app.counts(), (2, 1));
    }
    let gone = |_| {
        let mut gone = StatusCode::GONE.into_response();
        gone.extensions_mut().insert(StoreResponse);
        gone
    };
    let app = App::responding(|layer| layer, gone);
    for _ in 0..2 {
        assert_eq!(app.send(webhook("msg_1", "paid")).await.0, StatusCode::GONE);
    }
    assert_eq!(app.counts(), (1, 1));
}

/// No signature covers the method, and the layer inside guards POST only, so under PUT the same
/// webhook ran again.
#[tokio::test(start_paused = true)]
async fn only_post_is_taken() {
    let app = App::responding(|layer| layer, |_| "thanks".into_response());
    assert_eq!(app.send(webhook("msg_1", "paid")).await.0, StatusCode::OK);
    for method in [Method::PUT, Method::GET, Method::PUT, Method::PATCH] {
        let mut again = webhook("msg_1", "paid");
        *again.method_mut() = method;
        let (status, headers, _, refusal) = app.send(again).await;
        assert_eq!(
            (status, refusal),
            (StatusCode::METHOD_NOT_ALLOWED, Some(RefusalKind::InvalidWebhookMethod))
        );
        assert_eq!(headers["allow"], "POST");
    }
    assert_eq!(app.counts(), (1, 1));
}

/// The key is no secret. A client that has seen it could send it with its own request and take the
/// webhook's place.
#[tokio::test(start_paused = true)]
async fn a_clients_own_request_does_not_take_a_webhooks_key() {
    let seen = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&seen);
    let observe = move |headers: HeaderMap| async move {
        *keep.lock().unwrap() = headers.get("idempotency-key").cloned();
    };
    let observer = Router::new().route("/webhooks", post(observe)).layer(standard());
    observer.oneshot(webhook("msg_1", "paid")).await.unwrap();
    let key = seen.lock().unwrap().take().unwrap();

    let app = App::new(standard());
    let clients = Router::new()
        .route("/webhooks", post(|| async { "a client's" }))
        .layer(IdempotencyLayer::new(app.store.clone()));
    let request = Request::post("/webhooks").header("idempotency-key", key);
    let response = clients.oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let (status, _, body, _) = app.send(webhook("msg_1", "paid")).await;
    assert_eq!((status, &body[..]), (StatusCode::ACCEPTED, &b"run 1 of 4 bytes"[..]));
    assert_eq!(app.counts(), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn the_record_of_a_webhook_can_be_named() {
    let id = ids::standard_webhooks(webhook("msg_1", "").headers());
    let own = Scope::from("own");
    let preset = Scope::of(["tower-idempotency", "webhooks"]);
    let scoped = own.clone();
    let change = move |layer: IdempotencyLayer<MemoryStore>| {
        let scope = scoped.clone();
        layer.with_scope(move |_| scope.clone())
    };
    for (app, scope) in [
        (App::responding(|layer| layer, |_| "thanks".into_response()), preset),
        (App::responding(change, |_| "thanks".into_response()), own),
    ] {
        let idempotency = IdempotencyLayer::new(app.store.clone()).webhooks();
        let key = idempotency.storage_key(Some(&scope), &standard().key(&id)).unwrap();
        assert!(app.store.peek(&key).await.unwrap().is_none());
        app.send(webhook("msg_1", "paid")).await;
        let record = app.store.peek(&key).await.unwrap().unwrap();
        assert!(matches!(record.status, Status::Completed(_)));
        assert_eq!(app.counts(), (1, 1));
    }
}

/// Id `msg_1`, T and the body `T2.5` have the signature of id `msg_1.T`, T2 and the body `5`.
#[tokio::test(start_paused = true)]
async fn the_parts_of_a_webhook_cannot_be_shifted() {
    let app = App::new(standard());
    let (sent, later) = (now(), now() + 1);
    let genuine = at(sent, "msg_1", &format!("{later}.5"));
    let mut shifted = at(later, &format!("msg_1.{sent}"), "5");
    let signature = &genuine.headers()["webhook-signature"];
    assert_eq!(shifted.headers()["webhook-signature"], signature);
    shifted.headers_mut().insert("webhook-signature", signature.clone());
    assert_eq!(app.send(genuine).await.0, StatusCode::ACCEPTED);
    app.is_refused(shifted).await;
    assert_eq!(app.counts(), (1, 1));
}

/// Duplicates got 409 forever, and providers disable an endpoint that never returns 2xx.
#[tokio::test(start_paused = true)]
async fn a_duplicate_whose_response_was_not_stored_gets_a_bare_200() {
    let long = || "x".repeat(1_000).into_response();
    let stream = || ([("content-type", "text/event-stream")], "data: x").into_response();
    let responses: [fn() -> Response; 2] = [long, stream];
    for respond in responses {
        let app = App::responding(|layer| layer.with_response_limit(100), move |_| respond());
        let (status, headers, body, _) = app.send(webhook("msg_1", "paid")).await;
        assert_eq!((status, body.is_empty()), (StatusCode::OK, false));
        assert!(!headers.contains_key("idempotent-replayed"));
        for _ in 0..2 {
            let (status, headers, body, refusal) = app.send(webhook("msg_1", "paid")).await;
            assert_eq!((status, &body[..], refusal), (StatusCode::OK, &b""[..], None));
            assert_eq!(headers["idempotent-replayed"], "true");
        }
        assert_eq!(app.counts(), (1, 1));
    }
    // A response that was no success is not reported as a success, even if it broke off.
    let broken = || {
        let lost = stream::iter([Err::<Bytes, _>(std::io::Error::other("lost"))]);
        let body = Body::from_stream(lost);
        (StatusCode::UNPROCESSABLE_ENTITY, body).into_response()
    };
    let long = || (StatusCode::UNPROCESSABLE_ENTITY, "x".repeat(1_000)).into_response();
    let responses: [fn() -> Response; 2] = [broken, long];
    for respond in responses {
        let app = App::responding(
            |layer| layer.with_response_limit(100),
            move |run| match run {
                1 => respond(),
                _ => "mended".into_response(),
            },
        );
        let first = app.router.clone().oneshot(webhook("msg_1", "paid")).await.unwrap();
        assert_eq!(first.status(), StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(&app.send(webhook("msg_1", "paid")).await.2[..], b"mended");
        assert_eq!(app.counts(), (2, 1));
    }
}

/// A failure that was too long to be stored was acknowledged as a success, and the provider stopped
/// sending.
#[tokio::test(start_paused = true)]
async fn a_failure_whose_body_is_not_stored_is_never_reported_as_a_success() {
    let broken = || {
        let lost = stream::iter([Err::<Bytes, _>(std::io::Error::other("lost"))]);
        (StatusCode::BAD_GATEWAY, Body::from_stream(lost)).into_response()
    };
    let long = || (StatusCode::BAD_GATEWAY, "x".repeat(1_000)).into_response();
    let responses: [fn() -> Response; 2] = [broken, long];
    for respond in responses {
        let change = |layer: IdempotencyLayer<_>| layer.with_response_limit(100).on_error(OnError::Store);
        let app = App::responding(change, move |_| respond());
        for _ in 0..3 {
            assert!(app.send(webhook("msg_1", "paid")).await.0.is_server_error());
        }
        assert_eq!(app.counts(), (1, 1));
    }
}

/// A forged request with an endless body that is always ready blocked its thread forever.
#[tokio::test(start_paused = true)]
async fn a_webhook_of_endless_empty_frames_is_refused_after_its_timeout() {
    let app = App::new(standard());
    let mut endless = webhook("msg_1", "paid");
    let empty = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::new()));
    *endless.body_mut() = Body::from_stream(empty);
    let sent = tokio::spawn(app.router.clone().oneshot(endless));
    support::advance(Duration::from_secs(29)).await;
    assert!(!sent.is_finished());
    support::advance(Duration::from_secs(1)).await;
    assert!(sent.is_finished());
    assert_eq!(sent.await.unwrap().unwrap().status(), StatusCode::REQUEST_TIMEOUT);
    assert_eq!(app.counts(), (0, 0));
}

/// The layer held a permit of the service inside while it read a body, so forged requests without a
/// body took all of them.
#[tokio::test(start_paused = true)]
async fn an_unverified_webhook_takes_no_permit_of_the_service_inside() {
    let handler = service_fn(|_: Request<Body>| async { Ok::<_, Infallible>(Response::new(Body::empty())) });
    let service = ServiceBuilder::new()
        .layer(standard())
        .concurrency_limit(1)
        .service(handler);
    let mut stalled = webhook("msg_1", "paid");
    *stalled.body_mut() = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
    let stalled = tokio::spawn(service.clone().oneshot(stalled));
    tokio::task::yield_now().await;
    for _ in 0..2 {
        let genuine = service.clone().oneshot(webhook("msg_2", "paid"));
        let response = tokio::time::timeout(Duration::from_secs(1), genuine).await;
        assert_eq!(response.unwrap().unwrap().status(), StatusCode::OK);
    }
    let refused = stalled.await.unwrap().unwrap();
    assert_eq!(refused.status(), StatusCode::REQUEST_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn the_body_of_an_unsigned_webhook_is_not_read() {
    let app = App::new(standard());
    let is_polled = Arc::new(AtomicBool::new(false));
    let body = || {
        let is_polled = Arc::clone(&is_polled);
        Body::from_stream(stream::poll_fn(move |_| {
            is_polled.store(true, Ordering::SeqCst);
            std::task::Poll::Ready(None::<Result<Bytes, std::io::Error>>)
        }))
    };
    let mut unsigned = webhook("msg_1", "paid");
    unsigned.headers_mut().remove("webhook-signature");
    *unsigned.body_mut() = body();
    app.is_refused(unsigned).await;
    let mut put = webhook("msg_1", "paid");
    *put.method_mut() = Method::PUT;
    *put.body_mut() = body();
    assert_eq!(app.send(put).await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert!(!is_polled.load(Ordering::SeqCst));
    let mut forged = webhook("msg_1", "paid");
    *forged.body_mut() = body();
    app.is_refused(forged).await;
    assert!(is_polled.load(Ordering::SeqCst));
}

/// A provider sends an event under one id to each endpoint that subscribed to it, so each layer has
/// a name of its own.
#[tokio::test]
async fn each_of_two_handlers_gets_an_event_that_was_sent_to_both() {
    let (store, runs) = (MemoryStore::new(), Arc::new(AtomicUsize::new(0)));
    let endpoint = |consumer: &str, secret: &str| {
        let runs = Arc::clone(&runs);
        let handler = move || async move {
            runs.fetch_add(1, Ordering::SeqCst);
        };
        let layers = ServiceBuilder::new()
            .layer(WebhookLayer::new(consumer, StripeWebhooks::new([secret]).unwrap()))
            .layer(IdempotencyLayer::new(store.clone()).webhooks());
        Router::new().route("/webhooks", post(handler)).layer(layers)
    };
    let event = |secret: &str| {
        let (now, body) = (now(), r#"{"id":"evt_1"}"#);
        let signature = HEXLOWER.encode(&mac(secret.as_bytes(), format!("{now}.{body}").as_bytes()));
        let request = Request::post("/webhooks").header("stripe-signature", format!("t={now},v1={signature}"));
        request.body(Body::from(body)).unwrap()
    };
    for (consumer, secret, runs_after) in [
        ("stripe-accounting", "one", 1),
        ("stripe-shipping", "two", 2),
        ("stripe-accounting", "one", 2),
    ] {
        let response = endpoint(consumer, secret).oneshot(event(secret)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(runs.load(Ordering::SeqCst), runs_after);
    }
}

/// An application's layer has settings for its clients' keys. The key of a webhook need not meet
/// them.
#[tokio::test]
async fn the_preset_runs_webhooks_once_on_every_base_layer() {
    type Base = fn(IdempotencyLayer<MemoryStore>) -> IdempotencyLayer<MemoryStore>;
    let bases: [(&str, Base); 5] = [
        ("header", |layer| layer.with_header("x-request-key".parse().unwrap())),
        ("ietf", IdempotencyLayer::ietf),
        ("length", |layer| layer.with_max_key_length(36)),
        ("stripe", IdempotencyLayer::stripe),
        ("validator", |layer| layer.with_key_validator(|key| key.len() == 36)),
    ];
    for (name, base) in bases {
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&runs);
        let handler = move || async move {
            // The first run fails, and the failure is not stored.
            match counted.fetch_add(1, Ordering::SeqCst) {
                0 => StatusCode::INTERNAL_SERVER_ERROR,
                _ => StatusCode::OK,
            }
        };
        let layers = ServiceBuilder::new()
            .layer(standard())
            .layer(base(IdempotencyLayer::new(MemoryStore::new())).webhooks());
        let app = Router::new().route("/webhooks", post(handler)).layer(layers);
        for (forged, status) in [("k1", 500), ("k2", 200), ("k3", 200)] {
            let mut request = webhook("msg_1", "x");
            // No signature covers this header field.
            request.headers_mut().insert("x-request-key", forged.parse().unwrap());
            let response = app.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), status, "{name}");
        }
        assert_eq!(runs.load(Ordering::SeqCst), 2, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_webhook_is_acknowledged_whose_outcome_is_not_recorded() {
    let store = RemoteStore::new();
    store.fail("complete", [Fault::Before; 10_000]);
    let layer = IdempotencyLayer::new(store.clone()).webhooks();
    let drain = layer.drain();
    let layers = ServiceBuilder::new().layer(standard()).layer(layer);
    let app = Router::new()
        .route("/webhooks", post(|| async { "thanks" }))
        .layer(layers);
    let first = app.clone().oneshot(webhook("msg_1", "x")).await.unwrap();
    assert_eq!(first.status(), StatusCode::SERVICE_UNAVAILABLE);
    store.heal();
    drain.wait().await;
    // The outcome was deferred and recorded.
    let again = app.oneshot(webhook("msg_1", "x")).await.unwrap();
    assert_eq!(again.status(), StatusCode::OK);
    assert!(again.headers().contains_key("idempotent-replayed"));
}

#[tokio::test(start_paused = true)]
async fn no_webhook_runs_unprotected_whatever_its_base_allows() {
    let (store, runs) = (RemoteStore::new(), Arc::new(AtomicUsize::new(0)));
    store.fail("claim", [Fault::Before; 1_000]);
    let counted = Arc::clone(&runs);
    let handler = move || async move {
        counted.fetch_add(1, Ordering::SeqCst);
    };
    let layer = IdempotencyLayer::new(store).dangerously_run_unprotected_when_the_store_fails();
    let layers = ServiceBuilder::new().layer(standard()).layer(layer.webhooks());
    let app = Router::new().route("/webhooks", post(handler)).layer(layers);
    let refused = app.oneshot(webhook("msg_1", "x")).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(runs.load(Ordering::SeqCst), 0);
}

/// A provider may know an endpoint by several host names.
#[tokio::test]
async fn a_webhook_is_the_same_under_every_host_name() {
    let app = App::new(standard());
    for host in ["hooks.example", "old-hooks.example"] {
        let mut delivery = webhook("msg_1", "paid");
        delivery.headers_mut().insert("host", host.parse().unwrap());
        delivery.headers_mut().insert("x-api-key", host.parse().unwrap());
        assert_eq!(app.send(delivery).await.0, StatusCode::ACCEPTED);
    }
    assert_eq!(app.counts(), (1, 1));
}

#[tokio::test]
async fn a_webhook_that_has_no_room_for_its_key_is_refused() {
    let app = App::new(standard());
    let mut full = webhook("msg_1", "paid");
    let headers = full.headers_mut();
    let name = |n: usize| http::HeaderName::from_bytes(format!("x-{n}").as_bytes()).unwrap();
    while headers.try_insert(name(headers.len()), "1".parse().unwrap()).is_ok() {}
    app.is_refused(full).await;
    assert_eq!(app.counts(), (0, 0));
}

#[tokio::test]
async fn webhooks_of_two_senders_with_one_id_both_run() {
    let runs = Arc::new(AtomicUsize::new(0));
    let store = MemoryStore::new();
    let app = |secret: [u8; 24], name: &'static str| {
        let runs = Arc::clone(&runs);
        let handler = service_fn(move |_: Request<Full<Bytes>>| {
            runs.fetch_add(1, Ordering::SeqCst);
            async move { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(name))) }
        });
        ServiceBuilder::new()
            .layer(WebhookLayer::new(
                name,
                StandardWebhooks::new([BASE64.encode(&secret)]).unwrap(),
            ))
            .layer(IdempotencyLayer::new(store.clone()).webhooks())
            .service(handler)
    };
    let request = |path: &str, secret: [u8; 24]| {
        let (now, body) = (now(), format!("of {path}"));
        let signature = BASE64.encode(&mac(&secret, format!("msg_1.{now}.{body}").as_bytes()));
        Request::post(path)
            .header("webhook-id", "msg_1")
            .header("webhook-timestamp", now)
            .header("webhook-signature", format!("v1,{signature}"))
            .body(Full::from(body))
            .unwrap()
    };
    let first = app([1; 24], "one").oneshot(request("/one", [1; 24])).await.unwrap();
    let second = app([2; 24], "two").oneshot(request("/two", [2; 24])).await.unwrap();
    assert_eq!(first.status(), 200);
    assert_eq!(
        runs.load(Ordering::SeqCst),
        2,
        "the second sender's webhook got the response of the first one: {second:?}"
    );
}

#[test]
fn debug_forms_show_the_consumer_and_nothing_of_a_webhook() {
    let layer = WebhookLayer::new("billing", StripeWebhooks::new(["hush"]).unwrap());
    let mut service = layer.layer(service_fn(|_: Request<Body>| async {
        Ok::<_, Infallible>(Response::new(Body::empty()))
    }));
    let future = service.call(Request::post("/hush").body(Body::from("hush")).unwrap());
    let head = Request::post("/hush").body(()).unwrap().into_parts().0;
    let webhook = Webhook::new(&head, b"hush", UNIX_EPOCH);
    let shown = format!("{layer:?} {:?} {future:?} {webhook:?}", layer.layer(7_u8));
    for part in [
        "WebhookLayer",
        "billing",
        "WebhookService { inner: 7",
        "WebhookFuture",
        "Webhook { .. }",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(!shown.contains("hush"), "{shown}");
}
