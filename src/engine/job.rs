//! One job, done once: the claim, the check, the run and the record.
//!
//! The caller polls the job in place. If the caller leaves, the rest of the job continues in a task
//! of its own, and the outcome of a run that has begun is recorded.

use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use futures::future::{Either, select};

use super::attempt::{Attempt, Recovered};
use super::claim::{ClaimError, Claimer};
use super::held_lease::HeldLease;
use super::job_leases::{JobGuard, JobLeases};
use super::owner::{KeyOwner, Ownership};
use super::settings::EngineSettings;
use super::waiting::{Waited, Waiter, await_owner};
use crate::catch_panic::catch_panic;
use crate::clock::{Deadline, Stopwatch, sleep};
use crate::detach::{TaskTracker, detach_on_drop};
use crate::error::Error;
use crate::protocol::{
    Completion, Decision, Fingerprint, IfLost, Nonce, Outcome, Snapshot, Status, StorageKey, StoredResponse,
};
use crate::store::{LostClaim, MANY_LOST_CLAIMS, Store, claim_with_timeout};
use crate::telemetry::{self, Event};

pub(crate) const NO_RUNTIME: Error =
    Error::configuration("one-time calls and deliveries need a tokio runtime; start them within one");

const FORGOTTEN: Error = Error::superseded(
    "another attempt took the key over, and its record is gone from the store; find out whether the effect happened",
);

/// The work of a job: the call, and the check of a lost attempt.
pub(crate) trait Work: Send + 'static {
    /// The output of a run for its caller.
    type Output: Send + 'static;

    /// Gives back the capacity that the client or the handler has reserved for this work, because
    /// the job begins to wait for another owner of the key.
    fn give_readiness_back(&mut self) {}

    /// Reserves capacity again after the wait. Returns whether there is capacity.
    fn get_ready(&mut self) -> impl Future<Output = bool> + Send {
        std::future::ready(true)
    }

    /// Checks whether a lost attempt took effect.
    fn check(&mut self, attempt: &Attempt) -> impl Future<Output = Recovered<Ended<Self::Output>>> + Send;

    /// Makes the call.
    fn run(self, attempt: Attempt) -> impl Future<Output = Ended<Self::Output>> + Send;
}

/// The end of a run: its output, and its effect on the key.
pub(crate) struct Ended<G> {
    pub(crate) output: G,
    pub(crate) verdict: Verdict,
}

/// The effect of a run on its key.
pub(crate) enum Verdict {
    /// It is unknown whether the run took effect, so the attempt counts as lost.
    GiveUp,
    /// The run took effect.
    Store(Outcome),
    /// The run failed, and must not be repeated. After [`Outcome::Rejected`], an operator can allow
    /// another run.
    StoreFailure(Outcome),
    /// The run had no effect, so the key becomes free.
    Release,
}

/// The result of a job.
pub(crate) enum Settled<G> {
    /// The work ran in this job, or the check found that a lost attempt took effect. `recorded` is
    /// the error if the store could not record the outcome.
    Ran { output: G, recorded: Result<(), Error> },
    /// The work did not run, or its output must not be returned.
    Refused(Refused),
    /// The work ran before, and this is the stored response.
    Replay(StoredResponse),
}

/// The reason why the work did not run, or why its output must not be returned.
pub(crate) enum Refused {
    InFlight(Duration),
    Mismatch,
    NotStored,
    NotRun(Error),
    /// The check of a lost attempt could not decide. The next attempt runs the check again.
    Undecided,
    Unknown,
    /// The work ran, another attempt took the key over, and the outcome of that attempt cannot be
    /// read.
    Unread(Error),
}

/// The result of a claim, and of the wait for another owner.
enum Claimed<G> {
    Granted(Granted),
    Settled(Settled<G>),
}

/// The grant of a key.
struct Granted {
    lease: HeldLease,
    /// Whether the call may be made without a check of an earlier attempt.
    is_first: bool,
}

