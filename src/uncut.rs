//! Operations that go on when nobody waits for them any more.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use tokio::runtime::Handle;

/// An operation that is polled in its place. Dropped half-way, the rest of it goes on in a task of its own, and only who leaves
/// pays for one.
pub(crate) struct Uncut<T: 'static> {
    operation: Option<BoxFuture<'static, T>>,
    runtime: Handle,
}

/// Runs an operation to its end; `None` outside of a runtime.
pub(crate) fn uncut<T>(operation: impl Future<Output = T> + Send + 'static) -> Option<Uncut<T>> {
    let runtime = Handle::try_current().ok()?;
    let operation: Option<BoxFuture<'static, T>> = Some(Box::pin(operation));
    Some(Uncut { operation, runtime })
}

impl<T> Future for Uncut<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // Taken out while it runs: should it panic, it is not polled again.
        let Some(mut operation) = self.operation.take() else {
            return Poll::Pending;
        };
        let polled = operation.as_mut().poll(cx);
        if polled.is_pending() {
            self.operation = Some(operation);
        }
        polled
    }
}

impl<T> Drop for Uncut<T> {
    fn drop(&mut self) {
        if let Some(operation) = self.operation.take() {
            self.runtime.spawn(async move { drop(operation.await) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, AssertUnwindSafe};

    use futures::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_is_dropped_half_way_goes_on() {
        let (go_on, told_to) = oneshot::channel();
        let (done, is_done) = oneshot::channel();
        let mut operation = uncut(async move {
            let told: Result<(), _> = told_to.await;
            done.send(told).unwrap();
        });
        assert!(operation.as_mut().unwrap().now_or_never().is_none());
        drop(operation);
        go_on.send(()).unwrap();
        assert_eq!(is_done.await, Ok(Ok(())));
    }

    #[tokio::test]
    async fn what_has_panicked_is_not_polled_again() {
        let mut operation = uncut(async { panic!("the driver's") }).unwrap();
        let polled = catch_unwind(AssertUnwindSafe(|| (&mut operation).now_or_never()));
        assert!(polled.map(|_: Option<()>| ()).is_err());
        assert!((&mut operation).now_or_never().is_none());
    }

    #[test]
    fn outside_of_a_runtime_there_is_no_operation() {
        assert!(uncut(async {}).is_none());
    }
}
