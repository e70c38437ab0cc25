//! The attempt that a job can see, and the result of a check of an earlier attempt.

use std::fmt;
use std::sync::Arc;

use uuid::Builder;

use super::held_lease::HeldLease;
use crate::protocol::{Fence, Fingerprint, Grant, StorageKey};

/// The attempt under which a call is made.
#[derive(Clone)]
pub struct Attempt {
    key: StorageKey,
    fingerprint: Fingerprint,
    grant: Grant,
    lease: Arc<HeldLease>,
}

impl Attempt {
    pub(crate) fn new(key: StorageKey, fingerprint: Fingerprint, lease: HeldLease) -> Self {
        Self {
            key,
            fingerprint,
            grant: *lease.grant(),
            lease: Arc::new(lease),
        }
    }

    /// Returns the number of this attempt under its key, from 1. An attempt that failed without
    /// effect and released its key does not count. Once an attempt was lost, all later attempts
    /// count.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.grant.attempt
    }

    /// Returns the fence, which grows with every attempt under a key. Pass it to a third party that
    /// can refuse an older fence. Such a third party refuses the request of a lost attempt that
    /// arrives late.
    #[must_use]
    pub const fn fence(&self) -> Fence {
        self.grant.owner.fence
    }

    /// Returns a key or an id for the third party: a UUID (version 8, RFC 9562 section 5.8). It is
    /// the same in every attempt under this key and input, differs for each `name`, and does not
    /// reveal the key.
    ///
    /// A third party that takes the id as an idempotency key, or as the id of the object to create,
    /// has one effect, however often the call runs. Set a secret if keys can be guessed and the
    /// third party shows an object to anyone who knows its id.
    #[must_use]
    pub fn id(&self, name: &str) -> String {
        self.derive(&self.fingerprint, name)
    }

    /// Returns an id like [`id`](Self::id) that does not depend on the input, for calls that the
    /// key alone identifies.
    pub(crate) fn id_of_key(&self, name: &str) -> String {
        self.derive(&Fingerprint::NONE, name)
    }

    fn derive(&self, input: &Fingerprint, name: &str) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("tower-idempotency 2026 id for a third party");
        hasher.update(self.key.as_bytes());
        hasher.update(input.digest());
        hasher.update(name.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Builder::from_custom_bytes(bytes).into_uuid().to_string()
    }

    /// Returns whether this attempt still owns its key, as far as the last renewal knows. If
    /// another attempt has taken the key over, the layer discards the result of this attempt.
    #[must_use]
    pub fn is_held(&self) -> bool {
        !self.lease.is_superseded()
    }

    pub(crate) fn lease(&self) -> &HeldLease {
        &self.lease
    }

    pub(crate) const fn key(&self) -> &StorageKey {
        &self.key
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt")
            .field("number", &self.number())
            .field("fence", &self.fence())
            .finish_non_exhaustive()
    }
}

/// The result of a check of a lost attempt. Its `Debug` form hides the value.
#[derive(Clone, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no fourth")]
pub enum Recovered<T> {
    /// The attempt took effect. The layer records this value and returns it. On a server the value
    /// is the response, and if it has the mark [`StoreOutcomeOnly`](crate::StoreOutcomeOnly) or
    /// [`DoNotStore`](crate::DoNotStore), the layer stores only that the request is done.
    Happened(T),
    /// The attempt had no effect and never will have one, so the next attempt runs.
    NotHappened,
    /// The check could not decide, so the next attempt does not run. The next request runs the
    /// check again, until the attempts are used up.
    Unknown,
}

impl<T> fmt::Debug for Recovered<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Happened(_) => "Happened(..)",
            Self::NotHappened => "NotHappened",
            Self::Unknown => "Unknown",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_debug_form_hides_the_value_and_the_key() {
        let shown = [
            Recovered::Happened("secret"),
            Recovered::NotHappened,
            Recovered::Unknown,
        ];
        let shown = shown.map(|found| format!("{found:?}"));
        assert_eq!(shown, ["Happened(..)", "NotHappened", "Unknown"]);
        let lease = HeldLease::of_first_attempt(Duration::from_secs(1));
        let attempt = Attempt::new(StorageKey::from_bytes([7; 32]), Fingerprint::NONE, lease);
        assert_eq!(format!("{attempt:?}"), "Attempt { number: 1, fence: Fence(1), .. }");
    }
}
