//! A store in PostgreSQL: one row per key, one statement per operation, and all times by the
//! server's clock.

mod ask;
mod connect;
mod error;
mod migration;
mod operations;
mod pooled;
mod pooler;
mod progress;
mod pursuit;
mod row;
mod session;
mod spare;
mod sweep;
mod table;
mod watch;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool};

use self::ask::Failed;
pub(crate) use self::ask::{Bound, Sending, Within};
pub use self::connect::PostgresStoreBuilder;
pub(crate) use self::error::failed;
pub(crate) use self::migration::make_table;
use self::operations::{Completing, Connection};
use self::pooled::NO_RUNTIME;
pub(crate) use self::pooled::{PooledConnection, run_detachable};
pub(crate) use self::pooler::Gate;
use self::pursuit::Pursuits;
use self::spare::Spare;
use self::sweep::Sweeping;
use self::table::Statements;
pub(crate) use self::table::{Statement, TableName, statements};
pub use self::watch::PostgresWatch;
use self::watch::Watchers;
use super::Store;
use super::checked::Checked;
use crate::clock::within;
use crate::detach::detach_on_drop;
use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};

/// A store in a table of a PostgreSQL server (13 or later), for any number of processes (feature
/// `postgres`).
///
/// It fulfils the whole [contract](Store#contract) as long as the server keeps the transactions
/// that it has committed. It does not after a failover to a standby that replicates asynchronously,
/// after a backup was restored, or with `synchronous_commit = off` or `fsync = off`.
///
/// An effect in the *same* PostgreSQL database happens exactly once with `Lease::complete_in`: the
/// effect and the response commit in one transaction, or neither does.
///
/// # Cost
///
/// Each operation takes one statement and one round trip. A first run takes two operations. A
/// replay takes one, which writes nothing and locks nothing. A claim that takes over, repeats or
/// finds the row expired takes one more statement, and so does a completion that is repeated or
/// superseded. A store also uses one connection while a request waits for another process.
/// Notifications are sent only for keys with a waiter, because each notification takes a lock that
/// all commits of the server share.
///
/// # When the server does not reply
///
/// The server ends a statement that waits too long for a lock. The caller gets an error after the
/// [timeout](PostgresStoreBuilder::with_timeout). The connection stays in use until the server has
/// replied, so no more backends wait than the pool has connections. The store never cancels a
/// commit that waits for a synchronous standby, because a cancelled wait leaves the commit on the
/// primary alone. If the fate of a claim is unknown, the store looks the claim up until it knows,
/// for at most 1,024 claims at a time, and releases a grant that reached no caller. It continues
/// after a layer has been drained, as long as the store lives.
///
/// # Sessions of a pool
///
/// If an application drops `pool.begin()` while it waits, for example by a time limit, it leaves an
/// open transaction in a session of the pool. The store detects this in the reply to its own
/// statement. It rolls the transaction back, and sends the statement again. So an operation that
/// has succeeded is committed.
///
/// # Isolation
///
/// The store works in the same way at every default isolation level of the role. Use READ COMMITTED
/// for your own transactions. At the stricter levels, a transaction that conflicts with another one
/// fails, and you have to roll it back and run it again.
///
/// # Poolers
///
/// A pooler in session mode needs no setting. A pooler in transaction mode needs
/// [`with_transaction_pooler`](PostgresStoreBuilder::with_transaction_pooler); without it, the
/// store refuses the pooler.
///
/// # Setup
///
/// [`connect`](Self::connect) makes the table if it is missing and the role may create it. For a
/// role that may not, make the table beforehand: call [`migrate`](Self::migrate) as another role,
/// or run the SQL of [`schema`](Self::schema) with your migrations. This example prints the SQL
/// without a connection:
///
/// ```
/// # use tower_idempotency::PostgresStore;
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = sqlx::PgPool::connect_lazy("postgres://localhost/app")?;
/// println!("{}", PostgresStore::builder().with_pool(pool)?.schema());
/// # Ok(())
/// # }
/// ```
///
/// With a pool of yours, the store checks nothing before the first operation, so call
/// [`check`](Self::check) at the start of your program. A task of the store deletes expired rows in
/// batches, every 60 s give or take a half.
///
/// Before a store serves its first operation, it [checks](Self::check) the server and the table.
/// All operations that wait share one check. This check and later operations fail with
/// [`Configuration`](crate::ErrorKind::Configuration) if the table is missing or has other columns,
/// a right is missing, or the server is read-only (a standby, or `default_transaction_read_only`).
///
/// # Rights
///
/// A role that may not make tables can use an existing table, also with [`connect`](Self::connect).
/// It needs only these rights:
///
/// ```sql
/// GRANT USAGE ON SCHEMA public TO web;
/// GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_records TO web;
/// ```
///
/// ```no_run
/// # async fn start() -> Result<(), tower_idempotency::Error> {
/// use tower_idempotency::{IdempotencyLayer, PostgresStore};
///
/// let store = PostgresStore::connect("postgres://app@localhost/shop").await?;
/// let layer = IdempotencyLayer::new(store);
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
///
/// # Defaults
///
/// * table `idempotency_records`
/// * a pool of 16 connections, and 5 s to get one of them
/// * 5 s for an operation once it has its connection
#[derive(Clone)]
pub struct PostgresStore(Arc<Inner>);

