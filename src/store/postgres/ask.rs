//! Sends statements, and checks that the rows of a reply belong to the statement.
//!
//! A pooler that changes servers between two messages of one statement can return the rows of
//! another statement. So can a connection whose replies are out of step with its requests. So each
//! statement carries a random number, the question. Its rows repeat the question, and a tag that
//! identifies the statement and its table.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgConnection, PgDatabaseError, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Connection, Postgres, Row};

use super::error::{code, failed};
use super::progress::note_statement;
use super::session::{IS_BEGUN, end_open_transaction};
use super::table::{IN_OPEN_TRANSACTION, Statement};
use crate::error::Error;

pub(crate) type Bound<'q> = Query<'q, Postgres, PgArguments>;

/// How often a statement is repeated after the server has ended it because of another transaction.
const TRIES: usize = 8;

/// The longest lock timeout that is sent, in milliseconds.
const DAY: u128 = 86_400_000;

/// The parameters by which a store or an outbox sends its statements.
#[derive(Clone, Debug)]
pub(crate) struct Sending {
    /// Whether a pooler lends a server for one transaction at a time. If so, statements are
    /// unnamed, and each runs in its own transaction.
    behind_pooler: bool,
    /// The SQL that begins a transaction whose isolation and timeouts do not depend on the session.
    begin: Arc<str>,
    /// How long a statement waits for a lock.
    lock_timeout: Arc<str>,
    /// Whether only the store uses the sessions. If so, each session has the store's timeouts and
    /// no open transaction.
    is_private: Arc<AtomicBool>,
}

/// The transaction that a statement runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Within {
    /// A transaction of the statement's own.
    Own,
    /// A transaction of the application, which only the application can repeat.
    Callers,
}

/// The error of a statement, and its effect as far as it is known.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: Error,
    pub(crate) fate: Fate,
    /// Whether the server has ended the statement because it took too long, or because an operator
    /// cancelled it.
    pub(crate) is_cancelled: bool,
}

/// The effect of a statement that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The server reported that the statement failed. The statement has no effect, and the
    /// connection can be used again.
    Refused,
    /// No reply came, or the reply belongs to another statement. The connection must be closed.
    Unknown,
}

impl Failed {
    pub(crate) const fn refused(error: Error) -> Self {
        Self {
            error,
            fate: Fate::Refused,
            is_cancelled: false,
        }
    }

