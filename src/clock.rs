//! Time: the only file that reads the clocks.
//!
//! A [`Timestamp`] is the time of a *store*, in microseconds since the Unix epoch. The protocol
//! never reads a clock. The store passes a timestamp to it, because only the store's clock may
//! decide about leases and expiry.

use std::fmt;
use std::panic::catch_unwind;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_timer::Delay;
use pin_project_lite::pin_project;
use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, Sleep};

/// A point in time by the clock of a store, in microseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The latest timestamp. A lease that needs no renewal ends then.
    pub const MAX: Self = Self(u64::MAX);

    /// Returns the timestamp `micros` microseconds after the Unix epoch.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Returns the microseconds since the Unix epoch.
    #[must_use]
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// Returns this timestamp plus `duration`, at most [`Timestamp::MAX`].
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(micros(duration)))
    }

    /// Returns the time from `earlier` to this timestamp. Returns zero if `earlier` is later.
    #[must_use]
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Returns the milliseconds since the Unix epoch by the machine's clock. They are shown to others,
/// but nothing is decided by them.
#[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
pub(crate) fn unix_millis() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the time by the machine's clock.
#[cfg(any(feature = "retry", feature = "webhooks"))]
#[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// Returns the present date in the format of HTTP (RFC 9110 section 5.6.7).
pub(crate) fn http_date() -> String {
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_millis(unix_millis()))
}

/// Formats a time as HTTP does. Returns `None` before 1970 and after 9999, because HTTP has no form
/// for such a time.
pub(crate) fn http_date_of(time: SystemTime) -> Option<String> {
    /// 9999-12-31T23:59:59Z.
    const LAST: Duration = Duration::from_secs(253_402_300_799);
    let since_epoch = time.duration_since(UNIX_EPOCH).ok()?;
    (since_epoch <= LAST).then(|| httpdate::fmt_http_date(time))
}

/// Returns the whole microseconds of a duration, at most `u64::MAX` (584,000 years).
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The clock of a store that lives in this process.
///
/// The system clock is read once, when the value is created. After that the monotonic clock counts,
/// so that a change of the system clock cannot end a lease or a retention. Under
/// `tokio::time::pause`, the clock follows tokio's paused time.
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    Manual(Arc<AtomicU64>),
    Monotonic { origin: Instant, at_origin: Timestamp },
}

impl Clock {
    /// Returns the machine's clock.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
    pub fn system() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(Source::Monotonic {
            origin: Instant::now(),
            at_origin: Timestamp(micros(since_epoch)),
        })
    }

    /// Returns a clock that stands still until [`advance`](Self::advance) is called. Clones share
    /// the time. Use it for tests of retention without a sleep:
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_idempotency::{Clock, MemoryStore, Timestamp};
    ///
    /// let clock = Clock::manual(Timestamp::from_micros(0));
    /// let store = MemoryStore::builder().with_clock(clock.clone()).build();
    /// // Move the store's time forward by a day.
    /// clock.advance(Duration::from_secs(24 * 60 * 60));
    /// assert_eq!(clock.now(), Timestamp::from_micros(86_400_000_000));
    /// # drop(store);
    /// ```
    ///
    /// Waits and timeouts of a layer follow the runtime's clock instead. See the
    /// [guide](crate::guide::testing#time).
    #[must_use]
    pub fn manual(start: Timestamp) -> Self {
        Self(Source::Manual(Arc::new(AtomicU64::new(start.0))))
    }

    /// Moves a manual clock forward, at most to [`Timestamp::MAX`]. The machine's clock ignores the
    /// call.
    pub fn advance(&self, duration: Duration) {
        if let Source::Manual(now) = &self.0 {
            let later = |now| Some(Timestamp(now).saturating_add(duration).0);
            // The function always returns a time, so the update cannot fail.
            let _ = now.fetch_update(Ordering::SeqCst, Ordering::SeqCst, later);
        }
    }

    /// Returns the time.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::Manual(now) => Timestamp(now.load(Ordering::SeqCst)),
            Source::Monotonic { origin, at_origin } => at_origin.saturating_add(Instant::now().duration_since(*origin)),
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.0 {
            Source::Manual(_) => "manual",
            Source::Monotonic { .. } => "system",
        };
        f.debug_tuple("Clock").field(&kind).finish()
    }
}

