//! What came of a delivery, and what to tell the broker.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use super::id::InvalidMessageId;
use crate::error::Error;

/// What came of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "whoever acknowledges must handle every case")]
pub enum Receipt<T> {
    /// It was handled, now, and that is recorded (unless it had no id, and was to be handled
    /// [all the same](super::OnMissingId::Unprotected)). Acknowledge it.
    First(T),
    /// It was handled before. Acknowledge it.
    Duplicate,
    /// It is being handled elsewhere, and may yet fail there; or a check could not tell what became of a lost attempt, and is to be
    /// asked again. Do not acknowledge it; have it delivered again later.
    InFlight {
        /// When to try again: what is left of the other's lease, which that may renew; a whole lease, where a check is to be asked again.
        retry_after: Duration,
    },
    /// An attempt was lost, and nobody knows whether it had its effect; nothing runs. Put it where somebody looks at it (a dead-letter
    /// queue), ask, and resolve its key ([how](super::ReceiverLayer::storage_key)). Delivered again unresolved, it is unknown again.
    Unknown,
}

/// Why a delivery has no receipt. None of them may be acknowledged.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReceiveError<E> {
    /// The handler failed, with its own error. By default the message may be handled again.
    Handler(E),
    /// The message has an id that is too long. Nothing ran.
    InvalidId(InvalidMessageId),
    /// Another payload came under this id before. Nothing ran.
    Mismatch,
    /// The message has no id, and none could be made. Nothing ran.
    MissingId,
    /// The handler panicked. By default the message may be handled again.
    Panicked,
    /// The store failed. Nothing ran.
    Store(Error),
    /// The handler said that it was done, and that could not be recorded, its transaction was not committed, or what another attempt
    /// came to, which had taken the message over, cannot be read.
    Unrecorded(Error),
}

/// What to tell the broker about a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a broker knows no fourth")]
pub enum Disposition {
    /// It is done: acknowledge it.
    Acknowledge,
    /// Have it delivered again, not before so long; `None` where the broker's own pause will do.
    Redeliver(Option<Duration>),
    /// Another delivery will not help: put it into the dead-letter place.
    Reject,
}

impl Disposition {
    /// What to tell the broker. [`Receipt::Unknown`] is rejected; match on it first where something else is wanted.
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
            | Err(ReceiveError::InvalidId(_) | ReceiveError::Mismatch | ReceiveError::MissingId) => Self::Reject,
        }
    }
}

impl<T> Receipt<T> {
    /// Whether the message has been handled, now or before.
    #[must_use]
    pub const fn is_handled(&self) -> bool {
        matches!(self, Self::First(_) | Self::Duplicate)
    }
}

/// The name under which a delivery is counted.
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
        Err(ReceiveError::Store(_)) => "store-failed",
        Err(ReceiveError::Unrecorded(_)) => "unrecorded",
    }
}

impl<E> fmt::Display for ReceiveError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Handler(_) => "the handler of the message failed",
            Self::InvalidId(_) => "the message has an id that cannot be used",
            Self::Mismatch => "another payload came under the id of the message before",
            Self::MissingId => "the message has no id; set `with_id`, or say with `on_missing_id` what to do without",
            Self::Panicked => "the handler of the message panicked",
            Self::Store(_) => "the store failed, so that the message was not handled",
            Self::Unrecorded(_) => "what came of the message is not recorded",
        })
    }
}

impl<E: StdError + 'static> StdError for ReceiveError<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Handler(error) => Some(error),
            Self::InvalidId(error) => Some(error),
            Self::Store(error) | Self::Unrecorded(error) => Some(error),
            Self::Mismatch | Self::MissingId | Self::Panicked => None,
        }
    }
}
