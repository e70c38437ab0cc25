//! How a one-time call can fail.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::error::Error;
use crate::job::Refused;

/// How a call failed, as the call itself says.
///
/// `?` makes of every other error an [`Unknown`](Self::Unknown): that is the only safe guess.
#[cfg(feature = "once")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum Failure<E> {
    /// It had no effect and never will: the key is free for the next attempt.
    NotDone(E),
    /// It may have had an effect: a lost connection, a time-out, a 5xx.
    Unknown(E),
}

#[cfg(feature = "once")]
impl<E> From<E> for Failure<E> {
    fn from(error: E) -> Self {
        Self::Unknown(error)
    }
}

/// Why a one-time call has no answer to give. `T` is what it would have given, `E` its own error.
#[derive(Debug)]
#[non_exhaustive]
pub enum OnceError<T, E> {
    /// The call was made now and failed without effect. The next one runs.
    Failed(E),
    /// Somebody else is making the call, and has been for as long as was to be waited.
    InFlight {
        /// What is left of the other's lease.
        left: Duration,
    },
    /// The key was used for another input. Nothing ran.
    Mismatch,
    /// The call was made, and its result was not stored. A response was too long, too slow, a stream, or broke off, or
    /// JSON could not hold a value. The call is not made again.
    NotKept,
    /// The store failed, or the call is not set up soundly. Nothing ran.
    NotRun(Error),
    /// The key was used by a job with another list of steps, or another input. Nothing ran. A job that has begun needs the list that it
    /// began with; give jobs with another list another namespace.
    StepChanged {
        /// The first step that differs, counted from 0.
        position: usize,
    },
    /// Nobody knows whether the call took effect: it was lost, or its existence check could not tell. With the error of an attempt
    /// that was made now. Ask the third party whether the call took effect. After the retention of the key, the next call
    /// is made, so a call that took effect must not be repeated then.
    Unknown(Option<E>),
    /// The stored answer cannot be read as a `T`, because the type has changed since. Nothing ran. A version of the
    /// program with the earlier type can still read the answer.
    Unreadable(Box<dyn StdError + Send + Sync>),
    /// The call was made and this is its answer, but it could not be recorded: another attempt may make it again, or find its
    /// outcome unknown.
    Unrecorded {
        /// The answer.
        given: Box<T>,
        /// Why it is not recorded.
        error: Error,
    },
}

impl<T, E> OnceError<T, E> {
    pub(super) fn refused(refused: Refused) -> Self {
        match refused {
            Refused::InFlight(left) => Self::InFlight { left },
            Refused::Mismatch => Self::Mismatch,
            Refused::NotKept => Self::NotKept,
            Refused::NotRun(error) => Self::NotRun(error),
            Refused::Undecided | Refused::Unknown | Refused::Unread(_) => Self::Unknown(None),
        }
    }

    /// Whether the call may have taken effect although there is no answer: [`InFlight`](Self::InFlight), [`NotKept`](Self::NotKept),
    /// [`Unknown`](Self::Unknown), [`Unreadable`](Self::Unreadable) and [`Unrecorded`](Self::Unrecorded).
    #[must_use]
    pub const fn may_have_happened(&self) -> bool {
        !matches!(
            self,
            Self::Failed(_) | Self::Mismatch | Self::NotRun(_) | Self::StepChanged { .. }
        )
    }
}

impl<T, E> fmt::Display for OnceError<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed(_) => "the call failed and had no effect",
            Self::InFlight { .. } => "somebody else is making the same call",
            Self::Mismatch => "the key was used for a call with another input",
            Self::NotKept => "the call was made, and its answer was not kept",
            Self::NotRun(_) => "the call was not made",
            Self::StepChanged { .. } => "the key was used by a job with another list of steps",
            Self::Unknown(_) => "whether the call took effect is not known",
            Self::Unreadable(_) => "the kept answer cannot be read as the type that is asked for",
            Self::Unrecorded { .. } => "the call was made, and its answer could not be recorded",
        })
    }
}

impl<T: fmt::Debug, E: StdError + 'static> StdError for OnceError<T, E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Failed(error) | Self::Unknown(Some(error)) => Some(error),
            Self::NotRun(error) | Self::Unrecorded { error, .. } => Some(error),
            Self::Unreadable(error) => Some(&**error),
            _ => None,
        }
    }
}
