//! Clauses about claims: 5, 6, 8 and 10.

use super::probe::{IN_FLIGHT, Probe, WAIT, another_request, stored};
use crate::protocol::{Claim, Completion, Decision, Grant, IfLost, Nonce, Outcome, Status};
use crate::store::Store;

/// Clause 5: a claim with another fingerprint is a mismatch, whatever the state of the record.
///
/// Checks records in flight, lost, unknown, with a stored response and with a tombstone, also for
/// the owner's own nonce. Checks that the record stays as it was.
pub async fn fingerprint_first<S: Store>(store: &S) {
    const CLAUSE: &str = "5 (fingerprint first)";
    for at in 0..5 {
        for probe in Probe::both_ways(store, CLAUSE) {
            let owner = match at {
                0 => probe.first().await,
                1 => probe.lost().await,
                2 => probe.unknown().await,
                3 => probe.completed(&stored("head", "body")).await,
                _ => probe.completed(&Outcome::Tombstone).await,
            };
            mismatches(&probe, owner.nonce).await;
        }
    }
}

async fn mismatches<S: Store>(probe: &Probe<'_, S>, owner: Nonce) {
    let before = probe.look().await;
    for if_lost in [IfLost::Execute, IfLost::Recover, IfLost::Refuse] {
        let other = another_request(&probe.case.claim(if_lost));
        for nonce in [other.nonce, owner] {
            let claim = Claim { nonce, ..other.clone() };
            let what = format!("a claim of another request, when the record was {before:?}");
            probe.case.same(&what, &probe.ask(&claim).await, &Decision::Mismatch);
        }
    }
    let what = "the record after claims of another request";
    probe.case.same(what, &probe.look().await, &before);
}

/// Clause 6: a claim with the nonce of the current owner gets that owner's grant again, of the same
/// kind. A completion by the owner that already completed succeeds and changes nothing.
///
/// Checks first attempts and takeovers of both kinds, at the cap of attempts, and after the lease
/// was lost.
pub async fn repeatable<S: Store>(store: &S) {
    const CLAUSE: &str = "6 (repeatable)";
    for probe in Probe::both_ways(store, CLAUSE) {
        repeats_a_claim(&probe, probe.case.claim(IfLost::Refuse)).await;
    }
    for if_lost in [IfLost::Execute, IfLost::Recover] {
        for probe in Probe::both_ways(store, CLAUSE) {
            probe.lost().await;
            repeats_a_claim(&probe, probe.case.claim(if_lost)).await;
        }
    }
    repeats_a_completion(&Probe::new(store, CLAUSE)).await;
}

async fn repeats_a_claim<S: Store>(probe: &Probe<'_, S>, claim: Claim) {
    let first = probe.ask(&claim).await;
    let (Decision::Execute(grant) | Decision::Recover(grant)) = &first else {
        probe.case.fail(&format!("a claim that must be granted got {first:?}"));
    };
    // The settings may have changed before the repeated claim. The grant must stay the same.
    for if_lost in [IfLost::Execute, IfLost::Recover, IfLost::Refuse] {
        let again = Claim {
            if_lost,
            max_attempts: 1,
            ..claim.clone()
        };
        probe.case.same("a repeated claim", &probe.ask(&again).await, &first);
        probe.lose(grant.owner).await;
        let what = "a repeated claim after the lease ended";
        probe.case.same(what, &probe.ask(&again).await, &first);
        let what = "the status after a repeated claim";
        probe.case.same(what, &probe.status().await, &Some(IN_FLIGHT));
    }
}

async fn repeats_a_completion<S: Store>(probe: &Probe<'_, S>) {
    let outcome = stored("head", "the first response");
    let owner = probe.completed(&outcome).await;
    let before = probe.look().await;
    for outcome in [outcome, stored("head", "another response"), Outcome::Tombstone] {
        let completion = probe.complete(owner, &outcome).await;
        probe
            .case
            .same("a repeated completion", &completion, &Completion::Completed);
        let what = "the record after a repeated completion";
        probe.case.same(what, &probe.look().await, &before);
    }
}

/// Clause 8: the fence grows with every owner of a key, as long as its record lives.
///
/// Checks takeovers, also after releases that left evidence. `peek` must show each fence, and the
/// attempts must count up.
pub async fn fence_grows<S: Store>(store: &S) {
    const CLAUSE: &str = "8 (the fence grows)";
    for probe in Probe::both_ways(store, CLAUSE) {
        let mut last: Option<Grant> = None;
        for attempt in 1..=8 {
            let grant = probe.granted(&probe.case.claim(IfLost::Execute)).await;
            probe.case.same("the number of an attempt", &grant.attempt, &attempt);
            if let Some(last) = last {
                let what = format!("the fence {:?} did not grow: {:?}", last.owner.fence, grant.owner.fence);
                probe.case.check(grant.owner.fence > last.owner.fence, &what);
            }
            let shown = probe.look().await.map(|record| (record.fence, record.attempt));
            let wanted = Some((grant.owner.fence, attempt));
            probe.case.same("fence and attempt that `peek` shows", &shown, &wanted);
            if attempt % 2 == 0 {
                probe.release(grant.owner).await;
            } else {
                probe.lose(grant.owner).await;
            }
            last = Some(grant);
        }
    }
}

/// Clause 10: attempts are capped by the claim's `max_attempts`. After the last one the outcome is
/// unknown.
///
/// Checks caps of 1 to 3 and both kinds of takeover. Checks that an unknown record stays unknown,
/// whatever a later claim allows.
pub async fn attempts_are_capped<S: Store>(store: &S) {
    const CLAUSE: &str = "10 (attempts are capped)";
    for max_attempts in 1..=3 {
        for if_lost in [IfLost::Execute, IfLost::Recover] {
            for probe in Probe::both_ways(store, CLAUSE) {
                caps(&probe, max_attempts, if_lost).await;
            }
        }
    }
}

async fn caps<S: Store>(probe: &Probe<'_, S>, max_attempts: u32, if_lost: IfLost) {
    let claim = || Claim {
        max_attempts,
        ..probe.case.claim(if_lost)
    };
    for attempt in 1..=max_attempts {
        let grant = probe.granted(&claim()).await;
        let what = format!("the number of an attempt, of {max_attempts}");
        probe.case.same(&what, &grant.attempt, &attempt);
        let what = "a claim while the owner is alive";
        probe.case.same(what, &probe.ask(&claim()).await, &WAIT);
        probe.lose(grant.owner).await;
    }
    let what = format!("a claim after {max_attempts} lost attempts of {max_attempts}");
    probe.case.same(&what, &probe.ask(&claim()).await, &Decision::Unknown);
    probe.case.same(
        "the status after the last attempt",
        &probe.status().await,
        &Some(Status::Unknown),
    );
    let generous = probe.case.claim(IfLost::Execute);
    let what = "a claim of an unknown outcome, with more attempts";
    probe.case.same(what, &probe.ask(&generous).await, &Decision::Unknown);
}
