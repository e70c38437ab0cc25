//! Webhooks of Slack.

use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{field, hex, member};
use crate::receiver::webhooks::signature::{Secrets, is_recent};
use crate::receiver::webhooks::{InvalidWebhook, Webhook};

const SIGNATURE: &str = "x-slack-signature";
const TIMESTAMP: &str = "x-slack-request-timestamp";

hmac_provider! {
    /// Slack: `X-Slack-Signature` of the kind `v0`, and `X-Slack-Request-Timestamp`.
    ///
    /// * **Signed**: the timestamp and the body.
    /// * **Id**: `event_id` in the body of an event, which Slack repeats when it sends the event again.
    ///   Slash commands and interactions (forms) and `url_verification` have no id, and Slack does not
    ///   send them again. Their id is a digest of timestamp and body, so a recorded copy is a
    ///   duplicate.
    /// * **Replays**: the timestamp must be within five minutes of the clock, and each id is signed.
    ///
    /// Your handler must respond to `url_verification` with the `challenge` of the body.
    pub struct SlackWebhooks;

    /// Verifies with these signing secrets of the app, each as Slack shows it.
    pub fn new(secrets);

    signature: SIGNATURE,
    verify: verify,
}

fn verify(secrets: &Secrets, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
    let (headers, body) = (webhook.headers(), webhook.body());
    let timestamp = field(headers, TIMESTAMP, InvalidWebhook::Timestamp)?;
    let signature = field(headers, SIGNATURE, InvalidWebhook::Signature)?;
    let signature = signature.strip_prefix("v0=").and_then(hex);
    // A timestamp has digits only (see `is_recent`), so text cannot be shifted between the
    // parts.
    let signed = [b"v0:", timestamp.as_bytes(), b":", body];
    secrets.verify(&signed, &[signature.ok_or(InvalidWebhook::Signature)?])?;
    is_recent(timestamp, webhook.received_at())?;
    let id = ids::slack(member(body, "event_id").unwrap_or_default());
    if !id.is_missing() {
        return Ok(id);
    }
    let digest = blake3::hash(body);
    Ok(MessageId::of([
        b"slack-request".as_slice(),
        timestamp.as_bytes(),
        digest.as_bytes(),
    ]))
}