/// A job: a key, the fingerprint of its input, and the settings of the layer.
pub(crate) struct Job<St> {
    pub(crate) store: St,
    pub(crate) key: StorageKey,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) settings: EngineSettings,
    pub(crate) tracker: Arc<TaskTracker>,
    /// The leases that are renewed together with the lease of this job.
    pub(crate) leases: Arc<JobLeases>,
}

impl<St: Store + Clone> Job<St> {
    /// Does the work once, or returns the outcome that is recorded already.
    pub(crate) async fn settle<W: Work>(self, work: W) -> Settled<W::Output> {
        if let Err(overloaded) = self.settings.check_load(&self.tracker) {
            telemetry::event(Event::Overloaded);
            return Settled::Refused(Refused::NotRun(overloaded));
        }
        let tracker = Arc::clone(&self.tracker);
        if tracker.has_many_lost_claims() {
            return Settled::Refused(Refused::NotRun(MANY_LOST_CLAIMS));
        }
        // Declared first so that it drops last, after abandoned work has been handed to the
        // tracker.
        let _attended = tracker.attend();
        let (caller, absence) = Caller::new();
        let Some(driven) = detach_on_drop(self.drive(work, absence), Some(Arc::clone(&tracker))) else {
            return Settled::Refused(Refused::NotRun(NO_RUNTIME));
        };
        let driven = pin!(driven);
        // Declared last so that it drops first. The abandoned work then sees at its next poll that
        // the caller is gone.
        let _caller = caller;
        driven.await
    }

    async fn drive<W: Work>(self, mut work: W, absence: Absence) -> Settled<W::Output> {
        match self.claim(&mut work, &absence).await {
            Claimed::Granted(granted) => {
                // Nothing has run and the caller is gone, so do not start.
                if absence.is_true() {
                    self.owner(&granted.lease).release().await;
                    return Settled::Refused(Refused::InFlight(Duration::ZERO));
                }
                self.own(granted, work, &absence).await
            }
            Claimed::Settled(settled) => settled,
        }
    }

    /// Claims the key, and waits while another owner has it.
    async fn claim<W: Work>(&self, work: &mut W, absence: &Absence) -> Claimed<W::Output> {
        let deadline = Deadline::after(self.settings.wait);
        // All claims of this job share the nonce, so that the store makes at most one grant (I1).
        let nonce = Nonce::random();
        // The first claim comes before any wait, so the deadline does not limit it.
        let mut waiting = None;
        let mut lost = None;
        // The rest of the owner's lease, as the last claim has seen it.
        let mut seen = Duration::ZERO;
        loop {
            let since_claim = Stopwatch::start();
            let decision = match self.claim_once(nonce, waiting, &mut lost).await {
                Ok(decision) => decision,
                Err(ClaimError::TimeUp) => return Claimed::refused(Refused::InFlight(self.worth_waiting(seen))),
                Err(ClaimError::Failed(error)) => return Claimed::refused(Refused::NotRun(error)),
            };
            if matches!(decision, Decision::Execute(_) | Decision::Recover(_)) {
                // The key has an owner now, so a lost claim of this job must not be released.
                if let Some(lost) = lost.take() {
                    lost.granted();
                }
            }
            let granted = |grant, is_first| {
                Claimed::Granted(Granted {
                    lease: HeldLease::new(grant, || since_claim),
                    is_first,
                })
            };
            let refused = match decision {
                Decision::Execute(grant) => return granted(grant, true),
                Decision::Recover(grant) => return granted(grant, false),
                Decision::Replay(response) => return Claimed::Settled(Settled::Replay(response)),
                Decision::Mismatch => Refused::Mismatch,
                Decision::NotStored => Refused::NotStored,
                Decision::Unknown => Refused::Unknown,
                Decision::Wait { left } if deadline.left().is_zero() => Refused::InFlight(self.worth_waiting(left)),
                Decision::Wait { left } => {
                    seen = left;
                    let ours = lost.as_ref().map(|_| nonce);
                    match attended(absence, self.wait(work, ours, left, deadline)).await {
                        Some(None) => {}
                        Some(Some(settled)) => return Claimed::Settled(settled),
                        None => return Claimed::refused(Refused::InFlight(self.worth_waiting(left))),
                    }
                    waiting = Some(deadline);
                    continue;
                }
            };
            return Claimed::refused(refused);
        }
    }

