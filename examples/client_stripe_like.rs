//! One charge at a third party that accepts idempotency keys, although responses are lost and the
//! process crashes.
//!
//! ```text
//! cargo run --features retry --example client_stripe_like
//! ```
//!
//! The example serves the bank itself, on a free port, and causes the accidents: one response is
//! lost, one request is refused, and one response comes too late. All attempts carry the same key,
//! so the bank charges once and repeats its response. Then the process "crashes" and the job runs
//! again. The client derives the key from the order, so the second run sends the same key.

mod third_party;

use std::io;
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use third_party::bank::Bank;
use third_party::{Accident, ThirdParty};
use tower::timeout::TimeoutLayer;
use tower::{BoxError, ServiceBuilder, ServiceExt};
use tower_idempotency::client::{
    CallLayer, CallOutcome, CallReport, IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin, ProviderProfile,
    RetryPolicy,
};

/// The job: charges an order. It creates a new client each time, as a process does after a crash.
async fn charge(bank: &ThirdParty, order: &str, amount: &str) -> Result<String, BoxError> {
    let keys = KeyDeriver::new(b"32 bytes from the secret manager")?;
    let retries = RetryPolicy::new(ProviderProfile::stripe())
        .with_initial_backoff(Duration::from_millis(50))
        .with_max_backoff(Duration::from_secs(1));
    let client = ServiceBuilder::new()
        .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(KeyGenerator::derived(keys)))
        .layer(CallLayer::new(retries))
        // tower's boxed error does not implement `Error`, so it could not be a source.
        .map_err(io::Error::other::<BoxError>)
        .layer(TimeoutLayer::new(Duration::from_millis(500)))
        .service(Client::builder(TokioExecutor::new()).build_http::<String>());

    let mut request = Request::post(bank.url("/v1/charges")).body(amount.to_owned())?;
    request.extensions_mut().insert(KeyOrigin::new(order, "charge"));
    let response = client.oneshot(request).await?;

    let report = *response
        .extensions()
        .get::<CallReport>()
        .ok_or("the layer reports every call")?;
    assert_eq!(report.outcome(), CallOutcome::Responded);
    let id = String::from_utf8(response.into_body().collect().await?.to_bytes().into())?;
    let (attempts, is_replay) = (report.attempts(), report.is_replay());
    println!("{order}: {id} after {attempts} attempts, the response is a replay: {is_replay}");
    Ok(id)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let bank = Bank::default();
    let party = ThirdParty::serve(bank.app()).await?;
    party.expect([
        Accident::ResponseLost,
        Accident::Overload,
        Accident::Slow(Duration::from_secs(5)),
    ]);
    let first = charge(&party, "order-4711", "4200").await?;
    // The process crashed before it recorded the charge, and the job is started again.
    let again = charge(&party, "order-4711", "4200").await?;
    let other = charge(&party, "order-4712", "1700").await?;

    println!("the bank charged {:?}", bank.charges());
    assert_eq!(bank.charges(), ["4200", "1700"], "one charge for each order");
    assert!(first == again && first != other);
    Ok(())
}
