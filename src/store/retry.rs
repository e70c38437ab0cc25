//! Time limits and retries of store operations.

use std::time::Duration;

use futures::FutureExt;
use futures::future::Either;

use super::Store;
use crate::clock::{Deadline, within};
use crate::error::{Error, ErrorKind};
use crate::protocol::{Claim, Decision};
use crate::telemetry::{self, Event};

pub(crate) const TIMED_OUT: Error = Error::store_unavailable("the idempotency store did not reply in time");

/// Runs an operation of the store. Fails with [`TIMED_OUT`] after `timeout`.
pub(crate) fn with_timeout<T>(
    timeout: Duration,
    operation: impl Future<Output = Result<T, Error>>,
) -> impl Future<Output = Result<T, Error>> {
    within(timeout, operation).map(|done| done.unwrap_or(Err(TIMED_OUT)))
}

/// The time for the last look at the record. The store can use it even if the time of the wait is
/// up.
pub(crate) const LAST_LOOK: Duration = Duration::from_millis(500);

/// Returns how long an operation of the store may take while a request waits for another one: the
/// rest of the wait, but at least [`LAST_LOOK`], and at most `timeout`.
pub(crate) fn limit_in_wait(timeout: Duration, deadline: Deadline) -> Duration {
    timeout.min(deadline.left().max(LAST_LOOK))
}

/// Claims a key. The claim fails after `timeout`, or earlier by the store's own limit.
pub(crate) fn claim_with_timeout<'c, St: Store>(
    timeout: Duration,
    store: &'c St,
    claim: &'c Claim,
) -> impl Future<Output = Result<Decision, Error>> + Send + use<'c, St> {
    let claimed = store.claim(claim);
    match store.claim_limit() {
        Some(limit) if limit <= timeout => Either::Left(claimed),
        _ => Either::Right(with_timeout(timeout, claimed)),
    }
}

/// The time limits of a write that must be recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoreRetry {
    /// The limit of one operation.
    pub(crate) operation: Duration,
    /// The time in which a further try may begin, from the end of the first one. So all tries and
    /// pauses together take at most this time and the limits of two tries.
    pub(crate) in_all: Duration,
    /// The longest pause between two tries.
    pause: Duration,
}

impl StoreRetry {
    pub(crate) const fn new(operation: Duration, in_all: Duration) -> Self {
        Self {
            operation,
            in_all,
            pause: Duration::from_secs(1),
        }
    }

    /// Returns whether an owner repeats an operation that failed with this error. A misconfigured
    /// store is worth another try, because an operator may correct it in time. A demoted primary
    /// counts as misconfigured until its name resolves to the new primary.
    pub(crate) fn repeats(error: &Error) -> bool {
        matches!(error.kind(), ErrorKind::Configuration | ErrorKind::StoreUnavailable)
    }

    /// Returns the limits for a write that continues after its caller has left: twelve times as
    /// long.
    pub(crate) const fn deferred(mut self) -> Self {
        self.in_all = self.in_all.saturating_mul(12);
        self.pause = Duration::from_secs(5);
        self
    }

    /// Runs an operation. Repeats it while the store fails and the time lasts.
    pub(crate) async fn retry<T, F>(self, operation: impl Fn() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        match with_timeout(self.operation, operation()).await {
            Ok(done) => Ok(done),
            Err(error) => Box::pin(self.retry_again(operation, error)).await,
        }
    }

    async fn retry_again<T, F>(self, operation: impl Fn() -> F, mut last: Error) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut pause = Duration::from_millis(20);
        let deadline = Deadline::after(self.in_all);
        while Self::repeats(&last) && !deadline.left().is_zero() {
            telemetry::failure(Event::OperationRepeated, &last);
            drop(within(pause.min(deadline.left()), std::future::pending::<()>()).await);
            pause = self.pause.min(pause * 2);
            match with_timeout(self.operation, operation()).await {
                Ok(done) => return Ok(done),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
