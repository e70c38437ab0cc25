//! One execution of the handler, from its grant to its recorded outcome.

use std::future::Future;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use http::{response, Request, Response};
use tokio::runtime::Handle;
use tower_service::Service;

use super::exchange::{Admitted, Cargo, Exchange, Read};
use super::flights::Landing;
use super::guard::Hold;
use super::lease::Lease;
use super::policy::{OnLost, Recovered, Recovery, RetainFor, Verdict};
use super::settings::Values;
use crate::clock::Stopwatch;
use crate::error::Error;
use crate::http::{collect, is_stream, Collected, RebuildBody, Refusal, RefusalKind, Shortfall};
use crate::protocol::{Answer, Completion, Grant, Outcome, Owner, Release, StorageKey};
use crate::store::{end_late, End, Patience, Store};
use crate::telemetry::{self, Event};
use crate::uncut::Word;

/// How the handler ended.
pub(super) enum Ended<R, E> {
    /// With an answer that was read to its end.
    Answered(Read),
    /// With an answer of this head that broke off while it was read.
    Broken(response::Parts),
    /// With an error of the service.
    Failed(E),
    /// With a panic.
    Panicked,
    /// With a response that cannot be stored: a stream, or one that is longer or takes longer than the limits allow.
    Streaming(Response<R>),
}

/// What became of a lost attempt.
enum Found {
    /// It took effect; its answer is the cargo now.
    Happened,
    /// Nothing.
    Nothing,
    /// Nobody knows.
    Unknown,
}

/// The refusal after a failure that nobody may repeat.
const HELD: Refusal = Refusal::held(RefusalKind::HandlerFailed);

impl<St: Store, S> Exchange<St, S> {
    /// Asks what became of the attempt before this one, and runs the handler if nothing did.
    pub(super) async fn recover_and_execute<B, R>(&mut self, grant: Grant) -> Result<Response<R>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: RebuildBody + Send + 'static,
        R: RebuildBody + Send + 'static,
        R::Error: Send,
    {
        match self.recover(grant).await {
            Found::Happened => Ok(self.happened().await),
            Found::Nothing => self.execute(grant).await,
            Found::Unknown => {
                self.give_up().await;
                Ok(self.settle(Landing::Refused(Refusal::new(RefusalKind::OutcomeUnknown))))
            }
        }
    }

    /// Runs the handler and records how it ended, before the first byte of its answer leaves.
    pub(super) async fn execute<B, R>(&mut self, grant: Grant) -> Result<Response<R>, S::Error>
    where
        S: Service<Request<B>, Response = Response<R>> + Send + 'static,
        S::Future: Send,
        S::Error: Send,
        B: RebuildBody + Send + 'static,
        R: RebuildBody + Send + 'static,
        R::Error: Send,
    {
        let running = self.unload().and_then(|admitted| {
            let lease = Lease::new(&self.hold, &self.settings, grant);
            start(*admitted, lease, &self.settings)
        });
        self.see_through(running).await
    }

