//! Webhooks of PayPal.

use std::fmt;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use webpki::ring::RSA_PKCS1_2048_8192_SHA256;
use webpki::{EndEntityCert, RawPublicKeyEntity};

use crate::error::Error;
use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{base64, field, member, present};
use crate::receiver::webhooks::signature::TOLERANCE;
use crate::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};

const ALGORITHM: &str = "paypal-auth-algo";
const SIGNATURE: &str = "paypal-transmission-sig";
const TRANSMISSION: &str = "paypal-transmission-id";
const TIME: &str = "paypal-transmission-time";

/// The longest time for which PayPal sends a webhook again, with a margin.
const MAX_AGE: Duration = Duration::from_secs(3 * 24 * 60 * 60 + 5 * 60);

/// PayPal: `PayPal-Transmission-Sig`, an RSA signature with SHA-256.
///
/// * **Signed**: `PayPal-Transmission-Id`, `PayPal-Transmission-Time`, the id of the webhook at
///   PayPal, and the **CRC-32** of the body. CRC-32 finds accidents, not attacks: someone who has
///   recorded one webhook can write another body with the same CRC-32, with another event and
///   another id, under the recorded signature. If that matters, have the handler fetch the event or
///   the payment from PayPal's API and act on that.
/// * **Id**: the event's `id` in the body. PayPal repeats it when it sends an event again.
/// * **Replays**: the time must be at most three days in the past and at most five minutes in the
///   future. PayPal sends an event again for three days, and does not say that a repeated event
///   gets a new time.
///
/// # The certificate
///
/// PayPal names the certificate in `PayPal-Cert-Url`. This crate does not read that field and has
/// no network access, because the field is not signed. A server that fetches any URL from that
/// field can be made to send requests into its own network, and to trust the forger's certificate.
/// Fetch the certificate ahead of time, and again on a schedule:
///
/// * only by `https`, only from the hosts `api.paypal.com` (or `api.sandbox.paypal.com` for the
///   sandbox), and only from paths below `/v1/notifications/certs/`; follow no redirect;
/// * validate its chain, its name and its dates as your TLS client does. The check of this crate
///   compares signatures with the key, and does not look at names or dates.
///
/// Then build the provider with it. Pass the old and the new certificate while PayPal replaces one.
#[derive(Clone)]
pub struct PayPalWebhooks {
    webhook_id: String,
    keys: Vec<SubjectPublicKeyInfoDer<'static>>,
}

impl PayPalWebhooks {
    /// Verifies webhooks of this id, as PayPal's dashboard shows it, with these certificates
    /// (`BEGIN CERTIFICATE`) or public keys (`BEGIN PUBLIC KEY`) in PEM. If a PEM holds a chain,
    /// only its first certificate counts.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the id is empty, if there is no
    /// certificate or key, or if one cannot be read or is not RSA with 2048 bits or more.
    pub fn new<S: AsRef<[u8]>>(
        webhook_id: impl Into<String>,
        certificates: impl IntoIterator<Item = S>,
    ) -> Result<Self, Error> {
        const NO_WEBHOOK: Error = Error::configuration(
            "the id of the webhook at PayPal, or its certificate, is missing; copy the id from the dashboard",
        );
        let webhook_id = webhook_id.into();
        let keys: Vec<_> = certificates
            .into_iter()
            .map(|pem| public_key(pem.as_ref()))
            .collect::<Result<_, _>>()?;
        if webhook_id.is_empty() || keys.is_empty() {
            return Err(NO_WEBHOOK);
        }
        Ok(Self { webhook_id, keys })
    }
}

fn public_key(pem: &[u8]) -> Result<SubjectPublicKeyInfoDer<'static>, Error> {
    const NO_KEY: Error = Error::configuration(
        "a certificate or public key for PayPal webhooks is not PEM, or not RSA with at least 2048 bits; pass the PEM file that \
         PayPal provides",
    );
    let key = match CertificateDer::from_pem_slice(pem) {
        Ok(certificate) => {
            let certificate = EndEntityCert::try_from(&certificate).map_err(|_| NO_KEY)?;
            certificate.subject_public_key_info()
        }
        Err(_) => SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|_| NO_KEY)?,
    };
    // Verify an empty signature. The key is usable if the error is that the signature does not
    // match.
    let entity = RawPublicKeyEntity::try_from(&key).map_err(|_| NO_KEY)?;
    match entity.verify_signature(RSA_PKCS1_2048_8192_SHA256, b"", b"") {
        Err(webpki::Error::InvalidSignatureForPublicKey) => Ok(key),
        _ => Err(NO_KEY),
    }
}

