//! When a lease must be renewed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::{micros, Stopwatch};

/// The schedule of one lease: a renewal is due after each third of its length, so that one may fail or hang and the next still comes
/// in time.
///
/// A task renews the lease when it is due. That task may be held up by what it does not control (a runtime that ended, a thread that is
/// blocked), so everything else that looks after the lease renews it once it is overdue.
#[derive(Debug)]
pub(crate) struct Schedule {
    lease: Duration,
    /// Runs since before the lease began.
    since: Stopwatch,
    /// In microseconds.
    due: AtomicU64,
}

impl Schedule {
    /// The schedule of a lease that began after `since`.
    pub(crate) fn new(lease: Duration, since: Stopwatch) -> Self {
        Self {
            lease,
            since,
            due: AtomicU64::new(micros(lease / 3)),
        }
    }

    pub(crate) const fn lease(&self) -> Duration {
        self.lease
    }

    /// Takes the renewal that is due now or within `soon`. Of several callers one takes it; the next renewal is due a third later.
    pub(crate) fn take(&self, soon: Duration) -> bool {
        let now = self.since.elapsed_micros();
        self.take_if(now, |due| now.saturating_add(micros(soon)) >= due)
    }

    /// Takes a renewal that nobody took for a sixth of the lease after it was due.
    pub(crate) fn take_overdue(&self) -> bool {
        let now = self.since.elapsed_micros();
        let sixth = micros(self.lease / 6);
        self.take_if(now, |due| now >= due.saturating_add(sixth))
    }

    fn take_if(&self, now: u64, is_due: impl FnOnce(u64) -> bool) -> bool {
        let due = self.due.load(Ordering::Relaxed);
        let next = now.saturating_add(micros(self.lease / 3));
        is_due(due)
            && self
                .due
                .compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Makes a renewal due now, because the last one failed or was left out.
    pub(crate) fn hurry(&self) {
        self.due.fetch_min(self.since.elapsed_micros(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(12);

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_is_due_at_each_third_and_taken_once() {
        let schedule = Schedule::new(LEASE, Stopwatch::start());
        pass(3).await;
        assert!(!schedule.take(Duration::ZERO));
        pass(1).await;
        assert!(schedule.take(Duration::ZERO));
        assert!(!schedule.take(Duration::ZERO));
        pass(3).await;
        assert!(schedule.take(Duration::from_secs(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_is_overdue_when_half_of_the_lease_has_passed() {
        let schedule = Schedule::new(LEASE, Stopwatch::start());
        pass(5).await;
        assert!(!schedule.take_overdue());
        pass(1).await;
        assert!(schedule.take_overdue());
        assert!(!schedule.take_overdue());
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_that_failed_is_due_at_once_and_not_yet_overdue() {
        let schedule = Schedule::new(LEASE, Stopwatch::start());
        pass(4).await;
        assert!(schedule.take(Duration::ZERO));
        schedule.hurry();
        assert!(!schedule.take_overdue());
        assert!(schedule.take(Duration::ZERO));
    }
}
