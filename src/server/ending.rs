//! The ends of an execution: the outcome that is recorded, and the responses for the caller and the
//! duplicates.

use std::sync::Arc;
use std::time::Duration;

use http::{Response, StatusCode, request, response};

use super::exchange::{Exchange, Read, Stage};
use super::guard::KeyGuard;
use super::marks::{StreamResponse, is_not_for_store, retention_of};
use super::policy::{Judgement, Verdict};
use super::settings::Values;
use super::singleflight::SharedResult;
use crate::engine::{KeyOwner, Ownership};
use crate::error::Error;
use crate::http::{Collected, RebuildBody, Refusal, RefusalKind, grpc_result, reframe_stream};
use crate::protocol::{Completion, IfLost, Outcome, StoredResponse};
use crate::store::Store;
use crate::telemetry::{self, Event};

/// The refusal after a failure of the handler that a retry cannot run again, because the key is not
/// released.
const HELD: Refusal = Refusal::final_for_key(RefusalKind::HandlerFailed);

/// Returns the refusal for a handler that failed without a response.
const fn handler_failed(can_run_again: bool) -> Refusal {
    match can_run_again {
        true => Refusal::new(RefusalKind::HandlerFailed),
        false => HELD,
    }
}

/// Whether the store recorded the outcome, or the response that replaces the handler's response.
type Concluded<R> = Result<Recorded, Response<R>>;

/// Whether an outcome is in the store. The layer must not mark a response as a replay if it is not
/// in the store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Recorded {
    Yes,
    No,
}

