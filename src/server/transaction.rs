//! Effect and response in one transaction: the handler completes the record of its own key.
//!
//! The layer reads the outcome from the record, whatever the handler says. If the store does not answer for so long that the
//! caller gets a refusal, a task without a caller continues to ask.

use http::{request, HeaderMap, Response, StatusCode};
use sqlx::postgres::PgConnection;

use super::exchange::{Exchange, Read, Stage};
use super::execution::Ended;
use super::lease::Lease;
use super::marks::{DoNotStore, StoreOutcomeOnly};
use super::policy::Verdict;
use super::settings::Values;
use super::singleflight::SharedResult;
use crate::engine::TransactionEnd;
use crate::error::{Error, ErrorKind};
#[cfg(feature = "tonic")]
use crate::http::add_marks;
use crate::http::{collect, reframe_stream, RebuildBody, Refusal, RefusalKind};
use crate::protocol::{Completion, Outcome, StoredResponse};
use crate::store::{AttemptEnd, Store};
use crate::telemetry::{self, Event};

impl Lease {
    /// Records `answer` as the outcome of this attempt *within a transaction of the handler's*, in the PostgreSQL database that has
    /// the records: effect and answer commit together, or neither does. Returns the response to give once the transaction is
    /// committed; see [`complete_response_in`](Self::complete_response_in), which this is for whatever axum takes as a response.
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
    ///     let answer = lease.complete_in(&mut transaction, (StatusCode::CREATED, "paid")).await;
    ///     let answer = answer.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    ///     transaction.commit().await.map_err(failed)?;
    ///     Ok(answer)
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

    /// Records `response` as the outcome of this attempt within a transaction, whatever the layer would think of its status. If the
    /// response has the mark [`StoreOutcomeOnly`](crate::StoreOutcomeOnly), the record holds only that the request is done.
    ///
    /// Do it last before the commit: from here on the record is locked, and duplicates wait. Then commit, and return the
    /// response. If the commit fails, return any error: the layer reads from the record whether it took effect all the same,
    /// and if so, gives the recorded answer instead. If the transaction was not committed, the attempt counts as failed
    /// ([`OnError`](crate::OnError)), also where the handler returns this response. Where the record cannot be read, the caller is
    /// refused (503) after [`with_completion_timeout`](crate::IdempotencyLayer::with_completion_timeout); a task asks on for
    /// twelve times as long, two minutes by default, so that what was rolled back can run again. [`Drain`](crate::Drain) waits for
    /// it.
    ///
    /// A handler whose every effect is in the transaction may run again after a crash: set
    /// [`OnLost::Execute`](crate::OnLost::Execute), else a key whose process was killed is refused until somebody resolves it.
    /// Use READ COMMITTED, PostgreSQL's default: at the stricter levels a mere duplicate in another process can make the
    /// transaction fail. Do not complete within a savepoint that may be rolled back while its transaction is committed. The
    /// lease is not renewed from here on: the lock on the record keeps others out until the transaction ends. When you have rolled
    /// it back, return.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, it may have taken effect or not; the layer finds out after the transaction.
    ///
    /// # Errors
    ///
    /// [`Superseded`](ErrorKind::Superseded) when somebody else has taken the key over, or this attempt has completed it already (in an
    /// earlier transaction whose commit took effect although its reply was lost, say): roll back (drop the transaction), and
    /// return any error; the layer then gives what the key holds. [`Configuration`](ErrorKind::Configuration) when the layer's
    /// store is no [`PostgresStore`](crate::PostgresStore), the response is a stream, breaks off, or is longer or takes longer than the layer's limits, or
    /// it has the mark [`DoNotStore`](crate::DoNotStore).
    /// Otherwise as for [`Store::complete`]. In every case roll back.
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
        settings.advise(&mut head, judgement);
        let outcome = settings.outcome_of(None, &head, &body);
        let retention = judgement.retention;
        // Before it is sent: dropped from here on, it may have arrived.
        self.in_flight().set_transaction_failed(true);
        let code = settings
            .policy
            .grpc_code(head.status, &head.headers, body.trailers.as_ref());
        self.in_flight().set_in_transaction(head.status, code);
        let completion = store.complete_in(connection, self.storage_key(), self.owner(), &outcome, retention);
        let failure = match completion.await {
            Ok(Completion::Completed) => {
                self.in_flight().set_transaction_failed(false);
                return Ok(Response::from_parts(head, body.rebuild()));
            }
            Ok(Completion::Superseded(_)) => SUPERSEDED,
            Err(error) => error,
        };
        // Renewals were skipped since an earlier completion that was rolled back.
        self.in_flight().hurry_renewal();
        Err(failure)
    }
}

