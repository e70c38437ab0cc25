//! The first phase of a guarded request. This phase reads the body and computes the fingerprint. If
//! the store can decide at once, this phase also returns the response or calls the handler.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::Response;
use http::request::Parts;
use tracing::{Instrument, Span};

use super::detached::{IfGuarded, Running};
use super::exchange::{Admitted, Exchange, Stage};
use super::execution::start;
use super::guard::{KeyGuard, Shared};
use super::lease::Lease;
use super::settings::Values;
use super::singleflight::{InFlight, SharedResult, VacantEntry};
use crate::http::{
    BodyBounds, Checked, Collect, Collected, HttpService, RebuildBody, Refusal, RefusalKind, collect_request,
};
use crate::protocol::{Claim, Decision, Grant, IdempotencyKey, StorageKey};
use crate::store::Store;
use crate::telemetry::{self, Times};

/// A request with a valid key whose body is being read. Nothing is claimed yet, so it can be
/// dropped at any time.
pub(super) struct Buffering<St, S, B> {
    shared: Arc<Shared<St>>,
    settings: Arc<Values>,
    /// The span of the request, if a subscriber is interested in it.
    span: Option<Box<Span>>,
    times: Times,
    names: RequestKey,
    service: S,
    head: Parts,
    body: Collect<Checked<B>>,
}

/// The identifiers of a request's key.
pub(super) struct RequestKey {
    pub(super) key: IdempotencyKey,
    pub(super) storage_key: StorageKey,
    /// Whether the request has a scope.
    pub(super) scoped: bool,
}

/// The result of the first phase.
pub(super) enum Buffered<R: 'static, E: 'static> {
    /// A response, without an execution.
    Response(Response<R>),
    /// An exchange that has to be polled to its end.
    Running(Running<R, E>),
}

/// A request whose body is being read, without the types of its store, service and body.
pub(super) trait BufferRequest<R: 'static, E: 'static>: Send {
    /// Polls the body. Ready when the body is complete, or with the refusal if it cannot be read.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Collected, Refusal>>;

    /// Continues with the body, or with the refusal of [`poll_body`](Self::poll_body).
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

impl<St, S, B> BufferRequest<S::ResponseBody, S::Error> for Buffering<St, S, B>
where
    S: HttpService<B> + Clone,
    St: Store,
    B: RebuildBody<Error: Send> + Send + 'static,
{
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Collected, Refusal>> {
        let _entered = self.span.as_deref().map(Span::enter);
        Pin::new(&mut self.body)
            .poll(cx)
            .map_err(|shortfall| Refusal::new(RefusalKind::of_body(&shortfall)))
    }

    fn proceed(self: Box<Self>, body: Result<Collected, Refusal>) -> Buffered<S::ResponseBody, S::Error> {
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
        // The copy calls the `Clone` of extensions, which is the application's code and may panic.
        // So copy the head before the claim, because a panic between the claim and its `KeyGuard`
        // would leave the key claimed.
        let seen = settings.refusals.copy_head(&head);
        let decided = decide(&shared, &settings, &settings.claim(names.storage_key, fingerprint));
        if let Decided::Settled(shared_result) = decided {
            return Buffered::Response(settings.respond(span.as_deref(), Some(&head), &shared_result, &accepted));
        }
        // The request runs, waits or claims from here on, so it needs an entry that duplicates can
        // find.
        let in_flight = InFlight::new(names.key, names.storage_key, fingerprint, settings.engine.store_timeout);
        let admitted = Admitted { service, head, body };
        let tracker = Arc::clone(&shared.tracker);
        let (key_guard, next) = decided.enter(&shared, in_flight);
        let in_flight = Arc::clone(&key_guard.in_flight);
        let exchange =
            |key_guard, settings, stage| Exchange::new(key_guard, settings, span.clone(), times, stage, seen, accepted);
        let flow = match next {
            Next::Execute(grant) => {
                telemetry::granted(span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
                let lease = Lease::new(&key_guard, &settings, grant);
                let running = start(admitted, lease, &settings);
                drop(entered);
                let mut exchange = exchange(key_guard, settings, Stage::Nothing);
                in_span(async move { exchange.run_to_completion(running).await }, span)
            }
            Next::Recover(grant) => {
                telemetry::granted(span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
                drop(entered);
                let mut exchange = exchange(key_guard, settings, Stage::Admitted(Box::new(admitted)));
                in_span(async move { exchange.recover_and_execute(grant).await }, span)
            }
            Next::Run => {
                drop(entered);
                let exchange = exchange(key_guard, settings, Stage::Admitted(Box::new(admitted)));
                in_span(exchange.run(), span)
            }
        };
        Buffered::Running(Running::new(flow, IfGuarded { in_flight, tracker }))
    }
}

/// The result of a claim without an await.
enum Decided<'f> {
    /// The store granted the key, and the handler can run. Has the key's vacant entry in this
    /// process.
    Execute(VacantEntry<'f>, Grant),
    /// The store granted the key, but the recovery check for a lost attempt must run first. Has the
    /// key's vacant entry in this process.
    Recover(VacantEntry<'f>, Grant),
    /// The store has an outcome for the key, so nothing runs.
    Settled(SharedResult),
    /// The store cannot decide without an await.
    Undecided(VacantEntry<'f>),
    /// Another request has the key, the store failed, or no key may be claimed at the moment.
    Otherwise,
}

/// The next step of a request that has its guard.
enum Next {
    /// Run the handler.
    Execute(Grant),
    /// Check the attempt that was lost.
    Recover(Grant),
    /// Run the whole exchange, which claims the key, joins the other requests with this key, or
    /// handles the error of the store.
    Run,
}

impl Decided<'_> {
    /// Takes the key's entry in this process, if it is vacant, and makes the guard of the key. The
    /// guard exists before the application's code runs, so a panic of that code gives the lease up.
    fn enter<St: Store>(self, shared: &Arc<Shared<St>>, in_flight: InFlight) -> (KeyGuard<St>, Next) {
        let shared = Arc::clone(shared);
        let (vacant_entry, grant, next) = match self {
            Self::Execute(vacant_entry, grant) => (vacant_entry, grant, Next::Execute(grant)),
            Self::Recover(vacant_entry, grant) => (vacant_entry, grant, Next::Recover(grant)),
            // This request leads the requests of this process with its key.
            Self::Undecided(vacant_entry) => {
                return (KeyGuard::leads(shared, vacant_entry.take(in_flight)), Next::Run);
            }
            Self::Settled(_) | Self::Otherwise => return (KeyGuard::new(shared, Arc::new(in_flight)), Next::Run),
        };
        let in_flight = vacant_entry.take(in_flight.granted(grant));
        (KeyGuard::granted(shared, in_flight, grant), next)
    }
}

/// Claims a key without an await, if its entry in this process is vacant. The entry is locked until
/// the claim is decided and the caller has taken the entry, so that requests of this process with
/// the same key cannot claim it, too (I1).
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
