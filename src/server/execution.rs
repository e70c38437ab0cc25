//! One execution of the handler, from its grant to its recorded outcome.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use http::{response, Request, Response};
use tower_service::Service;

use super::exchange::{Admitted, Exchange};
use super::flights::Landing;
use super::guard::{in_time, Ownership};
use super::lease::Lease;
use super::policy::{is_stream, OnLost, Recovered, Recovery, RetainFor, Verdict};
use super::settings::Values;
use crate::clock::{within, Deadline};
use crate::error::{Error, ErrorKind};
use crate::http::{collect, Collected, RebuildBody, Refusal, RefusalKind, Shortfall};
use crate::protocol::{Completion, Grant, Outcome, Release};
use crate::store::Store;
use crate::telemetry::{self, Event, Times};

/// How the handler ended.
enum Ended<R, E> {
    /// With an answer that was read to its end.
    Answered(Read),
    /// With an answer that broke off while it was read.
    Broken,
    /// With an error of the service.
    Failed(E),
    /// It was asked what became of a lost attempt: it took effect, with this answer.
    Happened(Read),
    /// With a panic.
    Panicked,
    /// With an answer that cannot be kept: a stream, or longer than the limit.
    Streaming(Response<R>),
    /// It was asked what became of a lost attempt, and nobody knows.
    Unknown,
}

/// An answer that was read to its end.
struct Read {
    head: response::Parts,
    body: Collected,
}

