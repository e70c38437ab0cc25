//! One execution of the handler, from its grant to its recorded outcome.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use http::{response, Request, Response};
use tower_service::Service;

use super::exchange::{Admitted, Exchange, Turn};
use super::flights::Landing;
use super::guard::{in_time, Ownership};
use super::lease::Lease;
use super::policy::{is_stream, OnLost, Recovered, Recovery, RetainFor, Verdict};
use crate::clock::{within, Deadline};
use crate::error::{Error, ErrorKind};
use crate::http::{collect, Collected, RebuildBody, Refusal, RefusalKind, Shortfall};
use crate::protocol::{Completion, Grant, Outcome, Release};
use crate::store::Store;
use crate::telemetry::{self, Event, Times};

/// How the handler ended.
enum Ended<R, E> {
    /// With an answer that was read to its end.
    Answered(response::Parts, Collected),
    /// With an answer that broke off while it was read.
    Broken,
    /// With an error of the service.
    Failed(E),
    /// It was asked what became of a lost attempt: it took effect, with this answer.
    Happened(response::Parts, Collected),
    /// With a panic.
    Panicked,
    /// With an answer that cannot be kept: a stream, or longer than the limit.
    Streaming(Response<R>),
    /// It was asked what became of a lost attempt, and nobody knows.
    Unknown,
}

impl<St: Store> Exchange<St> {
    /// Runs the handler and records how it ended, before the first byte of its answer leaves.
    pub(super) async fn execute<S, B, R>(
        &self,
        mut turn: Turn,
        admitted: Admitted<S>,
        grant: Grant,
        recover: bool,
    ) -> Result<Response<R>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: RebuildBody + Send + 'static,
        R: RebuildBody + Send + 'static,
        R::Error: Send,
    {
        let ownership = Ownership::new(&self.shared, self.flight.storage_key, grant);
        self.flight.hold(grant);
        if grant.lease.is_some() {
            self.shared.keep_renewed();
        }
        telemetry::granted(grant.attempt, grant.owner.fence.as_u64());
        let lease = Lease::new(Arc::clone(&self.flight), turn.fingerprint, grant);
        let attempt = self.attempt(admitted, lease, recover, &mut turn.times);
        let ended = AssertUnwindSafe(attempt)
            .catch_unwind()
            .await
            .unwrap_or(Ended::Panicked);
        self.record(turn, ownership, ended).await
    }

    /// Asks what became of a lost attempt, if asked to; then calls the handler and reads its answer.
    async fn attempt<S, B, R>(
        &self,
        admitted: Admitted<S>,
        lease: Lease,
        recover: bool,
        times: &mut Times,
    ) -> Ended<R, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>>,
        B: RebuildBody,
        R: RebuildBody,
    {
        let Admitted {
            mut service,
            mut head,
            body,
        } = admitted;
        if let (true, OnLost::Recover(check)) = (recover, &self.settings.on_lost) {
            let recovery = Recovery {
                key: lease.key().clone(),
                fence: lease.fence(),
                attempt: lease.attempt().number(),
                head: head.clone(),
            };
            match times.outside(check.ask(recovery)).await {
                Recovered::Happened(answer) => {
                    let (head, bytes) = answer.into_parts();
                    return Ended::Happened(head, Collected { bytes, trailers: None });
                }
                Recovered::NotHappened => {}
                Recovered::Unknown => return Ended::Unknown,
            }
        }
        head.extensions.insert(lease);
        let request = Request::from_parts(head, body.rebuild());
        let response = match times.outside(service.call(request)).await {
            Ok(response) => response,
            Err(error) => return Ended::Failed(error),
        };
        let (head, body) = response.into_parts();
        if is_stream(&head) {
            return Ended::Streaming(Response::from_parts(head, body));
        }
        match times.outside(collect(body, self.settings.answer_limit)).await {
            Ok(body) => Ended::Answered(head, body),
            Err(Shortfall::Broken(_)) => Ended::Broken,
            Err(Shortfall::TooLarge(body)) => Ended::Streaming(Response::from_parts(head, R::rebuild(body))),
        }
    }

