//! Tests of each rule of the protocol, and of the invariants over random histories.

use proptest::prelude::*;

use super::*;
use crate::protocol::{Nonce, StorageKey};

const LEASE: Duration = Duration::from_secs(30);
const RETENTION: Duration = Duration::from_secs(3_600);
const START: Timestamp = Timestamp::from_micros(1_000_000_000);

pub(in crate::protocol) fn claim(nonce: u8) -> Claim {
    Claim {
        key: StorageKey::from_bytes([1; 32]),
        fingerprint: Fingerprint::of(b"pay 100"),
        nonce: Nonce::from_bytes([nonce; 16]),
        lease: LEASE,
        retention: RETENTION,
        if_lost: IfLost::Refuse,
        max_attempts: 3,
    }
}

fn claim_or(nonce: u8, if_lost: IfLost) -> Claim {
    Claim {
        if_lost,
        ..claim(nonce)
    }
}

fn stored(body: &'static str) -> Outcome {
    Outcome::Stored(StoredResponse {
        head: "head".into(),
        body: body.into(),
    })
}

/// A store of a single record, with a clock.
struct One {
    record: Option<Record>,
    now: Timestamp,
}

impl One {
    fn new() -> Self {
        Self {
            record: None,
            now: START,
        }
    }

    fn apply<R>(&mut self, transition: Transition<R>) -> R {
        match transition.change {
            Change::Unchanged => {}
            Change::Put(record) => self.record = Some(record),
            Change::Remove => self.record = None,
        }
        transition.reply
    }

    fn claim(&mut self, claim: &Claim) -> Decision {
        self.apply(Record::claim(self.record.as_ref(), claim, self.now))
    }

    fn granted(&mut self, claim: &Claim) -> Grant {
        match self.claim(claim) {
            Decision::Execute(grant) | Decision::Recover(grant) => grant,
            other => panic!("no grant: {other:?}"),
        }
    }

    fn renew(&mut self, owner: Owner, lease: Duration) -> Renewal {
        self.apply(Record::renew(self.record.as_ref(), owner, lease, self.now))
    }

    fn complete(&mut self, owner: Owner, outcome: &Outcome) -> Completion {
        self.apply(Record::complete(
            self.record.as_ref(),
            owner,
            outcome,
            RETENTION,
            self.now,
        ))
    }

    fn release(&mut self, owner: Owner) -> Release {
        self.apply(Record::release(self.record.as_ref(), owner, self.now))
    }

    fn resolve(&mut self, fence: Fence, resolution: &Resolution) -> ResolveResult {
        self.apply(Record::resolve(self.record.as_ref(), fence, resolution, self.now))
    }

    fn status(&self) -> Option<Status> {
        Record::peek(self.record.as_ref(), self.now).map(|snapshot| snapshot.status)
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now.saturating_add(time);
    }
}

#[test]
fn a_record_tells_its_fence_its_expiry_and_whether_it_is_completed() {
    let mut store = One::new();
    let owner = store.granted(&claim(1)).owner;
    let in_flight = store.record.clone().unwrap();
    assert_eq!(in_flight.fence(), owner.fence);
    assert_eq!(in_flight.expires_at(), START.saturating_add(LEASE + RETENTION));
    assert!(!in_flight.is_completed());
    store.complete(owner, &Outcome::Tombstone);
    assert!(store.record.unwrap().is_completed());
}

#[cfg(any(feature = "postgres", feature = "redis"))]
#[test]
fn only_a_transition_without_a_change_returns_its_reply_as_unchanged() {
    let first = Record::claim(None, &claim(1), START);
    assert_eq!(first.clone().unchanged(), None);
    let Change::Put(record) = first.change else { panic!() };
    let second = Record::claim(Some(&record), &claim(2), START);
    assert_eq!(second.unchanged(), Some(Decision::Wait { left: LEASE }));
}

