//! The setting for lost attempts.

use crate::protocol::IfLost;

/// The treatment of a key whose owner vanished. An owner vanishes if its process is killed, or if
/// its lease ends before its outcome is recorded. It is then unknown whether the attempt took
/// effect.
///
/// Every layer has a third choice, `with_recovery`, which calls a check before the next attempt
/// runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnLost {
    /// The next attempt runs: at least once. `at_least_once()` is a shorthand for this setting.
    Execute,
    /// No other attempt runs: at most once within the retention. A duplicate gets "outcome unknown"
    /// (over HTTP 409 `outcome-unknown`) until the old owner completes late, until an operator
    /// resolves the key, or until the retention is over.
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
