//! Sends statements, and checks that the rows in a reply belong to the statement.
//!
//! A pooler that changes servers between two messages of one statement can return the rows of another statement, and so
//! can a connection whose replies are out of step. So each statement carries a random number, the question. Its rows
//! repeat the question, and a tag of the statement and its table.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Connection, Postgres, Row};

use super::error::{code, failed};
use super::table::Statement;
use crate::error::{Error, ErrorKind};

pub(crate) type Bound<'q> = Query<'q, Postgres, PgArguments>;

/// How often a statement is repeated after the server has ended it because of another transaction.
const TRIES: usize = 8;

/// The longest lock timeout that is sent, in milliseconds.
const DAY: u128 = 86_400_000;

/// The way in which a store or an outbox sends its statements.
#[derive(Clone, Debug)]
pub(crate) struct Sending {
    /// Whether a pooler lends a server for one transaction at a time. Then no statement has a name, and each runs in
    /// its own transaction.
    pooled: bool,
    /// The SQL that begins a transaction whose isolation and timeouts do not depend on the session.
    begin: Arc<str>,
    /// How long a statement waits for a lock.
    lock_timeout: Arc<str>,
}

/// The transaction that a statement runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Within {
    /// A transaction of the statement's own.
    Own,
    /// A transaction of the application, which only the application can repeat.
    Callers,
}

/// The error of a statement, and what is known about its effect.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: Error,
    pub(crate) fate: Fate,
}

/// The effect of a statement that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The server reported that the statement failed. It has no effect, and the connection can be used again.
    Refused,
    /// No reply came, or the reply belongs to another statement. The connection must be closed.
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
    /// Makes the settings for statements whose caller waits for `timeout`.
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

    /// Returns the lock timeout to bind; `None` in a transaction of the application, where the session decides.
    pub(crate) fn lock_timeout(&self, within: Within) -> Option<&str> {
        match within {
            Within::Own => Some(&self.lock_timeout),
            Within::Callers => None,
        }
    }

    /// Sends a statement, checks that every row belongs to it, and returns the rows. `bind` binds all parameters but
    /// the last, which is the question.
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

    /// Sends a statement that always has exactly one row, and returns the row.
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

/// Whether a row belongs to this execution of the statement.
fn is_reply(row: &PgRow, statement: &Statement, question: i64) -> bool {
    row.try_get("statement").is_ok_and(|tag: &str| tag == statement.tag())
        && row.try_get("question").is_ok_and(|repeated: i64| repeated == question)
}

/// Whether a statement with this error had no effect, and may succeed in a READ COMMITTED transaction. The codes are
/// serialization failure and deadlock (PostgreSQL, appendix A).
fn is_repeated(error: &sqlx::Error) -> bool {
    matches!(code(error).as_deref(), Some("40001" | "40P01"))
}

fn told(error: sqlx::Error, within: Within) -> Failed {
    let code = code(&error).map(std::borrow::Cow::into_owned);
    match code.as_deref() {
        Some("40001" | "40P01") if within == Within::Callers => Failed::refused(ROLL_BACK.with_source(failed(error))),
        // Codes of a pooler that mixes statements up: duplicate prepared statement, undefined prepared statement, wrong
        // parameters.
        Some("42P05" | "26000" | "08P01") => Failed {
            error: POOLER.with_source(failed(error)),
            fate: Fate::Unknown,
        },
        // After a cancel the connection is fine. After a connection exception (08), any other operator intervention
        // (57), a system error (58) or an internal error (XX), it is not.
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
    "the reply of the database belongs to another statement; if a pooler in transaction mode is in between, set \
     `with_transaction_pooler`",
);

const ROLL_BACK: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "the transaction changed the same record as another one, or the two waited for each other; \
     roll it back and run all of it again, best at READ COMMITTED",
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
