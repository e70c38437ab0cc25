//! The ends of an execution: what is recorded, and what the caller and the duplicates get.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::{response, Response, StatusCode};
use tokio::runtime::Handle;

use super::exchange::{Cargo, Exchange, Read};
use super::flights::Landing;
use super::guard::Hold;
use super::policy::{retention_of, Judgement, OnLost, Verdict};
use super::settings::Values;
use crate::error::Error;
use crate::http::{Collected, RebuildBody, Refusal, RefusalKind};
use crate::protocol::{Answer, Completion, Outcome, Owner, Release, StorageKey};
use crate::store::{end_late, End, Patience, Store};
use crate::telemetry::{self, Event};
use crate::uncut::Word;

/// The refusal after a failure that must not be repeated.
const HELD: Refusal = Refusal::held(RefusalKind::HandlerFailed);

/// Whether the outcome was recorded; or the response to give instead of the handler's.
type Concluded<R> = Result<Recorded, Response<R>>;

/// Whether an outcome is in the store. What is not must not be marked as a replay.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Recorded {
    Yes,
    No,
}

impl<St: Store, S> Exchange<St, S> {
    /// How the attempt ends, by the head of its response.
    pub(super) fn judge(&self, head: &response::Parts) -> Judgement {
        self.settings.keep.judge(head, self.settings.retention)
    }

    /// Records the response that is the cargo, and returns it.
    pub(super) async fn answered<R: RebuildBody>(&mut self) -> Response<R> {
        let Cargo::Answered(Read { head, body }) = &self.cargo else {
            return self.settle(Landing::Refused(HELD));
        };
        let (judgement, status) = (self.judge(head), head.status);
        let answer = self.settings.answer_headers.store(head, body);
        let recorded = match judgement.verdict {
            Verdict::Keep => {
                let outcome = Outcome::Kept(answer.clone());
                let completion = self.complete(&outcome, judgement.retention).await;
                if let Ok(Completion::Completed) = completion {
                    self.hold.end_ownership();
                    Recorded::Yes
                } else {
                    match Box::pin(self.not_completed(completion)).await {
                        Ok(recorded) => recorded,
                        Err(response) => return response,
                    }
                }
            }
            Verdict::Release => {
                if let Release::Superseded = self.release().await {
                    return Box::pin(self.superseded()).await;
                }
                Recorded::No
            }
            Verdict::GiveUp => {
                Box::pin(self.give_up()).await;
                Recorded::No
            }
            Verdict::Tombstone => {
                if let Err(response) = Box::pin(self.without_body(judgement, status)).await {
                    return response;
                }
                Recorded::No
            }
            Verdict::Unjudged => return Box::pin(self.broken(judgement, status)).await,
        };
        let kept = recorded == Recorded::Yes;
        self.leave(Landing::Answer { answer, kept });
        self.finished("executed");
        match std::mem::replace(&mut self.cargo, Cargo::Nothing) {
            Cargo::Answered(Read { head, body }) => Response::from_parts(head, body.rebuild()),
            _ => self.refuse(HELD),
        }
    }

    /// Records the response of a lost attempt, and returns it as the replay that it is. It is stored whatever its head says, since
    /// the request took effect.
    pub(super) async fn happened<R: RebuildBody>(&mut self) -> Response<R> {
        let Cargo::Answered(Read { head, body }) = &self.cargo else {
            return self.settle(Landing::Refused(HELD));
        };
        let answer = self.settings.answer_headers.store(head, body);
        let retention = retention_of(head).unwrap_or(self.settings.retention);
        // If this cannot be recorded, the caller is refused, and the next attempt asks again.
        match self.conclude(&Outcome::Kept(answer.clone()), retention).await {
            Ok(_) => self.settle(Landing::Answer { answer, kept: true }),
            Err(response) => response,
        }
    }

    /// The end of a response that was not read to its end: the record comes first, then the response streams.
    pub(super) async fn streaming<R: RebuildBody>(&mut self, response: Response<R>) -> Response<R> {
        let (head, body) = response.into_parts();
        let judgement = self.judge(&head);
        let landing = match judgement.verdict {
            Verdict::Unjudged => return self.broken(judgement, head.status).await,
            Verdict::Keep | Verdict::Tombstone => self.without_body(judgement, head.status).await,
            Verdict::Release => {
                let released = self.without_outcome(Verdict::Release).await;
                released.map(|()| Landing::Refused(self.later(RefusalKind::Outstanding)))
            }
            Verdict::GiveUp => {
                let given_up = self.without_outcome(Verdict::GiveUp).await;
                given_up.map(|()| Landing::Refused(Refusal::new(RefusalKind::OutcomeUnknown)))
            }
        };
        match landing {
            Ok(landing) => self.leave(landing),
            Err(response) => return response,
        }
        self.finished("executed");
        Response::from_parts(head, body)
    }

