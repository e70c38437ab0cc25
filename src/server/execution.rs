//! One execution of the handler, from its grant to its recorded outcome.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Response, StatusCode};

use super::errors::ServiceFailure;
use super::exchange::{Admitted, Exchange, Read, Stage};
use super::lease::Lease;
use super::policy::{Judgement, LostAttempt, Verdict};
use super::settings::Values;
use super::singleflight::SharedResult;
use crate::catch_panic::{catch_panic, catch_panic_in};
use crate::clock::Stopwatch;
#[cfg(feature = "postgres")]
use crate::engine::TransactionState;
use crate::engine::{Ownership, Recovered};
#[cfg(feature = "tonic")]
use crate::http::add_marks;
use crate::http::{HttpService, RebuildBody, Refusal, RefusalKind, Shortfall, collect, collect_messages, has_body};
use crate::protocol::Grant;
use crate::store::Store;
use crate::telemetry;

/// The end of the handler.
pub(super) enum Ended<R, E> {
    /// The handler returned a response, and the layer has read it to its end.
    Responded(Read),
    /// The response is lost. Its body broke off or panicked while the layer read it, or the
    /// application's predicate panicked.
    Broken(StatusCode, Judgement),
    /// The service returned an error.
    Failed(E),
    /// The handler panicked.
    Panicked,
    /// The layer passes the response on before its body has ended. Either the policy does not store
    /// the response, or the layer cannot store it, because it is a stream or exceeds a limit of
    /// length or time.
    Streaming(Response<R>, Judgement),
}

/// The result of the recovery check for a lost attempt.
enum Checked {
    /// The attempt took effect. The exchange carries its response, as [`Stage::Responded`].
    Happened,
    /// The attempt had no effect, or no check is set.
    Nothing,
    /// The check could not find out, or it panicked.
    Unknown,
}

impl<St: Store, S> Exchange<St, S> {
    /// Calls the recovery check for the attempt that was lost, and runs the handler if that attempt
    /// had no effect (I3).
    pub(super) async fn recover_and_execute<B>(&mut self, grant: Grant) -> Result<Response<S::ResponseBody>, S::Error>
    where
        S: HttpService<B>,
        B: RebuildBody + Send + 'static,
    {
        match self.recover(grant).await {
            Checked::Happened => Ok(self.happened().await),
            Checked::Nothing => self.execute(grant).await,
            // Running the handler could cause a second effect. So give the key up, and refuse this
            // request.
            Checked::Unknown => {
                self.stage = Stage::Nothing;
                if self.give_up().await == Ownership::Superseded {
                    return Ok(self.superseded().await);
                }
                let refusal = match self.can_run_again(Verdict::GiveUp) {
                    // Each request uses up one attempt, so suggest a longer pause than usual.
                    true => Refusal::retry_after(RefusalKind::CheckUndecided, self.settings.engine.lease),
                    false => Refusal::new(RefusalKind::OutcomeUnknown),
                };
                Ok(self.finish(SharedResult::Refused(refusal)))
            }
        }
    }

    /// Runs the handler and records its end in the store before the caller gets the first byte of a
    /// response (I5).
    pub(super) async fn execute<B>(&mut self, grant: Grant) -> Result<Response<S::ResponseBody>, S::Error>
    where
        S: HttpService<B>,
        B: RebuildBody + Send + 'static,
    {
        let running = self.take_request().and_then(|admitted| {
            let lease = Lease::new(&self.key_guard, &self.settings, grant);
            start(*admitted, lease, &self.settings)
        });
        self.run_to_completion(running).await
    }

    /// Makes this request the owner of the key. `started` is a stopwatch that was started before
    /// the claim.
    pub(super) fn acquire(&mut self, grant: Grant, started: Stopwatch) {
        self.key_guard.acquire(grant, || started);
        // If another owner takes the key over later, the wait for that owner has its full time.
        self.wait = None;
        telemetry::granted(self.span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
    }

    /// Waits for the handler and records its end. `running` is `None` if the handler panicked
    /// before it returned a future.
    pub(super) async fn run_to_completion<R: RebuildBody, E: 'static>(
        &mut self,
        running: Option<Running<impl Future<Output = Ended<R, E>>>>,
    ) -> Result<Response<R>, E> {
        let ended = self.ended(running).await;
        // If the handler tried to complete the record in its own transaction, the record decides
        // about the outcome, not the handler's response.
        #[cfg(feature = "postgres")]
        if self
            .key_guard
            .in_flight
            .transaction()
            .is_some_and(TransactionState::has_begun)
        {
            return Box::pin(self.after_transaction(ended)).await;
        }
        match ended {
            None => Ok(self.record_response().await),
            Some(ended) => Box::pin(self.record_end(*ended)).await,
        }
    }

    /// Waits for the handler. Returns `None` if the layer has read the response to its end; the
    /// exchange then carries the response, as [`Stage::Responded`].
    async fn ended<R, E>(
        &mut self,
        running: Option<Running<impl Future<Output = Ended<R, E>>>>,
    ) -> Option<Box<Ended<R, E>>> {
        let Some(running) = running else {
            return Some(Box::new(Ended::Panicked));
        };
        // The guard renews the lease while the handler runs. A panic of the handler ends the
        // attempt, not this task.
        let running = self.times.outside(self.key_guard.during(running));
        match catch_panic(running).await {
            Ok(Ended::Responded(read)) => {
                self.stage = Stage::Responded(read);
                None
            }
            Ok(ended) => Some(Box::new(ended)),
            Err(_) => Some(Box::new(Ended::Panicked)),
        }
    }

