//! The progress of a transaction in which a handler completes its own record.

#[cfg(feature = "postgres")]
use crate::sync::atomic::{AtomicU8, Ordering};

/// The progress of the caller's database transaction that completes the record of a key, as far as
/// this process knows.
///
/// ```text
/// none ──begin──▶ begun ──succeed──▶ completed ──roll_back──▶ rolled back
///                   └──fail──▶ failed
/// ```
///
/// A handler may begin again after each step. Without the feature `postgres`, no store has
/// transactions, so the state has no steps.
#[derive(Debug, Default)]
pub(crate) struct TransactionState {
    /// The last step. The owner reads it after its handler has ended. A task that renews may
    /// read an old step. This does no harm, because the store compares the owner (I8).
    #[cfg(feature = "postgres")]
    step: AtomicU8,
}

/// The last step of a transaction. The values are those of [`TransactionState`].
#[cfg(feature = "postgres")]
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    /// The completion is sent to the store, and may or may not take effect.
    Begun = 1,
    /// The completion succeeded. The transaction locks the record until it ends.
    Completed = 2,
    /// The completion failed.
    Failed = 3,
    /// The completion succeeded, and the record shows that the transaction was rolled back.
    RolledBack = 4,
}

impl TransactionState {
    /// Whether a transaction has completed the record, and has not been rolled back since, as far
    /// as this process knows. It then holds the lock of the record's row, or is committed.
    #[cfg(feature = "postgres")]
    pub(crate) fn is_completed(&self) -> bool {
        self.is(Step::Completed)
    }

    /// Always `false`, because without the feature `postgres` no store has transactions.
    #[cfg(not(feature = "postgres"))]
    #[expect(clippy::unused_self, reason = "only the feature `postgres` needs `self`")]
    pub(crate) const fn is_completed(&self) -> bool {
        false
    }

    /// Always `false`, because without the feature `postgres` no store has transactions.
    #[cfg(not(feature = "postgres"))]
    #[expect(clippy::unused_self, reason = "only the feature `postgres` needs `self`")]
    pub(super) const fn has_begun(&self) -> bool {
        false
    }
}

#[cfg(feature = "postgres")]
impl TransactionState {
    /// Notes that a completion is sent within a transaction. Call this before the completion is
    /// sent, because a completion whose future is dropped may still take effect. From here on, only
    /// the record shows how the attempt ended.
    pub(crate) fn begin(&self) {
        self.set(Step::Begun);
    }

    /// Notes that the completion succeeded.
    pub(crate) fn succeed(&self) {
        self.set(Step::Completed);
    }

    /// Notes that the completion failed. See [`HeldLease::fail_completion`], which also makes the
    /// next renewal due.
    ///
    /// [`HeldLease::fail_completion`]: super::held_lease::HeldLease::fail_completion
    pub(super) fn fail(&self) {
        self.set(Step::Failed);
    }

    /// Notes that the record shows a rollback, after the handler has ended. A completion that did
    /// not succeed stays as it is.
    pub(super) fn roll_back(&self) {
        let (completed, rolled_back) = (Step::Completed as u8, Step::RolledBack as u8);
        // A task of the handler may begin another completion at the same time, and that one counts.
        let _ = self
            .step
            .compare_exchange(completed, rolled_back, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether the handler has tried to complete the record in a transaction.
    pub(crate) fn has_begun(&self) -> bool {
        self.step.load(Ordering::Acquire) != 0
    }

    /// Whether the last completion did not succeed, as far as this process knows. In that case, the
    /// handler's response may be nothing but a report of that failure.
    pub(crate) fn has_failed(&self) -> bool {
        self.is(Step::Begun) || self.is(Step::Failed)
    }

    fn is(&self, step: Step) -> bool {
        self.step.load(Ordering::Acquire) == step as u8
    }

    fn set(&self, step: Step) {
        self.step.store(step as u8, Ordering::Release);
    }
}

#[cfg(all(test, feature = "postgres"))]
mod tests {
    use super::*;

    fn shown(state: &TransactionState) -> [bool; 3] {
        [state.has_begun(), state.is_completed(), state.has_failed()]
    }

    #[test]
    fn a_transaction_counts_as_failed_until_its_completion_succeeds() {
        let state = TransactionState::default();
        assert_eq!(shown(&state), [false, false, false]);
        state.begin();
        assert_eq!(shown(&state), [true, false, true]);
        state.succeed();
        assert_eq!(shown(&state), [true, true, false]);
        state.begin();
        state.fail();
        assert_eq!(shown(&state), [true, false, true]);
        // Tasks of one handler may complete at the same time, and the last completion counts.
        state.succeed();
        state.fail();
        assert_eq!(shown(&state), [true, false, true]);
    }

    #[test]
    fn a_rollback_ends_only_a_completion_that_succeeded() {
        let state = TransactionState::default();
        state.roll_back();
        assert_eq!(shown(&state), [false, false, false]);
        state.begin();
        state.succeed();
        state.roll_back();
        assert_eq!(shown(&state), [true, false, false]);
        state.begin();
        state.roll_back();
        assert_eq!(shown(&state), [true, false, true]);
    }
}
