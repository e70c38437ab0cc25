//! Keys for calls to a third party, derived from a key and its request.

use crate::protocol::{Fingerprint, StorageKey};

/// Derives keys from the key of a request and from the request itself. Both are the same in every
/// attempt, so the derived keys are the same too.
#[derive(Clone, Copy)]
pub(super) struct DerivedKeys {
    pub(super) storage_key: StorageKey,
    pub(super) fingerprint: Fingerprint,
}

impl DerivedKeys {
    /// Returns a key of 64 hexadecimal digits.
    pub(super) fn key(&self, step: &str) -> String {
        self.hash(step).to_hex().to_string()
    }

    /// Returns the beginning of the key as a UUID.
    pub(super) fn id(&self, step: &str) -> String {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.hash(step).as_bytes()[..16]);
        uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
    }

    fn hash(&self, step: &str) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key("tower-idempotency 2026 key for a call further on");
        hasher.update(self.storage_key.as_bytes());
        hasher.update(self.fingerprint.digest());
        hasher.update(step.as_bytes());
        hasher.finalize()
    }
}