    /// Records the end of a handler, and returns the response or the error for the caller.
    pub(super) async fn record_end<R: RebuildBody, E: 'static>(
        &mut self,
        ended: Ended<R, E>,
    ) -> Result<Response<R>, E> {
        match ended {
            Ended::Responded(read) => {
                self.stage = Stage::Responded(read);
                Ok(self.record_response().await)
            }
            Ended::Broken(status, judgement) => Ok(self.broken(judgement, status).await),
            Ended::Failed(error) => {
                let response = match self.settings.errors.of(&error) {
                    ServiceFailure::Failed => self.failed().await,
                    ServiceFailure::NotRun => self.not_run().await,
                };
                // Another attempt may have taken the key over. The caller then gets the outcome of
                // that attempt, not the error.
                if self.is_superseded { Ok(response) } else { Err(error) }
            }
            Ended::Panicked => Ok(self.failed().await),
            Ended::Streaming(response, judgement) => Ok(self.streaming(response, judgement).await),
        }
    }

    /// Calls the application's check whether a lost attempt took effect.
    async fn recover(&mut self, grant: Grant) -> Checked {
        let (Some(check), Stage::Admitted(admitted)) = (&self.settings.check, &self.stage) else {
            return Checked::Nothing;
        };
        let lost = LostAttempt {
            key: self.key_guard.in_flight.key.clone(),
            fence: grant.owner.fence,
            attempt: grant.attempt,
            head: admitted.head.clone(),
            derived_keys: self.key_guard.in_flight.derived_keys(),
        };
        // The check is the application's code, and may panic before it returns its future.
        let Ok(checking) = catch_panic_in(|| check.call(lost)) else {
            return Checked::Unknown;
        };
        let checking = self.key_guard.during(catch_panic(checking));
        match self.times.outside(checking).await {
            Ok(Recovered::Happened(response)) => {
                let (head, body) = self.settings.collected(response);
                let judgement = self.settings.happened(&head);
                self.stage = Stage::Responded(Read { head, body, judgement });
                Checked::Happened
            }
            Ok(Recovered::NotHappened) => Checked::Nothing,
            Ok(Recovered::Unknown) | Err(_) => Checked::Unknown,
        }
    }
}

/// A running handler. Boxed, because otherwise the future of an exchange would reserve the space
/// for it twice.
pub(super) type Running<F> = Pin<Box<F>>;

/// Calls the handler. Returns `None` if the handler panics before it returns a future.
pub(super) fn start<S, B>(
    admitted: Admitted<S>,
    lease: Lease,
    settings: &Arc<Values>,
) -> Option<Running<impl Future<Output = Ended<S::ResponseBody, S::Error>> + use<S, B>>>
where
    S: HttpService<B>,
    B: RebuildBody,
{
    let (mut service, mut request) = admitted.request();
    let method = request.method().clone();
    // The handler sees the lease of this layer. That lease links to the lease of a layer further
    // out.
    let outer = request.extensions_mut().remove::<Lease>();
    let attempt = lease.attempt().number();
    request.extensions_mut().insert(lease.within(outer));
    let running = catch_panic_in(|| service.call(request)).ok()?;
    Some(Box::pin(ended(running, Arc::clone(settings), method, attempt)))
}

/// Waits for the handler, judges its response by the head, and reads the body of a response that
/// the layer stores.
async fn ended<F, R, E>(running: F, settings: Arc<Values>, method: Method, attempt: u32) -> Ended<R, E>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: RebuildBody,
{
    let response = match running.await {
        Ok(response) => response,
        Err(error) => return Ended::Failed(error),
    };
    let (mut head, body) = response.into_parts();
    #[cfg(feature = "tonic")]
    add_marks(&mut head);
    let judgement = settings.judge(&head);
    let can_run_again = settings.can_run_again(judgement.verdict, judgement.retention, attempt);
    settings.advise(&mut head, can_run_again);
    let timeout = match judgement.verdict {
        Verdict::Store => settings.response_timeout,
        Verdict::Release | Verdict::GiveUp if judgement.awaits_trailers => settings.response_timeout,
        // Do not delay a response that is not stored until its end. If its body has a known size
        // and is complete already, as that of an error message, the duplicates in this process get
        // it, too.
        Verdict::Release | Verdict::GiveUp if body.size_hint().exact().is_some() => Duration::ZERO,
        Verdict::Release | Verdict::GiveUp => return Ended::Streaming(Response::from_parts(head, body), judgement),
        Verdict::Tombstone => return Ended::Streaming(Response::from_parts(head, body), judgement),
        Verdict::Unjudged => return Ended::Broken(head.status, judgement),
    };
    if settings.is_stream(&head) {
        return Ended::Streaming(Response::from_parts(head, body), judgement.of_stream());
    }
    // Treat a body that panics like a body that breaks off, because the handler has ended and the
    // head shows its result.
    let reading = if settings.policy.is_of_grpc(head.status, &head.headers) {
        collect_messages(body, settings.response_limit, timeout)
    } else {
        collect(body, settings.response_limit, timeout)
    };
    let read = match catch_panic(reading).await {
        // A response without a body, such as one to HEAD, may declare the length that the body
        // would have.
        Ok(Err(Shortfall::Short(part))) if !has_body(&method, head.status) => Ok(Ok(part)),
        read => read,
    };
    match read {
        Ok(Ok(body)) => {
            let trailers = body.trailers.as_ref();
            let judgement = settings.policy.judge_end(judgement, &head.headers, trailers);
            Ended::Responded(Read { head, body, judgement })
        }
        Ok(Err(Shortfall::Broken(_) | Shortfall::Short(_))) | Err(_) => {
            Ended::Broken(head.status, settings.policy.judge_end(judgement, &head.headers, None))
        }
        Ok(Err(Shortfall::TooLarge(body) | Shortfall::TooSlow(body))) => {
            Ended::Streaming(Response::from_parts(head, R::rebuild(body)), judgement)
        }
    }
}
