//! The effect and the response in one transaction, in which the handler completes the record of its
//! own key.
//!
//! After the handler, the layer reads the outcome from the record and does not rely on the
//! handler's response. If the store is unavailable for so long that the caller gets a refusal, a
//! background task continues to query the record.

use http::{HeaderMap, Response, StatusCode, request};
use sqlx::postgres::PgConnection;

use super::exchange::{Exchange, Read, Stage};
use super::execution::Ended;
use super::lease::Lease;
use super::marks::{DoNotStore, StoreOutcomeOnly};
use super::policy::Verdict;
use super::settings::Values;
use super::singleflight::SharedResult;
use crate::engine::{TransactionEnd, TransactionState};
use crate::error::Error;
#[cfg(feature = "tonic")]
use crate::http::add_marks;
use crate::http::{RebuildBody, Refusal, RefusalKind, collect, reframe_stream};
use crate::protocol::{Completion, Outcome, Owner, StoredResponse};
use crate::store::{AttemptEnd, Store};
use crate::telemetry::{self, Event};

impl Lease {
    /// Records `response` as the outcome of this attempt *within a transaction of the handler*, in
    /// the PostgreSQL database of the records. The effect and the response commit together, or
    /// neither does. Returns the response that the handler returns after the commit.
    ///
    /// This is [`complete_response_in`](Self::complete_response_in) for everything that axum
    /// accepts as a response. See there for the rules.
    ///
    /// ```no_run
    /// use axum::extract::State;
    /// use axum::http::StatusCode;
    /// use axum::response::Response;
    /// use sqlx::PgPool;
    /// use tower_idempotency::Lease;
    ///
    /// async fn pay(State(pool): State<PgPool>, lease: Lease) -> Result<Response, StatusCode> {
    ///     let failed = |_| StatusCode::INTERNAL_SERVER_ERROR;
    ///     let mut transaction = pool.begin().await.map_err(failed)?;
    ///     let insert = sqlx::query("INSERT INTO payments (amount) VALUES (100)");
    ///     insert.execute(&mut *transaction).await.map_err(failed)?;
    ///     let response = lease.complete_in(&mut transaction, (StatusCode::CREATED, "paid")).await;
    ///     let response = response.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    ///     transaction.commit().await.map_err(failed)?;
    ///     Ok(response)
    /// }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// As for [`complete_response_in`](Self::complete_response_in).
    ///
    /// # Errors
    ///
    /// As for [`complete_response_in`](Self::complete_response_in).
    #[cfg(feature = "axum")]
    pub async fn complete_in(
        &self,
        connection: &mut PgConnection,
        response: impl axum::response::IntoResponse,
    ) -> Result<axum::response::Response, Error> {
        self.complete_response_in(connection, response.into_response()).await
    }

