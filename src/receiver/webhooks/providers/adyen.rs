//! Adyen: standard notifications, and webhooks for platforms.

use data_encoding::HEXLOWER_PERMISSIVE;
use http::HeaderMap;
use serde_json::Value;

use super::unique_json;
use crate::error::Error;
use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{base64, field, present};
use crate::receiver::webhooks::signature::Secrets;
use crate::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};

const PLATFORM_SIGNATURE: &str = "hmacsignature";

/// The longest standard notification, in bytes. It is parsed before its signature is checked, and a
/// parsed body takes many times its length. A forged notification must therefore not be as long as
/// other bodies. Adyen's notifications have a few KiB.
const MAX_BODY: usize = 256 << 10;

/// Adyen's standard webhooks, for payments: a `NotificationRequestItem` in JSON, with its signature
/// in `additionalData.hmacSignature`.
///
/// * **Signed**: eight members of the item, and **nothing else**: `pspReference`,
///   `originalReference`, `merchantAccountCode`, `merchantReference`, `amount.value`,
///   `amount.currency`, `eventCode` and `success`. Anyone who has recorded a webhook can change
///   everything else, such as `live`, `reason`, `eventDate` and the rest of `additionalData`. Do
///   not base a decision on it.
/// * **Id**: `merchantAccountCode`, `eventCode`, `pspReference` and `success` together; all four
///   must be present. Adyen repeats the first three when it sends a notification again, and a
///   notification whose outcome has changed is a different one. The `pspReference` of
///   `REPORT_AVAILABLE` is the file name of the report. If a report is generated again under the
///   same name for the same account, its notification is a **duplicate** while the record is
///   retained.
/// * **Replays**: there is no signed timestamp. A recorded webhook is a duplicate for as long as
///   its record is retained, 7 days by default, and runs again after that.
///
/// A body must have at most 256 KiB and exactly one item; any other body is rejected. In JSON,
/// Adyen sends one item per body. A body of several items would have no stable id, because Adyen
/// may group the items differently when it sends them again.
///
/// The signed members are joined with `:` and without escapes, as Adyen's libraries do. Only
/// `merchantReference`, which you choose, may have a `:`. A webhook with a `:` in another signed
/// member is rejected, because a forger could shift text between the members. A body in which an
/// object has a member twice is rejected, because your parser could read the other one.
#[derive(Clone, Debug)]
pub struct AdyenWebhooks(Secrets);

/// Adyen's webhooks for platforms, banking, terminals and management: `HmacSignature` over the
/// body.
///
/// * **Signed**: the body.
/// * **Id**: a digest of the body, because these webhooks have no common id. If Adyen sends a
///   webhook again with another body, it runs again.
/// * **Replays**: there is no timestamp that the check could compare. A recorded webhook is a
///   duplicate for as long as its record is retained, 7 days by default, and runs again after that.
#[derive(Clone, Debug)]
pub struct AdyenPlatformWebhooks(Secrets);

impl AdyenWebhooks {
    /// Verifies with these HMAC keys in hexadecimal, as Adyen's Customer Area shows them.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if there is no key, or if one is empty or
    /// not hexadecimal.
    pub fn new<S: AsRef<str>>(hmac_keys: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        Ok(Self(secrets(hmac_keys)?))
    }
}

impl AdyenPlatformWebhooks {
    /// Verifies with these HMAC keys in hexadecimal, as Adyen's Customer Area shows them.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if there is no key, or if one is empty or
    /// not hexadecimal.
    pub fn new<S: AsRef<str>>(hmac_keys: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        Ok(Self(secrets(hmac_keys)?))
    }
}

fn secrets<S: AsRef<str>>(hmac_keys: impl IntoIterator<Item = S>) -> Result<Secrets, Error> {
    let keys: Vec<_> = hmac_keys.into_iter().map(decoded_key).collect::<Result<_, _>>()?;
    Secrets::new(keys)
}

