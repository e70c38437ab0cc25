//! The client's key, the scope it lives in, and the storage key that both become.

use std::borrow::Cow;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::scratch::Scratch;
use super::structured;

/// How the value of the key's header field is read. The default is [`Lenient`](Self::Lenient).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeySyntax {
    /// A structured-field string (`"k"`, as draft-ietf-httpapi-idempotency-key-header-07 section 2.1 asks) or the bare
    /// value (`k`, as Stripe and most providers take it); both name the same key. Parameters are ignored.
    #[default]
    Lenient,
    /// The value as it stands: `"k"` and `k` are two keys.
    Raw,
    /// A structured-field string and nothing else (RFC 9651 section 3.3.3). Parameters are ignored.
    Strict,
}

/// A key as a client chose it, read from its header field.
///
/// 1 to 255 bytes (the upper bound is a setting) of visible ASCII; case matters. Its `Debug` form hides the value.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct IdempotencyKey(Box<str>);

impl IdempotencyKey {
    /// The key itself, without quotes and parameters. Do not log it: it lets its reader ask for the stored answer.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdempotencyKey(..)")
    }
}

/// What is wrong with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InvalidKey {
    /// It has no characters.
    Empty,
    /// A character is not visible ASCII (0x21 to 0x7E).
    NotVisibleAscii,
    /// It is not a structured-field string, or begins like one and does not end like one.
    NotAString,
    /// The validator of the application refused it.
    Refused,
    /// The header field occurs more than once.
    Repeated,
    /// It is longer than the bound.
    TooLong,
}

/// A key that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyError(InvalidKey);

impl KeyError {
    pub(crate) const fn new(reason: InvalidKey) -> Self {
        Self(reason)
    }

    /// What is wrong with the key.
    #[must_use]
    pub const fn reason(&self) -> InvalidKey {
        self.0
    }
}

impl KeyError {
    /// What is wrong with the key and what to send instead; holds nothing of the key.
    #[must_use]
    pub const fn detail(&self) -> &'static str {
        match self.0 {
            InvalidKey::Empty => "The key is empty. Send 1 or more visible ASCII characters.",
            InvalidKey::NotAString => "The key is not a structured-field string. Send it in double quotes.",
            InvalidKey::NotVisibleAscii => {
                "The key has a character that is not visible ASCII. Send a UUID or the like."
            }
            InvalidKey::Refused => "The key does not have the form that this server asks for.",
            InvalidKey::Repeated => "The header field of the key occurs more than once. Send it once.",
            InvalidKey::TooLong => "The key is longer than this server takes. Send a shorter one, such as a UUID.",
        }
    }
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.detail())
    }
}

impl std::error::Error for KeyError {}

type Validator = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Reads keys from header values by the rules that are set.
#[derive(Clone)]
pub(crate) struct KeyParser {
    pub(crate) syntax: KeySyntax,
    pub(crate) max_len: usize,
    pub(crate) validator: Option<Validator>,
}

impl Default for KeyParser {
    fn default() -> Self {
        Self {
            syntax: KeySyntax::default(),
            max_len: 255,
            validator: None,
        }
    }
}

impl KeyParser {
    pub(crate) fn parse(&self, value: &[u8]) -> Result<IdempotencyKey, KeyError> {
        let key = self.unquoted(value).map_err(KeyError::new)?;
        self.check(&key)?;
        Ok(IdempotencyKey(key.into()))
    }

    /// Whether a key that was read, or is to be sent, keeps to the rules.
    pub(crate) fn check(&self, key: &str) -> Result<(), KeyError> {
        let refusal = match key {
            "" => InvalidKey::Empty,
            key if key.len() > self.max_len => InvalidKey::TooLong,
            key if !is_visible_ascii(key) => InvalidKey::NotVisibleAscii,
            key if self.validator.as_ref().is_some_and(|valid| !valid(key)) => InvalidKey::Refused,
            _ => return Ok(()),
        };
        Err(KeyError::new(refusal))
    }

    /// Whether the value of a header field is a key by the rules.
    pub(crate) fn check_value(&self, value: &[u8]) -> Result<(), KeyError> {
        self.check(&self.unquoted(value).map_err(KeyError::new)?)
    }