    /// Waits while another owner has the key. Holds no capacity meanwhile, so that calls with other
    /// keys can use the client or the handler. Returns `None` if this job must claim again. The work
    /// is ready then.
    async fn wait<W: Work>(
        &self,
        work: &mut W,
        ours: Option<Nonce>,
        left: Duration,
        deadline: Deadline,
    ) -> Option<Settled<W::Output>> {
        work.give_readiness_back();
        let waiter = |needs_capacity| ClaimWaiter {
            job: self,
            ours,
            left,
            needs_capacity,
            output: PhantomData,
        };
        let (store, timeout) = (&self.store, self.settings.store_timeout);
        match await_owner(store, &self.key, timeout, deadline, waiter(false)).await {
            Waited::Seen(Next::Settled(settled)) => return Some(settled),
            Waited::TimeUp(waiter) => {
                let left = self.worth_waiting(waiter.left);
                return Some(Settled::Refused(Refused::InFlight(left)));
            }
            // After a failure of the store, the next claim reports it.
            Waited::Seen(Next::Claim) | Waited::Failed(_) | Waited::LastLookFailed(_) => {}
        }
        // Get ready before the claim. After the claim, a busy client or handler would keep the key
        // from other processes. Look at the record meanwhile, because another job may run.
        let looking = pin!(await_owner(store, &self.key, timeout, deadline, waiter(true)));
        let refused = match select(pin!(work.get_ready()), looking).await {
            Either::Left((true, _)) => return None,
            Either::Right((Waited::Seen(Next::Settled(settled)), _)) => return Some(settled),
            Either::Right((Waited::Failed(error), _)) => Refused::NotRun(error),
            Either::Right((Waited::TimeUp(waiter), _)) => Refused::InFlight(self.worth_waiting(waiter.left)),
            _ => Refused::InFlight(Duration::ZERO),
        };
        Some(Settled::Refused(refused))
    }

    /// Caps a suggested retry delay at one lease, because an in-process store reports an endless
    /// lease.
    fn worth_waiting(&self, left: Duration) -> Duration {
        left.min(self.settings.lease)
    }

    /// Claims the key, and repeats the claim once if the store fails.
    async fn claim_once(
        &self,
        nonce: Nonce,
        wait: Option<Deadline>,
        lost: &mut Option<Box<LostClaim>>,
    ) -> Result<Decision, ClaimError> {
        let claim = self.settings.claim(self.key, self.fingerprint, nonce);
        let claimer = Claimer {
            store: &self.store,
            settings: &self.settings,
            tracker: &self.tracker,
            wait,
        };
        match claim_with_timeout(claimer.limit(), &self.store, &claim).await {
            Ok(decision) => Ok(decision),
            Err(error) => claimer.again(&claim, error, lost).await,
        }
    }

