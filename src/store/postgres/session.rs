//! Sessions that an earlier user has left with an open transaction.
//!
//! sqlx counts open transactions on the client, and raises its count only after the reply to BEGIN.
//! A `begin()` that is dropped before, for example by a time limit, leaves the transaction open in
//! a session that returns to its pool. A statement in such a session succeeds, and is rolled back
//! later.
//!
//! The store detects such sessions. After a success, this needs no further round trip, because the
//! marker [`IS_ALONE`] in each row shows whether the statement began its transaction by itself.
//! After an error, a probe shows whether the session is in a failed transaction. No other user has
//! the session meanwhile, so the store ends the transaction, and repeats its statement. The rows of
//! the store's own pool have no marker until the application asks for that pool.

use sqlx::{Executor, Postgres, Row};

use super::error::code;
use super::progress::note_statement;

/// The SQL expression for whether a statement of the extended protocol began its transaction by
/// itself.
///
/// If a Bind message begins a transaction, PostgreSQL gives the transaction and the unnamed portal
/// the time of that message. `pg_cursor()` shows the time of the portal. If the two times differ,
/// the transaction was open before the message. `statement_timestamp()` is not suitable, because it
/// is the time of the Execute message.
///
/// The function takes about 15 µs, so the SQL calls it only if the transaction began more than 10
/// µs before the Execute message. The client sends Bind and Execute together, while an earlier
/// transaction began at least two messages and a reply before.
pub(super) const IS_ALONE: &str = "pg_catalog.statement_timestamp() - pg_catalog.transaction_timestamp() \
     BETWEEN interval '0' AND interval '10 microseconds' \
     OR EXISTS (SELECT FROM pg_catalog.pg_cursor() WHERE name = '' \
     AND creation_time = pg_catalog.transaction_timestamp())";

/// The SQL that fails in a transaction that began with an earlier message. Send it in one message
/// with BEGIN. Otherwise the two times differ.
pub(super) const IS_BEGUN: &str = "SELECT set_config('transaction_isolation', 'an earlier transaction is open', true) \
     WHERE transaction_timestamp() <> statement_timestamp()";

/// Ends a transaction that the session is in. Returns whether there was one.
pub(super) async fn end_open_transaction<C>(session: &mut C) -> sqlx::Result<bool>
where
    C: Send,
    for<'c> &'c mut C: Executor<'c, Database = Postgres>,
{
    // In a simple query, both functions return the time of the same message, unless the transaction
    // is older.
    const PROBE: &str = "SELECT transaction_timestamp() <> statement_timestamp()";
    note_statement();
    let is_open = match session.fetch_one(sqlx::raw_sql(PROBE)).await {
        Ok(row) => row.try_get(0)?,
        // The transaction has failed.
        Err(error) if code(&error).as_deref() == Some("25P02") => true,
        Err(error) => return Err(error),
    };
    if is_open {
        note_statement();
        session.execute(sqlx::raw_sql("ROLLBACK")).await?;
    }
    Ok(is_open)
}
