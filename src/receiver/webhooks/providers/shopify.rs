//! Webhooks of Shopify.

use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{base64, field, present};
use crate::receiver::webhooks::signature::Secrets;
use crate::receiver::webhooks::{InvalidWebhook, Webhook};

const SIGNATURE: &str = "x-shopify-hmac-sha256";

hmac_provider! {
    /// Shopify: `X-Shopify-Hmac-SHA256`.
    ///
    /// * **Signed**: the body.
    /// * **Id**: shop, topic and event id, all in header fields. They are **not signed**, and Shopify
    ///   signs no id.
    /// * **Replays**: there is no signed timestamp. Someone who has recorded a webhook can send it
    ///   again under another id, and it runs again. A copy under the same id is a duplicate.
    pub struct ShopifyWebhooks;

    /// Verifies with these client secrets of the app.
    pub fn new(secrets);

    signature: SIGNATURE,
    verify: verify,
}

fn verify(secrets: &Secrets, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
    let headers = webhook.headers();
    let signature = base64(field(headers, SIGNATURE, InvalidWebhook::Signature)?);
    secrets.verify(&[webhook.body()], &[signature.ok_or(InvalidWebhook::Signature)?])?;
    for name in ids::SHOPIFY {
        match field(headers, name, InvalidWebhook::Id) {
            // Each of these fields may be absent.
            Ok(_) | Err(InvalidWebhook::MissingHeader) => {}
            Err(reason) => return Err(reason),
        }
    }
    present(ids::shopify(headers))
}
