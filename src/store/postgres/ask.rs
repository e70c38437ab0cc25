//! How a statement is sent, and how its rows are known to be its own.
//!
//! A pooler that changes servers between two messages of one statement, or a connection whose replies are out of step, gives rows of
//! another statement. So each statement carries a random question, which its rows repeat beside a tag of the statement and its table.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Connection, Postgres, Row};

use super::error::{code, failed};
use super::table::Statement;
use crate::error::{Error, ErrorKind};

pub(crate) type Bound<'q> = Query<'q, Postgres, PgArguments>;

/// How often a statement is repeated that the server ended because of another transaction.
const TRIES: usize = 8;

/// The longest lock timeout that is sent.
const DAY: u128 = 86_400_000;

/// How the statements of a store or an outbox are sent.
#[derive(Clone, Debug)]
pub(crate) struct Sending {
    /// Behind a pooler that lends a server for one transaction at a time, no statement has a name, and each has a transaction.
    pooled: bool,
    /// Begins a transaction whose isolation and timeouts do not depend on the session.
    begin: Arc<str>,
    /// How long a statement waits for a lock.
    lock_timeout: Arc<str>,
}

/// The transaction that a statement runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Within {
    /// One of its own.
    Own,
    /// One of the application's, which alone can repeat it.
    Callers,
}

/// Why a statement failed, and what that says about its effect.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: Error,
    pub(crate) fate: Fate,
}

/// The effect of a statement that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The server said that the statement failed: it has no effect, and the connection is fine.
    Refused,
    /// The reply did not come, or was the reply to something else. The connection is of no use any more.
    Unknown,
}

impl Failed {
    pub(crate) const fn refused(error: Error) -> Self {
        Self {
            error,
            fate: Fate::Refused,
        }
    }

