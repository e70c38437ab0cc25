//! Webhooks: the layer verifies their signatures before anything is recorded, and turns their ids into the keys of the server's layer.
//!
//! A webhook is an HTTP request that the provider sends again until it gets a 2xx. [`WebhookLayer`] verifies it and passes its id on as
//! its key. The [`IdempotencyLayer`](crate::IdempotencyLayer) inside answers a duplicate with the 2xx that the first delivery got, and a
//! duplicate of one in flight with 409 and `Retry-After`. It stores no other response, so the next delivery runs the handler again.
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
//! Several secrets of one provider are for the time in which a secret is replaced, not for several senders. Give each sender, and each
//! route with a handler of its own, a layer with a [name](WebhookLayer::new) of its own.
//!
//! If the process of a handler dies, nobody knows how far it came: its webhook gets 409 `outcome-unknown` until you
//! [resolve](crate::Store::resolve) it, or runs again under [`OnLost::Execute`](crate::OnLost::Execute).
//!
//! # Providers
//!
//! | provider | signed | id | protection against a recorded copy |
//! |---|---|---|---|
//! | [`StandardWebhooks`], also Svix | id, time, body | signed | five minutes, then the time is too old |
//! | [`StripeWebhooks`] | time, body | signed | five minutes |
//! | [`SlackWebhooks`] | time, body | signed | five minutes |
//! | [`SquareWebhooks`] | URL, body | signed | as long as the record is retained |
//! | [`AdyenWebhooks`] | eight members of the body | signed | as long as the record is retained |
//! | [`AdyenPlatformWebhooks`] | body | digest of the body | as long as the record is retained |
//! | [`PayPalWebhooks`] | time, CRC-32 of the body | covered by CRC-32 only | three days, but a body with the same CRC-32 passes |
//! | [`TwilioWebhooks`] | URL, parameters or body | **not signed** | none under another id |
//! | [`GitHubWebhooks`] | body | **not signed** | none under another id |
//! | [`ShopifyWebhooks`] | body | **not signed** | none under another id |
//!
//! Within the time that the last column names, a recorded copy is a duplicate and does not run. Each provider's page has the details.
//! Header fields other than those of the signature are never signed: do not decide anything by them.
//!
//! Signatures are compared in constant time and read strictly. A signature has one spelling: lower-case hexadecimal, or base64 with
//! padding and without stray bits. A field that the check reads must not be repeated.
//!
//! # Tests of your own
//!
//! With the feature `testing`, `receiver::testing::WebhookSigner` signs requests as each provider does.

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
