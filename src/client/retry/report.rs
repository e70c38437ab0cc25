//! What became of a call, over all of its attempts.

use std::sync::{Arc, Mutex, PoisonError};

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

/// What the attempts of a call came to so far; an extension of its requests.
#[derive(Clone, Debug, Default)]
pub(super) struct Report(Arc<Mutex<Progress>>);

#[derive(Debug, Default)]
struct Progress {
    attempts: u32,
    last: Option<Meaning>,
    /// Whether an attempt was lost whose effect no later answer has settled.
    lost: bool,
}

impl Report {
    /// Enters the end of an attempt.
    pub(super) fn enter(&self, meaning: Meaning) {
        let mut progress = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        progress.attempts += 1;
        progress.last = Some(meaning);
        match meaning {
            Meaning::Unknown => progress.lost = true,
            Meaning::Answered { settles: true } => progress.lost = false,
            Meaning::Answered { settles: false } | Meaning::NotTaken => {}
        }
    }

    /// The attempts, and what is known about their effect; `last` is the end of a single attempt that nobody entered.
    pub(super) fn sum(&self, last: Meaning) -> (u32, CallOutcome) {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).last.is_none() {
            self.enter(last);
        }
        let progress = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match progress.last {
            _ if progress.lost => CallOutcome::Unknown,
            Some(Meaning::Answered { .. }) => CallOutcome::Answered,
            Some(Meaning::NotTaken) => CallOutcome::NotTaken,
            Some(Meaning::Unknown) | None => CallOutcome::Unknown,
        };
        (progress.attempts, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLED: Meaning = Meaning::Answered { settles: true };
    const REFUSED: Meaning = Meaning::Answered { settles: false };

    fn outcome(meanings: &[Meaning]) -> CallOutcome {
        let report = Report::default();
        for meaning in meanings {
            report.enter(*meaning);
        }
        let (attempts, outcome) = report.sum(Meaning::Unknown);
        assert_eq!(usize::try_from(attempts), Ok(meanings.len().max(1)));
        outcome
    }

    #[test]
    fn what_was_lost_stays_unknown_until_an_answer_settles_it() {
        use Meaning::{NotTaken, Unknown};
        for (meanings, expected) in [
            (&[][..], CallOutcome::Unknown),
            (&[SETTLED], CallOutcome::Answered),
            (&[REFUSED], CallOutcome::Answered),
            (&[NotTaken], CallOutcome::NotTaken),
            (&[NotTaken, NotTaken], CallOutcome::NotTaken),
            (&[Unknown, SETTLED], CallOutcome::Answered),
            // A login that expired between two attempts says nothing about the first.
            (&[Unknown, REFUSED], CallOutcome::Unknown),
            (&[Unknown, NotTaken], CallOutcome::Unknown),
            (&[Unknown, NotTaken, SETTLED], CallOutcome::Answered),
            (&[NotTaken, Unknown], CallOutcome::Unknown),
        ] {
            assert_eq!(outcome(meanings), expected, "{meanings:?}");
        }
    }
}
