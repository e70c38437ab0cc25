//! Clauses that need hooks by the store's author: 13, 14 and 15.

use std::fmt::Debug;

use super::outcomes::replays;
use super::probe::{Case, LEASE, Probe, RETENTION, WAIT, stored};
use crate::error::{Error, ErrorKind};
use crate::protocol::{Completion, Decision, IfLost, Outcome, Owner, Resolution, Snapshot, StorageKey};
use crate::store::Store;

/// Clause 13: when `complete` returns, the outcome survives every failure that the store promises
/// to survive.
///
/// `reopen` causes the worst of these failures (it kills and restarts the server, fails over, or
/// opens the file again) and returns the store as it is afterwards. `store` is dropped before.
/// Checks records in every state and their owners, and that fences continue to grow. A store that
/// survives nothing, such as [`MemoryStore`](crate::MemoryStore), cannot pass.
pub async fn durable<S, R, F>(store: S, reopen: impl FnOnce() -> F + Send)
where
    S: Store,
    R: Store,
    F: Future<Output = R> + Send,
{
    const CLAUSE: &str = "13 (durable before done)";
    let outcome = stored("head", b"\0 durable \xff".to_vec());
    let probes = [(); 5].map(|()| Case::new(CLAUSE));
    let [in_flight, lost, unknown, done, tombstone] = probes;
    let owner = in_flight.at(&store).first().await;
    let lost_owner = lost.at(&store).lost().await;
    unknown.at(&store).unknown().await;
    done.at(&store).completed(&outcome).await;
    tombstone.at(&store).completed(&Outcome::Tombstone).await;
    let before = views(&store, &probes).await;

    drop(store);
    let store = reopen().await;
    for ((case, before), after) in probes.iter().zip(&before).zip(&views(&store, &probes).await) {
        case.same("the record after the store was opened again", after, before);
    }
    replays(&done.at(&store), &outcome).await;
    replays(&tombstone.at(&store), &Outcome::Tombstone).await;
    let completion = in_flight.at(&store).complete(owner, &outcome).await;
    let what = "the completion by an owner from before";
    in_flight.same(what, &completion, &Completion::Completed);
    let fence = lost.at(&store).taken_over().await.fence;
    let what = format!(
        "the fence {:?} did not grow after the store was opened again: {fence:?}",
        lost_owner.fence
    );
    lost.check(fence > lost_owner.fence, &what);
}

async fn views<S: Store>(store: &S, cases: &[Case]) -> Vec<Option<Snapshot>> {
    let mut views = Vec::new();
    for case in cases {
        views.push(case.at(store).look().await);
    }
    views
}

/// Clause 14: a record that cannot be read is an error of kind
/// [`CorruptRecord`](ErrorKind::CorruptRecord).
///
/// `damage` changes the record under a key without the store's knowledge. It overwrites the bytes
/// with others that are no record, or with a record of a newer version. Checks a record in flight
/// and a completed one. Every operation except `watch` must report the damage twice, which shows
/// that none of them has removed the record.
pub async fn unreadable_is_not_absent<S, F>(store: &S, mut damage: impl FnMut(StorageKey) -> F + Send)
where
    S: Store,
    F: Future<Output = ()> + Send,
{
    const CLAUSE: &str = "14 (unreadable is not absent)";
    for completed in [false, true] {
        let probe = Probe::new(store, CLAUSE);
        let owner = match completed {
            false => probe.first().await,
            true => probe.completed(&stored("head", "body")).await,
        };
        damage(probe.case.key).await;
        for _ in 0..2 {
            is_reported(&probe, owner).await;
        }
    }
}

async fn is_reported<S: Store>(probe: &Probe<'_, S>, owner: Owner) {
    let (case, store) = (probe.case, probe.store);
    let key = &case.key;
    let claim = case.claim(IfLost::Execute);
    if let Some(reply) = store.claim_now(&claim) {
        is_corrupt(case, "claim_now", &reply);
    }
    is_corrupt(case, "claim", &store.claim(&claim).await);
    is_corrupt(case, "peek", &store.peek(key).await);
    is_corrupt(case, "renew", &store.renew(key, owner, LEASE).await);
    let outcome = stored("head", "body");
    is_corrupt(case, "complete", &store.complete(key, owner, &outcome, RETENTION).await);
    is_corrupt(case, "release", &store.release(key, owner).await);
    for resolution in [Resolution::Completed(outcome, RETENTION), Resolution::Absent] {
        is_corrupt(case, "resolve", &store.resolve(key, owner.fence, &resolution).await);
    }
}

fn is_corrupt<T: Debug>(case: Case, operation: &str, reply: &Result<T, Error>) {
    let reported = matches!(reply, Err(error) if error.kind() == ErrorKind::CorruptRecord);
    case.check(reported, &format!("`{operation}` of a damaged record got {reply:?}"));
}

/// Clause 15: a store that is full refuses new claims with [`StoreFull`](ErrorKind::StoreFull) and
/// evicts no record before its expiry. It may turn the oldest stored responses into tombstones.
///
/// Pass a store that is used for nothing else and has room for at most `at_most` records. The
/// function fills it. Every other record has a response of 64 bytes. Checks that a claim is refused
/// and leaves no record, that every record is still there, and that claims of keys in use get the
/// usual decisions.
pub async fn bounded<S: Store>(store: &S, at_most: usize) {
    const CLAUSE: &str = "15 (bounded)";
    let outcome = stored("head", [b'x'; 60].as_slice().to_vec());
    let mut cases = Vec::new();
    let refused = loop {
        let case = Case::new(CLAUSE);
        case.check(
            cases.len() <= at_most,
            "the store accepted more records than it has room for",
        );
        match store.claim(&case.claim(IfLost::Refuse)).await {
            Ok(Decision::Execute(grant)) if cases.len() % 2 == 0 => {
                let completion = case.at(store).complete(grant.owner, &outcome).await;
                case.same("an owner completes", &completion, &Completion::Completed);
            }
            Ok(Decision::Execute(_)) => {}
            Err(error) if error.kind() == ErrorKind::StoreFull => break case,
            other => case.fail(&format!("a claim of the {}. key got {other:?}", cases.len() + 1)),
        }
        cases.push(case);
    };
    refused.same("the record of a refused claim", &refused.at(store).look().await, &None);
    for (n, case) in cases.iter().enumerate() {
        let decision = case.at(store).ask(&case.claim(IfLost::Execute)).await;
        let there = match &decision {
            Decision::NotStored => n % 2 == 0,
            Decision::Replay(response) => n % 2 == 0 && outcome == Outcome::Stored(response.clone()),
            other => n % 2 == 1 && *other == WAIT,
        };
        let what = format!("a claim of the {}. key of a full store got {decision:?}", n + 1);
        case.check(there, &what);
    }
}
