//! Translation of the server's errors into the crate's errors.

use std::fmt;

use redis::{RedisError, ServerErrorKind};

use crate::error::{Error, ErrorKind};

/// A reply that none of our scripts returns.
pub(super) const UNEXPECTED_REPLY: Error =
    Error::store_unavailable("the Redis server sent a reply that no script of the store returns");

/// No reply came in time. The effect of the operation is unknown.
pub(super) const TIMED_OUT: Error =
    Error::store_unavailable("the Redis server did not reply within the response timeout");

/// The connection broke, and the next one leads to a server that must not be used. The effect of
/// the operation is unknown.
pub(super) const CHANGED: Error =
    Error::store_unavailable("the connection to the Redis server broke, and the next one leads to another server");

/// A bug of the client. Whether it sent the operation is unknown.
pub(super) const PANICKED: Error =
    Error::store_unavailable("the Redis client panicked; this is a bug of the client library, please report it");

/// An operation outside a tokio runtime.
pub(super) const NO_RUNTIME: Error = Error::store_unavailable("a Redis store must be used from within a tokio runtime");

/// The server has the write, and may lose it in a failover.
pub(super) const NOT_REPLICATED: Error =
    Error::store_unavailable("too few replicas of the Redis server acknowledged the write in time");

/// A replica may be behind its primary. A primary that was demoted is a replica, too.
pub(super) const REPLICA: Error = Error::configuration(
    "the Redis server is a replica, and only its primary knows which request holds a key; connect to the primary",
);

pub(super) const DENIED: Error = Error::configuration(
    "the Redis user lacks a right that the store needs: EVAL, EVALSHA, GET, SET, DEL, PEXPIREAT and TIME on keys with the store's prefix; \
     the documentation of `RedisStore` has the line for ACL SETUSER",
);

const CREDENTIALS: Error = Error::configuration(
    "the Redis server refused the credentials, or requires credentials; correct them on the server, or make a store with others",
);

const NO_SCRIPTS: Error = Error::configuration(
    "the Redis server does not know a command that the store needs: EVAL, EVALSHA, GET, SET, DEL, PEXPIREAT or TIME; enable them \
     under their own names",
);

const CLUSTER: Error = Error::configuration(
    "the Redis server is a node of a Cluster, and another node has the key; connect by `RedisStore::from_cluster`",
);

/// Returns the error of an operation.
pub(super) fn of(error: RedisError) -> Error {
    match misconfiguration(&error) {
        Some(fault) => fault.with_source(error),
        None => Error::unavailable(error),
    }
}

/// Returns the error for a reply that lasts until an operator corrects a setting; `None` for all
/// other replies, which can pass by themselves.
///
/// The others include MISCONF (the server cannot save; the name is misleading), NOREPLICAS, OOM,
/// LOADING, BUSY, CLUSTERDOWN and TRYAGAIN.
fn misconfiguration(error: &RedisError) -> Option<Error> {
    if error.kind() == redis::ErrorKind::AuthenticationFailed {
        return Some(CREDENTIALS);
    }
    let detail = error.detail().unwrap_or_default();
    match error.code()? {
        // A replica that has lost its primary replies with MASTERDOWN.
        "READONLY" | "MASTERDOWN" => Some(REPLICA),
        "NOPERM" => Some(DENIED),
        "NOAUTH" | "WRONGPASS" => Some(CREDENTIALS),
        // Redis 7.0 reports a missing right of a script in this way, later versions with NOPERM.
        "ERR" if detail.starts_with("The user executing the script can't") => Some(DENIED),
        "ERR" if detail.starts_with("unknown command") || detail.starts_with("Unknown Redis command") => {
            Some(NO_SCRIPTS)
        }
        _ => None,
    }
}

/// Returns the error if a store for a single server has reached a node of a Cluster, and that node
/// replied that another node has the key.
pub(super) fn of_other_node(error: &RedisError) -> Option<Error> {
    let is_other = error.kind() == redis::ErrorKind::Server(ServerErrorKind::Moved);
    is_other.then(|| CLUSTER.with_source(error.clone()))
}

/// Whether the next reply may come from another server, or from a server that has changed its role.
pub(super) fn is_of_changed_server(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || matches!(error.code(), Some("READONLY" | "MASTERDOWN" | "LOADING" | "NOAUTH"))
}

