//! The look at a server before it is entrusted with records.

use std::time::Duration;

use redis::aio::ConnectionLike;
use redis::{cmd, Value};

use super::connection::Connection;
use super::failure::{self, WrongSetting};
use crate::clock::within;
use crate::error::{Error, ErrorKind};
use crate::telemetry::{self, Event};

const OLDEST: u32 = 7;

/// Makes sure that a server runs our scripts and evicts nothing, as far as it tells.
///
/// INFO and not CONFIG: managed services forbid the latter.
pub(super) async fn check(mut connection: Connection, limit: Duration) -> Result<(), Error> {
    // A Cluster's replicas answer for themselves, and are asked nothing else.
    let sections: &[&str] = match connection {
        Connection::Cluster(_) => &["server", "memory"],
        Connection::Managed(_) => &["server", "memory", "replication"],
    };
    for section in sections {
        let mut info = cmd("INFO");
        info.arg(*section);
        let sent = within(limit, connection.req_packed_command(&info)).await;
        let told = sent.map_err(|_| failure::LATE)?.and_then(Value::extract_error);
        match told {
            Ok(value) => {
                for node in texts(value) {
                    judge(&node)?;
                }
            }
            Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => {
                telemetry::failure(Event::Unchecked, &failure::of(error));
            }
            Err(error) => return Err(failure::of_connect(error)),
        }
    }
    Ok(())
}

/// One text, or one per node of a Cluster.
fn texts(value: Value) -> Vec<String> {
    match value {
        Value::BulkString(bytes) => vec![String::from_utf8_lossy(&bytes).into_owned()],
        Value::VerbatimString { text, .. } => vec![text],
        Value::SimpleString(text) => vec![text],
        Value::Map(nodes) => nodes.into_iter().flat_map(|(_, text)| texts(text)).collect(),
        Value::Array(nodes) => nodes.into_iter().flat_map(texts).collect(),
        _ => Vec::new(),
    }
}

fn judge(info: &str) -> Result<(), Error> {
    if let Some(version) = field(info, "redis_version") {
        let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        if major.is_some_and(|major| major < OLDEST) {
            return Err(wrong(
                "the Redis server is too old: version 7.0 or newer is needed",
                "redis_version",
                version,
                "version 7.0 or newer is needed",
            ));
        }
    }
    if let Some(role @ "slave") = field(info, "role") {
        return Err(wrong(
            "the Redis server is a replica: connect to its primary, which alone knows who holds a key",
            "role",
            role,
            "connect to the primary",
        ));
    }
    let is_limited = field(info, "maxmemory").is_some_and(|bytes| bytes != "0");
    match field(info, "maxmemory_policy") {
        Some(policy) if is_limited && policy != "noeviction" => Err(wrong(
            "the Redis server may evict records, whose requests would then run again: set its `maxmemory-policy` to `noeviction`",
            "maxmemory-policy",
            policy,
            "set it to `noeviction`, or `maxmemory` to 0",
        )),
        _ => Ok(()),
    }
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

fn wrong(what: &'static str, setting: &'static str, is: &str, wanted: &'static str) -> Error {
    let is = is.to_owned();
    Error::new(ErrorKind::Configuration, what).with_source(WrongSetting { setting, is, wanted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_server_is_refused_and_named() {
        let error = judge("# Server\r\nredis_version:6.2.14\r\n").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        assert!(format!("{error:?}").contains("6.2.14"), "{error:?}");
    }

    #[test]
    fn a_new_one_is_not_and_silence_is_no_fault() {
        for info in [
            "redis_version:7.0.15\r\n",
            "redis_version:8.2.0\r\n",
            "redis_version:7.2.4\r\nvalkey_version:8.1.0\r\n",
            "",
        ] {
            assert!(judge(info).is_ok(), "{info}");
        }
    }

    #[test]
    fn a_replica_is_refused() {
        assert!(judge("role:master\r\n").is_ok());
        let error = judge("role:slave\r\nmaster_host:127.0.0.1\r\n").unwrap_err();
        assert!(error.to_string().contains("primary"), "{error:?}");
    }

    #[test]
    fn eviction_is_refused_only_where_memory_is_limited() {
        assert!(judge("maxmemory:100\r\nmaxmemory_policy:noeviction\r\n").is_ok());
        assert!(judge("maxmemory:0\r\nmaxmemory_policy:allkeys-lru\r\n").is_ok());
        for policy in ["allkeys-lru", "volatile-ttl", "allkeys-random"] {
            let info = format!("maxmemory:100\r\nmaxmemory_human:100B\r\nmaxmemory_policy:{policy}\r\n");
            let error = judge(&info).unwrap_err();
            assert!(format!("{error:?}").contains(policy), "{error:?}");
        }
    }
}
