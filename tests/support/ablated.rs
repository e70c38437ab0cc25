//! A correct store with leases, over a map of records as bytes, in which one rule can be left out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::Notify;
use tower_idempotency::protocol::{
    Answer, Change, Claim, Completion, Decision, Fence, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Record,
    Release, Renewal, Resolution, Resolved, Snapshot, Status, StorageKey, Transition,
};
use tower_idempotency::{Clock, Error, ErrorKind, Store, Timestamp};

/// What is wrong with the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rule {
    #[default]
    AllKept,
    AnswerInUtf8,
    AnswerTrimmed,
    AttemptsUncapped,
    ClaimNowIgnoresFingerprint,
    ClaimTwoSteps,
    ClockOfCallers,
    CompleteBesideRecord,
    CompleteByAnybody,
    CompleteByFence,
    CompleteByNonce,
    CompleteLateRefused,
    CompleteUnknownRefused,
    CompleteTwoSteps,
    CorruptIsAbsent,
    EvictsWhenFull,
    FenceStays,
    FingerprintIgnored,
    FingerprintOfCompletedIgnored,
    LeaseIsExpiry,
    ReleaseByAnybody,
    ReleaseErases,
    ReleaseKeepsOnlyAttempt,
    RenewByAnybody,
    RepeatedClaimIsAnother,
    RepeatedClaimWaits,
    RepeatedRecoveryExecutes,
    ResolveAlive,
    ResolveByAnyFence,
    RetentionForgotten,
    TakesUnbounded,
    UnknownRunsAgain,
    WatchNeverWakes,
    WatchSubscribesLate,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Ablated {
    rule: Rule,
    records: Arc<Mutex<HashMap<StorageKey, Bytes>>>,
    clock: Clock,
    changed: Arc<Notify>,
}

/// How many records it takes, where that is not broken.
pub(crate) const ROOM: usize = 2_000;
const FULL: Error = Error::new(ErrorKind::StoreFull, "the map is full");
/// Where a record as bytes has its owner; the codec's tests hold it.
const NONCE: std::ops::Range<usize> = 36..52;
const FENCE: std::ops::Range<usize> = 52..60;

impl Ablated {
    pub(crate) fn new(rule: Rule) -> Self {
        Self {
            rule,
            ..Self::default()
        }
    }

    /// The same records, opened again.
    pub(crate) fn reopened(&self) -> Self {
        Self {
            records: Arc::clone(&self.records),
            ..Self::new(self.rule)
        }
    }

    pub(crate) fn damage(&self, key: &StorageKey) {
        self.records
            .lock()
            .unwrap()
            .insert(*key, Bytes::from_static(b"\x01 no record"));
    }

    fn is(&self, rule: Rule) -> bool {
        self.rule == rule
    }

    fn read(&self, key: &StorageKey) -> Result<Option<Record>, Error> {
        let bytes = self.records.lock().unwrap().get(key).cloned();
        match bytes.map(Record::from_bytes).transpose() {
            Err(_) if self.is(Rule::CorruptIsAbsent) => Ok(None),
            Ok(Some(record)) if self.is(Rule::LeaseIsExpiry) && self.status(&record) == Some(Status::Lost) => Ok(None),
            read => read,
        }
    }

    fn status(&self, record: &Record) -> Option<Status> {
        Record::peek(Some(record), self.clock.now()).map(|snapshot| snapshot.status)
    }

    fn write(&self, key: &StorageKey, change: Change) -> Result<(), Error> {
        let mut records = self.records.lock().unwrap();
        match change {
            Change::Keep => return Ok(()),
            Change::Put(record) => {
                if records.len() >= ROOM && !records.contains_key(key) {
                    match self.rule {
                        Rule::EvictsWhenFull => {
                            let any = *records.keys().next().unwrap();
                            records.remove(&any);
                        }
                        Rule::TakesUnbounded => {}
                        _ => return Err(FULL),
                    }
                }
                records.insert(*key, record.to_bytes());
            }
            Change::Remove => drop(records.remove(key)),
        }
        drop(records);
        self.changed.notify_waiters();
        Ok(())
    }

