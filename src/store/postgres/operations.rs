//! The operations, each one statement; what seldom happens to a claim or a completion takes a second.

use std::time::Duration;

use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use sqlx::{Postgres, Row as _};

use super::error::{failed, READ_ONLY};
use super::row::{fence, fingerprint, if_lost, micros, outcome, Row};
use super::table::{Statement, Statements};
use crate::clock::Timestamp;
use crate::error::{Error, ErrorKind};
use crate::protocol::{
    Change, Claim, Completion, Decision, Fence, Outcome, Owner, Record, Release, Renewal, Resolution, Resolved,
    Snapshot, StorageKey, Transition,
};

/// A connection with the statements for its table.
pub(super) struct Connection<'c> {
    pub(super) connection: &'c mut PgConnection,
    pub(super) statements: &'c Statements,
}

type Bound<'q> = Query<'q, Postgres, PgArguments>;

impl Connection<'_> {
    /// Waits for so long for a transaction that has a record locked which the claim would change, or for as long as it takes.
    pub(super) async fn claim(&mut self, claim: &Claim, lock_timeout: Option<Duration>) -> Result<Decision, Error> {
        let attempts = i32::try_from(claim.max_attempts).unwrap_or(i32::MAX);
        for attempt in 0..TRIES {
            let is_first = attempt == 0;
            let text = if is_first {
                &self.statements.begin
            } else {
                &self.statements.claim
            };
            let mut statement = prepared(text)
                .bind(&claim.key.as_bytes()[..])
                .bind(fingerprint(&claim.fingerprint))
                .bind(&claim.nonce.as_bytes()[..])
                .bind(micros(claim.lease))
                .bind(micros(claim.retention));
            if !is_first {
                let lock_timeout =
                    lock_timeout.map(|timeout| format!("{}ms", timeout.as_millis().clamp(1, 86_400_000)));
                statement = statement.bind(if_lost(claim.if_lost)).bind(attempts).bind(lock_timeout);
            }
            let Some(Row { changed, seen }) = self.ask(statement).await? else {
                continue;
            };
            match seen {
                Some((record, now)) if changed => return Ok(record.decision(claim, now)),
                Some((record, now)) => {
                    if let Some(reply) = Record::claim(Some(&record), claim, now).unchanged() {
                        return Ok(reply);
                    }
                }
                None => {}
            }
        }
        Err(CONTENDED)
    }

    pub(super) async fn renew(&mut self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        let bound = |statements: &Statements| owned(&statements.renew, key, owner).bind(micros(lease));
        let transition = |record: Option<&Record>, now| Record::renew(record, owner, lease, now);
        self.change(bound, Renewal::Renewed, transition).await
    }

    /// Completes in a transaction that an effect is a part of: what is completed already, even by this owner, has had its effect.
    pub(super) async fn complete_once(
        &mut self,
        key: &StorageKey,
        owner: Owner,
        ended: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let transition = |record: Option<&Record>, now| {
            let mut transition = Record::complete(record, owner, ended, retention, now);
            if let (Change::Keep, Completion::Completed) = (&transition.change, &transition.reply) {
                let stands = record.and_then(Record::answer).cloned();
                let stands = stands.map_or(Outcome::Tombstone, Outcome::Kept);
                transition.reply = Completion::Superseded(Some(stands));
            }
            transition
        };
        self.completed_by(key, owner, ended, retention, transition).await
    }

    pub(super) async fn complete(
        &mut self,
        key: &StorageKey,
        owner: Owner,
        ended: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let transition = |record: Option<&Record>, now| Record::complete(record, owner, ended, retention, now);
        self.completed_by(key, owner, ended, retention, transition).await
    }

    async fn completed_by(
        &mut self,
        key: &StorageKey,
        owner: Owner,
        ended: &Outcome,
        retention: Duration,
        transition: impl Fn(Option<&Record>, Timestamp) -> Transition<Completion>,
    ) -> Result<Completion, Error> {
        let (state, head, body) = outcome(ended);
        let bound_to = |text: &Statement| {
            let statement = owned(text, key, owner).bind(state);
            statement
                .bind(head.map(<[u8]>::to_vec))
                .bind(body.map(<[u8]>::to_vec))
                .bind(micros(retention))
        };
        if self.ask(bound_to(&self.statements.finish)).await?.is_some() {
            return Ok(Completion::Completed);
        }
        let bound = |statements: &Statements| bound_to(&statements.complete);
        self.change(bound, Completion::Completed, transition).await
    }

    pub(super) async fn release(&mut self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        let bound = |statements: &Statements| owned(&statements.release, key, owner);
        let transition = |record: Option<&Record>, now| Record::release(record, owner, now);
        self.change(bound, Release::Released, transition).await
    }

    pub(super) async fn resolve(
        &mut self,
        key: &StorageKey,
        expected: Fence,
        resolution: &Resolution,
    ) -> Result<Resolved, Error> {
        let ((state, head, body), retention) = match resolution {
            Resolution::Absent => ((-1, None, None), Duration::ZERO),
            Resolution::Completed(ended, retention) => (outcome(ended), *retention),
        };
        let bound = |statements: &Statements| {
            let statement = prepared(&statements.resolve).bind(key.as_bytes().to_vec());
            let statement = statement.bind(fence(expected)).bind(state);
            statement
                .bind(head.map(<[u8]>::to_vec))
                .bind(body.map(<[u8]>::to_vec))
                .bind(micros(retention))
        };
        let transition = |record: Option<&Record>, now| Record::resolve(record, expected, resolution, now);
        self.change(bound, Resolved::Resolved, transition).await
    }

    pub(super) async fn peek(&mut self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let statement = prepared(&self.statements.peek).bind(&key.as_bytes()[..]);
        let row = statement.fetch_one(&mut *self.connection).await.map_err(failed)?;
        // The other operations are writes, which a standby refuses.
        if row.try_get("standby").map_err(failed)? {
            return Err(READ_ONLY);
        }
        let seen = Row::read(&row)?.seen;
        Ok(seen.and_then(|(record, now)| Record::peek(Some(&record), now)))
    }

    pub(super) async fn watch(&mut self, key: &StorageKey) -> Result<(), Error> {
        let statement = prepared(&self.statements.watch).bind(&key.as_bytes()[..]);
        statement.execute(&mut *self.connection).await.map_err(failed)?;
        Ok(())
    }

    /// A statement that changes the record or does not, and shows what it saw. The two may disagree: what is seen is from
    /// before the statement, what is changed may be newer. Then it is asked again.
    async fn change<R>(
        &mut self,
        bound: impl Fn(&Statements) -> Bound<'static>,
        reply: R,
        transition: impl Fn(Option<&Record>, Timestamp) -> Transition<R>,
    ) -> Result<R, Error> {
        for _ in 0..TRIES {
            let Some(Row { changed, seen }) = self.ask(bound(self.statements)).await? else {
                continue;
            };
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
        Err(CONTENDED)
    }

    async fn ask(&mut self, statement: Bound<'_>) -> Result<Option<Row>, Error> {
        let row = statement.fetch_optional(&mut *self.connection).await.map_err(failed)?;
        row.as_ref().map(Row::read).transpose()
    }
}

/// How often a statement is repeated that others got ahead of. Each time somebody else has changed the row, so one is seldom
/// repeated twice.
const TRIES: usize = 64;

const CONTENDED: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "a record was changed by others again and again while it was asked for; repeat the request",
);

fn prepared<'q>(statement: &Statement) -> Bound<'q> {
    sqlx::query(statement.safe())
}

fn owned<'q>(statement: &Statement, key: &StorageKey, owner: Owner) -> Bound<'q> {
    prepared(statement)
        .bind(key.as_bytes().to_vec())
        .bind(owner.nonce.as_bytes().to_vec())
        .bind(fence(owner.fence))
}
