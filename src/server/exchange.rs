//! The flow of one guarded request, from its key to its response.

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{Request, Response, StatusCode, response};
use tracing::Span;

use super::guard::{Barred, KeyGuard};
use super::policy::Judgement;
use super::policy::Statuses;
use super::settings::Values;
use super::singleflight::{Followed, Follower, Joined, SharedResult, Undecided};
use crate::clock::{Deadline, Stopwatch};
use crate::engine::{ClaimError, Claimer};
use crate::error::{Error, ErrorKind};
use crate::http::{Accepted, Collected, HttpService, RebuildBody, Refusal, RefusalKind, complete_grpc, reframe};
use crate::protocol::{Claim, Decision, Fingerprint, Grant, Nonce, StorageKey, StoredResponse};
use crate::store::{LAST_LOOK, LostClaim, Store, claim_with_timeout};
use crate::telemetry::{self, Event, Times};

/// One guarded request, after its body was read.
///
/// Steps borrow this state instead of taking it, because a value that is moved through nested
/// futures is stored in each of them. Steps that only some exchanges take are boxed for the same
/// reason. The claim is boxed, too, because the store determines its size. This keeps the future
/// under 1 KiB, for which allocators are fast.
pub(super) struct Exchange<St: Store, S> {
    /// A claim that got no reply from the store. The first field, so that its release begins before
    /// the guard hands the key over, and a drain waits for the release (I11).
    pub(super) lost_claim: Option<Box<LostClaim>>,
    pub(super) key_guard: KeyGuard<St>,
    pub(super) settings: Arc<Values>,
    /// The span of the request, if a subscriber is interested in it.
    pub(super) span: Option<Box<Span>>,
    pub(super) times: Times,
    /// The deadlines of the wait. Set when the request begins to wait, and cleared when it owns the
    /// key.
    pub(super) wait: Option<Wait>,
    /// Whether this request has used its one claim of a free key after its deadline.
    pub(super) has_claimed_late: bool,
    /// Whether another attempt took the key over from this request.
    pub(super) is_superseded: bool,
    /// The encodings of gRPC messages that the caller accepts.
    accepted: Accepted,
    pub(super) stage: Stage<S>,
    /// A copy of the request's head, for an application that renders refusals.
    pub(super) head: Option<Box<Parts>>,
}

/// The request or the response that an exchange carries at the moment.
#[expect(clippy::large_enum_variant, reason = "the large variant is the common one")]
pub(super) enum Stage<S> {
    /// The request and the service that is ready for it, until the handler gets them or this
    /// request becomes a waiter.
    Admitted(Box<Admitted<S>>),
    /// The request of a waiter that may claim the key again, with a service that is not ready.
    Waiting(Box<Admitted<S>>),
    /// The response of the handler, until it is recorded.
    Responded(Read),
    Nothing,
}

/// The deadlines of one request, counted from the moment when it begins to wait.
#[derive(Clone, Copy)]
pub(super) struct Wait {
    /// The deadline of the wait for an owner.
    pub(super) owner: Deadline,
    /// The deadline of the wait for the decision about the claim of another request. That decision
    /// needs the store, so this wait has some time even if requests do not wait for owners.
    decision: Deadline,
}

/// A request with the body that the layer has read, and the service that handles the request.
pub(super) struct Admitted<S> {
    pub(super) service: S,
    pub(super) head: Parts,
    pub(super) body: Collected,
}

/// A response that was read to its end, and the judgement about it.
pub(super) struct Read {
    pub(super) head: response::Parts,
    pub(super) body: Collected,
    pub(super) judgement: Judgement,
}

/// The result of a claim.
pub(super) enum Claimed {
    /// The key is granted. The recovery check must run before the handler.
    Recover(Grant),
    /// The key is granted, and the handler can run.
    Run(Grant),
    /// The caller gets this result, and the handler does not run.
    Settled(SharedResult),
    /// The wait of this request was over before the store replied.
    TimeUp,
    /// The store failed, and the application allows the handler to run without a claim.
    Unprotected,
    /// An owner in another process works on the key.
    Wait,
}

impl<St: Store, S> Exchange<St, S> {
    pub(super) const fn new(
        key_guard: KeyGuard<St>,
        settings: Arc<Values>,
        span: Option<Box<Span>>,
        times: Times,
        stage: Stage<S>,
        head: Option<Box<Parts>>,
        accepted: Accepted,
    ) -> Self {
        Self {
            lost_claim: None,
            key_guard,
            settings,
            span,
            times,
            wait: None,
            has_claimed_late: false,
            is_superseded: false,
            accepted,
            stage,
            head,
        }
    }

