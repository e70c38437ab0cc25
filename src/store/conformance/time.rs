//! Clauses about time: 2 and 4. The only ones that wait.

use std::time::Duration;

use super::probe::{another_request, kept, Probe, LEASE, PATIENCE};
use crate::clock::Clock;
use crate::protocol::{Claim, Completion, Decision, Grant, IfLost, Renewal, Snapshot, Status};
use crate::store::Store;

/// A lease, or a retention, whose end is waited for.
const SHORT: Duration = Duration::from_millis(300);
/// How much less of a [`SHORT`] time may have passed by the clock of this process, which is not the store's.
const TOLERANCE: Duration = Duration::from_millis(75);
/// How often the end is looked for.
const GLANCE: Duration = Duration::from_millis(20);

/// Clause 2: leases and expiry are judged by the store's clock alone, never by the caller's.
///
/// From outside this can be seen of it: the time left of a long lease is that lease and at most ten seconds less, after a claim as
/// after a renewal; a short lease and a short retention end, and not early. Every store must pass; only one whose callers'
/// clocks are set differently can fail for that reason, so a test of a shared store runs this on several machines, or with
/// the clock of one turned.
pub async fn own_clock<S: Store>(store: &S) {
    const CLAUSE: &str = "2 (own clock)";
    for probe in Probe::both_ways(store, CLAUSE) {
        let grant = probe.granted(&probe.case.claim(IfLost::Execute)).await;
        has_left(&probe, grant, LEASE).await;
        let renewal = probe.renew(grant.owner, 2 * LEASE).await;
        probe.case.same("an owner's renewal", &renewal, &Renewal::Renewed);
        has_left(&probe, grant, 2 * LEASE).await;
    }
    lease_ends(&Probe::new(store, CLAUSE)).await;
    retention_ends(&Probe::new(store, CLAUSE)).await;
}

async fn has_left<S: Store>(probe: &Probe<'_, S>, grant: Grant, lease: Duration) {
    let left = match probe.ask_exactly(&probe.case.claim(IfLost::Execute)).await {
        Decision::Wait { left } => left,
        other => probe
            .case
            .fail(&format!("a claim while the owner is alive got {other:?}")),
    };
    let shown = match probe.look_exactly().await {
        Some(Snapshot {
            status: Status::InFlight { left },
            ..
        }) => left,
        other => probe
            .case
            .fail(&format!("`peek` showed {other:?} while the owner is alive")),
    };
    // Where owners live as long as the store does, it says what it likes.
    if grant.lease.is_some() {
        for left in [left, shown] {
            let plausible = left <= lease && left + PATIENCE >= lease;
            let what = format!("of a lease of {lease:?}, just given, {left:?} were left");
            probe.case.check(plausible, &what);
        }
    }
}

async fn lease_ends<S: Store>(probe: &Probe<'_, S>) {
    let claim = Claim {
        lease: SHORT,
        ..probe.case.claim(IfLost::Refuse)
    };
    let clock = Clock::system();
    let begun = clock.now();
    let grant = probe.granted(&claim).await;
    if grant.lease.is_none() {
        return;
    }
    let status = once(probe, |status| !matches!(status, Some(Status::InFlight { .. }))).await;
    let lasted = clock.now().saturating_since(begun);
    probe
        .case
        .same("the status after a lease ended", &status, &Some(Status::Lost));
    let what = format!("a lease of {SHORT:?} was over after {lasted:?}");
    probe.case.check(lasted + TOLERANCE >= SHORT, &what);
}

async fn retention_ends<S: Store>(probe: &Probe<'_, S>) {
    let owner = probe.first().await;
    let clock = Clock::system();
    let begun = clock.now();
    let completion = probe.complete_for(owner, &kept("head", "body"), SHORT).await;
    probe
        .case
        .same("an owner completes", &completion, &Completion::Completed);
    once(probe, Option::is_none).await;
    let lasted = clock.now().saturating_since(begun);
    let what = format!("an answer kept for {SHORT:?} was absent after {lasted:?}");
    probe.case.check(lasted + TOLERANCE >= SHORT, &what);
    begins_anew(probe).await;
}

/// Clause 4: a key whose lease ran out is lost, not absent, until its retention is over too.
///
/// Checked for leases that were given up and, where there are leases, for one that ran out: other requests are mismatches
/// and nobody gets a first attempt. Then that such a record, its retention being over, is absent, and not before.
pub async fn record_outlives_lease<S: Store>(store: &S) {
    const CLAUSE: &str = "4 (the record outlives its lease)";
    for probe in Probe::both_ways(store, CLAUSE) {
        probe.lost().await;
        stays_lost(&probe).await;
    }
    for probe in Probe::both_ways(store, CLAUSE) {
        let claim = Claim {
            lease: SHORT,
            ..probe.case.claim(IfLost::Refuse)
        };
        if probe.granted(&claim).await.lease.is_some() {
            once(&probe, |status| !matches!(status, Some(Status::InFlight { .. }))).await;
            // As long again, should the record go a little later than its lease.
            tokio::time::sleep(SHORT).await;
            stays_lost(&probe).await;
        }
    }
    lost_until_retention_ends(&Probe::new(store, CLAUSE)).await;
}

async fn stays_lost<S: Store>(probe: &Probe<'_, S>) {
    let case = probe.case;
    case.same(
        "the status of a key whose lease is over",
        &probe.status().await,
        &Some(Status::Lost),
    );
    let other = another_request(&case.claim(IfLost::Execute));
    let what = "a claim of another request for a key whose lease is over";
    case.same(what, &probe.ask(&other).await, &Decision::Mismatch);
    let refusing = case.claim(IfLost::Refuse);
    let what = "a claim that refuses to repeat, for a key whose lease is over";
    case.same(what, &probe.ask(&refusing).await, &Decision::Unknown);
    case.same("the status after it", &probe.status().await, &Some(Status::Unknown));
}

async fn lost_until_retention_ends<S: Store>(probe: &Probe<'_, S>) {
    let retention = SHORT;
    let claim = Claim {
        retention,
        ..probe.case.claim(IfLost::Refuse)
    };
    let owner = probe.granted(&claim).await.owner;
    let clock = Clock::system();
    let begun = clock.now();
    probe.lose(owner).await;
    once(probe, Option::is_none).await;
    let lasted = clock.now().saturating_since(begun);
    let what = format!("a lost record with a retention of {retention:?} was absent after {lasted:?}");
    probe.case.check(lasted + TOLERANCE >= retention, &what);
    begins_anew(probe).await;
}

async fn begins_anew<S: Store>(probe: &Probe<'_, S>) {
    let what = "the first attempt after a record expired";
    let grant = probe.granted(&probe.case.claim(IfLost::Refuse)).await;
    probe.case.same(what, &grant.attempt, &1);
}

/// Looks until the status is what it must become.
async fn once<S: Store>(probe: &Probe<'_, S>, ended: impl Fn(&Option<Status>) -> bool + Send) -> Option<Status> {
    let clock = Clock::system();
    let begun = clock.now();
    loop {
        let status = probe.status().await;
        if ended(&status) {
            return status;
        }
        let waited = clock.now().saturating_since(begun);
        if waited > PATIENCE {
            let what = format!("{waited:?} after a time of {SHORT:?} began, it was not over: {status:?}");
            probe.case.fail(&what);
        }
        tokio::time::sleep(GLANCE).await;
    }
}
