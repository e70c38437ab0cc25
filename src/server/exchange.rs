//! The flow of one guarded request, from its key to its answer.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{Request, Response};
use tokio::runtime::Handle;
use tower_service::Service;

use super::flights::{Flight, Joined, Landing, Seat};
use super::guard::{in_time, Shared};
use super::settings::Values;
use crate::clock::{within, Deadline};
use crate::error::{Error, ErrorKind};
use crate::http::{collect, Collected, RebuildBody, Refusal, RefusalKind, Shortfall};
use crate::protocol::{Claim, Decision, Fingerprint, Grant, IfLost, Nonce, Outcome, Status};
use crate::store::Store;
use crate::telemetry::{self, Event, Times};

/// One guarded request, without its request and its service.
pub(super) struct Exchange<St> {
    pub(super) shared: Arc<Shared<St>>,
    pub(super) settings: Arc<Values>,
    pub(super) flight: Arc<Flight>,
    pub(super) scoped: bool,
}

/// A request whose body was read, with the service that is ready for it.
pub(super) struct Admitted<S> {
    pub(super) service: S,
    pub(super) head: Parts,
    pub(super) body: Collected,
}

/// A request's turn at its key.
pub(super) struct Turn {
    pub(super) seat: Seat,
    pub(super) fingerprint: Fingerprint,
    pub(super) deadline: Deadline,
    pub(super) times: Times,
}

/// What the claim of a leader came to.
enum Claimed {
    Recover(Grant),
    Run(Grant),
    Settled(Landing),
    Unprotected,
    Wait,
}

impl<St: Store> Exchange<St> {
    /// The order of checks: the key is known to be good; then the body, the claim, the mismatch before the wait.
    pub(super) fn run<S, B, R>(
        self,
        service: S,
        head: Parts,
        body: B,
    ) -> impl Future<Output = Result<Response<R>, S::Error>> + Send
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: RebuildBody + Send + 'static,
        B::Error: Send,
        R: RebuildBody + Send + 'static,
        R::Error: Send,
    {
        let span = telemetry::span();
        tracing::Instrument::instrument(self.run_in_span(service, head, body), span)
    }

    async fn run_in_span<S, B, R>(self, service: S, head: Parts, body: B) -> Result<Response<R>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: RebuildBody + Send + 'static,
        B::Error: Send,
        R: RebuildBody + Send + 'static,
        R::Error: Send,
    {
        let mut times = Times::start();
        let body = match self.read(body).await {
            Ok(body) => body,
            Err(refusal) => return Ok(self.refuse(refusal)),
        };
        let fingerprint = self.settings.fingerprinting.of(&head, &body.bytes, self.scoped);
        let deadline = Deadline::after(self.settings.waiting.time);
        let mut admitted = Some(Admitted { service, head, body });
        loop {
            match self
                .shared
                .flights
                .join(&self.flight, fingerprint, &self.settings.waiting)
            {
                Joined::Full => return Ok(self.refuse(self.later(RefusalKind::TooManyWaiters))),
                Joined::Mismatch => return Ok(self.refuse(Refusal::new(RefusalKind::Mismatch))),
                Joined::Undecided(leader) => leader.decided().await,
                Joined::Follow(follower) => {
                    // A waiter never runs the handler itself: it must not hold what the service reserved for it.
                    admitted = None;
                    match times.waiting(follower.landing(deadline)).await {
                        Some(Landing::Handover) => {}
                        Some(landing) => return Ok(self.land(&landing)),
                        None => return Ok(self.refuse(self.later(RefusalKind::Outstanding))),
                    }
                }
                Joined::Lead(seat) => {
                    let turn = Turn {
                        seat,
                        fingerprint,
                        deadline,
                        times,
                    };
                    return match admitted.take() {
                        Some(admitted) => self.lead(turn, admitted).await,
                        None => Ok(self.stand_by(turn).await),
                    };
                }
            }
        }
    }

    /// Reads the request's body, within its bounds of length and time.
    async fn read<B: RebuildBody>(&self, body: B) -> Result<Collected, Refusal> {
        let Ok(read) = within(self.settings.body_timeout, collect(body, self.settings.body_limit)).await else {
            return Err(Refusal::new(RefusalKind::BodyTimeout));
        };
        read.map_err(|shortfall| {
            Refusal::new(match shortfall {
                Shortfall::Broken(_) => RefusalKind::BodyBroken,
                Shortfall::TooLarge(_) => RefusalKind::BodyTooLarge,
            })
        })
    }

