//! The table of the messages.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool, PgRow};
use sqlx::{AssertSqlSafe, Executor, Row};

use super::message::OutboxMessage;
use super::relay::Relay;
use crate::error::{Error, ErrorKind};
use crate::store::{failed, TableName};

/// A table of messages that are to be sent once their transaction is committed. See the [module](super).
#[derive(Clone)]
pub struct Outbox {
    pub(super) pool: PgPool,
    statements: Arc<Statements>,
}

#[derive(Debug)]
struct Statements {
    delete: String,
    postpone: String,
    put: String,
    schema: String,
    take: String,
    waiting: String,
}

impl Statements {
    fn new(table: &TableName) -> Self {
        let schema = include_str!("sql/schema.sql");
        let schema = schema
            .replace("{table}", &table.to_string())
            .replace("{name}", table.name());
        Self {
            delete: format!("DELETE FROM {table} WHERE position = ANY($1)"),
            postpone: format!(
                "UPDATE {table} SET failures = failures + 1, publish_at = clock_timestamp() + make_interval(secs => $2) \
                 WHERE position = $1"
            ),
            put: format!(
                "INSERT INTO {table} (id, topic, names, contents, payload) VALUES ($1, $2, $3, $4, $5) \
                 ON CONFLICT (id) DO NOTHING"
            ),
            schema,
            take: format!(
                "SELECT position, id, topic, names, contents, payload, failures FROM {table} \
                 WHERE publish_at <= clock_timestamp() ORDER BY publish_at, position LIMIT $1 FOR UPDATE SKIP LOCKED"
            ),
            waiting: format!("SELECT count(*) FROM {table}"),
        }
    }
}

/// A statement of this file, in which only the parsed name of a table was put.
fn safe(text: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(text.to_owned())
}

/// A message and its row.
pub(super) type Taken = (i64, OutboxMessage);

impl Outbox {
    /// The outbox in the table `idempotency_outbox` of a database of yours, which is that of the effects.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self::of(pool, &TableName::of("idempotency_outbox"))
    }

    /// The same in another table: `name` or `schema.name`, each of 1 to 48 characters out of a to z, 0 to 9 and `_`.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the name cannot be used.
    pub fn in_table(pool: PgPool, name: &str) -> Result<Self, Error> {
        Ok(Self::of(pool, &TableName::parse(name)?))
    }

    fn of(pool: PgPool, table: &TableName) -> Self {
        let statements = Arc::new(Statements::new(table));
        Self { pool, statements }
    }

    /// The SQL that makes the table and its index, for your own migrations. It can be run again.
    #[must_use]
    pub fn schema(&self) -> String {
        self.statements.schema.clone()
    }

    /// Makes the table where there is none. Safe to call from many processes at once.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the role may not, [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the
    /// server cannot be reached.
    pub async fn migrate(&self) -> Result<(), Error> {
        // `IF NOT EXISTS` alone still fails when two make the same table at once.
        const LOCK: i64 = 0x1de3_907e_4c1e_0002;
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK);
        lock.execute(&mut *transaction).await.map_err(failed)?;
        let schema = sqlx::raw_sql(safe(&self.statements.schema));
        transaction.execute(schema).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    /// Puts a message into the outbox, within a transaction of yours: it is sent if that is committed. False where a message of this
    /// id waits already; then nothing changes. (One that was published is not remembered.)
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the id is empty, or the table is not there;
    /// [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the server cannot be reached. Roll the transaction back.
    pub async fn put(&self, connection: &mut PgConnection, message: &OutboxMessage) -> Result<bool, Error> {
        const NO_ID: Error = Error::new(
            ErrorKind::Configuration,
            "the message has an empty id, so that its copies could not be told from others",
        );
        if message.id.is_empty() {
            return Err(NO_ID);
        }
        let (names, contents): (Vec<_>, Vec<_>) = message.headers.iter().cloned().unzip();
        let put = sqlx::query(safe(&self.statements.put))
            .bind(&message.id)
            .bind(&message.topic)
            .bind(names)
            .bind(contents)
            .bind(&message.payload[..]);
        let put = put.execute(connection).await.map_err(failed)?;
        Ok(put.rows_affected() == 1)
    }

    /// How many messages are not published yet, those of open transactions apart. Reads the whole table.
    ///
    /// # Errors
    ///
    /// [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the server cannot be reached.
    pub async fn waiting(&self) -> Result<u64, Error> {
        let count = sqlx::query(safe(&self.statements.waiting)).fetch_one(&self.pool).await;
        let count: i64 = count.and_then(|row| row.try_get(0)).map_err(failed)?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// What publishes the messages, by `publish`.
    pub fn relay<P>(&self, publish: P) -> Relay<P> {
        Relay::new(self.clone(), publish)
    }

    /// Takes messages that are due and that no other relay has, and locks them until the transaction ends.
    pub(super) async fn take(&self, connection: &mut PgConnection, most: u32) -> Result<Vec<Taken>, Error> {
        let take = sqlx::query(safe(&self.statements.take)).bind(i64::from(most));
        let rows = take.fetch_all(connection).await.map_err(failed)?;
        rows.iter().map(|row| read(row).map_err(failed)).collect()
    }

    pub(super) async fn delete(&self, connection: &mut PgConnection, published: &[i64]) -> Result<(), Error> {
        let delete = sqlx::query(safe(&self.statements.delete)).bind(published);
        delete.execute(connection).await.map(drop).map_err(failed)
    }

    pub(super) async fn postpone(
        &self,
        connection: &mut PgConnection,
        position: i64,
        pause: Duration,
    ) -> Result<(), Error> {
        let postpone = sqlx::query(safe(&self.statements.postpone)).bind(position);
        let postpone = postpone.bind(pause.as_secs_f64()).execute(connection);
        postpone.await.map(drop).map_err(failed)
    }
}

fn read(row: &PgRow) -> sqlx::Result<Taken> {
    let (names, contents): (Vec<String>, Vec<String>) = (row.try_get("names")?, row.try_get("contents")?);
    let payload: Vec<u8> = row.try_get("payload")?;
    let failures: i32 = row.try_get("failures")?;
    let message = OutboxMessage {
        id: row.try_get("id")?,
        topic: row.try_get("topic")?,
        headers: names.into_iter().zip(contents).collect(),
        payload: payload.into(),
        failures: u32::try_from(failures).unwrap_or(0),
    };
    Ok((row.try_get("position")?, message))
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox").finish_non_exhaustive()
    }
}
