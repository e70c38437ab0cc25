//! Checks each step of the store against the rules of the protocol.

use std::collections::HashMap;
use std::time::Duration;

use tower_idempotency::protocol::{
    Completion, Decision, Grant, Nonce, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot, Status,
    StorageKey,
};
use tower_idempotency::{Error, Timestamp};

use crate::link::{StoreReply, StoreRequest};

/// The last grant of a key.
#[derive(Clone, Copy)]
struct Granted {
    nonce: Nonce,
    fence: u64,
    attempt: u32,
    is_recovery: bool,
}

/// The time for which the store must keep the record of a key.
#[derive(Clone, Copy)]
struct Evidence {
    until: Timestamp,
    retention: Duration,
}

/// The grants of all keys whose records still exist.
#[derive(Default)]
pub(crate) struct Audit {
    granted: HashMap<StorageKey, Granted>,
    evidence: HashMap<StorageKey, Evidence>,
}

/// The last grant and the evidence of one key.
#[derive(Clone, Copy)]
pub(crate) struct Noted(Option<Granted>, Option<Evidence>);

/// One step of the store: the record before and after it, and the reply.
pub(crate) struct Step<'a> {
    pub(crate) request: &'a StoreRequest,
    pub(crate) before: Option<Snapshot>,
    pub(crate) reply: &'a Result<StoreReply, Error>,
    pub(crate) after: Option<Snapshot>,
    /// The time of the store.
    pub(crate) now: Timestamp,
}

impl StoreRequest {
    pub(crate) fn key(&self) -> StorageKey {
        match self {
            Self::Claim(claim) => claim.key,
            Self::Renew(key, ..)
            | Self::Complete(key, ..)
            | Self::Release(key, _)
            | Self::Resolve(key, ..)
            | Self::Peek(key)
            | Self::Watch(key) => *key,
        }
    }
}

impl Audit {
    /// Checks a step. Returns the grant of a new owner.
    pub(crate) fn check(&mut self, step: &Step<'_>) -> Result<Option<Grant>, String> {
        let Ok(reply) = step.reply else { return Ok(None) };
        let key = step.request.key();
        let evidence = self.evidence.get(&key);
        if step.before.is_none() && evidence.is_some_and(|evidence| step.now < evidence.until) {
            return Err("I6: a record is gone before its retention is over".to_owned());
        }
        let was_completed = completed(step.before.as_ref());
        if was_completed.is_some() && completed(step.after.as_ref()) != was_completed {
            return Err(format!("I2: {:?} changed a completed record", step.request));
        }
        let granted = match (step.request, reply) {
            (StoreRequest::Claim(claim), StoreReply::Claim(decision)) => {
                let is_recovery = matches!(decision, Decision::Recover(_));
                let is_granted = is_recovery || matches!(decision, Decision::Execute(_));
                let holds =
                    |seen: &Snapshot| seen.nonce == claim.nonce && matches!(seen.status, Status::InFlight { .. });
                if step.before.as_ref().is_some_and(holds) && !is_granted {
                    return Err(format!("I8: a claim that the owner repeated got {decision:?}"));
                }
                let is_noted = step.after.as_ref().is_some_and(|seen| seen.status == Status::Unknown);
                if *decision == Decision::Unknown && !is_noted {
                    return Err(format!(
                        "I6: a lost attempt was reported as unknown and not noted: {:?}",
                        step.after
                    ));
                }
                match decision {
                    Decision::Execute(grant) | Decision::Recover(grant) if grant.attempt > claim.max_attempts => {
                        return Err(format!("I10: attempt {} was granted", grant.attempt));
                    }
                    Decision::Execute(grant) | Decision::Recover(grant) => {
                        self.granted(key, claim.nonce, *grant, is_recovery, step.before.as_ref())?
                    }
                    _ => None,
                }
            }
            (StoreRequest::Renew(_, owner, _), StoreReply::Renew(renewal)) => {
                owned(step, *owner, *renewal == Renewal::Renewed, "renewal")?;
                None
            }
            (StoreRequest::Complete(_, owner, ..), StoreReply::Complete(completion)) => {
                owned(step, *owner, *completion == Completion::Completed, "completion")?;
                None
            }
            (StoreRequest::Release(_, owner), StoreReply::Release(release)) => {
                owned(step, *owner, *release == Release::Released, "release")?;
                released(step, *release)?;
                None
            }
            (StoreRequest::Resolve(_, fence, _), StoreReply::Resolve(result)) => {
                let before = step.before.as_ref();
                let may = before
                    .is_some_and(|seen| seen.fence == *fence && matches!(seen.status, Status::Lost | Status::Unknown));
                if may != (*result == ResolveResult::Resolved) {
                    return Err(format!(
                        "I8: a resolution was {result:?} when the record was {before:?}"
                    ));
                }
                if let (true, Some(before), Some(after)) = (may, before, &step.after) {
                    // A rejection stores no outcome, so the owner may still complete the record.
                    let is_completed = matches!(after.status, Status::Completed(_));
                    if is_completed && before.nonce == after.nonce {
                        return Err("I2: a resolution left the record to its earlier owner".to_owned());
                    }
                }
                None
            }
            _ => None,
        };
        self.keep_evidence(step, granted.is_some());
        Ok(granted)
    }

