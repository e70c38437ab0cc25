//! A check that a server must pass before a store uses the server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use futures::future::{BoxFuture, Shared, WeakShared};
use futures::FutureExt;

use crate::error::{Error, ErrorKind};
use crate::sharded::lock;

/// Remembers whether a server was checked after the last event that may have changed the server.
///
/// Operations that find the server unchecked share one run of the check, and its result. After a check that passed, an
/// operation only loads two atomics.
#[derive(Debug)]
pub(super) struct Checked {
    /// Counts the events after which the check must run again.
    epoch: AtomicU64,
    /// The epoch in which the last check that passed began.
    passed: AtomicU64,
    running: Mutex<Option<Running>>,
}

type Check = BoxFuture<'static, Result<(), Error>>;

/// A check that is running. The waiting operations own its future, so the check ends when the last of them is dropped.
#[derive(Debug)]
struct Running {
    epoch: u64,
    check: WeakShared<Check>,
}

impl Checked {
    /// The state of a server that was not checked yet.
    pub(super) const fn not_yet() -> Self {
        Self {
            epoch: AtomicU64::new(1),
            passed: AtomicU64::new(0),
            running: Mutex::new(None),
        }
    }

    /// The current epoch, if its check has passed.
    pub(super) fn passed(&self) -> Option<u64> {
        let epoch = self.epoch();
        (self.passed.load(Ordering::Acquire) == epoch).then_some(epoch)
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Notes that the server may have changed since `epoch`. If several operations notice the same change, only the
    /// first one has an effect.
    #[cfg(feature = "redis")]
    pub(super) fn expire(&self, epoch: u64) {
        let next = epoch.saturating_add(1);
        let _ = self
            .epoch
            .compare_exchange(epoch, next, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Notes that the server may have changed just now.
    #[cfg(feature = "redis")]
    pub(super) fn expire_now(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Notes that a check has passed in the current epoch.
    #[cfg(any(test, feature = "postgres"))]
    pub(super) fn pass(&self) {
        self.passed.fetch_max(self.epoch(), Ordering::AcqRel);
    }

    /// Runs the check, or waits for the run of another operation; returns the epoch in which it passed.
    ///
    /// # Errors
    ///
    /// The check's error, which all operations that wait for this run get.
    pub(super) async fn check(&self, check: impl Fn() -> Check) -> Result<u64, Error> {
        /// The number of checks in a row after which an operation fails, if the server changes during each of them.
        const MOST: usize = 4;
        const RESTLESS: Error = Error::new(
            ErrorKind::StoreUnavailable,
            "the connection to the store was lost again and again while the server was checked",
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

    /// Joins the check that is running in this epoch, or begins a new one.
    fn join(&self, check: impl Fn() -> Check) -> (u64, Shared<Check>) {
        let mut running = lock(&self.running);
        let epoch = self.epoch();
        let current = running.as_ref().filter(|running| running.epoch == epoch);
        if let Some(joined) = current.and_then(|running| running.check.upgrade()) {
            return (epoch, joined);
        }
        let begun = check().shared();
        *running = begun.downgrade().map(|check| Running { epoch, check });
        (epoch, begun)
    }
}

#[cfg(all(test, feature = "redis"))]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::Arc;

    use futures::future::join_all;
    use tokio::sync::Notify;

    use super::*;

    /// A check that counts its runs and waits to be let through.
    fn counting(runs: &Arc<AtomicUsize>, gate: &Arc<Notify>, passes: bool) -> impl Fn() -> Check {
        let (runs, gate) = (Arc::clone(runs), Arc::clone(gate));
        move || {
            let (runs, gate) = (Arc::clone(&runs), Arc::clone(&gate));
            Box::pin(async move {
                runs.fetch_add(1, Ordering::SeqCst);
                gate.notified().await;
                passes
                    .then_some(())
                    .ok_or(Error::new(ErrorKind::Configuration, "wrong"))
            })
        }
    }

    fn gate_opened() -> Arc<Notify> {
        let gate = Arc::<Notify>::default();
        gate.notify_one();
        gate
    }

    #[tokio::test]
    async fn operations_share_one_check_and_its_result() {
        for passes in [true, false] {
            let (runs, gate, checked) = (Arc::default(), Arc::default(), Checked::not_yet());
            let check = counting(&runs, &gate, passes);
            let all = join_all((0..100).map(|_| checked.check(&check)));
            let (results, ()) = tokio::join!(all, async { gate.notify_one() });
            assert!(results.iter().all(|result| result.is_ok() == passes));
            assert_eq!(runs.load(Ordering::SeqCst), 1);
            assert_eq!(checked.passed().is_some(), passes);
        }
    }

    #[tokio::test]
    async fn a_check_that_began_before_the_last_event_does_not_count() {
        let (runs, gate, checked) = (Arc::default(), Arc::<Notify>::default(), Checked::not_yet());
        let check = counting(&runs, &gate, true);
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
        let (runs, gate, checked) = (Arc::default(), Arc::<Notify>::default(), Checked::not_yet());
        let check = counting(&runs, &gate, true);
        let mut given_up = Box::pin(checked.check(&check));
        assert!(futures::poll!(&mut given_up).is_pending());
        drop(given_up);
        gate.notify_one();
        checked.check(&check).await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), 2);
    }
}
