//! A connection of the pool that is in use by one operation.
//!
//! Closing a socket does not stop the work of its backend. The backend would continue to wait for a
//! lock or a standby, and no pool would count it (I10). So an operation whose caller has left keeps
//! its connection until the server has replied.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{Either, select};
use sqlx::Connection;
use sqlx::postgres::{PgConnection, PgPool};
use tokio::sync::Notify;

use super::ask::{Failed, Fate};
use super::error::failed;
use super::progress::Progress;
use super::spare::{Spare, Turn, Used};
use crate::catch_panic::catch_panic;
use crate::clock::{sleep, within};
use crate::detach::detach_on_drop;
use crate::error::Error;

pub(super) const TIMED_OUT: Error = Error::store_unavailable("the database did not reply in time");

pub(super) const NO_RUNTIME: Error =
    Error::store_unavailable("a PostgreSQL store must be used from within a tokio runtime");

/// A connection of the pool. If it is dropped before [`finish`](Self::finish), the connection is
/// closed, because its next reply would belong to this operation.
pub(crate) struct PooledConnection {
    used: Option<Used>,
    /// The owner of idle connections, if the connection belongs to a store.
    spare: Option<Arc<Spare>>,
    /// The turn of the operation. It ends when the connection is free again.
    turn: Turn,
}

async fn acquire(pool: &PgPool) -> Result<Used, Error> {
    // Boxed because the future includes the making of a connection with TLS. Unboxed, every
    // operation would embed it twice.
    let acquired = catch_driver_panic(Box::pin(pool.acquire())).await?;
    acquired.map(Used::new).map_err(failed)
}

impl PooledConnection {
    pub(crate) async fn from(pool: &PgPool) -> Result<Self, Error> {
        Ok(Self {
            used: Some(acquire(pool).await?),
            spare: None,
            turn: None,
        })
    }

    /// Takes an idle connection of the store, if no operation waits for one.
    pub(super) fn from_spare(spare: &Arc<Spare>) -> Option<Self> {
        let turn = spare.turn_now()?;
        let used = spare.take()?;
        Some(Self::of(spare, used, turn))
    }

    /// Takes an idle connection of the store, or one of its pool.
    pub(super) async fn from_store(spare: &Arc<Spare>, pool: &PgPool) -> Result<Self, Error> {
        let turn = spare.turn().await;
        if let Some(used) = spare.take() {
            return Ok(Self::of(spare, used, turn));
        }
        let waiting = spare.wait();
        let acquired = acquire(pool).await;
        drop(waiting);
        Ok(Self::of(spare, acquired?, turn))
    }

    fn of(spare: &Arc<Spare>, used: Used, turn: Turn) -> Self {
        Self {
            used: Some(used),
            spare: Some(Arc::clone(spare)),
            turn,
        }
    }

    pub(crate) fn connection(&mut self) -> Result<&mut PgConnection, Failed> {
        const GONE: Error = Error::store_unavailable("the connection was already returned");
        let used = self.used.as_mut().ok_or(Failed::refused(GONE))?;
        Ok(&mut used.connection)
    }

    /// Ends an operation, and returns its connection. If the fate of the operation is unknown,
    /// closes the connection.
    pub(crate) fn finish<T>(mut self, done: Result<T, Failed>) -> Result<T, Failed> {
        if matches!(&done, Err(failed) if failed.fate == Fate::Unknown) {
            return done;
        }
        match (self.used.take(), &self.spare) {
            (Some(used), Some(spare)) if done.is_ok() => spare.store(used, self.turn.take()),
            (Some(used), _) => used.return_to_pool(self.turn.take()),
            (None, _) => {}
        }
        done
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if let Some(used) = self.used.take() {
            used.close();
        }
    }
}

/// Runs an operation on `table` that owns its connection. The caller gets an error after `limit`,
/// and may leave earlier. The operation then continues in its own task until the server has
/// replied.
pub(crate) async fn run_detachable<T: Send + 'static>(
    limit: Duration,
    pool: &PgPool,
    table: &Arc<str>,
    operation: impl Future<Output = Result<T, Failed>> + Send + 'static,
) -> Result<T, Error> {
    let (pool, table) = (pool.clone(), Arc::clone(table));
    let operation = async move {
        let hurry = Notify::const_new();
        run_until_reply(limit, &pool, &table, &hurry, operation).await
    };
    let operation = detach_on_drop(operation, None).ok_or(NO_RUNTIME)?;
    let done = within(limit, operation)
        .await
        .unwrap_or(Err(Failed::unknown(TIMED_OUT)));
    done.map_err(Error::from)
}

