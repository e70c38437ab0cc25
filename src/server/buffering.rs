//! The beginning of a guarded request: its body is read and its fingerprint taken. Where the store can decide at once, it is
//! answered or begins to run right here.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::request::Parts;
use http::{Request, Response};
use tower_service::Service;
use tracing::{Instrument, Span};

use super::detached::{IfGuarded, Running};
use super::exchange::{Admitted, Exchange, Stage};
use super::execution::start;
use super::guard::{KeyGuard, Shared};
use super::lease::Lease;
use super::settings::Values;
use super::singleflight::{InFlight, SharedResult, VacantEntry};
use crate::http::{collect_request, BodyBounds, Checked, Collect, Collected, RebuildBody, Refusal, RefusalKind};
use crate::protocol::{Claim, Decision, Grant, IdempotencyKey, StorageKey};
use crate::store::Store;
use crate::telemetry::{self, Times};

/// A request with a good key, of which nothing has happened yet: it can be dropped at any time.
pub(super) struct Buffering<St, S, B> {
    shared: Arc<Shared<St>>,
    settings: Arc<Values>,
    /// Its span, where somebody listens.
    span: Option<Box<Span>>,
    times: Times,
    names: RequestKey,
    service: S,
    head: Parts,
    body: Collect<Checked<B>>,
}

/// How the key of a request is called.
pub(super) struct RequestKey {
    pub(super) key: IdempotencyKey,
    pub(super) storage_key: StorageKey,
    /// Whether the request has a scope.
    pub(super) scoped: bool,
}

/// What an arrival leads to.
pub(super) enum Buffered<R: 'static, E: 'static> {
    /// This response.
    Response(Response<R>),
    /// An exchange.
    Running(Running<R, E>),
}

/// An arrival, whatever it is made of.
pub(super) trait BufferRequest<R: 'static, E: 'static>: Send {
    /// Ready when the body was read, or will not be.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Collected, Refusal>>;

    /// Goes on with the body.
    fn proceed(self: Box<Self>, body: Result<Collected, Refusal>) -> Buffered<R, E>;
}

impl<St: Store, S, B: RebuildBody> Buffering<St, S, B> {
    pub(super) fn new(
        shared: Arc<Shared<St>>,
        settings: Arc<Values>,
        names: RequestKey,
        service: S,
        head: Parts,
        body: B,
    ) -> Self {
        let bounds = BodyBounds {
            bytes: settings.body_limit,
            timeout: settings.body_timeout,
        }
        .of_outer_or_self(&head.extensions);
        let body = collect_request(body, bounds);
        Self {
            shared,
            settings,
            span: telemetry::span(),
            times: Times::start(),
            names,
            service,
            head,
            body,
        }
    }
}

