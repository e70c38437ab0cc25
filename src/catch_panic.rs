//! Panics of the application's code and of client libraries, as values.
//!
//! The callers of these functions do not reuse a value that a panic may have left half changed, so both functions assert unwind safety. A caught panic has been reported by the panic hook
//! already, so its message is dropped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

/// A panic that was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Panicked;

/// Calls a function, and catches its panic. If the function returns a future, this does not catch a
/// panic of that future.
pub(crate) fn catch_panic_in<T>(function: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(function)).map_err(|_| Panicked)
}

/// Catches a panic of a future while it is polled. A future that panicked must not be polled again.
pub(crate) const fn catch_panic<F: Future>(future: F) -> CatchPanic<F> {
    CatchPanic { future }
}

pin_project! {
    /// The future of [`catch_panic`]. It is as large as the future inside.
    #[must_use = "futures do nothing unless they are polled"]
    pub(crate) struct CatchPanic<F> {
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for CatchPanic<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let future = self.project().future;
        match catch_panic_in(|| future.poll(cx)) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
            Err(panicked) => Poll::Ready(Err(panicked)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn, ready};

    use futures::FutureExt;

    use super::*;

    #[test]
    fn output_passes_and_panic_becomes_an_error() {
        assert_eq!(catch_panic_in(|| 7), Ok(7));
        assert_eq!(catch_panic_in(|| -> u8 { panic!("in the function") }), Err(Panicked));
        assert_eq!(catch_panic(ready(7)).now_or_never(), Some(Ok(7)));
        assert_eq!(catch_panic(pending::<u8>()).now_or_never(), None);
        let panics = poll_fn(|_| -> Poll<u8> { panic!("in the future") });
        assert_eq!(catch_panic(panics).now_or_never(), Some(Err(Panicked)));
    }

    #[test]
    fn future_does_not_grow() {
        let future = async { pending::<[u8; 64]>().await };
        let size = size_of_val(&future);
        assert_eq!(size_of_val(&catch_panic(future)), size);
    }
}
