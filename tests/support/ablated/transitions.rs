//! The transitions of a record, each with the fault that a broken rule causes.

use std::time::Duration;

use bytes::Bytes;
use tower_idempotency::Timestamp;
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Record, Release,
    Resolution, ResolveResult, Status, StorageKey, StoredResponse, Transition,
};

use super::{Ablated, Rule};

/// The position of the owner in an encoded record. The tests of the codec check it.
const NONCE: std::ops::Range<usize> = 36..52;
const FENCE: std::ops::Range<usize> = 52..60;
const ATTEMPT: std::ops::Range<usize> = 60..64;

impl Ablated {
    pub(super) fn decide(&self, record: Option<&Record>, claim: &Claim, now: Timestamp) -> Transition<Decision> {
        let mut claim = claim.clone();
        let seen = Record::peek(record, now);
        let status = seen.as_ref().map(|seen| seen.status.clone());
        let in_flight = matches!(status, Some(Status::InFlight { .. }));
        match (self.rule, &seen) {
            (Rule::AttemptsUncapped, _) => claim.max_attempts = u32::MAX,
            (Rule::FingerprintIgnored, Some(seen)) => claim.fingerprint = seen.fingerprint,
            (Rule::FingerprintOfCompletedIgnored, Some(seen)) if matches!(seen.status, Status::Completed(_)) => {
                claim.fingerprint = seen.fingerprint;
            }
            (Rule::RepeatedClaimIsAnother, _) => {}
            (Rule::RetentionForgotten, _) => claim.retention = Duration::ZERO,
            (Rule::TombstoneRunsAgain, Some(seen)) if seen.status == Status::Completed(Outcome::Tombstone) => {
                return Record::claim(None, &claim, now);
            }
            (Rule::UnknownRunsAgain, Some(seen)) if seen.status == Status::Unknown => {
                return Record::claim(None, &claim, now);
            }
            _ => {}
        }
        let now = match self.rule {
            Rule::ClockOfCallers => now.saturating_add(Duration::from_secs(3_000)),
            _ => now,
        };
        let mut decided = Record::claim(record, &claim, now);
        match (self.rule, decided.reply.clone()) {
            (Rule::FenceStays, Decision::Execute(grant) | Decision::Recover(grant)) => {
                if let (Some(record), Change::Put(next)) = (record, &decided.change) {
                    let fence = owner_of(record).fence;
                    decided.change = Change::Put(with_fence(next, fence));
                    decided.reply = Decision::Execute(Grant {
                        owner: Owner { fence, ..grant.owner },
                        ..grant
                    });
                }
            }
            (Rule::RepeatedClaimIsAnother, Decision::Execute(grant)) if in_flight => {
                if let Change::Put(next) = &decided.change {
                    let fence = Fence::new(grant.owner.fence.as_u64() + 1);
                    decided.change = Change::Put(with_fence(next, fence));
                    decided.reply = Decision::Execute(Grant {
                        owner: Owner { fence, ..grant.owner },
                        ..grant
                    });
                }
            }
            (Rule::RepeatedClaimWaits, Decision::Execute(_) | Decision::Recover(_)) if in_flight => {
                decided.reply = Decision::Wait { left: claim.lease };
                decided.change = Change::Unchanged;
            }
            (Rule::AttemptStays, Decision::Execute(grant)) => {
                if let Change::Put(next) = &decided.change {
                    decided.change = Change::Put(with_attempt(next, 1));
                    decided.reply = Decision::Execute(Grant { attempt: 1, ..grant });
                }
            }
            (Rule::UnknownNotNoted, Decision::Unknown) => decided.change = Change::Unchanged,
            (Rule::RepeatedRecoveryExecutes, Decision::Recover(grant)) if in_flight => {
                decided.reply = Decision::Execute(grant);
            }
            _ => {}
        }
        decided
    }

    /// Returns the owner that the store takes `owner` for. A store that does not compare takes it
    /// for the owner that it knows.
    pub(super) fn taken_for(&self, record: Option<&Record>, owner: Owner, careless: Rule) -> Owner {
        let Some(known) = record.map(owner_of) else {
            return owner;
        };
        match self.rule {
            rule if rule == careless => known,
            Rule::CompleteByFence if careless == Rule::CompleteByAnybody => Owner {
                nonce: known.nonce,
                ..owner
            },
            Rule::CompleteByNonce if careless == Rule::CompleteByAnybody => Owner {
                fence: known.fence,
                ..owner
            },
            _ => owner,
        }
    }

