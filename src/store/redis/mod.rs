//! A store in Redis or Valkey: one key per record, one script per operation.

mod builder;
mod check;
mod connection;
mod exchange;
mod failure;
mod managed;
mod operations;
mod redirection;
mod scripts;
mod watch;

use std::fmt;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::Either;
use redis::aio::ConnectionManager;
use redis::cluster_async::ClusterConnection;

pub use self::builder::RedisStoreBuilder;
use self::operations::Server;
pub use self::watch::RedisWatch;
use super::Store;
use crate::catch_panic::catch_panic;
use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};

/// A store in Redis 7.0 or newer, or in Valkey, for several processes that serve the same keys.
///
/// It fulfils the whole [contract](Store#contract) as long as the server does not lose acknowledged
/// writes. Each operation is one script: one atomic step on one key, by the server's clock, in one
/// round trip. A replay takes one round trip, a first run takes two. The value of a key is
/// [`Record::to_bytes`](crate::protocol::Record::to_bytes).
///
/// ```no_run
/// # async fn run() -> Result<(), tower_idempotency::Error> {
/// use tower_idempotency::{IdempotencyLayer, RedisStore};
///
/// let store = RedisStore::connect("redis://127.0.0.1:6379").await?;
/// let layer = IdempotencyLayer::new(store);
/// # Ok(())
/// # }
/// ```
///
/// # What it does not promise
///
/// A server without persistence loses all records in a restart. A server that fails over to a
/// replica loses the writes that had not reached the replica. Against the first, set
/// `appendonly yes`, and also `appendfsync always` if not even the last second may be lost. Against
/// the second, use [`with_replication`](RedisStoreBuilder::with_replication). Redis may still lose
/// a write that replicas acknowledged, if a replica without the write is promoted. For effects that
/// must never happen twice, use a store with consensus or PostgreSQL.
///
/// # Requirements for the server
///
/// The server must be a primary and run version 7.0 or later. If it has a `maxmemory`, its policy
/// must be `noeviction`, because any other policy evicts live records. The store checks this when
/// it is made. It checks again before the next operation after a connection broke, after a reply
/// that shows that the server was restarted or demoted, and every 10 s while operations run. If a
/// server fails the check, operations fail with [`Configuration`](crate::ErrorKind::Configuration),
/// and the store neither reads records from the server nor writes any to it. If the user may not
/// run `INFO`, the store cannot see these settings; it uses the server, and reports the tracing
/// event `unchecked`.
///
/// A repeated check of a Cluster ignores nodes that do not reply, so a dead node makes only its own
/// keys unavailable.
///
/// The store never reads records from replicas. A demoted primary refuses all scripts at once if
/// its `replica-read-only` is `yes`, which is Redis's default. With `no`, the check finds the
/// demotion after 10 s at most.
///
/// A server that is full refuses new claims with [`StoreFull`](crate::ErrorKind::StoreFull).
/// Replays still work, and owners can still end their attempts. While a server refuses writes, a
/// claim takes one more round trip.
///
/// # Rights
///
/// A dedicated user (Redis ACL) needs these commands, on keys and shard channels with the store's
/// prefix:
///
/// ```text
/// ACL SETUSER app on >secret resetkeys ~idempotency:* resetchannels &idempotency:* -@all +eval +evalsha +get +set +del +pexpireat +time +spublish +ssubscribe +sunsubscribe +wait +info
/// ```
///
/// * Only [`with_replication`](RedisStoreBuilder::with_replication) needs `+wait`.
/// * A Cluster also needs `+cluster|slots +ping +asking`.
/// * A database other than 0 (`redis://127.0.0.1/1`) also needs `+select`.
/// * Without `+spublish`, `+ssubscribe`, `+sunsubscribe` and the channels, waiters poll.
/// * Without `+info`, the store cannot see the settings of the server, as described above.
///
/// If the user lacks any other of these commands, the store cannot be made: `connect` fails with
/// [`Configuration`](crate::ErrorKind::Configuration), and the cause names the command.
///
/// # Waiting
///
/// If a store made its own connection ([`connect`](Self::connect),
/// [`from_client`](Self::from_client)), the server notifies it of changes over that connection.
/// Renewals and first claims send no notification, because nobody waits for them. On a connection
/// of yours or a Cluster, [`watch`](Store::watch) never resolves, and waiters poll. The layer polls
/// every 500 ms.
///
/// # Connections
///
/// All operations share one connection. If it breaks, the store reconnects. If the server refuses
/// the login, for example because an operator has removed the user, operations fail with the
/// server's refusal, and the store logs in again with a later operation, at most once a second. On
/// a connection of yours, only that connection decides whether it reconnects; see
/// [`use_connection_manager`](RedisStoreBuilder::use_connection_manager). The store repeats no
/// operation by itself. It needs a tokio runtime with I/O and timers, and lives on the runtime in
/// which it was made.
///
/// # Defaults
///
/// * prefix of keys: `idempotency:`
/// * response timeout: 500 ms
/// * no wait for replicas
///
/// Leases and retentions are capped at 100 years. Clones share one store.
#[derive(Clone)]
pub struct RedisStore(Arc<Server>);