    /// Runs the work as the owner of the key: checks a lost attempt, runs, and records the end.
    async fn own<W: Work>(&self, granted: Granted, mut work: W, absence: &Absence) -> Settled<W::Output> {
        let Granted { lease, is_first } = granted;
        let attempt = Attempt::new(self.key, self.fingerprint, lease);
        let lease = attempt.lease();
        let timeout = self.settings.store_timeout;
        let mut guard = JobGuard::begin(&self.store, timeout, &self.leases, &self.tracker, &attempt);
        let found = if is_first {
            Recovered::NotHappened
        } else {
            guard.during(self.check_lost_attempt(&mut work, &attempt)).await
        };
        let ended = match found {
            Recovered::Happened(ended) => {
                drop(work);
                Ok(ended)
            }
            Recovered::NotHappened if absence.is_true() => {
                // The check found no effect, but the caller is gone, so do not start.
                drop(work);
                self.owner(lease).release().await;
                guard.end();
                return Settled::Refused(Refused::InFlight(Duration::ZERO));
            }
            Recovered::NotHappened => {
                let ended = guard.during(catch_panic(work.run(attempt.clone()))).await;
                ended.map_err(|_| Refused::Unknown)
            }
            Recovered::Unknown => {
                drop(work);
                Err(match attempt.number() < self.settings.max_attempts {
                    true => Refused::Undecided,
                    false => Refused::Unknown,
                })
            }
        };
        #[cfg(feature = "postgres")]
        if lease.transaction.has_begun() {
            // The handler may not know whether its transaction was committed. Only the record shows
            // whether it was committed.
            let settled = self.after_transaction(lease, ended, absence).await;
            guard.end();
            return settled;
        }
        if let Ok(Ended {
            verdict: Verdict::Store(outcome) | Verdict::StoreFailure(outcome),
            output,
        }) = ended
        {
            let completion = self.owner(lease).complete(&outcome, self.settings.retention).await;
            guard.end();
            return self.completed(completion, output, absence).await;
        }
        let settled = self.end_without_outcome(lease, ended, absence).await;
        guard.end();
        settled
    }

    /// Ends an attempt that has no outcome to store. Frees its key, or ends its lease if it is
    /// unknown whether the attempt took effect.
    pub(super) async fn end_without_outcome<G>(
        &self,
        lease: &HeldLease,
        ended: Result<Ended<G>, Refused>,
        absence: &Absence,
    ) -> Settled<G> {
        let ownership = match &ended {
            Ok(Ended {
                verdict: Verdict::Release,
                ..
            }) => self.owner(lease).release().await,
            _ => self.owner(lease).give_up().await,
        };
        if ownership == Ownership::Superseded {
            telemetry::event(Event::Superseded);
            return self.await_new_owner(absence).await;
        }
        match ended {
            Ok(Ended { output, .. }) => Settled::Ran {
                output,
                recorded: Ok(()),
            },
            Err(refused) => Settled::Refused(refused),
        }
    }

    /// Checks whether the lost attempt took effect, after the settle delay. A check that panics
    /// counts as undecided.
    async fn check_lost_attempt<W: Work>(&self, work: &mut W, attempt: &Attempt) -> Recovered<Ended<W::Output>> {
        sleep(self.settings.settle_delay).await;
        catch_panic(work.check(attempt)).await.unwrap_or(Recovered::Unknown)
    }

    /// Returns the result of a run after its completion. If another attempt took the key over,
    /// discards the output and waits for the recorded outcome (I2).
    pub(super) async fn completed<G>(
        &self,
        completion: Result<Completion, Error>,
        output: G,
        absence: &Absence,
    ) -> Settled<G> {
        let recorded = match completion {
            Ok(Completion::Completed) => Ok(()),
            // The outcome that superseded this attempt may belong to another input, so read the
            // record and compare its fingerprint (I4).
            Ok(Completion::Superseded(_)) => {
                telemetry::event(Event::Superseded);
                return self.await_new_owner(absence).await;
            }
            Err(error) => {
                telemetry::failure(Event::Unrecorded, &error);
                Err(error)
            }
        };
        Settled::Ran { output, recorded }
    }

