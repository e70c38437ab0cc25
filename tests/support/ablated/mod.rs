//! A correct store with leases over a map of encoded records. A test can break one of its rules.
#![allow(dead_code, reason = "every test binary uses its own part")]

mod transitions;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::Notify;
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Outcome, Owner, Record, Release, Renewal, Resolution, ResolveResult,
    Snapshot, Status, StorageKey, Transition,
};
use tower_idempotency::{Clock, Error, ErrorKind, Store, Timestamp};

/// The rule that the store breaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rule {
    #[default]
    Correct,
    ResponseInUtf8,
    ResponseTrimmed,
    AttemptStays,
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
    FullIsUnavailable,
    LeaseIsExpiry,
    RejectedIsCompleted,
    ReleaseByAnybody,
    ReleaseErases,
    ReleaseKeepsOnlyAttempt,
    ReleaseOfCompleted,
    ReleaseTwoSteps,
    RenewByAnybody,
    RenewTwoSteps,
    RepeatedClaimIsAnother,
    RepeatedClaimWaits,
    RepeatedRecoveryExecutes,
    ResolveAlive,
    ResolveByAnyFence,
    ResolveCompleted,
    ResolveKeepsOwner,
    ResolveTwoSteps,
    RetentionForgotten,
    TakesUnbounded,
    TombstoneRunsAgain,
    UnknownNotNoted,
    UnknownRunsAgain,
    WatchNeverWakes,
    WatchSubscribesLate,
}

impl Rule {
    /// All rules that the store can break.
    pub(crate) const ALL: [Self; 44] = [
        Self::ResponseInUtf8,
        Self::ResponseTrimmed,
        Self::AttemptStays,
        Self::AttemptsUncapped,
        Self::ClaimNowIgnoresFingerprint,
        Self::ClaimTwoSteps,
        Self::ClockOfCallers,
        Self::CompleteBesideRecord,
        Self::CompleteByAnybody,
        Self::CompleteByFence,
        Self::CompleteByNonce,
        Self::CompleteLateRefused,
        Self::CompleteUnknownRefused,
        Self::CompleteTwoSteps,
        Self::CorruptIsAbsent,
        Self::EvictsWhenFull,
        Self::FenceStays,
        Self::FingerprintIgnored,
        Self::FingerprintOfCompletedIgnored,
        Self::FullIsUnavailable,
        Self::LeaseIsExpiry,
        Self::RejectedIsCompleted,
        Self::ReleaseByAnybody,
        Self::ReleaseErases,
        Self::ReleaseKeepsOnlyAttempt,
        Self::ReleaseOfCompleted,
        Self::ReleaseTwoSteps,
        Self::RenewByAnybody,
        Self::RenewTwoSteps,
        Self::RepeatedClaimIsAnother,
        Self::RepeatedClaimWaits,
        Self::RepeatedRecoveryExecutes,
        Self::ResolveAlive,
        Self::ResolveByAnyFence,
        Self::ResolveCompleted,
        Self::ResolveKeepsOwner,
        Self::ResolveTwoSteps,
        Self::RetentionForgotten,
        Self::TakesUnbounded,
        Self::TombstoneRunsAgain,
        Self::UnknownNotNoted,
        Self::UnknownRunsAgain,
        Self::WatchNeverWakes,
        Self::WatchSubscribesLate,
    ];
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Ablated {
    rule: Rule,
    records: Arc<Mutex<HashMap<StorageKey, Bytes>>>,
    /// Held for a whole step.
    alone: Arc<Mutex<()>>,
    clock: Clock,
    changed: Arc<Notify>,
}

/// The most records that the store takes, unless that rule is broken.
pub(crate) const ROOM: usize = 2_000;
const FULL: Error = Error::new(ErrorKind::StoreFull, "the map is full");
impl Ablated {
    pub(crate) fn new(rule: Rule) -> Self {
        Self {
            rule,
            ..Self::default()
        }
    }

    /// Makes a store with a clock that the test turns.
    pub(crate) fn with_clock(rule: Rule, clock: Clock) -> Self {
        Self {
            clock,
            ..Self::new(rule)
        }
    }

    pub(crate) fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
    }

    /// Opens the same records again.
    pub(crate) fn reopened(&self) -> Self {
        Self {
            records: Arc::clone(&self.records),
            ..Self::new(self.rule)
        }
    }

    /// Returns the encoded record of a key.
    pub(crate) fn bytes(&self, key: &StorageKey) -> Option<Bytes> {
        self.records.lock().unwrap().get(key).cloned()
    }

    /// Replaces the record of a key, as a server does that lacks the last writes.
    pub(crate) fn put_back(&self, key: &StorageKey, bytes: Option<Bytes>) {
        let mut records = self.records.lock().unwrap();
        match bytes {
            Some(bytes) => drop(records.insert(*key, bytes)),
            None => drop(records.remove(key)),
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
            Change::Unchanged => return Ok(()),
            Change::Put(record) => {
                if records.len() >= ROOM && !records.contains_key(key) {
                    match self.rule {
                        Rule::EvictsWhenFull => {
                            let any = *records.keys().next().unwrap();
                            records.remove(&any);
                        }
                        Rule::TakesUnbounded => {}
                        Rule::FullIsUnavailable => return Err(Error::unavailable("out of memory")),
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

    /// Runs one atomic step. If the rule `apart` is broken, reads and writes in two steps.
    async fn step<R>(
        &self,
        apart: Rule,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> Result<R, Error> {
        if self.is(apart) {
            let record = self.read(key)?;
            tokio::task::yield_now().await;
            return self.go_on(key, record.as_ref(), transition);
        }
        let _alone = self.alone.lock().unwrap();
        let record = self.read(key)?;
        self.go_on(key, record.as_ref(), transition)
    }

    fn go_on<R>(
        &self,
        key: &StorageKey,
        record: Option<&Record>,
        transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> Result<R, Error> {
        let Transition { reply, change } = transition(record, self.clock.now());
        self.write(key, change)?;
        Ok(reply)
    }
}

impl Store for Ablated {
    type Watch = BoxFuture<'static, ()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        let decide = |record: Option<&Record>, now| self.decide(record, claim, now);
        self.step(Rule::ClaimTwoSteps, &claim.key, decide).await
    }

    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        if !self.is(Rule::ClaimNowIgnoresFingerprint) {
            return None;
        }
        let record = self.read(&claim.key).ok()??;
        match self.status(&record)? {
            Status::Completed(Outcome::Stored(response)) => Some(Ok(Decision::Replay(response))),
            _ => None,
        }
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        let renew = |record: Option<&Record>, now| {
            let owner = self.taken_for(record, owner, Rule::RenewByAnybody);
            Record::renew(record, owner, lease, now)
        };
        self.step(Rule::RenewTwoSteps, key, renew).await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let apply_complete = |record: Option<&Record>, now| self.apply_complete(record, owner, outcome, retention, now);
        self.step(Rule::CompleteTwoSteps, key, apply_complete).await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        let apply_release = |record: Option<&Record>, now| self.apply_release(record, owner, now);
        self.step(Rule::ReleaseTwoSteps, key, apply_release).await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        let apply_resolve = |record: Option<&Record>, now| self.apply_resolve(record, fence, resolution, now);
        self.step(Rule::ResolveTwoSteps, key, apply_resolve).await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        Ok(Record::peek(self.read(key)?.as_ref(), self.clock.now()))
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
