//! Calls to other systems that must take effect once, although our own callers retry and our
//! process may crash.
//!
//! The guarantee depends on what the third party supports:
//!
//! | the third party supports | use | guarantee |
//! |---|---|---|
//! | idempotency keys | [`IdempotencyKeyLayer`], with a key that is [derived](KeyDeriver) from the key of our own caller | one effect, also after a crash, as long as the third party stores its keys |
//! | ids made by the client | [`KeyDeriver::derive`], [`Attempt::id`] or [`Lease::derive_id`](crate::Lease::derive_id) as the id | one effect, because a second creation conflicts with the first |
//! | drafts: creation of a draft, then an idempotent transition | `Once::steps`, then `Steps::step` for each of the two | one effect; at worst a second draft that nobody confirms |
//! | an existence check | `Once::run_or_recover`, or [`OnceLayer::with_recovery`] | one effect, if the check blocks the lost attempt, or that attempt has settled before the check |
//! | nothing | `Once` or [`OnceLayer`] | at most once or at least once; choose. An unknown outcome is reported as unknown |
//!
//! # A complete client
//!
//! It needs the features `retry` and `reqwest`. A retry after a crash derives the same key from the
//! order, so the third party charges once.
//!
//! ```no_run
//! # #[cfg(all(feature = "retry", feature = "reqwest"))]
//! # mod example {
//! use std::time::Duration;
//!
//! use http::Request;
//! use tower::{BoxError, ServiceBuilder, ServiceExt};
//! use tower_idempotency::client::{
//!     CallLayer, CallOutcome, CallReport, IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin, KeyPlacementError, ProviderProfile,
//!     ReqwestService, RetryPolicy,
//! };
//!
//! async fn charge(order: &str, secret: &[u8]) -> Result<String, BoxError> {
//!     // Build the client once, and clone it for each call.
//!     let keys = KeyGenerator::derived(KeyDeriver::new(secret)?);
//!     let http = ReqwestService::build(reqwest::Client::builder().timeout(Duration::from_secs(10)))?;
//!     let client = ServiceBuilder::new()
//!         .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_maker(keys))
//!         .layer(CallLayer::new(RetryPolicy::new(ProviderProfile::stripe())).collect_responses())
//!         .service(http);
//!
//!     let request = Request::post("https://api.stripe.com/v1/charges")
//!         .header("content-type", "application/x-www-form-urlencoded")
//!         .extension(KeyOrigin::new(order, "charge"))
//!         .body(reqwest::Body::from("amount=4200&currency=eur"))?;
//!     match client.oneshot(request).await {
//!         Ok(response) => {
//!             let report = *response.extensions().get::<CallReport>().ok_or("every response has one")?;
//!             let response = reqwest::Response::from(response);
//!             println!("{} after {} attempts", response.status(), report.attempts());
//!             if report.outcome() == CallOutcome::Unknown {
//!                 return Err("the charge may have taken effect: send it again later, under the same key".into());
//!             }
//!             Ok(response.error_for_status()?.text().await?)
//!         }
//!         // "the HTTP call failed after 5 attempts; outcome unknown"
//!         Err(KeyPlacementError::Service(error)) if error.outcome() != CallOutcome::NotTaken => {
//!             println!("{error}: send it again later, under the same key");
//!             Err(error.into())
//!         }
//!         Err(error) => Err(error.into()),
//!     }
//! }
//! # }
//! ```
//!
//! # Where the layers go
//!
//! Outermost first:
//!
//! | layer | if the third party honours keys | if it supports nothing |
//! |---|---|---|
//! | [`OnceLayer`] | if you also record its responses on this side; with [`assume_keys_honoured`](OnceLayer::assume_keys_honoured), so that retries repeat a lost request | needed |
//! | [`IdempotencyKeyLayer`] | needed: one logical request has one key | not needed; the caller sets the key of the call, in the header field or by [`OnceLayer::with_key`] |
//! | `CallLayer`, or `tower::retry` with `RetryPolicy` (feature `retry`) | repeats a request under the same key | repeats a request only if the server provably did not take it: a refused connection, a 425, a 429 |
//! | a timeout | for each attempt | for each attempt |
//! | `FollowRedirect` with `SameOriginKey` in its policy (feature `follow-redirect`) | only around a client that follows no redirects | the same |
//! | the client, such as `ReqwestService` (feature `reqwest`) | | |
//!
//! Do not put a retry of your own below [`OnceLayer`]. It can send one call several times, and the
//! layer cannot prevent that. Do not follow redirects on your own without `SameOriginKey`, because
//! the layers would mistake the response to a later request for the response to the first one.
//!
//! A timeout of tower covers an attempt up to the head of its response.
//! `CallLayer::collect_responses` bounds the body, and repeats a request whose response breaks off
//! or stalls. Without it, `CallLayer` and `RetryPolicy` judge heads only, and an error in the body
//! reaches the caller. [`OnceLayer`] always collects the responses that it stores. If a response
//! visibly broke off, the call counts as made, and its response is not stored.
//!
//! # Limits of the guarantee
//!
//! All guarantees end with the retention of the third party. A third party that stores its keys for
//! a day does not recognise them on the next day. If the third party supports nothing, a lost
//! request cannot be distinguished from a lost response. The outcome of such a call is reported as
//! unknown, never as done or as failed.

mod classes;
mod follows;
mod keys;
mod once;
#[cfg(feature = "follow-redirect")]
mod redirect;
mod report;
#[cfg(feature = "reqwest")]
mod reqwest;
#[cfg(feature = "retry")]
mod retry;

#[cfg(feature = "reqwest")]
pub use self::reqwest::{ReqwestFuture, ReqwestService};
pub use crate::engine::Attempt;
pub use classes::ErrorClass;
pub use keys::{
    IdempotencyKeyLayer, IdempotencyKeyService, InBody, InHeader, KeyDeriver, KeyFuture, KeyGenerator, KeyOrigin,
    KeyPlacement, KeyPlacementError, Outgoing, ProviderProfile, ResponseMeaning, RetryAdvice,
};
#[cfg(feature = "once")]
pub use once::{once, Done, Failure, Once, Steps};
pub use once::{LostCall, OnceClient, OnceError, OnceFuture, OnceLayer};
#[cfg(feature = "follow-redirect")]
pub use redirect::SameOriginKey;
#[cfg(feature = "retry")]
pub use retry::{
    Backoff, BodyError, Call, CallError, CallFuture, CallLayer, CallOutcome, CallReport, CloneBody, CollectError,
    CollectingCall, CollectingCallFuture, CollectingCallLayer, RetryPolicy,
};