/// PostgreSQL returns the record that a claim left, and the reply follows from that record alone.
#[cfg(feature = "postgres")]
#[test]
fn the_reply_to_a_claim_follows_from_the_record_that_it_wrote() {
    for if_lost in [IfLost::Execute, IfLost::Recover, IfLost::Refuse] {
        let mut store = One::new();
        for (nonce, pause) in [(1, 0), (2, 1), (2, 40), (2, 5), (3, 10), (3, 60), (4, 60), (5, 60)] {
            store.now = store.now.saturating_add(Duration::from_secs(pause));
            let claim = claim_or(nonce, if_lost);
            let reply = store.claim(&claim);
            assert_eq!(store.record.as_ref().unwrap().decision(&claim, store.now), reply);
        }
    }
}

#[test]
fn an_absent_key_is_granted_once_and_then_waited_for() {
    let mut store = One::new();
    assert_eq!(store.granted(&claim(1)).attempt, 1);
    store.pass(Duration::from_secs(10));
    assert_eq!(
        store.claim(&claim(2)),
        Decision::Wait {
            left: Duration::from_secs(20)
        }
    );
}

#[test]
fn a_lease_is_not_the_records_expiry() {
    let mut store = One::new();
    store.granted(&claim(1));
    store.pass(LEASE);
    assert_eq!(store.status(), Some(Status::Lost));
    assert_eq!(store.claim(&claim(2)), Decision::Unknown);
    let other_body = Claim {
        fingerprint: Fingerprint::of(b"pay 999"),
        ..claim(3)
    };
    assert_eq!(store.claim(&other_body), Decision::Mismatch);
    store.pass(RETENTION);
    assert_eq!(store.status(), None);
    assert_eq!(store.granted(&other_body).attempt, 1);
}

#[test]
fn another_fingerprint_is_a_mismatch_in_every_state() {
    let other = Claim {
        fingerprint: Fingerprint::NONE,
        ..claim(9)
    };
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    assert_eq!(store.claim(&other), Decision::Mismatch);
    store.pass(LEASE);
    assert_eq!(store.claim(&other), Decision::Mismatch);
    assert_eq!(store.claim(&claim(2)), Decision::Unknown);
    assert_eq!(store.claim(&other), Decision::Mismatch);
    assert_eq!(store.complete(grant.owner, &stored("a")), Completion::Completed);
    assert_eq!(store.claim(&other), Decision::Mismatch);
}

#[test]
fn a_completed_key_replays_until_its_retention_is_over() {
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    store.complete(grant.owner, &stored("a"));
    store.pass(RETENTION - Duration::from_micros(1));
    assert!(matches!(store.claim(&claim(2)), Decision::Replay(response) if response.body == "a"));
    store.pass(Duration::from_micros(1));
    assert_eq!(store.granted(&claim(3)).attempt, 1);
}

#[test]
fn a_tombstone_reports_that_the_request_was_done() {
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    store.complete(grant.owner, &Outcome::Tombstone);
    assert_eq!(store.claim(&claim(2)), Decision::NotStored);
}

#[test]
fn a_repeated_claim_gets_the_same_grant_of_the_same_kind() {
    let mut store = One::new();
    let first = store.claim(&claim(1));
    store.pass(Duration::from_secs(1));
    assert_eq!(store.claim(&claim(1)), first);
    store.pass(LEASE);
    let recover = claim_or(2, IfLost::Recover);
    let taken = store.claim(&recover);
    assert!(matches!(taken, Decision::Recover(grant) if grant.attempt == 2));
    assert_eq!(store.claim(&recover), taken);
}

#[test]
fn a_lost_key_is_taken_over_with_a_higher_fence_and_the_old_owner_changes_nothing() {
    let mut store = One::new();
    let old = store.granted(&claim(1));
    store.pass(LEASE);
    let new = store.granted(&claim_or(2, IfLost::Execute));
    assert!(new.owner.fence > old.owner.fence);
    assert_eq!(store.renew(old.owner, LEASE), Renewal::Superseded);
    assert_eq!(store.complete(old.owner, &stored("old")), Completion::Superseded(None));
    assert_eq!(store.release(old.owner), Release::Superseded);
    assert_eq!(store.complete(new.owner, &stored("new")), Completion::Completed);
    assert_eq!(
        store.complete(old.owner, &stored("old")),
        Completion::Superseded(Some(stored("new")))
    );
}