    /// Waits for the outcome of the attempt that took the key over. This attempt discards its own
    /// output, and its caller gets the recorded outcome (I2). The wait may take its full time,
    /// regardless of how long the caller waited before its own claim. It ends when the caller
    /// leaves, because nobody receives the outcome then.
    pub(super) async fn await_new_owner<G>(&self, absence: &Absence) -> Settled<G> {
        if absence.is_true() {
            return Settled::Refused(Refused::InFlight(Duration::ZERO));
        }
        let waiter = SupersededWaiter {
            job: self,
            left: Duration::ZERO,
            output: PhantomData,
        };
        let timeout = self.settings.store_timeout;
        let deadline = Deadline::after(self.settings.wait);
        let waiting = await_owner(&self.store, &self.key, timeout, deadline, waiter);
        let Some(waited) = attended(absence, waiting).await else {
            return Settled::Refused(Refused::InFlight(Duration::ZERO));
        };
        match waited {
            Waited::Seen(settled) => settled,
            Waited::TimeUp(waiter) => Settled::Refused(Refused::InFlight(self.worth_waiting(waiter.left))),
            Waited::Failed(error) | Waited::LastLookFailed(error) => Settled::Refused(Refused::Unread(error)),
        }
    }

    pub(super) fn owner<'j>(&'j self, lease: &'j HeldLease) -> KeyOwner<'j, St> {
        KeyOwner {
            store: &self.store,
            key: &self.key,
            lease,
            retry: self.settings.retry(),
            tracker: &self.tracker,
        }
    }
}

impl<G> Claimed<G> {
    const fn refused(refused: Refused) -> Self {
        Self::Settled(Settled::Refused(refused))
    }
}

/// A job that waits to claim a key.
struct ClaimWaiter<'j, St, G> {
    job: &'j Job<St>,
    /// The nonce of a claim of this job that got no reply. If the store grants that claim later, the
    /// next claim gets the same grant.
    ours: Option<Nonce>,
    /// The rest of the owner's lease. Zero if the key is free.
    left: Duration,
    /// Whether the job needs capacity before it can claim a free key.
    needs_capacity: bool,
    output: PhantomData<fn() -> G>,
}

/// The end of a wait for another owner.
enum Next<G> {
    /// The store grants the next claim, if no other job is faster.
    Claim,
    Settled(Settled<G>),
}

impl<St: Store + Clone, G> Waiter for ClaimWaiter<'_, St, G> {
    type Seen = Next<G>;

    fn judge(&mut self, record: Option<Snapshot>) -> Option<Next<G>> {
        self.left = Duration::ZERO;
        let settled = match record {
            Some(record) if record.fingerprint != self.job.fingerprint => Settled::Refused(Refused::Mismatch),
            Some(Snapshot {
                status: Status::Completed(outcome),
                ..
            }) => replayed(outcome),
            Some(Snapshot {
                status: Status::Unknown,
                ..
            }) => Settled::Refused(Refused::Unknown),
            Some(record) if Some(record.nonce) != self.ours => match record.status {
                Status::InFlight { left } => {
                    self.left = left;
                    return None;
                }
                _ if self.job.settings.if_lost == IfLost::Refuse => Settled::Refused(Refused::Unknown),
                _ => return self.claim(),
            },
            // The key is free, or this job owns it without knowing it.
            _ => return self.claim(),
        };
        Some(Next::Settled(settled))
    }
}

impl<St, G> ClaimWaiter<'_, St, G> {
    fn claim(&self) -> Option<Next<G>> {
        (!self.needs_capacity).then_some(Next::Claim)
    }
}

/// A superseded attempt that waits for the outcome of the attempt that took its key over.
struct SupersededWaiter<'j, St, G> {
    job: &'j Job<St>,
    /// The rest of the other attempt's lease.
    left: Duration,
    output: PhantomData<fn() -> G>,
}

