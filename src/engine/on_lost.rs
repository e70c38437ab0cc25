//! The setting for lost attempts.

use crate::protocol::IfLost;

/// What happens to a key whose owner vanished: its process was killed, or its lease ended before its outcome was recorded.
/// Nobody knows whether the attempt took effect.
///
/// Every layer has a third choice, `with_recovery`: it asks before the next attempt runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnLost {
    /// The next attempt runs: at least once. `at_least_once()` is a shorthand for this setting.
    Execute,
    /// No other attempt runs: at most once within the retention. A duplicate gets "outcome unknown" (over HTTP 409
    /// `outcome-unknown`) until the old owner completes late, until somebody resolves the key, or until the retention is over.
    #[default]
    Refuse,
}

impl From<OnLost> for IfLost {
    fn from(on_lost: OnLost) -> Self {
        match on_lost {
            OnLost::Execute => Self::Execute,
            OnLost::Refuse => Self::Refuse,
        }
    }
}
