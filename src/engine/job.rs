//! One job, once: the claim, the check, the run, the record.
//!
//! It is polled where its caller polls. A caller that goes away does not end it: the rest goes on in a task of its own, and what was
//! begun is recorded.

use std::future::{poll_fn, Future};
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use futures::future::{select, Either};
use futures::FutureExt;

use super::attempt::{Attempt, Recovered};
use super::claim::{ClaimError, Claimer};
use super::lease_guard::LeaseGuard;
use super::owner::{KeyOwner, Ownership};
use super::settings::EngineSettings;
use super::waiting::{await_owner, Waited, Waiter};
use crate::clock::{sleep, within, Deadline, Stopwatch};
use crate::detach::{detach_on_drop, TaskTracker};
use crate::error::{Error, ErrorKind};
use crate::protocol::{
    Completion, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Snapshot, Status, StorageKey,
    StoredResponse,
};
use crate::store::{claim_with_timeout, with_timeout, LostClaim, Store, MANY_LOST_CLAIMS};
use crate::telemetry::{self, Event};

/// The longest time between two claims of a waiter, for a subscription that wakes nobody.
const POLL: Duration = Duration::from_millis(500);

pub(crate) const NO_RUNTIME: Error = Error::new(
    ErrorKind::Configuration,
    "what is to happen once must be begun within a tokio runtime",
);

const FORGOTTEN: Error = Error::new(
    ErrorKind::Superseded,
    "somebody else took the key over, and what came of that is forgotten already",
);

/// The call itself.
pub(crate) trait Work: Send + 'static {
    /// What a caller gets of a run.
    type Output: Send + 'static;

    /// Asks what became of a lost attempt.
    fn ask(&mut self, attempt: &Attempt) -> impl Future<Output = Recovered<Ended<Self::Output>>> + Send;

    /// Makes the call.
    fn run(self, attempt: Attempt) -> impl Future<Output = Ended<Self::Output>> + Send;
}

/// How a call ended.
pub(crate) struct Ended<G> {
    pub(crate) given: G,
    pub(crate) verdict: Verdict,
}

/// What becomes of the key.
pub(crate) enum Verdict {
    /// Nobody knows whether it took effect.
    GiveUp,
    /// It took effect.
    Store(Outcome),
    /// It failed, and must not run again. After [`Outcome::Rejected`], an operator can allow another run.
    StoreFailure(Outcome),
    /// It had no effect.
    Release,
}

/// What came of it all.
pub(crate) enum Settled<G> {
    /// It ran, now, and this is what came of it.
    Ran { given: G, recorded: Result<(), Error> },
    /// It did not run.
    Refused(Refused),
    /// It ran before.
    Replay(StoredResponse),
}

/// Why it did not run, or why what it gave is not to be given.
pub(crate) enum Refused {
    InFlight(Duration),
    Mismatch,
    NotStored,
    NotRun(Error),
    /// A check could not tell what became of a lost attempt; the next one asks again.
    Undecided,
    Unknown,
    /// It ran, somebody else took the key over, and what the key holds cannot be read.
    Unread(Error),
}

/// A key that was granted.
struct Granted {
    grant: Grant,
    /// Whether the call may be made without asking about an earlier attempt.
    is_first: bool,
    /// A stopwatch that was started before the claim.
    asked: Stopwatch,
}

/// A key, what is asked under it, and on which terms.
pub(crate) struct Job<St> {
    pub(crate) store: St,
    pub(crate) key: StorageKey,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) settings: EngineSettings,
    pub(crate) tracker: Arc<TaskTracker>,
}

impl<St: Store + Clone> Job<St> {
    /// Sees to it that the work is done once.
    pub(crate) async fn settle<W: Work>(self, work: W) -> Settled<W::Output> {
        if let Err(overloaded) = self.settings.check_load(&self.tracker) {
            telemetry::event(Event::Overloaded);
            return Settled::Refused(Refused::NotRun(overloaded));
        }
        let tracker = Arc::clone(&self.tracker);
        if tracker.has_many_lost_claims() {
            return Settled::Refused(Refused::NotRun(MANY_LOST_CLAIMS));
        }
        // Declared first, so that it goes last, when the tracker knows of the rest.
        let _attended = tracker.attend();
        let (caller, absence) = Caller::new();
        let Some(driven) = detach_on_drop(self.drive(work, absence), Some(Arc::clone(&tracker))) else {
            return Settled::Refused(Refused::NotRun(NO_RUNTIME));
        };
        let driven = pin!(driven);
        // Declared last, so that it goes first, before the rest of the work is handed over.
        let _caller = caller;
        driven.await
    }

