//! The table of the messages.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::TryFutureExt;
use sqlx::postgres::{PgArguments, PgConnection, PgPool, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Executor, Postgres, Row};

use super::message::OutboxMessage;
use super::relay::Relay;
use crate::error::{Error, ErrorKind};
use crate::store::{bounded, failed, not_made, Lent, TableName};

/// A table of messages that are to be sent once their transaction is committed. See the [module](super).
#[derive(Clone)]
pub struct Outbox {
    pool: PgPool,
    statements: Arc<Statements>,
    timeout: Duration,
}

#[derive(Debug)]
struct Statements {
    delete: String,
    give_back: String,
    is_made: String,
    postpone: String,
    put: String,
    schema: String,
    take: String,
    waiting: String,
}

impl Statements {
    fn new(table: &TableName) -> Self {
        let text = |template: &str| {
            template
                .replace("{table}", &table.to_string())
                .replace("{name}", table.name())
        };
        Self {
            // Whoever published it: it is published, so that no other need be.
            delete: text("DELETE FROM {table} WHERE position = ANY($1)"),
            give_back: text(include_str!("sql/give_back.sql")),
            is_made: text(include_str!("sql/is_made.sql")),
            postpone: text(include_str!("sql/postpone.sql")),
            put: text(
                "INSERT INTO {table} (id, topic, names, contents, payload) VALUES ($1, $2, $3, $4, $5) \
                 ON CONFLICT (id) DO NOTHING",
            ),
            schema: text(include_str!("sql/schema.sql")),
            take: text(include_str!("sql/take.sql")),
            waiting: text("SELECT count(*) FROM {table}"),
        }
    }
}

/// A statement of this module, in which only the parsed name of a table was put.
fn safe(text: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(text.to_owned())
}

type Bound = Query<'static, Postgres, PgArguments>;

/// How a relay takes messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) messages: u32,
    pub(super) bytes: u64,
    pub(super) lease: Duration,
    pub(super) pauses: (Duration, Duration),
}

/// A row that a relay has taken. While its count of attempts stays, no other has taken it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) position: i64,
    pub(super) failures: i32,
}

