//! Clauses about concurrent operations: 1 and 3.

use std::sync::Arc;

use futures::future::join_all;
use tokio::sync::Barrier;

use super::probe::{Case, LEASE, Probe, WAIT, stored, timeless};
use crate::protocol::{Completion, Decision, IfLost, Owner, Release, Renewal, Resolution, ResolveResult, Status};
use crate::store::Store;

const ROUNDS: usize = 32;
const CLAIMANTS: usize = 16;

/// Clause 1: every operation is one atomic step on one key.
///
/// Races pairs of operations, 32 times each. Exactly one operation of a pair can win: release and
/// completion of one owner; a takeover and the lost owner's completion, renewal or resolution; two
/// takeovers; and a completion while `peek` reads the record, which must never be absent (I6). The
/// function provokes races and cannot prove their absence.
pub async fn atomic<S: Store + Clone>(store: &S) {
    const CLAUSE: &str = "1 (atomic)";
    for _ in 0..ROUNDS {
        release_or_complete(store, CLAUSE).await;
        take_over_or_complete(store, CLAUSE).await;
        take_over_or_renew(store, CLAUSE).await;
        take_over_or_resolve(store, CLAUSE).await;
        take_over_once(store, CLAUSE).await;
        complete_in_sight(store, CLAUSE).await;
    }
}

/// Clause 3: of any number of concurrent claims of an absent key, exactly one is granted.
///
/// Races 16 claims for each of 32 keys. The other claims must get `Wait`. Half of the claims use
/// `claim_now` if the store implements it.
pub async fn one_owner<S: Store + Clone>(store: &S) {
    const CLAUSE: &str = "3 (one owner)";
    for _ in 0..ROUNDS {
        let case = Case::new(CLAUSE);
        let decisions = claims(store, case, CLAIMANTS, IfLost::Refuse).await;
        one_of(case, &decisions, 1, "an absent key");
    }
}

async fn release_or_complete<S: Store + Clone>(store: &S, clause: &'static str) {
    let probe = Probe::new(store, clause);
    let owner = probe.first().await;
    let (case, one, other) = (probe.case, store.clone(), store.clone());
    let release = async move { case.at(&one).release(owner).await };
    let complete = async move { case.at(&other).complete(owner, &stored("head", "body")).await };
    let seen = both(release, complete).await;
    let released = (Release::Released, Completion::Superseded(None));
    let completed = (Release::Superseded, Completion::Completed);
    either(
        case,
        "a release and a completion by one owner",
        &seen,
        &[released, completed],
    );
    let left = probe.look().await.is_some();
    let what = format!(
        "after {seen:?} the record was {}",
        if left { "there" } else { "absent" }
    );
    case.check(left == (seen.1 == Completion::Completed), &what);
}

