//! The layer that verifies webhooks.

use std::fmt;
use std::future::{poll_fn, Future};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::header::{HeaderValue, ALLOW};
use http::{Method, Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use super::VerifyWebhook;
use crate::clock::wall_clock;
use crate::http::{collect, RebuildBody, Refusal, RefusalKind, RefusalStyle, Shortfall, IDEMPOTENCY_KEY};
use crate::protocol::Scope;
use crate::receiver::id::MessageId;
use crate::telemetry;

/// Verifies webhooks, and gives each its id as `Idempotency-Key`, for an [`IdempotencyLayer`](crate::IdempotencyLayer) within; see the
/// [module](super). A key that the sender set itself is replaced; an inner layer that looks into another header field would trust the
/// sender's: [`webhooks`](crate::IdempotencyLayer::webhooks) sets the right one.
///
/// What is not genuine is refused with 401, whatever its fault, and reaches nothing behind. The body is read for it, unless there is no
/// signature at all: 2 MiB at most (413 beyond), within 30 seconds (408), both [settings](Self::with_body_bounds).
///
/// Anything but POST is refused with 405: no signature covers the method, and under another one the same webhook would run again. A
/// provider's challenge by GET is to be routed past this layer.
///
/// The layer is ready at all times. The service within becomes ready for what has been verified, so that who forges takes none of its
/// permits; what sheds load by readiness belongs within.
#[derive(Clone)]
pub struct WebhookLayer {
    settings: Arc<Settings>,
}

struct Settings {
    consumer: String,
    verify: Arc<dyn VerifyWebhook>,
    limit: usize,
    timeout: Duration,
}

impl WebhookLayer {
    /// Verifies as `provider` signs. `consumer` names, in a word of yours, who handles what comes from whom: `"stripe-accounting"`.
    ///
    /// Two layers of one name over one store take a webhook of one id for one webhook. So give each sender a name of its own, since
    /// ids are unique for their sender alone, and who holds another secret could otherwise send what has come from somebody else.
    /// And give each route with a **handler of its own** a name of its own: a provider sends one event, under one id, to every endpoint
    /// that subscribed to it, and the second would be answered without being handled.
    #[must_use]
    pub fn new(consumer: impl Into<String>, provider: impl VerifyWebhook) -> Self {
        let settings = Settings {
            consumer: consumer.into(),
            verify: Arc::new(provider),
            limit: 2 << 20,
            timeout: Duration::from_secs(30),
        };
        Self {
            settings: Arc::new(settings),
        }
    }

    /// How long a body may be, in bytes, and how long it may take to come; 2 MiB and 30 s by default.
    #[must_use]
    pub fn with_body_bounds(self, bytes: usize, timeout: Duration) -> Self {
        let settings = Settings {
            consumer: self.settings.consumer.clone(),
            verify: Arc::clone(&self.settings.verify),
            limit: bytes,
            timeout,
        };
        Self {
            settings: Arc::new(settings),
        }
    }

    /// The key that the webhook of this id gets, for
    /// [`IdempotencyLayer::storage_key`](crate::IdempotencyLayer::storage_key): to look up its record, or to resolve one whose outcome is
    /// unknown.
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

/// A service that only genuine webhooks reach; made by [`WebhookLayer`].
#[derive(Clone)]
pub struct WebhookService<S> {
    inner: S,
    settings: Arc<Settings>,
}

impl<S, B, R> Service<Request<B>> for WebhookService<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: RebuildBody + Send + 'static,
    B::Error: Send,
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
        let answered = Box::pin(async move {
            match verified(&settings, request).await {
                Ok(request) => {
                    // The service that was polled ready is the one that is called.
                    poll_fn(|cx| inner.poll_ready(cx)).await?;
                    inner.call(request).await
                }
                Err(kind) => Ok(refused(kind)),
            }
        });
        WebhookFuture { answered }
    }
}

fn refused<R: RebuildBody>(kind: RefusalKind) -> Response<R> {
    let refusal = Refusal::new(kind);
    telemetry::finished(None, refusal.code());
    let mut response = refusal.into_response(&RefusalStyle::default());
    if kind == RefusalKind::InvalidWebhookMethod {
        // RFC 9110 section 15.5.6: "The origin server MUST generate an Allow header field in a 405 response".
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
    }
    response
}

/// The request with its id as its key, if it is genuine.
async fn verified<B: RebuildBody>(settings: &Settings, request: Request<B>) -> Result<Request<B>, RefusalKind> {
    let (mut head, body) = request.into_parts();
    if head.method != Method::POST {
        return Err(RefusalKind::InvalidWebhookMethod);
    }
    if !settings.verify.is_signed(&head.headers) {
        return Err(RefusalKind::InvalidWebhook);
    }
    let body = match collect(body, settings.limit, settings.timeout).await {
        Ok(body) => body,
        Err(Shortfall::Broken(_)) => return Err(RefusalKind::BodyBroken),
        Err(Shortfall::TooLarge(_)) => return Err(RefusalKind::BodyTooLarge),
        Err(Shortfall::TooSlow(_)) => return Err(RefusalKind::BodyTimeout),
    };
    let id = settings.verify.verify(&head.headers, &body.bytes, wall_clock());
    let id = id.ok().filter(|id| !id.is_missing() && id.check().is_ok());
    let key = id.and_then(|id| HeaderValue::try_from(key_of(&settings.consumer, &id)).ok());
    let key = key.ok_or(RefusalKind::InvalidWebhook)?;
    // Without its key, a request cannot be distinguished from other deliveries, so refuse one that has no room for the
    // key.
    let placed = head.headers.try_insert(IDEMPOTENCY_KEY, key);
    placed.map_err(|_| RefusalKind::InvalidWebhook)?;
    Ok(Request::from_parts(head, body.rebuild()))
}

/// A digest: any id fits into a header field then, and none stands there.
fn key_of(consumer: &str, id: &MessageId) -> String {
    let named = Scope::of([consumer.as_bytes(), id.parts().as_bytes()]);
    let digest = blake3::derive_key("tower-idempotency 2026 key of a webhook", named.as_bytes());
    blake3::Hash::from(digest).to_hex().to_string()
}

/// The future of a [`WebhookService`].
#[must_use = "futures do nothing unless they are polled"]
pub struct WebhookFuture<R, E> {
    answered: BoxFuture<'static, Result<Response<R>, E>>,
}

impl<R, E> Future for WebhookFuture<R, E> {
    type Output = Result<Response<R>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.answered.as_mut().poll(cx)
    }
}

impl fmt::Debug for WebhookLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookLayer")
            .field("limit", &self.settings.limit)
            .field("timeout", &self.settings.timeout)
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
