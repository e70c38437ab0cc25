//! How a store gets its connections and its table.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions, PgRow};
use sqlx::{Connection, Executor, Row};

use super::error::{failed, not_made, of_connect, DENIED, NO_TABLE, OTHER_TABLE, READ_ONLY};
use super::lent::{bounded, sound};
use super::sweep::Sweeping;
use super::table::{Statements, TableName};
use super::watch::Watchers;
use super::{Inner, PostgresStore};
use crate::error::{Error, ErrorKind};
use crate::store::checked::Checked;

/// How long a connection was idle that is asked whether it is well before it is used.
const MAY_BE_DEAD: Duration = Duration::from_secs(1);

/// Sets up a [`PostgresStore`]; see there for the defaults.
#[derive(Clone, Debug)]
#[must_use]
pub struct PostgresStoreBuilder {
    table: String,
    sweep_interval: Duration,
    timeout: Duration,
}

impl PostgresStoreBuilder {
    pub(super) fn new() -> Self {
        Self {
            table: "idempotency_records".to_owned(),
            sweep_interval: Duration::from_secs(60),
            timeout: Duration::from_secs(5),
        }
    }

    /// The table: `name` or `schema.name`, each of 1 to 48 characters out of a to z, 0 to 9 and `_`; `idempotency_records` by
    /// default. Without a schema the connection's `search_path` decides.
    pub fn with_table(mut self, name: impl Into<String>) -> Self {
        self.table = name.into();
        self
    }

    /// How often expired rows are deleted, give or take a half, so that processes do not do it all at once; 60 s by default, at
    /// least 1 s.
    pub fn with_sweep_interval(mut self, interval: Duration) -> Self {
        self.sweep_interval = interval.max(Duration::from_secs(1));
        self
    }

    /// How long an operation may take once it has its connection, which is closed after that; 5 s by default.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// A store with a pool of its own: 16 connections, 5 s to get one of them; one that was idle for a second is asked first whether
    /// it is well, which is one round trip more. Does not make the table; see
    /// [`PostgresStore::migrate`]. The first operation [checks](PostgresStore::check) it.
    ///
    /// # Errors
    ///
    /// As for [`PostgresStore::connect`].
    pub async fn connect(self, url: &str) -> Result<PostgresStore, Error> {
        const URL: Error = Error::new(
            ErrorKind::Configuration,
            "the URL of the database cannot be used; write postgres://user:password@host:port/database",
        );
        if !["postgres://", "postgresql://"]
            .iter()
            .any(|scheme| url.starts_with(scheme))
        {
            return Err(URL);
        }
        let options = PgConnectOptions::from_str(url).map_err(|_| URL)?;
        let pool = PgPoolOptions::new()
            .max_connections(16)
            .acquire_timeout(Duration::from_secs(5))
            // Else each operation takes two round trips.
            .test_before_acquire(false)
            // After a restart of the server every idle connection is dead, and more than one question would fail.
            .before_acquire(|connection, about| {
                Box::pin(async move {
                    if about.idle_for < MAY_BE_DEAD {
                        return Ok(true);
                    }
                    Ok(connection.ping().await.is_ok())
                })
            })
            .connect_with(options);
        let pool = sound(Box::pin(pool)).await?.map_err(of_connect)?;
        self.with_pool(pool)
    }

    /// A store with a pool of yours. Does not make the table; the first operation [checks](PostgresStore::check) it. Of its connections one is taken for as long as somebody waits for another process. With
    /// `test_before_acquire`, which is on by default, each operation takes a second round trip.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the name of the table cannot be used, or the pool has a single connection.
    pub fn with_pool(self, pool: PgPool) -> Result<PostgresStore, Error> {
        const TOO_SMALL: Error = Error::new(
            ErrorKind::Configuration,
            "the pool has a single connection, and whoever waits for another process would take it; allow at least 2",
        );
        if pool.options().get_max_connections() < 2 {
            return Err(TOO_SMALL);
        }
        let table = TableName::parse(&self.table)?;
        Ok(PostgresStore(Arc::new(Inner {
            pool,
            statements: Statements::new(&table),
            watchers: Watchers::new(table.name()),
            sweeping: Sweeping::every(self.sweep_interval),
            timeout: self.timeout,
            checked: Checked::not_yet(),
            table,
        })))
    }
}

impl PostgresStore {
    /// The SQL that makes the table and its index, for your own migrations. It can be run again.
    #[must_use]
    pub fn schema(&self) -> String {
        self.0.statements.schema.text().to_owned()
    }