/// What was taken, and the message if its row can be read.
pub(super) struct Taken {
    pub(super) claim: Claim,
    pub(super) message: sqlx::Result<OutboxMessage>,
}

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
        Self {
            pool,
            statements: Arc::new(Statements::new(table)),
            timeout: Duration::from_secs(30),
        }
    }

    /// How long an operation on the table may take, [`put`](Self::put) and [`migrate`](Self::migrate) apart; 30 s by default. Then its
    /// connection is closed: the other end may have gone without a word. The making of a connection is bounded by the pool.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The SQL that makes the table and its index, for your own migrations. It can be run again.
    #[must_use]
    pub fn schema(&self) -> String {
        self.statements.schema.clone()
    }

    /// Makes the table and its index where they are missing; it needs no right to make anything where both are there. Safe to call from
    /// many processes at once.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, it has made the table or not; call it again.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the role may not, [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the
    /// server cannot be reached.
    pub async fn migrate(&self) -> Result<(), Error> {
        // `IF NOT EXISTS` alone still fails when two make the same table at once.
        const LOCK: i64 = 0x1de3_907e_4c1e_0002;
        // `CREATE TABLE IF NOT EXISTS` asks for the right to make a table before it looks for one.
        let is_made = sqlx::query_scalar(safe(&self.statements.is_made)).fetch_one(&self.pool);
        if is_made.await.map_err(failed)? {
            return Ok(());
        }
        let mut transaction = self.pool.begin().await.map_err(failed)?;
        let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK);
        lock.execute(&mut *transaction).await.map_err(failed)?;
        let schema = sqlx::raw_sql(safe(&self.statements.schema));
        transaction.execute(schema).await.map_err(not_made)?;
        transaction.commit().await.map_err(failed)
    }

    /// Puts a message into the outbox, within a transaction of yours: it is sent if that is committed. False where a message of this
    /// id waits already; then nothing changes. (One that was published is not remembered.)
    ///
    /// The id has 1 to 255 bytes. Neither it nor the topic nor a header holds a zero character, which PostgreSQL does not store; a
    /// payload may.
    ///
    /// While another transaction that put the same id is open, it waits for the end of that one. Where ids can meet, put several
    /// messages in one order everywhere, sorted by id, say; else two transactions can wait for each other until PostgreSQL ends one.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, it may be there or not: roll the transaction back.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the message is not so, which is found before anything is sent, or the table
    /// is not there; [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the server cannot be reached. Roll the transaction back.
    pub async fn put(&self, connection: &mut PgConnection, message: &OutboxMessage) -> Result<bool, Error> {
        check(message)?;
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
        let mut lent = Lent::from(&self.pool).await?;
        let counting = sqlx::query(safe(&self.statements.waiting)).fetch_one(lent.connection()?);
        let counted = bounded(self.timeout, counting.map_err(failed)).await;
        let count: i64 = lent.give_back(counted)?.try_get(0).map_err(failed)?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// What publishes the messages, by `publish`.
    pub fn relay<P>(&self, publish: P) -> Relay<P> {
        Relay::new(self.clone(), publish)
    }

    /// Takes messages that are due and that no other relay has: as many as the terms allow of those that nobody took before, or one
    /// that was taken and never told of. Each counts one more attempt, and is not due again before the lease and its pause are over.
    pub(super) async fn take(&self, terms: &Terms) -> Result<Vec<Taken>, Error> {
        let (first, longest) = terms.pauses;
        let take = sqlx::query(safe(&self.statements.take))
            .bind(i64::from(terms.messages))
            .bind(i64::try_from(terms.bytes).unwrap_or(i64::MAX))
            .bind(terms.lease.as_secs_f64())
            .bind(first.as_secs_f64())
            .bind(longest.as_secs_f64());
        let mut lent = Lent::from(&self.pool).await?;
        let taken = bounded(self.timeout, take.fetch_all(lent.connection()?).map_err(failed)).await;
        let rows = lent.give_back(taken)?;
        let taken: sqlx::Result<Vec<_>> = rows.iter().map(Taken::read).collect();
        let mut taken = taken.map_err(failed)?;
        // Those that hang take the lease's time from those behind them.
        taken.sort_unstable_by_key(|taken| (taken.claim.failures, taken.claim.position));
        Ok(taken)
    }

    /// Deletes what was published, whoever has taken it since.
    pub(super) async fn delete(&self, published: &[Claim]) -> Result<(), Error> {
        self.tell(&self.statements.delete, published, |delete, positions, _| {
            delete.bind(positions)
        })
        .await
    }

    /// Lets what could not be published wait, unless another has taken or deleted it.
    pub(super) async fn postpone(&self, claims: &[Claim], pauses: (Duration, Duration)) -> Result<(), Error> {
        let (first, longest) = pauses;
        self.tell(&self.statements.postpone, claims, |postpone, positions, failures| {
            postpone
                .bind(positions)
                .bind(failures)
                .bind(first.as_secs_f64())
                .bind(longest.as_secs_f64())
        })
        .await
    }

    /// Makes what was not tried due at once, as if it had not been taken, unless another has taken or deleted it.
    pub(super) async fn give_back(&self, claims: &[Claim]) -> Result<(), Error> {
        self.tell(&self.statements.give_back, claims, |give_back, positions, failures| {
            give_back.bind(positions).bind(failures)
        })
        .await
    }

    async fn tell(
        &self,
        statement: &str,
        claims: &[Claim],
        bind: impl FnOnce(Bound, Vec<i64>, Vec<i32>) -> Bound,
    ) -> Result<(), Error> {
        if claims.is_empty() {
            return Ok(());
        }
        let (positions, failures) = claims.iter().map(|claim| (claim.position, claim.failures)).unzip();
        let query = bind(sqlx::query(safe(statement)), positions, failures);
        let mut lent = Lent::from(&self.pool).await?;
        let told = bounded(self.timeout, query.execute(lent.connection()?).map_err(failed)).await;
        lent.give_back(told).map(drop)
    }
}

/// What PostgreSQL could never store.
fn check(message: &OutboxMessage) -> Result<(), Error> {
    const LONGEST_ID: usize = 255;
    const ID: Error = Error::new(
        ErrorKind::Configuration,
        "the id of a message has 1 to 255 bytes; where yours is longer, use a hash of it",
    );
    const ZERO: Error = Error::new(
        ErrorKind::Configuration,
        "the id, the topic or a header of a message holds a zero character, which PostgreSQL does not store; encode it, or put \
         it into the payload",
    );
    let headers = message.headers.iter().flat_map(|(name, content)| [name, content]);
    if !(1..=LONGEST_ID).contains(&message.id.len()) {
        return Err(ID);
    }
    if headers
        .chain([&message.id, &message.topic])
        .any(|text| text.contains('\0'))
    {
        return Err(ZERO);
    }
    Ok(())
}

impl Taken {
    /// Fails only where the table is another one.
    fn read(row: &PgRow) -> sqlx::Result<Self> {
        let claim = Claim {
            position: row.try_get("position")?,
            failures: row.try_get("failures")?,
        };
        let message = read(row, claim.failures);
        Ok(Self { claim, message })
    }
}

fn read(row: &PgRow, failures: i32) -> sqlx::Result<OutboxMessage> {
    let (names, contents): (Vec<String>, Vec<String>) = (row.try_get("names")?, row.try_get("contents")?);
    if names.len() != contents.len() {
        return Err(sqlx::Error::Decode(
            "the headers have not as many names as contents".into(),
        ));
    }
    let payload: Vec<u8> = row.try_get("payload")?;
    Ok(OutboxMessage {
        id: row.try_get("id")?,
        topic: row.try_get("topic")?,
        headers: names.into_iter().zip(contents).collect(),
        payload: payload.into(),
        // That under way has not failed yet.
        failures: u32::try_from(failures.saturating_sub(1)).unwrap_or(0),
    })
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox").finish_non_exhaustive()
    }
}
