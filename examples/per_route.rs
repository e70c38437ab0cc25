//! Settings for each route: clone the layer and change the clone. Keys belong to the authenticated
//! tenant.
//!
//! ```text
//! cargo run --features axum --example per_route
//! ```
//!
//! ```text
//! A='http://127.0.0.1:3000'; B='Authorization: Bearer alpha-token'; K='Idempotency-Key: 1'
//! curl -i $A/payments -H "$B" -d 100                  # 400: a payment needs a key
//! curl -i $A/payments -H "$B" -H "$K" -d 100          # paid; a repetition is replayed, for a week
//! curl -i $A/reports  -H "$B" -H "$K-r" -d today      # not stored: each request makes a new report
//! curl -i $A/emails   -H "$B" -H "$K-e" -d nobody     # 502, stored: the mail has left, never send it twice
//! curl -i $A/v2/payments -H "$B" -H "$K-2" -d 100     # the same settings, chosen by one function
//! ```
//!
//! `beta-token` belongs to another tenant. The same key of another tenant is another key. After
//! Ctrl-C the server waits for the executions whose callers hung up. `LISTEN` sets another address.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::extract::Request;
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tower_idempotency::{
    AttemptNumber, DoNotStore, Drain, IdempotencyKey, IdempotencyLayer, Lease, MemoryStore, OnError, Scope, StoreFor,
};

const HOUR: Duration = Duration::from_secs(3600);
const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Clone, Copy)]
struct Tenant(&'static str);

/// Authenticates the tenant. It runs outside of the idempotency layers, so that a stranger who
/// learns a key cannot get the response that is stored under it.
async fn authenticate(mut request: Request, next: Next) -> Result<Response, StatusCode> {
    let token = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let tenant = match token {
        Some(b"Bearer alpha-token") => Tenant("alpha"),
        Some(b"Bearer beta-token") => Tenant("beta"),
        _ => return Err(StatusCode::UNAUTHORIZED),
    };
    request.extensions_mut().insert(tenant);
    Ok(next.run(request).await)
}

/// The scope of a key: the authenticated tenant, never a value that the client may choose. The
/// layer refuses a request for which this function returns `None`.
fn tenant(head: &Parts) -> Option<Scope> {
    head.extensions.get().map(|Tenant(name)| Scope::from(*name))
}

/// One layer for each route. All of them are clones of one layer and share its store.
fn v1(idempotency: &IdempotencyLayer<MemoryStore>) -> Router {
    let payments = idempotency.clone().require_key().with_retention(WEEK);
    let reports = idempotency.clone().with_wait(Duration::ZERO);
    let emails = idempotency.clone().on_error(OnError::Store);
    Router::new()
        .route("/payments", post(pay).layer(payments))
        .route("/reports", post(report).layer(reports))
        .route("/emails", post(email).layer(emails))
}

/// One layer over many routes, with a function that chooses the settings. In a nested router this
/// function sees the path without the prefix.
fn v2(idempotency: &IdempotencyLayer<MemoryStore>) -> Router {
    let payments = idempotency.clone().require_key().with_retention(WEEK).settings();
    let others = idempotency.settings();
    let chosen = idempotency
        .clone()
        .with_settings_for(move |head| match head.uri.path() {
            "/payments" => Some(payments.clone()),
            "/quotes" => None,
            _ => Some(others.clone()),
        });
    Router::new()
        .route("/payments", post(pay))
        .route("/quotes", post(quote))
        .route("/emails", post(email))
        .layer(chosen)
}

fn app(idempotency: &IdempotencyLayer<MemoryStore>) -> Router {
    v1(idempotency)
        .nest("/v2", v2(idempotency))
        .layer(from_fn(authenticate))
        .route("/health", get(|| async { "fine\n" }))
}

/// Pays. The key for the bank is the same in every attempt. So the bank charges once, even if this
/// attempt is lost and the handler runs again.
async fn pay(Extension(Tenant(tenant)): Extension<Tenant>, lease: Lease, amount: String) -> (StatusCode, String) {
    let n = next_number();
    println!("payment {n} of {tenant} begins");
    sleep(Duration::from_secs(1)).await;
    println!("payment {n} of {tenant} is made");
    let key_for_the_bank = lease.derive_key("charge");
    let receipt = format!("payment {n} of {amount}, bank key {key_for_the_bank}\n");
    (StatusCode::CREATED, receipt)
}

/// Makes a report. The extension of the response says whether the layer stores it, and for how
/// long.
async fn report(day: String) -> Response {
    sleep(Duration::from_millis(500)).await;
    let report = format!("report {} on {day}\n", next_number());
    match day.as_str() {
        "today" => (Extension(DoNotStore), report).into_response(),
        _ => (Extension(StoreFor(HOUR)), report).into_response(),
    }
}

/// Sends a mail. The mail leaves before the handler can fail, so the failure must be stored. If the
/// failure released the key, a retry would send the mail twice.
async fn email(key: Option<IdempotencyKey>, attempt: Option<AttemptNumber>, to: String) -> (StatusCode, String) {
    let status = if to.contains('@') {
        StatusCode::ACCEPTED
    } else {
        StatusCode::BAD_GATEWAY
    };
    let protection = match (key, attempt) {
        (Some(key), Some(attempt)) => format!("attempt {} under key {}", attempt.number(), key.as_str()),
        _ => "without a key".to_owned(),
    };
    (status, format!("mail {} to {to}, {protection}\n", next_number()))
}

/// Makes a quote, which has no effect and needs no protection.
async fn quote(amount: String) -> String {
    format!("quote {} for {amount}\n", next_number())
}

fn next_number() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

async fn interrupted() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        eprintln!("cannot listen for Ctrl-C: {error}");
    }
}

/// Waits up to 30 s for the executions whose callers hung up, so that their effects and responses
/// are complete before the process ends.
async fn finish(drain: Drain) {
    match timeout(Duration::from_secs(30), drain.wait()).await {
        Ok(()) => println!("everything is finished"),
        Err(_) => eprintln!("{} executions did not finish within 30 s", drain.running()),
    }
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let idempotency = IdempotencyLayer::new(MemoryStore::new()).with_scope(tenant);
    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app(&idempotency))
        .with_graceful_shutdown(interrupted())
        .await?;
    finish(idempotency.drain()).await;
    Ok(())
}