impl<St: Store, S> Exchange<St, S> {
    /// Ends an execution whose response was read to its end ([`Stage::Responded`]). Records the
    /// response, then shares it with the duplicates, then returns it (I5).
    pub(super) async fn record_response<R: RebuildBody>(&mut self) -> Response<R> {
        let Stage::Responded(Read { head, body, judgement }) = &self.stage else {
            return self.finish(SharedResult::Refused(HELD));
        };
        let (judgement, status) = (*judgement, head.status);
        let stored = self.settings.response_headers.store(head, body);
        let recorded = match judgement.verdict {
            Verdict::Store => {
                let outcome = Outcome::Stored(stored.clone());
                let completion = self.complete(&outcome, judgement.retention).await;
                if let Ok(Completion::Completed) = completion {
                    self.key_guard.end_ownership();
                    Recorded::Yes
                } else {
                    match Box::pin(self.not_completed(completion)).await {
                        Ok(recorded) => recorded,
                        Err(response) => return response,
                    }
                }
            }
            Verdict::Release => {
                if self.release().await == Ownership::Superseded {
                    return Box::pin(self.superseded()).await;
                }
                Recorded::No
            }
            Verdict::GiveUp => {
                if Box::pin(self.give_up()).await == Ownership::Superseded {
                    return Box::pin(self.superseded()).await;
                }
                Recorded::No
            }
            // The layer never reads the bodies of responses with these verdicts.
            Verdict::Tombstone | Verdict::Unjudged => return Box::pin(self.broken(judgement, status)).await,
        };
        let is_stored = recorded == Recorded::Yes;
        self.release_slot(SharedResult::Response {
            response: stored,
            is_stored,
        });
        self.finished("executed");
        match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Responded(read) => read.into_response(),
            _ => self.refuse(HELD),
        }
    }

    /// Records the response that the recovery check found for a lost attempt, and returns it as a
    /// replay. The status does not matter, because the request took effect.
    pub(super) async fn happened<R: RebuildBody>(&mut self) -> Response<R> {
        let Stage::Responded(Read { head, body, judgement }) = &mut self.stage else {
            return self.finish(SharedResult::Refused(HELD));
        };
        let judgement = *judgement;
        self.settings.advise(head, judgement.retention.is_zero());
        let outcome = self.settings.outcome_of(self.head.as_deref(), head, body);
        // If the store does not record the response, the caller gets a refusal, and the next
        // attempt calls the check again.
        if let Err(response) = self.conclude(&outcome, judgement.retention).await {
            return response;
        }
        let shared_result = match outcome {
            Outcome::Stored(response) => SharedResult::Response {
                response,
                is_stored: true,
            },
            _ => SharedResult::Refused(Refusal::new(RefusalKind::ResponseNotStored)),
        };
        match std::mem::replace(&mut self.stage, Stage::Nothing) {
            // The store must not have this response, so only this caller gets it.
            Stage::Responded(read) if judgement.verdict == Verdict::Tombstone => {
                self.release_slot(shared_result);
                self.finished("executed");
                read.into_response()
            }
            _ => self.finish(shared_result),
        }
    }

    /// Ends an execution whose response was not read to its end. Writes the record first, then lets
    /// the response stream (I5).
    pub(super) async fn streaming<R: RebuildBody>(
        &mut self,
        mut response: Response<R>,
        judgement: Judgement,
    ) -> Response<R> {
        let status = response.status();
        let shared_result = match judgement.verdict {
            Verdict::Unjudged => return self.broken(judgement, status).await,
            Verdict::Store | Verdict::Tombstone => self.without_body(judgement, status).await,
            Verdict::Release | Verdict::GiveUp => {
                let ended = self.without_outcome(judgement.verdict).await;
                ended.map(|()| {
                    SharedResult::Refused(match self.can_run_again(judgement.verdict) {
                        true => self.later(RefusalKind::Outstanding),
                        false => Refusal::new(RefusalKind::OutcomeUnknown),
                    })
                })
            }
        };
        match shared_result {
            Ok(shared_result) => self.release_slot(shared_result),
            Err(response) => return response,
        }
        self.finished("executed");
        reframe_stream(&mut response);
        response
    }

    /// Ends an execution whose response is lost, because its body broke off or the application's
    /// predicate panicked.
    pub(super) async fn broken<R: RebuildBody>(&mut self, judgement: Judgement, status: StatusCode) -> Response<R> {
        match judgement.verdict {
            Verdict::Release | Verdict::GiveUp => {
                telemetry::event(Event::HandlerFailed);
                self.failed_as(judgement.verdict).await
            }
            Verdict::Store | Verdict::Tombstone | Verdict::Unjudged => {
                match self.without_body(judgement, status).await {
                    Ok(shared_result) => self.release_slot(shared_result),
                    Err(response) => return response,
                }
                self.refuse(Refusal::new(RefusalKind::ResponseBroken))
            }
        }
    }

    /// Ends an execution whose handler panicked or whose service failed. The handler returned no
    /// response, so the layer makes one.
    pub(super) async fn failed<R: RebuildBody>(&mut self) -> Response<R> {
        telemetry::event(Event::HandlerFailed);
        match self.settings.policy.of_failure() {
            Verdict::Store => {
                let retention = self.settings.engine.retention;
                let (head, body, stored) = self.settings.failure_to_store(self.head.as_deref(), retention);
                match self.store_failure(stored, retention).await {
                    Ok(shared_result) => self.release_slot(shared_result),
                    Err(response) => return response,
                }
                self.finished(HELD.code());
                Response::from_parts(head, body.rebuild())
            }
            verdict => self.failed_as(verdict).await,
        }
    }

    /// Ends an execution whose request did not reach the handler, according to the application's
    /// class for the error of the service. The caller gets the error, and the duplicates get a
    /// refusal.
    pub(super) async fn not_run<R: RebuildBody>(&mut self) -> Response<R> {
        if let Err(response) = self.without_outcome(Verdict::Release).await {
            return response;
        }
        self.finish(SharedResult::Refused(self.later(RefusalKind::NotRun)))
    }

    /// Ends an execution with a failure that is not stored.
    async fn failed_as<R: RebuildBody>(&mut self, verdict: Verdict) -> Response<R> {
        if let Err(response) = self.without_outcome(verdict).await {
            return response;
        }
        self.finish(SharedResult::Refused(handler_failed(self.can_run_again(verdict))))
    }

    /// Whether the next request with the key can run after an attempt that ended with this verdict.
    pub(super) fn can_run_again(&self, verdict: Verdict) -> bool {
        let lease = self.key_guard.in_flight.lease();
        let attempt = lease.map_or(1, |lease| lease.grant().attempt);
        self.settings
            .can_run_again(verdict, self.settings.engine.retention, attempt)
    }

    /// Ends the attempt without an outcome. [`Verdict::Release`] releases the key, and any other
    /// verdict gives it up. If another attempt has taken the key over, returns the response for its
    /// outcome as the error.
    async fn without_outcome<R: RebuildBody>(&mut self, verdict: Verdict) -> Result<(), Response<R>> {
        let ownership = match verdict {
            Verdict::Release => self.release().await,
            _ => self.give_up().await,
        };
        if ownership == Ownership::Superseded {
            return Err(self.superseded().await);
        }
        Ok(())
    }

    /// Records that the request took effect, without its response. Returns the result for the
    /// duplicates.
    async fn without_body<R: RebuildBody>(
        &mut self,
        judgement: Judgement,
        status: StatusCode,
    ) -> Result<SharedResult, Response<R>> {
        telemetry::tombstone(judgement.verdict == Verdict::Tombstone);
        // A layer for webhooks acknowledges a duplicate of a tombstone with 200. If the response
        // was no success, store a failure instead, so that no duplicate is acknowledged.
        if self.settings.acknowledges && !status.is_success() {
            let (_, _, stored) = self
                .settings
                .failure_to_store(self.head.as_deref(), judgement.retention);
            return self.store_failure(stored, judgement.retention).await;
        }
        self.conclude(&Outcome::Tombstone, judgement.retention).await?;
        Ok(SharedResult::Refused(Refusal::new(RefusalKind::ResponseNotStored)))
    }

    /// Records the response of a failure. Returns the result for the duplicates.
    async fn store_failure<R: RebuildBody>(
        &mut self,
        stored: StoredResponse,
        retention: Duration,
    ) -> Result<SharedResult, Response<R>> {
        let recorded = self.conclude(&Outcome::Stored(stored.clone()), retention).await?;
        let is_stored = recorded == Recorded::Yes;
        Ok(SharedResult::Response {
            response: stored,
            is_stored,
        })
    }

    /// Records an outcome, and handles a completion that failed.
    async fn conclude<R: RebuildBody>(&mut self, outcome: &Outcome, retention: Duration) -> Concluded<R> {
        let completion = self.complete(outcome, retention).await;
        self.not_completed(completion).await
    }

    /// Handles the result of a completion: recorded, superseded by another attempt, or failed.
    async fn not_completed<R: RebuildBody>(&mut self, completion: Result<Completion, Error>) -> Concluded<R> {
        match completion {
            Ok(Completion::Completed) => {
                self.key_guard.end_ownership();
                Ok(Recorded::Yes)
            }
            Ok(Completion::Superseded(_)) => Err(self.superseded().await),
            Err(error) => match self.unrecorded(&error) {
                Some(refusal) => Err(self.finish(SharedResult::Refused(refusal))),
                None => Ok(Recorded::No),
            },
        }
    }

    /// Ends an attempt whose key another attempt took over (I8). Drops the result of this attempt,
    /// and returns the outcome of the key. The other attempt may belong to another request, so this
    /// reads the record and compares its fingerprint (I4).
    pub(super) async fn superseded<R: RebuildBody>(&mut self) -> Response<R> {
        telemetry::event(Event::Superseded);
        self.is_superseded = true;
        self.key_guard.end_ownership();
        self.key_guard.in_flight.set_superseded();
        self.key_guard.in_flight.set_guarded(false);
        // A refusal must not claim that nothing ran, because the handler of this attempt ran.
        let mut response = self.await_owner().await;
        if let Some(refusal) = response.extensions_mut().get_mut::<Refusal>() {
            *refusal = refusal.clone().after_run();
        }
        response
    }

    /// Handles an outcome that the store did not record. Under `OnLost::Refuse` no later attempt
    /// runs, so the caller may get its response (`None`). Otherwise a later attempt may run again,
    /// so the caller gets a refusal. The sender of a webhook gets a refusal, too, because the layer
    /// must not acknowledge a delivery without a record.
    fn unrecorded(&mut self, error: &Error) -> Option<Refusal> {
        telemetry::failure(Event::Unrecorded, error);
        self.key_guard.end_ownership();
        match self.settings.engine.if_lost {
            IfLost::Refuse if !self.settings.acknowledges => None,
            _ => Some(self.later(RefusalKind::OutcomeUnrecorded)),
        }
    }

    /// Completes the record with this outcome. Without an owner, the attempt counts as superseded.
    async fn complete(&mut self, outcome: &Outcome, retention: Duration) -> Result<Completion, Error> {
        match self.owner() {
            Some(owner) => owner.complete(outcome, retention).await,
            None => Ok(Completion::Superseded(None)),
        }
    }

    /// Releases the key, so that the next attempt can run at once. For an attempt that had no
    /// effect.
    async fn release(&mut self) -> Ownership {
        let ownership = match self.owner() {
            Some(owner) => owner.release().await,
            None => Ownership::Superseded,
        };
        self.key_guard.end_ownership();
        ownership
    }

    /// Ends the lease at once. The record remains as evidence of the attempt (I6).
    pub(super) async fn give_up(&mut self) -> Ownership {
        let ownership = match self.owner() {
            Some(owner) => owner.give_up().await,
            None => Ownership::Superseded,
        };
        self.key_guard.end_ownership();
        ownership
    }

    /// Returns the owner's operations on the record; `None` if this request does not own the key.
    pub(super) fn owner(&self) -> Option<KeyOwner<'_, Arc<St>>> {
        let KeyGuard { shared, in_flight, .. } = &self.key_guard;
        Some(KeyOwner {
            store: &shared.store,
            key: &in_flight.storage_key,
            lease: self.key_guard.owned_lease()?,
            retry: self.settings.engine.retry(),
            tracker: &shared.tracker,
        })
    }
}

