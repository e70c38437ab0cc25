//! One request through the layer, with a store that notes the claim and replies as the property
//! has chosen.

use std::convert::Infallible;
use std::future::{Pending, pending, ready};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::executor::block_on;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fence, Fingerprint, Outcome, Owner, Release, Renewal, Resolution, ResolveResult,
    Snapshot, StorageKey,
};
use tower_idempotency::{Error, IdempotencyLayer, Store};

pub(crate) type Layered = IdempotencyLayer<Witness>;
pub(crate) type AnyBody = UnsyncBoxBody<Bytes, Infallible>;

/// A store that notes the last claim and the last outcome, and replies to every claim in the same
/// way.
#[derive(Clone)]
pub(crate) struct Witness(Arc<Inner>);

struct Inner {
    reply: Result<Decision, Error>,
    claim: Mutex<Option<Claim>>,
    outcome: Mutex<Option<Outcome>>,
}

/// Returns a layer over a store that replies to each claim in this way.
pub(crate) fn layer(reply: Result<Decision, Error>) -> Layered {
    IdempotencyLayer::new(Witness(Arc::new(Inner {
        reply,
        claim: Mutex::default(),
        outcome: Mutex::default(),
    })))
}

/// Sends a request through the layer. The handler behind the layer must not run.
pub(crate) fn refused(layer: &Layered, request: Request<Bytes>) -> (Option<Claim>, Response<AnyBody>) {
    let response = exchange(layer, request, None);
    (layer.store().0.claim.lock().unwrap().take(), response)
}

/// Sends a request through the layer to a handler with this response. Returns the outcome that the
/// store got.
pub(crate) fn stored(
    layer: &Layered,
    request: Request<Bytes>,
    response: Response<AnyBody>,
) -> (Option<Outcome>, Response<AnyBody>) {
    let response = exchange(layer, request, Some(response));
    (layer.store().0.outcome.lock().unwrap().take(), response)
}

fn exchange(layer: &Layered, request: Request<Bytes>, response: Option<Response<AnyBody>>) -> Response<AnyBody> {
    let response = Arc::new(Mutex::new(response));
    let handler = service_fn(move |_: Request<AnyBody>| {
        let response = response.lock().unwrap().take();
        ready(Ok::<_, Infallible>(response.expect("the handler runs as expected")))
    });
    let request = request.map(|body| Full::new(body).boxed_unsync());
    let Ok(response) = block_on(layer.layer(handler).oneshot(request));
    response
}

/// Returns the fingerprint of a request under these settings.
pub(crate) fn fingerprint(set: impl FnOnce(Layered) -> Layered, request: Request<Bytes>) -> Fingerprint {
    let (claim, _) = refused(&set(layer(Ok(Decision::Mismatch))), request);
    claim.expect("the layer claims the key").fingerprint
}

impl Store for Witness {
    type Watch = Pending<()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        *self.0.claim.lock().unwrap() = Some(claim.clone());
        self.0.reply.clone()
    }

    async fn renew(&self, _: &StorageKey, _: Owner, _: Duration) -> Result<Renewal, Error> {
        Ok(Renewal::Renewed)
    }

    async fn complete(&self, _: &StorageKey, _: Owner, outcome: &Outcome, _: Duration) -> Result<Completion, Error> {
        *self.0.outcome.lock().unwrap() = Some(outcome.clone());
        Ok(Completion::Completed)
    }

    async fn release(&self, _: &StorageKey, _: Owner) -> Result<Release, Error> {
        Ok(Release::Released)
    }

    async fn resolve(&self, _: &StorageKey, _: Fence, _: &Resolution) -> Result<ResolveResult, Error> {
        Ok(ResolveResult::Resolved)
    }

    async fn peek(&self, _: &StorageKey) -> Result<Option<Snapshot>, Error> {
        Ok(None)
    }

    async fn watch(&self, _: &StorageKey) -> Result<Self::Watch, Error> {
        Ok(pending())
    }
}
