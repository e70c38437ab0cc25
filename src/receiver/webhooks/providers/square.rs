//! Webhooks of Square.

use std::fmt;

use http::HeaderMap;

use crate::error::Error;
use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{base64, field, member, present};
use crate::receiver::webhooks::signature::Secrets;
use crate::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};

const SIGNATURE: &str = "x-square-hmacsha256-signature";

/// Square: `X-Square-HmacSha256-Signature`.
///
/// * **Signed**: the notification URL and the body. The URL is the one that you entered at Square,
///   so changes by a proxy do not matter.
/// * **Id**: `event_id` in the body.
/// * **Replays**: there is no timestamp that the check could compare. A recorded webhook is a
///   duplicate for as long as its record is retained, 7 days by default, and runs again after that.
#[derive(Clone)]
pub struct SquareWebhooks {
    url: String,
    keys: Secrets,
}

impl SquareWebhooks {
    /// Verifies for this notification URL, exactly as you entered it at Square, with these
    /// signature keys.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the URL or a key is empty, or if there
    /// is no key.
    pub fn new<S: AsRef<[u8]>>(
        notification_url: impl Into<String>,
        signature_keys: impl IntoIterator<Item = S>,
    ) -> Result<Self, Error> {
        let url = notification_url.into();
        if url.is_empty() {
            return Err(Error::configuration(
                "the notification URL for webhooks of Square is empty; copy it from the settings of the subscription",
            ));
        }
        let keys = Secrets::new(signature_keys)?;
        Ok(Self { url, keys })
    }
}

impl VerifyWebhook for SquareWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(SIGNATURE)
    }

    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        let signature = base64(field(webhook.headers(), SIGNATURE, InvalidWebhook::Signature)?);
        let signed = [self.url.as_bytes(), webhook.body()];
        self.keys
            .verify(&signed, &[signature.ok_or(InvalidWebhook::Signature)?])?;
        present(ids::square(member(webhook.body(), "event_id").unwrap_or_default()))
    }
}

impl fmt::Debug for SquareWebhooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SquareWebhooks").finish_non_exhaustive()
    }
}
