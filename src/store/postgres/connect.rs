//! The configuration of a store, its connections, and the check of its table.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::FutureExt;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions, PgRow};
use sqlx::{AssertSqlSafe, Connection, Executor, Row};

use super::ask::{Bound, Failed, Sending, Within};
use super::error::{DENIED, NO_TABLE, OTHER_TABLE, READ_ONLY, failed, of_connect};
use super::migration::make_table;
use super::pooled::{catch_driver_panic, run_detachable};
use super::pooler::{Gate, refuse_pooler};
use super::pursuit::Pursuits;
use super::spare::{LONGEST_TEST, MAY_BE_DEAD, Spare};
use super::sweep::Sweeping;
use super::table::{Statements, TableName};
use super::watch::Watchers;
use super::{Inner, PostgresStore};
use crate::clock::within;
use crate::error::Error;
use crate::store::checked::Checked;

/// Builder of a [`PostgresStore`]. See there for the defaults.
#[derive(Clone, Debug)]
#[must_use]
pub struct PostgresStoreBuilder {
    table: String,
    sweep_interval: Duration,
    timeout: Duration,
    behind_pooler: bool,
}

impl PostgresStoreBuilder {
    pub(super) fn new() -> Self {
        Self {
            table: "idempotency_records".to_owned(),
            sweep_interval: Duration::from_secs(60),
            timeout: Duration::from_secs(5),
            behind_pooler: false,
        }
    }

    /// Sets the table: `name` or `schema.name`, each of 1 to 48 characters of a to z, 0 to 9 and
    /// `_`, not beginning with a digit. Without a schema, the `search_path` of the connection
    /// decides. Default: `idempotency_records`.
    pub fn with_table(mut self, name: impl Into<String>) -> Self {
        self.table = name.into();
        self
    }

    /// Sets how often the store deletes expired rows. At least 1 s. Default: 60 s. Each pause
    /// varies by up to a half, so that processes do not sweep at the same time.
    pub fn with_sweep_interval(mut self, interval: Duration) -> Self {
        self.sweep_interval = interval.max(Duration::from_secs(1));
        self
    }

    /// Sets how long an operation may take once it has its connection. Default: 5 s. After that,
    /// the caller gets an error. The server ends a statement earlier if it waits for a lock for two
    /// fifths of this time. The connection stays in use until the server has replied, because a
    /// backend continues its work after its connection is closed. So the number of waiting backends
    /// never exceeds the number of connections in the pool. If a claim is granted after its caller
    /// has left, the store releases the key.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Prepares the store for a pooler that lends a server for one transaction at a time, such as
    /// PgBouncer with `pool_mode = transaction`. Each operation is then a transaction of unnamed
    /// statements, which takes four round trips instead of one. Waiters look at the record every
    /// 250 ms instead of listening. In a URL, `transaction_pooler=true` has the same effect.
    ///
    /// Without this setting, [`connect`](Self::connect) refuses such a pooler. With a pool of
    /// yours, the first operation refuses it.
    ///
    /// [`PostgresStore::complete_in`] and [`PostgresStore::claim_in`] work in your own
    /// transactions, too. On a pool of yours, set `statement_cache_capacity(0)` for your own
    /// statements.
    pub const fn with_transaction_pooler(mut self) -> Self {
        self.behind_pooler = true;
        self
    }

