//! The errors of one-time calls.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::engine::Refused;
use crate::error::Error;

/// The failure of a call, as the call itself classifies it.
///
/// `?` turns every other error into [`Unknown`](Self::Unknown), because no other class is safe.
#[cfg(feature = "once")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum Failure<E> {
    /// The call had no effect and never will have one. The key is free for the next attempt.
    NotDone(E),
    /// The call may have had an effect. Examples are a lost connection, a timeout and a 5xx.
    Unknown(E),
}

#[cfg(feature = "once")]
impl<E> From<E> for Failure<E> {
    fn from(error: E) -> Self {
        Self::Unknown(error)
    }
}

/// The error of a one-time call. `T` is the type of its result, `E` the error of the call itself.
#[derive(Debug)]
#[non_exhaustive]
pub enum OnceError<T, E> {
    /// The call was made now, and failed without effect. The next call runs.
    Failed(E),
    /// This call did not run within the waiting time. Either another caller is still making the same
    /// call, or the key became free and the client was not ready in time.
    InFlight {
        /// The time that is left of the other caller's lease. Zero if the key was free at the last
        /// look.
        left: Duration,
    },
    /// The key was used for another input. Nothing ran.
    Mismatch,
    /// The call was made, and its result was not stored. A response was too long, too slow, a
    /// stream, or broke off, or JSON could not hold a value. The call is not made again, with one
    /// exception. If a response breaks off under
    /// [`assume_keys_honoured`](super::OnceLayer::assume_keys_honoured), the attempt counts as lost:
    /// [`at_least_once`](super::OnceLayer::at_least_once) sends the request again under its key, and
    /// [`with_recovery`](super::OnceLayer::with_recovery) may do so after its check.
    NotStored,
    /// The store failed, the configuration of the call is wrong, or too many calls are running
    /// whose callers have left. Nothing ran.
    NotRun(Error),
    /// The key was used by a job with another list of steps, or another input. Nothing ran. A job
    /// that has begun needs the list of steps that it began with; give jobs with another list
    /// another namespace.
    StepChanged {
        /// The first step that differs, counted from 0.
        position: usize,
    },
    /// It is unknown whether the call took effect, because an attempt was lost, or its existence
    /// check could not decide. Holds the error if the attempt was made now. Ask the third party
    /// whether the call took effect. When the retention of the key is over, a repeated call runs
    /// again, so do not repeat a call that took effect.
    Unknown(Option<E>),
    /// The stored response cannot be read as a `T`, because the type has changed since. Nothing
    /// ran. A version of the program with the earlier type can still read the response.
    Unreadable(Box<dyn StdError + Send + Sync>),
    /// The call was made, but its response could not be recorded. Another attempt may make the call
    /// again, or find its outcome unknown.
    Unrecorded {
        /// The output of the call.
        output: Box<T>,
        /// The error of the store.
        error: Error,
    },
}

impl<T, E> OnceError<T, E> {
    pub(super) fn refused(refused: Refused) -> Self {
        match refused {
            Refused::InFlight(left) => Self::InFlight { left },
            Refused::Mismatch => Self::Mismatch,
            Refused::NotStored => Self::NotStored,
            Refused::NotRun(error) => Self::NotRun(error),
            Refused::Undecided | Refused::Unknown | Refused::Unread(_) => Self::Unknown(None),
        }
    }

    /// Returns whether the call may have taken effect. This is true for
    /// [`InFlight`](Self::InFlight), [`NotStored`](Self::NotStored), [`Unknown`](Self::Unknown),
    /// [`Unreadable`](Self::Unreadable) and [`Unrecorded`](Self::Unrecorded).
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
            Self::Failed(_) => "the call failed; no effect",
            Self::InFlight { left: Duration::ZERO } => "the call was not made: its key was in use, and is free now",
            Self::InFlight { left } => {
                return write!(f, "another caller is making the same call; its lease ends in {left:?}");
            }
            Self::Mismatch => "the call was not made: its key was used with another input; use a new key",
            Self::NotStored => "the call was made, but its response was not stored; ask the third party for the result",
            Self::NotRun(_) => "the call was not made",
            Self::StepChanged { position } => {
                return write!(
                    f,
                    "the job was not continued: its steps differ from the recorded ones at step {position}"
                );
            }
            Self::Unknown(_) => "the call may have taken effect; outcome unknown: ask the third party",
            Self::Unreadable(_) => "the call was made, but its stored response cannot be read as the requested type",
            Self::Unrecorded { .. } => "the call was made, but its response could not be recorded",
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