    fn step<R>(
        &self,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> Result<R, Error> {
        // Atomic: one step at a time, over all keys.
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let record = self.read(key)?;
        let Transition { reply, change } = transition(record.as_ref(), self.clock.now());
        self.write(key, change)?;
        Ok(reply)
    }

    async fn two_steps<R>(
        &self,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> Result<R, Error> {
        let record = self.read(key)?;
        tokio::task::yield_now().await;
        let Transition { reply, change } = transition(record.as_ref(), self.clock.now());
        self.write(key, change)?;
        Ok(reply)
    }

    fn decide(&self, record: Option<&Record>, claim: &Claim, now: Timestamp) -> Transition<Decision> {
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
            (Rule::UnknownRunsAgain, Some(seen)) if seen.status == Status::Unknown => {
                return Record::claim(None, &claim, now);
            }
            _ => {}
        }
        let now = match self.rule {
            Rule::ClockOfCallers => now.saturating_add(Duration::from_secs(3_000)),
            _ => now,
        };
        let mut made = Record::claim(record, &claim, now);
        match (self.rule, made.reply.clone()) {
            (Rule::FenceStays, Decision::Execute(grant) | Decision::Recover(grant)) => {
                if let (Some(record), Change::Put(next)) = (record, &made.change) {
                    let fence = owner_of(record).fence;
                    made.change = Change::Put(with_fence(next, fence));
                    made.reply = Decision::Execute(Grant {
                        owner: Owner { fence, ..grant.owner },
                        ..grant
                    });
                }
            }
            (Rule::RepeatedClaimIsAnother, Decision::Execute(grant)) if in_flight => {
                if let Change::Put(next) = &made.change {
                    let fence = Fence::new(grant.owner.fence.as_u64() + 1);
                    made.change = Change::Put(with_fence(next, fence));
                    made.reply = Decision::Execute(Grant {
                        owner: Owner { fence, ..grant.owner },
                        ..grant
                    });
                }
            }
            (Rule::RepeatedClaimWaits, Decision::Execute(_) | Decision::Recover(_)) if in_flight => {
                made.reply = Decision::Wait { left: claim.lease };
                made.change = Change::Keep;
            }
            (Rule::RepeatedRecoveryExecutes, Decision::Recover(grant)) if in_flight => {
                made.reply = Decision::Execute(grant);
            }
            _ => {}
        }
        made
    }

    /// Whom the store takes `owner` for: where comparisons are left out, for the one it knows.
    fn taken_for(&self, record: Option<&Record>, owner: Owner, careless: Rule) -> Owner {
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

    fn finish(
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
                change: Change::Keep,
            };
        }
        let owner = self.taken_for(record, owner, Rule::CompleteByAnybody);
        let completed = record.is_some_and(Record::is_completed);
        if self.is(Rule::CompleteBesideRecord) && completed {
            // The outcome lies beside the record, and whoever owns that overwrites it.
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
            Rule::AnswerInUtf8 => String::from_utf8_lossy(bytes).into_owned().into(),
            Rule::AnswerTrimmed => Bytes::copy_from_slice(bytes.trim_ascii_end()),
            _ => bytes.clone(),
        };
        match outcome {
            Outcome::Kept(Answer { head, body }) => Outcome::Kept(Answer {
                head: alter(head),
                body: alter(body),
            }),
            Outcome::Tombstone => Outcome::Tombstone,
        }
    }

    fn let_go(&self, record: Option<&Record>, owner: Owner, now: Timestamp) -> Transition<Release> {
        let owner = self.taken_for(record, owner, Rule::ReleaseByAnybody);
        let mut released = Record::release(record, owner, now);
        match (self.rule, released.reply, record) {
            (Rule::ReleaseErases, Release::Released, Some(_)) => released.change = Change::Remove,
            (Rule::ReleaseKeepsOnlyAttempt, Release::Released, Some(_)) => {
                released.change = Record::renew(record, owner, Duration::ZERO, now).change;
            }
            _ => {}
        }
        released
    }

    fn clear_up(
        &self,
        record: Option<&Record>,
        fence: Fence,
        resolution: &Resolution,
        now: Timestamp,
    ) -> Transition<Resolved> {
        let Some(known) = record else {
            return Record::resolve(record, fence, resolution, now);
        };
        let fence = if self.is(Rule::ResolveByAnyFence) {
            owner_of(known).fence
        } else {
            fence
        };
        if self.is(Rule::ResolveAlive) && !known.is_completed() {
            let lost = Record::renew(record, owner_of(known), Duration::ZERO, now);
            if let Change::Put(lost) = lost.change {
                return Record::resolve(Some(&lost), fence, resolution, now);
            }
        }
        Record::resolve(record, fence, resolution, now)
    }
}

fn owner_of(record: &Record) -> Owner {
    let bytes = record.to_bytes();
    Owner {
        nonce: Nonce::from_bytes(bytes[NONCE].try_into().unwrap()),
        fence: Fence::new(u64::from_le_bytes(bytes[FENCE].try_into().unwrap())),
    }
}

fn with_fence(record: &Record, fence: Fence) -> Record {
    let mut bytes = record.to_bytes().to_vec();
    bytes[FENCE].copy_from_slice(&fence.as_u64().to_le_bytes());
    Record::from_bytes(bytes.into()).unwrap()
}

impl Store for Ablated {
    type Watch = BoxFuture<'static, ()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        let decide = |record: Option<&Record>, now| self.decide(record, claim, now);
        match self.rule {
            Rule::ClaimTwoSteps => self.two_steps(&claim.key, decide).await,
            _ => self.step(&claim.key, decide),
        }
    }

    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        if !self.is(Rule::ClaimNowIgnoresFingerprint) {
            return None;
        }
        let record = self.read(&claim.key).ok()??;
        match self.status(&record)? {
            Status::Completed(Outcome::Kept(answer)) => Some(Ok(Decision::Replay(answer))),
            _ => None,
        }
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        self.step(key, |record, now| {
            let owner = self.taken_for(record, owner, Rule::RenewByAnybody);
            Record::renew(record, owner, lease, now)
        })
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let finish = |record: Option<&Record>, now| self.finish(record, owner, outcome, retention, now);
        match self.rule {
            Rule::CompleteTwoSteps => self.two_steps(key, finish).await,
            _ => self.step(key, finish),
        }
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        self.step(key, |record, now| self.let_go(record, owner, now))
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<Resolved, Error> {
        self.step(key, |record, now| self.clear_up(record, fence, resolution, now))
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        self.step(key, |record, now| Transition {
            reply: Record::peek(record, now),
            change: Change::Keep,
        })
    }

    async fn watch(&self, _: &StorageKey) -> Result<Self::Watch, Error> {
        let changed = Arc::clone(&self.changed);
        Ok(match self.rule {
            Rule::WatchNeverWakes => Box::pin(std::future::pending()),
            Rule::WatchSubscribesLate => Box::pin(async move { changed.notified().await }),
            _ => Box::pin(changed.notified_owned()),
        })
    }
}
