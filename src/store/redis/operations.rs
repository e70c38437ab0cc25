//! The operations of the store: the arguments and the replies of the scripts.

use std::sync::Arc;
use std::time::Duration;

use super::check::Checks;
use super::connection::{Connection, Exchanged, Replication};
use super::failure;
use super::scripts::{self, Reply, Script};
use super::watch::{RedisWatch, Watches};
use crate::clock::{Timestamp, within};
use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Grant, IfLost, Outcome, Owner, Record, Release, Renewal, Resolution,
    ResolveResult, Snapshot, Status, StorageKey, StoredResponse,
};

/// The longest lease and retention. The scripts count microseconds in doubles, which are exact
/// below 2^53. The sum of the time, a lease and a retention stays below this bound until the year
/// 2055.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// The server, and the settings of the store.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) connection: Connection,
    pub(super) checks: Arc<Checks>,
    pub(super) prefix: String,
    pub(super) response_timeout: Duration,
    pub(super) replication: Option<Replication>,
    /// The watches, if the server pushes to this connection.
    pub(super) watches: Option<Arc<Watches>>,
}

impl Server {
    /// Claims a key. Grants a key only if enough replicas have the claim, and returns a response
    /// only if enough replicas have it. Otherwise a failover could lose the grant or the response.
    pub(super) async fn claim(self: &Arc<Self>, claim: &Claim) -> Result<Decision, Error> {
        let (decision, is_replicated) = self.decide(claim).await?;
        match decision {
            Decision::Execute(grant) | Decision::Recover(grant) if !is_replicated => {
                // No handler runs. A caller that drops this future also stops the release. That is
                // intended, because its retry may own the grant by then. If the caller waits, its
                // next claim follows the release.
                drop(Arc::clone(self).release(claim.key, grant.owner).await);
                Err(failure::NOT_REPLICATED)
            }
            Decision::Replay(_) | Decision::NotStored if !is_replicated => Err(failure::NOT_REPLICATED),
            decision => Ok(decision),
        }
    }

    /// A claim that waits for replicas has no limit here, because it may also have to release the
    /// key.
    pub(super) fn claim_limit(&self) -> Option<Duration> {
        self.replication.is_none().then_some(self.response_timeout)
    }

    async fn decide(&self, claim: &Claim) -> Result<(Decision, bool), Error> {
        let Exchanged { reply, is_replicated } = self.run_claim(claim).await;
        let reply = reply.map_err(|failed| failed.read_by(failure::of_claim))?;
        Ok((decision(reply, claim)?, is_replicated))
    }

    fn run_claim(&self, claim: &Claim) -> impl Future<Output = Exchanged> + Send + use<> {
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
            self.replication_argument(),
        ];
        // Each script that is sent waits for the replicas again, so only one is sent.
        let script = match self.replication {
            Some(_) => &scripts::CLAIM_WITHOUT_FLAGS,
            None => &scripts::CLAIM,
        };
        self.run(script, &claim.key, &arguments, true)
    }

    // The operations that change a record own their arguments, because they continue when their
    // caller is gone.
    pub(super) async fn renew(
        self: Arc<Self>,
        key: StorageKey,
        owner: Owner,
        lease: Duration,
    ) -> Result<Renewal, Error> {
        let (owner, lease) = (bytes_of(owner), micros(lease));
        let reply = self
            .run(&scripts::RENEW, &key, &[&owner, lease.as_bytes()], false)
            .await
            .reply()?;
        match reply.word() {
            b"renewed" => Ok(Renewal::Renewed),
            b"superseded" => Ok(Renewal::Superseded),
            _ => Err(failure::UNEXPECTED_REPLY),
        }
    }

    pub(super) async fn complete(
        self: Arc<Self>,
        key: StorageKey,
        owner: Owner,
        outcome: Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let owner = bytes_of(owner);
        let (state, retention) = (state_of(&outcome), micros(retention));
        let response = bytes_behind_header(&outcome);
        let arguments: [&[u8]; 4] = [&owner, state, retention.as_bytes(), &response];
        let exchanged = self.run(&scripts::COMPLETE, &key, &arguments, true).await;
        let mut reply = exchanged.replicated_reply(b"completed")?;
        match reply.word() {
            b"completed" => Ok(Completion::Completed),
            b"superseded" => Ok(Completion::Superseded(outcome_in(&mut reply)?)),
            _ => Err(failure::UNEXPECTED_REPLY),
        }
    }

    pub(super) async fn release(self: Arc<Self>, key: StorageKey, owner: Owner) -> Result<Release, Error> {
        let reply = self
            .run(&scripts::RELEASE, &key, &[&bytes_of(owner)], false)
            .await
            .reply()?;
        match reply.word() {
            b"released" => Ok(Release::Released),
            b"superseded" => Ok(Release::Superseded),
            _ => Err(failure::UNEXPECTED_REPLY),
        }
    }

    pub(super) async fn resolve(
        self: Arc<Self>,
        key: StorageKey,
        fence: Fence,
        resolution: Resolution,
    ) -> Result<ResolveResult, Error> {
        let fence = fence.as_u64().to_le_bytes();
        let (state, response, retention): (&[u8], _, _) = match &resolution {
            Resolution::Absent => (b"", Vec::new(), Duration::ZERO),
            Resolution::Completed(outcome, retention) => (state_of(outcome), bytes_behind_header(outcome), *retention),
        };
        let retention = micros(retention);
        let arguments: [&[u8]; 4] = [&fence, state, retention.as_bytes(), &response];
        let exchanged = self.run(&scripts::RESOLVE, &key, &arguments, true).await;
        let mut reply = exchanged.replicated_reply(b"resolved")?;
        match reply.word() {
            b"conflict" => Ok(ResolveResult::Conflict(reply.optional_number()?.map(Fence::new))),
            b"resolved" => Ok(ResolveResult::Resolved),
            _ => Err(failure::UNEXPECTED_REPLY),
        }
    }

    pub(super) async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let exchanged = self
            .run(&scripts::PEEK, key, &[self.replication_argument()], true)
            .await;
        let is_replicated = exchanged.is_replicated;
        let mut reply = exchanged.reply()?;
        match reply.word() {
            b"absent" => return Ok(None),
            b"record" => {}
            _ => return Err(failure::UNEXPECTED_REPLY),
        }
        let (record, now) = record_at(&mut reply)?;
        if record.is_completed() && !is_replicated {
            return Err(failure::NOT_REPLICATED);
        }
        Ok(Record::peek(Some(&record), now))
    }

    /// Returns the argument by which a script that reads a response learns that replicas are
    /// required.
    const fn replication_argument(&self) -> &'static [u8] {
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
            Box::pin(checking).await.unwrap_or(Err(failure::TIMED_OUT))?;
        }
        watches.watch(channel, &self.connection, self.response_timeout).await
    }

    /// Runs a script. Not `async`, because that would store the arguments in the future although
    /// the command contains a copy of them.
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

    /// Returns the name of the record's key and channel: the prefix and 64 lower-case hexadecimal
    /// digits.
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
            // A change would have been made by the script.
            transition.unchanged().ok_or(failure::UNEXPECTED_REPLY)
        }
        b"unknown" => Ok(Decision::Unknown),
        b"wait" => Ok(Decision::Wait {
            left: Duration::from_micros(reply.number()?),
        }),
        _ => Err(failure::UNEXPECTED_REPLY),
    }
}

