//! How long a store is given, and how often it is asked again.

use std::future::Future;
use std::time::Duration;

use futures::future::Either;
use futures::FutureExt;

use super::Store;
use crate::clock::{within, Deadline};
use crate::error::{Error, ErrorKind};
use crate::protocol::{Claim, Decision, Snapshot, Status};
use crate::telemetry::{self, Event};

/// An operation of the store, given up as failed after `timeout`.
pub(crate) fn in_time<T>(
    timeout: Duration,
    operation: impl Future<Output = Result<T, Error>>,
) -> impl Future<Output = Result<T, Error>> {
    const LATE: Error = Error::new(
        ErrorKind::StoreUnavailable,
        "the idempotency store did not answer in time",
    );
    within(timeout, operation).map(|done| done.unwrap_or(Err(LATE)))
}

/// Claims a key; given up as failed after `timeout`, unless the store itself gives it up earlier.
pub(crate) fn claim_in_time<'c, St: Store>(
    timeout: Duration,
    store: &'c St,
    claim: &'c Claim,
) -> impl Future<Output = Result<Decision, Error>> + Send + use<'c, St> {
    let asked = store.claim(claim);
    match store.claim_limit() {
        Some(limit) if limit <= timeout => Either::Left(asked),
        _ => Either::Right(in_time(timeout, asked)),
    }
}

/// A claim that has just failed the second time, and may have been granted.
pub(crate) struct LateClaim {
    /// When its lease is over, at the earliest.
    lease: Deadline,
}

impl LateClaim {
    pub(crate) fn new(lease: Duration, timeout: Duration) -> Self {
        Self {
            lease: Deadline::after(lease.saturating_sub(timeout.saturating_mul(2))),
        }
    }

    /// Whether the record can be its own. If not, to repeat it could use an attempt up for nothing.
    pub(crate) fn may_be_granted(&self, snapshot: Option<&Snapshot>) -> bool {
        match snapshot.map(|snapshot| &snapshot.status) {
            // It may yet arrive.
            None | Some(Status::InFlight { .. }) => true,
            // Before its lease is over, the lost one is another's.
            Some(Status::Lost) => self.lease.left().is_zero(),
            Some(Status::Completed(_) | Status::Unknown) => false,
        }
    }
}

/// How long a store is given for what must be recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For one operation.
    pub(crate) operation: Duration,
    /// For all repetitions of it.
    pub(crate) in_all: Duration,
}

impl Patience {
    /// Whether an operation that failed like this may succeed when it is repeated.
    pub(crate) fn repeats(error: &Error) -> bool {
        error.kind() == ErrorKind::StoreUnavailable
    }

    /// For what goes on when nobody waits for it any more: twelve times as long.
    pub(crate) const fn behind(mut self) -> Self {
        self.in_all = self.in_all.saturating_mul(12);
        self
    }

    /// Does an operation, and repeats it while the store fails.
    pub(crate) async fn persist<T, F>(self, operation: impl Fn() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        match in_time(self.operation, operation()).await {
            Ok(done) => Ok(done),
            Err(error) => Box::pin(self.persist_again(operation, error)).await,
        }
    }

    async fn persist_again<T, F>(self, operation: impl Fn() -> F, mut last: Error) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        const LONGEST_PAUSE: Duration = Duration::from_secs(1);
        let mut pause = Duration::from_millis(20);
        let deadline = Deadline::after(self.in_all);
        while Self::repeats(&last) && !deadline.left().is_zero() {
            telemetry::failure(Event::CompletionRepeated, &last);
            drop(within(pause.min(deadline.left()), std::future::pending::<()>()).await);
            pause = LONGEST_PAUSE.min(pause * 2);
            match in_time(self.operation, operation()).await {
                Ok(done) => return Ok(done),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
