//! The relay, which publishes the messages.

use std::convert::Infallible;
use std::fmt;
use std::time::Duration;

use super::message::OutboxMessage;
use super::table::{Claim, Outbox, TakeOptions, Taken};
use crate::catch_panic::catch_panic;
use crate::clock::{Deadline, sleep, within};
use crate::error::Error;
use crate::telemetry::{self, Event};

/// The shortest pause, and the first pause after a batch whose messages all failed.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// The longest lease.
const DAY: Duration = Duration::from_secs(86_400);

/// The longest pause and interval, 100 years. PostgreSQL's time ends in the year 294,276.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Publishes the messages of an [`Outbox`], and deletes the published ones. Any number of relays in
/// any number of processes may run at the same time. They share the work. Each relay publishes one
/// message after the other, and holds no transaction open meanwhile.
///
/// | setting | default |
/// |---|---|
/// | [batch](Self::with_batch) | 100 messages |
/// | [payloads of a batch](Self::with_batch_bytes) in total | 8 MiB |
/// | [interval](Self::with_interval) between two looks for new messages | 1 s, give or take a half |
/// | [lease](Self::with_lease) on taken messages | 1 min |
/// | [first](Self::with_initial_backoff) and [longest](Self::with_max_backoff) pause before a failed message is published again | 1 s, doubled each time, at most 5 min |
///
/// # When a relay dies
///
/// The messages that it had taken, at most a batch, become due again when the lease and the pause
/// are over. Another relay then publishes them, including those that were already published. It
/// takes each of them alone, because one of them may have killed the relay. Such a message delays
/// no other message, and delays itself by growing pauses.
///
/// # When the server's clock goes back
///
/// A message that is put later is due at once. A message that no relay has taken, and that is due
/// later than a lease and the longest pause from now, becomes due at the next look. A message that
/// was taken by a relay that died becomes due a lease later. All relays of a table should have the
/// same pauses; otherwise the shortest pause decides.
///
/// # When `publish` fails
///
/// If `publish` returns an error, panics, or has not ended when the lease ends, the relay publishes
/// the message again after a pause. There is no last attempt. To give a message up, check its
/// [`failures`](OutboxMessage::failures), put it where an operator looks, and return `Ok`.
///
/// The relay reports a failure as an event `message-failed` with the `position` of the row, the
/// attempts so far (`failures`), and the **text of the error**, so the text must contain nothing
/// secret. If a row cannot be read, because another program wrote it, the relay postpones the
/// message in the same way, and reports `message-unreadable`.
#[must_use]
pub struct Relay<P> {
    outbox: Outbox,
    publish: P,
    interval: Duration,
    options: TakeOptions,
}

/// The result of one look at the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Published {
    /// Number of messages that were published and deleted from the outbox.
    pub published: u32,
    /// Number of messages that could not be published and will be tried again later.
    pub failed: u32,
}

/// The results of the messages that were taken.
#[derive(Default)]
struct Ends {
    published: Vec<Claim>,
    failed: Vec<Claim>,
    untried: Vec<Claim>,
}

impl Outbox {
    /// Returns a relay that publishes the messages by `publish`.
    pub fn relay<P>(&self, publish: P) -> Relay<P> {
        Relay::new(self.clone(), publish)
    }
}

impl<P> Relay<P> {
    pub(super) const fn new(outbox: Outbox, publish: P) -> Self {
        Self {
            outbox,
            publish,
            interval: Duration::from_secs(1),
            options: TakeOptions {
                messages: 100,
                bytes: 8 * 1024 * 1024,
                lease: Duration::from_secs(60),
                pauses: (Duration::from_secs(1), Duration::from_secs(300)),
            },
        }
    }

    /// Sets how many messages are taken at once, which is also the largest number that is published
    /// again after a crash. At least 1. Default: 100.
    pub fn with_batch(mut self, messages: u32) -> Self {
        self.options.messages = messages.max(1);
        self
    }

    /// Sets the largest total size of the payloads of a batch, in bytes, without topics and
    /// headers. A message whose payload alone exceeds it is a batch of its own. Default: 8 MiB.
    pub fn with_batch_bytes(mut self, bytes: u64) -> Self {
        self.options.bytes = bytes;
        self
    }

    /// Sets how often the relay looks for new messages. At least 1 ms, at most 100 years. Each
    /// pause varies by up to a half. Default: 1 s.
    pub fn with_interval(mut self, interval: Duration) -> Self {
        self.interval = interval.clamp(Duration::from_millis(1), LONGEST);
        self
    }

    /// Sets how long taken messages are reserved for the relay. At least 100 ms, at most 1 day.
    /// Default: 1 min.
    ///
    /// In the last third of the lease, the relay starts no further message of a batch, and returns
    /// the rest to the outbox. If a message is still being published when the lease ends, the relay
    /// drops it and counts it as failed. So the lease should be at least three times the time that
    /// `publish` may take. The messages of a relay that died wait until the lease and their pause
    /// are over. If a relay stands still for longer than the lease, for example because its machine
    /// sleeps, another relay publishes the messages, too.
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease.clamp(Duration::from_millis(100), DAY);
        self
    }

    /// Sets how long the relay waits after the first failure of a message before it publishes the
    /// message again. The pause doubles with each failure, up to
    /// [`with_max_backoff`](Self::with_max_backoff). At least 10 ms, at most 100 years. Default: 1
    /// s.
    pub fn with_initial_backoff(mut self, pause: Duration) -> Self {
        self.options.pauses.0 = pause.clamp(SHORTEST_PAUSE, LONGEST);
        self
    }

    /// Sets the longest pause before the relay publishes a failed message again. At least 10 ms, at
    /// most 100 years. Default: 5 min.
    pub fn with_max_backoff(mut self, pause: Duration) -> Self {
        self.options.pauses.1 = pause.clamp(SHORTEST_PAUSE, LONGEST);
        self
    }

    /// Returns a random pause, so that relays that were started together drift apart.
    fn random_interval(&self) -> Duration {
        self.interval.mul_f64(0.5 + rand::random::<f64>())
    }
}

