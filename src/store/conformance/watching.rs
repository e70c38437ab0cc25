//! Clause 16, about watches.

use std::time::Duration;

use super::probe::{LONGEST_WAIT, Probe, RETENTION, stored};
use crate::protocol::{Completion, Owner, Release, Renewal, Resolution, ResolveResult};
use crate::store::Store;

/// The end of an attempt that must wake a waiter.
#[derive(Clone, Copy, Debug)]
enum Ending {
    Completion,
    GivingUp,
    LateCompletion,
    Release,
    ResolutionAsAbsent,
    ResolutionAsCompleted,
}

const ENDINGS: [Ending; 6] = [
    Ending::Completion,
    Ending::GivingUp,
    Ending::LateCompletion,
    Ending::Release,
    Ending::ResolutionAsAbsent,
    Ending::ResolutionAsCompleted,
];

/// Clause 16: when `watch` has returned, every later change that ends the attempt wakes its future.
///
/// Checks one watch that is polled from the start and one whose first poll comes after the change,
/// while a third was dropped. Each has ten seconds to wake, so a store also passes if it only wakes
/// its watches periodically and more often than that.
pub async fn subscribe_then_look<S: Store>(store: &S) {
    for ending in ENDINGS {
        let probe = Probe::new(store, "16 (subscribe, then look)");
        let owner = match ending {
            Ending::Completion | Ending::GivingUp | Ending::Release => probe.first().await,
            Ending::LateCompletion | Ending::ResolutionAsAbsent | Ending::ResolutionAsCompleted => probe.lost().await,
        };
        let early = tokio::spawn(probe.watch().await);
        let late = probe.watch().await;
        drop(probe.watch().await);
        end(&probe, owner, ending).await;
        let woken = tokio::time::timeout(LONGEST_WAIT, late).await.is_ok();
        let what = format!("a watch that was polled after the change did not wake: {ending:?}");
        probe.case.check(woken, &what);
        let woken = tokio::time::timeout(LONGEST_WAIT, early).await.is_ok();
        let what = format!("a watch that was polled before the change did not wake: {ending:?}");
        probe.case.check(woken, &what);
    }
}

async fn end<S: Store>(probe: &Probe<'_, S>, owner: Owner, ending: Ending) {
    let outcome = stored("head", "body");
    let ended = match ending {
        Ending::Completion | Ending::LateCompletion => probe.complete(owner, &outcome).await == Completion::Completed,
        Ending::GivingUp => probe.renew(owner, Duration::ZERO).await == Renewal::Renewed,
        Ending::Release => probe.release(owner).await == Release::Released,
        Ending::ResolutionAsAbsent => probe.resolve(owner.fence, &Resolution::Absent).await == ResolveResult::Resolved,
        Ending::ResolutionAsCompleted => {
            let resolution = Resolution::Completed(outcome, RETENTION);
            probe.resolve(owner.fence, &resolution).await == ResolveResult::Resolved
        }
    };
    probe.case.check(ended, &format!("an attempt did not end: {ending:?}"));
}
