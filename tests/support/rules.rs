//! The life of a record, stated a second time and independently of the crate.
//!
//! The model checker in `model/` includes this file, and explores it with processes, a network and
//! a clock. `tests/stores/rules.rs` compares each of its transitions with the real record and the
//! real stores. So the two cannot drift apart.

/// A time or a duration by the clock of the store. A tick is 16 units, so that a fence can grow 15
/// times while the clock stands still.
pub type Time = u16;
pub const TICK: Time = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    /// The number of the claimant. The bitwise complement stands for a nonce that no claimant has.
    pub nonce: i8,
    pub fence: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Record {
    pub fingerprint: u8,
    pub owner: Owner,
    pub attempt: u8,
    pub recover: bool,
    pub lease: Time,
    pub retention: Time,
    pub expires: Time,
    pub state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    InFlight { until: Time },
    Unknown,
    Tombstone,
    Stored(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    Rejected,
    Tombstone,
    Stored(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IfLost {
    Execute,
    Recover,
    Refuse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Claim {
    pub fingerprint: u8,
    pub nonce: i8,
    pub lease: Time,
    pub retention: Time,
    pub if_lost: IfLost,
    pub max_attempts: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    Claim(Claim),
    Renew(Owner, Time),
    Complete(Owner, Outcome, Time),
    Release(Owner),
    /// The fence that the operator saw, and the outcome with its retention. `None` if the attempt
    /// had no effect.
    Resolve(Time, Option<(Outcome, Time)>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Grant {
    pub owner: Owner,
    pub attempt: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reply {
    Execute(Grant),
    Recover(Grant),
    Replay(u8),
    NotStored,
    Mismatch,
    Unknown,
    Wait(Time),
    Renewed,
    Completed,
    Released,
    Resolved,
    /// Another owner holds or completed the key. A completion learns the outcome that stands.
    Superseded(Option<Outcome>),
    Conflict(Option<Time>),
}

/// A rule that the model can leave out, to show that the rule is necessary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    // Rules of a record, which this file obeys.
    AttemptsAreCapped,
    CompleteByOwner,
    FenceGrows,
    FingerprintFirst,
    LeaseIsCutBack,
    LeaseIsNotExpiry,
    LostIsUnknown,
    ReleaseByOwner,
    ReleaseLeavesEvidence,
    RenewByOwner,
    RepeatedClaimIsSameGrant,
    RepeatedClaimIsSameKind,
    ResolveComparesFence,
    ResolveEndsOwnership,
    ResolveSparesTheLiving,
    // Rules of the processes and of the store around its records, which `model/` obeys.
    CheckRaisesFence,
    ClaimIsAtomic,
    ClaimIsReplicated,
    ClaimOfTheGoneEnds,
    HangUpChangesNothing,
    OneClock,
    RetentionIsLong,
    StoredBeforeSeen,
    SupersededDiscards,
    UnreadableIsNotAbsent,
    WaiterClaimsAgain,
}

impl Rule {
    pub const ALL: [Self; 26] = [
        Self::AttemptsAreCapped,
        Self::CompleteByOwner,
        Self::FenceGrows,
        Self::FingerprintFirst,
        Self::LeaseIsCutBack,
        Self::LeaseIsNotExpiry,
        Self::LostIsUnknown,
        Self::ReleaseByOwner,
        Self::ReleaseLeavesEvidence,
        Self::RenewByOwner,
        Self::RepeatedClaimIsSameGrant,
        Self::RepeatedClaimIsSameKind,
        Self::ResolveComparesFence,
        Self::ResolveEndsOwnership,
        Self::ResolveSparesTheLiving,
        Self::CheckRaisesFence,
        Self::ClaimIsAtomic,
        Self::ClaimIsReplicated,
        Self::ClaimOfTheGoneEnds,
        Self::HangUpChangesNothing,
        Self::OneClock,
        Self::RetentionIsLong,
        Self::StoredBeforeSeen,
        Self::SupersededDiscards,
        Self::UnreadableIsNotAbsent,
        Self::WaiterClaimsAgain,
    ];
}

/// One atomic step: the reply, and the record after it.
///
/// `floor` is the highest fence that the store remembers of deleted records. `without` leaves out a
/// rule.
pub fn step(
    record: Option<Record>,
    operation: Operation,
    now: Time,
    floor: Time,
    without: Option<Rule>,
) -> (Reply, Option<Record>) {
    let live = record.filter(|record| !record.is_expired(now, without));
    let (reply, change) = match operation {
        Operation::Claim(claim) => claimed(live, claim, now, floor, without),
        Operation::Renew(owner, lease) => renewed(live, owner, lease, now, without),
        Operation::Complete(owner, outcome, retention) => completed(live, owner, outcome, now + retention, without),
        Operation::Release(owner) => released(live, owner, now, without),
        Operation::Resolve(fence, found) => resolved(live, fence, found, now, without),
    };
    match change {
        Change::None => (reply, record),
        Change::Put(record) => (reply, Some(record)),
        Change::Remove => (reply, None),
    }
}

enum Change {
    None,
    Put(Record),
    Remove,
}

impl Record {
    /// The end of the lease. It is never further away than one lease, even if the clock went
    /// backwards.
    fn lease_end(&self, until: Time, now: Time) -> Time {
        until.min(now + self.lease)
    }

    /// Whether an owner has a lease that lasts.
    pub fn is_leased(&self, now: Time) -> bool {
        matches!(self.state, State::InFlight { until } if now < self.lease_end(until, now))
    }

    pub fn is_expired(&self, now: Time, without: Option<Rule>) -> bool {
        let lease_is_expiry = without == Some(Rule::LeaseIsNotExpiry) && matches!(self.state, State::InFlight { .. });
        !self.is_leased(now) && (now >= self.expires || lease_is_expiry)
    }

    pub fn is_completed(&self) -> bool {
        matches!(self.state, State::Tombstone | State::Stored(_))
    }

    fn leased(self, lease: Time, now: Time) -> Self {
        let until = now + lease;
        Self {
            lease,
            expires: until + self.retention,
            state: State::InFlight { until },
            ..self
        }
    }

    fn granted(self, claim: Claim, now: Time) -> (Reply, Change) {
        let grant = Grant {
            owner: self.owner,
            attempt: self.attempt,
        };
        let reply = if self.recover {
            Reply::Recover(grant)
        } else {
            Reply::Execute(grant)
        };
        let retention = claim.retention;
        let granted = Self { retention, ..self }.leased(claim.lease, now);
        (reply, Change::Put(granted))
    }

    fn ended(self, outcome: Outcome, expires: Time) -> Self {
        let state = match outcome {
            Outcome::Rejected => State::Unknown,
            Outcome::Tombstone => State::Tombstone,
            Outcome::Stored(response) => State::Stored(response),
        };
        Self { state, expires, ..self }
    }
}

fn claimed(live: Option<Record>, claim: Claim, now: Time, floor: Time, without: Option<Rule>) -> (Reply, Change) {
    let is_without = |rule| without == Some(rule);
    let Some(record) = live else {
        let first = Record {
            fingerprint: claim.fingerprint,
            owner: Owner {
                nonce: claim.nonce,
                fence: now.max(floor + 1),
            },
            attempt: 1,
            recover: false,
            lease: claim.lease,
            retention: claim.retention,
            expires: now,
            state: State::Unknown,
        };
        return first.granted(claim, now);
    };
    if record.fingerprint != claim.fingerprint && !is_without(Rule::FingerprintFirst) {
        return (Reply::Mismatch, Change::None);
    }
    let until = match record.state {
        State::Stored(response) => return (Reply::Replay(response), Change::None),
        State::Tombstone => return (Reply::NotStored, Change::None),
        State::Unknown => return (Reply::Unknown, Change::None),
        State::InFlight { until } => until,
    };
    if record.owner.nonce == claim.nonce && !is_without(Rule::RepeatedClaimIsSameGrant) {
        let recover = record.recover && !is_without(Rule::RepeatedClaimIsSameKind);
        return Record { recover, ..record }.granted(claim, now);
    }
    let end = if is_without(Rule::LeaseIsCutBack) {
        until
    } else {
        record.lease_end(until, now)
    };
    if now < end {
        let state = State::InFlight { until: end };
        return (Reply::Wait(end - now), Change::Put(Record { state, ..record }));
    }
    let is_refused = claim.if_lost == IfLost::Refuse && !is_without(Rule::LostIsUnknown);
    let is_used_up = record.attempt >= claim.max_attempts && !is_without(Rule::AttemptsAreCapped);
    if is_refused || is_used_up {
        let state = State::Unknown;
        return (Reply::Unknown, Change::Put(Record { state, ..record }));
    }
    let fence = if is_without(Rule::FenceGrows) {
        record.owner.fence
    } else {
        now.max(record.owner.fence.max(floor) + 1)
    };
    let taken_over = Record {
        owner: Owner {
            nonce: claim.nonce,
            fence,
        },
        attempt: record.attempt + 1,
        recover: claim.if_lost == IfLost::Recover,
        ..record
    };
    taken_over.granted(claim, now)
}

fn renewed(live: Option<Record>, owner: Owner, lease: Time, now: Time, without: Option<Rule>) -> (Reply, Change) {
    let is_owned = |record: &Record| record.owner == owner || without == Some(Rule::RenewByOwner);
    match live {
        Some(record) if is_owned(&record) && matches!(record.state, State::InFlight { .. }) => {
            (Reply::Renewed, Change::Put(record.leased(lease, now)))
        }
        _ => (Reply::Superseded(None), Change::None),
    }
}

fn completed(
    live: Option<Record>,
    owner: Owner,
    outcome: Outcome,
    expires: Time,
    without: Option<Rule>,
) -> (Reply, Change) {
    let Some(record) = live else {
        return (Reply::Superseded(None), Change::None);
    };
    let is_owned = record.owner == owner || without == Some(Rule::CompleteByOwner);
    let stands = match record.state {
        State::InFlight { .. } | State::Unknown => None,
        State::Tombstone => Some(Outcome::Tombstone),
        State::Stored(response) => Some(Outcome::Stored(response)),
    };
    match stands {
        None if is_owned => (Reply::Completed, Change::Put(record.ended(outcome, expires))),
        Some(_) if is_owned => (Reply::Completed, Change::None),
        stands => (Reply::Superseded(stands), Change::None),
    }
}

fn released(live: Option<Record>, owner: Owner, now: Time, without: Option<Rule>) -> (Reply, Change) {
    let Some(record) = live else {
        return (Reply::Released, Change::None);
    };
    let is_owned = record.owner == owner || without == Some(Rule::ReleaseByOwner);
    if !is_owned || record.is_completed() {
        return (Reply::Superseded(None), Change::None);
    }
    if record.attempt == 1 || without == Some(Rule::ReleaseLeavesEvidence) {
        return (Reply::Released, Change::Remove);
    }
    if record.state == State::Unknown {
        return (Reply::Released, Change::None);
    }
    (Reply::Released, Change::Put(record.leased(0, now)))
}

fn resolved(
    live: Option<Record>,
    fence: Time,
    found: Option<(Outcome, Time)>,
    now: Time,
    without: Option<Rule>,
) -> (Reply, Change) {
    let Some(record) = live else {
        return (Reply::Conflict(None), Change::None);
    };
    let is_other = record.owner.fence != fence && without != Some(Rule::ResolveComparesFence);
    let is_living = record.is_leased(now) && without != Some(Rule::ResolveSparesTheLiving);
    if is_other || is_living || record.is_completed() {
        return (Reply::Conflict(Some(record.owner.fence)), Change::None);
    }
    let Some((outcome, retention)) = found else {
        return (Reply::Resolved, Change::Remove);
    };
    let mut done = record.ended(outcome, now + retention);
    if done.is_completed() && without != Some(Rule::ResolveEndsOwnership) {
        done.owner.nonce = !record.owner.nonce;
    }
    (Reply::Resolved, Change::Put(done))
}