    async fn drive<W: Work>(self, work: W, absence: Absence) -> Settled<W::Output> {
        let nonce = Nonce::random();
        match self.claim(nonce, &absence).await {
            Ok(Ok(granted)) => {
                // Nothing has run, and nobody waits for it.
                if absence.is_true() {
                    self.owner(granted.grant.owner).release().await;
                    return Settled::Refused(Refused::InFlight(Duration::ZERO));
                }
                self.own(granted, work, &absence).await
            }
            Ok(Err(settled)) => settled,
            Err(error) => Settled::Refused(Refused::NotRun(error)),
        }
    }

    /// Claims the key, and waits while another owner has it. Returns the grant, or the result if nothing runs.
    async fn claim<G>(&self, nonce: Nonce, absence: &Absence) -> Result<Result<Granted, Settled<G>>, Error> {
        let deadline = Deadline::after(self.settings.wait);
        // The first claim comes before any wait, so the deadline does not limit it.
        let (mut watch, mut waiting) = (None, None);
        let mut lost = None;
        // The rest of the owner's lease, as the last claim has seen it.
        let mut seen = Duration::ZERO;
        loop {
            let asked = Stopwatch::start();
            let decision = match self.claim_once(nonce, waiting, &mut lost).await {
                Ok(decision) => decision,
                Err(ClaimError::TimeUp) => {
                    return Ok(Err(Settled::Refused(Refused::InFlight(self.worth_waiting(seen)))))
                }
                Err(ClaimError::Failed(error)) => return Err(error),
            };
            if matches!(decision, Decision::Execute(_) | Decision::Recover(_)) {
                if let Some(lost) = lost.take() {
                    lost.granted();
                }
            }
            let granted = |grant, is_first| Granted { grant, is_first, asked };
            let refused = match decision {
                Decision::Execute(grant) => return Ok(Ok(granted(grant, true))),
                Decision::Recover(grant) => return Ok(Ok(granted(grant, false))),
                Decision::Replay(answer) => return Ok(Err(Settled::Replay(answer))),
                Decision::Mismatch => Refused::Mismatch,
                Decision::NotStored => Refused::NotStored,
                Decision::Unknown => Refused::Unknown,
                Decision::Wait { left } if deadline.left().is_zero() || absence.is_true() => {
                    Refused::InFlight(self.worth_waiting(left))
                }
                Decision::Wait { left } => {
                    seen = left;
                    self.wait(&mut watch, left, deadline).await;
                    waiting = Some(deadline);
                    continue;
                }
            };
            return Ok(Err(Settled::Refused(refused)));
        }
    }

    /// Subscribes first, so that the next look at the record misses no change. If a subscription exists already, waits
    /// for a change. The lease of the owner ends in `left`.
    async fn wait(&self, watch: &mut Option<St::Watch>, left: Duration, deadline: Deadline) {
        let pause = || left.min(deadline.left()).clamp(Duration::from_millis(1), POLL);
        let timeout = self.settings.store_timeout.min(deadline.left());
        match watch.take() {
            Some(watch) => drop(within(pause(), watch).await),
            None => match with_timeout(timeout, self.store.watch(&self.key)).await {
                Ok(subscribed) => *watch = Some(subscribed),
                Err(_) => drop(within(pause(), std::future::pending::<()>()).await),
            },
        }
    }

    /// In a store in this process leases have no end, and nobody waits for that.
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

    /// The key is ours.
    async fn own<W: Work>(&self, granted: Granted, mut work: W, absence: &Absence) -> Settled<W::Output> {
        let Granted { grant, is_first, asked } = granted;
        let attempt = Attempt::new(self.key, self.fingerprint, grant, asked);
        let mut held = LeaseGuard::begin(&self.store, self.settings.store_timeout, &attempt);
        let found = if is_first {
            Recovered::NotHappened
        } else {
            held.during(self.ask(&mut work, &attempt)).await
        };
        let ended = match found {
            Recovered::Happened(ended) => Ok(ended),
            Recovered::NotHappened if absence.is_true() => {
                // It found that nothing runs, and nothing is begun for nobody.
                held.stop_renewing();
                self.owner(grant.owner).release().await;
                held.end();
                return Settled::Refused(Refused::InFlight(Duration::ZERO));
            }
            Recovered::NotHappened => {
                let ended = held.during(catch_panic(work.run(attempt.clone()))).await;
                ended.ok_or(Refused::Unknown)
            }
            Recovered::Unknown if attempt.number() < self.settings.max_attempts => Err(Refused::Undecided),
            Recovered::Unknown => Err(Refused::Unknown),
        };
        #[cfg(feature = "postgres")]
        if attempt.is_in_transaction() {
            held.stop_renewing();
            let settled = self.after_transaction(grant.owner, ended, absence).await;
            held.end();
            return settled;
        }
        if let Ok(Ended {
            verdict: Verdict::Store(outcome) | Verdict::StoreFailure(outcome),
            given,
        }) = ended
        {
            let completion = self
                .owner(grant.owner)
                .complete(&outcome, self.settings.retention)
                .await;
            held.end();
            return self.completed(completion, given, absence).await;
        }
        held.stop_renewing();
        let settled = self.unkept(grant.owner, ended, absence).await;
        held.end();
        settled
    }

