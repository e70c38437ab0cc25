//! The life of a record. Every transition is a pure function of the record, the operation and the
//! store's time.

use std::time::Duration;

use super::{
    Claim, Completion, Decision, Fence, Fingerprint, Grant, IfLost, Outcome, Owner, Release, Renewal, Resolution,
    ResolveResult, Snapshot, Status, StoredResponse,
};
use crate::clock::Timestamp;

/// The data that a store stores under one storage key.
///
/// A store that can run Rust next to its data calls the functions of this type within one atomic
/// step. A store that cannot, because its operations are scripts or statements in a server, is
/// tested against them. Each function takes the record, if there is one, and the time by the
/// store's clock. It returns the reply and the change to write.
///
/// ```
/// use std::time::Duration;
/// use tower_idempotency::protocol::{Change, Claim, Decision, Fingerprint, IfLost, Nonce, Record, StorageKey};
/// use tower_idempotency::Timestamp;
///
/// let claim = Claim {
///     key: StorageKey::from_bytes([7; 32]),
///     fingerprint: Fingerprint::of(b"pay 100"),
///     nonce: Nonce::random(),
///     lease: Duration::from_secs(30),
///     retention: Duration::from_secs(86_400),
///     if_lost: IfLost::Refuse,
///     max_attempts: 5,
/// };
/// let first = Record::claim(None, &claim, Timestamp::from_micros(1));
/// assert!(matches!(first.reply, Decision::Execute(grant) if grant.attempt == 1));
///
/// let Change::Put(record) = first.change else { panic!("a granted claim is written") };
/// let other = Claim { nonce: Nonce::random(), ..claim };
/// let second = Record::claim(Some(&record), &other, Timestamp::from_micros(2));
/// assert!(matches!(second.reply, Decision::Wait { .. }));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub(super) fingerprint: Fingerprint,
    pub(super) owner: Owner,
    pub(super) attempt: u32,
    pub(super) kind: GrantKind,
    pub(super) lease: Duration,
    pub(super) retention: Duration,
    pub(super) expires: Timestamp,
    pub(super) state: State,
}

/// Whether the current owner must run the recovery check first. The record stores it, because a
/// repeated claim must get a grant of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GrantKind {
    Execute,
    Recover,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Never [`Outcome::Rejected`], because a completion with that outcome makes the record
    /// unknown.
    Completed(Outcome),
    InFlight {
        until: Timestamp,
    },
    Unknown,
}

/// The reply to an operation and the change to the record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "stores take it apart")]
pub struct Transition<R> {
    /// The reply to the operation.
    pub reply: R,
    /// The change to the stored record. The store makes it in the same atomic step.
    pub change: Change,
}

/// A change to a stored record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores must handle every case")]
pub enum Change {
    /// Leave the record as it is.
    Unchanged,
    /// Write this record in its place.
    Put(Record),
    /// Delete the record.
    Remove,
}

impl<R> Transition<R> {
    const fn leave(reply: R) -> Self {
        Self {
            reply,
            change: Change::Unchanged,
        }
    }

    const fn put(reply: R, record: Record) -> Self {
        Self {
            reply,
            change: Change::Put(record),
        }
    }

    const fn remove(reply: R) -> Self {
        Self {
            reply,
            change: Change::Remove,
        }
    }

    /// Returns the reply if the record does not change.
    #[cfg(any(feature = "postgres", feature = "redis"))]
    pub(crate) fn unchanged(self) -> Option<R> {
        matches!(self.change, Change::Unchanged).then_some(self.reply)
    }
}

impl Record {
    /// Decides a claim.
    #[must_use]
    pub fn claim(record: Option<&Self>, claim: &Claim, now: Timestamp) -> Transition<Decision> {
        Self::claim_above(record, claim, now, Fence::default())
    }

    /// Decides a claim, and grants it with a fence greater than `floor`. For stores that remember
    /// the fences of deleted records (I9).
    pub(crate) fn claim_above(
        record: Option<&Self>,
        claim: &Claim,
        now: Timestamp,
        floor: Fence,
    ) -> Transition<Decision> {
        let Some(record) = Self::live(record, now) else {
            return Self::first(claim, now, floor);
        };
        if record.fingerprint != claim.fingerprint {
            return Transition::leave(Decision::Mismatch);
        }
        match &record.state {
            State::Completed(Outcome::Stored(response)) => Transition::leave(Decision::Replay(response.clone())),
            State::Completed(Outcome::Tombstone) => Transition::leave(Decision::NotStored),
            State::Unknown | State::Completed(Outcome::Rejected) => Transition::leave(Decision::Unknown),
            // The claim is a repeat, because its reply was lost. It gets the same grant again, of
            // the same kind.
            State::InFlight { .. } if record.owner.nonce == claim.nonce => record.clone().granted(claim, now),
            State::InFlight { until } => record.contended(*until, claim, now, floor),
        }
    }