    pub(crate) const fn unknown(error: Error) -> Self {
        Self {
            error,
            fate: Fate::Unknown,
            is_cancelled: false,
        }
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

impl Sending {
    /// Makes the parameters for statements whose caller waits for `timeout`.
    pub(crate) fn new(timeout: Duration, behind_pooler: bool, is_private: bool) -> Self {
        let millis = |timeout: Duration| timeout.as_millis().clamp(1, DAY);
        // The lock timeout is two fifths of `timeout`, because a claim may take two statements.
        let lock_timeout = format!("{}ms", millis(timeout / 5 * 2));
        let begin = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{lock_timeout}'; \
             SET LOCAL statement_timeout = '{}ms'; {IS_BEGUN}",
            millis(timeout / 5 * 4)
        );
        Self {
            behind_pooler,
            begin: begin.into(),
            lock_timeout: lock_timeout.into(),
            is_private: Arc::new(AtomicBool::new(is_private)),
        }
    }

    /// Records that other code may use the sessions from now on.
    pub(super) fn share(&self) {
        self.is_private.store(false, Ordering::Release);
    }

    fn is_private(&self) -> bool {
        self.is_private.load(Ordering::Acquire)
    }

    pub(crate) const fn is_behind_pooler(&self) -> bool {
        self.behind_pooler
    }

    /// Returns the lock timeout to bind; `None` if the session has one, or in a transaction of the
    /// application.
    pub(crate) fn lock_timeout(&self, within: Within) -> Option<&str> {
        (within == Within::Own && !self.is_private()).then_some(&*self.lock_timeout)
    }

    /// Sends a statement, checks that every row belongs to it, and returns the rows. `bind` binds
    /// all parameters except the last one, which is the question.
    ///
    /// If an earlier user of the session has left a transaction open, this ends the transaction and
    /// sends the statement again. A reply without rows cannot show such a transaction, so no caller
    /// may decide anything from such a reply.
    pub(crate) async fn ask<'q>(
        &self,
        connection: &mut PgConnection,
        within: Within,
        statement: &Statement,
        bind: impl Fn(Bound<'q>) -> Bound<'q> + Send + Sync,
    ) -> Result<Vec<PgRow>, Failed> {
        let question: i64 = rand::random();
        let is_private = self.is_private();
        let bound = || {
            let query = sqlx::query(statement.safe(is_private));
            bind(query.persistent(!self.behind_pooler)).bind(question)
        };
        let first = self.reply(connection, within, statement, question, &bound).await;
        match first {
            // The statement ran outside any earlier transaction, so its effect is committed.
            Ok(Reply { rows, is_alone: true }) => return Ok(rows),
            // The application owns its transaction, or no transaction can be open.
            Err(fault) if within == Within::Callers || !fault.may_be_left_open => return Err(fault.failed),
            _ => {}
        }
        // Look whether a transaction is open, and roll it back.
        let ended = Box::pin(end_open_transaction(connection)).await;
        if !ended.map_err(|error| Failed::unknown(failed(error)))? {
            return first.map(|reply| reply.rows).map_err(|fault| fault.failed);
        }
        // The rollback undid the first try, so send the statement again.
        match Box::pin(self.reply(connection, within, statement, question, &bound)).await {
            Ok(Reply { rows, is_alone: true }) => Ok(rows),
            Ok(_) => Err(Failed::unknown(LEFT_OPEN)),
            Err(fault) => Err(fault.failed),
        }
    }

    /// Sends a statement, and repeats it in a transaction of its own after a conflict or a
    /// deadlock.
    async fn reply<'q>(
        &self,
        connection: &mut PgConnection,
        within: Within,
        statement: &Statement,
        question: i64,
        bound: &(impl Fn() -> Bound<'q> + Send + Sync),
    ) -> Result<Reply, Fault> {
        let is_transaction = within == Within::Own && self.behind_pooler;
        let result = if is_transaction {
            self.ask_in_transaction(connection, bound).await?
        } else {
            note_statement();
            bound().fetch_all(&mut *connection).await
        };
        let (rows, is_transaction) = match result {
            Err(error) if within == Within::Own && !is_transaction && is_repeated(&error) => {
                (Box::pin(self.ask_in_transaction(connection, bound)).await?, true)
            }
            result => (result, is_transaction),
        };
        let rows = rows.map_err(|error| self.classify(error, within))?;
        // A row with another tag or another question belongs to another statement (I4).
        let mut is_alone = true;
        for row in &rows {
            let suffix = suffix(row, statement, question)
                .ok_or(MIXED_UP)
                .map_err(Failed::unknown)?;
            is_alone &= suffix.is_empty() || within == Within::Callers || is_transaction;
        }
        Ok(Reply { rows, is_alone })
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

    /// Runs a statement in a transaction of its own. The inner result is the result of the
    /// statement.
    async fn ask_in_transaction<'q>(
        &self,
        connection: &mut PgConnection,
        bound: &(impl Fn() -> Bound<'q> + Send + Sync),
    ) -> Result<sqlx::Result<Vec<PgRow>>, Fault> {
        let lost = |error| Failed::unknown(failed(error));
        let mut tries = 0;
        loop {
            let begin = AssertSqlSafe(Arc::clone(&self.begin));
            note_statement();
            let mut transaction = connection.begin_with(begin).await.map_err(not_begun)?;
            note_statement();
            let rows = bound().fetch_all(&mut *transaction).await;
            note_statement();
            match rows {
                Ok(rows) => return Ok(transaction.commit().await.map(|()| rows)),
                Err(error) => {
                    transaction.rollback().await.map_err(lost)?;
                    if tries == TRIES || !is_repeated(&error) {
                        return Ok(Err(error));
                    }
                }
            }
            tries += 1;
        }
    }

    fn classify(&self, error: sqlx::Error, within: Within) -> Fault {
        let code = code(&error).map(std::borrow::Cow::into_owned);
        let is_of = |classes: &[&str]| {
            code.as_deref()
                .is_some_and(|code| classes.iter().any(|class| code.starts_with(class)))
        };
        let failed = match code.as_deref() {
            Some("40001" | "40P01") if within == Within::Callers => {
                Failed::refused(CONFLICT.with_source(failed(error)))
            }
            // Codes of a pooler that mixes statements up: a duplicate and an undefined prepared
            // statement.
            Some("42P05" | "26000") => Failed::unknown(POOLER.with_source(failed(error))),
            Some("08P01") if !self.behind_pooler && is_mix_up(&error) => {
                Failed::unknown(POOLER.with_source(failed(error)))
            }
            // A transaction of an earlier user has failed, or that of the application.
            Some("25P02") => Failed::unknown(failed(error)),
            // After a cancelled statement the connection is fine. After a connection exception
            // (class 08), any other operator intervention (57), a system error (58) or an internal
            // error (XX), it is not.
            Some("57014") => Failed {
                is_cancelled: true,
                ..Failed::refused(failed(error))
            },
            Some(_) if !is_of(BROKEN) => Failed::refused(failed(error)),
            _ => Failed::unknown(failed(error)),
        };
        Fault {
            failed,
            may_be_left_open: code.as_deref() == Some("57014") || code.is_some() && !is_of(BROKEN),
        }
    }
}

/// The classes of errors that break a connection. The exception is error 57014 of class 57, a
/// cancelled statement.
const BROKEN: &[&str] = &["08", "57", "58", "XX"];

/// The reply to a statement.
struct Reply {
    rows: Vec<PgRow>,
    /// Whether the statement ran outside an earlier user's transaction. It may be false by mistake
    /// if a pooler adds messages.
    is_alone: bool,
}

/// A statement that failed.
struct Fault {
    failed: Failed,
    /// Whether the session may be in a transaction that an earlier user has left open.
    may_be_left_open: bool,
}

impl From<Failed> for Fault {
    fn from(failed: Failed) -> Self {
        Self {
            failed,
            may_be_left_open: false,
        }
    }
}

/// Classifies an error of BEGIN. The transaction may be open although sqlx does not count it, so
/// the session must not return to the pool.
fn not_begun(error: sqlx::Error) -> Fault {
    let may_be_left_open = code(&error).is_some_and(|code| !BROKEN.iter().any(|class| code.starts_with(class)));
    Fault {
        failed: Failed::unknown(failed(error)),
        may_be_left_open,
    }
}

/// Returns the text that follows the tag of the statement in a row; `None` if the row does not
/// belong to this execution of the statement.
fn suffix<'r>(row: &'r PgRow, statement: &Statement, question: i64) -> Option<&'r str> {
    let tag: &str = row.try_get("statement").ok()?;
    let suffix = tag.strip_prefix(statement.tag())?;
    let is_known = suffix.is_empty() || suffix == IN_OPEN_TRANSACTION;
    let repeated: i64 = row.try_get("question").ok()?;
    (is_known && repeated == question).then_some(suffix)
}