    /// Claims the key and does what the store decides.
    async fn lead<S, B, R>(&self, turn: Turn, admitted: Admitted<S>) -> Result<Response<R>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: RebuildBody + Send + 'static,
        R: RebuildBody + Send + 'static,
        R::Error: Send,
    {
        // From here on a caller that leaves does not stop the exchange: its claim may have arrived.
        self.flight.set_guarded(true);
        match self.claim(turn.fingerprint).await {
            Claimed::Run(grant) => self.execute(turn, admitted, grant, false).await,
            Claimed::Recover(grant) => self.execute(turn, admitted, grant, true).await,
            Claimed::Settled(landing) => {
                turn.seat.land(landing.clone());
                Ok(self.land(&landing))
            }
            Claimed::Unprotected => {
                drop(turn);
                self.run_unprotected(admitted).await
            }
            Claimed::Wait => {
                drop(admitted);
                self.flight.set_guarded(false);
                self.flight.confirm();
                Ok(self.stand_by(turn).await)
            }
        }
    }

    /// Claims the key; a claim that failed is repeated once with its nonce.
    async fn claim(&self, fingerprint: Fingerprint) -> Claimed {
        let claim = Claim {
            key: self.flight.storage_key,
            fingerprint,
            nonce: Nonce::random(),
            lease: self.settings.lease,
            retention: self.settings.retention,
            if_lost: self.settings.on_lost.in_protocol(),
            max_attempts: self.settings.max_attempts,
        };
        let timeout = self.settings.store_timeout;
        let mut decision = in_time(timeout, self.shared.store.claim(&claim)).await;
        if let Err(error) = &decision {
            if error.kind() == ErrorKind::StoreUnavailable {
                telemetry::failure(Event::ClaimRepeated, error);
                decision = in_time(timeout, self.shared.store.claim(&claim)).await;
            }
        }
        match decision {
            Ok(Decision::Execute(grant)) => Claimed::Run(grant),
            Ok(Decision::Recover(grant)) => Claimed::Recover(grant),
            Ok(Decision::Replay(answer)) => Claimed::Settled(Landing::Answer { answer, kept: true }),
            Ok(Decision::NotKept) => settled(RefusalKind::AnswerNotKept),
            Ok(Decision::Mismatch) => settled(RefusalKind::Mismatch),
            Ok(Decision::Unknown) => settled(RefusalKind::OutcomeUnknown),
            Ok(Decision::Wait { .. }) => Claimed::Wait,
            Err(error) => self.claim_failed(claim, &error),
        }
    }

    /// Nothing runs when the store fails, unless the application asked for it.
    fn claim_failed(&self, claim: Claim, error: &Error) -> Claimed {
        telemetry::failure(Event::StoreFailed, error);
        if error.kind() == ErrorKind::StoreFull {
            return Claimed::Settled(Landing::Refused(self.later(RefusalKind::StoreFull)));
        }
        if error.kind() == ErrorKind::StoreUnavailable {
            if let Ok(runtime) = Handle::try_current() {
                let behind = release_behind(Arc::clone(&self.shared), claim, self.settings.store_timeout);
                self.shared.tracker.spawn(&runtime, behind);
            }
        }
        if self.settings.run_unprotected {
            return Claimed::Unprotected;
        }
        Claimed::Settled(Landing::Refused(self.later(RefusalKind::StoreUnavailable)))
    }

    async fn run_unprotected<S, B, R>(&self, admitted: Admitted<S>) -> Result<Response<R>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RebuildBody,
    {
        let Admitted {
            mut service,
            head,
            body,
        } = admitted;
        telemetry::event(Event::Unprotected);
        telemetry::finished("unprotected");
        self.flight.set_guarded(false);
        service.call(Request::from_parts(head, body.rebuild())).await
    }

    /// Waits for an owner elsewhere: subscribe, look, wait, in that order. Changes nothing.
    pub(super) async fn stand_by<R: RebuildBody>(&self, mut turn: Turn) -> Response<R> {
        let outcome = self.outcome_elsewhere(turn.fingerprint, turn.deadline);
        match turn.times.waiting(outcome).await {
            Some(landing) => {
                turn.seat.land(landing.clone());
                self.land(&landing)
            }
            // The time of this request is up; those who joined later have some left, and look for themselves.
            None => self.refuse(self.later(RefusalKind::Outstanding)),
        }
    }