    /// Records `response` as the outcome of this attempt within a transaction of the handler,
    /// regardless of the rules of the layer for its status. If the response has the mark
    /// [`StoreOutcomeOnly`](crate::StoreOutcomeOnly), the record shows only that the request is
    /// done. Returns the response that the handler returns after the commit.
    ///
    /// Call this last before the commit, because the transaction then holds the row lock of the
    /// record, and duplicates wait. Then commit, and return the response.
    ///
    /// The layer reads the end of the transaction from the record:
    ///
    /// * If the commit fails, return any error. If the commit took effect nevertheless, the layer
    ///   returns the recorded response instead.
    /// * If the transaction was not committed, the attempt counts as failed
    ///   ([`OnError`](crate::OnError)), even if the handler returns this response.
    /// * If the record shows only that the request is done, the caller gets only the response that
    ///   this method returned for the committed transaction. If the handler returns any other response, the
    ///   caller gets 409 `response-not-stored`.
    /// * If the layer cannot read the record, the caller gets 503 after
    ///   [`with_completion_timeout`](crate::IdempotencyLayer::with_completion_timeout). A task then
    ///   queries the record for twelve times as long, two minutes by default, so that a request
    ///   that was rolled back can run again. [`Drain`](crate::Drain) waits for this task.
    ///
    /// Rules for the transaction:
    ///
    /// * If all effects of the handler are in the transaction, the handler may run again after a
    ///   crash. Set [`OnLost::Execute`](crate::OnLost::Execute). Otherwise the layer refuses a key
    ///   whose process was killed until an operator resolves the key.
    /// * Use READ COMMITTED, PostgreSQL's default. At stricter isolation levels, a duplicate in
    ///   another process can make the transaction fail.
    /// * Do not complete within a savepoint that may be rolled back while its transaction is
    ///   committed.
    /// * The layer does not renew the lease from here on. The row lock excludes other attempts
    ///   until the transaction ends. After a rollback, return soon.
    ///
    /// # Cancel safety
    ///
    /// If this future is dropped before it is ready, the completion may or may not have taken
    /// effect, and the server may still execute it. End the transaction before the handler returns.
    /// The layer then reads the outcome from the record.
    ///
    /// # Errors
    ///
    /// In every case, roll the transaction back (drop it) and return any error.
    ///
    /// * [`Superseded`](crate::ErrorKind::Superseded) if another attempt has taken the key over, or
    ///   if this attempt has completed the key already, for example in an earlier transaction whose
    ///   commit took effect although its reply was lost. The layer then returns the outcome of the
    ///   key.
    /// * [`Configuration`](crate::ErrorKind::Configuration) if the layer's store is not a
    ///   [`PostgresStore`](crate::PostgresStore).
    /// * [`Configuration`](crate::ErrorKind::Configuration) if the response is a stream, breaks
    ///   off, or exceeds the layer's limits of length or time.
    /// * [`Configuration`](crate::ErrorKind::Configuration) if the response has the mark
    ///   [`DoNotStore`](crate::DoNotStore). Under the settings for webhooks, also if a response
    ///   that is not a success has the mark [`StoreOutcomeOnly`](crate::StoreOutcomeOnly).
    /// * The errors of [`Store::complete`].
    pub async fn complete_response_in<B: RebuildBody>(
        &self,
        connection: &mut PgConnection,
        response: Response<B>,
    ) -> Result<Response<B>, Error> {
        let context = self.transaction_context();
        let (store, settings) = (context.postgres()?, &context.settings);
        let (mut head, body) = response.into_parts();
        #[cfg(feature = "tonic")]
        add_marks(&mut head);
        if head.extensions.get::<DoNotStore>().is_some() {
            return Err(FORBIDDEN);
        }
        let is_alone = head.extensions.get::<StoreOutcomeOnly>().is_some();
        if is_alone && settings.acknowledges && !head.status.is_success() {
            return Err(NOT_ACKNOWLEDGED);
        }
        if settings.is_stream(&head) {
            return Err(NOT_STORABLE);
        }
        let reading = collect(body, settings.response_limit, settings.response_timeout);
        let body = reading.await.map_err(|_| NOT_STORABLE)?;
        let body = settings.completed(&mut head, body);
        let judgement = settings.happened(&head);
        settings.advise(&mut head, judgement.retention.is_zero());
        let outcome = settings.outcome_of(None, &head, &body);
        let retention = judgement.retention;
        let code = settings
            .policy
            .grpc_code(head.status, &head.headers, body.trailers.as_ref());
        // Begin before the completion is sent. If this future is dropped from here on, the
        // completion may have reached the server, so the layer must read the record.
        let recording = self.in_flight().begin_transaction(head.status, code);
        let completion = store.complete_in(connection, self.storage_key(), self.owner(), &outcome, retention);
        let failure = match completion.await {
            Ok(Completion::Completed) => {
                self.in_flight().succeed_transaction(&recording);
                if is_alone {
                    let (owner, number) = (self.owner(), recording.number);
                    head.extensions.insert(CompletedAlone { owner, number });
                }
                return Ok(Response::from_parts(head, body.rebuild()));
            }
            Ok(Completion::Superseded(_)) => {
                self.in_flight().supersede_transaction(&recording);
                SUPERSEDED
            }
            Err(error) => error,
        };
        if let Some(lease) = self.in_flight().lease() {
            lease.fail_completion();
        }
        Err(failure)
    }
}

