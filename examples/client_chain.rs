//! The whole chain: a customer orders from a shop once, and the shop charges a bank once for each
//! purpose, although both repeat their requests.
//!
//! ```text
//! cargo run --features axum,reqwest,retry --example client_chain
//! ```
//!
//! The customer's request carries a key, which the shop's `IdempotencyLayer` reads. The handler
//! derives the keys of its own calls from its lease. If the handler runs again, it derives the same
//! keys; other requests and other purposes get other keys. The bank never sees the customer's key.
//!
//! The bank's responses are lost until the shop gives up and responds with 502. The customer's
//! client retries, and the shop's next response is lost, too. At the end there is one charge for
//! the goods and one for the shipping.

mod third_party;

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use http::Request;
use third_party::bank::Bank;
use third_party::{Accident, ThirdParty};
use tower::{BoxError, ServiceBuilder, ServiceExt};
use tower_idempotency::client::{
    CallLayer, CallReport, IdempotencyKeyLayer, ProviderProfile, ReqwestService, RetryPolicy,
};
use tower_idempotency::{IdempotencyLayer, Lease, MemoryStore};

/// Sends a request with retries. A key that the request has already stays as it is.
async fn call(
    profile: ProviderProfile,
    attempts: u32,
    request: Request<String>,
) -> Result<reqwest::Response, BoxError> {
    let retries = RetryPolicy::new(profile.clone())
        .with_initial_backoff(Duration::from_millis(50))
        .with_max_backoff(Duration::from_secs(1))
        .with_max_attempts(attempts);
    let client = ServiceBuilder::new()
        .layer(IdempotencyKeyLayer::new(profile))
        .layer(CallLayer::new(retries))
        .service(ReqwestService::build(reqwest::Client::builder())?);
    Ok(client.oneshot(request).await?.into())
}

async fn charge(bank: &ThirdParty, lease: &Lease, purpose: &str, amount: &str) -> Result<String, BoxError> {
    let request = Request::post(bank.url("/v1/charges"))
        .header("idempotency-key", lease.derive_key(purpose))
        .body(amount.to_owned())?;
    let response = call(ProviderProfile::stripe(), 2, request).await?.error_for_status()?;
    Ok(response.text().await?)
}

/// The handler of the shop.
async fn order(State(bank): State<ThirdParty>, lease: Lease) -> Response {
    println!("the shop takes the order");
    let charges = async {
        let goods = charge(&bank, &lease, "goods", "4200").await?;
        let shipping = charge(&bank, &lease, "shipping", "490").await?;
        Ok::<_, BoxError>(format!("ordered, paid by {goods} and {shipping}"))
    };
    match charges.await {
        Ok(paid) => (StatusCode::CREATED, paid).into_response(),
        Err(error) => {
            println!("the shop gives up: {error}");
            StatusCode::BAD_GATEWAY.into_response()
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let bank = Bank::default();
    let at_bank = ThirdParty::serve(bank.app()).await?;
    let shop = Router::new()
        .route("/orders", post(order))
        .layer(IdempotencyLayer::new(MemoryStore::new()).require_key())
        .with_state(at_bank.clone());
    let at_shop = ThirdParty::serve(shop).await?;

    at_bank.expect([
        Accident::ResponseLost,
        Accident::ResponseLost,
        Accident::None,
        Accident::ResponseLost,
    ]);
    at_shop.expect([Accident::None, Accident::ResponseLost]);
    let request = Request::post(at_shop.url("/orders")).body("2 teapots".to_owned())?;
    let response = call(ProviderProfile::draft(), 5, request).await?.error_for_status()?;
    let report = *response
        .extensions()
        .get::<CallReport>()
        .ok_or("the layer reports every call")?;
    let (attempts, is_replay) = (report.attempts(), report.is_replay());
    println!("the customer has after {attempts} attempts: {}", response.text().await?);

    println!("the bank charged {:?}", bank.charges());
    assert_eq!((attempts, is_replay), (3, true));
    assert_eq!(bank.charges(), ["4200", "490"], "one charge for each purpose");
    Ok(())
}