/// The end of a period on the monotonic clock of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    #[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
    pub(crate) fn after(duration: Duration) -> Self {
        const FAR: Duration = Duration::from_secs(86_400 * 365 * 30);
        let now = Instant::now();
        Self(now.checked_add(duration.min(FAR)).unwrap_or(now))
    }

    #[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
    pub(crate) fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    pub(crate) fn sleep(self) -> Timer {
        Timer::at(self)
    }
}

/// Returns a timer that ends after `duration`.
pub(crate) fn sleep(duration: Duration) -> Timer {
    Deadline::after(duration).sleep()
}

pin_project! {
    /// A timer that works in every runtime. It is tokio's timer if the runtime has timers.
    /// Otherwise a thread of this process provides it.
    ///
    /// A tokio runtime that was built without `enable_time` panics when a timer is created, and
    /// tokio has no way to check first. The panic is caught once for each such runtime, and logged.
    /// After that the thread serves this runtime.
    #[project = TimerProjection]
    #[derive(Debug)]
    pub(crate) enum Timer {
        Tokio { #[pin] sleep: Sleep },
        Thread { #[pin] delay: Delay },
    }
}

impl Timer {
    fn at(deadline: Deadline) -> Self {
        if let Some(runtime) = Handle::try_current().ok().map(|runtime| runtime.id()) {
            if !WithoutTimers::includes(runtime) {
                if let Ok(sleep) = catch_unwind(move || tokio::time::sleep_until(deadline.0)) {
                    return Self::Tokio { sleep };
                }
                WithoutTimers::add(runtime);
            }
        }
        let delay = Delay::new(deadline.left());
        Self::Thread { delay }
    }

    /// Returns a timer for background tasks, without a test whether the runtime has timers. The
    /// application may run background tasks on a runtime that needs no timers, and must then get no
    /// panic and no warning. The timer still follows tokio's time if a test has paused it.
    #[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
    pub(crate) fn of_any_runtime(duration: Duration) -> Self {
        let (before, real, after) = (Instant::now(), std::time::Instant::now(), Instant::now());
        if before.into_std() <= real && real <= after.into_std() {
            let delay = Delay::new(duration);
            return Self::Thread { delay };
        }
        let sleep = tokio::time::sleep(duration);
        Self::Tokio { sleep }
    }
}

impl Future for Timer {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.project() {
            TimerProjection::Tokio { sleep } => sleep.poll(cx),
            TimerProjection::Thread { delay } => delay.poll(cx),
        }
    }
}

/// The last 64 runtimes of this process that turned out to have no timers.
struct WithoutTimers;

static ANY_WITHOUT_TIMERS: AtomicBool = AtomicBool::new(false);
static WITHOUT_TIMERS: Mutex<Vec<Id>> = Mutex::new(Vec::new());

impl WithoutTimers {
    /// Returns whether a runtime has no timers. Takes no lock while all runtimes of the process
    /// have timers.
    fn includes(runtime: Id) -> bool {
        ANY_WITHOUT_TIMERS.load(Ordering::Acquire)
            && WITHOUT_TIMERS
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&runtime)
    }

    fn add(runtime: Id) {
        const MOST: usize = 64;
        tracing::warn!(
            "the tokio runtime has no timers, so a separate thread measures the time of requests; call `enable_time`"
        );
        let mut known = WITHOUT_TIMERS.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.remove(0);
        }
        known.push(runtime);
        ANY_WITHOUT_TIMERS.store(true, Ordering::Release);
    }
}

/// A stopwatch that measures a duration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopwatch(Instant);

impl Stopwatch {
    #[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    #[expect(clippy::disallowed_methods, reason = "this is the file in which time is read")]
    pub(crate) fn elapsed(self) -> Duration {
        Instant::now().saturating_duration_since(self.0)
    }

    /// Returns the elapsed whole microseconds, at most `u64::MAX`.
    pub(crate) fn elapsed_micros(self) -> u64 {
        micros(self.elapsed())
    }
}

/// A time limit for a future that usually completes at its first poll.
///
/// No timer exists before [`poll_over`](Self::poll_over) is called.
#[derive(Debug)]
pub(crate) enum Limit {
    Set(Duration),
    // The timer is boxed, because few futures need one. Without the box, every future would be
    // larger by its size.
    Running(Deadline, Option<Pin<Box<Timer>>>),
}

