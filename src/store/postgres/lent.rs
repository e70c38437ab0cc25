//! A connection that is lent for one operation.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::Postgres;

use super::error::failed;
use crate::clock::within;
use crate::error::{Error, ErrorKind};

/// A connection of the pool. Dropped before it is given back, it is closed: an operation is under way on it, whose reply may
/// never come, and whoever got it next would wait for that.
pub(crate) struct Lent(Option<PoolConnection<Postgres>>);

impl Lent {
    pub(crate) async fn from(pool: &PgPool) -> Result<Self, Error> {
        // In a box: it has room for the making of a connection, with TLS, and every operation would carry that twice.
        let acquired = sound(Box::pin(pool.acquire())).await?;
        acquired.map(|connection| Self(Some(connection))).map_err(failed)
    }

    pub(crate) fn connection(&mut self) -> Result<&mut PgConnection, Error> {
        const GONE: Error = Error::new(ErrorKind::StoreUnavailable, "the connection was given back already");
        self.0.as_deref_mut().ok_or(GONE)
    }

    /// Ends an operation; one that was [given up](bounded) ends its connection.
    pub(crate) fn give_back<T>(mut self, done: Result<Result<T, Error>, Error>) -> Result<T, Error> {
        let done = done?;
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

/// What an operation came to, or why it was given up: it took too long, or the driver panicked.
///
/// Plain functions, these two: an async one would have room for what it is given, and again for what it makes of it.
pub(crate) fn bounded<T>(
    limit: Duration,
    operation: impl Future<Output = Result<T, Error>>,
) -> impl Future<Output = Result<Result<T, Error>, Error>> {
    const LATE: Error = Error::new(ErrorKind::StoreUnavailable, "the database did not answer in time");
    within(limit, sound(operation)).map(|done| done.unwrap_or(Err(LATE)))
}

/// What comes of talking to a server. Over some messages that no server sends, sqlx 0.9 panics.
pub(super) fn sound<T>(talk: impl Future<Output = T>) -> impl Future<Output = Result<T, Error>> {
    const NONSENSE: Error = Error::new(
        ErrorKind::StoreUnavailable,
        "what answered is no PostgreSQL server, or the connection was damaged",
    );
    AssertUnwindSafe(talk)
        .catch_unwind()
        .map(|told| told.map_err(|_| NONSENSE))
}
