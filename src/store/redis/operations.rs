//! The operations of the store: what the scripts are told, and what they say.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::check::Checks;
use super::connection::{Connection, Exchanged, Replication};
use super::failure;
use super::scripts::{self, Reply, Script};
use super::watch::{RedisWatch, Watches};
use crate::clock::{within, Timestamp};
use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Grant, IfLost, Outcome, Owner, Record, Release, Renewal, Resolution,
    ResolveResult, Snapshot, Status, StorageKey, StoredResponse,
};

/// The longest lease and retention. The scripts count microseconds in doubles, which are exact below 2^53: now, a lease and a
/// retention together stay below it until the year 2055.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// The server, and how it is to be used.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) connection: Connection,
    pub(super) checks: Arc<Checks>,
    pub(super) prefix: String,
    pub(super) response_timeout: Duration,
    pub(super) replication: Option<Replication>,
    /// Where the server pushes to this connection.
    pub(super) watches: Option<Arc<Watches>>,
}

impl Server {
    /// Claims a key. Grants only what enough replicas know of, and shows no response that they do not have: they could
    /// not tell, should the server be lost.
    pub(super) async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        let (decision, is_replicated) = self.ask(claim).await?;
        match decision {
            Decision::Execute(grant) | Decision::Recover(grant) if !is_replicated => {
                // Nothing ran. A caller that drops this future also stops the release. That is intended, because its
                // retry may own the grant by then. If the caller waits here, its next claim follows the release.
                drop(self.release(&claim.key, grant.owner).await);
                Err(failure::NOT_REPLICATED)
            }
            Decision::Replay(_) | Decision::NotStored if !is_replicated => Err(failure::NOT_REPLICATED),
            decision => Ok(decision),
        }
    }

    /// A claim that waits for replicas has no limit here, because it may also have to release the key.
    pub(super) fn claim_limit(&self) -> Option<Duration> {
        self.replication.is_none().then_some(self.response_timeout)
    }

    async fn ask(&self, claim: &Claim) -> Result<(Decision, bool), Error> {
        let Exchanged { reply, is_replicated } = self.asked(claim).await;
        let reply = reply.map_err(|failed| failed.read_by(failure::of_claim))?;
        Ok((decision(reply, claim)?, is_replicated))
    }

    fn asked(&self, claim: &Claim) -> impl Future<Output = Exchanged> + Send + use<> {
        let mut fingerprint = [claim.fingerprint.algorithm(); 33];
        fingerprint[1..].copy_from_slice(claim.fingerprint.digest());
        let if_lost: &[u8] = match claim.if_lost {
            IfLost::Execute => b"execute",
            IfLost::Recover => b"recover",
            IfLost::Refuse => b"refuse",
        };
        let (lease, retention) = (micros(claim.lease), micros(claim.retention));
        let max_attempts = claim.max_attempts.to_string();
        let arguments: [&[u8]; 7] = [
            &fingerprint,
            claim.nonce.as_bytes(),
            lease.as_bytes(),
            retention.as_bytes(),
            if_lost,
            max_attempts.as_bytes(),
            self.is_to_replicate(),
        ];
        // Each script that is sent waits for the replicas again, so only one is sent.
        let script = match self.replication {
            Some(_) => &scripts::CLAIM_WITHOUT_FLAGS,
            None => &scripts::CLAIM,
        };
        self.run(script, &claim.key, &arguments, true)
    }

    pub(super) async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        let (owner, lease) = (bytes_of(owner), micros(lease));
        let reply = self
            .run(&scripts::RENEW, key, &[&owner, lease.as_bytes()], false)
            .await
            .reply()?;
        match reply.word() {
            b"renewed" => Ok(Renewal::Renewed),
            b"superseded" => Ok(Renewal::Superseded),
            _ => Err(failure::STRANGE),
        }
    }

    pub(super) async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let owner = bytes_of(owner);
        let (state, retention) = (state_of(outcome), micros(retention));
        let answer = answer_of(outcome);
        let arguments: [&[u8]; 4] = [&owner, state, retention.as_bytes(), &answer];
        let exchanged = self.run(&scripts::COMPLETE, key, &arguments, true).await;
        let mut reply = exchanged.replicated_reply(b"completed")?;
        match reply.word() {
            b"completed" => Ok(Completion::Completed),
            b"superseded" => Ok(Completion::Superseded(outcome_in(&mut reply)?)),
            _ => Err(failure::STRANGE),
        }
    }

    pub(super) async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        let reply = self
            .run(&scripts::RELEASE, key, &[&bytes_of(owner)], false)
            .await
            .reply()?;
        match reply.word() {
            b"released" => Ok(Release::Released),
            b"superseded" => Ok(Release::Superseded),
            _ => Err(failure::STRANGE),
        }
    }

    pub(super) async fn resolve(
        &self,
        key: &StorageKey,
        fence: Fence,
        resolution: &Resolution,
    ) -> Result<ResolveResult, Error> {
        let fence = fence.as_u64().to_le_bytes();
        let (state, answer, retention): (&[u8], _, _) = match resolution {
            Resolution::Absent => (b"", Vec::new(), Duration::ZERO),
            Resolution::Completed(outcome, retention) => (state_of(outcome), answer_of(outcome), *retention),
        };
        let retention = micros(retention);
        let arguments: [&[u8]; 4] = [&fence, state, retention.as_bytes(), &answer];
        let exchanged = self.run(&scripts::RESOLVE, key, &arguments, true).await;
        let mut reply = exchanged.replicated_reply(b"resolved")?;
        match reply.word() {
            b"conflict" => Ok(ResolveResult::Conflict(reply.optional_number()?.map(Fence::new))),
            b"resolved" => Ok(ResolveResult::Resolved),
            _ => Err(failure::STRANGE),
        }
    }

    pub(super) async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let exchanged = self.run(&scripts::PEEK, key, &[self.is_to_replicate()], true).await;
        let is_replicated = exchanged.is_replicated;
        let mut reply = exchanged.reply()?;
        if reply.word() == b"absent" {
            return Ok(None);
        }
        let (record, now) = record_at(&mut reply)?;
        if record.is_completed() && !is_replicated {
            return Err(failure::NOT_REPLICATED);
        }
        Ok(Record::peek(Some(&record), now))
    }

    /// What a script that shows an answer is told.
    const fn is_to_replicate(&self) -> &'static [u8] {
        match self.replication {
            Some(_) => b"replicated",
            None => b"",
        }
    }

    pub(super) async fn watch(&self, key: &StorageKey) -> Result<RedisWatch, Error> {
        let Some(watches) = &self.watches else {
            return Ok(RedisWatch::never());
        };
        let channel = self.name_of(key);
        if self.checks.passed().is_none() {
            let checking = within(self.response_timeout, self.checks.check(&self.connection));
            Box::pin(checking).await.unwrap_or(Err(failure::LATE))?;
        }
        watches.watch(channel, &self.connection, self.response_timeout).await
    }

    /// Not async: the arguments need not outlast the command that they are put into.
    fn run(
        &self,
        script: &'static Script,
        key: &StorageKey,
        arguments: &[&[u8]],
        must_last: bool,
    ) -> impl Future<Output = Exchanged> + Send + use<> {
        let replication = self.replication.filter(|_| must_last);
        let name = self.name_of(key);
        let command = script.by_digest(&name, arguments);
        let connection = self.connection.clone();
        let checks = Arc::clone(&self.checks);
        connection.run(checks, script, name, command, replication, self.response_timeout)
    }

    /// The record's key, which is its channel too: the prefix and lower-case hexadecimal digits.
    fn name_of(&self, key: &StorageKey) -> Vec<u8> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut name = Vec::with_capacity(self.prefix.len() + 64);
        name.extend_from_slice(self.prefix.as_bytes());
        for byte in key.as_bytes() {
            name.push(DIGITS[usize::from(byte >> 4)]);
            name.push(DIGITS[usize::from(byte & 15)]);
        }
        name
    }
}