/// The process that took the key over may have been configured anew.
#[test]
fn a_lost_record_lives_as_long_as_its_last_owner_asked() {
    const MICROSECOND: Duration = Duration::from_micros(1);
    let mut store = One::new();
    store.granted(&claim(1));
    store.pass(LEASE);
    let longer = Claim {
        retention: 3 * RETENTION,
        ..claim_or(2, IfLost::Execute)
    };
    store.granted(&longer);
    store.pass(LEASE + longer.retention - MICROSECOND);
    assert_eq!(store.status(), Some(Status::Lost));
    store.pass(MICROSECOND);
    assert_eq!(store.status(), None);
}

#[test]
fn the_fence_grows_even_when_the_clock_stands() {
    let mut store = One::new();
    let mut last = store.granted(&claim(1)).owner;
    for nonce in 2..4 {
        store.renew(last, Duration::ZERO);
        let next = store.granted(&claim_or(nonce, IfLost::Execute)).owner;
        assert!(next.fence > last.fence);
        last = next;
    }
}

#[test]
fn attempts_are_capped() {
    let mut store = One::new();
    store.granted(&claim(1));
    for nonce in 2..=3 {
        store.pass(LEASE);
        store.granted(&claim_or(nonce, IfLost::Execute));
    }
    store.pass(LEASE);
    assert_eq!(store.claim(&claim_or(4, IfLost::Execute)), Decision::Unknown);
    assert_eq!(store.claim(&claim_or(5, IfLost::Execute)), Decision::Unknown);
}

#[test]
fn an_unknown_outcome_is_healed_by_the_same_owner_late() {
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    store.pass(LEASE);
    assert_eq!(store.claim(&claim(2)), Decision::Unknown);
    assert_eq!(store.renew(grant.owner, LEASE), Renewal::Superseded);
    assert_eq!(store.complete(grant.owner, &stored("late")), Completion::Completed);
    assert!(matches!(store.claim(&claim(3)), Decision::Replay(_)));
}

#[test]
fn a_repeated_completion_is_fine_and_changes_nothing() {
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    store.complete(grant.owner, &stored("a"));
    assert_eq!(store.complete(grant.owner, &stored("b")), Completion::Completed);
    assert!(matches!(store.claim(&claim(2)), Decision::Replay(response) if response.body == "a"));
    assert_eq!(store.release(grant.owner), Release::Superseded);
    assert_eq!(store.renew(grant.owner, LEASE), Renewal::Superseded);
}

#[test]
fn release_deletes_only_when_nobody_else_ever_held_the_key() {
    let mut store = One::new();
    let only = store.granted(&claim(1));
    assert_eq!(store.release(only.owner), Release::Released);
    assert_eq!(store.status(), None);
    assert_eq!(store.release(only.owner), Release::Released);

    store.granted(&claim(2));
    store.pass(LEASE);
    let second = store.granted(&claim_or(3, IfLost::Execute));
    assert_eq!(store.release(second.owner), Release::Released);
    assert_eq!(store.status(), Some(Status::Lost));
    assert_eq!(store.claim(&claim(4)), Decision::Unknown);
}

#[test]
fn a_lease_given_up_is_over_at_once_and_its_evidence_stays() {
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    assert_eq!(store.renew(grant.owner, Duration::ZERO), Renewal::Renewed);
    assert_eq!(store.status(), Some(Status::Lost));
    assert_eq!(store.claim(&claim(2)), Decision::Unknown);
}

#[test]
fn a_clock_that_goes_back_holds_nobody_longer_than_a_lease() {
    let mut store = One::new();
    store.pass(Duration::from_secs(3_600));
    store.granted(&claim(1));
    store.now = START;
    assert_eq!(store.claim(&claim(2)), Decision::Wait { left: LEASE });
    store.pass(LEASE);
    assert_eq!(store.claim(&claim(2)), Decision::Unknown);
}

#[test]
fn a_renewed_lease_keeps_a_record_past_its_first_expiry() {
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    for _ in 0..500 {
        store.pass(Duration::from_secs(10));
        assert_eq!(store.renew(grant.owner, LEASE), Renewal::Renewed);
    }
    assert!(matches!(store.claim(&claim(2)), Decision::Wait { .. }));
    store.pass(LEASE + RETENTION - Duration::from_secs(1));
    assert_eq!(store.claim(&claim(2)), Decision::Unknown);
}

