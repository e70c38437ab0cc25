//! The table of the messages.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool, PgRow};
use sqlx::Row;

use super::message::OutboxMessage;
use super::relay::Relay;
use crate::error::{Error, ErrorKind};
use crate::store::{attended, failed, make_table, Bound, Gate, Lent, Sending, Statement, TableName, Within};

/// A table of messages that are to be sent once their transaction is committed. See the [module](super).
#[derive(Clone)]
pub struct Outbox {
    pool: PgPool,
    shared: Arc<Shared>,
    timeout: Duration,
    pooled: bool,
}

struct Shared {
    gate: Gate,
    statements: Statements,
    /// The name of the table without its schema.
    table: Arc<str>,
}

struct Statements {
    delete: Statement,
    give_back: Statement,
    is_made: Statement,
    postpone: Statement,
    put: Statement,
    schema: Statement,
    take: Statement,
    waiting: Statement,
}

impl Statements {
    fn new(table: &TableName) -> Self {
        let statement = |name, template| Statement::new(name, template, table);
        Self {
            delete: statement("delete", include_str!("sql/delete.sql")),
            give_back: statement("give_back", include_str!("sql/give_back.sql")),
            is_made: statement("is_made", include_str!("sql/is_made.sql")),
            postpone: statement("postpone", include_str!("sql/postpone.sql")),
            put: statement("put", include_str!("sql/put.sql")),
            schema: statement("schema", include_str!("sql/schema.sql")),
            take: statement("take", include_str!("sql/take.sql")),
            waiting: statement("waiting", include_str!("sql/waiting.sql")),
        }
    }
}

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
            shared: Arc::new(Shared {
                gate: Gate::default(),
                statements: Statements::new(table),
                table: Arc::clone(table.name()),
            }),
            timeout: Duration::from_secs(30),
            pooled: false,
        }
    }

    /// Prepares the outbox for a pooler that lends a server for one transaction at a time, such as PgBouncer with
    /// `pool_mode = transaction`. Each operation of a relay is then a transaction of unnamed statements. Without this
    /// setting, the first operation that takes a connection from the pool refuses such a pooler.
    #[must_use]
    pub const fn with_transaction_pooler(mut self) -> Self {
        self.pooled = true;
        self
    }

    /// Sets how long an operation on the table may take. Default: 30 s. It does not limit [`put`](Self::put), nor the
    /// making of the table by [`migrate`](Self::migrate). After this time the caller gets an error, and the connection
    /// stays in use until the server has answered. The pool limits how long the operation waits for a connection.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The SQL that makes the table and its index, for your own migrations. It can be run again.
    #[must_use]
    pub fn schema(&self) -> String {
        self.shared.statements.schema.text().to_owned()
    }

    /// Makes the table and its index if they are missing. Waits for them for at most 60 s. If both exist, the role
    /// needs no right to make them. Many processes may call this at once.
    ///
    /// # Cancel safety
    ///
    /// A migration that has begun continues if this future is dropped.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when the role may not, [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the
    /// server cannot be reached.
    pub async fn migrate(&self) -> Result<(), Error> {
        const LONGEST: Duration = Duration::from_secs(60);
        const LOCK: i64 = 2_153_723_918_930_542_594;
        // PostgreSQL checks the right to make a table before it looks whether `CREATE TABLE IF NOT EXISTS` finds one.
        let rows = self.ask(|statements| &statements.is_made, |is_made| is_made).await?;
        let row = rows.first().ok_or_else(|| failed(sqlx::Error::RowNotFound))?;
        if row.try_get("changed").map_err(failed)? {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let mut lent = Lent::from(&self.pool).await?;
        let migrating = async move {
            let migrated = make_table(lent.connection()?, LOCK, &shared.statements.schema).await;
            lent.give_back(migrated)
        };
        attended(LONGEST, &self.pool, &self.shared.table, migrating).await
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

    /// How many messages are not published yet, those of open transactions apart. Reads the whole table.
    ///
    /// # Errors
    ///
    /// [`StoreUnavailable`](ErrorKind::StoreUnavailable) when the server cannot be reached.
    pub async fn waiting(&self) -> Result<u64, Error> {
        let rows = self.ask(|statements| &statements.waiting, |waiting| waiting).await?;
        let row = rows.first().ok_or_else(|| failed(sqlx::Error::RowNotFound))?;
        let count: i64 = row.try_get("changed").map_err(failed)?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// What publishes the messages, by `publish`.
    pub fn relay<P>(&self, publish: P) -> Relay<P> {
        Relay::new(self.clone(), publish)
    }

    /// Takes messages that are due and that no other relay has: as many as the terms allow of those that nobody took before, or one
    /// that was taken and never told of. Each counts one more attempt, and is not due again before the lease and its pause are over.
    pub(super) async fn take(&self, terms: &Terms) -> Result<Vec<Taken>, Error> {
        let terms = *terms;
        let bind = move |take: Bound<'static>| {
            let (first, longest) = terms.pauses;
            take.bind(i64::from(terms.messages))
                .bind(i64::try_from(terms.bytes).unwrap_or(i64::MAX))
                .bind(terms.lease.as_secs_f64())
                .bind(first.as_secs_f64())
                .bind(longest.as_secs_f64())
        };
        let rows = self.ask(|statements| &statements.take, bind).await?;
        let taken: sqlx::Result<Vec<_>> = rows.iter().filter_map(|row| Taken::read(row).transpose()).collect();
        let mut taken = taken.map_err(failed)?;
        // Those that hang take the lease's time from those behind them.
        taken.sort_unstable_by_key(|taken| (taken.claim.failures, taken.claim.position));
        Ok(taken)
    }

    /// Deletes published messages, even if another relay has taken them since, so that no relay publishes them again.
    pub(super) async fn delete(&self, published: &[Claim]) -> Result<(), Error> {
        self.record(
            |statements| &statements.delete,
            published,
            |delete, positions, _| delete.bind(positions),
        )
        .await
    }

    /// Lets what could not be published wait, unless another has taken or deleted it.
    pub(super) async fn postpone(&self, claims: &[Claim], pauses: (Duration, Duration)) -> Result<(), Error> {
        let (first, longest) = pauses;
        let bind = move |postpone: Bound<'static>, positions, failures| {
            let postpone = postpone.bind(positions).bind(failures);
            postpone.bind(first.as_secs_f64()).bind(longest.as_secs_f64())
        };
        self.record(|statements| &statements.postpone, claims, bind).await
    }

    /// Makes what was not tried due at once, as if it had not been taken, unless another has taken or deleted it.
    pub(super) async fn give_back(&self, claims: &[Claim]) -> Result<(), Error> {
        let bind = |give_back: Bound<'static>, positions, failures| give_back.bind(positions).bind(failures);
        self.record(|statements| &statements.give_back, claims, bind).await
    }

    /// Records the results of claims. In the statement of `of`, the last parameter before the question is the lock
    /// timeout.
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
        // The statement returns one row when it is done.
        rows.first().map(drop).ok_or_else(|| failed(sqlx::Error::RowNotFound))
    }

    fn sending(&self) -> Sending {
        Sending::new(self.timeout, self.pooled, false)
    }

    /// Sends a statement on a connection of the pool. The statement continues if its caller leaves or times out.
    async fn ask(
        &self,
        of: impl Fn(&Statements) -> &Statement + Send + 'static,
        bind: impl Fn(Bound<'static>) -> Bound<'static> + Send + Sync + 'static,
    ) -> Result<Vec<PgRow>, Error> {
        let (sending, shared) = (self.sending(), Arc::clone(&self.shared));
        shared.gate.pass(&self.pool, &sending).await?;
        let mut lent = Lent::from(&self.pool).await?;
        let asking = async move {
            let statement = of(&shared.statements);
            let rows = sending.ask(lent.connection()?, Within::Own, statement, bind).await;
            lent.give_back(rows)
        };
        attended(self.timeout, &self.pool, &self.shared.table, asking).await
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
    /// Reads a message; `None` from the row that shows that no message is due. Fails only if the table has other
    /// columns.
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