/// Runs an operation until the server has replied, however long that takes.
///
/// Gives up only if the connection is dead without a notice. That is the case if the server can be
/// reached by another connection, and works on nothing that could be this operation. Checks this
/// once `limit` has passed since the operation's last statement, then at intervals, and when
/// `hurry` signals that a caller waits.
pub(super) async fn run_until_reply<T>(
    limit: Duration,
    pool: &PgPool,
    table: &str,
    hurry: &Notify,
    operation: impl Future<Output = Result<T, Failed>>,
) -> Result<T, Failed> {
    const SHORTEST: Duration = Duration::from_millis(500);
    const VANISHED: Error = Error::store_unavailable("the connection to the database was lost");
    let (progress, mut pause) = (Progress::start(), limit);
    let mut operation = pin!(catch_driver_panic(progress.watch(operation)));
    let mut hurried = pin!(hurry.notified());
    loop {
        // Wait for the pause or a signal, and then until the last statement is at least `limit`
        // old.
        let waits = async {
            drop(within(pause, hurried.as_mut()).await);
            loop {
                let left = limit.saturating_sub(progress.elapsed());
                if left.is_zero() {
                    break;
                }
                sleep(left).await;
            }
        };
        let mut done = match select(operation.as_mut(), pin!(waits)).await {
            Either::Left((done, _)) => Some(done),
            Either::Right(_) => None,
        };
        if done.is_none() {
            // Subscribe before the check, so that no signal during the check is missed.
            hurried.set(hurry.notified());
            if !Box::pin(may_be_running(pool, table, progress.elapsed())).await {
                // The operation may have ended during the check.
                done = Some(
                    operation
                        .as_mut()
                        .now_or_never()
                        .unwrap_or(Ok(Err(Failed::unknown(VANISHED)))),
                );
            }
        }
        if let Some(done) = done {
            return done.unwrap_or_else(|error| Err(Failed::unknown(error)));
        }
        pause = limit.max(SHORTEST) * 2;
    }
}

/// Selects whether a backend may be working on an operation on `{table}` that sent its last
/// statement `{waited}` seconds ago.
///
/// `SET LOCAL ROLE NONE` is needed because a role that was set would hide the work of the role that
/// has logged in. The server counts from the last message of the statement, and an earlier message
/// may have waited for a lock, so half of `{waited}` is enough. If the options of a pool were
/// changed, it may have older backends of another role. PostgreSQL hides their state and type, but
/// not their locks, which they hold until the end of the commit. A reader that has its lock, such
/// as a dump, does not count. Neither does autovacuum, which has no user.
const IS_RUNNING: &str = "BEGIN READ ONLY; SET LOCAL ROLE NONE; \
    SELECT EXISTS (SELECT FROM pg_stat_activity a \
        WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.usesysid IS NOT NULL \
          AND coalesce(a.backend_type, 'client backend') = 'client backend' \
          AND CASE \
            WHEN a.usename <> session_user THEN EXISTS ( \
                SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation \
                WHERE l.pid = a.pid AND c.relname = '{table}' \
                  AND (NOT l.granted OR l.mode <> 'AccessShareLock')) \
            WHEN a.state IS NULL OR a.query_start IS NULL OR a.state = 'disabled' THEN true \
            ELSE a.state = 'active' AND a.query_start < clock_timestamp() - make_interval(secs => {waited} / 2) \
          END)::text; \
    COMMIT";

/// Whether the server may be working on an operation that sent its last statement `waited` ago.
/// True if the server cannot be reached.
async fn may_be_running(pool: &PgPool, table: &str, waited: Duration) -> bool {
    const LONGEST: Duration = Duration::from_secs(5);
    let check = async {
        let mut connection = PgConnection::connect_with(&pool.connect_options()).await?;
        let waited = format!("{:.3}", waited.as_secs_f64().min(86_400.0));
        let text = IS_RUNNING.replace("{table}", table).replace("{waited}", &waited);
        // A simple query is one message, which no pooler can split.
        let row = sqlx::raw_sql(sqlx::AssertSqlSafe(text))
            .fetch_one(&mut connection)
            .await?;
        connection.close().await?;
        sqlx::Row::try_get::<String, _>(&row, 0)
    };
    match within(LONGEST, catch_panic(check)).await {
        Ok(Ok(Ok(is_active))) => is_active != "false",
        _ => true,
    }
}

/// Turns a panic of sqlx into an error. sqlx 0.9 panics on some messages that no PostgreSQL
/// server sends.
pub(super) fn catch_driver_panic<T>(talk: impl Future<Output = T>) -> impl Future<Output = Result<T, Error>> {
    const NONSENSE: Error =
        Error::store_unavailable("the peer is no PostgreSQL server, or its reply was damaged on the way");
    catch_panic(talk).map(|done| done.map_err(|_| NONSENSE))
}