    /// Makes a store with a pool of its own: 16 connections, and 5 s to get one of them. The store
    /// tests a connection that was idle for a second before it uses the connection, which takes one
    /// more round trip and at most a second. The store keeps these connections between its
    /// operations, so an operation takes one round trip. Does not make the table; see
    /// [`PostgresStore::migrate`]. The first operation [checks](PostgresStore::check) the table.
    ///
    /// The sessions of this pool do not depend on the settings of the role or the database, unless
    /// a transaction pooler is set. They are READ COMMITTED and commit synchronously. They limit
    /// the wait for a lock to two fifths of the [timeout](Self::with_timeout), and a statement to
    /// four fifths. A statement fails if a policy would hide rows from it. Use a pool of your own
    /// for statements that need longer.
    ///
    /// # Errors
    ///
    /// The same as for [`PostgresStore::connect`].
    pub async fn connect(mut self, url: &str) -> Result<PostgresStore, Error> {
        const URL: Error = Error::configuration(
            "the URL of the database cannot be used; write postgres://user:password@host:port/database",
        );
        // "Schemes are case-insensitive" (RFC 3986, section 3.1).
        let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
        if !["postgres", "postgresql"]
            .iter()
            .any(|known| scheme.eq_ignore_ascii_case(known))
        {
            return Err(URL);
        }
        let (url, behind_pooler) = transaction_pooler(url).ok_or(URL)?;
        self.behind_pooler = behind_pooler.unwrap_or(self.behind_pooler);
        let mut options = PgConnectOptions::from_str(&url).map_err(|_| URL)?;
        let gate = if self.behind_pooler {
            // PgBouncer refuses startup parameters that it does not know.
            options = options.extra_float_digits(None).statement_cache_capacity(0);
            Gate::default()
        } else {
            // Check before the first session is configured. Behind a pooler, the settings would
            // stay with the server, and its next client would get them.
            Box::pin(refuse_pooler(&options)).await?;
            Gate::open()
        };
        let session: Option<Arc<str>> = (!self.behind_pooler).then(|| session(self.timeout).into());
        let pool = PgPoolOptions::new()
            .max_connections(16)
            .acquire_timeout(Duration::from_secs(5))
            // With this test, each operation would take two round trips.
            .test_before_acquire(false)
            .after_connect(move |connection, _| {
                let session = session.clone();
                Box::pin(async move {
                    if let Some(session) = session {
                        connection.execute(sqlx::raw_sql(AssertSqlSafe(session))).await?;
                    }
                    Ok(())
                })
            })
            // After a restart of the server, every idle connection is dead, and many operations
            // would fail.
            .before_acquire(|connection, about| {
                Box::pin(async move {
                    if about.idle_for < MAY_BE_DEAD {
                        return Ok(true);
                    }
                    // After an error, sqlx closes the connection without a message to the server.
                    let tested = within(LONGEST_TEST, connection.ping()).await;
                    tested.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|()| true)
                })
            })
            .connect_with(options);
        let pool = catch_driver_panic(Box::pin(pool)).await?.map_err(of_connect)?;
        // Behind a pooler in transaction mode, all clients of the pooler share the sessions.
        let is_private = !self.behind_pooler;
        self.build(pool, gate, is_private)
    }

    /// Makes a store with a pool of yours. Does not make the table. The first operation
    /// [checks](PostgresStore::check) the table.
    ///
    /// An operation waits for a connection for 5 s or its timeout, whichever is longer. While a
    /// request waits for another process, the store uses one of the connections to listen. If the
    /// pool has a single connection, waiters look at the record every 250 ms instead. With
    /// `test_before_acquire`, which is on by default, each operation takes a second round trip.
    ///
    /// The store does not change the sessions of your pool. Its statements work at every isolation
    /// level: if one fails because of the level, the store repeats it in a READ COMMITTED
    /// transaction. If the store gets a session with an open transaction, for example from an
    /// `after_connect` hook, it rolls the transaction back. An acknowledged record survives a crash
    /// of the server only if the sessions do not set `synchronous_commit = off`.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the name of the table cannot be used.
    pub fn with_pool(self, pool: PgPool) -> Result<PostgresStore, Error> {
        self.build(pool, Gate::default(), false)
    }

    fn build(self, pool: PgPool, gate: Gate, is_private: bool) -> Result<PostgresStore, Error> {
        let table = TableName::parse(&self.table)?;
        let connections = pool.options().get_max_connections();
        let polls = self.behind_pooler || connections < 2;
        let spare = match is_private {
            true => Spare::of_own_pool(connections),
            false => Arc::default(),
        };
        Ok(PostgresStore(Arc::new(Inner {
            pool,
            sending: Sending::new(self.timeout, self.behind_pooler, is_private),
            statements: Statements::new(&table),
            watchers: Watchers::new(table.name(), polls),
            sweeping: Sweeping::every(self.sweep_interval),
            timeout: self.timeout,
            checked: Checked::not_yet(),
            is_checked_for_callers: AtomicBool::new(false),
            gate,
            pursuits: Pursuits::default(),
            spare,
            table,
        })))
    }
}