const NOT_STORABLE: Error = Error::new(
    ErrorKind::Configuration,
    "the response is a stream, broken, or longer or slower than the layer's limits, so it cannot be completed in a \
     transaction; shorten it, or raise `with_response_limit` or `with_response_timeout`",
);

const FORBIDDEN: Error = Error::new(
    ErrorKind::Configuration,
    "the response has the mark `DoNotStore`, so it cannot be completed in a transaction; remove the mark, or roll back \
     and return the response",
);

const NOT_ACKNOWLEDGED: Error = Error::new(
    ErrorKind::Configuration,
    "the response is not a success and has the mark `StoreOutcomeOnly`, so a layer for webhooks would acknowledge its \
     duplicates; remove the mark, or roll back and return the response",
);

const SUPERSEDED: Error = Error::new(
    ErrorKind::Superseded,
    "the key is completed already, or another attempt has taken it over; roll the transaction back",
);

impl<St: Store, S> Exchange<St, S> {
    /// The end of a handler that completed in a transaction of its own. Without `ended`, its answer is the cargo.
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

    /// The record holds that the request is done, without its response, because the response has the mark
    /// [`StoreOutcomeOnly`](super::marks::StoreOutcomeOnly). The caller gets the response, if the handler has returned it.
    fn committed_alone<R: RebuildBody, E>(&mut self, ended: Option<Box<Ended<R, E>>>) -> Response<R> {
        self.key_guard.end_ownership();
        let shared_result = SharedResult::Refused(Refusal::new(RefusalKind::ResponseNotStored));
        match ended.map(|ended| *ended) {
            Some(Ended::Streaming(response, judgement)) if judgement.verdict == Verdict::Tombstone => {
                self.release_slot(shared_result);
                self.finished("executed");
                let mut response = response;
                reframe_stream(&mut response);
                response
            }
            _ => self.finish(shared_result),
        }
    }

    /// Nothing took effect. An answer that says otherwise is not given: a success, or one of the status that was to be recorded.
    async fn rolled_back<R: RebuildBody, E: 'static>(
        &mut self,
        ended: Option<Box<Ended<R, E>>>,
    ) -> Result<Response<R>, E> {
        telemetry::event(Event::RolledBack);
        let claims_effect = |status: StatusCode, head: &HeaderMap, trailers: Option<&HeaderMap>| {
            let policy = &self.settings.policy;
            let is_recorded = self
                .key_guard
                .in_flight
                .has_recorded(status, policy.grpc_code(status, head, trailers));
            is_recorded || policy.reports_effect(status, head, trailers)
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
        if self.key_guard.in_flight.has_transaction_failed() || claims_effect {
            return Ok(self.failed().await);
        }
        match ended {
            Some(ended) => self.record_end(*ended).await,
            None => Ok(self.record_response().await),
        }
    }

    /// Whether the transaction was committed cannot be found out now. It is asked on behind the refusal; whoever asks next is
    /// told.
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

/// Returns the end of an attempt whose handler has failed.
fn end_of_failure(settings: &Values, head: Option<&request::Parts>) -> AttemptEnd {
    match settings.policy.of_failure() {
        Verdict::GiveUp => AttemptEnd::GivenUp,
        Verdict::Release => AttemptEnd::Released,
        Verdict::Store | Verdict::Tombstone | Verdict::Unjudged => AttemptEnd::completed(
            &Outcome::Stored(settings.failure_to_store(head).2),
            settings.engine.retention,
        ),
    }
}