struct Inner {
    pool: PgPool,
    table: TableName,
    timeout: Duration,
    checked: Checked,
    /// Whether the check has passed in a transaction of the application.
    is_checked_for_callers: AtomicBool,
    sending: Sending,
    statements: Statements,
    gate: Gate,
    pursuits: Pursuits,
    spare: Arc<Spare>,
    watchers: Arc<Watchers>,
    sweeping: Sweeping,
}

impl PostgresStore {
    /// Connects by a URL, makes the table and its index if they are missing, and checks the server
    /// and the table.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the URL, the credentials, the server's
    /// version or the table cannot be used.
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be reached.
    pub async fn connect(url: &str) -> Result<Self, Error> {
        let store = Self::builder().connect(url).await?;
        store.migrate().await?;
        store.check().await?;
        Ok(store)
    }

    /// Returns a builder, for a store with another table, your own pool, or other times.
    pub fn builder() -> PostgresStoreBuilder {
        PostgresStoreBuilder::new()
    }

    /// Returns the pool of connections. The sessions of the store's own pool are [configured for
    /// it](PostgresStoreBuilder::connect). After this call, the store no longer relies on them,
    /// because you may change a session or leave a transaction open. Each of its statements then
    /// takes some microseconds longer, and the store no longer keeps idle connections between its
    /// operations.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        self.0.sending.share();
        self.0.spare.end();
        &self.0.pool
    }

    /// Claims a key within a transaction of yours, for work that changes nothing but this database.
    /// Do the work, complete it with [`complete_in`](Self::complete_in) in the same transaction,
    /// and commit. Another claim of the same key waits for the commit, and then gets its outcome.
    ///
    /// # Errors
    ///
    /// The same as for [`Store::claim`]. Roll the transaction back.
    pub async fn claim_in(&self, connection: &mut PgConnection, claim: &Claim) -> Result<Decision, Error> {
        if let Err(failed) = self.check_on(connection).await {
            return Err(failed.error);
        }
        Ok(self.within_callers(connection).claim(claim).await?)
    }

    /// Records an outcome within a transaction of yours. If the result is not
    /// [`Completion::Completed`], roll the transaction back: another owner holds the key, or the
    /// key is completed already. The latter includes a completion by this owner, because a commit
    /// whose reply was lost may have taken effect.
    ///
    /// # Errors
    ///
    /// The same as for [`Store::complete`]. Roll the transaction back.
    pub async fn complete_in(
        &self,
        connection: &mut PgConnection,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let mut connection = self.within_callers(connection);
        Ok(connection
            .complete(key, owner, outcome, retention, Completing::WithEffect)
            .await?)
    }

    /// Downcasts to `PostgresStore`, looking through `Arc`s and boxes. `None` if the innermost
    /// store is of another type.
    pub(crate) fn within<S: Store>(store: &S) -> Option<&Self> {
        store.innermost().downcast_ref()
    }

    fn on<'c>(&'c self, connection: &'c mut PgConnection) -> Connection<'c> {
        Connection {
            connection,
            sending: &self.0.sending,
            statements: &self.0.statements,
            within: Within::Own,
        }
    }

    /// Returns the statements on a connection with an open transaction of the application.
    fn within_callers<'c>(&'c self, connection: &'c mut PgConnection) -> Connection<'c> {
        Connection {
            within: Within::Callers,
            ..self.on(connection)
        }
    }

    /// Checks the table if that is due, and acquires a connection for one operation.
    async fn acquire(&self) -> Result<PooledConnection, Error> {
        if self.0.checked.passed().is_none() {
            Box::pin(self.check_once()).await?;
        }
        self.acquire_unchecked().await
    }

    async fn acquire_unchecked(&self) -> Result<PooledConnection, Error> {
        const LONGEST: Duration = Duration::from_secs(5);
        self.0.gate.pass(&self.0.pool, &self.0.sending).await?;
        if let Some(pooled) = PooledConnection::from_spare(&self.0.spare) {
            return Ok(pooled);
        }
        // An operation waits for a connection of the store's own pool for 5 s, as documented.
        let longest = match self.0.spare.is_of_own_pool() {
            true => LONGEST,
            false => LONGEST.max(self.0.timeout),
        };
        // All connections of the pool may wait for the server. Another operation must not wait as
        // long as they do.
        let pooled = within(longest, PooledConnection::from_store(&self.0.spare, &self.0.pool)).await;
        pooled.unwrap_or(Err(BUSY))
    }

    /// Runs an operation on a connection of the pool. The operation continues if its caller leaves
    /// or times out.
    async fn operate<T, F>(&self, operation: impl FnOnce(Self, PooledConnection) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failed>> + Send + 'static,
    {
        let pooled = self.acquire().await?;
        run_detachable(
            self.0.timeout,
            &self.0.pool,
            self.0.table.name(),
            operation(self.clone(), pooled),
        )
        .await
    }

    /// Runs an operation to its end, even if its caller drops it. Otherwise a dropped operation
    /// might never be sent.
    async fn detached<T, F>(&self, operation: impl FnOnce(Self) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        detach_on_drop(operation(self.clone()), None).ok_or(NO_RUNTIME)?.await
    }
}

