//! The layer that verifies webhooks.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::header::{ALLOW, HeaderValue};
use http::{Method, Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use super::{InvalidWebhook, VerifyWebhook, Webhook};
use crate::clock::wall_clock;
use crate::http::{BodyBounds, IDEMPOTENCY_KEY, RebuildBody, Refusal, RefusalKind, Rendering, collect_request};
use crate::protocol::Scope;
use crate::receiver::id::MessageId;
use crate::telemetry;

/// Verifies webhooks and passes the id of each on as `Idempotency-Key`, for an
/// [`IdempotencyLayer`](crate::IdempotencyLayer) inside. See the [module](super). The layer
/// replaces a key that the sender has set. An inner layer that reads another header field would
/// trust the sender's key; [`webhooks`](crate::IdempotencyLayer::webhooks) sets the right field.
///
/// A webhook that cannot be verified gets 401 for every [reason](InvalidWebhook), and reaches no
/// inner service. The reason is in the event `webhook-rejected` and in the metric
/// `idempotency_webhooks_rejected_total`.
///
/// The layer reads the body, unless the field with the signature is missing. A body may have at
/// most 2 MiB (otherwise 413) and must arrive within 30 seconds (otherwise 408). These bounds
/// ([`with_body_limit`](Self::with_body_limit) and [`with_body_timeout`](Self::with_body_timeout))
/// govern this layer and the `IdempotencyLayer` inside.
///
/// Methods other than POST get 405. No signature covers the method, so under another method the
/// same webhook could run again. A provider's challenge by GET can [pass](Self::pass_challenges).
///
/// The layer is always ready. It waits for the inner service only after it has verified a webhook,
/// so forged requests take none of the service's permits. Put a layer that sheds load by readiness
/// inside.
#[derive(Clone)]
pub struct WebhookLayer {
    settings: Arc<Settings>,
}

#[derive(Clone)]
struct Settings {
    consumer: String,
    verify: Arc<dyn VerifyWebhook>,
    bounds: BodyBounds,
    pass_challenges: bool,
}

impl WebhookLayer {
    /// Verifies webhooks as `provider` signs them. `consumer` is a name of your choice for the
    /// handler and the sender, such as `"stripe-accounting"`. It is part of the log events.
    ///
    /// If two layers over one store have the same name, webhooks with the same id count as one
    /// webhook. An id is unique only for its sender, so give each sender a name of its own.
    /// Otherwise one sender could use up an id of another sender. Also give each route with a
    /// **handler of its own** a name of its own. A provider sends one event, under one id, to every
    /// endpoint that subscribed to it, and the second endpoint would return a response without
    /// handling the event.
    #[must_use]
    pub fn new(consumer: impl Into<String>, provider: impl VerifyWebhook) -> Self {
        let settings = Settings {
            consumer: consumer.into(),
            verify: Arc::new(provider),
            bounds: BodyBounds {
                bytes: 2 << 20,
                timeout: Duration::from_secs(30),
            },
            pass_challenges: false,
        };
        Self {
            settings: Arc::new(settings),
        }
    }

    /// Sets the maximum length of a body in bytes. Default: 2 MiB.
    ///
    /// This limit also replaces the limit of an [`IdempotencyLayer`](crate::IdempotencyLayer)
    /// inside, so you need not set it there. An extractor of the handler can have a limit of its
    /// own. For example, the limit of axum is 2 MB, and `DefaultBodyLimit` sets it.
    #[must_use]
    pub fn with_body_limit(mut self, bytes: usize) -> Self {
        Arc::make_mut(&mut self.settings).bounds.bytes = bytes;
        self
    }

    /// Sets how long a body may take to arrive. Default: 30 s. This time also replaces the timeout
    /// of an [`IdempotencyLayer`](crate::IdempotencyLayer) inside.
    #[must_use]
    pub fn with_body_timeout(mut self, timeout: Duration) -> Self {
        Arc::make_mut(&mut self.settings).bounds.timeout = timeout;
        self
    }

    /// Passes GET and HEAD requests to the handler **without any verification**. Default: they get
    /// 405.
    ///
    /// Some providers send a challenge by GET when you set up a webhook, and expect it back. Meta
    /// sends `hub.challenge`, Dropbox sends `challenge`. Trello sends HEAD. The handler of the GET
    /// route returns the challenge and **must not have effects**, because any client can send such
    /// a request. If the challenge carries a token of yours, such as Meta's `hub.verify_token`,
    /// compare that token.
    ///
    /// These requests get no key. The layer removes an `Idempotency-Key` that the client has sent,
    /// so a layer inside claims nothing. They reach the inner service like any unverified traffic,
    /// with its permits and limits.
    ///
    /// ```
    /// # #[cfg(feature = "axum")]
    /// # fn app(
    /// #     meta: impl tower_idempotency::receiver::webhooks::VerifyWebhook,
    /// # ) -> Result<axum::Router, tower_idempotency::Error> {
    /// use std::collections::HashMap;
    /// use axum::{extract::Query, http::StatusCode, routing::get, Router};
    /// use tower::ServiceBuilder;
    /// use tower_idempotency::{receiver::webhooks::WebhookLayer, IdempotencyLayer, MemoryStore};
    ///
    /// async fn challenge(Query(query): Query<HashMap<String, String>>) -> Result<String, StatusCode> {
    ///     let is_ours = query.get("hub.verify_token").is_some_and(|token| token == "my token");
    ///     let challenge = query.get("hub.challenge").filter(|_| is_ours);
    ///     challenge.cloned().ok_or(StatusCode::FORBIDDEN)
    /// }
    ///
    /// let layers = ServiceBuilder::new()
    ///     .layer(WebhookLayer::new("meta", meta).pass_challenges())
    ///     .layer(IdempotencyLayer::new(MemoryStore::new()).webhooks());
    /// Ok(Router::new().route("/meta", get(challenge).post(|| async { "thanks" })).layer(layers))
    /// # }
    /// ```
    #[must_use]
    pub fn pass_challenges(mut self) -> Self {
        Arc::make_mut(&mut self.settings).pass_challenges = true;
        self
    }

    /// Returns the key that the webhook with this id gets. Pass it to
    /// [`IdempotencyLayer::storage_key`](crate::IdempotencyLayer::storage_key) to look up the
    /// record, or to resolve a record whose outcome is unknown.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Store};
    /// # use tower_idempotency::receiver::{ids, webhooks::WebhookLayer};
    /// # async fn look_up(webhooks: WebhookLayer, store: MemoryStore) -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_idempotency::Scope;
    ///
    /// let idempotency = IdempotencyLayer::new(store).webhooks();
    /// // The scope that `webhooks()` sets.
    /// let scope = Scope::of(["tower-idempotency", "webhooks"]);
    /// let key = idempotency.storage_key(Some(&scope), &webhooks.key(&ids::stripe("evt_1")))?;
    /// let record = idempotency.store().peek(&key).await?;
    /// # let _ = record;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn key(&self, id: &MessageId) -> String {
        key_of(&self.settings.consumer, id)
    }
}

