//! The service: pass, refuse or guard.

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::request::Parts;
use http::{Extensions, Request, Response};
use tower_service::Service;

use super::buffering::{Buffering, RequestKey};
use super::future::ResponseFuture;
use super::guard::Shared;
#[cfg(feature = "axum")]
use super::lease::KeyHeader;
use super::lease::Lease;
use super::nested::Nested;
use super::settings::{Selector, Settings, Values};
#[cfg(feature = "axum")]
use crate::http::IDEMPOTENCY_KEY;
use crate::http::{FoundKey, HttpService, RebuildBody, Refusal, RefusalKind, find_key};
use crate::protocol::IdempotencyKey;
use crate::store::Store;
use crate::telemetry;

/// An HTTP service behind an [`IdempotencyLayer`](super::IdempotencyLayer).
pub struct Idempotency<S, St> {
    inner: S,
    // The state is behind one pointer, because servers clone their services for every request.
    layer: Arc<Configured<St>>,
}

/// The store and the settings of a service, as its layer had them when it made the service.
struct Configured<St> {
    shared: Arc<Shared<St>>,
    settings: Settings,
    selector: Option<Selector>,
}

/// The decision about a request by its head.
enum Admission {
    Guard(IdempotencyKey),
    Pass,
    Refuse(Refusal),
}

impl<St> Configured<St> {
    /// Returns the settings for a request; `None` if the layer does not cover the request.
    fn select(&self, head: &Parts) -> Option<Arc<Values>> {
        let path = head.uri.path();
        match (self.settings.of_path(path), &self.selector) {
            (Some(values), _) => Some(values),
            (None, Some(selector)) => Some(selector(head)?.for_path(path)),
            (None, None) => Some(Arc::clone(&self.settings.values)),
        }
    }
}

impl<S, St> Idempotency<S, St> {
    pub(super) fn new(inner: S, shared: Arc<Shared<St>>, settings: Settings, selector: Option<Selector>) -> Self {
        let layer = Arc::new(Configured {
            shared,
            settings,
            selector,
        });
        Self { inner, layer }
    }

    /// Returns the inner service.
    pub fn inner(&self) -> &S {
        &self.inner
    }
}

impl<S, St, B, R> Service<Request<B>> for Idempotency<S, St>
where
    S: Service<Request<B>, Response = Response<R>, Error: Send, Future: Send> + Clone + Send + 'static,
    St: Store,
    B: RebuildBody<Error: Send> + Send + 'static,
    R: RebuildBody<Error: Send> + Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, R, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if self.layer.selector.is_none() && self.layer.settings.paths.is_none() {
            let values = &self.layer.settings.values;
            return match values.admit(request.method(), request.headers()) {
                Admission::Pass => {
                    let mut request = request;
                    values.mark_passed(request.extensions_mut());
                    ResponseFuture::passed(self.inner.call(request))
                }
                Admission::Refuse(refusal) => values.refused(refusal, &request.into_parts().0),
                Admission::Guard(key) => {
                    let values = Arc::clone(values);
                    let (head, body) = request.into_parts();
                    self.guard(key, values, head, body)
                }
            };
        }
        let (mut head, body) = request.into_parts();
        let Some(values) = self.layer.select(&head) else {
            return ResponseFuture::passed(self.inner.call(Request::from_parts(head, body)));
        };
        match values.admit(&head.method, &head.headers) {
            Admission::Pass => {
                values.mark_passed(&mut head.extensions);
                ResponseFuture::passed(self.inner.call(Request::from_parts(head, body)))
            }
            Admission::Refuse(refusal) => values.refused(refusal, &head),
            Admission::Guard(key) => self.guard(key, values, head, body),
        }
    }
}

impl<S: Clone, St: Store> Idempotency<S, St> {
    /// Guards a request, unless an outer layer guards the same record already.
    fn guard<B>(
        &mut self,
        key: IdempotencyKey,
        settings: Arc<Values>,
        head: Parts,
        body: B,
    ) -> ResponseFuture<S::Future, S::ResponseBody, S::Error>
    where
        S: HttpService<B>,
        B: RebuildBody<Error: Send> + Send + 'static,
    {
        let scope = match &settings.scope {
            None => None,
            Some(scope) => match scope(&head) {
                None => return settings.refused(Refusal::new(RefusalKind::MissingScope), &head),
                scope => scope,
            },
        };
        let storage_key = settings.engine.space.storage_key(scope.as_ref(), &key);
        // Two layers that guard the same record would wait for each other, so the inner layer
        // passes the request on.
        let shared = &self.layer.shared;
        let outer = head.extensions.get::<Lease>();
        let is_ours =
            |lease: &Lease| *lease.storage_key() == storage_key && shared.in_flight_table.is_leader(lease.in_flight());
        if outer.is_some_and(|lease| lease.any(is_ours)) {
            return ResponseFuture::passed(self.inner.call(Request::from_parts(head, body)));
        }
        let owners = outer.map_or_else(Vec::new, |lease| lease.owners_of(&storage_key));
        let names = RequestKey {
            key,
            storage_key,
            scoped: scope.is_some(),
        };
        // Call the service that was polled ready and leave its clone behind; the clone is not
        // ready.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        let shared = Arc::clone(shared);
        if owners.is_empty() {
            return ResponseFuture::guarded(Box::new(Buffering::new(shared, settings, names, ready, head, body)));
        }
        let nested = Nested {
            shared,
            settings,
            names,
            service: ready,
            head,
            body,
            owners,
        };
        ResponseFuture::nested(Box::pin(nested.finish()))
    }
}

impl Values {
    /// Returns the refusal of a request that the layer refuses by its head.
    fn refused<F, R: RebuildBody, E>(&self, refusal: Refusal, head: &Parts) -> ResponseFuture<F, R, E> {
        telemetry::finished(telemetry::span().as_deref(), refusal.code());
        ResponseFuture::refused(refusal.into_response(&self.refusals, Some(head)))
    }

    /// Adds the name of the header field with the key to the extensions, for extractors that find
    /// no lease. Adds nothing if the name is `Idempotency-Key`, so that passing such requests on
    /// costs nothing.
    #[cfg_attr(
        not(feature = "axum"),
        expect(clippy::unused_self, reason = "there are no extractors")
    )]
    fn mark_passed(&self, extensions: &mut Extensions) {
        #[cfg(feature = "axum")]
        if self.header != IDEMPOTENCY_KEY {
            extensions.insert(KeyHeader(self.header.clone()));
        }
        #[cfg(not(feature = "axum"))]
        let _ = extensions;
    }

    /// Decides about a request by its method and its key.
    fn admit(&self, method: &http::Method, headers: &http::HeaderMap) -> Admission {
        if !self.methods.contains(method) {
            return Admission::Pass;
        }
        match find_key(headers, &self.header, &self.parser) {
            FoundKey::Present(key) => Admission::Guard(key),
            FoundKey::Invalid(error) => Admission::Refuse(Refusal::new(RefusalKind::InvalidKey(error.reason()))),
            FoundKey::Absent if self.required => Admission::Refuse(Refusal::new(RefusalKind::MissingKey)),
            FoundKey::Absent => Admission::Pass,
        }
    }
}

impl<S: Clone, St> Clone for Idempotency<S, St> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            layer: Arc::clone(&self.layer),
        }
    }
}

impl<S: fmt::Debug, St> fmt::Debug for Idempotency<S, St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("inner", &self.inner)
            .field("settings", &self.layer.settings)
            .finish_non_exhaustive()
    }
}
