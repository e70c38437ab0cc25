//! The translation between the model and the crate.

use std::ops::Range;
use std::time::Duration;

use tower_idempotency::protocol;
use tower_idempotency::protocol::{
    Completion, Decision, Fence, Fingerprint, Nonce, Outcome, Release, Renewal, Resolution, ResolveResult, StorageKey,
    StoredResponse,
};

use super::rules;
use super::rules::{Claim, Grant, IfLost, Owner, Reply, State, TICK, Time};
use super::{ENDLESS, HOUR, NOW, SOON};

/// Translates between the model and the crate. `now` is the time in microseconds at [`NOW`].
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) now: u64,
}

pub(super) fn span(time: Time) -> Duration {
    Duration::from_micros(u64::from(time / TICK) * HOUR)
}

pub(super) fn nonce(nonce: i8) -> Nonce {
    let mut bytes = [nonce.max(!nonce).unsigned_abs(); 16];
    if nonce < 0 {
        bytes[0] = !bytes[0];
    }
    Nonce::from_bytes(bytes)
}

pub(super) fn nonce_of(nonce: &Nonce) -> i8 {
    let [first, second, ..] = nonce.as_bytes().map(|byte| i8::from_ne_bytes([byte]));
    if first == second { first } else { !second }
}

pub(super) fn fingerprint(number: u8) -> Fingerprint {
    Fingerprint::of(&[number])
}

pub(super) fn outcome(outcome: rules::Outcome) -> Outcome {
    match outcome {
        rules::Outcome::Rejected => Outcome::Rejected,
        rules::Outcome::Tombstone => Outcome::Tombstone,
        rules::Outcome::Stored(body) => Outcome::Stored(StoredResponse {
            head: "head".into(),
            body: vec![body].into(),
        }),
    }
}

pub(super) fn outcome_of(outcome: Outcome) -> rules::Outcome {
    match outcome {
        Outcome::Rejected => rules::Outcome::Rejected,
        Outcome::Tombstone => rules::Outcome::Tombstone,
        Outcome::Stored(response) => rules::Outcome::Stored(response.body[0]),
    }
}

pub(super) fn if_lost(if_lost: IfLost) -> protocol::IfLost {
    match if_lost {
        IfLost::Execute => protocol::IfLost::Execute,
        IfLost::Recover => protocol::IfLost::Recover,
        IfLost::Refuse => protocol::IfLost::Refuse,
    }
}

impl Scale {
    pub(super) fn at(self, time: Time) -> u64 {
        self.now + u64::from(time / TICK) * HOUR + u64::from(time % TICK) - u64::from(NOW / TICK) * HOUR
    }

    /// Returns the time of the model. A time that a server read from its clock is a little after a
    /// tick, and means [`SOON`] after that tick.
    pub(super) fn time_of(self, micros: u64) -> Time {
        let since = micros + u64::from(NOW / TICK) * HOUR - self.now;
        let units = (since % HOUR).min(u64::from(SOON - NOW));
        assert!(since % HOUR < HOUR / 100, "{micros} is no time that the test has used");
        u16::try_from(since / HOUR * u64::from(TICK) + units).unwrap()
    }

    pub(super) fn owner(self, owner: Owner) -> protocol::Owner {
        protocol::Owner {
            nonce: nonce(owner.nonce),
            fence: Fence::new(self.at(owner.fence)),
        }
    }

    pub(super) fn claim(self, key: StorageKey, claim: Claim) -> protocol::Claim {
        protocol::Claim {
            key,
            fingerprint: fingerprint(claim.fingerprint),
            nonce: nonce(claim.nonce),
            lease: span(claim.lease),
            retention: span(claim.retention),
            if_lost: if_lost(claim.if_lost),
            max_attempts: claim.max_attempts.into(),
        }
    }

    pub(super) fn resolution(found: Option<(rules::Outcome, Time)>) -> Resolution {
        found.map_or(Resolution::Absent, |(found, retention)| {
            Resolution::Completed(outcome(found), span(retention))
        })
    }