impl Limit {
    /// Shortens the remaining time to `to`, counted from the next call of
    /// [`poll_over`](Self::poll_over). Does nothing if less time is left.
    pub(crate) fn shorten(&mut self, to: Duration) {
        let left = match self {
            Self::Set(limit) => *limit,
            Self::Running(deadline, _) => deadline.left(),
        };
        *self = Self::Set(left.min(to));
    }

    /// Resolves when the time is over. The time starts with the first call.
    pub(crate) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Set(limit) = *self {
            let deadline = Deadline::after(limit);
            let timer = (!limit.is_zero()).then(|| Box::pin(deadline.sleep()));
            *self = Self::Running(deadline, timer);
        }
        let Self::Running(deadline, timer) = self else {
            return Poll::Pending;
        };
        // Check the deadline as well. An earlier poll may have used up the task's budget, and
        // tokio's timers stay pending without a budget.
        if deadline.left().is_zero() {
            return Poll::Ready(());
        }
        match timer {
            Some(timer) => timer.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

pin_project! {
    /// Runs a future for a limited time. Creates no timer for a future that is ready at its first
    /// poll.
    #[derive(Debug)]
    pub(crate) struct Within<F> {
        #[pin]
        future: F,
        limit: Limit,
    }
}

/// The error of a future that did not complete in time.
#[derive(Debug)]
pub(crate) struct Elapsed;

/// Runs `future` for at most `limit`.
pub(crate) fn within<F: Future>(limit: Duration, future: F) -> Within<F> {
    Within {
        future,
        limit: Limit::Set(limit),
    }
}

impl<F: Future> Future for Within<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(output) = this.future.poll(cx) {
            return Poll::Ready(Ok(output));
        }
        this.limit.poll_over(cx).map(|()| Err(Elapsed))
    }
}

/// Advances the paused clock, and lets other tasks run.
#[cfg(test)]
pub(crate) async fn pass(time: Duration) {
    tokio::time::advance(time).await;
    tokio::task::yield_now().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_by_advance_and_clones_share_it() {
        let clock = Clock::manual(Timestamp::from_micros(5));
        let other = clock.clone();
        assert_eq!(clock.now().as_micros(), 5);
        other.advance(Duration::from_micros(7));
        assert_eq!(clock.now().as_micros(), 12);
    }

    #[test]
    fn the_system_clock_is_after_2020_and_never_goes_back() {
        let clock = Clock::system();
        let first = clock.now();
        assert!(first.as_micros() > 1_577_836_800_000_000);
        assert!(clock.now() >= first);
    }

    #[tokio::test(start_paused = true)]
    async fn within_gives_up_after_the_limit_and_not_before() {
        assert!(
            within(Duration::from_secs(1), std::future::pending::<()>())
                .await
                .is_err()
        );
        let slow = tokio::time::sleep(Duration::from_millis(999));
        assert!(within(Duration::from_secs(1), slow).await.is_ok());
    }

    /// tokio's timers stay pending for a task that has used up its budget. tokio's `Timeout` makes
    /// up for that, and so must `Within`.
    #[tokio::test(start_paused = true)]
    async fn within_gives_up_a_future_that_uses_up_its_budget_in_every_poll() {
        let greedy = std::future::poll_fn(|cx| {
            while std::pin::pin!(tokio::task::consume_budget()).poll(cx).is_ready() {}
            Poll::<()>::Pending
        });
        let limited = tokio::spawn(within(Duration::from_millis(5), greedy));
        pass(Duration::ZERO).await;
        pass(Duration::from_millis(1)).await;
        assert!(!limited.is_finished());
        pass(Duration::from_millis(5)).await;
        assert!(limited.is_finished());
    }

    #[test]
    fn without_timers_within_waits_for_its_future() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let done = runtime.block_on(within(Duration::from_secs(60), tokio::task::yield_now()));
        assert!(done.is_ok());
        let elsewhere = within(Duration::from_secs(60), std::future::ready(()));
        assert!(futures::executor::block_on(elsewhere).is_ok());
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Timestamp::MAX.saturating_add(Duration::MAX), Timestamp::MAX);
        assert_eq!(Timestamp::default().saturating_since(Timestamp::MAX), Duration::ZERO);
    }
}