    /// The end of an attempt that leaves nothing to keep.
    pub(super) async fn unkept<G>(
        &self,
        owner: Owner,
        ended: Result<Ended<G>, Refused>,
        absence: &Absence,
    ) -> Settled<G> {
        let ownership = match &ended {
            Ok(Ended {
                verdict: Verdict::Release,
                ..
            }) => self.owner(owner).release().await,
            _ => self.owner(owner).give_up().await,
        };
        if ownership == Ownership::Superseded {
            telemetry::event(Event::Superseded);
            return self.stand_by(absence).await;
        }
        match ended {
            Ok(Ended { given, .. }) => Settled::Ran {
                given,
                recorded: Ok(()),
            },
            Err(refused) => Settled::Refused(refused),
        }
    }

    /// What became of the attempt before this one. A check that panics has found nothing out.
    async fn ask<W: Work>(&self, work: &mut W, attempt: &Attempt) -> Recovered<Ended<W::Output>> {
        sleep(self.settings.settle_delay).await;
        catch_panic(work.ask(attempt)).await.unwrap_or(Recovered::Unknown)
    }

    pub(super) async fn completed<G>(
        &self,
        completion: Result<Completion, Error>,
        given: G,
        absence: &Absence,
    ) -> Settled<G> {
        let recorded = match completion {
            Ok(Completion::Completed) => Ok(()),
            // What superseded this attempt may be the answer to another input: it is looked up.
            Ok(Completion::Superseded(_)) => {
                telemetry::event(Event::Superseded);
                return self.stand_by(absence).await;
            }
            Err(error) => {
                telemetry::failure(Event::Unrecorded, &error);
                Err(error)
            }
        };
        Settled::Ran { given, recorded }
    }

    /// Another attempt took the key over. This attempt drops its own output, and its caller gets the outcome that the
    /// other attempt records. This wait has its full time, regardless of how long the caller waited before its own
    /// claim. It ends when the caller leaves, because nobody gets the outcome then.
    pub(super) async fn stand_by<G>(&self, absence: &Absence) -> Settled<G> {
        if absence.is_true() {
            return Settled::Refused(Refused::InFlight(Duration::ZERO));
        }
        let waiter = Standby {
            job: self,
            left: Duration::ZERO,
            output: PhantomData,
        };
        let timeout = self.settings.store_timeout;
        let deadline = Deadline::after(self.settings.wait);
        let waiting = pin!(await_owner(&self.store, &self.key, timeout, deadline, waiter));
        let Either::Left((waited, _)) = select(waiting, absence.begins()).await else {
            return Settled::Refused(Refused::InFlight(Duration::ZERO));
        };
        match waited {
            Waited::Seen(settled) => settled,
            Waited::TimeUp(waiter) => Settled::Refused(Refused::InFlight(self.worth_waiting(waiter.left))),
            Waited::Failed(error) | Waited::LastLookFailed(error) => Settled::Refused(Refused::Unread(error)),
        }
    }

    pub(super) fn owner(&self, owner: Owner) -> KeyOwner<'_, St> {
        KeyOwner {
            store: &self.store,
            key: &self.key,
            owner,
            retry: self.settings.retry(),
            tracker: &self.tracker,
        }
    }
}

/// A superseded attempt that waits for the outcome of the attempt that took its key over.
struct Standby<'j, St, G> {
    job: &'j Job<St>,
    /// The rest of the other attempt's lease.
    left: Duration,
    output: PhantomData<fn() -> G>,
}

impl<St: Store + Clone, G> Waiter for Standby<'_, St, G> {
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

/// The caller of a job, while it waits for the result.
struct Caller(#[expect(dead_code, reason = "its count is what matters")] Arc<()>);

impl Caller {
    fn new() -> (Self, Absence) {
        let caller = Arc::new(());
        let absence = Absence(Arc::downgrade(&caller));
        (Self(caller), absence)
    }
}

/// Whether the caller has gone away.
pub(super) struct Absence(Weak<()>);

impl Absence {
    fn is_true(&self) -> bool {
        self.0.strong_count() == 0
    }

    /// Waits until the caller leaves. This needs no waker: the rest of the job then moves to a task, whose first poll
    /// finds the caller gone.
    fn begins(&self) -> impl Future<Output = ()> + Unpin + '_ {
        poll_fn(|_| match self.is_true() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
    }
}

/// Nothing where the application's code panics.
async fn catch_panic<T>(work: impl Future<Output = T>) -> Option<T> {
    AssertUnwindSafe(work).catch_unwind().await.ok()
}

pub(super) fn replayed<G>(outcome: Outcome) -> Settled<G> {
    match outcome {
        Outcome::Stored(answer) => Settled::Replay(answer),
        Outcome::Rejected => Settled::Refused(Refused::Unknown),
        Outcome::Tombstone => Settled::Refused(Refused::NotStored),
    }
}
