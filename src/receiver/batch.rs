//! Several messages at once.

use std::future::poll_fn;

use futures::FutureExt;
use futures::stream::{StreamExt, iter};
use tower_service::Service;

use super::receipt::{Disposition, Receipt, ReceiveError};
use crate::catch_panic::catch_panic;

/// The results of the messages of a batch, in the order of the messages.
#[derive(Debug)]
pub struct Batch<T, E> {
    received: Vec<Result<Receipt<T>, ReceiveError<E>>>,
}

impl<T, E> Batch<T, E> {
    /// Returns the result of each message.
    pub fn received(&self) -> &[Result<Receipt<T>, ReceiveError<E>>] {
        &self.received
    }

    /// Returns the result of each message, by value.
    #[must_use = "the results show which messages to acknowledge"]
    pub fn into_received(self) -> Vec<Result<Receipt<T>, ReceiveError<E>>> {
        self.received
    }

    /// Returns the disposition of each message, for the broker.
    pub fn dispositions(&self) -> impl Iterator<Item = Disposition> + '_ {
        self.received.iter().map(Disposition::of)
    }

    /// Returns the positions of the messages to acknowledge, from 0.
    pub fn acknowledged(&self) -> impl Iterator<Item = usize> + '_ {
        self.positions(|disposition| disposition == Disposition::Acknowledge)
    }

    /// Returns the positions of the messages that must not be acknowledged, from 0. AWS Lambda
    /// calls them `batchItemFailures`. SQS delivers all of them again, also those to
    /// [reject](Self::rejected). Move the rejected messages to the dead-letter queue yourself and
    /// leave them out of the list, or let the queue's `maxReceiveCount` move them. Each further
    /// copy of a rejected message costs one operation of the store.
    pub fn failed(&self) -> impl Iterator<Item = usize> + '_ {
        self.positions(|disposition| disposition != Disposition::Acknowledge)
    }

    /// Returns the positions of the messages to put into the dead-letter queue, from 0.
    pub fn rejected(&self) -> impl Iterator<Item = usize> + '_ {
        self.positions(|disposition| disposition == Disposition::Reject)
    }

    fn positions<'b>(&'b self, is_wanted: impl Fn(Disposition) -> bool + 'b) -> impl Iterator<Item = usize> + 'b {
        let all = self.dispositions().enumerate();
        all.filter_map(move |(position, disposition)| is_wanted(disposition).then_some(position))
    }
}

/// Receives all messages of a batch, `at_once` of them at a time (at least 1), each under a key of
/// its own. A message that fails does not delay the others. Two copies of one message in a batch
/// are handled once. If the first copy is still being handled, the second one is [in
/// flight](Receipt::InFlight), or waits if the layer has a waiting time.
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
/// As for [`ReceiverFuture`](super::ReceiverFuture): handlers that have begun continue, and the
/// layer records their results. No other handler begins.
pub async fn receive_all<S, I, T, E>(service: &S, messages: I, at_once: usize) -> Batch<T, E>
where
    S: Service<I::Item, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + Sync,
    S::Future: Send,
    I: IntoIterator<IntoIter: Send, Item: Send> + Send,
    T: Send,
    E: Send,
{
    let deliveries = messages.into_iter().enumerate().map(|(position, message)| {
        let mut service = service.clone();
        let delivery = async move {
            poll_fn(|cx| service.poll_ready(cx)).await?;
            service.call(message).await
        };
        let delivery = catch_panic(delivery);
        delivery.map(move |received| (position, received.unwrap_or(Err(ReceiveError::Panicked))))
    });
    // Do not use `buffered`. It holds finished messages back behind a slow one, so that no others
    // begin.
    let received = iter(deliveries).buffer_unordered(at_once.max(1));
    let mut received: Vec<_> = received.collect().await;
    received.sort_unstable_by_key(|(position, _)| *position);
    Batch {
        received: received.into_iter().map(|(_, received)| received).collect(),
    }
}