/// Returns the URL without `transaction_pooler`, and the value of that parameter; `None` if the
/// value is neither true nor false.
fn transaction_pooler(url: &str) -> Option<(String, Option<bool>)> {
    let Some((url, query)) = url.split_once('?') else {
        return Some((url.to_owned(), None));
    };
    let (ours, others): (Vec<&str>, Vec<&str>) = query
        .split('&')
        .partition(|pair| pair.split('=').next() == Some("transaction_pooler"));
    let behind_pooler = match ours.last() {
        None => None,
        Some(&"transaction_pooler=true") => Some(true),
        Some(&"transaction_pooler=false") => Some(false),
        Some(_) => return None,
    };
    Some((format!("{url}?{}", others.join("&")), behind_pooler))
}

/// Returns the SQL that configures the sessions for the statements. With `row_security = off`, a
/// statement fails if a policy would hide rows from it. Otherwise a hidden record would count as
/// absent.
fn session(timeout: Duration) -> String {
    let millis = |timeout: Duration| timeout.as_millis().clamp(1, 86_400_000);
    format!(
        "SET default_transaction_isolation = 'read committed'; \
         SET default_transaction_deferrable = off; SET row_security = off; SET TimeZone = 'UTC'; SET lock_timeout = '{}ms'; \
         SET statement_timeout = '{}ms'; \
         SELECT set_config('synchronous_commit', \
             CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false)",
        millis(timeout / 5 * 2),
        millis(timeout / 5 * 4)
    )
}

impl PostgresStore {
    /// Returns the SQL that makes the table and its index, for your own migrations. It can be run
    /// again.
    #[must_use]
    pub fn schema(&self) -> String {
        self.0.statements.schema.text().to_owned()
    }

    /// Makes the table and its index if they are missing. Waits for at most 60 s. If both exist,
    /// the role needs no right to make them. Many processes may call this at the same time.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the role lacks the right to make them.
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be reached.
    pub async fn migrate(&self) -> Result<(), Error> {
        const LONGEST: Duration = Duration::from_secs(60);
        const LOCK: i64 = 2_153_723_918_930_542_593;
        // PostgreSQL checks the right to make a table before `CREATE TABLE IF NOT EXISTS` looks for
        // the table.
        if self.inspect().await?.is_some_and(|table| table.is_indexed) {
            return Ok(());
        }
        let mut pooled = self.acquire_unchecked().await?;
        let store = self.clone();
        let migrating = async move {
            let migrated = make_table(pooled.connection()?, LOCK, &store.0.statements.schema).await;
            pooled.finish(migrated)
        };
        run_detachable(LONGEST, &self.0.pool, self.0.table.name(), migrating).await
    }

    /// Checks the server, the table and the role. The server must accept writes and have version 13
    /// or later. The table must exist, have its columns and be logged. The role must have the
    /// rights, and row-level security must not apply to it.
    ///
    /// Each store does this by itself before its first operation. Operations that begin meanwhile
    /// wait for the same check. If the check fails, the next operation repeats it.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the check fails.
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be reached.
    pub async fn check(&self) -> Result<(), Error> {
        check(self.inspect().await?.as_ref())?;
        self.0.checked.pass();
        Ok(())
    }

    /// Runs the check before the first operation. Operations that begin meanwhile share the run.
    pub(super) async fn check_once(&self) -> Result<(), Error> {
        let check = || {
            let store = self.clone();
            async move { store.check().await }.boxed()
        };
        self.0.checked.check(check).await.map(drop)
    }

    /// Runs the check in a transaction of the application, before the first claim in such a
    /// transaction. The role and the `search_path` of the application may differ from those of the
    /// pool, and its transaction may see a table that other transactions do not see. So this check
    /// and the check of the pool cannot replace each other.
    pub(super) async fn check_on(&self, connection: &mut PgConnection) -> Result<(), Failed> {
        if !self.0.is_checked_for_callers.load(Ordering::Acquire) {
            let table = self.inspect_on(connection, Within::Callers).await?;
            check(table.as_ref()).map_err(Failed::refused)?;
            self.0.is_checked_for_callers.store(true, Ordering::Release);
        }
        Ok(())
    }

    async fn inspect(&self) -> Result<Option<Table>, Error> {
        let mut pooled = self.acquire_unchecked().await?;
        let store = self.clone();
        let inspecting = async move {
            let table = store.inspect_on(pooled.connection()?, Within::Own).await;
            pooled.finish(table)
        };
        run_detachable(self.0.timeout, &self.0.pool, self.0.table.name(), inspecting).await
    }