impl<St: Store + Clone, G> Waiter for SupersededWaiter<'_, St, G> {
    type Seen = Settled<G>;

    // The work has run, so read the record before reporting that another attempt is in flight.
    const FIRST_LOOK_IN_FULL: bool = true;

    fn judge(&mut self, record: Option<Snapshot>) -> Option<Settled<G>> {
        Some(match record {
            Some(record) if record.fingerprint == self.job.fingerprint => match record.status {
                Status::Completed(outcome) => replayed(outcome),
                Status::InFlight { left } => {
                    self.left = left;
                    return None;
                }
                // The next attempt takes the key over.
                Status::Lost if self.job.settings.if_lost != IfLost::Refuse => {
                    Settled::Refused(Refused::InFlight(Duration::ZERO))
                }
                Status::Lost | Status::Unknown => Settled::Refused(Refused::Unknown),
            },
            Some(_) => Settled::Refused(Refused::Unknown),
            None => Settled::Refused(Refused::Unread(FORGOTTEN)),
        })
    }
}

/// A marker that lives as long as the caller of a job waits for the result.
struct Caller(#[expect(dead_code, reason = "its count is what matters")] Arc<()>);

impl Caller {
    fn new() -> (Self, Absence) {
        let caller = Arc::new(());
        let absence = Absence(Arc::downgrade(&caller));
        (Self(caller), absence)
    }
}

/// Shows whether the caller has left.
pub(super) struct Absence(Weak<()>);

impl Absence {
    fn is_true(&self) -> bool {
        self.0.strong_count() == 0
    }

    /// Waits until the caller leaves. This needs no waker, because the rest of the job then moves
    /// to a task, and the first poll of that task sees that the caller is gone.
    fn begins(&self) -> impl Future<Output = ()> + Unpin + '_ {
        poll_fn(|_| match self.is_true() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
    }
}

/// Waits for a result, until the caller leaves.
async fn attended<T>(absence: &Absence, waiting: impl Future<Output = T>) -> Option<T> {
    match select(absence.begins(), pin!(waiting)).await {
        Either::Left(_) => None,
        Either::Right((result, _)) => Some(result),
    }
}

/// Returns the result of a job whose outcome is recorded already.
pub(super) fn replayed<G>(outcome: Outcome) -> Settled<G> {
    match outcome {
        Outcome::Stored(response) => Settled::Replay(response),
        Outcome::Rejected => Settled::Refused(Refused::Unknown),
        Outcome::Tombstone => Settled::Refused(Refused::NotStored),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Fence;
    use crate::store::MemoryStore;

    /// Returns the end of the wait of a superseded attempt that sees this status.
    fn judged(if_lost: IfLost, status: Status) -> Option<Settled<()>> {
        let job = Job {
            store: MemoryStore::new(),
            key: StorageKey::from_bytes([7; 32]),
            fingerprint: Fingerprint::NONE,
            settings: EngineSettings {
                if_lost,
                ..EngineSettings::default()
            },
            tracker: Arc::default(),
            leases: Arc::default(),
        };
        let record = Snapshot {
            fingerprint: Fingerprint::NONE,
            nonce: Nonce::random(),
            fence: Fence::new(2),
            attempt: 2,
            status,
        };
        let mut waiter = SupersededWaiter {
            job: &job,
            left: Duration::ZERO,
            output: PhantomData,
        };
        waiter.judge(Some(record))
    }

    #[test]
    fn a_superseded_attempt_is_in_flight_only_while_another_attempt_runs_or_may_run() {
        let is_unknown = |seen| matches!(seen, Some(Settled::Refused(Refused::Unknown)));
        let is_in_flight = |seen| matches!(seen, Some(Settled::Refused(Refused::InFlight(Duration::ZERO))));
        assert!(is_unknown(judged(IfLost::Refuse, Status::Lost)));
        assert!(is_in_flight(judged(IfLost::Execute, Status::Lost)));
        assert!(is_in_flight(judged(IfLost::Recover, Status::Lost)));
        assert!(is_unknown(judged(IfLost::Execute, Status::Unknown)));
        let left = Duration::from_secs(1);
        assert!(judged(IfLost::Execute, Status::InFlight { left }).is_none());
    }
}
