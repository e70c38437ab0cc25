//! Webhooks of GitHub.

use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{field, hex, present};
use crate::receiver::webhooks::signature::Secrets;
use crate::receiver::webhooks::{InvalidWebhook, Webhook};

const SIGNATURE: &str = "x-hub-signature-256";

hmac_provider! {
    /// GitHub: `X-Hub-Signature-256`.
    ///
    /// * **Signed**: the body.
    /// * **Id**: `X-GitHub-Delivery`. It is **not signed**, and GitHub signs no other id.
    /// * **Replays**: there is no timestamp. Someone who has recorded a webhook can send it again under
    ///   another id, and it runs again. A copy under the same id is a duplicate. Make the handler safe
    ///   against an old event, for instance by the event's own ids and times.
    pub struct GitHubWebhooks;

    /// Verifies with these secrets, each as you entered it at GitHub.
    pub fn new(secrets);

    signature: SIGNATURE,
    verify: verify,
}

fn verify(secrets: &Secrets, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
    let headers = webhook.headers();
    let signature = field(headers, SIGNATURE, InvalidWebhook::Signature)?;
    let signature = signature.strip_prefix("sha256=").and_then(hex);
    secrets.verify(&[webhook.body()], &[signature.ok_or(InvalidWebhook::Signature)?])?;
    field(headers, "x-github-delivery", InvalidWebhook::Id)?;
    present(ids::github(headers))
}
