//! Clauses about outcomes: 11, 12 and 17.

use bytes::Bytes;

use super::owning::strangers;
use super::probe::{Probe, RETENTION, random, stored};
use crate::protocol::{
    Completion, Decision, Fence, IfLost, Nonce, Outcome, Owner, Resolution, ResolveResult, Status, StoredResponse,
};
use crate::store::Store;

/// Clause 11: the last owner of a lost or unknown record can still complete it. A resolution by the
/// record's fence can complete it, too, and ends the ownership.
///
/// Checks that claims replay the outcome from then on. Checks that an owner that completes, renews
/// or releases after a resolution changes nothing and gets the outcome that stands (I2). Checks
/// that no resolution applies with another fence, or to a record in flight or completed.
pub async fn late_completions_heal<S: Store>(store: &S) {
    const CLAUSE: &str = "11 (late completions heal)";
    let outcome = stored("head", "late");
    for unknown in [false, true] {
        for resolves in [false, true] {
            let probe = Probe::new(store, CLAUSE);
            let owner = if unknown {
                probe.unknown().await
            } else {
                probe.lost().await
            };
            if resolves {
                let resolution = Resolution::Completed(outcome.clone(), RETENTION);
                let resolved = probe.resolve(owner.fence, &resolution).await;
                probe.case.same("a resolution", &resolved, &ResolveResult::Resolved);
                owner_is_superseded(&probe, owner, &outcome).await;
            } else {
                let completion = probe.complete(owner, &outcome).await;
                let what = "a late completion by the last owner";
                probe.case.same(what, &completion, &Completion::Completed);
            }
            replays(&probe, &outcome).await;
        }
    }
    resolves_by_fence(store, CLAUSE).await;
}

/// Checks an owner that returns after a resolution has completed its record.
async fn owner_is_superseded<S: Store>(probe: &Probe<'_, S>, owner: Owner, stands: &Outcome) {
    let before = probe.look().await;
    let is_owned = before.as_ref().is_some_and(|seen| seen.nonce == owner.nonce);
    probe.case.check(
        !is_owned,
        "`peek` shows the owner's nonce in a record that a resolution completed",
    );
    for own in [stored("head", "the owner's"), Outcome::Tombstone, stands.clone()] {
        let completion = probe.complete(owner, &own).await;
        let superseded = Completion::Superseded(Some(stands.clone()));
        probe
            .case
            .same("a completion by the owner after a resolution", &completion, &superseded);
    }
    probe.owns_nothing(owner, "a resolution").await;
    probe
        .case
        .same("the record after its owner came back", &probe.look().await, &before);
}

/// Checks that a resolution applies only to the attempt that it names, and only if that attempt is
/// lost or unknown.
async fn resolves_by_fence<S: Store>(store: &S, clause: &'static str) {
    for at in 0..4 {
        let probe = Probe::new(store, clause);
        let (owner, resolvable) = match at {
            0 => (probe.first().await, false),
            1 => (probe.lost().await, true),
            2 => (probe.unknown().await, true),
            _ => (probe.completed(&Outcome::Tombstone).await, false),
        };
        let before = probe.look().await;
        let completed = Resolution::Completed(stored("head", "found"), RETENTION);
        for resolution in [completed, Resolution::Absent] {
            for fence in strangers(owner).map(|stranger| stranger.fence) {
                if fence == owner.fence && resolvable {
                    continue;
                }
                let resolved = probe.resolve(fence, &resolution).await;
                let what = format!("a resolution of {fence:?}, when the record was {before:?}");
                let conflict = ResolveResult::Conflict(Some(owner.fence));
                probe.case.same(&what, &resolved, &conflict);
                let what = "the record after a resolution in conflict";
                probe.case.same(what, &probe.look().await, &before);
            }
        }
        if resolvable {
            let resolved = probe.resolve(owner.fence, &Resolution::Absent).await;
            let what = "a resolution as absent";
            probe.case.same(what, &resolved, &ResolveResult::Resolved);
            probe.case.same(what, &probe.look().await, &None);
        }
    }
}

