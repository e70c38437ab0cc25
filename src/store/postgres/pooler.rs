//! The detection of a pooler in transaction mode.
//!
//! Such a pooler lends a server for one transaction at a time. The messages of one statement, named
//! statements, LISTEN and session settings can then reach different servers, which do not share
//! state.

use std::collections::HashSet;
use std::time::Duration;

use futures::FutureExt;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::{Connection, Row};

use super::ask::{POOLER, Sending};
use super::error::{code, failed, of_connect};
use super::pooled::{TIMED_OUT, catch_driver_panic};
use crate::clock::within;
use crate::error::Error;
use crate::store::checked::Checked;

/// Lets an operation pass if it is prepared for a pooler in transaction mode, or once a check has
/// found no such pooler. Operations of one runtime share a run of the check.
#[derive(Debug)]
pub(crate) struct Gate(Checked);

impl Gate {
    /// Makes the gate of a pool whose options were [checked](refuse_pooler).
    pub(super) fn open() -> Self {
        let checked = Checked::not_yet();
        checked.pass();
        Self(checked)
    }

    pub(crate) async fn pass(&self, pool: &PgPool, sending: &Sending) -> Result<(), Error> {
        if sending.is_behind_pooler() || self.0.passed().is_some() {
            return Ok(());
        }
        let check = || {
            let options = pool.connect_options();
            async move { refuse_pooler(&options).await }.boxed()
        };
        Box::pin(self.0.check(check)).await.map(drop)
    }
}

impl Default for Gate {
    /// Makes the gate of a pool that was not checked yet.
    fn default() -> Self {
        Self(Checked::not_yet())
    }
}

/// Fails if connections lead through a pooler in transaction mode. Opens two connections for this,
/// and closes them again.
pub(super) async fn refuse_pooler(options: &PgConnectOptions) -> Result<(), Error> {
    const LONGEST: Duration = Duration::from_secs(10);
    let checked = within(LONGEST, catch_driver_panic(Box::pin(is_behind_pooler(options))))
        .await
        .unwrap_or(Err(TIMED_OUT))?;
    match checked {
        Ok(false) => Ok(()),
        Ok(true) => Err(POOLER),
        Err(error) => match code(&error).as_deref() {
            // The server accepts no more connections. If a pooler mixes statements up, the tags of
            // the rows show it later.
            Some("53300") => Ok(()),
            Some("08P01") if is_of_pooler(&error) => Err(POOLER.with_source(failed(error))),
            _ => Err(of_connect(error)),
        },
    }
}

/// Whether a pooler refuses a startup parameter, or a transaction in statement mode. PgBouncer uses
/// one code for all of its errors, including those of an outage.
fn is_of_pooler(error: &sqlx::Error) -> bool {
    let message = error.as_database_error().map(sqlx::error::DatabaseError::message);
    message.is_some_and(|message| {
        message.starts_with("unsupported startup parameter") || message.contains("statement pooling mode")
    })
}

/// Whether two connections share a server, or one of them changes its server. One of them keeps a
/// transaction open, so that a pooler must give the other one another server.
async fn is_behind_pooler(options: &PgConnectOptions) -> sqlx::Result<bool> {
    const ROUNDS: usize = 3;
    const LONGEST: Duration = Duration::from_secs(5);
    let (mut one, mut other) = (
        PgConnection::connect_with(options).await?,
        PgConnection::connect_with(options).await?,
    );
    let (mut of_one, mut of_other) = (HashSet::new(), HashSet::new());
    for _ in 0..ROUNDS {
        of_one.insert(server_of(&mut one, "SELECT pg_backend_pid()").await?);
        of_other.insert(server_of(&mut other, "BEGIN; SELECT pg_backend_pid()").await?);
        // The pooler may have no other server.
        if of_one.is_disjoint(&of_other) {
            let server = within(LONGEST, server_of(&mut one, "SELECT pg_backend_pid()")).await;
            of_one.insert(server.unwrap_or(Err(sqlx::Error::PoolTimedOut))?);
        }
        if of_one.len() > 1 || of_other.len() > 1 || !of_one.is_disjoint(&of_other) {
            return Ok(true);
        }
        sqlx::raw_sql("ROLLBACK").execute(&mut other).await?;
    }
    one.close().await?;
    other.close().await?;
    Ok(false)
}

/// Returns the process that serves a connection. A simple query is one message, which no pooler can
/// split.
async fn server_of(connection: &mut PgConnection, text: &'static str) -> sqlx::Result<i32> {
    let rows = sqlx::raw_sql(text).fetch_all(connection).await?;
    rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)
}
