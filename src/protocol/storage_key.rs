//! Storage keys: the names of records, hashed from the client's key, its scope and the layer's
//! settings.

use std::fmt;
use std::hash::{BuildHasher, Hasher};

use sha2::{Digest, Sha256};

use super::key::IdempotencyKey;
use super::scratch::Scratch;
use crate::error::Error;
use crate::sync::RandomState;

/// The owner of a set of keys, such as a tenant, an account or a user.
///
/// The same key in two scopes is two keys. Build a scope from what *authenticated* the request,
/// never from what the client may choose freely. The `Debug` form hides the value.
///
/// ```
/// use tower_idempotency::Scope;
///
/// assert_ne!(Scope::of(["a", "bc"]), Scope::of(["ab", "c"]));
/// assert_eq!(Scope::from("tenant-7"), Scope::of(["tenant-7"]));
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Scope(Vec<u8>);

impl Scope {
    /// Returns a scope of several parts, in order. Each part is stored with its length, so that
    /// different lists of parts give different scopes.
    #[must_use]
    pub fn of<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> Self {
        let mut bytes = Vec::with_capacity(48);
        for part in parts {
            let part = part.as_ref();
            bytes.extend_from_slice(&prefix(part));
            bytes.extend_from_slice(part);
        }
        Self(bytes)
    }

    /// Returns the parts with their lengths.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl<P: AsRef<[u8]> + ?Sized> From<&P> for Scope {
    fn from(part: &P) -> Self {
        Self::of([part])
    }
}

impl From<String> for Scope {
    fn from(part: String) -> Self {
        Self::of([part])
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scope(..)")
    }
}

/// A secret that keys the hash of storage keys, so that someone who can read the store cannot
/// verify guessed keys.
#[derive(Clone)]
pub(crate) struct Secret([u8; blake3::KEY_LEN]);

impl Secret {
    pub(crate) fn new(material: &[u8]) -> Self {
        Self(blake3::derive_key("tower-idempotency 2026 storage key", material))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The namespace and the secret of a layer's storage keys.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeySpace {
    pub(crate) namespace: String,
    pub(crate) secret: Option<Secret>,
}

impl KeySpace {
    /// Returns the storage key of a request. It is a hash over the length-prefixed namespace, scope
    /// and key: keyed BLAKE3 if there is a secret, otherwise SHA-256.
    pub(crate) fn storage_key(&self, scope: Option<&Scope>, key: &IdempotencyKey) -> StorageKey {
        let mut bytes = Scratch::new();
        let mut push = |part: &[u8]| {
            bytes.push(&prefix(part));
            bytes.push(part);
        };
        push(self.namespace.as_bytes());
        // Distinguish "no scope" from "a scope without parts".
        push(scope.map_or(&[], |_| &[1]));
        push(scope.map_or(&[], |scope| &scope.0));
        push(key.as_str().as_bytes());
        self.hash(bytes.as_slice())
    }

    /// Returns the storage key of a call to another system. It has one part more than the storage
    /// key of a request, so that the two never collide. `steps` has the position of a step in its
    /// job, after the positions of the steps around that job.
    pub(crate) fn call_key(&self, scope: Option<&Scope>, key: &str, steps: &[u32]) -> StorageKey {
        let scope_bytes = scope.map_or(&[][..], Scope::as_bytes);
        let steps: Vec<u8> = steps.iter().flat_map(|step| step.to_be_bytes()).collect();
        let parts = [
            self.namespace.as_bytes(),
            scope.map_or(&[], |_| &[1]),
            scope_bytes,
            key.as_bytes(),
            &steps,
        ];
        self.hash(Scope::of(parts).as_bytes())
    }

    pub(crate) fn set_secret(&mut self, secret: &[u8]) -> Result<(), Error> {
        const SHORT: Error =
            Error::configuration("the secret for the keys in a store is shorter than 16 bytes; use 32 random bytes");
        if secret.len() < 16 {
            return Err(SHORT);
        }
        self.secret = Some(Secret::new(secret));
        Ok(())
    }

    /// Returns the storage key of a message. It has two parts more than the storage key of a
    /// request, so that it collides neither with that nor with the key of a call.
    pub(crate) fn message_key(&self, consumer: &str, id: &Scope) -> StorageKey {
        let parts = [
            self.namespace.as_bytes(),
            consumer.as_bytes(),
            id.as_bytes(),
            &[],
            &[],
            &[],
        ];
        self.hash(Scope::of(parts).as_bytes())
    }