#[test]
fn an_operator_resolves_only_what_is_lost_and_only_the_attempt_that_was_looked_at() {
    let mut store = One::new();
    let grant = store.granted(&claim(1));
    let done = Resolution::Completed(stored("found"), RETENTION);
    assert_eq!(
        store.resolve(grant.owner.fence, &done),
        ResolveResult::Conflict(Some(grant.owner.fence))
    );
    store.pass(LEASE);
    assert_eq!(
        store.resolve(Fence::new(1), &done),
        ResolveResult::Conflict(Some(grant.owner.fence))
    );
    assert_eq!(store.resolve(grant.owner.fence, &done), ResolveResult::Resolved);
    assert!(matches!(store.claim(&claim(2)), Decision::Replay(response) if response.body == "found"));

    let mut store = One::new();
    let grant = store.granted(&claim(1));
    store.pass(LEASE);
    assert_eq!(store.claim(&claim(2)), Decision::Unknown);
    assert_eq!(
        store.resolve(grant.owner.fence, &Resolution::Absent),
        ResolveResult::Resolved
    );
    assert_eq!(
        store.resolve(grant.owner.fence, &Resolution::Absent),
        ResolveResult::Conflict(None)
    );
    assert_eq!(store.granted(&claim(3)).attempt, 1);
}

/// Each resolution inverted the nonce, so a second one made the previous owner the owner again. The
/// late completion of that owner then counted as a repeat.
#[test]
fn an_owner_that_comes_back_after_two_resolutions_gets_the_outcome_that_stands() {
    let mut store = One::new();
    let owner = store.granted(&claim(1)).owner;
    store.pass(LEASE);
    let rejected = Resolution::Completed(Outcome::Rejected, RETENTION);
    let found = Resolution::Completed(stored("found"), RETENTION);
    assert_eq!(store.resolve(owner.fence, &rejected), ResolveResult::Resolved);
    assert_eq!(store.resolve(owner.fence, &found), ResolveResult::Resolved);
    let stands = Completion::Superseded(Some(stored("found")));
    assert_eq!(store.complete(owner, &stored("late")), stands);
}