impl<P, F, E> Relay<P>
where
    P: Fn(OutboxMessage) -> F + Send + Sync,
    F: Future<Output = Result<(), E>> + Send,
    E: fmt::Display + Send,
{
    /// Publishes one batch of due messages, one after the other. Messages with the fewest attempts
    /// come first. A message that fails does not stop the messages behind it. A message that hangs
    /// delays them by at most a lease, and comes after them the next time.
    ///
    /// # Cancel safety
    ///
    /// If this future is dropped, the messages that it has taken are treated as if the relay had
    /// [died](Self#when-a-relay-dies).
    ///
    /// # Errors
    ///
    /// An error of the database. Results that could not be recorded are treated as if the relay had
    /// died.
    pub async fn publish_once(&self) -> Result<Published, Error> {
        // Started before the server's lease, so it expires first.
        let lease = Deadline::after(self.options.lease);
        let taken = self.outbox.take(&self.options).await?;
        let ends = self.publish_all(taken, lease).await;
        let recorded = [
            self.outbox.delete(&ends.published).await,
            self.outbox.postpone(&ends.failed, self.options.pauses).await,
            self.outbox.give_back(&ends.untried).await,
        ];
        recorded.into_iter().collect::<Result<(), Error>>()?;
        Ok(ends.count())
    }

    /// Publishes batches for as long as the future is polled. An error of the database is retried
    /// at the next interval. After a look in which every message failed, the relay pauses for 10 ms
    /// at first, and twice as long each time, up to the interval.
    ///
    /// To stop the relay, drop the future. The messages of the current batch are then treated as if
    /// the relay had [died](Self#when-a-relay-dies). To stop between two batches, call
    /// [`publish_once`](Self::publish_once) in a loop of your own.
    pub async fn run(self) -> Infallible {
        let mut rest = SHORTEST_PAUSE;
        loop {
            let pause = match self.publish_once().await {
                Ok(count) if count.published > 0 => {
                    rest = SHORTEST_PAUSE;
                    continue;
                }
                Ok(count) if count.failed > 0 => {
                    rest = rest.saturating_mul(2).min(LONGEST);
                    (rest / 2).min(self.interval)
                }
                Ok(_) => self.random_interval(),
                Err(error) => {
                    telemetry::failure(Event::RelayFailed, &error);
                    self.random_interval()
                }
            };
            sleep(pause).await;
        }
    }

    async fn publish_all(&self, taken: Vec<Taken>, lease: Deadline) -> Ends {
        let mut ends = Ends::default();
        for Taken { claim, message } in taken {
            // Always try the first message. Otherwise a lease that is too short would publish
            // nothing and report nothing.
            if ends.is_begun() && lease.left() < self.options.lease / 3 {
                ends.untried.push(claim);
                continue;
            }
            let result = match message {
                Ok(message) => self
                    .publish(message, lease)
                    .await
                    .map_err(|error| (Event::MessageFailed, error)),
                Err(error) => Err((Event::MessageUnreadable, error.to_string())),
            };
            match result {
                Ok(()) => ends.published.push(claim),
                Err((event, error)) => {
                    telemetry::message_failed(event, claim.position, claim.failures, &error);
                    ends.failed.push(claim);
                }
            }
        }
        ends
    }

    async fn publish(&self, message: OutboxMessage, lease: Deadline) -> Result<(), String> {
        // Catch a panic, so that a message that makes `publish` panic does not block all others
        // forever.
        let publish = async { (self.publish)(message).await.map_err(|error| error.to_string()) };
        match within(lease.left(), catch_panic(publish)).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("`publish` panicked".to_owned()),
            Err(_) => Err("`publish` did not end within the lease".to_owned()),
        }
    }
}

impl Ends {
    fn is_begun(&self) -> bool {
        !(self.published.is_empty() && self.failed.is_empty())
    }

    fn count(&self) -> Published {
        let count = |claims: &[Claim]| u32::try_from(claims.len()).unwrap_or(u32::MAX);
        Published {
            published: count(&self.published),
            failed: count(&self.failed),
        }
    }
}

impl<P> fmt::Debug for Relay<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("interval", &self.interval)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_pause_is_an_interval_give_or_take_a_half() {
        let pool = sqlx::PgPool::connect_lazy("postgres://localhost").unwrap();
        let relay = Outbox::new(pool).relay(());
        let pauses: Vec<_> = (0..1000).map(|_| relay.random_interval().as_secs_f64()).collect();
        assert!(pauses.iter().all(|pause| (0.5..1.5).contains(pause)));
        assert!(pauses.iter().any(|pause| *pause < 0.6) && pauses.iter().any(|pause| *pause > 1.4));
    }
}
