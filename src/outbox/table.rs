//! The table of the messages.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgPool, PgRow};

use super::message::OutboxMessage;
use crate::error::Error;
use crate::store::{
    Bound, Gate, PooledConnection, Sending, Statement, TableName, Within, failed, make_table, run_detachable,
    statements,
};

/// A table of messages that a relay publishes once their transaction is committed. See the
/// [module](super).
#[derive(Clone)]
pub struct Outbox {
    pool: PgPool,
    shared: Arc<Shared>,
    timeout: Duration,
    behind_pooler: bool,
}

struct Shared {
    gate: Gate,
    statements: Statements,
    /// The name of the table without its schema.
    table: Arc<str>,
}

statements! {
    struct Statements {
        delete, give_back, is_made, postpone, put, schema, take, waiting,
    }
}

/// The limits of one take of messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct TakeOptions {
    pub(super) messages: u32,
    pub(super) bytes: u64,
    pub(super) lease: Duration,
    pub(super) pauses: (Duration, Duration),
}

/// A row that a relay has taken. No other relay has taken the row since, as long as its number of
/// failures is the same.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) position: i64,
    pub(super) failures: i32,
}

/// A taken row, and its message if the row can be read.
pub(super) struct Taken {
    pub(super) claim: Claim,
    pub(super) message: sqlx::Result<OutboxMessage>,
}