    /// Takes possession of what was granted to a claim that was made at `asked`.
    pub(super) fn own(&mut self, grant: Grant, asked: Stopwatch) {
        self.hold.own(grant, || asked);
        // Should it have to wait for another owner later, that is a wait of its own.
        self.wait = None;
        telemetry::granted(self.span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
    }

    /// Waits for the handler and records how it ended. Without a future it has panicked already.
    pub(super) async fn see_through<R: RebuildBody, E>(
        &mut self,
        running: Option<Running<impl Future<Output = Ended<R, E>>>>,
    ) -> Result<Response<R>, E> {
        let ended = self.ended(running).await;
        #[cfg(feature = "postgres")]
        if self.hold.flight.is_in_transaction() {
            return Box::pin(self.after_transaction(ended)).await;
        }
        match ended {
            None => Ok(self.answered().await),
            Some(ended) => Box::pin(self.without_answer(*ended)).await,
        }
    }

    /// Waits for the handler; `None` when it answered, with the answer as the cargo.
    async fn ended<R, E>(
        &mut self,
        running: Option<Running<impl Future<Output = Ended<R, E>>>>,
    ) -> Option<Box<Ended<R, E>>> {
        let Some(running) = running else {
            return Some(Box::new(Ended::Panicked));
        };
        let running = self.times.outside(self.hold.during(running));
        match AssertUnwindSafe(running).catch_unwind().await {
            Ok(Ended::Answered(read)) => {
                self.cargo = Cargo::Answered(read);
                None
            }
            Ok(ended) => Some(Box::new(ended)),
            Err(_) => Some(Box::new(Ended::Panicked)),
        }
    }

    /// Records an end that came without an answer to keep.
    pub(super) async fn without_answer<R: RebuildBody, E>(&mut self, ended: Ended<R, E>) -> Result<Response<R>, E> {
        match ended {
            Ended::Answered(read) => {
                self.cargo = Cargo::Answered(read);
                Ok(self.answered().await)
            }
            // A tombstone would be answered with 200, which is not what this answer was about to say.
            Ended::Broken(head) if self.settings.acknowledges && !head.status.is_success() => Ok(self.failed().await),
            Ended::Broken(_) => Ok(self.broken().await),
            Ended::Failed(error) => {
                let _: Response<R> = self.failed().await;
                Err(error)
            }
            Ended::Panicked => Ok(self.failed().await),
            Ended::Streaming(response) => Ok(self.streaming(response).await),
        }
    }

    /// Asks what became of a lost attempt.
    async fn recover(&mut self, grant: Grant) -> Found {
        let (OnLost::Recover(check), Cargo::Admitted(admitted)) = (&self.settings.on_lost, &self.cargo) else {
            return Found::Nothing;
        };
        let recovery = Recovery {
            key: self.hold.flight.key.clone(),
            fence: grant.owner.fence,
            attempt: grant.attempt,
            head: admitted.head.clone(),
        };
        // The function is the application's, and may panic before it returns its future.
        let Ok(asked) = catch_unwind(AssertUnwindSafe(|| check.ask(recovery))) else {
            return Found::Unknown;
        };
        let asked = self.hold.during(AssertUnwindSafe(asked).catch_unwind());
        match self.times.outside(asked).await {
            Ok(Recovered::Happened(answer)) => {
                let (head, bytes) = answer.into_parts();
                let body = Collected { bytes, trailers: None };
                self.cargo = Cargo::Answered(Read { head, body });
                Found::Happened
            }
            Ok(Recovered::NotHappened) => Found::Nothing,
            Ok(Recovered::Unknown) | Err(_) => Found::Unknown,
        }
    }

    /// Records the answer and gives it.
    pub(super) async fn answered<R: RebuildBody>(&mut self) -> Response<R> {
        let Some((answer, retention, verdict)) = self.to_store() else {
            return Box::pin(self.broken()).await;
        };
        let kept = match verdict {
            Verdict::Keep => {
                let outcome = Outcome::Kept(answer.clone());
                let completion = self.complete(&outcome, retention).await;
                if let Ok(Completion::Completed) = completion {
                    self.hold.end_ownership();
                    true
                } else if let Some(response) = Box::pin(self.not_completed(completion)).await {
                    return response;
                } else {
                    false
                }
            }
            Verdict::Release => {
                if let Release::Superseded = self.release().await {
                    return Box::pin(self.superseded()).await;
                }
                false
            }
            Verdict::GiveUp => {
                Box::pin(self.give_up()).await;
                false
            }
        };
        self.leave(Landing::Answer { answer, kept });
        self.finished("executed");
        match std::mem::replace(&mut self.cargo, Cargo::Nothing) {
            Cargo::Answered(Read { head, body }) => Response::from_parts(head, body.rebuild()),
            _ => self.refuse(Refusal::new(RefusalKind::HandlerFailed)),
        }
    }

    /// The cargo as it is stored, for how long, and what is to become of it; `None` when the application's predicate panics,
    /// which comes after the effect: nobody may run again.
    fn to_store(&self) -> Option<(Answer, Duration, Verdict)> {
        let Cargo::Answered(Read { head, body }) = &self.cargo else {
            return None;
        };
        let answer = self.settings.answer_headers.store(head, body);
        Some((answer, retention(&self.settings, head), self.verdict(head)?))
    }

    fn verdict(&self, head: &response::Parts) -> Option<Verdict> {
        catch_unwind(AssertUnwindSafe(|| self.settings.keep.verdict(head))).ok()
    }

    /// A lost attempt took effect: its answer is kept and given as the replay that it is.
    async fn happened<R: RebuildBody>(&mut self) -> Response<R> {
        let Some((answer, retention, _)) = self.to_store() else {
            return self.broken().await;
        };
        // Should it not be recorded, the next attempt asks again and is told the same.
        match self.conclude(&Outcome::Kept(answer.clone()), retention).await {
            Some(response) => response,
            None => self.settle(Landing::Answer { answer, kept: true }),
        }
    }

    /// An answer that is not read into memory: a tombstone first, then the stream.
    async fn streaming<R: RebuildBody>(&mut self, response: Response<R>) -> Response<R> {
        let (head, body) = response.into_parts();
        let Some(verdict) = self.verdict(&head) else {
            return self.broken().await;
        };
        let landing = match verdict {
            Verdict::Keep => {
                telemetry::event(Event::Tombstone);
                let retention = retention(&self.settings, &head);
                if let Some(response) = self.conclude(&Outcome::Tombstone, retention).await {
                    return response;
                }
                Refusal::new(RefusalKind::AnswerNotKept)
            }
            Verdict::Release => {
                // The answer streams on even if somebody else has the key: of a stream there is nothing to compare.
                let _: Release = self.release().await;
                self.later(RefusalKind::Outstanding)
            }
            Verdict::GiveUp => {
                self.give_up().await;
                Refusal::new(RefusalKind::OutcomeUnknown)
            }
        };
        self.leave(Landing::Refused(landing));
        self.finished("executed");
        Response::from_parts(head, body)
    }

    /// The handler ended and its answer is lost: nobody runs again, and nobody can be given it.
    async fn broken<R: RebuildBody>(&mut self) -> Response<R> {
        telemetry::event(Event::Tombstone);
        let retention = self.settings.retention;
        if let Some(response) = self.conclude(&Outcome::Tombstone, retention).await {
            return response;
        }
        self.leave(Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)));
        self.refuse(Refusal::new(RefusalKind::AnswerBroken))
    }

    /// The handler panicked, or its service failed: there is no answer but ours.
    pub(super) async fn failed<R: RebuildBody>(&mut self) -> Response<R> {
        telemetry::event(Event::HandlerFailed);
        let verdict = self.settings.keep.of_failure();
        let refusal = match verdict {
            Verdict::Release => Refusal::new(RefusalKind::HandlerFailed),
            Verdict::GiveUp | Verdict::Keep => HELD,
        };
        match verdict {
            Verdict::Keep => {
                let (head, body, answer) = self.settings.failure_to_keep();
                let retention = self.settings.retention;
                if let Some(response) = self.conclude(&Outcome::Kept(answer.clone()), retention).await {
                    return response;
                }
                self.leave(Landing::Answer { answer, kept: true });
                self.finished(refusal.code());
                return Response::from_parts(head, body.rebuild());
            }
            Verdict::Release => {
                if let Release::Superseded = self.release().await {
                    return self.superseded().await;
                }
            }
            Verdict::GiveUp => self.give_up().await,
        }
        self.settle(Landing::Refused(refusal))
    }

    /// Records an outcome: the response to give instead of the handler's, if it must not be given.
    async fn conclude<R: RebuildBody>(&mut self, outcome: &Outcome, retention: Duration) -> Option<Response<R>> {
        let completion = self.complete(outcome, retention).await;
        self.not_completed(completion).await
    }

    /// A completion that may not have succeeded: the response to give instead of the handler's, if it must not be given.
    async fn not_completed<R: RebuildBody>(&mut self, completion: Result<Completion, Error>) -> Option<Response<R>> {
        match completion {
            Ok(Completion::Completed) => {
                self.hold.end_ownership();
                None
            }
            Ok(Completion::Superseded(_)) => Some(self.superseded().await),
            Err(error) => {
                let refusal = self.unrecorded(&error)?;
                Some(self.settle(Landing::Refused(refusal)))
            }
        }
    }

    /// Somebody took the key over: this attempt's result is dropped, and the caller is given what the key holds, if it was made
    /// for the same request. That is looked up: what superseded this attempt may belong to somebody else altogether.
    pub(super) async fn superseded<R: RebuildBody>(&mut self) -> Response<R> {
        telemetry::event(Event::Superseded);
        self.hold.end_ownership();
        self.hold.flight.set_superseded();
        self.hold.flight.set_guarded(false);
        self.stand_by().await
    }

    /// The outcome could not be recorded. Under `OnLost::Refuse` nobody will run again, so the caller may have its answer;
    /// elsewhere the next attempt runs, and the caller must not believe that this one counts. Nor is a webhook acknowledged of
    /// which nothing is recorded.
    fn unrecorded(&mut self, error: &Error) -> Option<Refusal> {
        telemetry::failure(Event::Unrecorded, error);
        self.hold.end_ownership();
        match self.settings.on_lost {
            OnLost::Refuse if !self.settings.acknowledges => None,
            _ => Some(self.later(RefusalKind::OutcomeUnrecorded)),
        }
    }

    async fn complete(&mut self, outcome: &Outcome, retention: Duration) -> Result<Completion, Error> {
        let completion = match self.owned() {
            Some((store, key, owner)) => {
                persist(&self.settings, || store.complete(key, owner, outcome, retention)).await
            }
            None => Ok(Completion::Superseded(None)),
        };
        if let Err(error) = &completion {
            self.end_behind(error, End::completed(outcome, retention));
        }
        completion
    }

    /// Ends the attempt without an outcome.
    async fn release(&mut self) -> Release {
        self.hold.flight.end_renewal();
        let released = match self.owned() {
            Some((store, key, owner)) => persist(&self.settings, || store.release(key, owner)).await,
            None => Ok(Release::Superseded),
        };
        if let Err(error) = &released {
            self.end_behind(error, End::Released);
        }
        self.hold.end_ownership();
        released.unwrap_or_else(|error| {
            telemetry::failure(Event::Unrecorded, &error);
            Release::Released
        })
    }

    async fn give_up(&mut self) {
        self.hold.flight.end_renewal();
        if let Some((store, key, owner)) = self.owned() {
            // Without the store the lease ends it, a little later.
            if let Err(error) = persist(&self.settings, || store.renew(key, owner, Duration::ZERO)).await {
                telemetry::failure(Event::Unrecorded, &error);
            }
        }
        self.hold.end_ownership();
    }

    /// Goes on telling a store that is away how the attempt ended: what comes of that is no longer the caller's.
    fn end_behind(&self, error: &Error, end: End) {
        let (Some((_, key, owner)), Ok(runtime)) = (self.owned(), Handle::try_current()) else {
            return;
        };
        if Patience::repeats(error) {
            let (key, shared, patience) = (*key, Arc::clone(&self.hold.shared), self.settings.patience().behind());
            let tracker = Arc::clone(&shared.tracker);
            tracker.spawn_behind(&runtime, Word::End(end.bytes()), async move {
                end_late(&shared.store, &key, owner, &end, patience).await;
            });
        }
    }

    fn owned(&self) -> Option<(&St, &StorageKey, Owner)> {
        let Hold { shared, flight, .. } = &self.hold;
        Some((&shared.store, &flight.storage_key, self.hold.owner()?))
    }
}

