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
