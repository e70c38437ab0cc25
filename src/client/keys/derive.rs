//! Keys that survive a crash, because they are derived from the key of our own caller.

use std::borrow::Cow;
use std::fmt;
use std::time::SystemTime;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::Builder;

use crate::error::Error;
use crate::protocol::Scope;

/// Derives a key for a call to another system from the key that our own caller sent. A retry after
/// a crash therefore gets the same key.
///
/// The key is an HMAC-SHA-256 (RFC 2104) under a secret. It covers the scope, the inbound key and
/// the step, each after its length as four bytes, big-endian. The first 16 bytes become a UUID of
/// version 8 (RFC 9562 section 5.8). A UUID fits the bounds of every provider, and can also serve
/// as an id that the client makes. Never pass on the inbound key itself. The sender of that key
/// would share a name space with all others at the third party, and could get responses there that
/// belong to someone else.
///
/// All processes need the same secret, and so do all versions of a program that may see a retry.
///
/// ```
/// use tower_idempotency::client::{KeyDeriver, KeyOrigin};
///
/// # fn main() -> Result<(), tower_idempotency::Error> {
/// let keys = KeyDeriver::new(b"32 bytes from the secret manager")?;
/// let origin = KeyOrigin::new("order-4711", "charge").with_scope("tenant-7".to_owned());
/// assert_eq!(keys.derive(&origin), keys.derive(&origin.clone()));
/// assert_ne!(keys.derive(&origin), keys.derive(&KeyOrigin::new("order-4711", "charge")));
/// assert_eq!(keys.derive(&origin).len(), 36);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct KeyDeriver(Hmac<Sha256>);

impl KeyDeriver {
    /// Creates a deriver with this secret, which has at least 16 bytes.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the secret is shorter.
    pub fn new(secret: &[u8]) -> Result<Self, Error> {
        const SHORT: Error = Error::configuration(
            "the secret for derived keys is shorter than 16 bytes; use 32 bytes from a cryptographic generator",
        );
        match Hmac::new_from_slice(secret) {
            Ok(mac) if secret.len() >= 16 => Ok(Self(mac)),
            _ => Err(SHORT),
        }
    }

    /// Returns the key of this call, as a UUID in its usual form of 36 characters.
    #[must_use]
    pub fn derive(&self, origin: &KeyOrigin) -> String {
        let mut text = [0; 36];
        self.encode(origin, &mut text).to_owned()
    }

    pub(super) fn encode<'t>(&self, origin: &KeyOrigin, text: &'t mut [u8; 36]) -> &'t str {
        let mut mac = self.0.clone();
        let scope = origin.scope.as_ref().map(Scope::as_bytes);
        for part in [scope.unwrap_or_default(), origin.key.as_bytes(), origin.step.as_bytes()] {
            mac.update(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            mac.update(part);
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&mac.finalize().into_bytes()[..16]);
        Builder::from_custom_bytes(bytes)
            .into_uuid()
            .hyphenated()
            .encode_lower(text)
    }
}

impl fmt::Debug for KeyDeriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyDeriver(..)")
    }
}

/// The origin of a call to another system: the key that our own caller sent, the step of our work,
/// and the scope of the key. As an extension of a request, it is the input of
/// [`KeyGenerator::derived`](super::KeyGenerator::derived). Its `Debug` form hides the key.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyOrigin {
    scope: Option<Scope>,
    key: String,
    step: Cow<'static, str>,
    pub(super) first_sent: Option<SystemTime>,
}

impl KeyOrigin {
    /// Creates the origin of the call `step` for a request, event or job named `key`. Two calls of
    /// one job need two steps.
    #[must_use]
    pub fn new(key: impl Into<String>, step: impl Into<Cow<'static, str>>) -> Self {
        Self {
            scope: None,
            key: key.into(),
            step: step.into(),
            first_sent: None,
        }
    }

    /// Sets the date of the first attempt, which
    /// [`ProviderProfile::repeatable_requests`](super::ProviderProfile::repeatable_requests) sends
    /// to the server. Default: none. Use a time that is the same in every attempt, including those
    /// after a crash, such as the time when the job was enqueued. From this date, the server knows
    /// whether its record of the key may have expired. With a later date, the server could treat a
    /// retry as a new request and perform the effect twice.
    #[must_use]
    pub const fn with_first_sent(mut self, time: SystemTime) -> Self {
        self.first_sent = Some(time);
        self
    }

    /// Sets the scope of the key, such as a tenant. Default: none. Set it if two callers could send
    /// the same key.
    #[must_use]
    pub fn with_scope(mut self, scope: impl Into<Scope>) -> Self {
        self.scope = Some(scope.into());
        self
    }
}

impl fmt::Debug for KeyOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyOrigin")
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}
