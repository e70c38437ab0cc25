//! Webhooks of Standard Webhooks and Svix.

use data_encoding::BASE64;
use http::HeaderMap;

use super::ed25519::PublicKey;
use crate::error::Error;
use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{base64, field, present};
use crate::receiver::webhooks::signature::{MAX_SIGNATURES, NO_SECRET, Secrets, is_recent};
use crate::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};

/// The largest number of Ed25519 signatures. Each check hashes the whole body, under each public
/// key, before anything is verified.
const MAX_ASYMMETRIC: usize = 4;

/// The names of the three header fields.
struct HeaderNames {
    id: &'static str,
    timestamp: &'static str,
    signature: &'static str,
}

const STANDARD: HeaderNames = HeaderNames {
    id: "webhook-id",
    timestamp: "webhook-timestamp",
    signature: "webhook-signature",
};

const SVIX: HeaderNames = HeaderNames {
    id: "svix-id",
    timestamp: "svix-timestamp",
    signature: "svix-signature",
};

/// Standard Webhooks 1.0, and Svix, which uses other names for the same fields.
///
/// * **Signed**: id, timestamp and body. `webhook-signature` has one or more signatures, `v1`
///   (HMAC) or `v1a` (Ed25519). One that matches is enough. A webhook with more than 16 signatures,
///   or more than 4 of the kind `v1a`, is rejected.
/// * **Id**: `webhook-id`. An id with a `.` is rejected, because the signature covers id, timestamp
///   and body with dots between them, and such an id would make the split ambiguous.
/// * **Replays**: the timestamp must be within five minutes of the clock, and the id is signed.
///
/// The fields are `webhook-id`, `webhook-timestamp` and `webhook-signature`, or `svix-id`,
/// `svix-timestamp` and `svix-signature`. The check reads one set only: the `webhook-` fields if
/// there is a `webhook-signature`, otherwise the `svix-` fields. If fields of both sets are
/// present, each pair must be equal. Otherwise the webhook is rejected, because a handler could
/// read the set that was not verified. The same id under either name is the same webhook.
#[derive(Clone, Debug)]
pub struct StandardWebhooks {
    secrets: Option<Secrets>,
    public_keys: Vec<PublicKey>,
}

impl StandardWebhooks {
    /// Verifies with these secrets and public keys, in base64:
    ///
    /// * a secret shared with the sender, as `whsec_..`, `v1,whsec_..` or bare base64, for
    ///   signatures `v1`;
    /// * a public key of the sender, as `whpk_..` or `v1a,whpk_..`, for signatures `v1a`.
    ///
    /// Write a public key **with its `whpk_`**. Bare base64 counts as a shared secret, and anyone
    /// who knows the public key could sign with it.
    ///
    /// ```
    /// use tower_idempotency::receiver::webhooks::StandardWebhooks;
    ///
    /// # fn main() -> Result<(), tower_idempotency::Error> {
    /// StandardWebhooks::new(["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])?;
    /// StandardWebhooks::new(["whpk_QQB7Qcd0J3JHDLr9N1TMozdIJXxBTVWHSYQXrRmAg94="])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if there is no secret or key, if one is
    /// not base64, if a public key does not have 32 bytes or is of small order, so that anyone
    /// could sign for it, or if a private key (`whsk_..`) is given. Other bytes that are not a
    /// point of the curve are not detected here, but no signature matches them.
    pub fn new<S: AsRef<str>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        const PRIVATE: Error = Error::configuration(
            "a private key (`whsk_..`) is given for Standard Webhooks; it belongs to the sender, so ask for the public key (`whpk_..`)",
        );
        const NO_PUBLIC_KEY: Error = Error::configuration(
            "a public key for Standard Webhooks is not a usable Ed25519 key; pass `whpk_` followed by 32 bytes in base64",
        );
        let (mut shared, mut public_keys) = (Vec::new(), Vec::new());
        for secret in secrets {
            let secret = secret.as_ref().trim();
            if secret.contains("whsk_") {
                return Err(PRIVATE);
            }
            let public = secret.strip_prefix("v1a,").unwrap_or(secret).strip_prefix("whpk_");
            if let Some(public) = public {
                let key = base64(public).and_then(|key| PublicKey::new(&key));
                public_keys.push(key.ok_or(NO_PUBLIC_KEY)?);
            } else {
                shared.push(decoded_secret(secret)?);
            }
        }
        let secrets = match (shared.is_empty(), public_keys.is_empty()) {
            (true, true) => return Err(NO_SECRET),
            (true, false) => None,
            (false, _) => Some(Secrets::new(shared)?),
        };
        Ok(Self { secrets, public_keys })
    }

    /// Checks that one of the signatures matches under one of the secrets and keys.
    fn check(&self, signatures: &str, signed: &[&[u8]; 5]) -> Result<(), InvalidWebhook> {
        if signatures.split(' ').count() > MAX_SIGNATURES {
            return Err(InvalidWebhook::Signature);
        }
        let of_kind = |kind: &'static str| signatures.split(' ').filter_map(move |one| one.strip_prefix(kind));
        if of_kind("v1a,").count() > MAX_ASYMMETRIC {
            return Err(InvalidWebhook::Signature);
        }
        let shared: Vec<_> = of_kind("v1,").filter_map(base64).collect();
        if let Some(secrets) = &self.secrets {
            if secrets.verify(signed, &shared).is_ok() {
                return Ok(());
            }
        }
        let mut asymmetric = of_kind("v1a,").filter_map(base64).peekable();
        if !self.public_keys.is_empty() && asymmetric.peek().is_some() {
            let signed = signed.concat();
            let fits = |signature: Vec<u8>| self.public_keys.iter().any(|key| key.verify(&signed, &signature));
            if asymmetric.any(fits) {
                return Ok(());
            }
        }
        let is_checkable = |kind| match kind {
            "v1" => self.secrets.is_some(),
            "v1a" => !self.public_keys.is_empty(),
            _ => false,
        };
        let mut kinds = signatures
            .split(' ')
            .filter_map(|one| Some(one.split_once(',')?.0))
            .peekable();
        if kinds.peek().is_some() && !kinds.any(is_checkable) {
            return Err(InvalidWebhook::Secret);
        }
        Err(InvalidWebhook::Signature)
    }
}

