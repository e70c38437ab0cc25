//! A check that a server must pass before a store uses the server.

use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use tokio::runtime::{Handle, Id};

use crate::catch_panic::catch_panic;
use crate::clock::Deadline;
use crate::error::Error;
use crate::sharded::lock;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};

/// The age from which no further operation joins a run. With the default timeouts, a check ends
/// earlier by itself. An older run may wait for an event that no longer happens, so the next
/// operation begins another run.
const LONGEST_RUN: Duration = Duration::from_secs(30);

/// The record that a server was checked after the last event that may have changed the server.
///
/// Operations of one runtime that find the server unchecked share one run of the check, and its
/// result. Each runtime has a run of its own, because timers and sockets belong to the runtime that
/// made them. A run in a runtime that is blocked, or that nothing drives, would hang, and the
/// operations of all other runtimes would hang with it.
///
/// After a check that passed, an operation only loads two atomics.
#[derive(Debug)]
pub(super) struct Checked {
    /// Counts the events after which the check must run again.
    epoch: AtomicU64,
    /// The epoch in which the last check that passed began.
    passed: AtomicU64,
    /// At most one run per runtime.
    running: Mutex<Vec<Running>>,
}

type Check = BoxFuture<'static, Result<(), Error>>;

/// A run of the check. The waiting operations own its future, so the run ends when the last of them
/// is dropped.
#[derive(Debug)]
struct Running {
    epoch: u64,
    /// The runtime whose operations share the run.
    runtime: Option<Id>,
    /// The time until which operations join the run.
    open_until: Deadline,
    check: WeakShared<Check>,
}

impl Checked {
    /// Returns the state of a server that was not checked yet.
    pub(super) const fn not_yet() -> Self {
        Self {
            epoch: AtomicU64::new(1),
            passed: AtomicU64::new(0),
            running: Mutex::new(Vec::new()),
        }
    }

    /// Returns the current epoch if its check has passed.
    pub(super) fn passed(&self) -> Option<u64> {
        let epoch = self.epoch();
        (self.passed.load(Ordering::Acquire) == epoch).then_some(epoch)
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Records that the server may have changed since `epoch`. If several operations notice the
    /// same change, only the first call has an effect.
    #[cfg(feature = "redis")]
    pub(super) fn expire(&self, epoch: u64) {
        let next = epoch.saturating_add(1);
        let _ = self
            .epoch
            .compare_exchange(epoch, next, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Records that the server may have changed just now.
    #[cfg(feature = "redis")]
    pub(super) fn expire_now(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Records that a check has passed in the current epoch.
    #[cfg(any(test, feature = "postgres"))]
    pub(super) fn pass(&self) {
        self.passed.fetch_max(self.epoch(), Ordering::AcqRel);
    }

    /// Runs the check, or waits for the run of another operation. Returns the epoch in which the
    /// check passed.
    ///
    /// # Errors
    ///
    /// The error of the check, which all operations that share this run get. A later operation
    /// begins a new run.
    pub(super) async fn check(&self, check: impl Fn() -> Check) -> Result<u64, Error> {
        /// The number of checks in a row after which an operation fails if the server changes
        /// during each of them.
        const MOST: usize = 4;
        const RESTLESS: Error = Error::store_unavailable(
            "the connection to the store broke several times while the store checked the server; try again",
        );
        for _ in 0..MOST {
            if let Some(epoch) = self.passed() {
                return Ok(epoch);
            }
            let (epoch, running) = self.join(&check);
            running.await?;
            self.passed.fetch_max(epoch, Ordering::AcqRel);
        }
        self.passed().ok_or(RESTLESS)
    }

    /// Joins the run of this epoch and runtime, or begins a new one.
    fn join(&self, check: impl Fn() -> Check) -> (u64, Shared<Check>) {
        let runtime = Handle::try_current().ok().map(|runtime| runtime.id());
        let mut running = lock(&self.running);
        let epoch = self.epoch();
        running.retain(|run| run.epoch == epoch && run.is_joinable());
        let own = running.iter().find(|run| run.runtime == runtime);
        if let Some(joined) = own.and_then(|run| run.check.upgrade()) {
            return (epoch, joined);
        }
        let begun = without_panic(check()).shared();
        running.retain(|run| run.runtime != runtime);
        running.extend(begun.downgrade().map(|check| Running {
            epoch,
            runtime,
            open_until: Deadline::after(LONGEST_RUN),
            check,
        }));
        (epoch, begun)
    }
}

impl Running {
    /// Returns true if the run has no result yet and may still get one. An operation keeps its
    /// handle until it is polled or dropped, so the handles of a run may outlive its result for a
    /// long time.
    fn is_joinable(&self) -> bool {
        let has_no_result = |check: Shared<Check>| check.peek().is_none();
        self.check.upgrade().is_some_and(has_no_result) && !self.open_until.left().is_zero()
    }
}

/// Turns a panic of the check into an error. Otherwise the panic would spread to every operation
/// that shares the run.
fn without_panic(check: Check) -> Check {
    const PANICKED: Error = Error::store_unavailable(
        "the check of the server panicked; this is a bug of the store or its client library, please report it",
    );
    let checked = catch_panic(check).map(|result| result.unwrap_or(Err(PANICKED)));
    checked.boxed()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use futures::future::join_all;
    use futures::poll;
    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::Notify;

    use super::*;
    use crate::error::ErrorKind;

    /// Returns a check that counts its runs and waits until its gate opens.
    fn counting(runs: &Arc<AtomicUsize>, gate: &Arc<Notify>, passes: bool) -> impl Fn() -> Check + use<> {
        let (runs, gate) = (Arc::clone(runs), Arc::clone(gate));
        move || {
            let (runs, gate) = (Arc::clone(&runs), Arc::clone(&gate));
            Box::pin(async move {
                runs.fetch_add(1, Ordering::SeqCst);
                gate.notified().await;
                passes.then_some(()).ok_or(Error::configuration("wrong"))
            })
        }
    }

    /// Returns the number of runs of a check, the gate that it waits for, a state, and the check.
    fn set_up(passes: bool) -> (Arc<AtomicUsize>, Arc<Notify>, Checked, impl Fn() -> Check) {
        let (runs, gate) = (Arc::default(), Arc::default());
        let check = counting(&runs, &gate, passes);
        (runs, gate, Checked::not_yet(), check)
    }

    #[cfg(feature = "redis")]
    fn gate_opened() -> Arc<Notify> {
        let gate = Arc::<Notify>::default();
        gate.notify_one();
        gate
    }

    #[tokio::test]
    async fn operations_share_one_check_and_its_result() {
        for passes in [true, false] {
            let (runs, gate, checked, check) = set_up(passes);
            let all = join_all((0..100).map(|_| checked.check(&check)));
            let (results, ()) = tokio::join!(all, async { gate.notify_one() });
            assert!(results.iter().all(|result| result.is_ok() == passes));
            assert_eq!(runs.load(Ordering::SeqCst), 1);
            assert_eq!(checked.passed().is_some(), passes);
        }
    }

    #[cfg(feature = "redis")]
    #[tokio::test]
    async fn a_check_that_began_before_the_last_event_does_not_count() {
        let (runs, gate, checked, check) = set_up(true);
        let mut waiting = Box::pin(checked.check(&check));
        assert!(futures::poll!(&mut waiting).is_pending());
        checked.expire_now();
        gate.notify_one();
        assert!(futures::poll!(&mut waiting).is_pending());
        assert!(checked.passed().is_none());
        gate.notify_one();
        waiting.await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), 2);
        let epoch = checked.passed().unwrap();
        for _ in 0..2 {
            checked.expire(epoch);
            assert!(checked.passed().is_none());
        }
        assert_eq!(
            checked.check(&counting(&runs, &gate_opened(), true)).await.unwrap(),
            epoch + 1
        );
    }

    #[tokio::test]
    async fn a_check_that_every_operation_gave_up_begins_anew() {
        let (runs, gate, checked, check) = set_up(true);
        let mut given_up = Box::pin(checked.check(&check));
        assert!(futures::poll!(&mut given_up).is_pending());
        drop(given_up);
        gate.notify_one();
        checked.check(&check).await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), 2);
    }

