//! Clauses about time: 2 and 4. Only these wait.

use std::time::Duration;

use super::probe::{LEASE, LONGEST_WAIT, Probe, another_request, stored};
use crate::clock::Clock;
use crate::protocol::{Claim, Completion, Decision, Grant, IfLost, Renewal, Snapshot, Status};
use crate::store::Store;

/// A lease or a retention short enough to wait for its end.
const SHORT: Duration = Duration::from_millis(300);
/// How much less than [`SHORT`] may have passed by the clock of this process, which is not the
/// store's clock.
const TOLERANCE: Duration = Duration::from_millis(75);
/// The pause between two looks at a record whose time must end.
const GLANCE: Duration = Duration::from_millis(20);

/// Clause 2: only the store's clock decides about leases and expiry, never the caller's clock.
///
/// A test can see the following from outside. After a claim and after a renewal, the time left of a
/// long lease is at most that lease, and shorter by at most ten seconds. A short lease and a short
/// retention end, and not early. A store that uses the caller's clock fails only if the clocks of
/// its callers differ. So a test of a shared store should run this on several machines, or with the
/// clock of one of them shifted.
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
    // If owners live as long as the store, the time left has no meaning.
    if grant.lease.is_some() {
        for left in [left, shown] {
            let plausible = left <= lease && left + LONGEST_WAIT >= lease;
            let what = format!("{left:?} were left of a lease of {lease:?} that was just granted");
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
    let completion = probe.complete_for(owner, &stored("head", "body"), SHORT).await;
    probe
        .case
        .same("an owner completes", &completion, &Completion::Completed);
    once(probe, Option::is_none).await;
    let lasted = clock.now().saturating_since(begun);
    let what = format!("a response stored for {SHORT:?} was absent after {lasted:?}");
    probe.case.check(lasted + TOLERANCE >= SHORT, &what);
    begins_anew(probe).await;
}

/// Clause 4: a key whose lease ran out is lost, not absent, until its retention is over too.
///
/// Checks leases that were given up, and one that ran out if the store has leases. Claims of other
/// requests must be mismatches, and no claim may get a first attempt. Checks that such a record is
/// absent after its retention, and not before.
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
            // Wait as long again, in case the record disappears a little later than its lease.
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

/// Looks at the status until `ended` accepts it.
async fn once<S: Store>(probe: &Probe<'_, S>, ended: impl Fn(&Option<Status>) -> bool + Send) -> Option<Status> {
    let clock = Clock::system();
    let begun = clock.now();
    loop {
        let status = probe.status().await;
        if ended(&status) {
            return status;
        }
        let waited = clock.now().saturating_since(begun);
        if waited > LONGEST_WAIT {
            let what = format!("a time of {SHORT:?} was not over after {waited:?}: {status:?}");
            probe.case.fail(&what);
        }
        tokio::time::sleep(GLANCE).await;
    }
}
