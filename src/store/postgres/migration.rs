//! The migration that makes a table.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor};

use super::ask::Failed;
use super::error::{failed, not_made};
use super::progress::note_statement;
use super::session::end_open_transaction;
use super::table::Statement;

/// Runs the SQL of `schema`. Several processes may do so at the same time. They wait for each other
/// by the advisory lock with the number `lock`. The server ends each wait, and each statement,
/// after 60 s.
pub(crate) async fn make_table(connection: &mut PgConnection, lock: i64, schema: &Statement) -> Result<(), Failed> {
    let lost = |error| Failed::unknown(failed(error));
    end_open_transaction(connection).await.map_err(lost)?;
    // `IF NOT EXISTS` alone can still fail if two sessions make the same table at the same time.
    // The timeouts of the session may be too short for a migration, or missing.
    let begin = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '60s'; SET LOCAL statement_timeout = '60s'; \
         SELECT pg_advisory_xact_lock({lock})"
    );
    note_statement();
    // If this message fails in the middle, the transaction is open, and sqlx does not count it.
    let begun = connection.begin_with(AssertSqlSafe(begin)).await;
    let mut transaction = begun.map_err(|error| Failed::unknown(not_made(error)))?;
    note_statement();
    if let Err(error) = transaction.execute(sqlx::raw_sql(schema.safe(true))).await {
        transaction.rollback().await.map_err(lost)?;
        return Err(Failed::refused(not_made(error)));
    }
    note_statement();
    transaction.commit().await.map_err(lost)
}
