//! One charge by `reqwest`: the layers around a `reqwest::Client`, with its own builder, bodies and answers.
//!
//! ```text
//! cargo run --features reqwest,retry --example reqwest_client
//! ```
//!
//! It serves the bank itself, on a free port. An answer is lost and another comes after the time-out of the `reqwest::Client`; all
//! attempts carry one key, and the bank charges once. With `reqwest-middleware`, see `examples/packages/reqwest-middleware`.

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

    // The time-out is one of each attempt.
    let http = ReqwestService::build(reqwest::Client::builder().timeout(Duration::from_millis(500)))?;
    let retries = RetryPolicy::new(ProviderProfile::stripe())
        .with_initial_backoff(Duration::from_millis(50))
        .with_max_backoff(Duration::from_secs(1));
    let client = ServiceBuilder::new()
        .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()))
        .layer(CallLayer::new(retries))
        .service(http);

    party.expect([Accident::AnswerLost, Accident::Slow(Duration::from_secs(5))]);
    let request = Request::post(party.url("/v1/charges")).body(Body::from("4200"))?;
    let answer = reqwest::Response::from(client.oneshot(request).await?).error_for_status()?;
    let delivery = *answer
        .extensions()
        .get::<CallReport>()
        .ok_or("the layer reports every call")?;
    let id = answer.text().await?;

    let (attempts, is_replay) = (delivery.attempts(), delivery.is_replay());
    println!("{id} after {attempts} attempts, the answer is a replay: {is_replay}");
    println!("the bank charged {:?}", bank.charges());
    assert_eq!(delivery.outcome(), CallOutcome::Responded);
    assert_eq!(bank.charges(), ["4200"], "one charge");
    Ok(())
}
