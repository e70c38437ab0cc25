//! Verifies HMAC-SHA-256 under one of several secrets, and checks the age of a timestamp.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::InvalidWebhook;
use crate::error::Error;

/// The largest accepted difference between a timestamp and the clock of this machine, in either
/// direction. The providers' own libraries use the same value.
pub(super) const TOLERANCE: Duration = Duration::from_secs(5 * 60);

/// The largest number of signatures that one webhook may carry. Senders use two while they replace
/// a secret. Without a bound, a forged webhook with thousands of signatures would cost as many
/// checks.
pub(super) const MAX_SIGNATURES: usize = 16;

/// The error for an empty list of secrets, and for an empty secret.
pub(super) const NO_SECRET: Error = Error::configuration(
    "a webhook secret is empty or missing, so no webhook could be verified; copy it from the provider's settings",
);

/// The secrets that are valid at present. There is more than one while a secret is being replaced.
#[derive(Clone)]
pub(super) struct Secrets(Vec<Hmac<Sha256>>);

impl Secrets {
    pub(super) fn new<S: AsRef<[u8]>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        let macs = secrets.into_iter().map(|secret| {
            let secret = secret.as_ref();
            let mac = Hmac::new_from_slice(secret).ok();
            mac.filter(|_| !secret.is_empty()).ok_or(NO_SECRET)
        });
        let macs: Vec<_> = macs.collect::<Result<_, _>>()?;
        if macs.is_empty() {
            return Err(NO_SECRET);
        }
        Ok(Self(macs))
    }

    /// Checks that one of the signatures matches the concatenated parts under one of the secrets.
    /// Compares in constant time.
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

/// Checks that a timestamp in seconds since the Unix epoch is within [`TOLERANCE`].
pub(super) fn is_recent(seconds: &str, now: SystemTime) -> Result<(), InvalidWebhook> {
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