    async fn outcome_elsewhere(&self, fingerprint: Fingerprint, deadline: Deadline) -> Option<Landing> {
        const POLL: Duration = Duration::from_millis(500);
        let (store, key) = (&self.shared.store, &self.flight.storage_key);
        let timeout = self.settings.store_timeout;
        while !deadline.left().is_zero() {
            let watch = in_time(timeout, store.watch(key)).await;
            let snapshot = match in_time(timeout, store.peek(key)).await {
                Ok(snapshot) => snapshot,
                Err(error) => {
                    telemetry::failure(Event::StoreFailed, &error);
                    return Some(Landing::Refused(self.later(RefusalKind::StoreUnavailable)));
                }
            };
            let Some(snapshot) = snapshot else {
                return Some(Landing::Refused(self.later(RefusalKind::Outstanding)));
            };
            if snapshot.fingerprint != fingerprint {
                return Some(Landing::Refused(Refusal::new(RefusalKind::Mismatch)));
            }
            self.flight.confirm();
            if let Some(landing) = self.landing_of(snapshot.status) {
                return Some(landing);
            }
            let pause = POLL.min(deadline.left());
            match watch {
                Ok(watch) => drop(within(pause, watch).await),
                Err(_) => drop(within(pause, std::future::pending::<()>()).await),
            }
        }
        None
    }

    /// What a record says to those who wait; `None` while its owner is at it.
    fn landing_of(&self, status: Status) -> Option<Landing> {
        Some(match status {
            Status::InFlight { .. } => return None,
            Status::Completed(Outcome::Kept(answer)) => Landing::Answer { answer, kept: true },
            Status::Completed(Outcome::Tombstone) => Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)),
            Status::Unknown => Landing::Refused(Refusal::new(RefusalKind::OutcomeUnknown)),
            Status::Lost => Landing::Refused(match self.settings.on_lost.in_protocol() {
                IfLost::Refuse => Refusal::new(RefusalKind::OutcomeUnknown),
                IfLost::Execute | IfLost::Recover => self.later(RefusalKind::Outstanding),
            }),
        })
    }

    /// The response to what this request, or the one it waited for, came to.
    pub(super) fn land<R: RebuildBody>(&self, landing: &Landing) -> Response<R> {
        match landing {
            Landing::Answer { answer, kept } => match self.settings.answer_headers.replay(answer, *kept) {
                Ok(response) => {
                    telemetry::finished(if *kept { "replayed" } else { "waited" });
                    response
                }
                Err(_) => {
                    telemetry::failure(Event::StoreFailed, &CORRUPT);
                    self.refuse(self.later(RefusalKind::StoreUnavailable))
                }
            },
            Landing::Refused(refusal) => self.refuse(*refusal),
            Landing::Handover => self.refuse(self.later(RefusalKind::Outstanding)),
        }
    }

    pub(super) fn refuse<R: RebuildBody>(&self, refusal: Refusal) -> Response<R> {
        telemetry::finished(refusal.code());
        refusal.into_response(&self.settings.refusals)
    }

    /// A refusal that asks for patience.
    pub(super) fn later(&self, kind: RefusalKind) -> Refusal {
        Refusal::retry_after(kind, self.settings.retry_after)
    }
}

const CORRUPT: Error = Error::new(ErrorKind::CorruptRecord, "a stored answer cannot be read");

fn settled(kind: RefusalKind) -> Claimed {
    Claimed::Settled(Landing::Refused(Refusal::new(kind)))
}

/// Releases a claim of which it is not known whether it arrived: repeated with its nonce, it says so.
async fn release_behind<St: Store>(shared: Arc<Shared<St>>, claim: Claim, timeout: Duration) {
    const TRIES: u32 = 6;
    for attempt in 0..TRIES {
        match in_time(timeout, shared.store.claim(&claim)).await {
            Ok(Decision::Execute(grant) | Decision::Recover(grant)) => {
                if in_time(timeout, shared.store.release(&claim.key, grant.owner))
                    .await
                    .is_ok()
                {
                    return telemetry::event(Event::ReleasedBehind);
                }
            }
            Ok(_) => return,
            Err(_) => {}
        }
        // It is not known when the store comes back; after the last try the lease ends the claim.
        tokio::time::sleep(Duration::from_millis(250) * 2_u32.pow(attempt)).await;
    }
}
