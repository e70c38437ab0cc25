//! The end of work that completed its own record in a transaction.

use super::job::{replayed, Absence, Ended, Job, Refused, Settled, Verdict};
use super::owner::TransactionEnd;
use crate::error::{Error, ErrorKind};
use crate::protocol::{Outcome, Owner};
use crate::store::{AttemptEnd, Store};
use crate::telemetry::{self, Event};

const ROLLED_BACK: Error = Error::new(
    ErrorKind::Configuration,
    "what recorded itself in a transaction said that it was done, and the transaction was not committed; commit it first",
);

const UNKNOWN: Error = Error::new(
    ErrorKind::StoreUnavailable,
    "whether the transaction was committed cannot be found out now",
);

impl<St: Store + Clone> Job<St> {
    pub(super) async fn after_transaction<G>(
        &self,
        owner: Owner,
        ended: Result<Ended<G>, Refused>,
        absence: &Absence,
    ) -> Settled<G> {
        match self.owner(owner).transaction_end(self.settings.lease).await {
            TransactionEnd::Committed(outcome) => match ended {
                Ok(Ended {
                    given,
                    // A rejection does not undo a commit. The message is handled, and every copy is a duplicate.
                    verdict: Verdict::Store(_) | Verdict::StoreFailure(Outcome::Stored(_) | Outcome::Tombstone),
                }) => ran(given, Ok(())),
                _ => replayed(outcome),
            },
            TransactionEnd::RolledBack => self.rolled_back(owner, ended, absence).await,
            TransactionEnd::Superseded => {
                telemetry::event(Event::Superseded);
                self.stand_by(absence).await
            }
            TransactionEnd::Undecided(error) => self.undecided(owner, ended, error),
        }
    }

    async fn rolled_back<G>(&self, owner: Owner, ended: Result<Ended<G>, Refused>, absence: &Absence) -> Settled<G> {
        telemetry::event(Event::RolledBack);
        match ended {
            Ok(Ended {
                given,
                verdict: Verdict::Store(_),
            }) => {
                self.owner(owner).release().await;
                ran(given, Err(ROLLED_BACK))
            }
            Ok(Ended {
                given,
                verdict: Verdict::StoreFailure(outcome),
            }) => {
                let completion = self.owner(owner).complete(&outcome, self.settings.retention).await;
                self.completed(completion, given, absence).await
            }
            ended => self.unkept(owner, ended, absence).await,
        }
    }

    /// The caller leaves without knowing whether the transaction was committed. A task keeps asking the store, and
    /// records the end of the attempt after a rollback. Otherwise the attempt would count as lost when its lease is
    /// over.
    fn undecided<G>(&self, owner: Owner, ended: Result<Ended<G>, Refused>, error: Error) -> Settled<G> {
        telemetry::failure(Event::Unrecorded, &error);
        self.owner(owner).resolve_later(&error, self.end_after_rollback(&ended));
        match ended {
            Ok(Ended { given, .. }) => ran(given, Err(UNKNOWN.with_source(error))),
            Err(refused) => Settled::Refused(refused),
        }
    }

    /// Returns the end that [`rolled_back`](Self::rolled_back) records.
    fn end_after_rollback<G>(&self, ended: &Result<Ended<G>, Refused>) -> AttemptEnd {
        match ended.as_ref().map(|ended| &ended.verdict) {
            Ok(Verdict::Store(_) | Verdict::Release) => AttemptEnd::Released,
            Ok(Verdict::StoreFailure(outcome)) => AttemptEnd::completed(outcome, self.settings.retention),
            Ok(Verdict::GiveUp) | Err(_) => AttemptEnd::GivenUp,
        }
    }
}

const fn ran<G>(given: G, recorded: Result<(), Error>) -> Settled<G> {
    Settled::Ran { given, recorded }
}
