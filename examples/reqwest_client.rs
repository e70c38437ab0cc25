//! One charge by `reqwest`: the layers wrap a `reqwest::Client`, with the builder, bodies and
//! responses of `reqwest`.
//!
//! ```text
//! cargo run --features reqwest,retry --example reqwest_client
//! ```
//!
//! The example serves the bank itself, on a free port. One response is lost, and another comes
//! after the timeout of the `reqwest::Client`. All attempts carry the same key, so the bank charges
//! once. For `reqwest-middleware`, see `examples/packages/reqwest-middleware`.

mod third_party;

use std::time::Duration;

use http::Request;
use reqwest::Body;
use third_party::bank::Bank;
use third_party::{Accident, ThirdParty};
use tower::{BoxError, ServiceBuilder, ServiceExt};
use tower_idempotency::client::{
    CallLayer, CallOutcome, CallReport, IdempotencyKeyLayer, ProviderProfile, ReqwestService, RetryPolicy,
};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let bank = Bank::default();
    let party = ThirdParty::serve(bank.app()).await?;

    // The timeout applies to each attempt.
    let http = ReqwestService::build(reqwest::Client::builder().timeout(Duration::from_millis(500)))?;
    let retries = RetryPolicy::new(ProviderProfile::stripe())
        .with_initial_backoff(Duration::from_millis(50))
        .with_max_backoff(Duration::from_secs(1));
    let client = ServiceBuilder::new()
        .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()))
        .layer(CallLayer::new(retries))
        .service(http);

    party.expect([Accident::ResponseLost, Accident::Slow(Duration::from_secs(5))]);
    let request = Request::post(party.url("/v1/charges")).body(Body::from("4200"))?;
    let response = reqwest::Response::from(client.oneshot(request).await?).error_for_status()?;
    let report = *response
        .extensions()
        .get::<CallReport>()
        .ok_or("the layer reports every call")?;
    let id = response.text().await?;

    let (attempts, is_replay) = (report.attempts(), report.is_replay());
    println!("{id} after {attempts} attempts, the response is a replay: {is_replay}");
    println!("the bank charged {:?}", bank.charges());
    assert_eq!(report.outcome(), CallOutcome::Responded);
    assert_eq!(bank.charges(), ["4200"], "one charge");
    Ok(())
}
