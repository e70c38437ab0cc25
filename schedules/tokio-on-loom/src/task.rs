//! Tasks that are threads of loom.

use std::pin::Pin;
use std::task::{Context, Poll};

pub use loom::thread::JoinHandle;

pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    loom::thread::spawn(|| loom::future::block_on(future))
}

/// Lets the other threads run first.
pub fn yield_now() -> impl Future<Output = ()> + Send {
    YieldOnce(false)
}

struct YieldOnce(bool);

impl Future for YieldOnce {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        loom::thread::yield_now();
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
