//! A key in the body, for an API whose JSON requests have the key as a member, such as Square's
//! `idempotency_key`.
//!
//! ```text
//! cargo run --features axum --example key_in_body
//! ```
//!
//! A small middleware outside of the layer reads the body within bounds of size and time, and
//! copies the member into the header field that the layer reads. Only the member counts. If the
//! client also sends the header field, its value must be equal. If the body has no such member, the
//! middleware drops the header field. The example sends requests to itself, and ends with an error
//! if one of its claims is false.

use std::error::Error;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use futures::stream;
use http_body_util::LengthLimitError;
use serde::Deserialize;
use tokio::time::timeout;
use tower::ServiceExt;
use tower_idempotency::{AttemptNumber, IdempotencyLayer, KeySyntax, MemoryStore};

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
const LONGEST_BODY: usize = 64 * 1024;
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The member with the key. The middleware ignores all other members. The parser refuses a body
/// that has the member twice, because the handler could read the other one.
#[derive(Deserialize)]
struct Keyed {
    idempotency_key: Option<String>,
}

/// Moves the key from the body to the header field.
async fn key_from_body(mut request: Request, next: Next) -> Response {
    match move_key(&mut request).await {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

async fn move_key(request: &mut Request) -> Result<(), (StatusCode, &'static str)> {
    let body = read(std::mem::take(request.body_mut())).await?;
    let is_repeated = request.headers().get_all(KEY).iter().nth(1).is_some();
    let sent = request.headers_mut().remove(KEY);
    let Ok(Keyed { idempotency_key }) = serde_json::from_slice(&body) else {
        let problem = "The body is not usable. Send a JSON object with one member `idempotency_key`, a string.";
        return Err((StatusCode::BAD_REQUEST, problem));
    };
    if let Some(key) = idempotency_key {
        let Ok(mut value) = HeaderValue::from_str(&key) else {
            return Err((
                StatusCode::BAD_REQUEST,
                "The key has a character that is not visible ASCII. Use letters, digits and punctuation.",
            ));
        };
        if is_repeated || sent.is_some_and(|sent| sent != value) {
            return Err((StatusCode::BAD_REQUEST, "The header and the body have different keys."));
        }
        value.set_sensitive(true);
        request.headers_mut().insert(KEY, value);
    }
    *request.body_mut() = Body::from(body);
    Ok(())
}

/// Reads a body within the bounds. The layer has bounds of its own, but it gets the body only after
/// this function has read it.
async fn read(body: Body) -> Result<Bytes, (StatusCode, &'static str)> {
    match timeout(LONGEST_WAIT, to_bytes(body, LONGEST_BODY)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(error)) if error.source().is_some_and(<dyn Error>::is::<LengthLimitError>) => Err((
            StatusCode::PAYLOAD_TOO_LARGE,
            "The body is too long. Send at most 64 KiB.",
        )),
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, "The body broke off. Send the request again.")),
        Err(_) => Err((
            StatusCode::REQUEST_TIMEOUT,
            "The body took too long. Send it within 5 seconds.",
        )),
    }
}

#[derive(Deserialize)]
struct Payment {
    amount: u32,
}

async fn pay(attempt: AttemptNumber, Json(payment): Json<Payment>) -> (StatusCode, String) {
    let receipt = format!("paid {} in attempt {}", payment.amount, attempt.number());
    (StatusCode::CREATED, receipt)
}

/// The app. `KeySyntax::Raw` takes the value of the header field as the key without parsing it,
/// because the middleware copied the value from the body as it was.
fn app() -> Router {
    let idempotency = IdempotencyLayer::new(MemoryStore::new())
        .with_key_syntax(KeySyntax::Raw)
        .require_key();
    Router::new()
        .route("/payments", post(pay))
        .layer(idempotency)
        .layer(from_fn(key_from_body))
}

/// Sends a payment, and returns its status and whether the response is a replay.
async fn send(app: &Router, header: &[&'static str], body: impl Into<Body>) -> (u16, bool) {
    let mut request = Request::post("/payments").header("content-type", "application/json");
    for key in header {
        request = request.header(KEY, *key);
    }
    let request = request.body(body.into()).expect("a request");
    let Ok(response) = app.clone().oneshot(request).await;
    let is_replay = response.headers().contains_key("idempotent-replayed");
    (response.status().as_u16(), is_replay)
}

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() {
    let app = app();
    let payment = r#"{"idempotency_key":"k-1","amount":100}"#;
    assert_eq!(send(&app, &[], payment).await, (201, false));
    assert_eq!(send(&app, &[], payment).await, (201, true));
    let dearer = r#"{"idempotency_key":"k-1","amount":900}"#;
    assert_eq!(
        send(&app, &[], dearer).await,
        (422, false),
        "another amount under the same key"
    );

    // The middleware accepts a header field only if it equals the member of the body.
    assert_eq!(send(&app, &["k-1"], payment).await, (201, true));
    assert_eq!(send(&app, &["k-2"], payment).await, (400, false));
    assert_eq!(send(&app, &["k-1", "k-2"], payment).await, (400, false));
    assert_eq!(send(&app, &["k-1"], r#"{"amount":100}"#).await, (400, false), "no key");

    for body in [
        "",
        "no JSON",
        r#"{"idempotency_key":7,"amount":1}"#,
        r#"{"idempotency_key":"","amount":1}"#,
        r#"{"idempotency_key":"two\nlines","amount":1}"#,
        r#"{"idempotency_key":"a","idempotency_key":"b","amount":1}"#,
    ] {
        assert_eq!(send(&app, &[], body).await, (400, false), "{body}");
    }
    let long = "x".repeat(LONGEST_BODY + 1);
    assert_eq!(send(&app, &[], long).await, (413, false));
    let stalled = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
    assert_eq!(send(&app, &[], stalled).await, (408, false));
    println!("the payment was made once, under the key in its body");
}