#[test]
fn an_owner_that_comes_back_after_a_resolution_gets_the_outcome_that_stands() {
    for is_unknown in [true, false] {
        let mut store = One::new();
        let owner = store.granted(&claim(1)).owner;
        store.pass(LEASE);
        if is_unknown {
            assert_eq!(store.claim(&claim(2)), Decision::Unknown);
        }
        let found = Resolution::Completed(stored("found"), RETENTION);
        assert_eq!(store.resolve(owner.fence, &found), ResolveResult::Resolved);
        let stands = Completion::Superseded(Some(stored("found")));
        assert_eq!(store.complete(owner, &stored("late")), stands);
        assert_eq!(store.renew(owner, LEASE), Renewal::Superseded);
        assert_eq!(store.release(owner), Release::Superseded);
        // The same claim is repeated, for example because the client never got the reply.
        assert!(matches!(store.claim(&claim(1)), Decision::Replay(response) if response.body == "found"));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Claim(u8, IfLost, bool),
    Complete(u8),
    Pass(u32),
    Release(u8),
    Renew(u8, u32),
    Resolve(u8),
}

fn a_step() -> impl Strategy<Value = Step> {
    let if_lost = prop_oneof![Just(IfLost::Execute), Just(IfLost::Recover), Just(IfLost::Refuse)];
    prop_oneof![
        (0_u8..5, if_lost, prop::bool::weighted(0.9)).prop_map(|(n, lost, same)| Step::Claim(n, lost, same)),
        (0_u8..5).prop_map(Step::Complete),
        (0_u32..70).prop_map(Step::Pass),
        (0_u8..5).prop_map(Step::Release),
        (0_u8..5, 0_u32..40).prop_map(|(n, lease)| Step::Renew(n, lease)),
        (0_u8..5).prop_map(Step::Resolve),
    ]
}

/// Checks the invariants that hold in any history within one retention.
#[derive(Default)]
struct Ledger {
    owners: std::collections::HashMap<u8, Owner>,
    last_fence: Fence,
    responses: Vec<StoredResponse>,
    seen_grant: bool,
}

impl Ledger {
    fn see_outcome(&mut self, outcome: &Outcome) -> Result<(), TestCaseError> {
        match outcome {
            Outcome::Stored(response) => self.see_response(response),
            Outcome::Rejected | Outcome::Tombstone => Ok(()),
        }
    }

    fn see_response(&mut self, response: &StoredResponse) -> Result<(), TestCaseError> {
        let is_only_one = self.responses.iter().all(|seen| seen == response);
        prop_assert!(is_only_one, "two responses under one key");
        self.responses.push(response.clone());
        Ok(())
    }

    fn see(&mut self, nonce: u8, decision: &Decision, same_body: bool) -> Result<(), TestCaseError> {
        match decision {
            Decision::Execute(grant) | Decision::Recover(grant) => {
                prop_assert!(self.responses.is_empty(), "ran again after a response was seen");
                prop_assert!(grant.owner.fence >= self.last_fence, "the fence fell");
                let repeated = self.owners.get(&nonce) == Some(&grant.owner);
                prop_assert!(
                    repeated || grant.owner.fence > self.last_fence,
                    "two owners with one fence"
                );
                self.last_fence = grant.owner.fence;
                self.owners.insert(nonce, grant.owner);
                self.seen_grant = true;
            }
            Decision::Replay(response) => {
                prop_assert!(same_body, "a response for another body");
                self.see_response(response)?;
            }
            Decision::Mismatch => prop_assert!(self.seen_grant),
            Decision::NotStored | Decision::Unknown | Decision::Wait { .. } => {}
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn invariants_hold_over_random_histories(steps in prop::collection::vec(a_step(), 1..60)) {
        let mut store = One::new();
        let mut ledger = Ledger::default();
        for step in steps {
            match step {
                Step::Claim(nonce, lost, same_body) => {
                    let mut claim = Claim { retention: Duration::from_secs(1_000_000), ..claim_or(nonce, lost) };
                    if !same_body {
                        claim.fingerprint = Fingerprint::of(b"other");
                    }
                    let first_ever = !ledger.seen_grant;
                    let decision = store.claim(&claim);
                    if same_body || !first_ever {
                        ledger.see(nonce, &decision, same_body)?;
                    } else {
                        // The other body came first, so start again. Otherwise `same_body` would
                        // mean the other body.
                        store.record = None;
                        store.pass(Duration::from_micros(1));
                    }
                }
                Step::Complete(nonce) => {
                    if let Some(owner) = ledger.owners.get(&nonce) {
                        let body = format!("response {nonce}");
                        let outcome = Outcome::Stored(StoredResponse { head: "h".into(), body: body.into() });
                        let retention = Duration::from_secs(1_000_000);
                        let done = Record::complete(store.record.as_ref(), *owner, &outcome, retention, store.now);
                        // The owner's caller gets the owner's response, or the recorded one.
                        match store.apply(done) {
                            Completion::Completed => ledger.see_outcome(&outcome)?,
                            Completion::Superseded(Some(stands)) => ledger.see_outcome(&stands)?,
                            Completion::Superseded(None) => {}
                        }
                    }
                }
                Step::Pass(seconds) => store.pass(Duration::from_secs(seconds.into())),
                Step::Release(nonce) => {
                    if let Some(owner) = ledger.owners.get(&nonce).copied() {
                        let before = store.record.clone();
                        if store.release(owner) == Release::Released && store.record.is_none() && before.is_some() {
                            prop_assert_eq!(before.unwrap().attempt, 1, "evidence of an earlier attempt was erased");
                            ledger = Ledger { last_fence: ledger.last_fence, ..Ledger::default() };
                            store.pass(Duration::from_micros(1));
                        }
                    }
                }
                Step::Resolve(nonce) => {
                    if let Some(owner) = ledger.owners.get(&nonce).copied() {
                        let found = Resolution::Completed(stored("found"), Duration::from_secs(1_000_000));
                        store.resolve(owner.fence, &found);
                    }
                }
                Step::Renew(nonce, lease) => {
                    if let Some(owner) = ledger.owners.get(&nonce).copied() {
                        store.renew(owner, Duration::from_secs(lease.into()));
                    }
                }
            }
        }
    }
}