    /// Records how the handler ended and answers accordingly.
    async fn record<R, E>(&self, turn: Turn, ownership: Ownership<St>, ended: Ended<R, E>) -> Result<Response<R>, E>
    where
        R: RebuildBody + Send,
        E: Send,
    {
        let keep = &self.settings.keep;
        match ended {
            Ended::Answered(head, body) => {
                let verdict = keep.verdict(&head);
                Ok(self.answered(turn, ownership, head, body, verdict).await)
            }
            Ended::Happened(head, body) => Ok(self.happened(turn, ownership, &head, &body).await),
            Ended::Streaming(response) => Ok(self.streaming(turn, ownership, response).await),
            Ended::Broken => Ok(self.broken(turn, ownership).await),
            Ended::Panicked => Ok(self.failed(turn, ownership).await),
            Ended::Failed(error) => {
                let _: Response<R> = self.failed(turn, ownership).await;
                Err(error)
            }
            Ended::Unknown => {
                self.give_up(ownership).await;
                let refusal = Refusal::new(RefusalKind::OutcomeUnknown);
                turn.seat.land(Landing::Refused(refusal));
                Ok(self.refuse(refusal))
            }
        }
    }

    async fn answered<R: RebuildBody>(
        &self,
        turn: Turn,
        ownership: Ownership<St>,
        head: response::Parts,
        body: Collected,
        verdict: Verdict,
    ) -> Response<R> {
        let answer = self.settings.answer_headers.store(&head, &body);
        match verdict {
            Verdict::Keep => {
                let outcome = Outcome::Kept(answer.clone());
                match self.complete(&ownership, &outcome, self.retention(&head)).await {
                    Ok(Completion::Completed) => {
                        ownership.end();
                        turn.seat.land(Landing::Answer { answer, kept: true });
                    }
                    Ok(Completion::Superseded(stands)) => return self.superseded(turn, ownership, stands).await,
                    Err(error) => match self.unrecorded(ownership, &error) {
                        Some(refusal) => {
                            turn.seat.land(Landing::Refused(refusal));
                            return self.refuse(refusal);
                        }
                        None => turn.seat.land(Landing::Answer { answer, kept: false }),
                    },
                }
            }
            Verdict::Release => {
                self.release(ownership).await;
                turn.seat.land(Landing::Answer { answer, kept: false });
            }
            Verdict::GiveUp => {
                self.give_up(ownership).await;
                turn.seat.land(Landing::Answer { answer, kept: false });
            }
        }
        telemetry::finished("executed");
        Response::from_parts(head, body.rebuild())
    }

    /// A lost attempt took effect: its answer is kept and given as the replay that it is.
    async fn happened<R: RebuildBody>(
        &self,
        turn: Turn,
        ownership: Ownership<St>,
        head: &response::Parts,
        body: &Collected,
    ) -> Response<R> {
        let answer = self.settings.answer_headers.store(head, body);
        let outcome = Outcome::Kept(answer.clone());
        let landing = match self.complete(&ownership, &outcome, self.retention(head)).await {
            Ok(Completion::Completed) => {
                ownership.end();
                Landing::Answer { answer, kept: true }
            }
            Ok(Completion::Superseded(stands)) => return self.superseded(turn, ownership, stands).await,
            // The next attempt asks again and is told the same.
            Err(error) => match self.unrecorded(ownership, &error) {
                Some(refusal) => Landing::Refused(refusal),
                None => Landing::Answer { answer, kept: true },
            },
        };
        turn.seat.land(landing.clone());
        self.land(&landing)
    }