    /// The end of a response that is lost: its body broke off, or the application's predicate panicked.
    pub(super) async fn broken<R: RebuildBody>(&mut self, judgement: Judgement, status: StatusCode) -> Response<R> {
        match judgement.verdict {
            Verdict::Release | Verdict::GiveUp => {
                telemetry::event(Event::HandlerFailed);
                self.failed_as(judgement.verdict).await
            }
            Verdict::Keep | Verdict::Tombstone | Verdict::Unjudged => {
                match self.without_body(judgement, status).await {
                    Ok(landing) => self.leave(landing),
                    Err(response) => return response,
                }
                self.refuse(Refusal::new(RefusalKind::AnswerBroken))
            }
        }
    }

    /// The end of a handler that panicked or whose service failed. There is no response but ours.
    pub(super) async fn failed<R: RebuildBody>(&mut self) -> Response<R> {
        telemetry::event(Event::HandlerFailed);
        match self.settings.keep.of_failure() {
            Verdict::Keep => {
                let (head, body, answer) = self.settings.failure_to_keep();
                let retention = self.settings.retention;
                match self.keep_failure(answer, retention).await {
                    Ok(landing) => self.leave(landing),
                    Err(response) => return response,
                }
                self.finished(HELD.code());
                Response::from_parts(head, body.rebuild())
            }
            verdict => self.failed_as(verdict).await,
        }
    }

    /// The end of a failure that is not stored.
    async fn failed_as<R: RebuildBody>(&mut self, verdict: Verdict) -> Response<R> {
        if let Err(response) = self.without_outcome(verdict).await {
            return response;
        }
        self.settle(Landing::Refused(match verdict {
            Verdict::Release => Refusal::new(RefusalKind::HandlerFailed),
            _ => HELD,
        }))
    }

    /// Records an end without an outcome: the key is released, or given up.
    async fn without_outcome<R: RebuildBody>(&mut self, verdict: Verdict) -> Result<(), Response<R>> {
        if verdict != Verdict::Release {
            self.give_up().await;
            return Ok(());
        }
        match self.release().await {
            Release::Superseded => Err(self.superseded().await),
            Release::Released => Ok(()),
        }
    }

    /// Records that the request is done, without its response. Returns what duplicates get.
    async fn without_body<R: RebuildBody>(
        &mut self,
        judgement: Judgement,
        status: StatusCode,
    ) -> Result<Landing, Response<R>> {
        telemetry::event(Event::Tombstone);
        // A duplicate of an acknowledged tombstone gets a 200, which a response that was no success must not become.
        if self.settings.acknowledges && !status.is_success() {
            let (_, _, answer) = self.settings.failure_to_keep();
            return self.keep_failure(answer, judgement.retention).await;
        }
        self.conclude(&Outcome::Tombstone, judgement.retention).await?;
        Ok(Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)))
    }

    /// Records a failure. Returns what duplicates get.
    async fn keep_failure<R: RebuildBody>(
        &mut self,
        answer: Answer,
        retention: Duration,
    ) -> Result<Landing, Response<R>> {
        let recorded = self.conclude(&Outcome::Kept(answer.clone()), retention).await?;
        let kept = recorded == Recorded::Yes;
        Ok(Landing::Answer { answer, kept })
    }

    async fn conclude<R: RebuildBody>(&mut self, outcome: &Outcome, retention: Duration) -> Concluded<R> {
        let completion = self.complete(outcome, retention).await;
        self.not_completed(completion).await
    }

    /// The rest of a completion that may not have succeeded.
    async fn not_completed<R: RebuildBody>(&mut self, completion: Result<Completion, Error>) -> Concluded<R> {
        match completion {
            Ok(Completion::Completed) => {
                self.hold.end_ownership();
                Ok(Recorded::Yes)
            }
            Ok(Completion::Superseded(_)) => Err(self.superseded().await),
            Err(error) => match self.unrecorded(&error) {
                Some(refusal) => Err(self.settle(Landing::Refused(refusal))),
                None => Ok(Recorded::No),
            },
        }
    }

    /// Another attempt took the key over: the result of this one is dropped, and the caller gets what the key holds, if it was made
    /// for the same request. That is looked up, because what superseded this attempt may belong to another request.
    pub(super) async fn superseded<R: RebuildBody>(&mut self) -> Response<R> {
        telemetry::event(Event::Superseded);
        self.hold.end_ownership();
        self.hold.flight.set_superseded();
        self.hold.flight.set_guarded(false);
        let mut response = self.stand_by().await;
        if let Some(refusal) = response.extensions_mut().get_mut::<Refusal>() {
            *refusal = refusal.after_run();
        }
        response
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

    pub(super) async fn give_up(&mut self) {
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

/// Does an operation, and repeats it while the store fails for as long as is set; the lease is renewed meanwhile.
pub(super) fn persist<T, F>(settings: &Values, operation: impl Fn() -> F) -> impl Future<Output = Result<T, Error>>
where
    F: Future<Output = Result<T, Error>>,
{
    settings.patience().persist(operation)
}
