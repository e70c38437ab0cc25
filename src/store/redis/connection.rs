//! One exchange with the server: its time limit, its redirections, and the wait for replicas.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use std::vec::IntoIter;

use redis::aio::ConnectionLike;
use redis::cluster_async::ClusterConnection;
use redis::{Cmd, Pipeline, RedisError, RedisFuture, Value, cmd};

use super::failure;
use super::managed::Managed;
use super::redirection::{self, Redirection};
use super::scripts::Reply;
use crate::error::Error;

/// A connection to a single server or to a Cluster. Clones share it.
#[derive(Clone)]
pub(super) enum Connection {
    Cluster(ClusterConnection),
    Managed(Arc<Managed>),
}

/// The number of replicas that must have a write, and the time that they have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Replication {
    pub(super) replicas: usize,
    pub(super) timeout: Duration,
}

/// The result of one exchange.
pub(super) struct Exchanged {
    pub(super) reply: Result<Reply, Failed>,
    /// Whether enough replicas have the write. True if no replicas are required.
    pub(super) is_replicated: bool,
}

/// The reason why there is no reply.
pub(super) enum Failed {
    /// An error of the server or of the connection, which each operation interprets in its own way.
    Redis(RedisError),
    /// An error that is the same for all operations.
    Other(Error),
}

impl Connection {
    pub(super) fn failed(&self, error: RedisError) -> Failed {
        let other_node = match self {
            Self::Cluster(_) => None,
            Self::Managed(_) => failure::of_other_node(&error),
        };
        other_node.map_or(Failed::Redis(error), Failed::Other)
    }

    /// Returns the reply to one command, from the node that has its key.
    pub(super) async fn value(&mut self, command: &Cmd) -> Result<Value, RedisError> {
        let value = self.values(&[command]).await?.next().unwrap_or_default();
        value.extract_error()
    }

    pub(super) async fn send(
        &mut self,
        command: &Cmd,
        replication: Option<Replication>,
    ) -> Result<(Value, bool), RedisError> {
        if let Some(replication) = replication {
            return Box::pin(self.send_on(command, replication)).await;
        }
        Ok((self.value(command).await?, true))
    }

    async fn send_on(
        &mut self,
        command: &Cmd,
        Replication { replicas, timeout }: Replication,
    ) -> Result<(Value, bool), RedisError> {
        // WAIT counts the replicas that have the writes of *its own connection*, so send it
        // directly after the write.
        let mut wait = cmd("WAIT");
        wait.arg(replicas).arg(millis(timeout));
        let mut values = self.values(&[command, &wait]).await?;
        let value = values.next().unwrap_or_default().extract_error()?;
        // If WAIT fails, no replica is known to have the write. The command before it took effect
        // all the same.
        let have = match values.next() {
            Some(Value::Int(have)) => usize::try_from(have).unwrap_or(0),
            _ => 0,
        };
        Ok((value, have >= replicas))
    }

    /// Returns the replies of the node that has the key. The commands are sent without any other
    /// command between them.
    pub(super) async fn values(&mut self, commands: &[&Cmd]) -> Result<IntoIter<Value>, RedisError> {
        let mut replies = self.values_of_first_node(commands).await;
        for _ in 0..redirection::MOST {
            let (Self::Cluster(connection), Err(error)) = (&mut *self, &replies) else {
                break;
            };
            let Some(redirection) = Redirection::of(error) else {
                break;
            };
            replies = Box::pin(redirection.follow(connection, commands)).await;
        }
        replies.map(Vec::into_iter)
    }

    async fn values_of_first_node(&mut self, commands: &[&Cmd]) -> Result<Vec<Value>, RedisError> {
        if let [command] = commands {
            let value = self.req_packed_command(command).await?;
            // A node may also send a refusal as a value.
            return value.extract_error().map(|value| vec![value]);
        }
        let mut pipeline = redis::pipe();
        for command in commands {
            pipeline.add_command((*command).clone());
        }
        self.req_packed_commands(&pipeline, 0, commands.len()).await
    }
}

/// Rounds up to whole milliseconds, at least 1, because zero means "without a limit" to WAIT.
fn millis(timeout: Duration) -> u64 {
    let rounded = timeout.saturating_add(Duration::from_nanos(999_999)).as_millis();
    u64::try_from(rounded).unwrap_or(u64::MAX).max(1)
}

impl Exchanged {
    pub(super) const fn failed(failed: Failed) -> Self {
        Self {
            reply: Err(failed),
            is_replicated: false,
        }
    }

    /// Returns the reply to an operation on a key that is claimed already.
    pub(super) fn reply(self) -> Result<Reply, Error> {
        self.reply.map_err(|failed| failed.read_by(failure::of))
    }

    /// Returns the reply. Fails if the reply is `done` and too few replicas have the write.
    pub(super) fn replicated_reply(self, done: &[u8]) -> Result<Reply, Error> {
        let is_replicated = self.is_replicated;
        let reply = self.reply()?;
        if is_replicated || reply.word() != done {
            Ok(reply)
        } else {
            Err(failure::NOT_REPLICATED)
        }
    }
}

impl Failed {
    pub(super) fn read_by(self, read: impl FnOnce(RedisError) -> Error) -> Error {
        match self {
            Self::Redis(error) => read(error),
            Self::Other(error) => error,
        }
    }
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Cluster(connection) => connection.req_packed_command(command),
            Self::Managed(managed) => {
                let mut manager = managed.manager();
                Box::pin(async move { manager.send_packed_command(command).await })
            }
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Cluster(connection) => connection.req_packed_commands(pipeline, offset, count),
            Self::Managed(managed) => {
                let mut manager = managed.manager();
                Box::pin(async move { manager.send_packed_commands(pipeline, offset, count).await })
            }
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Cluster(connection) => connection.get_db(),
            Self::Managed(managed) => managed.manager().get_db(),
        }
    }
}

impl fmt::Debug for Connection {
    /// Shows only the kind, because a client would show its address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster(_) => "Cluster",
            Self::Managed(_) => "Managed",
        })
    }
}