impl Outbox {
    /// Makes an outbox in the table `idempotency_outbox`. The table must be in the database whose
    /// transactions put messages.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self::of(pool, &TableName::of("idempotency_outbox"))
    }

    /// Makes an outbox in another table: `name` or `schema.name`, each of 1 to 48 characters of a
    /// to z, 0 to 9 and `_`, not beginning with a digit.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the name cannot be used.
    pub fn in_table(pool: PgPool, name: &str) -> Result<Self, Error> {
        Ok(Self::of(pool, &TableName::parse(name)?))
    }

    fn of(pool: PgPool, table: &TableName) -> Self {
        Self {
            pool,
            shared: Arc::new(Shared {
                gate: Gate::default(),
                statements: Statements::new(table),
                table: Arc::clone(table.name()),
            }),
            timeout: Duration::from_secs(30),
            behind_pooler: false,
        }
    }

    /// Prepares the outbox for a pooler that lends a server for one transaction at a time, such as
    /// PgBouncer with `pool_mode = transaction`. Each operation of a relay is then a transaction of
    /// unnamed statements. Without this setting, the first operation that takes a connection from
    /// the pool refuses such a pooler.
    #[must_use]
    pub const fn with_transaction_pooler(mut self) -> Self {
        self.behind_pooler = true;
        self
    }

    /// Sets how long an operation on the table may take. Default: 30 s. It does not limit
    /// [`put`](Self::put), nor the making of the table by [`migrate`](Self::migrate). After this
    /// time the caller gets an error, and the connection stays in use until the server has replied.
    /// The pool limits how long the operation waits for a connection.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Returns the SQL that makes the table and its index, for your own migrations. It can be run
    /// again.
    #[must_use]
    pub fn schema(&self) -> String {
        self.shared.statements.schema.text().to_owned()
    }

    /// Makes the table and its index if they are missing. Waits for at most 60 s. If both exist,
    /// the role needs no right to make them. Many processes may call this at the same time.
    ///
    /// # Cancel safety
    ///
    /// A migration that has begun continues if this future is dropped.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the role lacks the right to make them.
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be reached.
    pub async fn migrate(&self) -> Result<(), Error> {
        const LONGEST: Duration = Duration::from_secs(60);
        const LOCK: i64 = 2_153_723_918_930_542_594;
        // PostgreSQL checks the right to make a table before `CREATE TABLE IF NOT EXISTS` looks for
        // the table.
        let rows = self.ask(|statements| &statements.is_made, |is_made| is_made).await?;
        let row = rows.first().ok_or_else(|| failed(sqlx::Error::RowNotFound))?;
        if row.try_get("changed").map_err(failed)? {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let mut pooled = PooledConnection::from(&self.pool).await?;
        let migrating = async move {
            let migrated = make_table(pooled.connection()?, LOCK, &shared.statements.schema).await;
            pooled.finish(migrated)
        };
        run_detachable(LONGEST, &self.pool, &self.shared.table, migrating).await
    }

    /// Puts a message into the outbox, within a transaction of yours. A relay publishes the message
    /// after the commit. Returns false, and changes nothing, if a message with this id is waiting
    /// already. The outbox does not remember the ids of published messages.
    ///
    /// The id has 1 to 255 bytes. The id, the topic and the headers must not contain a zero
    /// character, which PostgreSQL does not store. The payload may contain one.
    ///
    /// While another open transaction has put the same id, this waits for the end of that
    /// transaction. If several transactions may put the same ids, put them in the same order
    /// everywhere, for example sorted by id. Otherwise two transactions can wait for each other
    /// until PostgreSQL ends one of them.
    ///
    /// # Cancel safety
    ///
    /// If this future is dropped, the message may or may not be in the outbox. Roll the transaction
    /// back.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the message breaks these rules, which
    /// is found before anything is sent, or if the table is missing.
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be reached.
    /// Roll the transaction back.
    pub async fn put(&self, connection: &mut PgConnection, message: &OutboxMessage) -> Result<bool, Error> {
        check(message)?;
        let (names, contents): (Vec<_>, Vec<_>) = message.headers.iter().cloned().unzip();
        let bound = |put: Bound<'static>| {
            put.bind(message.id.clone())
                .bind(message.topic.clone())
                .bind(names.clone())
                .bind(contents.clone())
                .bind(message.payload.to_vec())
        };
        let put = &self.shared.statements.put;
        let row = self.sending().ask_one(connection, Within::Callers, put, bound).await?;
        row.try_get("changed").map_err(failed)
    }

    /// Returns the number of messages that were not published yet, without those of open
    /// transactions. Reads the whole table.
    ///
    /// # Errors
    ///
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the server cannot be reached.
    pub async fn waiting(&self) -> Result<u64, Error> {
        let rows = self.ask(|statements| &statements.waiting, |waiting| waiting).await?;
        let row = rows.first().ok_or_else(|| failed(sqlx::Error::RowNotFound))?;
        let count: i64 = row.try_get("changed").map_err(failed)?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// Takes due messages that no other relay has: a batch of untaken messages within the limits,
    /// or one message that was taken without a recorded result. Each of them counts one more
    /// attempt, and is not due again before the lease and its pause are over.
    pub(super) async fn take(&self, options: &TakeOptions) -> Result<Vec<Taken>, Error> {
        let options = *options;
        let bind = move |take: Bound<'static>| {
            let (first, longest) = options.pauses;
            take.bind(i64::from(options.messages))
                .bind(i64::try_from(options.bytes).unwrap_or(i64::MAX))
                .bind(options.lease.as_secs_f64())
                .bind(first.as_secs_f64())
                .bind(longest.as_secs_f64())
        };
        let rows = self.ask(|statements| &statements.take, bind).await?;
        let taken: sqlx::Result<Vec<_>> = rows.iter().filter_map(|row| Taken::read(row).transpose()).collect();
        let mut taken = taken.map_err(failed)?;
        // Publish messages with failures last, because one that hangs uses up the lease of those
        // behind it.
        taken.sort_unstable_by_key(|taken| (taken.claim.failures, taken.claim.position));
        Ok(taken)
    }

    /// Deletes published messages, even if another relay has taken them since, so that no relay
    /// publishes them again.
    pub(super) async fn delete(&self, published: &[Claim]) -> Result<(), Error> {
        self.record(
            |statements| &statements.delete,
            published,
            |delete, positions, _| delete.bind(positions),
        )
        .await
    }

    /// Postpones messages that could not be published, unless another relay has taken or deleted
    /// them.
    pub(super) async fn postpone(&self, claims: &[Claim], pauses: (Duration, Duration)) -> Result<(), Error> {
        let (first, longest) = pauses;
        let bind = move |postpone: Bound<'static>, positions, failures| {
            let postpone = postpone.bind(positions).bind(failures);
            postpone.bind(first.as_secs_f64()).bind(longest.as_secs_f64())
        };
        self.record(|statements| &statements.postpone, claims, bind).await
    }

    /// Makes untried messages due at once, as if they had not been taken, unless another relay has
    /// taken or deleted them.
    pub(super) async fn give_back(&self, claims: &[Claim]) -> Result<(), Error> {
        let bind = |give_back: Bound<'static>, positions, failures| give_back.bind(positions).bind(failures);
        self.record(|statements| &statements.give_back, claims, bind).await
    }

    /// Records the results of claims. In the statement that `of` returns, the last parameter before
    /// the question is the lock timeout.
    async fn record(
        &self,
        of: impl Fn(&Statements) -> &Statement + Send + 'static,
        claims: &[Claim],
        bind: impl Fn(Bound<'static>, Vec<i64>, Vec<i32>) -> Bound<'static> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        if claims.is_empty() {
            return Ok(());
        }
        let (positions, failures): (Vec<i64>, Vec<i32>) =
            claims.iter().map(|claim| (claim.position, claim.failures)).unzip();
        let lock_timeout = self.sending().lock_timeout(Within::Own).map(str::to_owned);
        let bound = move |statement: Bound<'static>| {
            bind(statement, positions.clone(), failures.clone()).bind(lock_timeout.clone())
        };
        let rows = self.ask(of, bound).await?;
        // The statement returns one row if it was executed.
        rows.first().map(drop).ok_or_else(|| failed(sqlx::Error::RowNotFound))
    }

    fn sending(&self) -> Sending {
        Sending::new(self.timeout, self.behind_pooler, false)
    }

    /// Sends a statement on a connection of the pool. The statement continues if its caller leaves
    /// or times out.
    async fn ask(
        &self,
        of: impl Fn(&Statements) -> &Statement + Send + 'static,
        bind: impl Fn(Bound<'static>) -> Bound<'static> + Send + Sync + 'static,
    ) -> Result<Vec<PgRow>, Error> {
        let (sending, shared) = (self.sending(), Arc::clone(&self.shared));
        shared.gate.pass(&self.pool, &sending).await?;
        let mut pooled = PooledConnection::from(&self.pool).await?;
        let asking = async move {
            let statement = of(&shared.statements);
            let rows = sending.ask(pooled.connection()?, Within::Own, statement, bind).await;
            pooled.finish(rows)
        };
        run_detachable(self.timeout, &self.pool, &self.shared.table, asking).await
    }
}

