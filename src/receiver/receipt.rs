//! The result of a delivery, and its disposition for the broker.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use super::id::InvalidMessageId;
use crate::error::Error;

/// The result of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the caller must handle every case before it acknowledges"
)]
pub enum Receipt<T> {
    /// The handler handled the message in this delivery, and the store recorded that (except for a
    /// message without an id that is handled [unprotected](super::OnMissingId::Unprotected)).
    /// Acknowledge the message.
    First(T),
    /// The message is handled already. Acknowledge it. The handler did not run, with two
    /// exceptions: another attempt took the message over during the run and handled it, or the
    /// handler committed the message with `MessageLease::complete_in` and then failed.
    Duplicate,
    /// Another delivery of the message is in flight and may still fail, or the check of a lost
    /// attempt could not decide and has to run again. Or the message is free, and the handler was not
    /// ready in time. Do not acknowledge this delivery. Have the broker deliver
    /// the message again later.
    InFlight {
        /// The time until the next try: the rest of the other delivery's lease, which that delivery
        /// may renew, or a whole lease if a check has to run again. Zero if the message is free.
        retry_after: Duration,
    },
    /// An attempt at the message was lost and its effect is not known, or an earlier delivery was
    /// [rejected](ReceiveError::Rejected). The handler did not run, unless another attempt took the
    /// message over during the run. Put the message into the dead-letter queue, find out whether it took
    /// effect, and
    /// [resolve](super::ReceiverLayer::storage_key) its key. Until then, or until the retention is
    /// over, every delivery of the message is unknown.
    Unknown,
}

/// The reason why a delivery has no receipt. Do not acknowledge such a delivery.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReceiveError<E> {
    /// The handler returned this error. By default the message may be handled again.
    Handler(E),
    /// The id of the message is longer than 4096 bytes. Nothing ran.
    InvalidId(InvalidMessageId),
    /// An earlier message with the same id had another payload. Nothing ran.
    Mismatch,
    /// The message has no id, and the layer could not make one. Nothing ran.
    MissingId,
    /// The handler rejected the message for good, with this error; `None` if it panicked under
    /// [`OnError::Reject`](crate::OnError::Reject). A later copy is [`Receipt::Unknown`], which is
    /// rejected too.
    Rejected(Option<E>),
    /// The handler panicked. By default the message may be handled again.
    Panicked,
    /// The store failed. Nothing ran.
    Store(Error),
    /// An earlier message with the same id had another [type](super::ReceiverLayer::with_type).
    /// Nothing ran. Make the type a part of the id: `MessageId::of(["cancelled", id])`.
    TypeMismatch,
    /// The handler succeeded, but the store could not record that, or the handler did not commit
    /// its transaction. Or another attempt took the message over, and the result of that attempt
    /// cannot be read.
    Unrecorded(Error),
}

/// The action that the broker must take for a delivery.
///
/// | broker | acknowledge | redeliver | reject |
/// |---|---|---|---|
/// | RabbitMQ | `basic.ack` | publish to a queue with a TTL that dead-letters back, then `basic.ack`; or `basic.nack` with `requeue` | `basic.reject` without `requeue`, to the queue's dead-letter exchange |
/// | SQS | `DeleteMessage` | `ChangeMessageVisibility` | `SendMessage` to the dead-letter queue, then `DeleteMessage` |
/// | Kafka | commit the offset | produce to a retry topic, then commit | produce to a dead-letter topic, then commit |
/// | NATS JetStream | `Ack` | `Nak` with a delay | publish to a dead-letter subject, then `Term` |
/// | Redis streams | `XACK` | leave it pending | `XADD` to a dead-letter stream, then `XACK` |
///
/// If a rejection takes two steps, the consumer's process may die between them. The broker then
/// delivers the message again, and its receipt is [unknown](Receipt::Unknown), which is rejected
/// again. So the dead-letter queue may hold a message twice, but no message is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a broker has no fourth action")]
pub enum Disposition {
    /// Acknowledge the message.
    Acknowledge,
    /// Have the broker deliver the message again after this time, or after the broker's own pause
    /// if it is `None`.
    Redeliver(Option<Duration>),
    /// Put the message into the dead-letter queue, because another delivery would not help.
    Reject,
}

impl Disposition {
    /// Returns the disposition of a delivery. An unknown message is rejected. To treat it in
    /// another way, match on [`Receipt::Unknown`] first.
    #[must_use]
    pub const fn of<T, E>(delivered: &Result<Receipt<T>, ReceiveError<E>>) -> Self {
        match delivered {
            Ok(Receipt::First(_) | Receipt::Duplicate) => Self::Acknowledge,
            Ok(Receipt::InFlight { retry_after }) => Self::Redeliver(Some(*retry_after)),
            Err(
                ReceiveError::Handler(_)
                | ReceiveError::Panicked
                | ReceiveError::Store(_)
                | ReceiveError::Unrecorded(_),
            ) => Self::Redeliver(None),
            Ok(Receipt::Unknown)
            | Err(
                ReceiveError::InvalidId(_)
                | ReceiveError::Mismatch
                | ReceiveError::MissingId
                | ReceiveError::Rejected(_)
                | ReceiveError::TypeMismatch,
            ) => Self::Reject,
        }
    }
}

impl<T> Receipt<T> {
    /// Returns whether the message has been handled, now or before.
    #[must_use]
    pub const fn is_handled(&self) -> bool {
        matches!(self, Self::First(_) | Self::Duplicate)
    }
}

/// Returns the name under which the metric counts a delivery.
pub(super) const fn name_of<T, E>(delivered: &Result<Receipt<T>, ReceiveError<E>>) -> &'static str {
    match delivered {
        Ok(Receipt::First(_)) => "first",
        Ok(Receipt::Duplicate) => "duplicate",
        Ok(Receipt::InFlight { .. }) => "in-flight",
        Ok(Receipt::Unknown) => "unknown",
        Err(ReceiveError::Handler(_)) => "handler-failed",
        Err(ReceiveError::InvalidId(_)) => "invalid-id",
        Err(ReceiveError::Mismatch) => "mismatch",
        Err(ReceiveError::MissingId) => "missing-id",
        Err(ReceiveError::Panicked) => "panicked",
        Err(ReceiveError::Rejected(_)) => "rejected",
        Err(ReceiveError::Store(_)) => "store-failed",
        Err(ReceiveError::TypeMismatch) => "type-mismatch",
        Err(ReceiveError::Unrecorded(_)) => "unrecorded",
    }
}

impl<E> fmt::Display for ReceiveError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Handler(_) => "the handler of the message failed",
            Self::InvalidId(_) => "the id of the message cannot be used",
            Self::Mismatch => "an earlier message with the same id had another payload",
            Self::MissingId => "the message has no id; set `with_id`, or choose another treatment with `on_missing_id`",
            Self::Panicked => "the handler of the message panicked",
            Self::Rejected(_) => "the handler rejected the message for good",
            Self::TypeMismatch => {
                "an earlier message with the same id had another type; make the type a part of the id"
            }
            Self::Store(_) => "the store failed, so the message was not handled; deliver it again",
            Self::Unrecorded(_) => "the message may have been handled, but its outcome is not recorded",
        })
    }
}

impl<E: StdError + 'static> StdError for ReceiveError<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Handler(error) | Self::Rejected(Some(error)) => Some(error),
            Self::InvalidId(error) => Some(error),
            Self::Store(error) | Self::Unrecorded(error) => Some(error),
            Self::Mismatch | Self::MissingId | Self::Panicked | Self::Rejected(None) | Self::TypeMismatch => None,
        }
    }
}