fn grant_in(reply: &mut Reply, claim: &Claim) -> Result<Grant, Error> {
    let fence = Fence::new(reply.number()?);
    let nonce = claim.nonce;
    Ok(Grant {
        owner: Owner { nonce, fence },
        attempt: u32::try_from(reply.number()?).map_err(|_| failure::UNEXPECTED_REPLY)?,
        lease: Some(claim.lease.min(LONGEST)),
    })
}

/// Reads a record, and the server's time at which it was read.
fn record_at(reply: &mut Reply) -> Result<(Record, Timestamp), Error> {
    let now = Timestamp::from_micros(reply.number()?);
    let record = record_in(reply)?.ok_or(failure::UNEXPECTED_REPLY)?;
    Ok((record, now))
}

fn record_in(reply: &mut Reply) -> Result<Option<Record>, Error> {
    let bytes = reply.bytes()?;
    bytes.map(|bytes| Record::from_bytes(bytes.into())).transpose()
}

fn outcome_in(reply: &mut Reply) -> Result<Option<Outcome>, Error> {
    // The script has already checked the expiry. Nothing has expired at time zero, so this reads
    // the outcome without another check.
    let snapshot = record_in(reply)?.and_then(|record| Record::peek(Some(&record), Timestamp::default()));
    Ok(snapshot.and_then(|snapshot| match snapshot.status {
        Status::Completed(outcome) => Some(outcome),
        _ => None,
    }))
}

/// Returns nonce and fence as the record encodes them.
fn bytes_of(owner: Owner) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..16].copy_from_slice(owner.nonce.as_bytes());
    bytes[16..].copy_from_slice(&owner.fence.as_u64().to_le_bytes());
    bytes
}

/// Returns the number of the state as the record encodes it.
const fn state_of(outcome: &Outcome) -> &'static [u8] {
    match outcome {
        Outcome::Rejected => b"1",
        Outcome::Tombstone => b"2",
        Outcome::Stored(_) => b"3",
    }
}

/// Returns the bytes that follow the header in the record.
fn bytes_behind_header(outcome: &Outcome) -> Vec<u8> {
    match outcome {
        Outcome::Rejected | Outcome::Tombstone => Vec::new(),
        Outcome::Stored(StoredResponse { head, body }) => {
            let length = u32::try_from(head.len()).unwrap_or(u32::MAX).to_le_bytes();
            [&length[..], head, body].concat()
        }
    }
}

/// Returns whole microseconds as decimal digits.
fn micros(duration: Duration) -> String {
    duration.min(LONGEST).as_micros().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_time_is_a_century() {
        let century = Duration::from_secs(100 * 365 * 86_400);
        assert_eq!(micros(Duration::from_millis(1_500)), "1500000");
        for duration in [century, century + Duration::from_secs(1), Duration::MAX] {
            assert_eq!(micros(duration), century.as_micros().to_string());
        }
    }
}