    pub(crate) const fn unknown(error: Error) -> Self {
        Self {
            error,
            fate: Fate::Unknown,
        }
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

impl Sending {
    /// A statement that takes longer than `timeout` has no caller any more.
    pub(crate) fn new(timeout: Duration, pooled: bool) -> Self {
        let millis = |timeout: Duration| timeout.as_millis().clamp(1, DAY);
        // A claim may take two statements.
        let lock_timeout = format!("{}ms", millis(timeout / 5 * 2));
        let begin = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{lock_timeout}'; \
             SET LOCAL statement_timeout = '{}ms'",
            millis(timeout / 5 * 4)
        );
        Self {
            pooled,
            begin: begin.into(),
            lock_timeout: lock_timeout.into(),
        }
    }

    pub(crate) const fn is_pooled(&self) -> bool {
        self.pooled
    }

    /// The lock timeout to bind: in a transaction of the application's its own session decides.
    pub(crate) fn lock_timeout(&self, within: Within) -> Option<&str> {
        match within {
            Within::Own => Some(&self.lock_timeout),
            Within::Callers => None,
        }
    }

    /// Sends a statement and gives its rows, each of which is its own. `bind` binds all parameters but the last, the question.
    pub(crate) async fn ask<'q>(
        &self,
        connection: &mut PgConnection,
        within: Within,
        statement: &Statement,
        bind: impl Fn(Bound<'q>) -> Bound<'q> + Send + Sync,
    ) -> Result<Vec<PgRow>, Failed> {
        let question: i64 = rand::random();
        let bound = || bind(sqlx::query(statement.safe()).persistent(!self.pooled)).bind(question);
        let rows = if within == Within::Own && self.pooled {
            self.ask_in_transaction(connection, &bound).await
        } else {
            match bound().fetch_all(&mut *connection).await {
                Err(error) if within == Within::Own && is_repeated(&error) => {
                    Box::pin(self.ask_in_transaction(connection, &bound)).await
                }
                rows => rows,
            }
        };
        let rows = rows.map_err(|error| told(error, within))?;
        match rows.iter().all(|row| is_reply(row, statement, question)) {
            true => Ok(rows),
            false => Err(Failed::unknown(MIXED_UP)),
        }
    }

    /// The one row of a statement that always has one.
    pub(crate) async fn ask_one<'q>(
        &self,
        connection: &mut PgConnection,
        within: Within,
        statement: &Statement,
        bind: impl Fn(Bound<'q>) -> Bound<'q> + Send + Sync,
    ) -> Result<PgRow, Failed> {
        let mut rows = self.ask(connection, within, statement, bind).await?;
        match (rows.pop(), rows.pop()) {
            (Some(row), None) => Ok(row),
            _ => Err(Failed::unknown(MIXED_UP)),
        }
    }

    async fn ask_in_transaction<'q>(
        &self,
        connection: &mut PgConnection,
        bound: &(impl Fn() -> Bound<'q> + Send + Sync),
    ) -> sqlx::Result<Vec<PgRow>> {
        let mut tries = 0;
        loop {
            let begin = AssertSqlSafe(Arc::clone(&self.begin));
            let mut transaction = connection.begin_with(begin).await?;
            match bound().fetch_all(&mut *transaction).await {
                Ok(rows) => {
                    transaction.commit().await?;
                    return Ok(rows);
                }
                Err(error) if tries < TRIES && is_repeated(&error) => transaction.rollback().await?,
                Err(error) => {
                    transaction.rollback().await?;
                    return Err(error);
                }
            }
            tries += 1;
        }
    }
}

/// Whether a row is of this very statement.
fn is_reply(row: &PgRow, statement: &Statement, question: i64) -> bool {
    row.try_get("statement").is_ok_and(|tag: &str| tag == statement.tag())
        && row.try_get("question").is_ok_and(|repeated: i64| repeated == question)
}

/// Whether a statement that failed so had no effect and may succeed in a transaction that is READ COMMITTED: serialization failure,
/// deadlock (PostgreSQL, appendix A).
fn is_repeated(error: &sqlx::Error) -> bool {
    matches!(code(error).as_deref(), Some("40001" | "40P01"))
}

fn told(error: sqlx::Error, within: Within) -> Failed {
    let code = code(&error).map(std::borrow::Cow::into_owned);
    match code.as_deref() {
        Some("40001" | "40P01") if within == Within::Callers => Failed::refused(ROLL_BACK.with_source(failed(error))),
        // Duplicate and undefined prepared statement; a statement with other parameters.
        Some("42P05" | "26000" | "08P01") => Failed {
            error: POOLER.with_source(failed(error)),
            fate: Fate::Unknown,
        },
        // Connection exceptions, operator intervention but for a cancel, errors of the system and of the server.
        Some("57014") => Failed::refused(failed(error)),
        Some(code) if !["08", "57", "58", "XX"].iter().any(|class| code.starts_with(class)) => {
            Failed::refused(failed(error))
        }
        _ => Failed::unknown(failed(error)),
    }
}

pub(crate) const POOLER: Error = Error::new(
    ErrorKind::Configuration,
    "the connection leads through a pooler in transaction mode, such as PgBouncer, which mixes statements up; set \
     `with_transaction_pooler`, add `transaction_pooler=true` to the URL, or put the pooler into session mode",
);

pub(crate) const MIXED_UP: Error = Error::new(
    ErrorKind::Configuration,
    "the database replied to another statement than it was asked; behind a pooler in transaction mode set \
     `with_transaction_pooler`",
);

const ROLL_BACK: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "the transaction met another one that changed the same record, or they waited for each other; roll it back and run all of it \
     again, best at READ COMMITTED",
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_timeout_is_never_zero_which_would_be_none() {
        for timeout in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            let sending = Sending::new(timeout, false);
            let millis: u128 = sending.lock_timeout.trim_end_matches("ms").parse().unwrap();
            assert!((1..=DAY).contains(&millis), "{timeout:?}: {millis}");
            assert_eq!(sending.lock_timeout(Within::Callers), None);
        }
    }
}