/// Returns the bytes of a secret, with or without the prefixes `v1,` and `whsec_`.
pub(in crate::receiver) fn decoded_secret(secret: &str) -> Result<Vec<u8>, Error> {
    const NO_BASE64: Error =
        Error::configuration("a secret for Standard Webhooks is not base64; pass `whsec_` followed by base64");
    let secret = secret.strip_prefix("v1,").unwrap_or(secret);
    let encoded = secret.strip_prefix("whsec_").unwrap_or(secret);
    BASE64.decode(encoded.as_bytes()).map_err(|_| NO_BASE64)
}

impl VerifyWebhook for StandardWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(STANDARD.signature) || headers.contains_key(SVIX.signature)
    }

    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        let headers = webhook.headers();
        sets_agree(headers)?;
        let names = match headers.contains_key(STANDARD.signature) {
            true => STANDARD,
            false => SVIX,
        };
        let signatures = field(headers, names.signature, InvalidWebhook::Signature)?;
        let timestamp = field(headers, names.timestamp, InvalidWebhook::Timestamp)?;
        let id = field(headers, names.id, InvalidWebhook::Id)?;
        // In `msg_1.T.T2.5`, nothing marks the end of the id. A timestamp has no dot, because it
        // must be a number.
        if id.contains('.') {
            return Err(InvalidWebhook::Id);
        }
        let signed = [id.as_bytes(), b".", timestamp.as_bytes(), b".", webhook.body()];
        self.check(signatures, &signed)?;
        is_recent(timestamp, webhook.received_at())?;
        present(ids::standard_webhook(id))
    }
}

/// Checks that no field of one set contradicts the same field of the other set.
fn sets_agree(headers: &HeaderMap) -> Result<(), InvalidWebhook> {
    for (standard, svix, reason) in [
        (STANDARD.id, SVIX.id, InvalidWebhook::Id),
        (STANDARD.timestamp, SVIX.timestamp, InvalidWebhook::Timestamp),
        (STANDARD.signature, SVIX.signature, InvalidWebhook::Signature),
    ] {
        if headers.contains_key(standard) && headers.contains_key(svix) {
            let both = (field(headers, standard, reason)?, field(headers, svix, reason)?);
            if both.0 != both.1 {
                return Err(reason);
            }
        }
    }
    Ok(())
}
