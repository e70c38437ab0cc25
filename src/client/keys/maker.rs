//! Who makes the keys.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use http::{Extensions, HeaderMap, Method, Uri};
use rand::Rng;
use uuid::Builder;

use super::derive::{KeyDeriver, KeyOrigin};
use crate::clock::unix_millis;

/// Why a maker failed.
pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;

type MakeFn = Arc<dyn Fn(Outgoing<'_>) -> Result<String, Cause> + Send + Sync>;

/// Makes the key of a logical request. The default is [`uuid_v4`](Self::uuid_v4).
///
/// A random key protects from repetitions *within* one call: our own retries, redirects, a proxy. It does not survive a crash, and
/// a caller who retries *us* makes us take a new one: for that it takes a [derived](Self::derived) one.
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
    /// Its method.
    pub method: &'r Method,
    /// Its target.
    pub uri: &'r Uri,
    /// Its headers.
    pub headers: &'r HeaderMap,
    /// What travels with it in this process.
    pub extensions: &'r Extensions,
}

impl KeyGenerator {
    /// 122 random bits (RFC 9562 section 5.4), from the thread's cryptographic generator.
    #[must_use]
    pub const fn uuid_v4() -> Self {
        Self(Make::UuidV4)
    }

    /// The time in milliseconds, then 74 random bits (RFC 9562 section 5.7). For servers that keep their keys in an index; it tells
    /// them when the key was made.
    #[must_use]
    pub const fn uuid_v7() -> Self {
        Self(Make::UuidV7)
    }

    /// Derived from the request's [`KeyOrigin`], an extension of it. A request without one is an error, and is not sent: a
    /// key that changed with each crash would promise what it cannot keep.
    #[must_use]
    pub const fn derived(keys: KeyDeriver) -> Self {
        Self(Make::Derived(keys))
    }

    /// By a function; what it fails with is the source of the call's error, and nothing is sent.
    #[must_use]
    pub fn from_fn<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        make: impl Fn(Outgoing<'_>) -> Result<String, E> + Send + Sync + 'static,
    ) -> Self {
        Self(Make::Function(Arc::new(move |request| {
            make(request).map_err(Into::into)
        })))
    }

    /// Whether every key is made at random, so that no earlier attempt can have carried it.
    pub(super) const fn is_random(&self) -> bool {
        matches!(self.0, Make::UuidV4 | Make::UuidV7)
    }

    /// Makes a key; in `text`, where it is a UUID.
    pub(super) fn make<'t>(&self, request: Outgoing<'_>, text: &'t mut [u8; 36]) -> Result<Cow<'t, str>, Cause> {
        const NO_ORIGIN: &str = "the request has no `KeyOrigin` among its extensions to derive its key from";
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
