//! A fresh key of a store, and the operations by which a clause is checked.

use std::fmt::Debug;
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;

use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Release, Renewal,
    Resolution, ResolveResult, Snapshot, Status, StorageKey, StoredResponse,
};
use crate::store::Store;

/// A lease that does not end by itself while a clause is checked.
pub(super) const LEASE: Duration = Duration::from_secs(600);
/// A retention that does not end while a clause is checked, but lets a shared store free the
/// records soon.
pub(super) const RETENTION: Duration = Duration::from_secs(3_600);
/// The longest wait for an event that must come. Only a store that breaks the contract takes this
/// long.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The decision about a key in flight, without the time that is left.
pub(super) const WAIT: Decision = Decision::Wait { left: Duration::ZERO };
/// The status of a key in flight, without the time that is left.
pub(super) const IN_FLIGHT: Status = Status::InFlight { left: Duration::ZERO };

/// One key, checked for one clause.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) clause: &'static str,
    pub(super) key: StorageKey,
    fingerprint: Fingerprint,
    /// Whether to claim by `claim_now`, if the store implements it.
    now: bool,
}

/// A case with its store.
#[derive(Debug)]
pub(super) struct Probe<'a, S> {
    pub(super) case: Case,
    pub(super) store: &'a S,
}

impl Case {
    pub(super) fn new(clause: &'static str) -> Self {
        let key = StorageKey::from_bytes(random());
        let fingerprint = Fingerprint::new(Fingerprint::BYTES, random());
        let now = false;
        Self {
            clause,
            key,
            fingerprint,
            now,
        }
    }

    /// Returns the same case, claimed by `claim_now`.
    pub(super) fn using_claim_now(self) -> Self {
        Self { now: true, ..self }
    }

    pub(super) fn at<S>(self, store: &S) -> Probe<'_, S> {
        Probe { case: self, store }
    }

    /// Makes a claim with a new nonce.
    pub(super) fn claim(&self, if_lost: IfLost) -> Claim {
        Claim {
            key: self.key,
            fingerprint: self.fingerprint,
            nonce: Nonce::random(),
            lease: LEASE,
            retention: RETENTION,
            if_lost,
            max_attempts: 100,
        }
    }

    /// Reports that the store breaks the clause.
    #[expect(clippy::panic, reason = "the kit reports to tests, by panicking")]
    pub(super) fn fail(&self, what: &str) -> ! {
        panic!("the store breaks clause {} of its contract: {what}", self.clause)
    }

    pub(super) fn check(&self, holds: bool, what: &str) {
        if !holds {
            self.fail(what);
        }
    }

    pub(super) fn same<T: Debug + PartialEq>(&self, what: &str, seen: &T, wanted: &T) {
        if seen != wanted {
            self.fail(&format!(
                "{what}: got {seen:?}, expected {wanted:?} (both without the lengths of leases)"
            ));
        }
    }

    fn expect_reply<T>(&self, operation: &str, reply: Result<T, Error>) -> T {
        reply.unwrap_or_else(|error| self.fail(&format!("`{operation}` failed: {error:?}")))
    }
}

impl<'a, S: Store> Probe<'a, S> {
    /// Makes a probe of a fresh key.
    pub(super) fn new(store: &'a S, clause: &'static str) -> Self {
        Case::new(clause).at(store)
    }

    /// Makes probes of two fresh keys. One is claimed by `claim`, and one by `claim_now` if the
    /// store implements it.
    pub(super) fn both_ways(store: &'a S, clause: &'static str) -> [Self; 2] {
        [Self::new(store, clause), Case::new(clause).using_claim_now().at(store)]
    }

    pub(super) async fn ask_exactly(&self, claim: &Claim) -> Decision {
        if self.case.now {
            // After an error, the claim has taken no effect, and the layer calls `claim`.
            if let Some(Ok(decision)) = self.store.claim_now(claim) {
                return decision;
            }
        }
        self.case.expect_reply("claim", self.store.claim(claim).await)
    }

    /// Returns the decision about a claim, without values that depend on time.
    pub(super) async fn ask(&self, claim: &Claim) -> Decision {
        timeless(self.ask_exactly(claim).await)
    }

    /// Returns the grant of a claim that the store must grant.
    pub(super) async fn granted(&self, claim: &Claim) -> Grant {
        match self.ask_exactly(claim).await {
            Decision::Execute(grant) | Decision::Recover(grant) => grant,
            other => self.case.fail(&format!("a claim that must be granted got {other:?}")),
        }
    }

