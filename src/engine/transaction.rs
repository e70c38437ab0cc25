//! The end of work that completed its own record in a transaction.

use super::held_lease::HeldLease;
use super::job::{Absence, Ended, Job, Refused, Settled, Verdict, replayed};
use super::owner::TransactionEnd;
use crate::error::Error;
use crate::protocol::Outcome;
use crate::store::{AttemptEnd, Store};
use crate::telemetry::{self, Event};

const ROLLED_BACK: Error = Error::configuration(
    "the work completed its record in a transaction and reported success, but did not commit; commit before you return",
);

const UNKNOWN: Error =
    Error::store_unavailable("it is unknown whether the transaction was committed, until the store replies again");

impl<St: Store + Clone> Job<St> {
    /// Ends an attempt that may have completed its record in a transaction. Only the record shows
    /// whether the transaction was committed.
    pub(super) async fn after_transaction<G>(
        &self,
        lease: &HeldLease,
        ended: Result<Ended<G>, Refused>,
        absence: &Absence,
    ) -> Settled<G> {
        match self.owner(lease).transaction_end(self.settings.lease).await {
            TransactionEnd::Committed(outcome) => match ended {
                Ok(Ended {
                    output,
                    // A rejection does not undo a commit. The message is handled, and every copy is
                    // a duplicate.
                    verdict: Verdict::Store(_) | Verdict::StoreFailure(Outcome::Stored(_) | Outcome::Tombstone),
                }) => ran(output, Ok(())),
                _ => replayed(outcome),
            },
            TransactionEnd::RolledBack => self.rolled_back(lease, ended, absence).await,
            TransactionEnd::Superseded => {
                telemetry::event(Event::Superseded);
                self.await_new_owner(absence).await
            }
            TransactionEnd::Undecided(error) => self.undecided(lease, ended, error),
        }
    }

    /// Ends an attempt whose transaction was rolled back. A reported success becomes an error,
    /// because nothing was committed.
    async fn rolled_back<G>(
        &self,
        lease: &HeldLease,
        ended: Result<Ended<G>, Refused>,
        absence: &Absence,
    ) -> Settled<G> {
        telemetry::event(Event::RolledBack);
        match ended {
            Ok(Ended {
                output,
                verdict: Verdict::Store(_),
            }) => {
                self.owner(lease).release().await;
                ran(output, Err(ROLLED_BACK))
            }
            Ok(Ended {
                output,
                verdict: Verdict::StoreFailure(outcome),
            }) => {
                let completion = self.owner(lease).complete(&outcome, self.settings.retention).await;
                self.completed(completion, output, absence).await
            }
            ended => self.end_without_outcome(lease, ended, absence).await,
        }
    }

    /// Returns to the caller without knowing whether the transaction was committed. A task without
    /// a caller finds this out from the store, and records the end of the attempt after a rollback.
    /// Otherwise the attempt would count as lost when its lease is over.
    fn undecided<G>(&self, lease: &HeldLease, ended: Result<Ended<G>, Refused>, error: Error) -> Settled<G> {
        telemetry::failure(Event::Unrecorded, &error);
        self.owner(lease).resolve_later(&error, self.end_after_rollback(&ended));
        match ended {
            Ok(Ended { output, .. }) => ran(output, Err(UNKNOWN.with_source(error))),
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

const fn ran<G>(output: G, recorded: Result<(), Error>) -> Settled<G> {
    Settled::Ran { output, recorded }
}