    pub(super) fn apply_complete(
        &self,
        record: Option<&Record>,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
        now: Timestamp,
    ) -> Transition<Completion> {
        let refused = match (self.rule, record.and_then(|record| self.status(record))) {
            (Rule::CompleteLateRefused, Some(status)) => matches!(status, Status::Lost | Status::Unknown),
            (Rule::CompleteUnknownRefused, Some(status)) => status == Status::Unknown,
            _ => false,
        };
        if refused {
            return Transition {
                reply: Completion::Superseded(None),
                change: Change::Unchanged,
            };
        }
        let owner = self.taken_for(record, owner, Rule::CompleteByAnybody);
        let completed = record.is_some_and(Record::is_completed);
        if self.is(Rule::CompleteBesideRecord) && completed {
            // The store writes the outcome beside the record, so every later completion overwrites
            // it.
            let asked = Claim {
                key: StorageKey::from_bytes([0; 32]),
                fingerprint: Record::peek(record, now).map_or(Fingerprint::NONE, |seen| seen.fingerprint),
                nonce: owner.nonce,
                lease: Duration::from_secs(60),
                retention,
                if_lost: IfLost::Refuse,
                max_attempts: 1,
            };
            if let Change::Put(anew) = Record::claim(None, &asked, now).change {
                let anew = with_fence(&anew, owner.fence);
                return Record::complete(Some(&anew), owner, outcome, retention, now);
            }
        }
        Record::complete(record, owner, &self.altered(outcome), retention, now)
    }

    fn altered(&self, outcome: &Outcome) -> Outcome {
        let alter = |bytes: &Bytes| match self.rule {
            Rule::ResponseInUtf8 => String::from_utf8_lossy(bytes).into_owned().into(),
            Rule::ResponseTrimmed => Bytes::copy_from_slice(bytes.trim_ascii_end()),
            _ => bytes.clone(),
        };
        match outcome {
            Outcome::Stored(StoredResponse { head, body }) => Outcome::Stored(StoredResponse {
                head: alter(head),
                body: alter(body),
            }),
            Outcome::Rejected if self.is(Rule::RejectedIsCompleted) => Outcome::Tombstone,
            Outcome::Rejected => Outcome::Rejected,
            Outcome::Tombstone => Outcome::Tombstone,
        }
    }

    pub(super) fn apply_release(&self, record: Option<&Record>, owner: Owner, now: Timestamp) -> Transition<Release> {
        let owner = self.taken_for(record, owner, Rule::ReleaseByAnybody);
        let mut released = Record::release(record, owner, now);
        match (self.rule, released.reply, record) {
            (Rule::ReleaseOfCompleted, _, Some(known)) if owner_of(known) == owner => {
                released.reply = Release::Released;
                released.change = Change::Remove;
            }
            (Rule::ReleaseErases, Release::Released, Some(_)) => released.change = Change::Remove,
            (Rule::ReleaseKeepsOnlyAttempt, Release::Released, Some(_)) => {
                released.change = Record::renew(record, owner, Duration::ZERO, now).change;
            }
            _ => {}
        }
        released
    }

    pub(super) fn apply_resolve(
        &self,
        record: Option<&Record>,
        fence: Fence,
        resolution: &Resolution,
        now: Timestamp,
    ) -> Transition<ResolveResult> {
        let Some(known) = record else {
            return Record::resolve(record, fence, resolution, now);
        };
        let fence = if self.is(Rule::ResolveByAnyFence) {
            owner_of(known).fence
        } else {
            fence
        };
        if self.is(Rule::ResolveCompleted) && known.is_completed() && owner_of(known).fence == fence {
            return Transition {
                reply: ResolveResult::Resolved,
                change: Change::Remove,
            };
        }
        if self.is(Rule::ResolveAlive) && !known.is_completed() {
            let lost = Record::renew(record, owner_of(known), Duration::ZERO, now);
            if let Change::Put(lost) = lost.change {
                return Record::resolve(Some(&lost), fence, resolution, now);
            }
        }
        let mut resolved = Record::resolve(record, fence, resolution, now);
        if let (Rule::ResolveKeepsOwner, Change::Put(completed)) = (self.rule, &resolved.change) {
            resolved.change = Change::Put(with_nonce(completed, owner_of(known).nonce));
        }
        resolved
    }
}

fn owner_of(record: &Record) -> Owner {
    let bytes = record.to_bytes();
    Owner {
        nonce: Nonce::from_bytes(bytes[NONCE].try_into().unwrap()),
        fence: Fence::new(u64::from_le_bytes(bytes[FENCE].try_into().unwrap())),
    }
}

fn with_attempt(record: &Record, attempt: u32) -> Record {
    let mut bytes = record.to_bytes().to_vec();
    bytes[ATTEMPT].copy_from_slice(&attempt.to_le_bytes());
    Record::from_bytes(bytes.into()).unwrap()
}

fn with_nonce(record: &Record, nonce: Nonce) -> Record {
    let mut bytes = record.to_bytes().to_vec();
    bytes[NONCE].copy_from_slice(nonce.as_bytes());
    Record::from_bytes(bytes.into()).unwrap()
}

fn with_fence(record: &Record, fence: Fence) -> Record {
    let mut bytes = record.to_bytes().to_vec();
    bytes[FENCE].copy_from_slice(&fence.as_u64().to_le_bytes());
    Record::from_bytes(bytes.into()).unwrap()
}