    pub(super) fn grant_of(self, grant: protocol::Grant) -> Grant {
        Grant {
            owner: Owner {
                nonce: nonce_of(&grant.owner.nonce),
                fence: self.time_of(grant.owner.fence.as_u64()),
            },
            attempt: u8::try_from(grant.attempt).unwrap(),
        }
    }

    pub(super) fn decision_of(self, decision: Decision) -> Reply {
        match decision {
            Decision::Execute(grant) => Reply::Execute(self.grant_of(grant)),
            Decision::Recover(grant) => Reply::Recover(self.grant_of(grant)),
            Decision::Replay(response) => Reply::Replay(response.body[0]),
            Decision::NotStored => Reply::NotStored,
            Decision::Mismatch => Reply::Mismatch,
            Decision::Unknown => Reply::Unknown,
            Decision::Wait { left } => Reply::Wait(ticks(left)),
        }
    }

    pub(super) fn resolved_of(self, result: ResolveResult) -> Reply {
        match result {
            ResolveResult::Resolved => Reply::Resolved,
            ResolveResult::Conflict(fence) => Reply::Conflict(fence.map(|fence| self.time_of(fence.as_u64()))),
        }
    }

    /// Encodes the record in the layout of version 1.
    pub(super) fn bytes(self, record: rules::Record) -> Vec<u8> {
        let (state, until) = match record.state {
            State::InFlight { until } => (0, self.at(until)),
            State::Unknown => (1, 0),
            State::Tombstone => (2, 0),
            State::Stored(_) => (3, 0),
        };
        let fingerprint = fingerprint(record.fingerprint);
        let owner = self.owner(record.owner);
        let micros = |time| u64::try_from(span(time).as_micros()).unwrap();
        let mut bytes = vec![1, state, u8::from(record.recover), fingerprint.algorithm()];
        bytes.extend(fingerprint.digest());
        bytes.extend(owner.nonce.as_bytes());
        bytes.extend(owner.fence.as_u64().to_le_bytes());
        bytes.extend(u32::from(record.attempt).to_le_bytes());
        for number in [
            micros(record.lease),
            micros(record.retention),
            until,
            self.at(record.expires),
        ] {
            bytes.extend(number.to_le_bytes());
        }
        if let State::Stored(body) = record.state {
            bytes.extend(4_u32.to_le_bytes());
            bytes.extend(b"head");
            bytes.push(body);
        }
        bytes
    }

    /// Returns the bytes with each time as a time of the model, so that a server's clock cannot make
    /// a difference.
    pub(super) fn timeless(self, mut bytes: Vec<u8>) -> Vec<u8> {
        for at in [FENCE, UNTIL, EXPIRES] {
            let number = u64::from_le_bytes(bytes[at.clone()].try_into().unwrap());
            if number > 0 {
                bytes[at].copy_from_slice(&u64::from(self.time_of(number)).to_le_bytes());
            }
        }
        bytes
    }
}

pub(super) const FENCE: Range<usize> = 52..60;
pub(super) const UNTIL: Range<usize> = 80..88;
pub(super) const EXPIRES: Range<usize> = 88..96;

/// Returns the whole ticks of a duration that a server measured, rounded up.
pub(super) fn ticks(left: Duration) -> Time {
    Time::try_from(left.as_micros().div_ceil(HOUR.into())).unwrap_or(ENDLESS / TICK) * TICK
}

pub(super) fn completion_of(completion: Completion) -> Reply {
    match completion {
        Completion::Completed => Reply::Completed,
        Completion::Superseded(stands) => Reply::Superseded(stands.map(outcome_of)),
    }
}

pub(super) const fn renewal_of(renewal: Renewal) -> Reply {
    match renewal {
        Renewal::Renewed => Reply::Renewed,
        Renewal::Superseded => Reply::Superseded(None),
    }
}

pub(super) const fn release_of(release: Release) -> Reply {
    match release {
        Release::Released => Reply::Released,
        Release::Superseded => Reply::Superseded(None),
    }
}