impl Store for PostgresStore {
    type Watch = PostgresWatch;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        self.start_sweeper();
        self.claim_and_pursue(claim).await
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        let key = *key;
        self.operate(move |store, mut pooled| async move {
            let done = store.on(pooled.connection()?).renew(&key, owner, lease).await;
            pooled.finish(done)
        })
        .await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let (key, outcome) = (*key, outcome.clone());
        self.detached(move |store| async move {
            let completing = move |store: Self, mut pooled: PooledConnection| async move {
                let mut connection = store.on(pooled.connection()?);
                let done = connection
                    .complete(&key, owner, &outcome, retention, Completing::Alone)
                    .await;
                pooled.finish(done)
            };
            store.operate(completing).await
        })
        .await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        let key = *key;
        self.detached(move |store| async move {
            let releasing = move |store: Self, mut pooled: PooledConnection| async move {
                let done = store.on(pooled.connection()?).release(&key, owner).await;
                pooled.finish(done)
            };
            store.operate(releasing).await
        })
        .await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        let (key, resolution) = (*key, resolution.clone());
        self.operate(move |store, mut pooled| async move {
            let done = store.on(pooled.connection()?).resolve(&key, fence, &resolution).await;
            pooled.finish(done)
        })
        .await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let key = *key;
        self.operate(move |store, mut pooled| async move {
            let done = store.on(pooled.connection()?).peek(&key).await;
            pooled.finish(done)
        })
        .await
    }

    async fn watch(&self, key: &StorageKey) -> Result<PostgresWatch, Error> {
        let Some(watch) = self.0.watchers.register(&self.0.pool, &self.0.spare, key).await? else {
            return Ok(PostgresWatch::pause());
        };
        let key = *key;
        self.operate(move |store, mut pooled| async move {
            let done = store.on(pooled.connection()?).watch(&key).await;
            pooled.finish(done)
        })
        .await?;
        Ok(watch)
    }
}

const BUSY: Error =
    Error::store_unavailable("no connection of the pool is free; all of them are in use or wait for the database");

impl fmt::Debug for PostgresStore {
    /// Shows figures, but no address and no credential.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore")
            .field("connections", &self.0.pool.size())
            .field("spare", &self.0.spare)
            .field("watched_keys", &self.0.watchers.len())
            .field("pursued_claims", &self.0.pursuits.len())
            .finish_non_exhaustive()
    }
}