    /// Runs the exchange. The key and the body have been checked before.
    ///
    /// 1. Join the requests of this process with the same key. At most one of them leads (I1).
    /// 2. A request with another fingerprint is refused before it waits (I4).
    /// 3. A duplicate follows the leader, and returns the leader's result. After a handover it
    ///    joins again.
    /// 4. The leader claims the key in the store.
    pub(super) async fn run<B>(mut self) -> Result<Response<S::ResponseBody>, S::Error>
    where
        S: HttpService<B> + Clone,
        B: RebuildBody + Send + 'static,
    {
        loop {
            match self.key_guard.join(&self.settings.waiting) {
                Joined::Full => return Ok(self.refuse(self.later(RefusalKind::TooManyWaiters))),
                Joined::Mismatch => return Ok(self.refuse(Refusal::new(RefusalKind::Mismatch))),
                Joined::Undecided(undecided) => match self.is_mismatch(undecided).await {
                    Some(true) => return Ok(self.refuse(Refusal::new(RefusalKind::Mismatch))),
                    Some(false) => {}
                    None => return Ok(self.refuse(self.later(RefusalKind::Outstanding))),
                },
                Joined::Follow(follower) => match self.follow(follower).await {
                    SharedResult::Handover => {}
                    shared_result => return Ok(self.respond(&shared_result)),
                },
                Joined::Lead => return self.lead().await,
            }
        }
    }

    /// Waits for the leader, another request of this process. Once the leader owns the key, this
    /// request never runs the handler, so it drops its request and service. Until then, this
    /// request may have to take the place of the leader, so it only gives back the capacity that
    /// the service has reserved.
    async fn follow(&mut self, follower: Follower) -> SharedResult
    where
        S: Clone,
    {
        let deadline = self.wait().owner;
        // A shorter wait ends without a look, because the look could take as long as the wait.
        let may_look = self.settings.engine.wait > LAST_LOOK;
        if follower.has_owner() {
            self.stage = Stage::Nothing;
        } else {
            self.give_readiness_back();
        }
        let stage = &mut self.stage;
        let following = async {
            if follower.owned().await {
                *stage = Stage::Nothing;
            }
            follower.shared_result().await
        };
        match self.times.waiting(follower.until(deadline, following)).await {
            Followed::Shared(shared_result) => shared_result,
            // The request looks for itself (I7).
            Followed::TimeUp {
                is_leader_current: false,
            } if may_look => Box::pin(self.last_look()).await,
            Followed::TimeUp { .. } => self.outstanding(),
        }
    }

    /// Returns the result for a request whose wait for an owner is over.
    pub(super) fn outstanding(&self) -> SharedResult {
        SharedResult::Refused(self.later(RefusalKind::Outstanding))
    }

    /// Waits for the decision whether the key belongs to another request. Returns `None` if the
    /// deadline passes first. Before the wait, gives back the capacity that the service reserved
    /// for this request, because the other request may need it to claim the key again.
    async fn is_mismatch(&mut self, undecided: Undecided) -> Option<bool>
    where
        S: Clone,
    {
        self.give_readiness_back();
        let deadline = self.wait().decision;
        self.times.waiting(undecided.is_mismatch(deadline)).await
    }

    /// Claims the key, and acts on the decision of the store. If the owner is in another process,
    /// waits for it, and claims the key again when the key is free.
    async fn lead<B>(&mut self) -> Result<Response<S::ResponseBody>, S::Error>
    where
        S: HttpService<B> + Clone,
        B: RebuildBody + Send + 'static,
    {
        loop {
            if matches!(self.stage, Stage::Admitted(_)) {
                let started = Stopwatch::start();
                match self.claim().await {
                    Claimed::Run(grant) => {
                        self.acquire(grant, started);
                        return Box::pin(self.execute(grant)).await;
                    }
                    Claimed::Recover(grant) => {
                        self.acquire(grant, started);
                        return Box::pin(self.recover_and_execute(grant)).await;
                    }
                    Claimed::Settled(shared_result) => return Ok(self.finish(shared_result)),
                    // Do not finish the followers. They joined later, so they still have time, and
                    // claim the key themselves.
                    Claimed::TimeUp => return Ok(self.refuse(self.later(RefusalKind::Outstanding))),
                    // Without a claim there is no result to share, so each duplicate claims the key
                    // itself.
                    Claimed::Unprotected => {
                        self.release_slot(SharedResult::Handover);
                        return self.run_unprotected().await;
                    }
                    // A waiter has claimed nothing, so it ends when its caller leaves.
                    Claimed::Wait => {
                        self.give_readiness_back();
                        self.key_guard.in_flight.set_guarded(false);
                    }
                }
            }
            if let Some(end) = Box::pin(self.wait_for_owner_elsewhere()).await {
                return end;
            }
        }
    }

