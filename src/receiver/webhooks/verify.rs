//! The check of a webhook: its inputs, its result and its errors.

use std::fmt;
use std::time::SystemTime;

use http::HeaderMap;
use http::request::Parts;

use crate::http::uri_as_received;
use crate::receiver::id::MessageId;

/// Checks that a webhook is genuine, and finds its id.
///
/// The crate implements it for [several providers](super#providers). Implement it for your own:
///
/// ```
/// use tower_idempotency::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};
/// use tower_idempotency::receiver::MessageId;
///
/// struct Warehouse;
///
/// impl VerifyWebhook for Warehouse {
///     fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
///         let signature = webhook.headers().get("x-signature").ok_or(InvalidWebhook::MissingHeader)?;
///         if !is_genuine(webhook.body(), signature.as_bytes()) {
///             return Err(InvalidWebhook::Signature);
///         }
///         // Take the id from a part that the signature covers.
///         Ok(MessageId::from(webhook.body()))
///     }
/// }
/// # fn is_genuine(_: &[u8], _: &[u8]) -> bool { true }
/// ```
pub trait VerifyWebhook: Send + Sync + 'static {
    /// Returns whether the webhook carries a signature, genuine or not. Default: `true`.
    ///
    /// If it returns `false`, the layer rejects the webhook as
    /// [`MissingHeader`](InvalidWebhook::MissingHeader) before it reads the body.
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        let _ = headers;
        true
    }

    /// Returns the id of a genuine webhook. The id becomes the key of the record, so two different
    /// ids run twice.
    ///
    /// # Errors
    ///
    /// The reason why the webhook is not genuine, or does not have the form that this provider
    /// sends.
    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook>;
}

/// A received webhook: its head, its body, and the time of its arrival.
#[derive(Clone, Copy)]
pub struct Webhook<'a> {
    head: &'a Parts,
    body: &'a [u8],
    received_at: SystemTime,
}

impl<'a> Webhook<'a> {
    /// Collects the inputs of a check. The layer calls this. Call it to test your own
    /// [`VerifyWebhook`].
    #[must_use]
    pub const fn new(head: &'a Parts, body: &'a [u8], received_at: SystemTime) -> Self {
        Self {
            head,
            body,
            received_at,
        }
    }

    /// Returns the head with method, URI, header fields and extensions. No signature covers the
    /// method.
    #[must_use]
    pub const fn head(&self) -> &'a Parts {
        self.head
    }

    /// Returns the header fields.
    #[must_use]
    pub const fn headers(&self) -> &'a HeaderMap {
        &self.head.headers
    }

    /// Returns the path and query as the provider sent them, also inside a nested axum router.
    #[must_use]
    pub fn path_and_query(&self) -> &'a str {
        uri_as_received(self.head)
            .path_and_query()
            .map_or("/", http::uri::PathAndQuery::as_str)
    }

    /// Returns the whole body, byte for byte.
    #[must_use]
    pub const fn body(&self) -> &'a [u8] {
        self.body
    }

    /// Returns the time at which the body was complete.
    #[must_use]
    pub const fn received_at(&self) -> SystemTime {
        self.received_at
    }
}

/// Shows nothing of the webhook, because its head and body may hold secrets.
impl fmt::Debug for Webhook<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").finish_non_exhaustive()
    }
}

/// The reason why a webhook is rejected.
///
/// The sender gets the same 401 for every reason. The layer reports the reason in the event
/// `webhook-rejected` and in the metric `idempotency_webhooks_rejected_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InvalidWebhook {
    /// The body does not have the form that this provider sends, so the signed parts cannot be
    /// read.
    Body,
    /// The webhook has no id, or one that this provider cannot have sent.
    Id,
    /// A header field that the check needs is missing.
    MissingHeader,
    /// No configured secret or key can check a signature of this kind. For example, a public key is
    /// configured, and the sender signs with a shared secret.
    Secret,
    /// No signature matches. The webhook was altered, it comes from another sender, or the
    /// configured secret is a different one.
    Signature,
    /// The timestamp cannot be read, or is too far in the past or the future.
    Timestamp,
}

impl InvalidWebhook {
    /// Returns the spelling of the reason in the metric's label and in the event, such as
    /// `missing-header`.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Body => "body",
            Self::Id => "id",
            Self::MissingHeader => "missing-header",
            Self::Secret => "secret",
            Self::Signature => "signature",
            Self::Timestamp => "timestamp",
        }
    }
}

impl fmt::Display for InvalidWebhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Body => "the body of the webhook does not have the form that this provider sends",
            Self::Id => "the webhook has no id, or an invalid one",
            Self::MissingHeader => "a header field that the signature needs is missing",
            Self::Secret => "no configured secret or key can check a signature of this kind; compare the settings with the provider's",
            Self::Signature => "no signature of the webhook matches; if all are rejected, check the configured secret or URL",
            Self::Timestamp => "the timestamp of the webhook cannot be read or is too far away; if all are rejected, check the clock",
        })
    }
}

impl std::error::Error for InvalidWebhook {}
