//! The wait for an owner in another process.

use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use futures::future::select;

use crate::clock::{Deadline, within};
use crate::error::{Error, ErrorKind};
use crate::protocol::{Snapshot, StorageKey};
use crate::store::{Store, TIMED_OUT, limit_in_wait, with_timeout};
use crate::telemetry::{self, Event};

/// The longest time between two looks at the record, in case a subscription misses a change.
pub(crate) const POLL: Duration = Duration::from_millis(500);

/// A request that waits for the owner of its key, as the loop of [`await_owner`] sees it.
pub(crate) trait Waiter {
    /// The result of a look that ends the wait.
    type Seen;

    /// Whether the first look has the whole time of a store operation, even if this request may not wait.
    const FIRST_LOOK_IN_FULL: bool = false;

    /// Notes that a look begins.
    fn begin_look(&mut self) {}

    /// Judges the record. Returns `None` while its owner runs.
    fn judge(&mut self, record: Option<Snapshot>) -> Option<Self::Seen>;

    /// Waits until this request must look again before the record changes.
    fn lookup_requested(&self) -> impl Future<Output = ()> + Send {
        pending()
    }
}

/// The end of a wait for an owner.
pub(crate) enum Waited<W: Waiter> {
    Seen(W::Seen),
    /// The time is up.
    TimeUp(W),
    /// The time is up, and the last look failed. The owner may still run.
    LastLookFailed(Error),
    /// The record could not be read.
    Failed(Error),
}

/// Waits for the owner of a key. Subscribes, looks and waits, in that order, so that no change of
/// the record is missed. Changes no record. Looks at least once, because the key may hold the
/// outcome already. Returns after `deadline` at the latest, plus the time of the last look (I7).
pub(crate) async fn await_owner<St: Store, W: Waiter>(
    store: &St,
    key: &StorageKey,
    timeout: Duration,
    deadline: Deadline,
    mut waiter: W,
) -> Waited<W> {
    let mut may_fail = true;
    let mut in_full = W::FIRST_LOOK_IN_FULL;
    loop {
        let watch = if deadline.left().is_zero() {
            None
        } else {
            let subscribing = with_timeout(timeout.min(deadline.left()), store.watch(key));
            subscribing.await.ok()
        };
        let limit = if std::mem::take(&mut in_full) {
            timeout
        } else {
            limit_in_wait(timeout, deadline)
        };
        waiter.begin_look();
        let looked = match within(limit, store.peek(key)).await {
            Ok(looked) => looked,
            // The look ended early because the wait is over. This says nothing about the store.
            Err(_) if limit < timeout => return Waited::TimeUp(waiter),
            Err(_) => Err(TIMED_OUT),
        };
        match looked {
            Ok(record) => {
                if let Some(seen) = waiter.judge(record) {
                    return Waited::Seen(seen);
                }
                may_fail = true;
            }
            Err(error) if deadline.left().is_zero() => {
                telemetry::store_failed(&error);
                return Waited::LastLookFailed(error);
            }
            // The owner still runs, so one failed look does not end the wait.
            Err(error) if may_fail && error.kind() == ErrorKind::StoreUnavailable => {
                telemetry::failure(Event::LookRepeated, &error);
                may_fail = false;
                drop(within(POLL.min(deadline.left()), pending::<()>()).await);
                continue;
            }
            Err(error) => {
                telemetry::store_failed(&error);
                return Waited::Failed(error);
            }
        }
        if deadline.left().is_zero() {
            return Waited::TimeUp(waiter);
        }
        let (watched, must_look) = (pin!(watched(watch)), pin!(waiter.lookup_requested()));
        drop(within(POLL.min(deadline.left()), select(watched, must_look)).await);
    }
}

/// Waits for the subscription, or without end if there is none.
async fn watched(watch: Option<impl Future<Output = ()>>) {
    match watch {
        Some(watch) => watch.await,
        None => pending().await,
    }
}