fn decision(mut reply: Reply, claim: &Claim) -> Result<Decision, Error> {
    match reply.word() {
        b"execute" => Ok(Decision::Execute(grant_in(&mut reply, claim)?)),
        b"recover" => Ok(Decision::Recover(grant_in(&mut reply, claim)?)),
        b"mismatch" => Ok(Decision::Mismatch),
        b"record" => {
            let (record, now) = record_at(&mut reply)?;
            let transition = Record::claim(Some(&record), claim, now);
            // The script would have changed what is to be changed.
            transition.unchanged().ok_or(failure::STRANGE)
        }
        b"unknown" => Ok(Decision::Unknown),
        b"wait" => Ok(Decision::Wait {
            left: Duration::from_micros(reply.number()?),
        }),
        _ => Err(failure::STRANGE),
    }
}

fn grant_in(reply: &mut Reply, claim: &Claim) -> Result<Grant, Error> {
    let fence = Fence::new(reply.number()?);
    let nonce = claim.nonce;
    Ok(Grant {
        owner: Owner { nonce, fence },
        attempt: u32::try_from(reply.number()?).map_err(|_| failure::STRANGE)?,
        lease: Some(claim.lease.min(LONGEST)),
    })
}

/// A record, and the time at which the server showed it.
fn record_at(reply: &mut Reply) -> Result<(Record, Timestamp), Error> {
    let now = Timestamp::from_micros(reply.number()?);
    let record = record_in(reply)?.ok_or(failure::STRANGE)?;
    Ok((record, now))
}

fn record_in(reply: &mut Reply) -> Result<Option<Record>, Error> {
    let bytes = reply.bytes()?;
    bytes.map(|bytes| Record::from_bytes(bytes.into())).transpose()
}

fn outcome_in(reply: &mut Reply) -> Result<Option<Outcome>, Error> {
    // At the beginning of time nothing has expired; whether it has by now, the server has judged.
    let snapshot = record_in(reply)?.and_then(|record| Record::peek(Some(&record), Timestamp::default()));
    Ok(snapshot.and_then(|snapshot| match snapshot.status {
        Status::Completed(outcome) => Some(outcome),
        _ => None,
    }))
}

/// Nonce and fence, as they stand in the record.
fn bytes_of(owner: Owner) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..16].copy_from_slice(owner.nonce.as_bytes());
    bytes[16..].copy_from_slice(&owner.fence.as_u64().to_le_bytes());
    bytes
}

/// The state's number in the record.
const fn state_of(outcome: &Outcome) -> &'static [u8] {
    match outcome {
        Outcome::Rejected => b"1",
        Outcome::Tombstone => b"2",
        Outcome::Stored(_) => b"3",
    }
}

/// What stands in the record behind its fixed part.
fn answer_of(outcome: &Outcome) -> Vec<u8> {
    match outcome {
        Outcome::Rejected | Outcome::Tombstone => Vec::new(),
        Outcome::Stored(StoredResponse { head, body }) => {
            let length = u32::try_from(head.len()).unwrap_or(u32::MAX).to_le_bytes();
            [&length[..], head, body].concat()
        }
    }
}

/// Whole microseconds, as digits.
fn micros(duration: Duration) -> String {
    duration.min(LONGEST).as_micros().to_string()
}