/// Returns the error of a claim. A server without free memory takes no new keys.
pub(super) fn of_claim(error: RedisError) -> Error {
    const FULL: Error = Error::new(
        ErrorKind::StoreFull,
        "the Redis server has reached its `maxmemory` and takes no new keys; give it more memory, or shorten the retention",
    );
    if error.code() == Some("OOM") {
        return FULL.with_source(error);
    }
    of(error)
}

/// Returns the error of a connection that could not be made. Errors that do not pass by themselves
/// are of kind `Configuration`.
pub(super) fn of_connect(error: RedisError) -> Error {
    const CLIENT: &str = "the URL of the Redis server or a setting of the client is invalid";
    const OLD: &str = "the Redis server is too old; upgrade it to version 7.0 or newer";
    const UNREACHABLE: &str = "the Redis server cannot be reached";
    #[cfg(feature = "redis-rustls")]
    if crate::store::tls::is_certificate_refused(&error) {
        const CERTIFICATE: Error = Error::configuration(
            "the Redis server's certificate is not trusted, or is for another host or time; use the host's name in the URL, and \
             pass a client that trusts its authority to `RedisStore::from_client`",
        );
        return CERTIFICATE.with_source(error);
    }
    let fault = match error.kind() {
        redis::ErrorKind::InvalidClientConfig => Error::configuration(CLIENT),
        redis::ErrorKind::RESP3NotSupported => Error::configuration(OLD),
        _ => misconfiguration(&error).unwrap_or(Error::store_unavailable(UNREACHABLE)),
    };
    fault.with_source(error)
}

/// Returns the error of a login with this database. The client sends SELECT for every database
/// other than 0, and reports the refusal without its code.
pub(super) fn of_login(error: RedisError, database: i64) -> Error {
    const NO_SELECT: Error = Error::configuration(
        "the Redis user may not run SELECT, which every database other than 0 needs; grant `+select`, or use database 0",
    );
    const NO_DATABASE: Error = Error::configuration(
        "the Redis server does not have the database of the URL or the client; use another one, or raise `databases` on the server",
    );
    let detail = error.detail().unwrap_or_default();
    let fault = match detail {
        "DB index is out of range" | "invalid DB index" | "SELECT is not allowed in cluster mode" => NO_DATABASE,
        _ if detail.to_ascii_lowercase().contains("'select'") => NO_SELECT,
        // SELECT also fails for reasons that pass by themselves, such as a busy script.
        _ => return of_connect(error),
    };
    fault.with_source(NotSelected { database, error })
}

/// Whether the server does not know the script, because the script never ran there or was flushed.
pub(super) fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript)
}

/// Whether the server takes no writes for now. It has no free memory (OOM), cannot save its data
/// (MISCONF), or has too few replicas (NOREPLICAS). It refuses a script with flags before the
/// script runs.
pub(super) fn is_of_refused_writes(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "MISCONF" | "NOREPLICAS"))
}

/// A setting of the server with which it would lose records.
#[derive(Debug)]
pub(super) struct WrongSetting {
    setting: &'static str,
    is: String,
    wanted: &'static str,
}

impl WrongSetting {
    pub(super) fn new(setting: &'static str, is: &str, wanted: &'static str) -> Self {
        let is = is.to_owned();
        Self { setting, is, wanted }
    }
}

impl fmt::Display for WrongSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is `{}`; {}", self.setting, self.is, self.wanted)
    }
}

impl std::error::Error for WrongSetting {}

/// A database that the server did not let the client select.
#[derive(Debug)]
struct NotSelected {
    database: i64,
    error: RedisError,
}

impl fmt::Display for NotSelected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server refused to select database {}", self.database)
    }
}

impl std::error::Error for NotSelected {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// The commands that the user may not run.
#[derive(Debug)]
pub(super) struct MissingCommands(pub(super) Vec<String>);

impl fmt::Display for MissingCommands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the user may not run {} on the store's keys", self.0.join(", "))
    }
}

impl std::error::Error for MissingCommands {}

#[cfg(test)]
pub(super) mod tests {
    use std::error::Error as _;

    use super::*;
    use crate::error::ErrorKind::{Configuration, StoreFull, StoreUnavailable};

    /// Returns the error that the client makes of an error reply.
    pub(in super::super) fn of_server(reply: &str) -> RedisError {
        let reply = redis::parse_redis_value(format!("-{reply}\r\n").as_bytes());
        reply.and_then(redis::Value::extract_error).unwrap_err()
    }

