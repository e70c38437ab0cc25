//! The check of a server before the store uses it, and the schedule of repeated checks.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use redis::aio::ConnectionLike;
use redis::{Cmd, RedisResult, Value, cmd};

use super::connection::Connection;
use super::failure::{self, MissingCommands, WrongSetting};
use super::managed::CONNECTION_TIMEOUT;
use crate::clock::{Clock, within};
use crate::error::{Error, ErrorKind};
use crate::store::checked::Checked;
use crate::telemetry::{self, Event};

const OLDEST: u32 = 7;

/// The time after which the check is repeated. Some changes show in no reply and break no
/// connection. Examples are an operator who changes the eviction policy, or who demotes a primary
/// with `replica-read-only no`.
const LONGEST: Duration = Duration::from_secs(10);

/// Knows whether the server is a primary that runs the scripts and evicts nothing.
///
/// The store runs the check when the store is made. It repeats the check before the next operation
/// after a connection broke, after a reply that shows a restart or a demotion, and after ten
/// seconds. An error of one node of a Cluster says nothing about the other nodes.
pub(super) struct Checks {
    checked: Checked,
    clock: Clock,
    /// The time at which the next check is due, in microseconds.
    due: AtomicU64,
    server_check: Arc<ServerCheck>,
}

/// The check, and the settings on which it depends.
struct ServerCheck {
    /// A key with the prefix of the records that no record has.
    key: Vec<u8>,
    is_replicated: bool,
    limit: Duration,
    /// The limit of a repeated check of a Cluster's nodes. It is short, so that the operation that
    /// waits for the check has time left.
    limit_of_repetition: Duration,
    has_passed: AtomicBool,
    /// Whether the store has already reported that the server does not show its settings.
    is_reported: AtomicBool,
}

impl Checks {
    pub(super) fn new(prefix: &str, is_replicated: bool, response_timeout: Duration) -> Self {
        let clock = Clock::system();
        Self {
            checked: Checked::not_yet(),
            due: AtomicU64::new(clock.now().saturating_add(LONGEST).as_micros()),
            clock,
            server_check: Arc::new(ServerCheck {
                key: [prefix.as_bytes(), b"check"].concat(),
                is_replicated,
                limit: response_timeout.max(CONNECTION_TIMEOUT),
                limit_of_repetition: response_timeout / 4,
                has_passed: AtomicBool::new(false),
                is_reported: AtomicBool::new(false),
            }),
        }
    }

    /// Returns the epoch of the last check, if that check has passed and no new one is due.
    pub(super) fn passed(&self) -> Option<u64> {
        let epoch = self.checked.passed()?;
        let (now, due) = (self.clock.now(), self.due.load(Ordering::Relaxed));
        if now.as_micros() < due {
            return Some(epoch);
        }
        // Only one of many concurrent operations makes the check due.
        let next = now.saturating_add(LONGEST).as_micros();
        let is_first = self
            .due
            .compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed);
        if is_first.is_ok() {
            self.checked.expire(epoch);
        }
        self.checked.passed()
    }

    /// Whether no event since `epoch` requires another check.
    pub(super) fn stands(&self, epoch: u64) -> bool {
        self.checked.passed() == Some(epoch)
    }

    /// Checks the server, or joins the run of another operation.
    pub(super) async fn check(&self, connection: &Connection) -> Result<u64, Error> {
        let check = || -> BoxFuture<'static, Result<(), Error>> {
            Arc::clone(&self.server_check).run(connection.clone()).boxed()
        };
        self.checked.check(check).await
    }

    pub(super) fn expire(&self, epoch: u64) {
        self.checked.expire(epoch);
    }

    /// Records that the connection broke, because the next one may lead to another server.
    pub(super) fn disconnected(&self) {
        self.checked.expire_now();
    }
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Checks").field(&self.checked.passed().is_some()).finish()
    }
}

impl ServerCheck {
    /// Checks the server. The nodes of a Cluster fail one by one, and an operation on the key of a
    /// dead node fails by itself. So once a Cluster has passed, nodes that do not reply leave the
    /// keys of the other nodes available.
    async fn run(self: Arc<Self>, connection: Connection) -> Result<(), Error> {
        let is_cluster = matches!(connection, Connection::Cluster(_));
        let may_be_silent = is_cluster && self.has_passed.load(Ordering::Relaxed);
        let limit = if may_be_silent {
            self.limit_of_repetition
        } else {
            self.limit
        };
        match self.run_within(limit, connection).await {
            Err(error) if may_be_silent && error.kind() == ErrorKind::StoreUnavailable => Ok(()),
            result => {
                self.has_passed.fetch_or(result.is_ok(), Ordering::Relaxed);
                result
            }
        }
    }

