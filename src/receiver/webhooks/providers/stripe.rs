//! Webhooks of Stripe.

use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{field, hex, member, present};
use crate::receiver::webhooks::signature::{MAX_SIGNATURES, Secrets, is_recent};
use crate::receiver::webhooks::{InvalidWebhook, Webhook};

const SIGNATURE: &str = "stripe-signature";

hmac_provider! {
    /// Stripe: `Stripe-Signature` with a timestamp and one or more signatures of the kind `v1`, up to
    /// 16.
    ///
    /// * **Signed**: the timestamp and the body. One matching signature is enough. Stripe sends two
    ///   while a secret is being replaced.
    /// * **Id**: the event's `id` in the body.
    /// * **Replays**: the timestamp must be within five minutes of the clock, and the id is signed.
    pub struct StripeWebhooks;

    /// Verifies with these secrets of the endpoint, each as Stripe shows it, with its `whsec_`.
    pub fn new(secrets);

    signature: SIGNATURE,
    verify: verify,
}

fn verify(secrets: &Secrets, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
    let header = field(webhook.headers(), SIGNATURE, InvalidWebhook::Signature)?;
    let all = |name: &'static str| {
        let pairs = header.split(',').filter_map(|pair| pair.split_once('='));
        pairs
            .filter(move |(found, _)| found.trim() == name)
            .map(|(_, value)| value)
    };
    let timestamp = all("t").next().ok_or(InvalidWebhook::Timestamp)?;
    if all("v1").count() > MAX_SIGNATURES {
        return Err(InvalidWebhook::Signature);
    }
    let signatures: Vec<_> = all("v1").filter_map(hex).collect();
    secrets.verify(&[timestamp.as_bytes(), b".", webhook.body()], &signatures)?;
    is_recent(timestamp, webhook.received_at())?;
    present(ids::stripe(member(webhook.body(), "id").unwrap_or_default()))
}