impl<St, S, B, R> BufferRequest<R, S::Error> for Buffering<St, S, B>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    St: Store,
    B: RebuildBody + Send + 'static,
    B::Error: Send,
    R: RebuildBody + Send + 'static,
    R::Error: Send,
{
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Collected, Refusal>> {
        let _entered = self.span.as_deref().map(Span::enter);
        Pin::new(&mut self.body)
            .poll(cx)
            .map_err(|shortfall| Refusal::new(RefusalKind::of_body(&shortfall)))
    }

    fn proceed(self: Box<Self>, body: Result<Collected, Refusal>) -> Buffered<R, S::Error> {
        let Self {
            shared,
            settings,
            span,
            times,
            names,
            service,
            head,
            body: _,
        } = *self;
        let entered = span.as_deref().map(Span::enter);
        let body = match body {
            Ok(body) => body,
            Err(refusal) => return Buffered::Response(settings.refuse(span.as_deref(), Some(&head), refusal)),
        };
        let fingerprint = settings.fingerprint(&head, &body.bytes, names.scoped);
        let accepted = settings.accepted(&head);
        // A copy calls the `Clone` of extensions, which is the application's code. Copy before the claim, because a panic
        // between the claim and its `KeyGuard` would leave the key claimed.
        let seen = settings.refusals.keep_head(&head);
        let decided = decide(&shared, &settings, &settings.claim(names.storage_key, fingerprint));
        if let Decided::Settled(shared_result) = decided {
            return Buffered::Response(settings.respond(span.as_deref(), Some(&head), &shared_result, &accepted));
        }
        // Only from here on it needs a place where others find it.
        let in_flight = InFlight::new(names.key, names.storage_key, fingerprint, settings.engine.store_timeout);
        let admitted = Admitted { service, head, body };
        let tracker = Arc::clone(&shared.tracker);
        let exchange =
            |key_guard, settings, stage| Exchange::new(key_guard, settings, span.clone(), times, stage, seen, accepted);
        let (in_flight, flow) = match decided {
            Decided::Execute(vacant_entry, grant) => {
                let in_flight = vacant_entry.take(in_flight.granted(grant));
                let key_guard = KeyGuard::granted(Arc::clone(&shared), Arc::clone(&in_flight), grant);
                telemetry::granted(span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
                let lease = Lease::new(&key_guard, &settings, grant);
                let running = start(admitted, lease, &settings);
                drop(entered);
                let mut exchange = exchange(key_guard, settings, Stage::Nothing);
                let flow = async move { exchange.run_to_completion(running).await };
                (in_flight, in_span(flow, span))
            }
            Decided::Recover(vacant_entry, grant) => {
                let in_flight = vacant_entry.take(in_flight.granted(grant));
                let key_guard = KeyGuard::granted(Arc::clone(&shared), Arc::clone(&in_flight), grant);
                telemetry::granted(span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
                drop(entered);
                let mut exchange = exchange(key_guard, settings, Stage::Admitted(Box::new(admitted)));
                let flow = async move { exchange.recover_and_execute(grant).await };
                (in_flight, in_span(flow, span))
            }
            Decided::Undecided(vacant_entry) => {
                let in_flight = vacant_entry.take(in_flight);
                let key_guard = KeyGuard::leads(Arc::clone(&shared), Arc::clone(&in_flight));
                drop(entered);
                let exchange = exchange(key_guard, settings, Stage::Admitted(Box::new(admitted)));
                (in_flight, in_span(exchange.run(), span))
            }
            Decided::Settled(_) | Decided::Otherwise => {
                let in_flight = Arc::new(in_flight);
                let key_guard = KeyGuard::new(Arc::clone(&shared), Arc::clone(&in_flight));
                drop(entered);
                let exchange = exchange(key_guard, settings, Stage::Admitted(Box::new(admitted)));
                (in_flight, in_span(exchange.run(), span))
            }
        };
        Buffered::Running(Running::new(flow, IfGuarded { in_flight, tracker }))
    }
}

/// What a store that need not be waited for says.
enum Decided<'f> {
    /// The key is granted, and this is its seat.
    Execute(VacantEntry<'f>, Grant),
    /// Likewise; but first it must be asked what became of an earlier attempt.
    Recover(VacantEntry<'f>, Grant),
    /// Nothing needs to run.
    Settled(SharedResult),
    /// Only an await can tell.
    Undecided(VacantEntry<'f>),
    /// Another request has the key, the store failed, or no execution may begin.
    Otherwise,
}

/// Claims a key at once, where its seat is free: others of this process find the seat taken, or the claim decided.
fn decide<'f, St: Store>(shared: &'f Shared<St>, settings: &Values, claim: &Claim) -> Decided<'f> {
    if shared.barred(settings).is_some() {
        return Decided::Otherwise;
    }
    let Some(vacant_entry) = shared.in_flight_table.vacant_entry(&claim.key) else {
        return Decided::Otherwise;
    };
    match shared.store.claim_now(claim) {
        Some(Ok(Decision::Execute(grant))) => Decided::Execute(vacant_entry, grant),
        Some(Ok(Decision::Recover(grant))) => Decided::Recover(vacant_entry, grant),
        Some(Ok(decision)) => SharedResult::of(decision).map_or(Decided::Otherwise, Decided::Settled),
        None => Decided::Undecided(vacant_entry),
        Some(Err(_)) => Decided::Otherwise,
    }
}

fn in_span<F: Future + Send + 'static>(flow: F, span: Option<Box<Span>>) -> BoxFuture<'static, F::Output> {
    match span {
        None => Box::pin(flow),
        Some(span) => Box::pin(flow.instrument(*span)),
    }
}