    async fn run_within(&self, limit: Duration, mut connection: Connection) -> Result<(), Error> {
        let replies = within(limit, self.replies(&mut connection)).await;
        let replies = replies.map_err(|_| failure::TIMED_OUT)?;
        let (settings, missing) = replies.map_err(|error| failure::of_login(error, connection.get_db()))?;
        for section in settings {
            self.judge_settings(section)?;
        }
        let missing = missing.map_err(|error| connection.failed(error).read_by(failure::of_connect))?;
        judge_rights(missing)
    }

    /// Returns the sections of INFO, and the commands that the user lacks. CONFIG would show more,
    /// but managed services forbid it.
    async fn replies(&self, connection: &mut Connection) -> RedisResult<(Vec<RedisResult<Value>>, RedisResult<Value>)> {
        let [server, memory, replication] = ["server", "memory", "replication"].map(|section| {
            let mut info = cmd("INFO");
            info.arg(section);
            info
        });
        let rights = self.rights(connection);
        if let Connection::Managed(managed) = connection {
            let (commands, managed) = ([&server, &memory, &replication, &rights], Arc::clone(managed));
            let replies = match connection.values(&commands).await {
                // A refusal of the whole pipeline is a refusal of the login, because each command
                // has its own reply.
                Err(refusal) if !refusal.is_io_error() => {
                    managed.log_in_again(refusal).await?;
                    connection.values(&commands).await?
                }
                replies => replies?,
            };
            let mut replies: Vec<_> = replies.map(Value::extract_error).collect();
            let missing = replies.pop().unwrap_or(Ok(Value::Nil));
            return Ok((replies, missing));
        }
        // The client sends INFO to all nodes of a Cluster. Do not query their roles, because a
        // replica there redirects every operation to its primary.
        let mut settings = Vec::new();
        for info in [server, memory] {
            let reply = connection.req_packed_command(&info).await;
            settings.push(reply.and_then(Value::extract_error));
        }
        Ok((settings, connection.value(&rights).await))
    }

    fn rights(&self, connection: &Connection) -> Cmd {
        let is_cluster = matches!(connection, Connection::Cluster(_));
        let mut eval = cmd("EVAL");
        eval.arg(include_str!("check.lua")).arg(1).arg(&self.key);
        eval.arg(if self.is_replicated { "replicated" } else { "" });
        eval.arg(if is_cluster { "cluster" } else { "" });
        eval
    }

    fn judge_settings(&self, section: RedisResult<Value>) -> Result<(), Error> {
        match section {
            Ok(value) => texts(value).iter().try_for_each(|node| judge(node)),
            Err(error) if matches!(error.code(), Some("NOPERM" | "ERR")) => {
                if !self.is_reported.swap(true, Ordering::Relaxed) {
                    telemetry::failure(Event::Unchecked, &Error::unavailable(error));
                }
                Ok(())
            }
            Err(error) => Err(failure::of_connect(error)),
        }
    }
}

fn judge_rights(missing: Value) -> Result<(), Error> {
    let Value::Array(missing) = missing else {
        return Err(failure::UNEXPECTED_REPLY);
    };
    if missing.is_empty() {
        return Ok(());
    }
    let commands = missing.into_iter().flat_map(texts).collect();
    Err(failure::DENIED.with_source(MissingCommands(commands)))
}

/// Returns one text, or one per node of a Cluster.
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
                "the Redis server is too old; upgrade it to version 7.0 or newer",
                "redis_version",
                version,
                "upgrade it to version 7.0 or newer",
            ));
        }
    }
    if let Some(role @ "slave") = field(info, "role") {
        let cause = WrongSetting::new("role", role, "connect to the primary");
        return Err(failure::REPLICA.with_source(cause));
    }
    let is_limited = field(info, "maxmemory").is_some_and(|bytes| bytes != "0");
    match field(info, "maxmemory_policy") {
        Some(policy) if is_limited && policy != "noeviction" => Err(wrong(
            "the Redis server may evict records, and requests would then run again; set its `maxmemory-policy` to `noeviction`",
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
    Error::configuration(what).with_source(WrongSetting::new(setting, is, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_check_is_due_again_after_its_time() {
        let checks = Checks::new("", false, Duration::from_secs(1));
        for _ in 0..3 {
            assert!(checks.passed().is_none());
            checks.checked.pass();
            let epoch = checks.passed().unwrap();
            tokio::time::advance(LONGEST - Duration::from_millis(1)).await;
            assert!(checks.stands(epoch) && checks.passed() == Some(epoch));
            tokio::time::advance(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn an_old_server_is_refused_and_named() {
        let error = judge("# Server\r\nredis_version:6.2.14\r\n").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        assert!(format!("{error:?}").contains("6.2.14"), "{error:?}");
    }

    #[test]
    fn a_new_server_passes_and_so_does_one_that_hides_its_settings() {
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