    /// Makes the table and its index where they are missing, within a minute; it needs no right to make anything where both are there.
    /// Safe to call from many processes at once.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the role may not, [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the
    /// server cannot be reached.
    pub async fn migrate(&self) -> Result<(), Error> {
        const LONGEST: Duration = Duration::from_secs(60);
        // `CREATE TABLE IF NOT EXISTS` asks for the right to make a table before it looks for one.
        if self.inspect().await?.is_some_and(|table| table.is_indexed) {
            return Ok(());
        }
        let (mut lent, _) = self.lend_unchecked().await?;
        let connection = lent.connection()?;
        let migration = async { self.migrate_on(connection).await.map_err(not_made) };
        let done = bounded(LONGEST, migration).await;
        lent.give_back(done)
    }

    async fn migrate_on(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        // `IF NOT EXISTS` alone still fails when two make the same table at once.
        const LOCK: i64 = 0x1de3_907e_4c1e_0001;
        let mut transaction = connection.begin().await?;
        let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK);
        lock.execute(&mut *transaction).await?;
        let schema = sqlx::raw_sql(self.0.statements.schema.safe());
        transaction.execute(schema).await?;
        transaction.commit().await
    }

    /// Checks the server and the table: that the server takes writes and is not too old, and that the table is there, has its columns, is
    /// logged, and that the role has its rights.
    ///
    /// Each store does so once by itself: the first operations wait for one check. The check is repeated until it has passed.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration), with what is wrong; [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the
    /// server cannot be reached.
    pub async fn check(&self) -> Result<(), Error> {
        check(self.inspect().await?.as_ref())?;
        self.0.checked.pass();
        Ok(())
    }

    /// The check before the first operation, which all operations share that begin meanwhile.
    pub(super) async fn check_once(&self) -> Result<(), Error> {
        let check = || {
            let store = self.clone();
            async move { store.check().await }.boxed()
        };
        self.0.checked.check(check).await.map(drop)
    }

    /// The same within a transaction of the application's, which may see a table that others do not.
    pub(super) async fn check_on(&self, connection: &mut PgConnection) -> Result<(), Error> {
        if self.0.checked.passed().is_none() {
            check(self.inspect_on(connection).await?.as_ref())?;
            self.0.checked.pass();
        }
        Ok(())
    }

    async fn inspect(&self) -> Result<Option<Table>, Error> {
        let (mut lent, timeout) = self.lend_unchecked().await?;
        let inspected = bounded(timeout, self.inspect_on(lent.connection()?)).await;
        lent.give_back(inspected)
    }

    async fn inspect_on(&self, connection: &mut PgConnection) -> Result<Option<Table>, Error> {
        let inspect = sqlx::query(self.0.statements.inspect.safe()).bind(self.0.table.to_string());
        let row = inspect.fetch_optional(connection).await.map_err(failed)?;
        row.as_ref().map(Table::read).transpose().map_err(failed)
    }
}

/// The server and the table, as the server describes them.
struct Table {
    persistence: String,
    columns: Vec<String>,
    is_indexed: bool,
    missing_rights: Vec<String>,
    is_read_only: bool,
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
    const OLD: Error = Error::new(
        ErrorKind::Configuration,
        "the PostgreSQL server is too old; version 13 is the oldest that the store can use",
    );
    const UNLOGGED: Error = Error::new(
        ErrorKind::Configuration,
        "the table of the records is unlogged or temporary, so that a crash of the server empties it and every request runs again; \
         run ALTER TABLE .. SET LOGGED",
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
    if table.persistence != "p" {
        return Err(UNLOGGED);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(change: impl FnOnce(&mut Table)) -> String {
        let mut table = Table {
            persistence: "p".to_owned(),
            columns: COLUMNS.map(str::to_owned).to_vec(),
            is_indexed: true,
            missing_rights: Vec::new(),
            is_read_only: false,
            server: 150_000,
        };
        change(&mut table);
        check(Some(&table)).map_or_else(|error| error.to_string(), |()| "fine".to_owned())
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(said(|_| {}), "fine");
        assert_eq!(said(|table| table.columns.push("note text".to_owned())), "fine");
        assert!(said(|table| table.is_read_only = true).contains("read-only"));
        assert!(said(|table| table.missing_rights.push("DELETE".to_owned())).contains("lacks a right"));
        assert!(said(|table| table.server = 120_022).contains("too old"));
        assert!(said(|table| table.persistence = "u".to_owned()).contains("unlogged"));
        assert!(said(|table| table.columns[6] = "fence integer".to_owned()).contains("other columns"));
        assert!(check(None).unwrap_err().to_string().contains("migrate"));
    }
}
