//! Webhooks of GitHub.

use http::HeaderMap;

use crate::error::Error;
use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{field, hex, present};
use crate::receiver::webhooks::signature::Secrets;
use crate::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};

const SIGNATURE: &str = "x-hub-signature-256";

/// GitHub: `X-Hub-Signature-256`.
///
/// * **Signed**: the body.
/// * **Id**: `X-GitHub-Delivery`. It is **not signed**, and GitHub signs no other id.
/// * **Replays**: there is no timestamp. Someone who has recorded a webhook can send it again under
///   another id, and it runs again. A copy under the same id is a duplicate. Make the handler safe
///   against an old event, for instance by the event's own ids and times.
#[derive(Clone, Debug)]
pub struct GitHubWebhooks(Secrets);

impl GitHubWebhooks {
    /// Verifies with these secrets, each as you entered it at GitHub.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if there is no secret or an empty one.
    pub fn new<S: AsRef<[u8]>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        Ok(Self(Secrets::new(secrets)?))
    }
}

impl VerifyWebhook for GitHubWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(SIGNATURE)
    }

    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        let headers = webhook.headers();
        let signature = field(headers, SIGNATURE, InvalidWebhook::Signature)?;
        let signature = signature.strip_prefix("sha256=").and_then(hex);
        self.0
            .verify(&[webhook.body()], &[signature.ok_or(InvalidWebhook::Signature)?])?;
        field(headers, "x-github-delivery", InvalidWebhook::Id)?;
        present(ids::github(headers))
    }
}