/// Takes a lost key over, while its earlier owner runs another operation. Returns the name of the
/// decision and the reply of the operation.
async fn beside_takeover<S, F>(
    store: &S,
    clause: &'static str,
    operation: impl FnOnce(Case, S, Owner) -> F,
) -> (Case, (&'static str, F::Output))
where
    S: Store + Clone,
    F: Future<Output: Send> + Send + 'static,
{
    let probe = Probe::new(store, clause);
    let owner = probe.lost().await;
    let (case, one) = (probe.case, store.clone());
    let take_over = async move { name(&case.at(&one).ask(&case.claim(IfLost::Execute)).await) };
    (case, both(take_over, operation(case, store.clone(), owner)).await)
}

async fn take_over_or_complete<S: Store + Clone>(store: &S, clause: &'static str) {
    let complete = |case: Case, store: S, owner| async move {
        let late = stored("head", "late");
        case.at(&store).complete(owner, &late).await
    };
    let (case, seen) = beside_takeover(store, clause, complete).await;
    let taken = ("execute", Completion::Superseded(None));
    let healed = ("replay", Completion::Completed);
    either(case, "a takeover and a late completion", &seen, &[taken, healed]);
}

async fn take_over_or_renew<S: Store + Clone>(store: &S, clause: &'static str) {
    let renew = |case: Case, store: S, owner| async move { case.at(&store).renew(owner, LEASE).await };
    let (case, seen) = beside_takeover(store, clause, renew).await;
    let taken = ("execute", Renewal::Superseded);
    let renewed = ("wait", Renewal::Renewed);
    either(case, "a takeover and a late renewal", &seen, &[taken, renewed]);
}

async fn take_over_or_resolve<S: Store + Clone>(store: &S, clause: &'static str) {
    let probe = Probe::new(store, clause);
    let owner = probe.lost().await;
    let (case, one, other) = (probe.case, store.clone(), store.clone());
    let take_over = async move { case.at(&one).granted(&case.claim(IfLost::Execute)).await };
    let resolve = async move { case.at(&other).resolve(owner.fence, &Resolution::Absent).await };
    let (grant, resolved) = both(take_over, resolve).await;
    let seen = (grant.attempt, resolved);
    let taken = (2, ResolveResult::Conflict(Some(grant.owner.fence)));
    let anew = (1, ResolveResult::Resolved);
    either(case, "a takeover and a resolution", &seen, &[taken, anew]);
    let shown = probe.look().await.map(|record| (record.fence, record.attempt));
    let wanted = Some((grant.owner.fence, grant.attempt));
    case.same("the record after a takeover and a resolution", &shown, &wanted);
}

async fn take_over_once<S: Store + Clone>(store: &S, clause: &'static str) {
    let probe = Probe::new(store, clause);
    probe.lost().await;
    let decisions = claims(store, probe.case, 4, IfLost::Execute).await;
    one_of(probe.case, &decisions, 2, "a lost key");
}

async fn complete_in_sight<S: Store + Clone>(store: &S, clause: &'static str) {
    let probe = Probe::new(store, clause);
    let owner = probe.first().await;
    let (case, one, other) = (probe.case, store.clone(), store.clone());
    let complete = async move { case.at(&one).complete(owner, &stored("head", "body")).await };
    let look = async move {
        loop {
            match case.at(&other).status().await {
                Some(Status::InFlight { .. }) => tokio::task::yield_now().await,
                seen => return seen,
            }
        }
    };
    let (_, seen) = both(complete, look).await;
    let completed = Some(Status::Completed(stored("head", "body")));
    case.same("the record during a completion", &seen, &completed);
}

async fn claims<S: Store + Clone>(store: &S, case: Case, count: usize, if_lost: IfLost) -> Vec<Decision> {
    let ready = Arc::new(Barrier::new(count));
    let claims = (0..count).map(|n| {
        let (store, ready) = (store.clone(), Arc::clone(&ready));
        async move {
            let claim = case.claim(if_lost);
            start(&ready).await;
            let case = if n % 2 == 0 { case } else { case.using_claim_now() };
            timeless(case.at(&store).ask_exactly(&claim).await)
        }
    });
    let tasks = claims.map(in_a_task).collect::<Vec<_>>();
    join_all(tasks).await
}

fn one_of(case: Case, decisions: &[Decision], attempt: u32, what: &str) {
    let granted = |decision: &&Decision| matches!(decision, Decision::Execute(grant) if grant.attempt == attempt);
    let (granted, waiting) = (
        decisions.iter().filter(granted).count(),
        decisions.iter().filter(|decision| **decision == WAIT).count(),
    );
    let as_it_must = granted == 1 && waiting == decisions.len() - 1;
    case.check(as_it_must, &format!("concurrent claims of {what} got {decisions:?}"));
}

fn either<T: PartialEq + std::fmt::Debug>(case: Case, what: &str, seen: &T, wanted: &[T]) {
    let what = format!("{what}, in a race, got {seen:?}; possible results are {wanted:?}");
    case.check(wanted.contains(seen), &what);
}

const fn name(decision: &Decision) -> &'static str {
    match decision {
        Decision::Execute(_) => "execute",
        Decision::Replay(_) => "replay",
        Decision::Wait { .. } => "wait",
        _ => "another decision",
    }
}

/// Runs both futures at the same time, each in a task of its own.
async fn both<A, B>(one: A, other: B) -> (A::Output, B::Output)
where
    A: Future<Output: Send> + Send + 'static,
    B: Future<Output: Send> + Send + 'static,
{
    let ready = Arc::new(Barrier::new(2));
    let also_ready = Arc::clone(&ready);
    let one = in_a_task(async move {
        start(&ready).await;
        one.await
    });
    let other = in_a_task(async move {
        start(&also_ready).await;
        other.await
    });
    futures::future::join(one, other).await
}

/// Waits until all tasks are ready, and then yields up to twice. Otherwise the task that arrives
/// last would always be the first to continue.
async fn start(ready: &Barrier) {
    ready.wait().await;
    for _ in 0..rand::random_range(0..3) {
        tokio::task::yield_now().await;
    }
}

/// Runs a future in a task, because only tasks run on several threads of a multi-thread runtime.
fn in_a_task<F>(future: F) -> impl Future<Output = F::Output> + Send
where
    F: Future<Output: Send> + Send + 'static,
{
    let task = tokio::spawn(future);
    async {
        match task.await {
            Ok(output) => output,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}
