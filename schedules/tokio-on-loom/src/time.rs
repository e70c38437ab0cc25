//! A clock that a model moves, and timers that fire at once.

use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};
pub use std::time::Duration;

loom::lazy_static! {
    /// The time since the beginning of the execution.
    static ref NOW: Mutex<Duration> = Mutex::default();
}

/// A time since the beginning of the execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    pub fn now() -> Self {
        Self(*NOW.lock().unwrap())
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

/// Moves the clock forward.
pub fn advance(duration: Duration) {
    *NOW.lock().unwrap() += duration;
}

/// A timer, which fires once the other threads have run.
#[derive(Debug)]
pub struct Sleep(());

pub fn sleep(_: Duration) -> Sleep {
    Sleep(())
}

pub fn sleep_until(_: Instant) -> Sleep {
    Sleep(())
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        loom::thread::yield_now();
        Poll::Ready(())
    }
}