    fn unquoted<'v>(&self, value: &'v [u8]) -> Result<Cow<'v, str>, InvalidKey> {
        // RFC 9110 section 5.5: white space around a field value is not part of it.
        let value = value.trim_ascii();
        let quoted = value.first() == Some(&b'"');
        match self.syntax {
            KeySyntax::Lenient if quoted => structured::string_item(value).ok_or(InvalidKey::NotAString),
            KeySyntax::Strict if value.is_empty() => Err(InvalidKey::Empty),
            KeySyntax::Strict => structured::string_item(value).ok_or(InvalidKey::NotAString),
            KeySyntax::Lenient | KeySyntax::Raw => std::str::from_utf8(value)
                .map(Cow::Borrowed)
                .map_err(|_| InvalidKey::NotVisibleAscii),
        }
    }
}

/// Looks at every byte and branches once: stopping at the first bad one takes three times as long for a good key.
fn is_visible_ascii(key: &str) -> bool {
    key.bytes().fold(true, |so_far, byte| so_far & byte.is_ascii_graphic())
}

impl fmt::Debug for KeyParser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyParser")
            .field("syntax", &self.syntax)
            .field("max_len", &self.max_len)
            .field("validator", &self.validator.is_some())
            .finish()
    }
}

/// Whose keys these are: a tenant, an account, a user.
///
/// The same key in two scopes is two keys. Build it from what *authenticated* the request, never from what the client may
/// choose freely. Its `Debug` form hides the value.
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
    /// A scope of several parts, in order; each is stored with its length, so that no two lists of parts run together.
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

    /// The parts with their lengths.
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

/// A secret that keys the hash of storage keys, so that who reads the store cannot test guesses of a client's key.
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

/// The namespace and secret under which a layer keeps its keys.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeySpace {
    pub(crate) namespace: String,
    pub(crate) secret: Option<Secret>,
}

impl KeySpace {
    /// SHA-256, or keyed BLAKE3 where there is a secret, over the length-prefixed namespace, scope and key.
    pub(crate) fn storage_key(&self, scope: Option<&Scope>, key: &IdempotencyKey) -> StorageKey {
        let mut bytes = Scratch::new();
        let mut push = |part: &[u8]| {
            bytes.push(&prefix(part));
            bytes.push(part);
        };
        push(self.namespace.as_bytes());
        // "No scope" and "a scope without parts" are two things.
        push(scope.map_or(&[], |_| &[1]));
        push(scope.map_or(&[], |scope| &scope.0));
        push(key.0.as_bytes());
        self.hash(bytes.as_slice())
    }

    /// The storage key of a call to others. It has one part more than that of a request, so that the two never meet.
    pub(crate) fn call_key(&self, scope: Option<&Scope>, key: &str, step: Option<u32>) -> StorageKey {
        let scope_bytes = scope.map_or(&[][..], Scope::as_bytes);
        let step = step.map(u32::to_be_bytes);
        let parts = [
            self.namespace.as_bytes(),
            scope.map_or(&[], |_| &[1]),
            scope_bytes,
            key.as_bytes(),
            step.as_ref().map_or(&[][..], |step| &step[..]),
        ];
        self.hash(Scope::of(parts).as_bytes())
    }

    /// Panics where the secret is too short to be one.
    pub(crate) fn set_secret(&mut self, secret: &[u8]) {
        assert!(
            secret.len() >= 16,
            "the secret is shorter than 16 bytes; take 32 random ones",
        );
        self.secret = Some(Secret::new(secret));
    }

    /// The storage key of a message. It has two parts more than that of a request, so that it meets neither that nor a call's.
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

/// The name of a record in a store: a hash of 32 bytes over namespace, scope and key. The raw key is stored nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorageKey([u8; 32]);

impl StorageKey {
    /// A storage key of the given bytes, which must be a hash: stores spread and compare them as such.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
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

/// Hashes storage keys, which are hashes already, for maps in this process.
///
/// Two words of the key are folded with a random seed per map: clients choose their keys and could otherwise look for many
/// that fall into one bucket.
#[derive(Clone, Debug)]
pub(crate) struct KeyHasher {
    seed: (u64, u64),
    state: u64,
}

impl KeyHasher {
    pub(crate) fn random() -> Self {
        let random = RandomState::new();
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

    // The length of the array that is hashed; always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parser(syntax: KeySyntax) -> KeyParser {
        KeyParser {
            syntax,
            ..KeyParser::default()
        }
    }