    /// Replaces the ready service by a clone that is not ready, so that a waiter holds no capacity
    /// of the service.
    fn give_readiness_back(&mut self)
    where
        S: Clone,
    {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Admitted(mut admitted) => {
                admitted.service = admitted.service.clone();
                Stage::Waiting(admitted)
            }
            // The request gave the readiness back earlier, when it followed another request.
            stage => stage,
        };
    }

    /// Claims the key. If the claim fails, repeats it once with the same nonce, so that both claims
    /// get the same grant.
    async fn claim(&mut self) -> Claimed {
        let barred = self.key_guard.shared.barred(&self.settings);
        // The limits of detached executions and of lost claims bound the work of this process
        // (I10). Repeating a lost claim adds no further lost claim, so the second limit does not
        // apply to it.
        if let Some(barred) = barred.filter(|barred| *barred == Barred::Detached || self.lost_claim.is_none()) {
            return Box::pin(self.look(barred)).await;
        }
        let claim = match &self.lost_claim {
            Some(lost) => lost.claim().clone(),
            None => self.settings.claim(
                self.key_guard.in_flight.storage_key,
                self.key_guard.in_flight.fingerprint,
            ),
        };
        // From here on, the exchange continues if its caller leaves, because the store may have
        // received the claim. A key that is claimed and then abandoned would look like a lost
        // attempt.
        self.key_guard.in_flight.set_guarded(true);
        let claimer = self.claimer();
        let claiming = claim_with_timeout(claimer.limit(), &self.key_guard.shared.store, &claim);
        match Box::pin(claiming).await {
            Ok(decision) => self.decided(decision),
            Err(error) => Box::pin(self.claim_again(claim, error)).await,
        }
    }

    fn claimer(&self) -> Claimer<'_, Arc<St>> {
        Claimer {
            store: &self.key_guard.shared.store,
            settings: &self.settings.engine,
            tracker: &self.key_guard.shared.tracker,
            wait: self.wait.map(|wait| wait.owner),
        }
    }

    async fn claim_again(&mut self, claim: Claim, error: Error) -> Claimed {
        let mut lost = self.lost_claim.take();
        let decision = self.claimer().again(&claim, error, &mut lost).await;
        self.lost_claim = lost;
        match decision {
            Ok(decision) => self.decided(decision),
            Err(ClaimError::TimeUp) => Claimed::TimeUp,
            Err(ClaimError::Failed(error)) => self.claim_failed(&error),
        }
    }

    fn decided(&mut self, decision: Decision) -> Claimed {
        let granted = match decision {
            Decision::Execute(grant) => Claimed::Run(grant),
            Decision::Recover(grant) => Claimed::Recover(grant),
            decision => return SharedResult::of(decision).map_or(Claimed::Wait, Claimed::Settled),
        };
        if let Some(lost) = self.lost_claim.take() {
            lost.granted();
        }
        granted
    }

    /// Decides about a request whose claim failed. The layer refuses the request, unless the
    /// application has allowed unprotected runs.
    pub(super) fn claim_failed(&self, error: &Error) -> Claimed {
        telemetry::store_failed(error);
        // Refuse all other errors. If a record cannot be read, an earlier attempt may have run
        // (I3). If the store is misconfigured, every request would run unprotected.
        if self.settings.run_unprotected && error.kind() == ErrorKind::StoreUnavailable {
            return Claimed::Unprotected;
        }
        Claimed::Settled(SharedResult::Refused(self.settings.store_failed(error)))
    }

    async fn run_unprotected<B>(&mut self) -> Result<Response<S::ResponseBody>, S::Error>
    where
        S: HttpService<B>,
        B: RebuildBody,
    {
        let Some(admitted) = self.take_request() else {
            return Ok(self.refuse(self.later(RefusalKind::StoreUnavailable)));
        };
        telemetry::event(Event::Unprotected);
        self.finished("unprotected");
        self.key_guard.in_flight.set_guarded(false);
        let (mut service, request) = admitted.request();
        self.times.outside(service.call(request)).await
    }

    /// Takes the request and its service out of the stage. Returns `None` if the stage has no
    /// request with a ready service.
    pub(super) fn take_request(&mut self) -> Option<Box<Admitted<S>>> {
        match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Admitted(admitted) => Some(admitted),
            _ => None,
        }
    }

    /// Returns the deadlines of the wait. The first call starts them.
    pub(super) fn wait(&mut self) -> Wait {
        *self.wait.get_or_insert_with(|| {
            let time = self.settings.engine.wait;
            let shortest = self.settings.engine.store_timeout.min(LAST_LOOK);
            Wait {
                owner: Deadline::after(time),
                decision: Deadline::after(time.max(shortest)),
            }
        })
    }

    /// Shares the result with the waiting duplicates, and returns the response for this caller.
    pub(super) fn finish<R: RebuildBody>(&mut self, shared_result: SharedResult) -> Response<R> {
        let response = self.respond(&shared_result);
        self.release_slot(shared_result);
        response
    }

    /// Shares the result with the waiting duplicates, and frees the entry of the key in this
    /// process.
    pub(super) fn release_slot(&mut self, shared_result: SharedResult) {
        self.key_guard.release_slot(shared_result);
    }

    /// Returns the response for the result of this request or of the request that it waited for.
    fn respond<R: RebuildBody>(&self, shared_result: &SharedResult) -> Response<R> {
        let (span, head) = (self.span.as_deref(), self.head.as_deref());
        self.settings.respond(span, head, shared_result, &self.accepted)
    }

    pub(super) fn refuse<R: RebuildBody>(&self, refusal: Refusal) -> Response<R> {
        self.settings
            .refuse(self.span.as_deref(), self.head.as_deref(), refusal)
    }

    pub(super) fn finished(&self, outcome: &'static str) {
        telemetry::finished(self.span.as_deref(), outcome);
    }

    /// Returns a refusal with `Retry-After`.
    pub(super) fn later(&self, kind: RefusalKind) -> Refusal {
        self.settings.later(kind)
    }
}

