//! Webhooks: their signatures are verified before anything is recorded, and their ids become the keys of the server's layer.
//!
//! A webhook is an HTTP request that is sent again until it is answered with 2xx. [`WebhookLayer`] verifies it and hands its id on as
//! its key; the [`IdempotencyLayer`](crate::IdempotencyLayer) within answers a duplicate with the 2xx that the first one got, and one in
//! flight with 409 and `Retry-After`. What its handler answers otherwise is not kept: the next delivery runs it again.
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
//! Several secrets of one provider are for the time in which they are changed, not for several senders: give each of those, and each
//! route with a handler of its own, a layer with a [name](WebhookLayer::new) of its own.
//!
//! As anywhere, a handler that was killed leaves nobody who knows: its webhook gets 409 `outcome-unknown` until you
//! [resolve](crate::Store::resolve) it, or runs again under [`OnLost::Execute`](crate::OnLost::Execute).

mod layer;
mod providers;
mod signature;

use std::fmt;
use std::time::SystemTime;

use http::HeaderMap;

pub use layer::{WebhookFuture, WebhookLayer, WebhookService};
pub use providers::{GitHubWebhooks, ShopifyWebhooks, StandardWebhooks, StripeWebhooks};

use super::id::MessageId;

/// Tells whether a webhook is genuine, and which it is.
pub trait VerifyWebhook: Send + Sync + 'static {
    /// Whether it carries a signature at all, be it a good one or not; `true` by default. What does not is refused before its body is
    /// read.
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        let _ = headers;
        true
    }

    /// The id of a webhook that was sent with these headers and this body and came at this time.
    ///
    /// # Errors
    ///
    /// When it is not genuine, or nothing that this provider sends.
    fn verify(&self, headers: &HeaderMap, body: &[u8], now: SystemTime) -> Result<MessageId, InvalidWebhook>;
}

/// What is wrong with a webhook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InvalidWebhook {
    /// It has no id, one that this provider cannot have sent, or a body that should hold one cannot be read.
    Id,
    /// It has no signature, or none that fits: it was altered, is somebody else's, or the secret is another.
    Signature,
    /// Its timestamp is missing, or more than five minutes away.
    Timestamp,
}

impl fmt::Display for InvalidWebhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Id => "the webhook has no id, or an impossible one",
            Self::Signature => "the webhook has no signature that fits",
            Self::Timestamp => "the webhook's timestamp is missing, or more than five minutes away",
        })
    }
}

impl std::error::Error for InvalidWebhook {}