/// Whether a statement with this error had no effect, and may succeed in a READ COMMITTED
/// transaction. The codes are a serialization failure and a deadlock (PostgreSQL, appendix A).
fn is_repeated(error: &sqlx::Error) -> bool {
    matches!(code(error).as_deref(), Some("40001" | "40P01"))
}

/// Whether the server reports a protocol violation (08P01) because it received the parameters of
/// another statement. PgBouncer uses the same code for all of its own errors, and most of these
/// errors mean an outage.
fn is_mix_up(error: &sqlx::Error) -> bool {
    // The server adds the name of its C function, which it never translates. PgBouncer adds none.
    let error = error.as_database_error();
    let error = error.and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| error.routine() == Some("exec_bind_message"))
}

const LEFT_OPEN: Error = Error::store_unavailable(
    "the application left a transaction open in a session of the pool, and the store could not end it; try again",
);

pub(crate) const POOLER: Error = Error::configuration(
    "the connection leads through a pooler in transaction mode, such as PgBouncer, which mixes statements up; set \
     `with_transaction_pooler`, add `transaction_pooler=true` to the URL, or put the pooler into session mode",
);

pub(crate) const MIXED_UP: Error = Error::configuration(
    "the reply of the database belongs to another statement; if a pooler in transaction mode is in between, set \
     `with_transaction_pooler`",
);