/// Decodes a key.
pub(in crate::receiver) fn decoded_key<S: AsRef<str>>(hmac_key: S) -> Result<Vec<u8>, Error> {
    const NO_HEX: Error = Error::configuration(
        "an HMAC key for webhooks of Adyen is not hexadecimal; take it from the Customer Area, where it has 64 digits",
    );
    let key = hmac_key.as_ref().trim();
    HEXLOWER_PERMISSIVE.decode(key.as_bytes()).map_err(|_| NO_HEX)
}

impl VerifyWebhook for AdyenWebhooks {
    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        if webhook.body().len() > MAX_BODY {
            return Err(InvalidWebhook::Body);
        }
        let body = unique_json::parse(webhook.body()).ok_or(InvalidWebhook::Body)?;
        let item = Item::only_of(&body).ok_or(InvalidWebhook::Body)?;
        let signature = item.0["additionalData"]["hmacSignature"].as_str();
        let signature = signature.and_then(base64).ok_or(InvalidWebhook::Signature)?;
        let signed = item.signed_text().ok_or(InvalidWebhook::Body)?;
        self.0.verify(&[signed.as_bytes()], &[signature])?;
        let text = |name| item.text(name).unwrap_or_default();
        present(ids::adyen(
            text("merchantAccountCode"),
            text("eventCode"),
            text("pspReference"),
            text("success"),
        ))
    }
}

/// A `NotificationRequestItem`.
pub(in crate::receiver) struct Item<'b>(&'b Value);

impl<'b> Item<'b> {
    /// Returns the item of a body that has exactly one.
    pub(in crate::receiver) fn only_of(body: &'b Value) -> Option<Self> {
        match body["notificationItems"].as_array()?.as_slice() {
            [item] => {
                let item = &item["NotificationRequestItem"];
                item.is_object().then_some(Self(item))
            }
            _ => None,
        }
    }

    /// Returns a member that holds a string. An absent member is the empty string.
    fn text(&self, name: &str) -> Option<&'b str> {
        match &self.0[name] {
            Value::Null => Some(""),
            value => value.as_str(),
        }
    }

    /// Returns the text that the signature covers. Returns `None` if a part has the wrong type, or
    /// if text could be shifted between the parts.
    pub(in crate::receiver) fn signed_text(&self) -> Option<String> {
        let amount = &self.0["amount"];
        let value = match &amount["value"] {
            Value::Null => String::new(),
            value => value.as_i64()?.to_string(),
        };
        let currency = match &amount["currency"] {
            Value::Null => "",
            currency => currency.as_str()?,
        };
        let parts = [
            self.text("pspReference")?,
            self.text("originalReference")?,
            self.text("merchantAccountCode")?,
            self.text("merchantReference")?,
            &value,
            currency,
            self.text("eventCode")?,
            self.text("success")?,
        ];
        let may_have_a_colon = 3;
        let shifts = |(at, part): (usize, &&str)| at != may_have_a_colon && part.contains(':');
        (!parts.iter().enumerate().any(shifts)).then(|| parts.join(":"))
    }
}

/// Puts a signature into the only item of a body.
#[cfg(feature = "testing")]
pub(in crate::receiver) fn sign_item(body: &mut Value, signature: String) {
    body["notificationItems"][0]["NotificationRequestItem"]["additionalData"]["hmacSignature"] = signature.into();
}

impl VerifyWebhook for AdyenPlatformWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(PLATFORM_SIGNATURE)
    }

    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        let signature = base64(field(webhook.headers(), PLATFORM_SIGNATURE, InvalidWebhook::Signature)?);
        self.0
            .verify(&[webhook.body()], &[signature.ok_or(InvalidWebhook::Signature)?])?;
        Ok(MessageId::of([
            b"adyen-platform".as_slice(),
            blake3::hash(webhook.body()).as_bytes(),
        ]))
    }
}
