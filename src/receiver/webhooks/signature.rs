//! HMAC-SHA-256 under one of several secrets, and how far a timestamp may be away.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::InvalidWebhook;
use crate::error::{Error, ErrorKind};

/// The secrets that are valid at the time: more than one while they are changed.
#[derive(Clone)]
pub(super) struct Secrets(Vec<Hmac<Sha256>>);

impl Secrets {
    pub(super) fn new<S: AsRef<[u8]>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        const NONE: Error = Error::new(
            ErrorKind::Configuration,
            "no secret is given, or an empty one, so that no webhook could be verified; take it from the provider's settings",
        );
        let macs = secrets.into_iter().map(|secret| {
            let secret = secret.as_ref();
            let mac = Hmac::new_from_slice(secret).ok();
            mac.filter(|_| !secret.is_empty()).ok_or(NONE)
        });
        let macs: Vec<_> = macs.collect::<Result<_, _>>()?;
        if macs.is_empty() {
            return Err(NONE);
        }
        Ok(Self(macs))
    }

    /// Whether one of the signatures is that of the parts, run together, under one of the secrets. Compares in constant time.
    pub(super) fn verify(&self, parts: &[&[u8]], signatures: &[Vec<u8>]) -> Result<(), InvalidWebhook> {
        let fits = |mac: &Hmac<Sha256>| {
            let mut mac = mac.clone();
            parts.iter().for_each(|part| mac.update(part));
            signatures
                .iter()
                .any(|signature| mac.clone().verify_slice(signature).is_ok())
        };
        if self.0.iter().any(fits) {
            Ok(())
        } else {
            Err(InvalidWebhook::Signature)
        }
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(..)")
    }
}

/// Whether a timestamp, in seconds since the Unix epoch, is at most five minutes away, either way.
pub(super) fn is_recent(seconds: &str, now: SystemTime) -> Result<(), InvalidWebhook> {
    const TOLERANCE: Duration = Duration::from_secs(5 * 60);
    let digits = !seconds.is_empty() && seconds.bytes().all(|byte| byte.is_ascii_digit());
    let seconds: u64 = seconds
        .parse()
        .ok()
        .filter(|_| digits)
        .ok_or(InvalidWebhook::Timestamp)?;
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let away = now.abs_diff(Duration::from_secs(seconds));
    if away > TOLERANCE {
        return Err(InvalidWebhook::Timestamp);
    }
    Ok(())
}