impl Values {
    /// Judges an attempt by the head of its response.
    pub(super) fn judge(&self, head: &response::Parts) -> Judgement {
        self.policy.judge(head, self.engine.retention)
    }

    /// Whether the head of a response shows that it is a stream. A gRPC response with the gRPC
    /// status in its head has no messages, so it is no stream, whatever its content type.
    pub(super) fn is_stream(&self, head: &response::Parts) -> bool {
        let is_grpc = || self.policy.is_grpc_response(head.status, &head.headers);
        let has_ended = || grpc_result(&head.headers, None).is_some() && is_grpc();
        head.extensions.get::<StreamResponse>().is_some() || (self.streams.include(head) && !has_ended())
    }

    /// Returns the judgement about the response of a request that took effect, whatever its status.
    pub(super) fn happened(&self, head: &response::Parts) -> Judgement {
        Judgement {
            verdict: if is_not_for_store(head) {
                Verdict::Tombstone
            } else {
                Verdict::Store
            },
            awaits_trailers: false,
            retention: retention_of(head).unwrap_or(self.engine.retention),
        }
    }

    /// Returns the outcome of a request that took effect with this response. A custom renderer of
    /// refusals sees `request`, the head of the request, if it is known.
    pub(super) fn outcome_of(
        &self,
        request: Option<&request::Parts>,
        head: &response::Parts,
        body: &Collected,
    ) -> Outcome {
        let judgement = self.happened(head);
        match judgement.verdict {
            // A layer for webhooks acknowledges a duplicate of a tombstone, which must not happen
            // after a failure.
            Verdict::Tombstone if self.acknowledges && !head.status.is_success() => {
                Outcome::Stored(self.failure_to_store(request, judgement.retention).2)
            }
            Verdict::Tombstone => Outcome::Tombstone,
            _ => Outcome::Stored(self.response_headers.store(head, body)),
        }
    }

    /// Returns the response for a handler that failed, and its stored form, for settings that store
    /// failures.
    pub(super) fn failure_to_store(
        &self,
        head: Option<&request::Parts>,
        retention: Duration,
    ) -> (response::Parts, Collected, StoredResponse) {
        let refusal = handler_failed(retention.is_zero());
        let (head, bytes) = refusal.render(&self.refusals, head).into_parts();
        let body = Collected { bytes, trailers: None };
        let stored = self.response_headers.store(&head, &body);
        (head, body, stored)
    }
}