    /// Makes a first attempt.
    pub(super) async fn first(&self) -> Owner {
        self.granted(&self.case.claim(IfLost::Refuse)).await.owner
    }

    /// Makes a first attempt that gives up its lease.
    pub(super) async fn lost(&self) -> Owner {
        let owner = self.first().await;
        self.lose(owner).await;
        owner
    }

    /// Makes a first attempt that is lost and that no claim may repeat.
    pub(super) async fn unknown(&self) -> Owner {
        let owner = self.lost().await;
        let decision = self.ask(&self.case.claim(IfLost::Refuse)).await;
        self.case.same(
            "a claim that refuses to repeat a lost attempt",
            &decision,
            &Decision::Unknown,
        );
        owner
    }

    /// Makes a completed attempt.
    pub(super) async fn completed(&self, outcome: &Outcome) -> Owner {
        let owner = self.first().await;
        let completion = self.complete(owner, outcome).await;
        self.case
            .same("an owner completes", &completion, &Completion::Completed);
        owner
    }

    /// Makes an attempt that takes over a lost key.
    pub(super) async fn taken_over(&self) -> Owner {
        self.granted(&self.case.claim(IfLost::Execute)).await.owner
    }

    pub(super) async fn lose(&self, owner: Owner) {
        let renewal = self.renew(owner, Duration::ZERO).await;
        self.case
            .same("an owner gives up its lease", &renewal, &Renewal::Renewed);
    }

    /// Checks that an owner can neither renew its lease nor release its key after `end`.
    pub(super) async fn owns_nothing(&self, owner: Owner, end: &str) {
        let renewal = self.renew(owner, LEASE).await;
        let what = format!("a renewal after {end}");
        self.case.same(&what, &renewal, &Renewal::Superseded);
        let release = self.release(owner).await;
        let what = format!("a release after {end}");
        self.case.same(&what, &release, &Release::Superseded);
    }

    pub(super) async fn renew(&self, owner: Owner, lease: Duration) -> Renewal {
        let reply = self.store.renew(&self.case.key, owner, lease).await;
        self.case.expect_reply("renew", reply)
    }

    pub(super) async fn complete(&self, owner: Owner, outcome: &Outcome) -> Completion {
        self.complete_for(owner, outcome, RETENTION).await
    }

    pub(super) async fn complete_for(&self, owner: Owner, outcome: &Outcome, retention: Duration) -> Completion {
        let reply = self.store.complete(&self.case.key, owner, outcome, retention).await;
        self.case.expect_reply("complete", reply)
    }

    pub(super) async fn release(&self, owner: Owner) -> Release {
        self.case
            .expect_reply("release", self.store.release(&self.case.key, owner).await)
    }

    pub(super) async fn resolve(&self, fence: Fence, resolution: &Resolution) -> ResolveResult {
        let reply = self.store.resolve(&self.case.key, fence, resolution).await;
        self.case.expect_reply("resolve", reply)
    }

    pub(super) async fn look_exactly(&self) -> Option<Snapshot> {
        self.case.expect_reply("peek", self.store.peek(&self.case.key).await)
    }

    /// Returns the view of the record, without values that depend on time.
    pub(super) async fn look(&self) -> Option<Snapshot> {
        timeless_view(self.look_exactly().await)
    }

    pub(super) async fn status(&self) -> Option<Status> {
        self.look().await.map(|snapshot| snapshot.status)
    }

    pub(super) async fn watch(&self) -> S::Watch {
        self.case.expect_reply("watch", self.store.watch(&self.case.key).await)
    }
}

pub(super) fn timeless(decision: Decision) -> Decision {
    match decision {
        Decision::Execute(grant) => Decision::Execute(Grant { lease: None, ..grant }),
        Decision::Recover(grant) => Decision::Recover(Grant { lease: None, ..grant }),
        Decision::Wait { .. } => WAIT,
        other => other,
    }
}

pub(super) fn timeless_view(snapshot: Option<Snapshot>) -> Option<Snapshot> {
    let mut snapshot = snapshot?;
    if let Status::InFlight { left } = &mut snapshot.status {
        *left = Duration::ZERO;
    }
    Some(snapshot)
}

/// Returns the same claim by another request.
pub(super) fn another_request(claim: &Claim) -> Claim {
    Claim {
        fingerprint: Fingerprint::new(Fingerprint::BYTES, random()),
        ..claim.clone()
    }
}

pub(super) fn stored(head: impl Into<Bytes>, body: impl Into<Bytes>) -> Outcome {
    let (head, body) = (head.into(), body.into());
    Outcome::Stored(StoredResponse { head, body })
}

pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}