    /// An answer that is not read into memory: a tombstone first, then the stream.
    async fn streaming<R: RebuildBody>(
        &self,
        turn: Turn,
        ownership: Ownership<St>,
        response: Response<R>,
    ) -> Response<R> {
        let (head, body) = response.into_parts();
        match self.settings.keep.verdict(&head) {
            Verdict::Keep => {
                telemetry::event(Event::Tombstone);
                match self
                    .complete(&ownership, &Outcome::Tombstone, self.retention(&head))
                    .await
                {
                    Ok(Completion::Completed) => ownership.end(),
                    Ok(Completion::Superseded(stands)) => return self.superseded(turn, ownership, stands).await,
                    Err(error) => {
                        if let Some(refusal) = self.unrecorded(ownership, &error) {
                            turn.seat.land(Landing::Refused(refusal));
                            return self.refuse(refusal);
                        }
                    }
                }
                turn.seat
                    .land(Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)));
            }
            Verdict::Release => {
                self.release(ownership).await;
                turn.seat.land(Landing::Refused(self.later(RefusalKind::Outstanding)));
            }
            Verdict::GiveUp => {
                self.give_up(ownership).await;
                turn.seat
                    .land(Landing::Refused(Refusal::new(RefusalKind::OutcomeUnknown)));
            }
        }
        telemetry::finished("executed");
        Response::from_parts(head, body)
    }

    /// The handler ended and its answer is lost: nobody runs again, and nobody can be given it.
    async fn broken<R: RebuildBody>(&self, turn: Turn, ownership: Ownership<St>) -> Response<R> {
        telemetry::event(Event::Tombstone);
        match self
            .complete(&ownership, &Outcome::Tombstone, self.settings.retention)
            .await
        {
            Ok(Completion::Completed) => ownership.end(),
            Ok(Completion::Superseded(stands)) => return self.superseded(turn, ownership, stands).await,
            Err(error) => drop(self.unrecorded(ownership, &error)),
        }
        turn.seat
            .land(Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)));
        self.refuse(Refusal::new(RefusalKind::AnswerBroken))
    }

    /// The handler panicked, or its service failed: there is no answer but ours.
    async fn failed<R: RebuildBody>(&self, turn: Turn, ownership: Ownership<St>) -> Response<R> {
        telemetry::event(Event::HandlerFailed);
        let refusal = Refusal::new(RefusalKind::HandlerFailed);
        match self.settings.keep.of_failure() {
            Verdict::Keep => {
                let (head, bytes) = refusal.render(&self.settings.refusals).into_parts();
                let body = Collected { bytes, trailers: None };
                return self.answered(turn, ownership, head, body, Verdict::Keep).await;
            }
            Verdict::Release => self.release(ownership).await,
            Verdict::GiveUp => self.give_up(ownership).await,
        }
        turn.seat.land(Landing::Refused(refusal));
        self.refuse(refusal)
    }

    /// Somebody took the key over: this attempt's result is dropped, and the caller is given what the key holds.
    async fn superseded<R: RebuildBody>(
        &self,
        turn: Turn,
        ownership: Ownership<St>,
        stands: Option<Outcome>,
    ) -> Response<R> {
        telemetry::event(Event::Superseded);
        ownership.end();
        self.flight.set_superseded();
        self.flight.set_guarded(false);
        let landing = match stands {
            Some(Outcome::Kept(answer)) => Landing::Answer { answer, kept: true },
            Some(Outcome::Tombstone) => Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)),
            None => {
                let deadline = Deadline::after(self.settings.waiting.time);
                return self.stand_by(Turn { deadline, ..turn }).await;
            }
        };
        turn.seat.land(landing.clone());
        self.land(&landing)
    }

    /// The outcome could not be recorded. Under `OnLost::Refuse` nobody will run again, so the caller may have its answer;
    /// elsewhere the next attempt runs, and the caller must not believe that this one counts.
    fn unrecorded(&self, ownership: Ownership<St>, error: &Error) -> Option<Refusal> {
        telemetry::failure(Event::Unrecorded, error);
        ownership.end();
        match self.settings.on_lost {
            OnLost::Refuse => None,
            OnLost::Execute | OnLost::Recover(_) => Some(self.later(RefusalKind::OutcomeUnrecorded)),
        }
    }

    async fn complete(
        &self,
        ownership: &Ownership<St>,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let (store, key) = (&self.shared.store, &self.flight.storage_key);
        self.persist(|| store.complete(key, ownership.owner(), outcome, retention))
            .await
    }

    async fn release(&self, ownership: Ownership<St>) {
        let (store, key) = (&self.shared.store, &self.flight.storage_key);
        match self.persist(|| store.release(key, ownership.owner())).await {
            Ok(Release::Released) => {}
            Ok(Release::Superseded) => telemetry::event(Event::Superseded),
            Err(error) => telemetry::failure(Event::Unrecorded, &error),
        }
        ownership.end();
    }

    async fn give_up(&self, ownership: Ownership<St>) {
        let (store, key) = (&self.shared.store, &self.flight.storage_key);
        // Without the store the lease ends it, a little later.
        if let Err(error) = self
            .persist(|| store.renew(key, ownership.owner(), Duration::ZERO))
            .await
        {
            telemetry::failure(Event::Unrecorded, &error);
        }
        ownership.end();
    }

    /// Repeats an operation while the store fails, for as long as is set; the lease is renewed meanwhile.
    async fn persist<T, F>(&self, operation: impl Fn() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        const LONGEST_PAUSE: Duration = Duration::from_secs(1);
        let mut pause = Duration::from_millis(20);
        let mut last = match in_time(self.settings.store_timeout, operation()).await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let deadline = Deadline::after(self.settings.completion_timeout);
        while last.kind() == ErrorKind::StoreUnavailable && !deadline.left().is_zero() {
            telemetry::failure(Event::CompletionRepeated, &last);
            drop(within(pause.min(deadline.left()), std::future::pending::<()>()).await);
            pause = LONGEST_PAUSE.min(pause * 2);
            match in_time(self.settings.store_timeout, operation()).await {
                Ok(done) => return Ok(done),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn retention(&self, head: &response::Parts) -> Duration {
        let asked = head.extensions.get::<RetainFor>();
        asked.map_or(self.settings.retention, |RetainFor(retention)| *retention)
    }
}
