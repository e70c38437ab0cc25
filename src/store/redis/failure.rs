//! The server's errors as the crate's.

use std::fmt;

use redis::{RedisError, ServerErrorKind};

use crate::error::{Error, ErrorKind};

/// A reply that none of our scripts gives.
pub(super) const STRANGE: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "the Redis server gave a reply that makes no sense",
);

/// No reply in time. Whether the operation took effect is not known.
pub(super) const LATE: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "the Redis server did not answer within the response timeout",
);

/// A defect of the client's. Whether anything was sent is not known.
pub(super) const PANICKED: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "the Redis client panicked over what it got, or over what it was given",
);

/// Redis is spoken to from tokio alone.
pub(super) const NO_RUNTIME: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "a Redis store must be used from within a tokio runtime",
);

/// The write is on the server and may be lost with it.
pub(super) const NOT_REPLICATED: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "too few replicas of the Redis server acknowledged the write in time",
);

/// The error of an operation.
pub(super) fn of(error: RedisError) -> Error {
    Error::unavailable(error)
}

/// The error of a claim: a server without memory takes no new keys.
pub(super) fn of_claim(error: RedisError) -> Error {
    const FULL: Error = Error::new(
        ErrorKind::StoreFull,
        "the Redis server has reached its `maxmemory` and takes no new keys; give it more, or shorten the retention",
    );
    if error.code() == Some("OOM") {
        return FULL.with_source(error);
    }
    of(error)
}

/// The error of a connection that could not be made: what will not mend by itself is a matter of configuration.
pub(super) fn of_connect(error: RedisError) -> Error {
    const CLIENT: &str = "the Redis server's URL or the client's settings make no sense";
    const CREDENTIALS: &str = "the Redis server refused the credentials, or asks for some";
    const OLD: &str = "the Redis server is too old: version 7.0 or newer is needed";
    const UNREACHABLE: &str = "the Redis server cannot be reached";
    #[cfg(feature = "redis-rustls")]
    if crate::store::tls::is_certificate_refused(&error) {
        const CERTIFICATE: Error = Error::new(
            ErrorKind::Configuration,
            "the Redis server's certificate is not trusted, or is for another host or time; use the host's name in the URL, and \
             hand a client that trusts its authority to `RedisStore::from_client`",
        );
        return CERTIFICATE.with_source(error);
    }
    let (kind, what) = match (error.kind(), error.code()) {
        (redis::ErrorKind::InvalidClientConfig, _) => (ErrorKind::Configuration, CLIENT),
        (redis::ErrorKind::RESP3NotSupported, _) => (ErrorKind::Configuration, OLD),
        (redis::ErrorKind::AuthenticationFailed, _) | (_, Some("NOAUTH" | "WRONGPASS")) => {
            (ErrorKind::Configuration, CREDENTIALS)
        }
        _ => (ErrorKind::StoreUnavailable, UNREACHABLE),
    };
    Error::new(kind, what).with_source(error)
}

/// Whether the server does not know the script, be it that it never did or that somebody flushed it.
pub(super) fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript)
}

/// A setting of the server with which it would lose records.
#[derive(Debug)]
pub(super) struct WrongSetting {
    pub(super) setting: &'static str,
    pub(super) is: String,
    pub(super) wanted: &'static str,
}

impl fmt::Display for WrongSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is `{}`; {}", self.setting, self.is, self.wanted)
    }
}

impl std::error::Error for WrongSetting {}
