//! The outcome of a call, over all of its attempts.

use super::super::keys::ResponseMeaning;
use super::super::report::Evidence;

/// The effect of a call, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CallOutcome {
    /// The server processed the call, and its response describes the effect.
    Responded,
    /// The call had no effect. Either no attempt was sent, or the server reports that it did not
    /// start, or (in a [`CallError`](super::CallError)) the body of a refusal such as a 401 or 413
    /// was lost.
    NotTaken,
    /// It is unknown whether the call took effect, and it may still take effect later. Send it
    /// again under the same key, or ask the third party about it.
    Unknown,
}

impl From<ResponseMeaning> for CallOutcome {
    fn from(meaning: ResponseMeaning) -> Self {
        match meaning {
            ResponseMeaning::Responded { .. } => Self::Responded,
            ResponseMeaning::NotTaken => Self::NotTaken,
            ResponseMeaning::Unknown => Self::Unknown,
        }
    }
}

impl CallOutcome {
    /// Returns the outcome for a caller that does not see the response, because its body was lost.
    /// A refusal had no effect, also without its body. Without its status, a response that does not
    /// settle the effect shows nothing.
    pub(super) fn without_body(evidence: Evidence) -> Self {
        match evidence.meaning {
            _ if evidence.has_no_effect_by_error() => Self::NotTaken,
            ResponseMeaning::Responded { settles: true } => Self::Responded,
            ResponseMeaning::Responded { settles: false } | ResponseMeaning::NotTaken | ResponseMeaning::Unknown => {
                Self::Unknown
            }
        }
    }
}

/// The report about a call. [`CallLayer`](super::CallLayer) adds it to the extensions of every
/// response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallReport {
    pub(super) attempts: u32,
    pub(super) is_replay: bool,
    pub(super) outcome: CallOutcome,
}

impl CallReport {
    /// Returns how often this call sent the request: 1 or more. All attempts of an inner
    /// `CallLayer` count as one.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Returns whether the server marks this response as the replay of an earlier one.
    #[must_use]
    pub const fn is_replay(&self) -> bool {
        self.is_replay
    }

    /// Returns the effect of the call, as far as it is known.
    #[must_use]
    pub const fn outcome(&self) -> CallOutcome {
        self.outcome
    }
}