    /// Renews the owner's lease for `lease` from now. Zero gives the lease up: it expires at once,
    /// and the record stays as evidence.
    #[must_use]
    pub fn renew(record: Option<&Self>, owner: Owner, lease: Duration, now: Timestamp) -> Transition<Renewal> {
        match Self::live(record, now) {
            Some(record) if record.owner == owner && record.is_in_flight() => {
                Transition::put(Renewal::Renewed, record.clone().leased(lease, now))
            }
            _ => Transition::leave(Renewal::Superseded),
        }
    }

    /// Completes the record with the owner's outcome, which stays for `retention` from now.
    #[must_use]
    pub fn complete(
        record: Option<&Self>,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
        now: Timestamp,
    ) -> Transition<Completion> {
        let Some(record) = Self::live(record, now) else {
            return Transition::leave(Completion::Superseded(None));
        };
        match &record.state {
            State::Completed(_) if record.owner == owner => Transition::leave(Completion::Completed),
            State::Completed(stands) => Transition::leave(Completion::Superseded(Some(stands.clone()))),
            State::InFlight { .. } | State::Unknown if record.owner == owner => {
                let done = record.clone().completed(outcome.clone(), retention, now);
                Transition::put(Completion::Completed, done)
            }
            State::InFlight { .. } | State::Unknown => Transition::leave(Completion::Superseded(None)),
        }
    }

    /// Releases the key of an owner that ended without an outcome.
    #[must_use]
    pub fn release(record: Option<&Self>, owner: Owner, now: Timestamp) -> Transition<Release> {
        let Some(record) = Self::live(record, now) else {
            return Transition::leave(Release::Released);
        };
        if record.owner != owner || matches!(record.state, State::Completed(_)) {
            return Transition::leave(Release::Superseded);
        }
        // Delete the record only if this was the only attempt ever. Otherwise the record is
        // evidence of an earlier attempt (I6).
        if record.attempt == 1 {
            return Transition::remove(Release::Released);
        }
        if record.is_in_flight() {
            return Transition::put(Release::Released, record.clone().leased(Duration::ZERO, now));
        }
        Transition::leave(Release::Released)
    }

    /// Decides a resolution by an operator or a hook that knows the fate of a lost attempt. A
    /// record that the resolution completes has no owner any more.
    #[must_use]
    pub fn resolve(
        record: Option<&Self>,
        fence: Fence,
        resolution: &Resolution,
        now: Timestamp,
    ) -> Transition<ResolveResult> {
        let Some(record) = Self::live(record, now) else {
            return Transition::leave(ResolveResult::Conflict(None));
        };
        let owner_may_live = matches!(record.status(now), Status::InFlight { .. } | Status::Completed(_));
        if record.owner.fence != fence || owner_may_live {
            return Transition::leave(ResolveResult::Conflict(Some(record.owner.fence)));
        }
        match resolution {
            Resolution::Absent => Transition::remove(ResolveResult::Resolved),
            Resolution::Completed(outcome, retention) => {
                let mut done = record.clone().completed(outcome.clone(), *retention, now);
                // The owner may still be alive, and its own outcome may differ. If it stayed the
                // owner, its completion would count as a repeat, and its caller would get another
                // response than all other callers (I2). A rejection stores no outcome, so it
                // leaves the owner in place. Only a completion inverts the nonce, because a second
                // inversion would restore the former owner.
                if done.is_completed() {
                    done.owner.nonce = record.owner.nonce.disowned();
                }
                Transition::put(ResolveResult::Resolved, done)
            }
        }
    }

    /// Returns a snapshot of the record. `None` if there is no record, or if it has expired.
    #[must_use]
    pub fn peek(record: Option<&Self>, now: Timestamp) -> Option<Snapshot> {
        let record = Self::live(record, now)?;
        Some(Snapshot {
            fingerprint: record.fingerprint,
            nonce: record.owner.nonce,
            fence: record.owner.fence,
            attempt: record.attempt,
            status: record.status(now),
        })
    }

    /// Returns the time after which a store may delete the record.
    #[must_use]
    pub const fn expires_at(&self) -> Timestamp {
        self.expires
    }

