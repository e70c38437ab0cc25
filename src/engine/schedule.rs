//! The schedule by which a lease is renewed.

use std::time::Duration;

use crate::clock::{Stopwatch, micros};
use crate::sync::atomic::{AtomicU64, Ordering};

/// The schedule of one lease. A renewal is due after each third of the lease, so that if one
/// renewal fails or hangs, the next one still comes in time.
///
/// A task renews the lease when a renewal is due. That task can be late, because its runtime has
/// ended or a thread is blocked. So the owner and the tasks of other runtimes renew the lease as
/// soon as the renewal is overdue.
#[derive(Debug)]
pub(crate) struct Schedule {
    lease: Duration,
    /// The stopwatch, which was started before the lease began.
    since: Stopwatch,
    /// The time of the next renewal, in microseconds on `since`. A compare-and-exchange of this one
    /// word decides which caller renews, and no other data depends on it.
    due: AtomicU64,
    /// The earliest time at which the lease may end, in microseconds on `since`. Only a renewal that
    /// has succeeded moves it. No other data depends on it.
    ends: AtomicU64,
}

impl Schedule {
    /// Makes the schedule of a lease that began after `since` was started.
    pub(crate) fn new(lease: Duration, since: Stopwatch) -> Self {
        Self {
            lease,
            since,
            due: AtomicU64::new(micros(lease / 3)),
            ends: AtomicU64::new(micros(lease)),
        }
    }

    /// Takes the renewal that is due now or within `soon`. If several callers try at once, at most
    /// one of them succeeds. The next renewal is due a third of the lease after this one was due,
    /// so that renewals that are taken early do not become more frequent. If this one is late, the
    /// next one is due a third of the lease from now.
    pub(crate) fn take(&self, soon: Duration) -> bool {
        let now = self.since.elapsed_micros();
        self.take_if(now, |due| now.saturating_add(micros(soon)) >= due)
    }

    /// Takes a renewal that neither a task nor the owner has taken within a sixth of the lease after it was due.
    pub(crate) fn take_overdue(&self) -> bool {
        let now = self.since.elapsed_micros();
        let sixth = micros(self.lease / 6);
        self.take_if(now, |due| now >= due.saturating_add(sixth))
    }

    /// Whether the lease may have ended. This is so once a whole lease has passed since the lease
    /// began and since the last successful renewal was sent.
    pub(crate) fn may_have_ended(&self) -> bool {
        self.since.elapsed_micros() >= self.ends.load(Ordering::Relaxed)
    }

    /// Returns the time at which the lease ends if a renewal that is sent now succeeds. Pass this time
    /// to [`renewed`](Self::renewed).
    pub(crate) fn end_after_renewal(&self) -> u64 {
        self.since.elapsed_micros().saturating_add(micros(self.lease))
    }

    /// Notes that a renewal has succeeded. `end` is the end of the lease, as
    /// [`end_after_renewal`](Self::end_after_renewal) returned it before the renewal was sent.
    pub(crate) fn renewed(&self, end: u64) {
        self.ends.fetch_max(end, Ordering::Relaxed);
    }

    fn take_if(&self, now: u64, is_due: impl FnOnce(u64) -> bool) -> bool {
        let due = self.due.load(Ordering::Relaxed);
        let next = due.max(now).saturating_add(micros(self.lease / 3));
        is_due(due)
            && self
                .due
                .compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Makes a renewal due after a pause of 1/24 of the lease, because the last renewal failed.
    /// Without the pause, a store that fails at once would get renewals without end.
    pub(crate) fn repeat(&self) {
        let pause = micros(self.lease / 24);
        let due = self.since.elapsed_micros().saturating_add(pause);
        self.due.fetch_min(due, Ordering::Relaxed);
    }

    /// Makes a renewal due now, because renewals were skipped.
    #[cfg(feature = "postgres")]
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

    /// A renewal that was taken early moved all later ones forward.
    #[tokio::test(start_paused = true)]
    async fn renewals_that_are_taken_early_do_not_become_more_frequent() {
        const TICK: Duration = Duration::from_secs(1);
        let schedule = Schedule::new(LEASE, Stopwatch::start());
        let mut taken = Vec::new();
        for second in 1..=24 {
            pass(1).await;
            if schedule.take(TICK) {
                taken.push(second);
            }
        }
        assert_eq!(taken, [3, 7, 11, 15, 19, 23]);
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
    async fn only_a_renewal_that_succeeds_moves_the_end_of_the_lease() {
        let schedule = Schedule::new(LEASE, Stopwatch::start());
        pass(4).await;
        assert!(schedule.take(Duration::ZERO));
        let end = schedule.end_after_renewal();
        pass(7).await;
        assert!(!schedule.may_have_ended());
        pass(1).await;
        assert!(schedule.may_have_ended());
        schedule.renewed(end);
        assert!(!schedule.may_have_ended());
        pass(3).await;
        assert!(!schedule.may_have_ended());
        pass(1).await;
        assert!(schedule.may_have_ended());
        // The reply to an earlier renewal does not shorten the lease.
        let later = schedule.end_after_renewal();
        schedule.renewed(later);
        schedule.renewed(end);
        assert!(!schedule.may_have_ended());
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_that_failed_is_due_after_a_pause_and_not_yet_overdue() {
        let schedule = Schedule::new(LEASE, Stopwatch::start());
        pass(4).await;
        assert!(schedule.take(Duration::ZERO));
        schedule.repeat();
        assert!(!schedule.take(Duration::ZERO));
        tokio::time::advance(LEASE / 24).await;
        assert!(!schedule.take_overdue());
        assert!(schedule.take(Duration::ZERO));
    }
}