    fn hash(&self, bytes: &[u8]) -> StorageKey {
        StorageKey(match &self.secret {
            Some(secret) => *blake3::keyed_hash(&secret.0, bytes).as_bytes(),
            None => Sha256::digest(bytes).into(),
        })
    }
}

fn prefix(part: &[u8]) -> [u8; 4] {
    u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// The name of a record in a store: a hash of 32 bytes over namespace, scope and key. The raw key
/// is stored nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorageKey([u8; 32]);

impl StorageKey {
    /// Returns a storage key of the given bytes. They must be a hash, because stores partition and
    /// compare keys by them.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for StorageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StorageKey(..)")
    }
}

/// A hasher of storage keys for maps in this process. Storage keys are hashes already, so it is
/// cheap.
///
/// It folds two words of the key with a random seed per map. Without the seed, clients could choose
/// many keys that fall into one bucket.
#[derive(Clone, Debug)]
pub(crate) struct KeyHasher {
    seed: (u64, u64),
    state: u64,
}

impl KeyHasher {
    pub(crate) fn random() -> Self {
        let random = RandomState::default();
        Self {
            seed: (random.hash_one(0_u8), random.hash_one(1_u8)),
            state: 0,
        }
    }
}

impl BuildHasher for KeyHasher {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        self.clone()
    }
}

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        let word = |at: usize| {
            let mut word = [0; 8];
            if let Some(part) = bytes.get(at..at + 8) {
                word.copy_from_slice(part);
            }
            u64::from_le_bytes(word)
        };
        let product = u128::from(word(0) ^ self.seed.0) * u128::from(word(8) ^ self.seed.1);
        let folded = (product ^ (product >> 64)) & u128::from(u64::MAX);
        self.state = u64::try_from(folded).unwrap_or(0);
    }

    // Ignore the length of the hashed array, because it is always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::key::KeyParser;
    use super::*;

    fn key(text: &str) -> IdempotencyKey {
        KeyParser::default().parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn namespace_scope_and_key_do_not_run_together() {
        let space = |namespace: &str| KeySpace {
            namespace: namespace.into(),
            secret: None,
        };
        let names = [
            space("").storage_key(None, &key("abc")),
            space("a").storage_key(None, &key("bc")),
            space("").storage_key(Some(&Scope::from("a")), &key("bc")),
            space("").storage_key(Some(&Scope::from("ab")), &key("c")),
            space("").storage_key(Some(&Scope::of(["a", "b"])), &key("c")),
            space("").storage_key(Some(&Scope::of::<&str>([])), &key("abc")),
            space("").storage_key(Some(&Scope::from("")), &key("abc")),
        ];
        for (at, one) in names.iter().enumerate() {
            assert!(names[at + 1..].iter().all(|other| one != other), "{at}");
        }
    }

    #[test]
    fn a_secret_changes_the_storage_key_and_the_same_secret_gives_the_same() {
        let with = |secret: Option<&[u8]>| KeySpace {
            namespace: String::new(),
            secret: secret.map(Secret::new),
        };
        let name = |secret| with(secret).storage_key(None, &key("k"));
        assert_eq!(name(Some(b"one")), name(Some(b"one")));
        assert_ne!(name(Some(b"one")), name(Some(b"two")));
        assert_ne!(name(Some(b"one")), name(None));
    }

    /// Stored records outlive a deployment, so a change of any of these bytes loses every key.
    #[test]
    fn the_storage_keys_of_this_version_stay() {
        let mut space = KeySpace {
            namespace: "n".into(),
            secret: None,
        };
        let scope = Scope::of(["s"]);
        assert_eq!(scope.as_bytes(), b"\0\0\0\x01s");
        let hashes = |space: &KeySpace| {
            [
                space.storage_key(Some(&scope), &key("key")),
                space.call_key(Some(&scope), "key", &[7]),
                space.call_key(None, "key", &[]),
                space.message_key("c", &scope),
            ]
        };
        let inputs: [&[u8]; 4] = [
            b"\0\0\0\x01n\0\0\0\x01\x01\0\0\0\x05\0\0\0\x01s\0\0\0\x03key",
            b"\0\0\0\x01n\0\0\0\x01\x01\0\0\0\x05\0\0\0\x01s\0\0\0\x03key\0\0\0\x04\0\0\0\x07",
            b"\0\0\0\x01n\0\0\0\0\0\0\0\0\0\0\0\x03key\0\0\0\0",
            b"\0\0\0\x01n\0\0\0\x01c\0\0\0\x05\0\0\0\x01s\0\0\0\0\0\0\0\0\0\0\0\0",
        ];
        for (hash, input) in hashes(&space).iter().zip(inputs) {
            assert_eq!(hash.as_bytes()[..], Sha256::digest(input)[..]);
        }
        space.set_secret(&[7; 16]).unwrap();
        let secret = blake3::derive_key("tower-idempotency 2026 storage key", &[7; 16]);
        for (hash, input) in hashes(&space).iter().zip(inputs) {
            assert_eq!(hash.as_bytes(), blake3::keyed_hash(&secret, input).as_bytes());
        }
    }

    #[test]
    fn a_secret_has_16_bytes_or_more() {
        for len in 0..=64 {
            let mut space = KeySpace::default();
            assert_eq!(space.set_secret(&vec![7; len]).is_ok(), len >= 16, "{len}");
            assert_eq!(space.secret.is_some(), len >= 16, "{len}");
        }
    }

    proptest! {
        /// The two halves of the product of the first two words, each under its seed.
        #[test]
        fn the_hash_for_maps_folds_two_seeded_words(key: [u8; 32], seed: (u64, u64)) {
            let word = |at: usize| u64::from_le_bytes(key[at..at + 8].try_into().unwrap());
            let (one, other) = (word(0) ^ seed.0, word(8) ^ seed.1);
            let high = u64::try_from((u128::from(one) * u128::from(other)) >> 64).unwrap();
            let hash = KeyHasher { seed, state: 0 }.hash_one(StorageKey::from_bytes(key));
            prop_assert_eq!(hash, one.wrapping_mul(other) ^ high);
        }
    }

    #[test]
    fn two_maps_hash_a_key_differently() {
        let hash = || KeyHasher::random().hash_one(StorageKey::from_bytes([7; 32]));
        assert_ne!(hash(), hash());
    }

    #[test]
    fn debug_forms_hide_what_they_hold() {
        assert_eq!(format!("{:?}", Scope::from("tenant")), "Scope(..)");
        assert_eq!(format!("{:?}", Secret::new(b"s")), "Secret(..)");
        assert_eq!(format!("{:?}", StorageKey::from_bytes([7; 32])), "StorageKey(..)");
    }
}