    /// Returns a check whose first run does `first`. All later runs pass.
    fn first(first: impl Fn() -> Check) -> impl Fn() -> Check {
        let runs = AtomicUsize::new(0);
        move || match runs.fetch_add(1, Ordering::SeqCst) {
            0 => first(),
            _ => std::future::ready(Ok(())).boxed(),
        }
    }

    fn runtime() -> Runtime {
        Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[tokio::test]
    async fn a_failed_check_is_repeated_although_an_operation_has_not_seen_its_result() {
        for kind in [ErrorKind::StoreUnavailable, ErrorKind::Configuration] {
            let failing = move || -> Check {
                async move {
                    tokio::task::yield_now().await;
                    Err(Error::new(kind, "the server is restarting"))
                }
                .boxed()
            };
            let (check, checked) = (first(failing), Checked::not_yet());
            // A blocked thread does not poll this operation again, so the operation keeps its
            // handle.
            let mut blocked = Box::pin(checked.check(&check));
            assert!(poll!(&mut blocked).is_pending());
            assert_eq!(checked.check(&check).await.unwrap_err().kind(), kind);
            checked.check(&check).await.unwrap();
            assert_eq!(blocked.await.unwrap_err().kind(), kind);
        }
    }

    #[tokio::test]
    async fn a_check_that_panics_fails_all_operations_that_share_it_and_is_repeated() {
        let gate = Arc::<Notify>::default();
        let panicking = || -> Check {
            let gate = Arc::clone(&gate);
            async move {
                gate.notified().await;
                panic!("a reply that no server sends")
            }
            .boxed()
        };
        let (check, checked) = (first(panicking), Checked::not_yet());
        let mut blocked = Box::pin(checked.check(&check));
        assert!(poll!(&mut blocked).is_pending());
        let sharing = join_all((0..3).map(|_| checked.check(&check)));
        let (results, ()) = tokio::join!(sharing, async { gate.notify_one() });
        for result in results {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::StoreUnavailable);
        }
        checked.check(&check).await.unwrap();
        assert_eq!(blocked.await.unwrap_err().kind(), ErrorKind::StoreUnavailable);
    }

    #[test]
    fn a_check_of_a_runtime_that_nothing_drives_holds_up_no_other_runtime() {
        let (stopped, other) = (runtime(), runtime());
        let (check, checked) = (first(|| std::future::pending().boxed()), Checked::not_yet());
        let mut waiting = Box::pin(checked.check(&check));
        stopped.block_on(async { assert!(poll!(&mut waiting).is_pending()) });
        let result = other.block_on(async { checked.check(&check).now_or_never() });
        result.expect("the operation waits for the other runtime").unwrap();
        // A check that passed counts for all runtimes.
        assert!(checked.passed().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_hangs_is_replaced_after_its_longest_time() {
        let (check, checked) = (first(|| std::future::pending().boxed()), Checked::not_yet());
        let mut hanging = Box::pin(checked.check(&check));
        assert!(poll!(&mut hanging).is_pending());
        tokio::time::advance(LONGEST_RUN - Duration::from_millis(1)).await;
        assert!(checked.check(&check).now_or_never().is_none());
        tokio::time::advance(Duration::from_millis(1)).await;
        checked.check(&check).now_or_never().unwrap().unwrap();
    }
}