impl<St: Store, S> Exchange<St, S> {
    /// Runs the handler and records how it ended, before the first byte of its answer leaves.
    pub(super) async fn execute<B, R>(&mut self, grant: Grant, recover: bool) -> Result<Response<R>, S::Error>
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
        telemetry::granted(&self.span, grant.attempt, grant.owner.fence.as_u64());
        let Some(admitted) = self.admitted.take() else {
            return Ok(self.refuse(self.later(RefusalKind::Outstanding)));
        };
        let lease = Lease::new(Arc::clone(&self.flight), self.fingerprint, grant);
        let attempt = attempt(admitted, lease, &self.settings, recover, &mut self.times);
        let ended = AssertUnwindSafe(Box::pin(attempt)).catch_unwind().await;
        match ended.unwrap_or(Ended::Panicked) {
            Ended::Answered(read) => {
                let verdict = self.settings.keep.verdict(&read.head);
                Ok(self.answered(ownership, read, verdict).await)
            }
            Ended::Failed(error) => {
                let _: Response<R> = Box::pin(self.failed(ownership)).await;
                Err(error)
            }
            Ended::Broken => Ok(Box::pin(self.broken(ownership)).await),
            Ended::Happened(read) => Ok(Box::pin(self.happened(ownership, read)).await),
            Ended::Panicked => Ok(Box::pin(self.failed(ownership)).await),
            Ended::Streaming(response) => Ok(Box::pin(self.streaming(ownership, response)).await),
            Ended::Unknown => {
                Box::pin(self.give_up(ownership)).await;
                Ok(self.settle(Landing::Refused(Refusal::new(RefusalKind::OutcomeUnknown))))
            }
        }
    }

    fn answered<R: RebuildBody>(
        &mut self,
        ownership: Ownership<St>,
        read: Read,
        verdict: Verdict,
    ) -> impl Future<Output = Response<R>> + use<'_, St, S, R> {
        async move {
            let answer = self.settings.answer_headers.store(&read.head, &read.body);
            let kept = match verdict {
                Verdict::Keep => {
                    let retention = retention(&self.settings, &read.head);
                    let outcome = Outcome::Kept(answer.clone());
                    match self.complete(&ownership, &outcome, retention).await {
                        Ok(Completion::Completed) => {
                            ownership.end();
                            true
                        }
                        other => match Box::pin(self.not_completed(ownership, other)).await {
                            Some(response) => return response,
                            None => false,
                        },
                    }
                }
                Verdict::Release => {
                    self.release(ownership).await;
                    false
                }
                Verdict::GiveUp => {
                    Box::pin(self.give_up(ownership)).await;
                    false
                }
            };
            self.leave(Landing::Answer { answer, kept });
            self.finished("executed");
            Response::from_parts(read.head, read.body.rebuild())
        }
    }

    /// A lost attempt took effect: its answer is kept and given as the replay that it is.
    async fn happened<R: RebuildBody>(&mut self, ownership: Ownership<St>, read: Read) -> Response<R> {
        let answer = self.settings.answer_headers.store(&read.head, &read.body);
        let outcome = Outcome::Kept(answer.clone());
        let retention = retention(&self.settings, &read.head);
        match self.complete(&ownership, &outcome, retention).await {
            Ok(Completion::Completed) => ownership.end(),
            other => {
                // The next attempt asks again and is told the same.
                if let Some(response) = self.not_completed(ownership, other).await {
                    return response;
                }
            }
        }
        self.settle(Landing::Answer { answer, kept: true })
    }

    /// An answer that is not read into memory: a tombstone first, then the stream.
    async fn streaming<R: RebuildBody>(&mut self, ownership: Ownership<St>, response: Response<R>) -> Response<R> {
        let (head, body) = response.into_parts();
        let landing = match self.settings.keep.verdict(&head) {
            Verdict::Keep => {
                telemetry::event(Event::Tombstone);
                let retention = retention(&self.settings, &head);
                match self.complete(&ownership, &Outcome::Tombstone, retention).await {
                    Ok(Completion::Completed) => ownership.end(),
                    other => {
                        if let Some(response) = self.not_completed(ownership, other).await {
                            return response;
                        }
                    }
                }
                Refusal::new(RefusalKind::AnswerNotKept)
            }
            Verdict::Release => {
                self.release(ownership).await;
                self.later(RefusalKind::Outstanding)
            }
            Verdict::GiveUp => {
                self.give_up(ownership).await;
                Refusal::new(RefusalKind::OutcomeUnknown)
            }
        };
        self.leave(Landing::Refused(landing));
        self.finished("executed");
        Response::from_parts(head, body)
    }

    /// The handler ended and its answer is lost: nobody runs again, and nobody can be given it.
    async fn broken<R: RebuildBody>(&mut self, ownership: Ownership<St>) -> Response<R> {
        telemetry::event(Event::Tombstone);
        match self
            .complete(&ownership, &Outcome::Tombstone, self.settings.retention)
            .await
        {
            Ok(Completion::Completed) => ownership.end(),
            other => {
                if let Some(response) = self.not_completed(ownership, other).await {
                    return response;
                }
            }
        }
        self.leave(Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)));
        self.refuse(Refusal::new(RefusalKind::AnswerBroken))
    }

    /// The handler panicked, or its service failed: there is no answer but ours.
    async fn failed<R: RebuildBody>(&mut self, ownership: Ownership<St>) -> Response<R> {
        telemetry::event(Event::HandlerFailed);
        let refusal = Refusal::new(RefusalKind::HandlerFailed);
        match self.settings.keep.of_failure() {
            Verdict::Keep => {
                let (head, bytes) = refusal.render(&self.settings.refusals).into_parts();
                let body = Collected { bytes, trailers: None };
                return self.answered(ownership, Read { head, body }, Verdict::Keep).await;
            }
            Verdict::Release => self.release(ownership).await,
            Verdict::GiveUp => self.give_up(ownership).await,
        }
        self.settle(Landing::Refused(refusal))
    }

    /// The completion did not succeed: the response to give instead of the handler's, if it must not be given.
    async fn not_completed<R: RebuildBody>(
        &mut self,
        ownership: Ownership<St>,
        completion: Result<Completion, Error>,
    ) -> Option<Response<R>> {
        match completion {
            Ok(Completion::Completed) => {
                ownership.end();
                None
            }
            Ok(Completion::Superseded(stands)) => Some(self.superseded(ownership, stands).await),
            Err(error) => {
                let refusal = self.unrecorded(ownership, &error)?;
                Some(self.settle(Landing::Refused(refusal)))
            }
        }
    }

    /// Somebody took the key over: this attempt's result is dropped, and the caller is given what the key holds.
    async fn superseded<R: RebuildBody>(&mut self, ownership: Ownership<St>, stands: Option<Outcome>) -> Response<R> {
        telemetry::event(Event::Superseded);
        ownership.end();
        self.flight.set_superseded();
        self.flight.set_guarded(false);
        match stands {
            Some(Outcome::Kept(answer)) => self.settle(Landing::Answer { answer, kept: true }),
            Some(Outcome::Tombstone) => self.settle(Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept))),
            None => self.stand_by().await,
        }
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
        &mut self,
        ownership: &Ownership<St>,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let (store, key) = (&self.shared.store, &self.flight.storage_key);
        persist(&self.settings, || {
            store.complete(key, ownership.owner(), outcome, retention)
        })
        .await
    }

    async fn release(&mut self, ownership: Ownership<St>) {
        let (store, key) = (&self.shared.store, &self.flight.storage_key);
        match persist(&self.settings, || store.release(key, ownership.owner())).await {
            Ok(Release::Released) => {}
            Ok(Release::Superseded) => telemetry::event(Event::Superseded),
            Err(error) => telemetry::failure(Event::Unrecorded, &error),
        }
        ownership.end();
    }

    async fn give_up(&mut self, ownership: Ownership<St>) {
        let (store, key) = (&self.shared.store, &self.flight.storage_key);
        // Without the store the lease ends it, a little later.
        if let Err(error) = persist(&self.settings, || store.renew(key, ownership.owner(), Duration::ZERO)).await {
            telemetry::failure(Event::Unrecorded, &error);
        }
        ownership.end();
    }
}