impl Values {
    pub(super) const fn patience(&self) -> Patience {
        Patience::new(self.store_timeout, self.completion_timeout)
    }

    /// What is given and stored as the answer of a handler that failed, where that is kept.
    pub(super) fn failure_to_keep(&self) -> (response::Parts, Collected, Answer) {
        let (head, bytes) = HELD.render(&self.refusals).into_parts();
        let body = Collected { bytes, trailers: None };
        let answer = self.answer_headers.store(&head, &body);
        (head, body, answer)
    }
}

/// A handler under way. In a box: the future of an exchange would else carry the room for it twice.
pub(super) type Running<F> = Pin<Box<F>>;

/// Calls the handler; `None` when it panics at once.
pub(super) fn start<S, B, R>(
    admitted: Admitted<S>,
    lease: Lease,
    settings: &Values,
) -> Option<Running<impl Future<Output = Ended<R, S::Error>> + use<S, B, R>>>
where
    S: Service<Request<B>, Response = Response<R>>,
    B: RebuildBody,
    R: RebuildBody,
{
    let (mut service, mut request) = admitted.request();
    let outer = request.extensions_mut().remove::<Lease>();
    request.extensions_mut().insert(lease.within(outer));
    let running = catch_unwind(AssertUnwindSafe(|| service.call(request))).ok()?;
    Some(Box::pin(ended(
        running,
        settings.answer_limit,
        settings.response_timeout,
    )))
}

