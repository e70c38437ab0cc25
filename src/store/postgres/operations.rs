//! The operations of the store. Each is one statement. Rare cases of a claim or a completion take a
//! second one.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::PgConnection;

use super::ask::{Bound, Failed, Sending, Within};
use super::error::READ_ONLY;
use super::row::{Row, fence, fingerprint, if_lost, micros, outcome};
use super::table::{Statement, Statements};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::protocol::{
    Change, Claim, Completion, Decision, Fence, Outcome, Owner, Record, Release, Renewal, Resolution, ResolveResult,
    Snapshot, StorageKey, Transition,
};

/// The place of a completion.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Completing {
    /// The completion has a transaction of its own, and its owner may repeat it.
    Alone,
    /// The transaction includes an effect. A record that is already completed, even by this owner,
    /// has had its effect, so the result is [`Completion::Superseded`] and the caller rolls back
    /// (I3).
    WithEffect,
}

/// A connection with the statements for its table.
pub(super) struct Connection<'c> {
    pub(super) connection: &'c mut PgConnection,
    pub(super) sending: &'c Sending,
    pub(super) statements: &'c Statements,
    pub(super) within: Within,
}

impl<'q> Connection<'q> {
    /// Claims a key. If the claim fails after an earlier try was granted the key, reports an
    /// unknown fate, so that the store releases the key later.
    pub(super) async fn claim(&mut self, claim: &'q Claim) -> Result<Decision, Failed> {
        let mut was_granted = false;
        let claimed = self.claim_repeatedly(claim, &mut was_granted).await;
        claimed.map_err(|failed| match was_granted {
            true => Failed::unknown(failed.error),
            false => failed,
        })
    }