    /// Notes how long the store must keep the record after this step.
    fn keep_evidence(&mut self, step: &Step<'_>, is_granted: bool) {
        let key = step.request.key();
        if step.after.is_none() {
            self.granted.remove(&key);
            self.evidence.remove(&key);
            return;
        }
        let known = self.evidence.get(&key).map(|evidence| evidence.retention);
        let was_completed = completed(step.before.as_ref()).is_some();
        let kept = match (step.request, step.reply) {
            (StoreRequest::Claim(claim), _) if is_granted => Some((claim.lease, claim.retention)),
            (StoreRequest::Renew(_, _, lease), Ok(StoreReply::Renew(Renewal::Renewed))) => {
                known.map(|retention| (*lease, retention))
            }
            (StoreRequest::Complete(.., retention), Ok(StoreReply::Complete(Completion::Completed)))
                if !was_completed =>
            {
                Some((Duration::ZERO, *retention))
            }
            (StoreRequest::Release(..), Ok(StoreReply::Release(Release::Released))) => {
                known.map(|retention| (Duration::ZERO, retention))
            }
            (
                StoreRequest::Resolve(_, _, Resolution::Completed(_, retention)),
                Ok(StoreReply::Resolve(ResolveResult::Resolved)),
            ) => Some((Duration::ZERO, *retention)),
            _ => None,
        };
        if let Some((lease, retention)) = kept {
            let until = step.now.saturating_add(lease).saturating_add(retention);
            self.evidence.insert(key, Evidence { until, retention });
        }
    }

    pub(crate) fn noted(&self, key: &StorageKey) -> Noted {
        Noted(self.granted.get(key).copied(), self.evidence.get(key).copied())
    }

    /// Restores the state before a write that the store lost.
    pub(crate) fn go_back(&mut self, key: StorageKey, noted: Noted) {
        let Noted(granted, evidence) = noted;
        self.granted.remove(&key);
        self.evidence.remove(&key);
        self.granted.extend(granted.map(|granted| (key, granted)));
        self.evidence.extend(evidence.map(|evidence| (key, evidence)));
    }

    /// Forgets the record of a key, which is gone, and returns whether its retention is over.
    pub(crate) fn expire(&mut self, key: &StorageKey, now: Timestamp) -> bool {
        let is_over = self.evidence.get(key).is_some_and(|evidence| evidence.until <= now);
        if is_over {
            self.evidence.remove(key);
            self.granted.remove(key);
        }
        is_over
    }

    fn granted(
        &mut self,
        key: StorageKey,
        nonce: Nonce,
        grant: Grant,
        is_recovery: bool,
        before: Option<&Snapshot>,
    ) -> Result<Option<Grant>, String> {
        let (fence, attempt) = (grant.owner.fence.as_u64(), grant.attempt);
        let next = Granted {
            nonce,
            fence,
            attempt,
            is_recovery,
        };
        let Some(last) = self.granted.insert(key, next) else {
            return Ok(Some(grant));
        };
        if last.nonce == nonce {
            let is_same = (last.fence, last.attempt, last.is_recovery) == (fence, attempt, is_recovery);
            return match is_same {
                true => Ok(None),
                false => Err("I8: a repeated claim got another grant".to_owned()),
            };
        }
        if let Some(Status::InFlight { left }) = before.map(|seen| &seen.status) {
            return Err(format!("I1: a claim took over a key with {left:?} of its lease left"));
        }
        if let Some(Status::Unknown) = before.map(|seen| &seen.status) {
            return Err("I6: a claim got a key whose outcome is unknown".to_owned());
        }
        if fence <= last.fence {
            return Err(format!("I9: the fence went from {} to {fence}", last.fence));
        }
        if attempt <= last.attempt {
            return Err(format!("I9: attempt {attempt} came after attempt {}", last.attempt));
        }
        Ok(Some(grant))
    }
}

fn completed(seen: Option<&Snapshot>) -> Option<&Status> {
    seen.map(|seen| &seen.status)
        .filter(|status| matches!(status, Status::Completed(_)))
}

/// Checks that an operation succeeds for the owner of a record that is not completed, and for no
/// other caller (I8).
fn owned(step: &Step<'_>, owner: Owner, succeeded: bool, what: &str) -> Result<(), String> {
    let before = step.before.as_ref();
    let is_owner = before.is_some_and(|seen| (seen.nonce, seen.fence) == (owner.nonce, owner.fence));
    // A record that is absent has been released already.
    let is_released = what == "release" && before.is_none();
    if succeeded && !is_owner && !is_released {
        return Err(format!(
            "I8: a {what} by a caller other than the owner succeeded: {before:?}"
        ));
    }
    let is_open = before.is_some_and(|seen| !matches!(seen.status, Status::Completed(_)));
    let must = match what {
        // An owner whose outcome is unknown can still complete, but has no lease.
        "renewal" => before.is_some_and(|seen| matches!(seen.status, Status::InFlight { .. } | Status::Lost)),
        _ => true,
    };
    if is_owner && is_open && must && !succeeded {
        return Err(format!("I8: a {what} by the owner was refused: {before:?}"));
    }
    Ok(())
}

/// Checks that a release deletes the record if this was the only attempt, and otherwise keeps the
/// evidence of the earlier ones (I6).
fn released(step: &Step<'_>, release: Release) -> Result<(), String> {
    match (&step.before, &step.after) {
        (Some(before), None) if before.attempt > 1 => Err(format!("I6: a release deleted the evidence: {before:?}")),
        (Some(before), Some(_)) if before.attempt == 1 && release == Release::Released => Err(format!(
            "I7: a release left a record of an attempt without effect: {before:?}"
        )),
        _ => Ok(()),
    }
}
