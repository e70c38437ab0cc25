//! What publishes the messages.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;

use super::message::OutboxMessage;
use super::table::{Claim, Outbox, Taken, Terms};
use crate::clock::{sleep, within, Deadline};
use crate::error::Error;
use crate::telemetry::{self, Event};

/// The shortest pause, and how long a relay rests at first that could publish nothing of what it took.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);

/// The longest lease.
const DAY: Duration = Duration::from_secs(86_400);

/// The longest pause and interval, 100 years: PostgreSQL's time ends in the year 294,276.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Publishes the messages of an [`Outbox`], and deletes those that are published. Any number may run at once, in any number of
/// processes: they share the work. Each publishes one message after the other, and none holds a transaction open while it does.
///
/// | setting | default |
/// |---|---|
/// | [batch](Self::with_batch) | 100 messages |
/// | [batch's payloads](Self::with_batch_bytes) in all | 8 MiB |
/// | [interval](Self::with_interval) at which it looks for new ones | 1 s, give or take a half |
/// | [lease](Self::with_lease) on what it took | 1 min |
/// | [initial](Self::with_initial_backoff) and [longest](Self::with_max_backoff) pause before a message that could not be published is published again | 1 s, doubled each time, at most 5 min |
///
/// # When a relay dies
///
/// What it had taken, a batch at most, comes again when the lease and the pause are over: what it had published, a second time.
/// Then each is taken alone, since it may be what killed the relay. Such a message delays no other, and itself by growing pauses.
///
/// # When the server's clock goes back
///
/// What is put later is due at once, and what waits for longer than a lease and the longest pause, and that no relay has taken, becomes
/// due at the next look; what a relay that died had taken waits until the clock is where it was. So give all relays of a table the same pauses, or the one with the shortest decides.
///
/// # When `publish` fails
///
/// Where it returns an error, panics, or has not ended when the lease has, its message is tried again after a pause; no attempt is
/// the last. To give one up, look at its [`failures`](OutboxMessage::failures), put it where somebody looks, and return `Ok`. It is reported as an event `message-failed` with the `position` of its row, the attempts so far (`failures`), and the
/// **text of the error**: let that hold nothing secret. A row that cannot be read, since somebody else wrote it, is postponed
/// likewise, and reported as `message-unreadable`.
#[must_use]
pub struct Relay<P> {
    outbox: Outbox,
    publish: P,
    interval: Duration,
    terms: Terms,
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

/// What became of the messages that were taken.
#[derive(Default)]
struct Ends {
    published: Vec<Claim>,
    failed: Vec<Claim>,
    untried: Vec<Claim>,
}

impl<P> Relay<P> {
    pub(super) const fn new(outbox: Outbox, publish: P) -> Self {
        Self {
            outbox,
            publish,
            interval: Duration::from_secs(1),
            terms: Terms {
                messages: 100,
                bytes: 8 * 1024 * 1024,
                lease: Duration::from_secs(60),
                pauses: (Duration::from_secs(1), Duration::from_secs(300)),
            },
        }
    }

    /// How many messages are taken at once: so many are published again after a crash, at most. 100 by default, 1 or more.
    pub fn with_batch(mut self, messages: u32) -> Self {
        self.terms.messages = messages.max(1);
        self
    }

    /// How many bytes the payloads of a batch have in all, topics and headers not counted; 8 MiB by default. A message whose payload
    /// alone exceeds it is a batch by itself.
    pub fn with_batch_bytes(mut self, bytes: u64) -> Self {
        self.terms.bytes = bytes;
        self
    }

    /// How often to look for new messages; 1 s by default, at least 1 ms, at most 100 years.
    pub fn with_interval(mut self, interval: Duration) -> Self {
        self.interval = interval.clamp(Duration::from_millis(1), LONGEST);
        self
    }

    /// How long what was taken is kept from other relays; 1 min by default, at least 100 ms, at most 1 day.
    ///
    /// In the last third no further message of a batch is begun; they are given back. What is being published when the lease ends is
    /// given up, as failed. So make it three times as long as `publish` may take, or more. What a relay that died had taken waits so
    /// long. And if a relay stands still for longer, as when its machine sleeps, another publishes the messages too.
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.terms.lease = lease.clamp(Duration::from_millis(100), DAY);
        self
    }

    /// Sets how long the relay waits before it publishes a message again that failed for the first time. The pause doubles with
    /// each failure, up to [`with_max_backoff`](Self::with_max_backoff). At least 10 ms, at most 100 years. Default: 1 s.
    pub fn with_initial_backoff(mut self, pause: Duration) -> Self {
        self.terms.pauses.0 = pause.clamp(SHORTEST_PAUSE, LONGEST);
        self
    }

    /// Sets the longest pause before the relay publishes a failed message again. At least 10 ms, at most 100 years. Default: 5 min.
    pub fn with_max_backoff(mut self, pause: Duration) -> Self {
        self.terms.pauses.1 = pause.clamp(SHORTEST_PAUSE, LONGEST);
        self
    }

    /// Relays that were started together drift apart.
    fn until_next_look(&self) -> Duration {
        self.interval.mul_f64(0.5 + rand::random::<f64>())
    }
}

impl<P, F, E> Relay<P>
where
    P: Fn(OutboxMessage) -> F + Send + Sync,
    F: Future<Output = Result<(), E>> + Send,
    E: fmt::Display + Send,
{
    /// Publishes what is due, at most one batch, one message after the other, those first that were tried the least. One that fails
    /// keeps none behind it from being published; one that hangs delays them, by a lease at most, and comes after them the next time.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, it leaves what it took as a relay that [died](Self#when-a-relay-dies).
    ///
    /// # Errors
    ///
    /// When the database fails. Of what it could not note, it is as if the relay had died.
    pub async fn publish_once(&self) -> Result<Published, Error> {
        // Begun before the server's, it ends before it.
        let lease = Deadline::after(self.terms.lease);
        let taken = self.outbox.take(&self.terms).await?;
        let ends = self.publish_all(taken, lease).await;
        let noted = [
            self.outbox.delete(&ends.published).await,
            self.outbox.postpone(&ends.failed, self.terms.pauses).await,
            self.outbox.give_back(&ends.untried).await,
        ];
        noted.into_iter().collect::<Result<(), Error>>()?;
        Ok(ends.count())
    }

    /// Publishes for as long as it is polled; end it by dropping it, which leaves a batch, at most, as a relay that
    /// [died](Self#when-a-relay-dies). To end without that, call [`publish_once`](Self::publish_once) in a loop of your own. A database that fails is asked again at the next interval. After a look that could publish
    /// nothing of what it took it rests, for 10 ms at first and twice as long each time, up to the interval.
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
                Ok(_) => self.until_next_look(),
                Err(error) => {
                    telemetry::failure(Event::RelayFailed, &error);
                    self.until_next_look()
                }
            };
            sleep(pause).await;
        }
    }

    async fn publish_all(&self, taken: Vec<Taken>, lease: Deadline) -> Ends {
        let mut ends = Ends::default();
        for Taken { claim, message } in taken {
            // The first is tried however little is left, or a lease too short would publish nothing and say nothing.
            if ends.is_begun() && lease.left() < self.terms.lease / 3 {
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
        // One that makes `publish` panic must not hold up all others for ever.
        let publish = async { (self.publish)(message).await.map_err(|error| error.to_string()) };
        match within(lease.left(), AssertUnwindSafe(publish).catch_unwind()).await {
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
            .field("terms", &self.terms)
            .finish_non_exhaustive()
    }
}
