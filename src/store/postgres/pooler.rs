//! The detection of a pooler in transaction mode.
//!
//! Such a pooler lends a server for one transaction at a time. Statements that consist of several messages, named statements, LISTEN
//! and session settings then go to servers that know nothing of each other.

use std::collections::HashSet;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::{Connection, Row};
use tokio::sync::OnceCell;

use super::ask::{Sending, POOLER};
use super::error::{code, failed, of_connect};
use super::lent::{sound, LATE};
use crate::clock::within;
use crate::error::Error;

/// Lets operations pass once it is known that no pooler in transaction mode is in between, or that they are prepared for one.
#[derive(Debug, Default)]
pub(crate) struct Gate(OnceCell<()>);

impl Gate {
    /// A gate of a pool whose options were [checked](refuse_pooler).
    pub(super) fn open() -> Self {
        Self(OnceCell::new_with(Some(())))
    }

    pub(crate) async fn pass(&self, pool: &PgPool, sending: &Sending) -> Result<(), Error> {
        if sending.is_pooled() || self.0.initialized() {
            return Ok(());
        }
        let options = pool.connect_options();
        let checked = Box::pin(self.0.get_or_try_init(|| async move { refuse_pooler(&options).await }));
        checked.await.copied()
    }
}

/// Fails where connections lead through a pooler in transaction mode. Opens two, which are closed again.
pub(super) async fn refuse_pooler(options: &PgConnectOptions) -> Result<(), Error> {
    const LONGEST: Duration = Duration::from_secs(10);
    let asked = within(LONGEST, sound(Box::pin(is_pooled(options))))
        .await
        .unwrap_or(Err(LATE))?;
    match asked {
        Ok(false) => Ok(()),
        Ok(true) => Err(POOLER),
        Err(error) => match code(&error).as_deref() {
            // A server that takes no more connections: what a pooler mixes up is noticed later.
            Some("53300") => Ok(()),
            // PgBouncer's words for a startup parameter that it does not know, and for BEGIN in statement mode.
            Some("08P01") => Err(POOLER.with_source(failed(error))),
            _ => Err(of_connect(error)),
        },
    }
}

/// Whether two connections share servers, or one changes its server. One of them holds a transaction open meanwhile, so that the
/// other cannot be given the same server by chance.
async fn is_pooled(options: &PgConnectOptions) -> sqlx::Result<bool> {
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

/// The process that serves a connection. A simple query is one message, which no pooler takes apart.
async fn server_of(connection: &mut PgConnection, text: &'static str) -> sqlx::Result<i32> {
    let rows = sqlx::raw_sql(text).fetch_all(connection).await?;
    rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get(0)
}