impl Read {
    /// Returns the response for the first caller.
    pub(super) fn into_response<R: RebuildBody>(self) -> Response<R> {
        let Self { mut head, body, .. } = self;
        reframe(&mut head.headers);
        Response::from_parts(head, body.rebuild())
    }
}

impl<S> Admitted<S> {
    /// Returns the service to call, and the request for the handler.
    pub(super) fn request<B: RebuildBody>(self) -> (S, Request<B>) {
        let Self { service, head, body } = self;
        (service, Request::from_parts(head, body.rebuild()))
    }
}

const CORRUPT: Error = Error::corrupt_record("a stored response cannot be read");

impl SharedResult {
    /// Returns the result for a decision under which nothing runs. Returns `None` if the request is
    /// to run or to wait.
    pub(super) fn of(decision: Decision) -> Option<Self> {
        let kind = match decision {
            Decision::Replay(response) => {
                return Some(Self::Response {
                    response,
                    is_stored: true,
                });
            }
            Decision::NotStored => RefusalKind::ResponseNotStored,
            Decision::Mismatch => RefusalKind::Mismatch,
            Decision::Unknown => RefusalKind::OutcomeUnknown,
            Decision::Execute(_) | Decision::Recover(_) | Decision::Wait { .. } => return None,
        };
        Some(Self::Refused(Refusal::new(kind)))
    }
}

impl Values {
    /// Returns a claim for a key under these settings, with a new nonce.
    pub(super) fn claim(&self, key: StorageKey, fingerprint: Fingerprint) -> Claim {
        self.engine.claim(key, fingerprint, Nonce::random())
    }

    /// Returns the response for a request with this head. `accepted` has the gRPC encodings that
    /// the caller accepts.
    pub(super) fn respond<R: RebuildBody>(
        &self,
        span: Option<&Span>,
        head: Option<&Parts>,
        shared_result: &SharedResult,
        accepted: &Accepted,
    ) -> Response<R> {
        match shared_result {
            SharedResult::Response { response, is_stored } => match self.replay(response, *is_stored, accepted) {
                Ok(response) => {
                    telemetry::finished(span, if *is_stored { "replayed" } else { "waited" });
                    response.map(Collected::rebuild)
                }
                Err(refusal) => self.refuse(span, head, refusal),
            },
            SharedResult::Refused(refusal) if self.acknowledges && refusal.kind() == RefusalKind::ResponseNotStored => {
                telemetry::finished(span, "replayed");
                self.response_headers.bare_replay()
            }
            SharedResult::Refused(refusal) => self.refuse(span, head, refusal.clone()),
            SharedResult::Handover => self.refuse(span, head, self.later(RefusalKind::Outstanding)),
        }
    }

