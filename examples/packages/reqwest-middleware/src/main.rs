//! One charge by `reqwest-middleware`: a middleware of a `ClientWithMiddleware` that uses the
//! layers of a tower client.
//!
//! ```text
//! cargo run --manifest-path examples/packages/Cargo.toml -p reqwest-middleware-example
//! ```
//!
//! The example serves the bank itself, on a free port. One response is lost, and another comes
//! after the timeout. All attempts carry the same key, which the middleware derives from the order,
//! so the bank charges once. Middlewares after this one see every attempt. Middlewares before it
//! see one call.

#[path = "../../../third_party/mod.rs"]
mod third_party;

use std::error::Error as StdError;
use std::time::Duration;

use http::Extensions;
use reqwest::{Body, Request, Response};
use reqwest_middleware::{ClientBuilder, Error, Middleware, Next};
use third_party::bank::Bank;
use third_party::{Accident, ThirdParty};
use tower::{ServiceBuilder, ServiceExt};
use tower_idempotency::client::{
    CallLayer, CallOutcome, CallReport, ErrorClass, IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin,
    ProviderProfile, RetryPolicy,
};

/// A middleware that gives each logical request one key, and makes the attempts that carry it. It
/// reads the `KeyOrigin` from the extensions of the request.
struct Idempotency {
    keys: IdempotencyKeyLayer,
    calls: CallLayer,
}

impl Idempotency {
    fn new(profile: ProviderProfile, keys: KeyDeriver) -> Self {
        let retries = RetryPolicy::new(profile.clone())
            .with_initial_backoff(Duration::from_millis(50))
            .with_max_backoff(Duration::from_secs(1))
            .with_errors(|error: &Error| match error {
                Error::Reqwest(error) if error.is_connect() => ErrorClass::NotSent,
                Error::Reqwest(error) if error.is_builder() => ErrorClass::Final,
                _ => ErrorClass::Lost,
            });
        Self {
            keys: IdempotencyKeyLayer::new(profile).with_generator(KeyGenerator::derived(keys)),
            calls: CallLayer::new(retries),
        }
    }
}

#[async_trait::async_trait]
impl Middleware for Idempotency {
    async fn handle(&self, request: Request, extensions: &mut Extensions, next: Next<'_>) -> Result<Response, Error> {
        let client =
            ServiceBuilder::new()
                .layer(&self.keys)
                .layer(&self.calls)
                .service_fn(|request: http::Request<Body>| {
                    let next = next.clone();
                    async move {
                        let mut extensions = request.extensions().clone();
                        let response = next.run(request.try_into()?, &mut extensions).await?;
                        Ok::<http::Response<Body>, Error>(response.into())
                    }
                });
        let mut request = http::Request::try_from(request)?;
        request.extensions_mut().extend(extensions.clone());
        client
            .oneshot(request)
            .await
            .map(Response::from)
            .map_err(Error::middleware)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn StdError>> {
    let bank = Bank::default();
    let party = ThirdParty::serve(bank.app()).await?;
    let keys = KeyDeriver::new(b"32 bytes from the secret manager")?;
    // The timeout applies to each attempt.
    let http = reqwest::Client::builder().timeout(Duration::from_millis(500)).build()?;
    let client = ClientBuilder::new(http)
        .with(Idempotency::new(ProviderProfile::stripe(), keys))
        .build();

    party.expect([Accident::ResponseLost, Accident::Slow(Duration::from_secs(5))]);
    let request = client.post(party.url("/v1/charges")).body("4200");
    let response = request
        .with_extension(KeyOrigin::new("order-4711", "charge"))
        .send()
        .await?
        .error_for_status()?;
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
