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

use super::exchange::{Admitted, Cargo, Exchange};
use super::execution::start;
use super::flights::{Flight, Landing, Vacancy};
use super::future::Underway;
use super::guard::{Hold, Shared};
use super::lease::Lease;
use super::settings::Values;
use crate::http::{collect_request, BodyBounds, Checked, Collect, Collected, RebuildBody, Refusal, RefusalKind};
use crate::protocol::{Claim, Decision, Grant, IdempotencyKey, StorageKey};
use crate::store::Store;
use crate::telemetry::{self, Times};

/// A request with a good key, of which nothing has happened yet: it can be dropped at any time.
pub(super) struct Arrival<St, S, B> {
    shared: Arc<Shared<St>>,
    settings: Arc<Values>,
    /// Its span, where somebody listens.
    span: Option<Box<Span>>,
    times: Times,
    names: Names,
    service: S,
    head: Parts,
    body: Collect<Checked<B>>,
}

/// How the key of a request is called.
pub(super) struct Names {
    pub(super) key: IdempotencyKey,
    pub(super) storage_key: StorageKey,
    /// Whether the request has a scope.
    pub(super) scoped: bool,
}

/// What an arrival leads to.
pub(super) enum Arrived<R: 'static, E: 'static> {
    /// This response.
    Response(Response<R>),
    /// An exchange.
    Underway(Underway<R, E>),
}

/// An arrival, whatever it is made of.
pub(super) trait Arriving<R: 'static, E: 'static>: Send {
    /// Ready when the body was read, or will not be.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Collected, Refusal>>;

    /// Goes on with the body.
    fn proceed(self: Box<Self>, body: Result<Collected, Refusal>) -> Arrived<R, E>;
}

impl<St: Store, S, B: RebuildBody> Arrival<St, S, B> {
    pub(super) fn new(
        shared: Arc<Shared<St>>,
        settings: Arc<Values>,
        names: Names,
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

impl<St, S, B, R> Arriving<R, S::Error> for Arrival<St, S, B>
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

    fn proceed(self: Box<Self>, body: Result<Collected, Refusal>) -> Arrived<R, S::Error> {
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
            Err(refusal) => return Arrived::Response(settings.refuse(span.as_deref(), Some(&head), refusal)),
        };
        let fingerprint = settings.fingerprint(&head, &body.bytes, names.scoped);
        let accepted = settings.accepted(&head);
        // A copy calls the `Clone` of extensions, which is the application's code. Copy before the claim, because a panic
        // between the claim and its `Hold` would leave the key claimed.
        let seen = settings.refusals.keep_head(&head);
        let decided = decide(&shared, &settings, &settings.claim(names.storage_key, fingerprint));
        if let Decided::Settled(landing) = decided {
            return Arrived::Response(settings.land(span.as_deref(), Some(&head), &landing, &accepted));
        }
        // Only from here on it needs a place where others find it.
        let flight = Flight::new(names.key, names.storage_key, fingerprint, settings.store_timeout);
        let admitted = Admitted { service, head, body };
        let tracker = Arc::clone(&shared.tracker);
        let (flight, exchange) = match decided {
            Decided::Execute(vacancy, grant) => {
                let flight = vacancy.take(flight.granted(grant));
                let hold = Hold::granted(Arc::clone(&shared), Arc::clone(&flight), grant);
                telemetry::granted(span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
                let lease = Lease::new(&hold, &settings, grant);
                let running = start(admitted, lease, &settings);
                drop(entered);
                let mut exchange =
                    Exchange::new(hold, settings, span.clone(), times, Cargo::<S>::Nothing, seen, accepted);
                let flow = async move { exchange.see_through(running).await };
                (flight, in_span(flow, span))
            }
            Decided::Recover(vacancy, grant) => {
                let flight = vacancy.take(flight.granted(grant));
                let hold = Hold::granted(Arc::clone(&shared), Arc::clone(&flight), grant);
                telemetry::granted(span.as_deref(), grant.attempt, grant.owner.fence.as_u64());
                drop(entered);
                let cargo = Cargo::Admitted(Box::new(admitted));
                let mut exchange = Exchange::new(hold, settings, span.clone(), times, cargo, seen, accepted);
                let flow = async move { exchange.recover_and_execute(grant).await };
                (flight, in_span(flow, span))
            }
            Decided::Undecided(vacancy) => {
                let flight = vacancy.take(flight);
                let hold = Hold::seated(Arc::clone(&shared), Arc::clone(&flight));
                drop(entered);
                let cargo = Cargo::Admitted(Box::new(admitted));
                let exchange = Exchange::new(hold, settings, span.clone(), times, cargo, seen, accepted);
                (flight, in_span(exchange.run(), span))
            }
            Decided::Settled(_) | Decided::Otherwise => {
                let flight = Arc::new(flight);
                let hold = Hold::new(Arc::clone(&shared), Arc::clone(&flight));
                drop(entered);
                let cargo = Cargo::Admitted(Box::new(admitted));
                let exchange = Exchange::new(hold, settings, span.clone(), times, cargo, seen, accepted);
                (flight, in_span(exchange.run(), span))
            }
        };
        Arrived::Underway(Underway::new(exchange, flight, tracker))
    }
}

/// What a store that need not be waited for says.
enum Decided<'f> {
    /// The key is granted, and this is its seat.
    Execute(Vacancy<'f>, Grant),
    /// Likewise; but first it must be asked what became of an earlier attempt.
    Recover(Vacancy<'f>, Grant),
    /// Nothing needs to run.
    Settled(Landing),
    /// Only an await can tell.
    Undecided(Vacancy<'f>),
    /// Another request has the key, the store failed, or no execution may begin.
    Otherwise,
}

/// Claims a key at once, where its seat is free: others of this process find the seat taken, or the claim decided.
fn decide<'f, St: Store>(shared: &'f Shared<St>, settings: &Values, claim: &Claim) -> Decided<'f> {
    if shared.barred(settings).is_some() {
        return Decided::Otherwise;
    }
    let Some(vacancy) = shared.flights.vacancy(&claim.key) else {
        return Decided::Otherwise;
    };
    match shared.store.claim_now(claim) {
        Some(Ok(Decision::Execute(grant))) => Decided::Execute(vacancy, grant),
        Some(Ok(Decision::Recover(grant))) => Decided::Recover(vacancy, grant),
        Some(Ok(decision)) => Landing::of(decision).map_or(Decided::Otherwise, Decided::Settled),
        None => Decided::Undecided(vacancy),
        Some(Err(_)) => Decided::Otherwise,
    }
}

fn in_span<F: Future + Send + 'static>(flow: F, span: Option<Box<Span>>) -> BoxFuture<'static, F::Output> {
    match span {
        None => Box::pin(flow),
        Some(span) => Box::pin(flow.instrument(*span)),
    }
}