/// The text that the signature covers.
pub(in crate::receiver) fn signed_text(transmission: &str, time: &str, webhook_id: &str, body: &[u8]) -> String {
    let crc32 = crc32fast::hash(body);
    format!("{transmission}|{time}|{webhook_id}|{crc32}")
}

impl VerifyWebhook for PayPalWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(SIGNATURE)
    }

    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        let headers = webhook.headers();
        let signature = base64(field(headers, SIGNATURE, InvalidWebhook::Signature)?);
        let signature = signature.ok_or(InvalidWebhook::Signature)?;
        if field(headers, ALGORITHM, InvalidWebhook::Secret)? != "SHA256withRSA" {
            return Err(InvalidWebhook::Secret);
        }
        let transmission = field(headers, TRANSMISSION, InvalidWebhook::Id)?;
        // The time has no `|` either (see `is_current`), so text cannot be shifted between the
        // parts.
        if transmission.contains('|') {
            return Err(InvalidWebhook::Id);
        }
        let time = field(headers, TIME, InvalidWebhook::Timestamp)?;
        let signed = signed_text(transmission, time, &self.webhook_id, webhook.body());
        let fits = |key: &SubjectPublicKeyInfoDer<'_>| {
            RawPublicKeyEntity::try_from(key).is_ok_and(|key| {
                key.verify_signature(RSA_PKCS1_2048_8192_SHA256, signed.as_bytes(), &signature)
                    .is_ok()
            })
        };
        if !self.keys.iter().any(fits) {
            return Err(InvalidWebhook::Signature);
        }
        is_current(time, webhook.received_at())?;
        present(ids::paypal(member(webhook.body(), "id").unwrap_or_default()))
    }
}

/// Checks that a time in UTC (RFC 3339) is neither too old nor in the future.
fn is_current(time: &str, now: SystemTime) -> Result<(), InvalidWebhook> {
    let sent = parse_time(time).ok_or(InvalidWebhook::Timestamp)?;
    let is_current = match now.duration_since(sent) {
        Ok(age) => age <= MAX_AGE,
        Err(ahead) => ahead.duration() <= TOLERANCE,
    };
    if is_current {
        Ok(())
    } else {
        Err(InvalidWebhook::Timestamp)
    }
}

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// Parses `2016-10-05T14:57:40Z`, with or without a fraction, which is dropped. `httpdate` knows
/// the calendar, so the time is rewritten for it. `httpdate` also checks the day of the week, so
/// try all seven.
fn parse_time(time: &str) -> Option<SystemTime> {
    let (date, time) = time.strip_suffix('Z')?.split_once('T')?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    if fraction.is_empty() || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut parts = date.split('-');
    let (year, month, day) = (parts.next()?, parts.next()?, parts.next()?);
    let month = MONTHS.get(month.parse::<usize>().ok()?.checked_sub(1)?)?;
    if parts.next().is_some() {
        return None;
    }
    ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
        .iter()
        .find_map(|weekday| httpdate::parse_http_date(&format!("{weekday}, {day} {month} {year} {time} GMT")).ok())
}

/// Formats a time as PayPal does.
#[cfg(feature = "testing")]
pub(in crate::receiver) fn paypal_time(time: SystemTime) -> String {
    let written = httpdate::fmt_http_date(time);
    let parts: Vec<_> = written.split(' ').collect();
    let month = MONTHS.iter().position(|name| *name == parts[2]).unwrap_or_default() + 1;
    format!("{}-{month:02}-{}T{}Z", parts[3], parts[1], parts[4])
}

impl fmt::Debug for PayPalWebhooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PayPalWebhooks").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn times_are_read_strictly() {
        let at = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(parse_time("2016-10-05T14:57:40Z"), at(1_475_679_460));
        assert_eq!(parse_time("2016-10-05T14:57:40.123Z"), at(1_475_679_460));
        for nonsense in [
            "",
            "Z",
            "2016-10-05",
            "2016-10-05T14:57:40",
            "2016-10-05T14:57:40+00:00",
            "2016-10-05T14:57:40.Z",
            "2016-10-05T14:57:40.1xZ",
            "2016-00-05T14:57:40Z",
            "2016-13-05T14:57:40Z",
            "2016-10-32T14:57:40Z",
            "2015-02-29T14:57:40Z",
            "2016-10-05-01T14:57:40Z",
            "2016-10-05T24:57:40Z",
            "16-10-05T14:57:40Z",
        ] {
            assert_eq!(parse_time(nonsense), None, "{nonsense}");
        }
    }
}
