//! What publishes the messages.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;

use super::message::OutboxMessage;
use super::table::Outbox;
use crate::error::Error;
use crate::store::failed;
use crate::telemetry::{self, Event};

/// Publishes the messages of an [`Outbox`], and deletes those that are published. Any number may run at once, in any number of
/// processes: they share the work.
///
/// | setting | default |
/// |---|---|
/// | [batch](Self::with_batch) | 100 messages |
/// | [interval](Self::with_interval) at which it looks for new ones | 1 s, give or take a half |
/// | [pause](Self::with_pauses) before a message is tried again that could not be published | 1 s, doubled each time, at most 5 min |
#[must_use]
pub struct Relay<P> {
    outbox: Outbox,
    publish: P,
    batch: u32,
    interval: Duration,
    pauses: (Duration, Duration),
}

/// What one look at the outbox came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Published {
    /// So many messages were published, and deleted from the outbox.
    pub published: u32,
    /// So many could not be, and are tried again later.
    pub failed: u32,
}

impl<P> Relay<P> {
    pub(super) const fn new(outbox: Outbox, publish: P) -> Self {
        Self {
            outbox,
            publish,
            batch: 100,
            interval: Duration::from_secs(1),
            pauses: (Duration::from_secs(1), Duration::from_secs(300)),
        }
    }

    /// How many messages are published within one transaction: so many are published again after a crash, at most. 100 by default, 1
    /// or more.
    pub fn with_batch(mut self, messages: u32) -> Self {
        self.batch = messages.max(1);
        self
    }

    /// How often to look for new messages; 1 s by default, at least 1 ms.
    pub fn with_interval(mut self, interval: Duration) -> Self {
        self.interval = interval.max(Duration::from_millis(1));
        self
    }

    /// How long to wait before a message is tried again that could not be published: at first, doubled each time, and at most; 1 s and
    /// 5 min by default.
    pub fn with_pauses(mut self, first: Duration, longest: Duration) -> Self {
        self.pauses = (first, longest);
        self
    }

    fn pause(&self, failures: u32) -> Duration {
        let (first, longest) = self.pauses;
        first.saturating_mul(1 << failures.min(20)).min(longest)
    }
}

impl<P, F, E> Relay<P>
where
    P: Fn(OutboxMessage) -> F + Send + Sync,
    F: Future<Output = Result<(), E>> + Send,
    E: Send,
{
    /// Publishes what is due, at most one batch, one after the other. It holds a transaction open meanwhile: give `publish` a time-out.
    /// One that fails, or panics, is tried again later, and keeps
    /// none behind it from being published.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, what was published in this batch is published again.
    ///
    /// # Errors
    ///
    /// When the database fails. What was published in this batch is published again.
    pub async fn publish_once(&self) -> Result<Published, Error> {
        let outbox = &self.outbox;
        let mut transaction = outbox.pool.begin().await.map_err(failed)?;
        let mut published = Vec::new();
        let mut count = Published::default();
        for (position, message) in outbox.take(&mut transaction, self.batch).await? {
            let failures = message.failures();
            // One that makes `publish` panic must not hold up all others for ever.
            let publishing = AssertUnwindSafe(async { (self.publish)(message).await });
            if matches!(publishing.catch_unwind().await, Ok(Ok(()))) {
                published.push(position);
                count.published += 1;
            } else {
                outbox
                    .postpone(&mut transaction, position, self.pause(failures))
                    .await?;
                count.failed += 1;
            }
        }
        outbox.delete(&mut transaction, &published).await?;
        transaction.commit().await.map_err(failed)?;
        Ok(count)
    }

    /// Publishes for as long as it is polled; end it by dropping it. A database that fails is asked again at the next interval.
    pub async fn run(self) -> Infallible {
        loop {
            match self.publish_once().await {
                Ok(count) if count.published + count.failed >= self.batch => continue,
                Ok(_) => {}
                Err(error) => telemetry::failure(Event::RelayFailed, &error),
            }
            // Relays that were started together drift apart.
            tokio::time::sleep(self.interval.mul_f64(0.5 + rand::random::<f64>())).await;
        }
    }
}

impl<P> fmt::Debug for Relay<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("batch", &self.batch)
            .field("interval", &self.interval)
            .field("pauses", &self.pauses)
            .finish_non_exhaustive()
    }
}
