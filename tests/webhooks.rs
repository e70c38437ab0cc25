//! Webhooks over HTTP: verified before anything is recorded, handled once, answered alike.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::{to_bytes, Body};
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::IntoResponse;
use axum::routing::post;
use axum::Router;
use bytes::Bytes;
use data_encoding::{BASE64, HEXLOWER};
use futures::future::join_all;
use futures::stream;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tower::{ServiceBuilder, ServiceExt};
use tower_idempotency::receiver::webhooks::{
    GitHubWebhooks, InvalidWebhook, StandardWebhooks, StripeWebhooks, VerifyWebhook, WebhookLayer,
};
use tower_idempotency::receiver::MessageId;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Refusal, RefusalKind};

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

/// An application that counts what reaches it, and what its store records.
struct App {
    router: Router,
    runs: Arc<AtomicUsize>,
    store: MemoryStore,
}

impl App {
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
        (self.runs.load(Ordering::SeqCst), self.store.figures().records)
    }
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_gets_the_same_answer_and_runs_nothing() {
    let app = App::new(standard());
    let (status, _, first, _) = app.send(webhook("msg_1", "paid")).await;
    assert_eq!((status, &first[..]), (StatusCode::ACCEPTED, &b"run 1 of 4 bytes"[..]));
    // Sent again later, it has another timestamp and another signature.
    for seconds in [now() - 60, now(), now() + 60] {
        let (status, headers, again, _) = app.send(at(seconds, "msg_1", "paid")).await;
        assert_eq!((status, &again), (StatusCode::ACCEPTED, &first));
        assert_eq!(headers["idempotent-replayed"], "true");
    }
    // Providers change what does not matter.
    let (status, _, again, _) = app.send(webhook("msg_1", "paid, and sent again")).await;
    assert_eq!((status, &again), (StatusCode::ACCEPTED, &first));
    app.send(webhook("msg_2", "paid")).await;
    assert_eq!(app.counts(), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_genuine_reaches_nothing_and_leaves_no_record() {
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
    assert_eq!(app.counts(), (0, 0));
    // Nor does a forged copy of one that was handled get its answer.
    let (status, ..) = app.send(webhook("msg_1", "paid")).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    app.is_refused(altered(&|request| *request.body_mut() = Body::from("forged")))
        .await;
    app.is_refused(at(now() - 301, "msg_1", "paid")).await;
    assert_eq!(app.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_key_of_the_senders_own_counts_for_nothing() {
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
async fn one_in_flight_is_sent_away_at_once_and_one_that_failed_runs_again() {
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
    let app = App::new(standard().with_body_bounds(1_000, Duration::from_secs(10)));
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

/// A provider of the application's own, whose ids are as they come.
struct Trusting;

impl VerifyWebhook for Trusting {
    fn verify(&self, _: &HeaderMap, body: &[u8], _: SystemTime) -> Result<MessageId, InvalidWebhook> {
        Ok(MessageId::from(body))
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