    /// Claims a key by the following steps.
    ///
    /// 1. The first try is `begin.sql`, which inserts the record of a free key. All later tries are
    ///    `claim.sql`.
    /// 2. Without a row, the statement has changed nothing, because another claim was committed
    ///    meanwhile. Try again.
    /// 3. If the statement has changed the record, the changed record is the decision. A lease
    ///    begins at a time that the statement reads before it waits for another transaction. So if
    ///    a grant is older than `AT_ONCE`, try again. The same nonce gets the same grant with a new
    ///    lease.
    /// 4. If the statement has changed nothing, the record that it shows is the decision, unless
    ///    the claim would change that record. Then try again, because `claim.sql` makes the change.
    async fn claim_repeatedly(&mut self, claim: &'q Claim, was_granted: &mut bool) -> Result<Decision, Failed> {
        const AT_ONCE: Duration = Duration::from_millis(10);
        let attempts = i32::try_from(claim.max_attempts).unwrap_or(i32::MAX);
        let lock_timeout = self.sending.lock_timeout(self.within);
        for tries in 0..TRIES {
            let bound = |statement: Bound<'q>| {
                let statement = statement
                    .bind(&claim.key.as_bytes()[..])
                    .bind(fingerprint(&claim.fingerprint))
                    .bind(&claim.nonce.as_bytes()[..])
                    .bind(micros(claim.lease))
                    .bind(micros(claim.retention));
                match tries {
                    0 => statement.bind(lock_timeout),
                    _ => statement.bind(if_lost(claim.if_lost)).bind(attempts).bind(lock_timeout),
                }
            };
            let text = match tries {
                0 => &self.statements.begin,
                _ => &self.statements.claim,
            };
            let rows = self.sending.ask(self.connection, self.within, text, bound).await?;
            // No row: another claim was committed since the statement began.
            let Some(row) = rows.first() else { continue };
            let Row {
                changed,
                seen,
                leased_for,
            } = Row::read(row).map_err(Failed::refused)?;
            match seen {
                Some((record, now)) if changed => {
                    let decision = record.decision(claim, now);
                    let is_granted = matches!(decision, Decision::Execute(_) | Decision::Recover(_));
                    if !is_granted || leased_for < AT_ONCE || tries + 1 == TRIES {
                        return Ok(decision);
                    }
                    *was_granted = true;
                }
                Some((record, now)) => {
                    if let Some(reply) = Record::claim(Some(&record), claim, now).unchanged() {
                        return Ok(reply);
                    }
                }
                None => {}
            }
        }
        Err(Failed::refused(CONTENDED))
    }

    pub(super) async fn renew(
        &mut self,
        key: &'q StorageKey,
        owner: Owner,
        lease: Duration,
    ) -> Result<Renewal, Failed> {
        let lock_timeout = self.sending.lock_timeout(self.within);
        let bound = |statement: Bound<'q>| {
            let statement = owned(statement, key, owner).bind(micros(lease));
            statement.bind(lock_timeout)
        };
        let transition = |record: Option<&Record>, now| Record::renew(record, owner, lease, now);
        self.change(&self.statements.renew, bound, Renewal::Renewed, transition)
            .await
    }

    pub(super) async fn complete(
        &mut self,
        key: &'q StorageKey,
        owner: Owner,
        ended: &'q Outcome,
        retention: Duration,
        completing: Completing,
    ) -> Result<Completion, Failed> {
        let transition = |record: Option<&Record>, now| {
            let mut transition = Record::complete(record, owner, ended, retention, now);
            let is_repeated =
                matches!(transition.change, Change::Unchanged) && matches!(transition.reply, Completion::Completed);
            if is_repeated && completing == Completing::WithEffect {
                let stands = record.and_then(Record::response).cloned();
                let stands = stands.map_or(Outcome::Tombstone, Outcome::Stored);
                transition.reply = Completion::Superseded(Some(stands));
            }
            transition
        };
        let (state, head, body) = outcome(ended);
        let lock_timeout = self.sending.lock_timeout(self.within);
        let bound = |statement: Bound<'q>| {
            let statement = owned(statement, key, owner).bind(state);
            let statement = statement.bind(head).bind(body).bind(micros(retention));
            statement.bind(lock_timeout)
        };
        let finish = &self.statements.finish;
        let finished = self.sending.ask(self.connection, self.within, finish, bound).await?;
        if !finished.is_empty() {
            return Ok(Completion::Completed);
        }
        let complete = &self.statements.complete;
        self.change(complete, bound, Completion::Completed, transition).await
    }

    pub(super) async fn release(&mut self, key: &'q StorageKey, owner: Owner) -> Result<Release, Failed> {
        let lock_timeout = self.sending.lock_timeout(self.within);
        let bound = |statement: Bound<'q>| owned(statement, key, owner).bind(lock_timeout);
        let transition = |record: Option<&Record>, now| Record::release(record, owner, now);
        self.change(&self.statements.release, bound, Release::Released, transition)
            .await
    }

    pub(super) async fn resolve(
        &mut self,
        key: &'q StorageKey,
        expected: Fence,
        resolution: &'q Resolution,
    ) -> Result<ResolveResult, Failed> {
        let ((state, head, body), retention) = match resolution {
            Resolution::Absent => ((-1, None, None), Duration::ZERO),
            Resolution::Completed(ended, retention) => (outcome(ended), *retention),
        };
        let lock_timeout = self.sending.lock_timeout(self.within);
        let bound = |statement: Bound<'q>| {
            let statement = statement.bind(&key.as_bytes()[..]);
            let statement = statement.bind(fence(expected)).bind(state);
            let statement = statement.bind(head).bind(body).bind(micros(retention));
            statement.bind(lock_timeout)
        };
        let transition = |record: Option<&Record>, now| Record::resolve(record, expected, resolution, now);
        self.change(&self.statements.resolve, bound, ResolveResult::Resolved, transition)
            .await
    }

    pub(super) async fn peek(&mut self, key: &'q StorageKey) -> Result<Option<Snapshot>, Failed> {
        let bound = |statement: Bound<'q>| statement.bind(&key.as_bytes()[..]);
        let row = self.ask(&self.statements.peek, bound).await?;
        // A standby refuses all other operations by itself, because they are writes.
        if row.try_get("standby").unwrap_or(true) {
            return Err(Failed::refused(READ_ONLY));
        }
        let seen = Row::read(&row).map_err(Failed::refused)?.seen;
        Ok(seen.and_then(|(record, now)| Record::peek(Some(&record), now)))
    }

    pub(super) async fn watch(&mut self, key: &'q StorageKey) -> Result<(), Failed> {
        let bound = |statement: Bound<'q>| statement.bind(&key.as_bytes()[..]);
        self.ask(&self.statements.watch, bound).await.map(drop)
    }

    /// Deletes at most `limit` expired rows, and returns their number.
    pub(super) async fn sweep(&mut self, limit: i64) -> Result<u64, Failed> {
        let row = self
            .ask(&self.statements.sweep, |statement| statement.bind(limit))
            .await?;
        let swept: i64 = row.try_get("swept").unwrap_or(0);
        Ok(u64::try_from(swept).unwrap_or(0))
    }

    /// Runs a statement that changes the record or shows why it does not. The statement shows the
    /// record as it was before, but may compare a newer one when it locks the row. So if the shown
    /// record would permit the change, the statement is repeated.
    async fn change<R>(
        &mut self,
        text: &Statement,
        bound: impl Fn(Bound<'q>) -> Bound<'q> + Send + Sync,
        reply: R,
        transition: impl Fn(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> Result<R, Failed> {
        for _ in 0..TRIES {
            let row = self.ask(text, &bound).await?;
            let Row { changed, seen, .. } = Row::read(&row).map_err(Failed::refused)?;
            if changed {
                return Ok(reply);
            }
            let (record, now) = match &seen {
                Some((record, now)) => (Some(record), *now),
                None => (None, Timestamp::default()),
            };
            if let Some(reply) = transition(record, now).unchanged() {
                return Ok(reply);
            }
        }
        Err(Failed::refused(CONTENDED))
    }

    async fn ask(
        &mut self,
        text: &Statement,
        bound: impl Fn(Bound<'q>) -> Bound<'q> + Send + Sync,
    ) -> Result<sqlx::postgres::PgRow, Failed> {
        self.sending.ask_one(self.connection, self.within, text, bound).await
    }
}

/// How often a statement is repeated because other claims changed the row first. More than two
/// tries are rare, because each failed try means that another transaction has succeeded.
const TRIES: usize = 64;

const CONTENDED: Error =
    Error::store_unavailable("other transactions changed the record again and again during the operation; try again");

/// Binds the key and its owner.
fn owned<'q>(statement: Bound<'q>, key: &'q StorageKey, owner: Owner) -> Bound<'q> {
    statement
        .bind(&key.as_bytes()[..])
        .bind(owner.nonce.as_bytes().to_vec())
        .bind(fence(owner.fence))
}