    fn key(text: &str) -> IdempotencyKey {
        parser(KeySyntax::Raw).parse(text.as_bytes()).unwrap()
    }

    fn reason(syntax: KeySyntax, value: &[u8]) -> Option<InvalidKey> {
        parser(syntax).parse(value).err().map(|error| error.reason())
    }

    #[test]
    fn quoted_and_bare_are_one_key_when_lenient_and_two_when_raw() {
        let lenient = parser(KeySyntax::Lenient);
        assert_eq!(lenient.parse(b"\"k-1\";v=2").unwrap(), lenient.parse(b" k-1 ").unwrap());
        let raw = parser(KeySyntax::Raw);
        assert_ne!(raw.parse(b"\"k-1\"").unwrap(), raw.parse(b"k-1").unwrap());
    }

    #[test]
    fn strict_takes_only_structured_field_strings() {
        assert_eq!(parser(KeySyntax::Strict).parse(b"\"a\\\"b\"").unwrap().as_str(), "a\"b");
        for bad in [
            "bare",
            "\"open",
            "'single'",
            "?1",
            ":YWJj:",
            "(\"a\")",
            "\"a\" b",
            "\"a\", \"b\"",
        ] {
            assert_eq!(
                reason(KeySyntax::Strict, bad.as_bytes()),
                Some(InvalidKey::NotAString),
                "{bad}"
            );
        }
    }

    #[test]
    fn every_malformed_key_names_its_fault() {
        use InvalidKey::{Empty, NotAString, NotVisibleAscii, TooLong};
        for (value, fault) in [
            (&b""[..], Empty),
            (b"   ", Empty),
            (b"\"\"", Empty),
            (b"a b", NotVisibleAscii),
            (b"\"a b\"", NotVisibleAscii),
            (b"a\x7f", NotVisibleAscii),
            (b"a\x01", NotVisibleAscii),
            (b"caf\xe9", NotVisibleAscii),
            (b"\"open", NotAString),
            (b"\"bad\\escape\"", NotAString),
            (&[b'x'; 256], TooLong),
        ] {
            assert_eq!(reason(KeySyntax::Lenient, value), Some(fault), "{value:?}");
        }
        assert_eq!(reason(KeySyntax::Strict, b""), Some(Empty));
        assert_eq!(reason(KeySyntax::Lenient, &[b'x'; 255]), None);
    }

    #[test]
    fn a_validator_refuses() {
        let mut only_digits = parser(KeySyntax::Lenient);
        only_digits.validator = Some(Arc::new(|key| key.bytes().all(|byte| byte.is_ascii_digit())));
        assert!(only_digits.parse(b"123").is_ok());
        assert_eq!(only_digits.parse(b"12a").unwrap_err().reason(), InvalidKey::Refused);
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

    #[test]
    fn debug_forms_hide_what_they_hold() {
        assert_eq!(format!("{:?}", key("secret-key")), "IdempotencyKey(..)");
        assert_eq!(format!("{:?}", Scope::from("tenant")), "Scope(..)");
        assert_eq!(format!("{:?}", Secret::new(b"s")), "Secret(..)");
        assert_eq!(format!("{:?}", StorageKey::from_bytes([7; 32])), "StorageKey(..)");
    }

    proptest! {
        #[test]
        fn parsing_is_total_and_what_it_takes_is_in_bounds(value: Vec<u8>) {
            for syntax in [KeySyntax::Lenient, KeySyntax::Raw, KeySyntax::Strict] {
                if let Ok(key) = parser(syntax).parse(&value) {
                    prop_assert!((1..=255).contains(&key.as_str().len()));
                    prop_assert!(key.as_str().bytes().all(|byte| byte.is_ascii_graphic()));
                }
            }
        }
    }
}
