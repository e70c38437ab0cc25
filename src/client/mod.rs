//! Calls to other systems that must take effect once, although our own callers retry and our
//! process may crash.
//!
//! The guarantee depends on what the third party supports. The guide [calling others](crate::guide::calling_others) has the table, a
//! complete client, the order of the layers, and the limits.
//!
//! * [`IdempotencyKeyLayer`] gives each logical request one key for all its attempts: random, derived ([`KeyDeriver`]), or made by a
//!   function. A [`ProviderProfile`] describes how a third party takes keys.
//! * `CallLayer` and `RetryPolicy` (feature `retry`) repeat a request where that is safe, and report the outcome.
//! * [`OnceLayer`] records the responses of a third party that does not deduplicate, and makes each call once over any store. `once`
//!   (feature `once`) does it for calls of any kind.
//! * `ReqwestService` (feature `reqwest`) makes a `reqwest::Client` a tower service. `SameOriginKey` (feature `follow-redirect`) is a
//!   redirect policy that sends a key to no other origin.
//!
//! ```
//! use std::convert::Infallible;
//!
//! use http::{Request, Response};
//! use tower::{service_fn, ServiceBuilder, ServiceExt};
//! use tower_idempotency::client::{IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin, ProviderProfile};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tower_idempotency::Error> {
//! let keys = KeyGenerator::derived(KeyDeriver::new(b"32 bytes from the secret manager")?);
//! let client = ServiceBuilder::new()
//!     .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(keys))
//!     .service(service_fn(|request: Request<String>| async move {
//!         // A UUID, which is the same for order 7 also after a crash.
//!         assert_eq!(request.headers()["idempotency-key"].len(), 36);
//!         Ok::<_, Infallible>(Response::new(String::new()))
//!     }));
//! let charge = Request::post("/v1/charges").extension(KeyOrigin::new("order-7", "charge"));
//! client.oneshot(charge.body("amount=4200".to_owned()).unwrap()).await.unwrap();
//! # Ok(())
//! # }
//! ```

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
pub use once::{Done, Failure, Once, Steps, once};
pub use once::{LostCall, OnceClient, OnceError, OnceFuture, OnceLayer};
#[cfg(feature = "follow-redirect")]
pub use redirect::SameOriginKey;
#[cfg(feature = "retry")]
pub use retry::{
    Backoff, BodyError, Call, CallError, CallFuture, CallLayer, CallOutcome, CallReport, CloneBody, CollectError,
    CollectingCall, CollectingCallFuture, CollectingCallLayer, RetryPolicy,
};
