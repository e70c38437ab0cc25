//! Generators of keys.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use http::{Extensions, HeaderMap, Method, Uri};
use rand::Rng;
use uuid::Builder;

use super::derive::{KeyDeriver, KeyOrigin};
use crate::clock::unix_millis;

/// The error of a generator.
pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;

type MakeFn = Arc<dyn Fn(Outgoing<'_>) -> Result<String, Cause> + Send + Sync>;

/// A generator of keys, one per logical request. Default: [`uuid_v4`](Self::uuid_v4).
///
/// A random key protects against repeats *within* one call: our own retries, redirects, a proxy. It
/// does not survive a crash. If a caller retries *our* request, we make a new random key. Use a
/// [derived](Self::derived) key against both.
#[derive(Clone)]
pub struct KeyGenerator(Make);

#[derive(Clone)]
enum Make {
    Derived(KeyDeriver),
    Function(MakeFn),
    UuidV4,
    UuidV7,
}

/// The head of a request that needs a key.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Outgoing<'r> {
    /// The method of the request.
    pub method: &'r Method,
    /// The target of the request.
    pub uri: &'r Uri,
    /// The header fields of the request.
    pub headers: &'r HeaderMap,
    /// The extensions of the request, which stay in this process.
    pub extensions: &'r Extensions,
}

impl KeyGenerator {
    /// Returns a generator of UUIDs of version 4: 122 random bits (RFC 9562 section 5.4) from the
    /// thread's cryptographic generator.
    #[must_use]
    pub const fn uuid_v4() -> Self {
        Self(Make::UuidV4)
    }

    /// Returns a generator of UUIDs of version 7: the time in milliseconds, then 74 random bits
    /// (RFC 9562 section 5.7). Use it for servers that store keys in an index. The key shows the
    /// server when it was made.
    #[must_use]
    pub const fn uuid_v7() -> Self {
        Self(Make::UuidV7)
    }

    /// Returns a generator that derives keys from the request's [`KeyOrigin`], an extension of the
    /// request. A request without one is an error and is not sent, because a key that changes with
    /// each crash would not protect it.
    #[must_use]
    pub const fn derived(keys: KeyDeriver) -> Self {
        Self(Make::Derived(keys))
    }

    /// Returns a generator that calls a function. The function's error is the source of the call's
    /// error, and nothing is sent.
    #[must_use]
    pub fn from_fn<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        make: impl Fn(Outgoing<'_>) -> Result<String, E> + Send + Sync + 'static,
    ) -> Self {
        Self(Make::Function(Arc::new(move |request| {
            make(request).map_err(Into::into)
        })))
    }

    /// Returns whether every key is random, so that no earlier attempt can have sent it.
    pub(super) const fn is_random(&self) -> bool {
        matches!(self.0, Make::UuidV4 | Make::UuidV7)
    }

    /// Makes a key. A UUID is written into `text`.
    pub(super) fn make<'t>(&self, request: Outgoing<'_>, text: &'t mut [u8; 36]) -> Result<Cow<'t, str>, Cause> {
        const NO_ORIGIN: &str =
            "the request has no `KeyOrigin` in its extensions, so no key can be derived; insert one";
        let uuid = match &self.0 {
            Make::Function(make) => return make(request).map(Cow::Owned),
            Make::Derived(keys) => {
                let origin = request.extensions.get::<KeyOrigin>().ok_or(NO_ORIGIN)?;
                return Ok(Cow::Borrowed(keys.encode(origin, text)));
            }
            Make::UuidV4 => Builder::from_random_bytes(random()),
            Make::UuidV7 => Builder::from_unix_timestamp_millis(unix_millis(), &random()),
        };
        Ok(Cow::Borrowed(uuid.into_uuid().hyphenated().encode_lower(text)))
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

impl Default for KeyGenerator {
    fn default() -> Self {
        Self::uuid_v4()
    }
}

impl fmt::Debug for KeyGenerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Make::Derived(_) => "KeyGenerator::derived(..)",
            Make::Function(_) => "KeyGenerator::from_fn(..)",
            Make::UuidV4 => "KeyGenerator::uuid_v4()",
            Make::UuidV7 => "KeyGenerator::uuid_v7()",
        })
    }
}

impl fmt::Debug for Outgoing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("method", self.method)
            .finish_non_exhaustive()
    }
}