    /// Returns a stored or shared response for one caller, with the bytes of the first response
    /// (I2). For gRPC, decompresses messages in an encoding that the caller does not accept.
    fn replay(
        &self,
        stored: &StoredResponse,
        is_stored: bool,
        accepted: &Accepted,
    ) -> Result<Response<Collected>, Refusal> {
        let Ok(mut response) = self.response_headers.replay_in_parts(stored, is_stored) else {
            telemetry::store_failed(&CORRUPT);
            return Err(self.store_failed(&CORRUPT));
        };
        if self.is_grpc() {
            let body = std::mem::take(&mut response.body_mut().bytes);
            let adapted = accepted.adapt(response.headers_mut(), body);
            response.body_mut().bytes = adapted.map_err(|_| {
                if is_stored {
                    Refusal::new(RefusalKind::EncodingNotAccepted)
                } else {
                    // The key is free again, or its outcome is unknown, so there is no result to
                    // look up.
                    self.later(RefusalKind::Outstanding)
                }
            })?;
        }
        Ok(response)
    }

    /// Splits a response whose body the application has as bytes.
    pub(super) fn collected(&self, response: Response<Bytes>) -> (response::Parts, Collected) {
        let (mut head, bytes) = response.into_parts();
        #[cfg(feature = "tonic")]
        crate::http::add_marks(&mut head);
        let body = self.completed(&mut head, Collected { bytes, trailers: None });
        (head, body)
    }

    /// Completes a gRPC response that the application has made. Adds its content type, and its
    /// status at the place where clients read it. Under settings for gRPC, a response with status
    /// 200 and without a content type counts as gRPC.
    pub(super) fn completed(&self, head: &mut response::Parts, body: Collected) -> Collected {
        let is_untyped = || head.status == StatusCode::OK && !head.headers.contains_key(CONTENT_TYPE);
        if self.policy.is_grpc_response(head.status, &head.headers) || (self.is_grpc() && is_untyped()) {
            complete_grpc(&mut head.headers, body)
        } else {
            body
        }
    }

    /// Returns the encodings that the caller accepts. Only gRPC responses depend on them.
    pub(super) fn accepted(&self, head: &Parts) -> Accepted {
        if self.is_grpc() {
            Accepted::by(&head.headers)
        } else {
            Accepted::default()
        }
    }

    /// Whether the inner service speaks gRPC.
    pub(super) fn is_grpc(&self) -> bool {
        self.policy.statuses == Statuses::Grpc
    }

    /// Returns the fingerprint of a request. Only gRPC bodies are decompressed for the fingerprint,
    /// up to the body limit.
    pub(super) fn fingerprint(&self, head: &Parts, body: &Bytes, is_scoped: bool) -> Fingerprint {
        self.fingerprinting.of(head, body, is_scoped, self.body_limit)
    }

    /// Renders a refusal for a request with this head.
    pub(super) fn refuse<R: RebuildBody>(
        &self,
        span: Option<&Span>,
        head: Option<&Parts>,
        refusal: Refusal,
    ) -> Response<R> {
        telemetry::finished(span, refusal.code());
        refusal.into_response(&self.refusals, head)
    }

    /// Returns a refusal with `Retry-After`.
    pub(super) fn later(&self, kind: RefusalKind) -> Refusal {
        Refusal::retry_after(kind, self.retry_after)
    }

    /// Returns the refusal for an error of the store. The refusal has `Retry-After` only if a retry
    /// can help.
    pub(super) fn store_failed(&self, error: &Error) -> Refusal {
        match error.kind() {
            ErrorKind::Configuration => Refusal::new(RefusalKind::StoreMisconfigured),
            ErrorKind::CorruptRecord => Refusal::new(RefusalKind::RecordUnreadable),
            ErrorKind::StoreFull => self.later(RefusalKind::StoreFull),
            ErrorKind::Overloaded => self.later(RefusalKind::Overloaded),
            ErrorKind::StoreUnavailable | ErrorKind::Superseded => self.later(RefusalKind::StoreUnavailable),
        }
    }
}
