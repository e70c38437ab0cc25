//! Several messages at once.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;

use futures::stream::{iter, StreamExt};
use futures::FutureExt;
use tower_service::Service;

use super::receipt::{Disposition, Receipt, ReceiveError};

/// What came of each message of a batch, in the order in which they were given.
#[derive(Debug)]
pub struct Batch<T, E> {
    received: Vec<Result<Receipt<T>, ReceiveError<E>>>,
}

impl<T, E> Batch<T, E> {
    /// What came of each message.
    pub fn received(&self) -> &[Result<Receipt<T>, ReceiveError<E>>] {
        &self.received
    }

    /// The same, by value.
    #[must_use = "it is what to acknowledge"]
    pub fn into_received(self) -> Vec<Result<Receipt<T>, ReceiveError<E>>> {
        self.received
    }

    /// What to tell the broker about each message.
    pub fn dispositions(&self) -> impl Iterator<Item = Disposition> + '_ {
        self.received.iter().map(Disposition::of)
    }

    /// The places of the messages to acknowledge, from 0.
    pub fn acknowledged(&self) -> impl Iterator<Item = usize> + '_ {
        let all = self.dispositions().enumerate();
        all.filter_map(|(place, disposition)| (disposition == Disposition::Acknowledge).then_some(place))
    }

    /// The places of the messages that must not be acknowledged, from 0: what Amazon calls `batchItemFailures`.
    pub fn failed(&self) -> impl Iterator<Item = usize> + '_ {
        let all = self.dispositions().enumerate();
        all.filter_map(|(place, disposition)| (disposition != Disposition::Acknowledge).then_some(place))
    }
}

/// Receives all messages of a batch, `at_once` of them at a time (1 or more), each under a key of its own: one that fails holds up
/// none of the others. Two copies of one message in a batch are handled once; where they meet, the second is
/// [in flight](Receipt::InFlight), or waits if the layer does.
///
/// ```
/// use std::convert::Infallible;
/// use tower::{service_fn, Layer};
/// use tower_idempotency::receiver::{receive_all, ReceiverLayer};
/// use tower_idempotency::MemoryStore;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let layer = ReceiverLayer::new(MemoryStore::new(), "billing").with_id(|id: &u64| *id);
/// let receiver = layer.layer(service_fn(|id: u64| async move { if id == 7 { Err("no") } else { Ok(()) } }));
/// let batch = receive_all(&receiver, [5, 6, 7, 5], 1).await;
/// assert_eq!(batch.acknowledged().collect::<Vec<_>>(), [0, 1, 3]);
/// # }
/// ```
///
/// # Cancel safety
///
/// As for [`ReceiverFuture`](super::ReceiverFuture): what was begun goes on and is recorded, what was not is not begun.
pub async fn receive_all<S, I, T, E>(service: &S, messages: I, at_once: usize) -> Batch<T, E>
where
    S: Service<I::Item, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + Sync,
    S::Future: Send,
    I: IntoIterator<IntoIter: Send, Item: Send> + Send,
    T: Send,
    E: Send,
{
    let deliveries = messages.into_iter().enumerate().map(|(place, message)| {
        let mut service = service.clone();
        let delivery = async move {
            poll_fn(|cx| service.poll_ready(cx)).await?;
            service.call(message).await
        };
        let delivery = AssertUnwindSafe(delivery).catch_unwind();
        delivery.map(move |received| (place, received.unwrap_or(Err(ReceiveError::Panicked))))
    });
    // Not `buffered`: there, those that are done wait for a slow one before them, and keep others from beginning.
    let received = iter(deliveries).buffer_unordered(at_once.max(1));
    let mut received: Vec<_> = received.collect().await;
    received.sort_unstable_by_key(|(place, _)| *place);
    Batch {
        received: received.into_iter().map(|(_, received)| received).collect(),
    }
}