const CONFLICT: Error = Error::store_unavailable(
    "the transaction conflicts with another one that changes the same record, or the two form a deadlock; \
     roll it back and run all of it again, preferably at READ COMMITTED",
);

#[cfg(test)]
mod tests {
    use super::super::error::tests::of_server;
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_lock_timeout_is_never_zero_which_would_be_none() {
        for timeout in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
            let sending = Sending::new(timeout, false, false);
            let millis: u128 = sending.lock_timeout.trim_end_matches("ms").parse().unwrap();
            assert!((1..=DAY).contains(&millis), "{timeout:?}: {millis}");
            assert_eq!(sending.lock_timeout(Within::Callers), None);
        }
    }

    /// Says which errors close the connection, which ones say that a statement had no effect, and
    /// after which ones the session may still be in a transaction.
    #[test]
    fn an_error_of_the_server_decides_what_becomes_of_its_connection() {
        use Fate::{Refused, Unknown};
        let direct = Sending::new(Duration::from_secs(5), false, false);
        for (code, kind, fate, may_be_left_open) in [
            ("25P02", ErrorKind::StoreUnavailable, Unknown, true),
            ("55P03", ErrorKind::StoreUnavailable, Refused, true),
            ("57014", ErrorKind::StoreUnavailable, Refused, true),
            ("42P05", ErrorKind::Configuration, Unknown, true),
            ("26000", ErrorKind::Configuration, Unknown, true),
            ("42P01", ErrorKind::Configuration, Refused, true),
            // PgBouncer reports each of its own errors by this code.
            ("08P01", ErrorKind::StoreUnavailable, Unknown, false),
            ("57P01", ErrorKind::StoreUnavailable, Unknown, false),
            ("58030", ErrorKind::StoreUnavailable, Unknown, false),
            ("XX000", ErrorKind::StoreUnavailable, Unknown, false),
        ] {
            for within in [Within::Own, Within::Callers] {
                let fault = direct.classify(of_server(code), within);
                let failed = &fault.failed;
                let found = (failed.error.kind(), failed.fate, fault.may_be_left_open);
                assert_eq!(found, (kind, fate, may_be_left_open), "{code} {within:?}");
                assert_eq!(failed.is_cancelled, code == "57014", "{code}");
            }
        }
        let lost = direct.classify(sqlx::Error::WorkerCrashed, Within::Own);
        assert_eq!((lost.failed.fate, lost.may_be_left_open), (Unknown, false));
    }

    /// Only the application can run its transaction again.
    #[test]
    fn a_conflict_tells_the_application_to_repeat_its_own_transaction_and_no_other() {
        let sending = Sending::new(Duration::from_secs(5), false, false);
        for code in ["40001", "40P01"] {
            for (within, is_told) in [(Within::Own, false), (Within::Callers, true)] {
                let failed = sending.classify(of_server(code), within).failed;
                assert_eq!(failed.error.kind(), ErrorKind::StoreUnavailable);
                assert_eq!(failed.fate, Fate::Refused);
                let text = failed.error.to_string();
                assert_eq!(text.contains("roll it back"), is_told, "{code} {within:?}: {text}");
            }
        }
    }

    #[test]
    fn a_transaction_that_could_not_begin_may_be_open_unless_the_connection_broke() {
        for (error, may_be_left_open) in [
            (of_server("25001"), true),
            (of_server("57014"), false),
            (of_server("08006"), false),
            (sqlx::Error::WorkerCrashed, false),
        ] {
            let fault = not_begun(error);
            assert_eq!(fault.failed.fate, Fate::Unknown);
            assert_eq!(fault.may_be_left_open, may_be_left_open, "{:?}", fault.failed);
        }
    }
}
