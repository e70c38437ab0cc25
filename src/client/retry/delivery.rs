//! The outcome of a call, over all of its attempts.

use super::super::keys::Meaning;

/// What is known about the effect of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallOutcome {
    /// The server dealt with it: the effect is as the answer says.
    Answered,
    /// It had no effect: nothing was sent, or the server says that it did not begin.
    NotTaken,
    /// It may have taken effect or not, or may still do. Ask again under the same key, or ask the other side what it knows.
    Unknown,
}

impl From<Meaning> for CallOutcome {
    fn from(meaning: Meaning) -> Self {
        match meaning {
            Meaning::Answered { .. } => Self::Answered,
            Meaning::NotTaken => Self::NotTaken,
            Meaning::Unknown => Self::Unknown,
        }
    }
}

/// How an answer came about. [`CallLayer`](super::CallLayer) puts it among the extensions of every response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub(super) attempts: u32,
    pub(super) is_replay: bool,
    pub(super) outcome: CallOutcome,
}

impl Delivery {
    /// How often the request was sent, this time: 1 or more.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Whether the server says that it repeats an earlier answer.
    #[must_use]
    pub const fn is_replay(&self) -> bool {
        self.is_replay
    }

    /// What is known about the effect.
    #[must_use]
    pub const fn outcome(&self) -> CallOutcome {
        self.outcome
    }
}
