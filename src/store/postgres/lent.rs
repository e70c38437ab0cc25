//! A connection that is lent for one operation.

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::Postgres;

use super::error::failed;
use crate::clock::Elapsed;
use crate::error::{Error, ErrorKind};

/// A connection of the pool. Dropped before it is given back, it is closed: an operation is under way on it, whose reply may
/// never come, and whoever got it next would wait for that.
pub(super) struct Lent(Option<PoolConnection<Postgres>>);

impl Lent {
    pub(super) async fn from(pool: &PgPool) -> Result<Self, Error> {
        pool.acquire()
            .await
            .map(|connection| Self(Some(connection)))
            .map_err(failed)
    }

    pub(super) fn connection(&mut self) -> Result<&mut PgConnection, Error> {
        const GONE: Error = Error::new(ErrorKind::StoreUnavailable, "the connection was given back already");
        self.0.as_deref_mut().ok_or(GONE)
    }

    /// Ends an operation; one that took too long ends its connection.
    pub(super) fn give_back<T>(mut self, done: Result<Result<T, Error>, Elapsed>) -> Result<T, Error> {
        const LATE: Error = Error::new(ErrorKind::StoreUnavailable, "the database did not answer in time");
        let done = done.map_err(|_| LATE)?;
        drop(self.0.take());
        done
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}