    async fn inspect_on(&self, connection: &mut PgConnection, within: Within) -> Result<Option<Table>, Failed> {
        let Inner {
            sending,
            statements,
            table,
            ..
        } = &*self.0;
        let table = table.to_string();
        let bind = |inspect: Bound<'static>| inspect.bind(table.clone());
        let row = sending.ask_one(connection, within, &statements.inspect, bind).await?;
        let exists = row.try_get("exists").and_then(|exists: bool| match exists {
            true => Table::read(&row).map(Some),
            false => Ok(None),
        });
        exists.map_err(|error| Failed::refused(failed(error)))
    }
}

/// The state of the server and the table, as the server reports it.
struct Table {
    persistence: String,
    columns: Vec<String>,
    is_indexed: bool,
    missing_rights: Vec<String>,
    is_read_only: bool,
    /// Whether a policy of row-level security applies to the role.
    is_filtered: bool,
    server: i32,
}

impl Table {
    fn read(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            persistence: row.try_get("persistence")?,
            columns: row.try_get("columns")?,
            is_indexed: row.try_get("indexed")?,
            missing_rights: row.try_get("missing")?,
            is_read_only: row.try_get("read_only")?,
            is_filtered: row.try_get("filtered")?,
            server: row.try_get("version")?,
        })
    }
}

const COLUMNS: [&str; 15] = [
    "key bytea",
    "version smallint",
    "state smallint",
    "kind smallint",
    "fingerprint bytea",
    "nonce bytea",
    "fence bigint",
    "attempt integer",
    "lease bigint",
    "retention bigint",
    "lease_until bigint",
    "expires bigint",
    "watched boolean",
    "head bytea",
    "body bytea",
];

fn check(table: Option<&Table>) -> Result<(), Error> {
    const OLD: Error = Error::configuration("the PostgreSQL server is too old; upgrade it to version 13 or newer");
    const UNLOGGED: Error = Error::configuration(
        "the table of the records is unlogged or temporary, so a crash of the server would empty it and every request would run again; \
         run ALTER TABLE .. SET LOGGED",
    );
    const FILTERED: Error = Error::configuration(
        "row-level security applies to the role, and a record that it hides would count as absent; make the role the owner of the table, \
         or grant it BYPASSRLS",
    );
    let table = table.ok_or(NO_TABLE)?;
    if table.server < 130_000 {
        return Err(OLD);
    }
    if table.is_read_only {
        return Err(READ_ONLY);
    }
    let has = |column: &&str| table.columns.iter().any(|there| there == column);
    if !COLUMNS.iter().all(has) {
        return Err(OTHER_TABLE);
    }
    if !table.missing_rights.is_empty() {
        return Err(DENIED.with_source(format!("the role lacks {}", table.missing_rights.join(", "))));
    }
    if table.is_filtered {
        return Err(FILTERED);
    }
    if table.persistence != "p" {
        return Err(UNLOGGED);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(change: impl FnOnce(&mut Table)) -> String {
        let mut table = Table {
            persistence: "p".to_owned(),
            columns: COLUMNS.map(str::to_owned).to_vec(),
            is_indexed: true,
            missing_rights: Vec::new(),
            is_read_only: false,
            is_filtered: false,
            server: 150_000,
        };
        change(&mut table);
        check(Some(&table)).map_or_else(|error| error.to_string(), |()| "fine".to_owned())
    }

    #[test]
    fn an_unusable_table_is_refused_with_the_reason() {
        assert_eq!(message(|_| {}), "fine");
        assert_eq!(message(|table| table.columns.push("note text".to_owned())), "fine");
        assert!(message(|table| table.is_read_only = true).contains("read-only"));
        assert!(message(|table| table.is_filtered = true).contains("row-level security"));
        assert!(message(|table| table.missing_rights.push("DELETE".to_owned())).contains("lacks a right"));
        assert!(message(|table| table.server = 120_022).contains("too old"));
        assert_eq!(message(|table| table.server = 130_000), "fine");
        assert!(message(|table| table.persistence = "u".to_owned()).contains("unlogged"));
        assert!(message(|table| table.columns[6] = "fence integer".to_owned()).contains("other columns"));
        assert!(check(None).unwrap_err().to_string().contains("migrate"));
    }
}
