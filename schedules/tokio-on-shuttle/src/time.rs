//! Timers that fire when a test moves the clock.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};
pub use std::time::Duration;

shuttle::lazy_static! {
    /// The clock of an execution.
    static ref CLOCK: Mutex<Clock> = Mutex::default();
}

#[derive(Default)]
struct Clock {
    now: Duration,
    /// The timers that tasks wait for, in their order. The second number tells equal times apart.
    timers: BTreeMap<(Duration, u64), Waker>,
    next: u64,
    /// The timers that have fired, and whose tasks have not run since.
    fired: u64,
}

/// A time since the beginning of the execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    pub fn now() -> Self {
        Self(CLOCK.lock().unwrap().now)
    }

    pub fn duration_since(self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }

    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub fn checked_add(self, duration: Duration) -> Option<Self> {
        self.0.checked_add(duration).map(Self)
    }

    /// Returns a time in the past. The crate recognizes a paused clock by it.
    pub fn into_std(self) -> std::time::Instant {
        std::time::Instant::now() - Duration::from_secs(1)
    }
}

/// Moves the clock to the next timer. Does nothing while the task of a fired timer has yet to run. A timer
/// that is more than a day away never fires.
pub fn advance_to_next_timer() {
    const DAY: Duration = Duration::from_secs(86_400);
    let mut clock = CLOCK.lock().unwrap();
    let next = clock.timers.first_key_value().map(|(&key, _)| key);
    let Some((at, number)) = next.filter(|(at, _)| clock.fired == 0 && *at < clock.now + DAY) else {
        return;
    };
    let Some(waker) = clock.timers.remove(&(at, number)) else {
        return;
    };
    clock.now = clock.now.max(at);
    clock.fired += 1;
    drop(clock);
    waker.wake();
}

/// A timer.
#[derive(Debug)]
pub struct Sleep {
    until: Instant,
    /// The number of the timer, once a task waits for it.
    number: Option<u64>,
}

pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(Instant(Instant::now().0.saturating_add(duration)))
}

pub fn sleep_until(until: Instant) -> Sleep {
    Sleep { until, number: None }
}

impl Sleep {
    /// Ends the wait of a task.
    fn end_wait(&mut self, clock: &mut Clock) {
        if let Some(number) = self.number.take() {
            if clock.timers.remove(&(self.until.0, number)).is_none() {
                clock.fired -= 1;
            }
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut clock = CLOCK.lock().unwrap();
        self.end_wait(&mut clock);
        if clock.now >= self.until.0 {
            return Poll::Ready(());
        }
        clock.next += 1;
        self.number = Some(clock.next);
        let key = (self.until.0, clock.next);
        clock.timers.insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if self.number.is_some() {
            self.end_wait(&mut CLOCK.lock().unwrap());
        }
    }
}