impl RedisStore {
    /// Connects to a server with the default settings:
    /// `redis://[user:password@]host[:port][/database]`.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the URL is invalid, the server refuses
    /// the credentials, is older than 7.0, is a replica or may evict records, or the user lacks a
    /// right. [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be
    /// reached.
    pub async fn connect(url: &str) -> Result<Self, Error> {
        Self::builder().connect(url).await
    }

    /// Connects with a client of yours and the default settings; see
    /// [`RedisStoreBuilder::connect_client`].
    ///
    /// # Errors
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn from_client(client: redis::Client) -> Result<Self, Error> {
        Self::builder().connect_client(client).await
    }

    /// Uses a connection of yours with the default settings; see
    /// [`RedisStoreBuilder::use_connection_manager`].
    ///
    /// # Errors
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn from_connection_manager(connection: ConnectionManager) -> Result<Self, Error> {
        Self::builder().use_connection_manager(connection).await
    }

    /// Uses a Redis Cluster with the default settings; see [`RedisStoreBuilder::use_cluster`].
    ///
    /// # Errors
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn from_cluster(connection: ClusterConnection) -> Result<Self, Error> {
        Self::builder().use_cluster(connection).await
    }

    /// Returns a builder, for a store with other settings.
    #[must_use]
    pub fn builder() -> RedisStoreBuilder {
        RedisStoreBuilder::new()
    }
}

impl fmt::Debug for RedisStore {
    /// Shows settings and figures, but no address and no credential.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RedisStore").field(&*self.0).finish()
    }
}

impl Store for RedisStore {
    type Watch = RedisWatch;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        self.0.claim(claim).await
    }

    fn claim_limit(&self) -> Option<Duration> {
        self.0.claim_limit()
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        detach_on_drop(Arc::clone(&self.0).renew(*key, owner, lease)).await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        detach_on_drop(Arc::clone(&self.0).complete(*key, owner, outcome.clone(), retention)).await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        detach_on_drop(Arc::clone(&self.0).release(*key, owner)).await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        detach_on_drop(Arc::clone(&self.0).resolve(*key, fence, resolution.clone())).await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        self.0.peek(key).await
    }

    async fn watch(&self, key: &StorageKey) -> Result<RedisWatch, Error> {
        self.0.watch(key).await
    }
}

/// Runs an operation to its end, even if its caller drops it. The client never sends a request
/// whose future is dropped before it is written.
fn detach_on_drop<T: Send + 'static>(
    operation: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> impl Future<Output = Result<T, Error>> + Send {
    let caught = catch_panic(operation).map(|done| done.unwrap_or(Err(failure::PANICKED)));
    match crate::detach::detach_on_drop(caught, None) {
        Some(operation) => Either::Left(operation),
        None => Either::Right(ready(Err(failure::NO_RUNTIME))),
    }
}