/// Asks what became of a lost attempt, if asked to; then calls the handler and reads its answer.
fn attempt<'e, S, B, R>(
    mut admitted: Admitted<S>,
    lease: Lease,
    settings: &'e Values,
    recover: bool,
    times: &'e mut Times,
) -> impl Future<Output = Ended<R, S::Error>> + use<'e, S, B, R>
where
    S: Service<Request<B>, Response = Response<R>>,
    B: RebuildBody,
    R: RebuildBody,
{
    async move {
        if let (true, OnLost::Recover(check)) = (recover, &settings.on_lost) {
            let recovery = Recovery {
                key: lease.key().clone(),
                fence: lease.fence(),
                attempt: lease.attempt().number(),
                head: admitted.head.clone(),
            };
            match times.outside(check.ask(recovery)).await {
                Recovered::Happened(answer) => {
                    let (head, bytes) = answer.into_parts();
                    let body = Collected { bytes, trailers: None };
                    return Ended::Happened(Read { head, body });
                }
                Recovered::NotHappened => {}
                Recovered::Unknown => return Ended::Unknown,
            }
        }
        let mut request = admitted.request();
        request.extensions_mut().insert(lease);
        let response = match times.outside(admitted.service.call(request)).await {
            Ok(response) => response,
            Err(error) => return Ended::Failed(error),
        };
        let (head, body) = response.into_parts();
        if is_stream(&head) {
            return Ended::Streaming(Response::from_parts(head, body));
        }
        match times.outside(collect(body, settings.answer_limit)).await {
            Ok(body) => Ended::Answered(Read { head, body }),
            Err(Shortfall::Broken(_)) => Ended::Broken,
            Err(Shortfall::TooLarge(body)) => Ended::Streaming(Response::from_parts(head, R::rebuild(body))),
        }
    }
}

/// Does an operation, and repeats it while the store fails for as long as is set; the lease is renewed meanwhile.
async fn persist<T, F>(settings: &Values, operation: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    match in_time(settings.store_timeout, operation()).await {
        Ok(done) => Ok(done),
        Err(error) => Box::pin(persist_again(settings, operation, error)).await,
    }
}

async fn persist_again<T, F>(settings: &Values, operation: impl Fn() -> F, mut last: Error) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);
    let mut pause = Duration::from_millis(20);
    let deadline = Deadline::after(settings.completion_timeout);
    while last.kind() == ErrorKind::StoreUnavailable && !deadline.left().is_zero() {
        telemetry::failure(Event::CompletionRepeated, &last);
        drop(within(pause.min(deadline.left()), std::future::pending::<()>()).await);
        pause = LONGEST_PAUSE.min(pause * 2);
        match in_time(settings.store_timeout, operation()).await {
            Ok(done) => return Ok(done),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn retention(settings: &Values, head: &response::Parts) -> Duration {
    let asked = head.extensions.get::<RetainFor>();
    asked.map_or(settings.retention, |RetainFor(retention)| *retention)
}
