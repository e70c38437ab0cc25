//! Webhooks for the server's layer. The layer here verifies their signatures before anything is
//! recorded, and turns their ids into keys.
//!
//! A webhook is an HTTP request that the provider sends again until it gets a 2xx. [`WebhookLayer`]
//! verifies it and passes its id on as its key. The [`IdempotencyLayer`](crate::IdempotencyLayer)
//! inside returns the stored 2xx for a duplicate, and 409 with `Retry-After` while the first
//! delivery is in flight. It stores no other response, so the next delivery runs the handler again.
//!
//! ```
//! # #[cfg(feature = "axum")]
//! # fn app() -> Result<axum::Router, tower_idempotency::Error> {
//! use axum::{routing::post, Router};
//! use tower::ServiceBuilder;
//! use tower_idempotency::receiver::webhooks::{StandardWebhooks, WebhookLayer};
//! use tower_idempotency::{IdempotencyLayer, MemoryStore};
//!
//! let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
//! let layers = ServiceBuilder::new()
//!     .layer(WebhookLayer::new("billing", StandardWebhooks::new([secret])?))
//!     .layer(IdempotencyLayer::new(MemoryStore::new()).webhooks());
//! Ok(Router::new().route("/webhooks", post(|| async { "thanks" })).layer(layers))
//! # }
//! ```
//!
//! You can pass several secrets to a provider, so that you can replace a secret without a gap. Do
//! not use them for several senders. Give each sender, and each route with a handler of its own, a
//! layer with a [name](WebhookLayer::new) of its own.
//!
//! If the process of a handler dies, the layer cannot know whether the handler had its effect. The
//! webhook then gets 409 `outcome-unknown` until you [resolve](crate::Store::resolve) its key.
//! Under [`OnLost::Execute`](crate::OnLost::Execute), the handler runs again instead.
//!
//! # Providers
//!
//! | provider | signed | id | a recorded copy |
//! |---|---|---|---|
//! | [`StandardWebhooks`], also Svix | id, time, body | signed | duplicate for five minutes, then rejected by its time |
//! | [`StripeWebhooks`] | time, body | signed | duplicate for five minutes, then rejected by its time |
//! | [`SlackWebhooks`] | time, body | signed | duplicate for five minutes, then rejected by its time |
//! | [`SquareWebhooks`] | URL, body | signed | duplicate while the record is retained, then **runs again** |
//! | [`AdyenWebhooks`] | eight members of the body | signed | duplicate while the record is retained, then **runs again** |
//! | [`AdyenPlatformWebhooks`] | body | digest of the body | duplicate while the record is retained, then **runs again** |
//! | [`PayPalWebhooks`] | time, CRC-32 of the body | covered by CRC-32 only | duplicate for three days, then rejected by its time; a forged body with the same CRC-32 **runs** |
//! | [`TwilioWebhooks`] | URL and parameters as one text without separators, or URL and body | **not signed** | **runs again** under another id |
//! | [`GitHubWebhooks`] | body | **not signed** | **runs again** under another id |
//! | [`ShopifyWebhooks`] | body | **not signed** | **runs again** under another id |
//!
//! The handler does not run for a duplicate. Each provider's page has the details. Header fields
//! other than those of the signature are never signed: do not decide anything by them.
//!
//! Signatures are compared in constant time and read strictly. A signature has one spelling:
//! lower-case hexadecimal, or base64 with padding and without stray bits. A field that the check
//! reads must not be repeated.
//!
//! # Tests of your own
//!
//! With the feature `testing`, `receiver::testing::WebhookSigner` signs requests as each provider
//! does.

mod fields;
mod layer;
mod providers;
mod signature;
mod verify;

pub use layer::{WebhookFuture, WebhookLayer, WebhookService};
#[cfg(feature = "testing")]
pub(super) use providers::signing;
pub use providers::{
    AdyenPlatformWebhooks, AdyenWebhooks, GitHubWebhooks, PayPalWebhooks, ShopifyWebhooks, SlackWebhooks,
    SquareWebhooks, StandardWebhooks, StripeWebhooks, TwilioWebhooks,
};
pub use verify::{InvalidWebhook, VerifyWebhook, Webhook};