/// Response extension: a transaction recorded that the request is done, but not this response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CompletedAlone {
    owner: Owner,
    /// The number of the response among those that this owner tried to record.
    number: u64,
}

const NOT_STORABLE: Error = Error::configuration(
    "the response is a stream, broken, or longer or slower than the layer's limits, so it cannot be completed in a \
     transaction; shorten it, or raise `with_response_limit` or `with_response_timeout`",
);

const FORBIDDEN: Error = Error::configuration(
    "the response has the mark `DoNotStore`, so it cannot be completed in a transaction; remove the mark, or roll back \
     and return the response",
);

const NOT_ACKNOWLEDGED: Error = Error::configuration(
    "the response is not a success and has the mark `StoreOutcomeOnly`, so a layer for webhooks would acknowledge its \
     duplicates; remove the mark, or roll back and return the response",
);

const SUPERSEDED: Error =
    Error::superseded("the key is completed already, or another attempt has taken it over; roll the transaction back");

impl<St: Store, S> Exchange<St, S> {
    /// Ends an execution whose handler tried to complete the record in its own transaction. If
    /// `ended` is `None`, the exchange carries the handler's response ([`Stage::Responded`]).
    ///
    /// The record decides about the end, not the handler's response (I5):
    ///
    /// 1. Committed: every caller gets the recorded outcome.
    /// 2. Superseded: the caller gets the outcome of the other attempt.
    /// 3. Rolled back: the attempt counts as failed, unless the handler's response agrees with the
    ///    rollback.
    /// 4. Undecided: the caller gets a refusal, and a task continues to query the record.
    pub(super) async fn after_transaction<R: RebuildBody, E: 'static>(
        &mut self,
        ended: Option<Box<Ended<R, E>>>,
    ) -> Result<Response<R>, E> {
        let Some(owner) = self.owner() else {
            return Ok(self.superseded().await);
        };
        match owner.transaction_end(self.settings.engine.lease).await {
            TransactionEnd::Committed(Outcome::Stored(response)) => Ok(self.committed(response)),
            TransactionEnd::Committed(Outcome::Tombstone) => Ok(self.committed_alone(ended)),
            TransactionEnd::Committed(Outcome::Rejected) | TransactionEnd::Superseded => Ok(self.superseded().await),
            TransactionEnd::RolledBack => self.rolled_back(ended).await,
            TransactionEnd::Undecided(error) => Ok(self.undecided(&error)),
        }
    }

    /// Ends an execution whose response is in the record. Every caller gets the recorded response,
    /// whatever the handler returned afterwards (I2).
    fn committed<R: RebuildBody>(&mut self, stored: StoredResponse) -> Response<R> {
        self.key_guard.end_ownership();
        let returned = match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Responded(read) => Some(read),
            _ => None,
        };
        // If the handler returned the recorded response, its caller gets it unmarked. Otherwise the
        // caller gets a replay.
        let returned = returned.filter(|read| self.settings.response_headers.store(&read.head, &read.body) == stored);
        let shared_result = SharedResult::Response {
            response: stored,
            is_stored: true,
        };
        let Some(returned) = returned else {
            return self.finish(shared_result);
        };
        self.release_slot(shared_result);
        self.finished("executed");
        returned.into_response()
    }

    /// Ends an execution whose record holds only that the request is done, because the response has
    /// the mark [`StoreOutcomeOnly`](super::marks::StoreOutcomeOnly). The caller gets this response
    /// if the handler has returned it. The layer compares the response with the last one whose completion
    /// was not superseded. If that completion failed, an earlier transaction may be the committed
    /// one, and the caller gets 409.
    fn committed_alone<R: RebuildBody, E>(&mut self, ended: Option<Box<Ended<R, E>>>) -> Response<R> {
        let completed = self.owner().map(|owner| CompletedAlone {
            owner: owner.lease.owner(),
            number: self.key_guard.in_flight.last_recorded(),
        });
        self.key_guard.end_ownership();
        let shared_result = SharedResult::Refused(Refusal::new(RefusalKind::ResponseNotStored));
        match ended.map(|ended| *ended) {
            Some(Ended::Streaming(response, _))
                if completed.is_some() && response.extensions().get() == completed.as_ref() =>
            {
                self.release_slot(shared_result);
                self.finished("executed");
                let mut response = response;
                reframe_stream(&mut response);
                response
            }
            _ => self.finish(shared_result),
        }
    }

    /// Ends an execution whose transaction was rolled back, so that it had no effect. The layer
    /// does not return a response that claims an effect: one that reports an effect (2xx, 3xx, or a
    /// gRPC response whose status is `OK` or missing), or has the status of a response that was to
    /// be recorded. The attempt then counts as failed.
    async fn rolled_back<R: RebuildBody, E: 'static>(
        &mut self,
        ended: Option<Box<Ended<R, E>>>,
    ) -> Result<Response<R>, E> {
        telemetry::event(Event::RolledBack);
        let claims_effect = |status: StatusCode, head: &HeaderMap, trailers: Option<&HeaderMap>| {
            let policy = &self.settings.policy;
            let was_tried = self
                .key_guard
                .in_flight
                .has_tried_to_record(status, policy.grpc_code(status, head, trailers));
            was_tried || policy.reports_effect(status, head, trailers)
        };
        let claims_effect = match (&self.stage, ended.as_deref()) {
            (Stage::Responded(Read { head, body, .. }), None) => {
                claims_effect(head.status, &head.headers, body.trailers.as_ref())
            }
            (_, Some(Ended::Broken(status, _))) => claims_effect(*status, &HeaderMap::new(), None),
            (_, Some(Ended::Streaming(response, _))) => claims_effect(response.status(), response.headers(), None),
            _ => false,
        };
        // If the completion failed, the handler's response may only report that failure, not the
        // outcome of the request. So the layer must not store that response either.
        let transaction = self.key_guard.in_flight.transaction();
        if transaction.is_some_and(TransactionState::has_failed) || claims_effect {
            return Ok(self.failed().await);
        }
        match ended {
            Some(ended) => self.record_end(*ended).await,
            None => Ok(self.record_response().await),
        }
    }

    /// Ends an execution whose transaction may or may not be committed, because the store fails.
    /// The caller gets a refusal. A background task continues to query the record, and a later
    /// request gets the outcome.
    fn undecided<R: RebuildBody>(&mut self, error: &Error) -> Response<R> {
        telemetry::failure(Event::Unrecorded, error);
        if let Some(owner) = self.owner() {
            let end = end_of_failure(&self.settings, self.head.as_deref());
            owner.resolve_later(error, end);
        }
        self.key_guard.end_ownership();
        self.finish(SharedResult::Refused(self.later(RefusalKind::OutcomeUnrecorded)))
    }
}

/// Returns the end of an attempt whose handler has failed, for the background task to record.
fn end_of_failure(settings: &Values, head: Option<&request::Parts>) -> AttemptEnd {
    let retention = settings.engine.retention;
    match settings.policy.of_failure() {
        Verdict::GiveUp => AttemptEnd::GivenUp,
        Verdict::Release => AttemptEnd::Released,
        Verdict::Store | Verdict::Tombstone | Verdict::Unjudged => AttemptEnd::completed(
            &Outcome::Stored(settings.failure_to_store(head, retention).2),
            retention,
        ),
    }
}