    /// An error that lasts until an operator acts is a configuration error. An outage is not, because a
    /// retry may succeed.
    #[test]
    fn an_error_that_needs_an_operator_differs_from_one_that_passes() {
        for (reply, kind, words) in [
            (
                "READONLY You can't write against a read only replica.",
                Configuration,
                "primary",
            ),
            ("MASTERDOWN Link with MASTER is down.", Configuration, "primary"),
            ("NOPERM this user has no permissions", Configuration, "lacks a right"),
            (
                "ERR The user executing the script can't run this command",
                Configuration,
                "lacks a right",
            ),
            ("NOAUTH Authentication required.", Configuration, "credentials"),
            ("WRONGPASS invalid username-password pair", Configuration, "credentials"),
            (
                "ERR unknown command 'EVALSHA'",
                Configuration,
                "does not know a command",
            ),
            (
                "ERR Unknown Redis command called from script",
                Configuration,
                "does not know a command",
            ),
            ("ERR max number of clients reached", StoreUnavailable, ""),
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                StoreUnavailable,
                "",
            ),
            ("LOADING Redis is loading the dataset in memory", StoreUnavailable, ""),
            ("CLUSTERDOWN The cluster is down", StoreUnavailable, ""),
        ] {
            for error in [
                of(of_server(reply)),
                of_connect(of_server(reply)),
                of_login(of_server(reply), 3),
            ] {
                assert_eq!(error.kind(), kind, "{reply}");
                assert!(error.to_string().contains(words), "{reply}: {error}");
                assert!(error.source().is_some(), "{reply}");
            }
            let of_claim = of_claim(of_server(reply)).kind();
            assert_eq!(of_claim, if reply.starts_with("OOM") { StoreFull } else { kind });
        }
    }

    #[test]
    fn a_client_that_cannot_connect_learns_the_reason() {
        for (kind, expected, words) in [
            (redis::ErrorKind::InvalidClientConfig, Configuration, "URL"),
            (redis::ErrorKind::RESP3NotSupported, Configuration, "too old"),
            (redis::ErrorKind::AuthenticationFailed, Configuration, "credentials"),
            (redis::ErrorKind::Io, StoreUnavailable, "cannot be reached"),
        ] {
            let error = of_connect((kind, "no connection").into());
            assert_eq!(error.kind(), expected, "{kind:?}");
            assert!(error.to_string().contains(words), "{kind:?}: {error}");
        }
        for (reply, words) in [
            ("ERR DB index is out of range", "does not have the database"),
            ("ERR invalid DB index", "does not have the database"),
            (
                "ERR SELECT is not allowed in cluster mode",
                "does not have the database",
            ),
            (
                "NOPERM this user has no permissions to run the 'select' command",
                "may not run SELECT",
            ),
        ] {
            let error = of_login(of_server(reply), 3);
            assert!(error.to_string().contains(words), "{reply}: {error}");
            let source = error.source().unwrap();
            assert!(source.to_string().contains("database 3"), "{source}");
            assert!(source.source().is_some(), "{source}");
        }
    }

    /// Says after which errors the store checks the server again, sends the script again, or tries
    /// the script that needs no write.
    #[test]
    fn an_error_decides_what_is_sent_next() {
        for (reply, is_changed_server, is_refused_write, is_unknown) in [
            (
                "READONLY You can't write against a read only replica.",
                true,
                false,
                false,
            ),
            ("MASTERDOWN Link with MASTER is down.", true, false, false),
            ("LOADING Redis is loading the dataset in memory", true, false, false),
            ("NOAUTH Authentication required.", true, false, false),
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                false,
                true,
                false,
            ),
            ("MISCONF Errors writing to the AOF file", false, true, false),
            ("NOREPLICAS Not enough good replicas to write.", false, true, false),
            ("NOSCRIPT No matching script.", false, false, true),
            ("ERR max number of clients reached", false, false, false),
        ] {
            let error = of_server(reply);
            assert_eq!(is_of_changed_server(&error), is_changed_server, "{reply}");
            assert_eq!(is_of_refused_writes(&error), is_refused_write, "{reply}");
            assert_eq!(is_unknown_script(&error), is_unknown, "{reply}");
            assert!(of_other_node(&error).is_none(), "{reply}");
        }
        assert!(is_of_changed_server(
            &std::io::Error::other("the connection broke").into()
        ));
        let moved = of_other_node(&of_server("MOVED 3999 127.0.0.1:6381")).unwrap();
        assert_eq!(moved.kind(), Configuration);
    }
}