/// Clause 12: the store returns exactly the bytes that were completed.
///
/// Checks empty responses, every byte value, whitespace at both ends, text that is not UTF-8, and
/// 128 KiB of random bytes. Reads them by `claim`, `claim_now`, `peek` and the completion of a
/// superseded owner. The function never stores more at a time than a store with room for 1 MiB of
/// responses can hold.
pub async fn exact_responses<S: Store>(store: &S) {
    const CLAUSE: &str = "12 (exact responses)";
    let every: Bytes = (0..=u8::MAX).collect();
    let outcomes = [
        stored("", ""),
        stored("", "no head"),
        stored("no body", ""),
        stored(every.clone(), every.slice(..).iter().rev().copied().collect::<Bytes>()),
        stored(" \r\n\0", "\0\n\t \r\n"),
        stored("3", "-0001.50"),
        stored(b"\xff\xfe".to_vec(), b"\xc3\x28 \xf0\x28\x8c\xbc".to_vec()),
        stored(random::<4096>().to_vec(), every.repeat(512)),
        stored("head", (0..32).flat_map(|_| random::<4096>()).collect::<Bytes>()),
    ];
    for outcome in outcomes {
        for probe in Probe::both_ways(store, CLAUSE) {
            probe.completed(&outcome).await;
            replays(&probe, &outcome).await;
        }
    }
    let probe = Probe::new(store, CLAUSE);
    probe.completed(&Outcome::Tombstone).await;
    replays(&probe, &Outcome::Tombstone).await;
}

/// Clause 17: a completion with a rejection makes the record unknown, for every claim.
///
/// Checks claims of each kind with attempts left. Checks that the owner can repeat the rejection,
/// that `peek` shows the record as unknown, and that a resolution frees the key.
pub async fn rejection_is_unknown<S: Store>(store: &S) {
    const CLAUSE: &str = "17 (a rejection is unknown)";
    for probe in Probe::both_ways(store, CLAUSE) {
        let owner = probe.completed(&Outcome::Rejected).await;
        for if_lost in [IfLost::Execute, IfLost::Recover, IfLost::Refuse] {
            let decision = probe.ask(&probe.case.claim(if_lost)).await;
            let what = format!("a claim ({if_lost:?}) of a rejected key");
            probe.case.same(&what, &decision, &Decision::Unknown);
        }
        let status = probe.status().await;
        let what = "the status after a rejection";
        probe.case.same(what, &status, &Some(Status::Unknown));
        let completion = probe.complete(owner, &Outcome::Rejected).await;
        let what = "a repeated rejection";
        probe.case.same(what, &completion, &Completion::Completed);
        let resolved = probe.resolve(owner.fence, &Resolution::Absent).await;
        let what = "a resolution of a rejected key";
        probe.case.same(what, &resolved, &ResolveResult::Resolved);
        probe.first().await;
    }
}

/// Checks that every operation that returns an outcome returns this one.
pub(super) async fn replays<S: Store>(probe: &Probe<'_, S>, outcome: &Outcome) {
    let decision = match probe.ask(&probe.case.claim(IfLost::Execute)).await {
        Decision::Replay(response) => Some(Outcome::Stored(response)),
        Decision::NotStored => Some(Outcome::Tombstone),
        other => probe.case.fail(&format!("a claim of a completed key got {other:?}")),
    };
    equal(probe, "claim", decision.as_ref(), outcome);
    let shown = match probe.status().await {
        Some(Status::Completed(outcome)) => Some(outcome),
        other => probe.case.fail(&format!("`peek` showed {other:?} for a completed key")),
    };
    equal(probe, "peek", shown.as_ref(), outcome);
    let nobody = Owner {
        nonce: Nonce::random(),
        fence: Fence::new(1),
    };
    let stands = match probe.complete(nobody, &Outcome::Tombstone).await {
        Completion::Superseded(stands) => stands,
        other @ Completion::Completed => probe.case.fail(&format!("a stranger's completion got {other:?}")),
    };
    equal(probe, "complete", stands.as_ref(), outcome);
}

/// Reports where two responses differ, because their `Debug` form hides their bytes.
fn equal<S: Store>(probe: &Probe<'_, S>, operation: &str, seen: Option<&Outcome>, wanted: &Outcome) {
    if let (Some(Outcome::Stored(seen)), Outcome::Stored(wanted)) = (seen, wanted) {
        let part = |name: &str, of: fn(&StoredResponse) -> &Bytes| {
            let (seen, wanted) = (of(seen), of(wanted));
            let differs = seen.iter().zip(wanted).position(|(seen, wanted)| seen != wanted);
            let at = differs.or((seen.len() != wanted.len()).then(|| seen.len().min(wanted.len())));
            if let Some(at) = at {
                let lengths = format!("{} bytes instead of {}", seen.len(), wanted.len());
                let what = format!("the {name} that `{operation}` returns differs from byte {at} on ({lengths})");
                probe.case.fail(&what);
            }
        };
        part("head", |response| &response.head);
        part("body", |response| &response.body);
    }
    probe
        .case
        .same(&format!("the outcome that `{operation}` returns"), &seen, &Some(wanted));
}