impl<S> Layer<S> for WebhookLayer {
    type Service = WebhookService<S>;

    fn layer(&self, inner: S) -> WebhookService<S> {
        WebhookService {
            inner,
            settings: Arc::clone(&self.settings),
        }
    }
}

/// The service of a [`WebhookLayer`]. Only verified webhooks reach the inner service.
#[derive(Clone)]
pub struct WebhookService<S> {
    inner: S,
    settings: Arc<Settings>,
}

impl<S, B, R> Service<Request<B>> for WebhookService<S>
where
    S: Service<Request<B>, Response = Response<R>, Future: Send> + Clone + Send + 'static,
    B: RebuildBody<Error: Send> + Send + 'static,
    R: RebuildBody,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = WebhookFuture<R, S::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> WebhookFuture<R, S::Error> {
        let (mut inner, settings) = (self.inner.clone(), Arc::clone(&self.settings));
        let response = Box::pin(async move {
            match admitted(&settings, request).await {
                Ok(request) => {
                    // Call the service that was polled ready.
                    poll_fn(|cx| inner.poll_ready(cx)).await?;
                    inner.call(request).await
                }
                Err(rejection) => Ok(settings.reject(rejection)),
            }
        });
        WebhookFuture { response }
    }
}

/// The reason why a request does not reach the inner service.
#[derive(Clone, Copy)]
enum Rejection {
    Invalid(InvalidWebhook),
    Refused(RefusalKind),
}

