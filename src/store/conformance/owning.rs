//! Clauses about owners: 7 and 9.

use std::time::Duration;

use super::probe::{LEASE, Probe, stored};
use crate::protocol::{Completion, Decision, Fence, IfLost, Nonce, Outcome, Owner, Release, Renewal, Snapshot, Status};
use crate::store::Store;

/// Clause 7: `renew`, `complete` and `release` compare nonce *and* fence, and change nothing for
/// any other caller.
///
/// Checks the owner's nonce with another fence, the owner's fence with another nonce, and both of a
/// superseded owner, on records in flight, lost, unknown, completed and absent.
pub async fn owners_only<S: Store>(store: &S) {
    const CLAUSE: &str = "7 (owners only)";
    let outcome = stored("head", "the outcome that stands");
    for at in 0..5 {
        let probe = Probe::new(store, CLAUSE);
        let (owner, stands) = match at {
            0 => (probe.first().await, None),
            1 => (probe.lost().await, None),
            2 => (probe.unknown().await, None),
            3 => (probe.completed(&outcome).await, Some(outcome.clone())),
            _ => (probe.completed(&Outcome::Tombstone).await, Some(Outcome::Tombstone)),
        };
        for stranger in strangers(owner) {
            rejects(&probe, stranger, stands.clone()).await;
        }
        if stands.is_some() {
            ended(&probe, owner).await;
        }
    }
    superseded(&Probe::new(store, CLAUSE)).await;
    absent(&Probe::new(store, CLAUSE)).await;
}

/// Returns owners that a store takes for `owner` if it compares too little.
pub(super) fn strangers(owner: Owner) -> [Owner; 4] {
    let (nonce, fence) = (owner.nonce, owner.fence.as_u64());
    [
        Owner {
            nonce: Nonce::random(),
            ..owner
        },
        Owner {
            nonce,
            fence: Fence::new(fence.wrapping_add(1)),
        },
        Owner {
            nonce,
            fence: Fence::new(fence.wrapping_sub(1)),
        },
        Owner {
            nonce: Nonce::random(),
            fence: Fence::new(fence.wrapping_add(1)),
        },
    ]
}

async fn rejects<S: Store>(probe: &Probe<'_, S>, stranger: Owner, stands: Option<Outcome>) {
    let before = probe.look().await;
    let case = probe.case;
    let unchanged = |operation: &str, after: Option<Snapshot>| {
        case.same(&format!("the record after a stranger's {operation}"), &after, &before);
    };
    for lease in [LEASE, Duration::ZERO] {
        let renewal = probe.renew(stranger, lease).await;
        case.same("a stranger's renewal", &renewal, &Renewal::Superseded);
        unchanged("renewal", probe.look().await);
    }
    let completion = probe.complete(stranger, &stored("head", "a stranger's")).await;
    case.same("a stranger's completion", &completion, &Completion::Superseded(stands));
    unchanged("completion", probe.look().await);
    let release = probe.release(stranger).await;
    case.same("a stranger's release", &release, &Release::Superseded);
    unchanged("release", probe.look().await);
}

/// Checks that an owner that has completed can only repeat its completion.
async fn ended<S: Store>(probe: &Probe<'_, S>, owner: Owner) {
    let before = probe.look().await;
    probe.owns_nothing(owner, "a completion").await;
    let what = "a completed record after a renewal and a release";
    probe.case.same(what, &probe.look().await, &before);
}

async fn superseded<S: Store>(probe: &Probe<'_, S>) {
    let first = probe.lost().await;
    let second = probe.taken_over().await;
    rejects(probe, first, None).await;
    let outcome = stored("head", "the second's");
    let completion = probe.complete(second, &outcome).await;
    probe
        .case
        .same("the owner completes", &completion, &Completion::Completed);
    rejects(probe, first, Some(outcome)).await;
}

async fn absent<S: Store>(probe: &Probe<'_, S>) {
    let nobody = Owner {
        nonce: Nonce::random(),
        fence: Fence::new(1),
    };
    let renewal = probe.renew(nobody, LEASE).await;
    probe
        .case
        .same("a renewal of an absent key", &renewal, &Renewal::Superseded);
    let completion = probe.complete(nobody, &stored("head", "body")).await;
    probe.case.same(
        "a completion of an absent key",
        &completion,
        &Completion::Superseded(None),
    );
    let release = probe.release(nobody).await;
    probe
        .case
        .same("a release of an absent key", &release, &Release::Released);
    probe.case.same(
        "the record after operations on an absent key",
        &probe.look().await,
        &None,
    );
}

/// Clause 9: a release leaves evidence. It deletes the record only if the owner's attempt was the
/// only one ever.
///
/// Checks records in flight, lost and unknown, for the first attempt and for later ones, each
/// released twice.
pub async fn release_leaves_evidence<S: Store>(store: &S) {
    const CLAUSE: &str = "9 (a release leaves evidence)";
    for at in 0..3 {
        let probe = Probe::new(store, CLAUSE);
        let owner = match at {
            0 => probe.first().await,
            1 => probe.lost().await,
            _ => probe.unknown().await,
        };
        for what in ["the release of an only attempt", "its repetition"] {
            probe.case.same(what, &probe.release(owner).await, &Release::Released);
            let what = format!("the record after {what}");
            probe.case.same(&what, &probe.look().await, &None);
        }
        let grant = probe.granted(&probe.case.claim(IfLost::Refuse)).await;
        let what = "the number of the first attempt after a release";
        probe.case.same(what, &grant.attempt, &1);
    }
    for lost in [false, true] {
        later_attempt(&Probe::new(store, CLAUSE), lost).await;
    }
}

async fn later_attempt<S: Store>(probe: &Probe<'_, S>, lost: bool) {
    probe.lost().await;
    let second = probe.taken_over().await;
    if lost {
        probe.lose(second).await;
    }
    for what in ["the release of a second attempt", "its repetition"] {
        probe.case.same(what, &probe.release(second).await, &Release::Released);
        let what = format!("the status after {what}");
        probe.case.same(&what, &probe.status().await, &Some(Status::Lost));
    }
    let decision = probe.ask(&probe.case.claim(IfLost::Refuse)).await;
    let what = "a claim that refuses to repeat, after the release of a second attempt";
    probe.case.same(what, &decision, &Decision::Unknown);
    let release = probe.release(second).await;
    probe
        .case
        .same("a release of an unknown record", &release, &Release::Released);
    let what = "the status of an unknown record after a release";
    probe.case.same(what, &probe.status().await, &Some(Status::Unknown));
}