    /// Returns whether a store may delete the record. A live lease outlasts any retention.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        let leased = matches!(self.state, State::InFlight { until } if now < self.until_at_most(until, now));
        now >= self.expires && !leased
    }

    /// Returns the stored response, if there is one.
    #[must_use]
    pub const fn response(&self) -> Option<&StoredResponse> {
        match &self.state {
            State::Completed(Outcome::Stored(response)) => Some(response),
            _ => None,
        }
    }

    /// Returns the same record without its response, for stores that are over their budget.
    #[must_use]
    pub fn into_tombstone(mut self) -> Self {
        if let State::Completed(outcome) = &mut self.state {
            *outcome = Outcome::Tombstone;
        }
        self
    }

    /// Returns the fence of the current or last attempt.
    pub(crate) const fn fence(&self) -> Fence {
        self.owner.fence
    }

    /// Returns whether the record is completed.
    #[must_use]
    pub const fn is_completed(&self) -> bool {
        matches!(self.state, State::Completed(_))
    }

    /// Returns whether the key has an owner that has neither ended nor been given up as unknown.
    /// The lease may have expired.
    pub(crate) const fn is_in_flight(&self) -> bool {
        matches!(self.state, State::InFlight { .. })
    }

    fn live(record: Option<&Self>, now: Timestamp) -> Option<&Self> {
        record.filter(|record| !record.is_expired(now))
    }

    fn first(claim: &Claim, now: Timestamp, floor: Fence) -> Transition<Decision> {
        let record = Self {
            fingerprint: claim.fingerprint,
            owner: Owner {
                nonce: claim.nonce,
                fence: floor.next(now),
            },
            attempt: 1,
            kind: GrantKind::Execute,
            lease: claim.lease,
            retention: claim.retention,
            expires: now,
            state: State::Unknown,
        };
        record.granted(claim, now)
    }

    /// Decides a claim on a key that another owner holds, or held until its lease expired.
    fn contended(&self, until: Timestamp, claim: &Claim, now: Timestamp, floor: Fence) -> Transition<Decision> {
        let until_at_most = self.until_at_most(until, now);
        if now < until_at_most {
            let left = until_at_most.saturating_since(now);
            if until_at_most == until {
                return Transition::leave(Decision::Wait { left });
            }
            // The clock went backwards. Cut the lease back, so that nobody waits longer than one
            // lease for the clock to catch up.
            let mut cut = self.clone();
            cut.state = State::InFlight { until: until_at_most };
            return Transition::put(Decision::Wait { left }, cut);
        }
        let kind = match claim.if_lost {
            IfLost::Execute => GrantKind::Execute,
            IfLost::Recover => GrantKind::Recover,
            IfLost::Refuse => return self.unknown(),
        };
        if self.attempt >= claim.max_attempts {
            return self.unknown();
        }
        let taken_over = Self {
            owner: Owner {
                nonce: claim.nonce,
                fence: self.owner.fence.max(floor).next(now),
            },
            attempt: self.attempt.saturating_add(1),
            kind,
            ..self.clone()
        };
        taken_over.granted(claim, now)
    }

    fn unknown(&self) -> Transition<Decision> {
        let mut unknown = self.clone();
        unknown.state = State::Unknown;
        Transition::put(Decision::Unknown, unknown)
    }

    /// Returns the reply to a claim that has changed the record into this one.
    #[cfg(feature = "postgres")]
    pub(crate) fn decision(&self, claim: &Claim, now: Timestamp) -> Decision {
        match &self.state {
            State::InFlight { .. } if self.owner.nonce == claim.nonce => self.clone().granted(claim, now).reply,
            State::InFlight { until } => Decision::Wait {
                left: until.saturating_since(now),
            },
            State::Unknown | State::Completed(_) => Decision::Unknown,
        }
    }

    fn granted(mut self, claim: &Claim, now: Timestamp) -> Transition<Decision> {
        let grant = Grant {
            owner: self.owner,
            attempt: self.attempt,
            lease: Some(claim.lease),
        };
        let reply = match self.kind {
            GrantKind::Execute => Decision::Execute(grant),
            GrantKind::Recover => Decision::Recover(grant),
        };
        self.retention = claim.retention;
        Transition::put(reply, self.leased(claim.lease, now))
    }

    /// Starts a lease. The record outlives its lease by its retention in every state, because a
    /// crash must not make the key absent (I6).
    fn leased(mut self, lease: Duration, now: Timestamp) -> Self {
        let until = now.saturating_add(lease);
        self.lease = lease;
        self.expires = until.saturating_add(self.retention);
        self.state = State::InFlight { until };
        self
    }

    fn completed(mut self, outcome: Outcome, retention: Duration, now: Timestamp) -> Self {
        self.expires = now.saturating_add(retention);
        self.state = match outcome {
            // An operator can resolve an unknown record, but not a completed one.
            Outcome::Rejected => State::Unknown,
            outcome => State::Completed(outcome),
        };
        self
    }

    /// Returns the end of the lease, at most one lease from now.
    fn until_at_most(&self, until: Timestamp, now: Timestamp) -> Timestamp {
        until.min(now.saturating_add(self.lease))
    }

    fn status(&self, now: Timestamp) -> Status {
        match &self.state {
            State::Completed(outcome) => Status::Completed(outcome.clone()),
            State::Unknown => Status::Unknown,
            State::InFlight { until } => match self.until_at_most(*until, now).saturating_since(now) {
                Duration::ZERO => Status::Lost,
                left => Status::InFlight { left },
            },
        }
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(in crate::protocol) mod tests;