/// Checks the rules for a message. Most of the rules are limits of PostgreSQL.
fn check(message: &OutboxMessage) -> Result<(), Error> {
    const LONGEST_ID: usize = 255;
    const ID: Error = Error::configuration("the id of a message must have 1 to 255 bytes; use a hash of a longer id");
    const ZERO: Error = Error::configuration(
        "the id, the topic or a header of a message contains a zero character, which PostgreSQL does not store; encode it, or put \
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
    /// Reads a message; `None` from the row that shows that no message is due. Fails only if the
    /// table has other columns.
    fn read(row: &PgRow) -> sqlx::Result<Option<Self>> {
        let Some(position) = row.try_get("position")? else {
            return Ok(None);
        };
        let claim = Claim {
            position,
            failures: row.try_get("failures")?,
        };
        let message = read(row, claim.failures);
        Ok(Some(Self { claim, message }))
    }
}

fn read(row: &PgRow, failures: i32) -> sqlx::Result<OutboxMessage> {
    let (names, contents): (Vec<String>, Vec<String>) = (row.try_get("names")?, row.try_get("contents")?);
    if names.len() != contents.len() {
        return Err(sqlx::Error::Decode(
            "the headers have different numbers of names and contents".into(),
        ));
    }
    let payload: Vec<u8> = row.try_get("payload")?;
    Ok(OutboxMessage {
        id: row.try_get("id")?,
        topic: row.try_get("topic")?,
        headers: names.into_iter().zip(contents).collect(),
        payload: payload.into(),
        // Exclude the current attempt.
        failures: u32::try_from(failures.saturating_sub(1)).unwrap_or(0),
    })
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox").finish_non_exhaustive()
    }
}