/// Waits for the handler and reads its answer.
async fn ended<F, R, E>(running: F, limit: usize, timeout: Duration) -> Ended<R, E>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: RebuildBody,
{
    let response = match running.await {
        Ok(response) => response,
        Err(error) => return Ended::Failed(error),
    };
    let (head, body) = response.into_parts();
    if is_stream(&head) {
        return Ended::Streaming(Response::from_parts(head, body));
    }
    match collect(body, limit, timeout).await {
        Ok(body) => Ended::Answered(Read { head, body }),
        Err(Shortfall::Broken(_)) => Ended::Broken(head),
        Err(Shortfall::TooLarge(body) | Shortfall::TooSlow(body)) => {
            Ended::Streaming(Response::from_parts(head, R::rebuild(body)))
        }
    }
}

/// Does an operation, and repeats it while the store fails for as long as is set; the lease is renewed meanwhile.
pub(super) fn persist<T, F>(settings: &Values, operation: impl Fn() -> F) -> impl Future<Output = Result<T, Error>>
where
    F: Future<Output = Result<T, Error>>,
{
    settings.patience().persist(operation)
}

pub(super) fn retention(settings: &Values, head: &response::Parts) -> Duration {
    let asked = head.extensions.get::<RetainFor>();
    asked.map_or(settings.retention, |RetainFor(retention)| *retention)
}