impl Settings {
    fn reject<R: RebuildBody>(&self, rejection: Rejection) -> Response<R> {
        let kind = match rejection {
            Rejection::Invalid(reason) => {
                telemetry::webhook_rejected(&self.consumer, reason.reason());
                RefusalKind::InvalidWebhook
            }
            Rejection::Refused(kind) => kind,
        };
        let refusal = Refusal::new(kind);
        telemetry::finished(None, refusal.code());
        let mut response = refusal.into_response(&Rendering::default(), None);
        if kind == RefusalKind::InvalidWebhookMethod {
            // RFC 9110 section 15.5.6: "The origin server MUST generate an Allow header field in a
            // 405 response".
            let allowed = match self.pass_challenges {
                true => "GET, HEAD, POST",
                false => "POST",
            };
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }
}

/// Returns the request for the inner service: a verified webhook with its id as its key, or a
/// challenge without a key.
async fn admitted<B: RebuildBody>(settings: &Settings, request: Request<B>) -> Result<Request<B>, Rejection> {
    let (mut head, body) = request.into_parts();
    if settings.pass_challenges && matches!(head.method, Method::GET | Method::HEAD) {
        head.headers.remove(IDEMPOTENCY_KEY);
        return Ok(Request::from_parts(head, body));
    }
    if head.method != Method::POST {
        return Err(Rejection::Refused(RefusalKind::InvalidWebhookMethod));
    }
    if !settings.verify.is_signed(&head.headers) {
        return Err(Rejection::Invalid(InvalidWebhook::MissingHeader));
    }
    let bounds = settings.bounds;
    let body = collect_request(body, bounds).await;
    let body = body.map_err(|shortfall| Rejection::Refused(RefusalKind::of_body(&shortfall)))?;
    let webhook = Webhook::new(&head, &body.bytes, wall_clock());
    let id = settings.verify.verify(&webhook).map_err(Rejection::Invalid)?;
    if id.is_missing() || id.check().is_err() {
        return Err(Rejection::Invalid(InvalidWebhook::Id));
    }
    let key = HeaderValue::try_from(key_of(&settings.consumer, &id));
    let key = key.map_err(|_| Rejection::Invalid(InvalidWebhook::Id))?;
    // Without its key, the request cannot be distinguished from other deliveries. Therefore refuse
    // a request whose header map has no room for the key.
    let placed = head.headers.try_insert(IDEMPOTENCY_KEY, key);
    placed.map_err(|_| Rejection::Invalid(InvalidWebhook::Id))?;
    head.extensions.insert(bounds);
    Ok(Request::from_parts(head, body.rebuild()))
}

/// Returns a digest of the id. A digest of any id fits into a header field, and does not show the
/// id there.
fn key_of(consumer: &str, id: &MessageId) -> String {
    let named = Scope::of([consumer.as_bytes(), id.parts().as_bytes()]);
    let digest = blake3::derive_key("tower-idempotency 2026 key of a webhook", named.as_bytes());
    blake3::Hash::from(digest).to_hex().to_string()
}

/// The future of a [`WebhookService`].
#[must_use = "futures do nothing unless they are polled"]
pub struct WebhookFuture<R, E> {
    response: BoxFuture<'static, Result<Response<R>, E>>,
}

impl<R, E> Future for WebhookFuture<R, E> {
    type Output = Result<Response<R>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.response.as_mut().poll(cx)
    }
}

impl fmt::Debug for WebhookLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookLayer")
            .field("consumer", &self.settings.consumer)
            .field("bounds", &self.settings.bounds)
            .field("pass_challenges", &self.settings.pass_challenges)
            .finish_non_exhaustive()
    }
}

impl<S: fmt::Debug> fmt::Debug for WebhookService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookService")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl<R, E> fmt::Debug for WebhookFuture<R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookFuture").finish_non_exhaustive()
    }
}
