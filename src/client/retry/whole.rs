//! One logical call that collects its response.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower::retry::future::ResponseFuture;
use tower_layer::Layer;
use tower_service::Service;

use super::body::CloneBody;
use super::call::{Call, CallError, CallFuture, CallLayer};
use super::collect::{Bounds, CollectError, Collecting, Gathered};
use super::delivery::{CallOutcome, CallReport};
use super::policy::RetryPolicy;
use crate::http::RebuildBody;

/// A [`CallLayer`] that collects the body of each response within its attempt.
/// [`CallLayer::collect_responses`] makes it.
///
/// A response counts as lost if its body breaks off, ends before its declared length, or takes
/// longer than the time limit. The layer then sends the request again, by the same rules as after a
/// lost connection: the request has a key, or an idempotent method, or (under a
/// [`OnceLayer`](super::super::OnceLayer)) the head of the response shows that the server did not
/// take the request. A server that honours the key replays its response. If no attempt brings a
/// whole body, the call fails with [`CollectError::Body`], which has the status of the last
/// response.
///
/// The caller gets the response with its head, extensions and trailers, and with a body of the same
/// type that no longer depends on the connection.
///
/// # Limits
///
/// | setting | default | beyond it |
/// |---|---|---|
/// | [bytes](Self::with_response_limit) | 2 MiB | the caller gets the response as a stream, starting with the bytes that were read; the layer does not repeat the request if the rest breaks off |
/// | [time](Self::with_response_timeout), from the head | 10 s | the response counts as lost |
///
/// A response whose declared length is over the limit passes at once.
///
/// # What it does not cover
///
/// * A stream that its head declares as such (`text/event-stream`, an upgrade) passes at once, and
///   so does a response to HEAD or CONNECT, a 204 and a 304.
/// * HTTP/1 has bodies that end with the connection, without a declared length and without chunks.
///   If the server closes such a connection too early, the body looks complete (RFC 9112 section
///   8).
///
/// # Bodies
///
/// The body of the response must be a [`RebuildBody`]: `reqwest::Body` is one,
/// `hyper::body::Incoming` is not. Wrap the latter *inside* of this layer:
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::Full;
/// use hyper::body::Incoming;
/// use hyper_util::client::legacy::Client;
/// use hyper_util::rt::TokioExecutor;
/// use tower::ServiceBuilder;
/// use tower_http::map_response_body::MapResponseBodyLayer;
/// use tower_idempotency::client::{CallLayer, IdempotencyKeyLayer, ProviderProfile, RetryPolicy};
/// use tower_idempotency::BufferedBody;
///
/// let http = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
/// let client = ServiceBuilder::new()
///     .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()))
///     .layer(CallLayer::new(RetryPolicy::new(ProviderProfile::stripe())).collect_responses())
///     .layer(MapResponseBodyLayer::new(BufferedBody::<Incoming>::new))
///     .service(http);
/// # drop(client);
/// ```
#[derive(Clone, Debug)]
pub struct CollectingCallLayer {
    calls: CallLayer,
    bounds: Bounds,
}

impl CallLayer {
    /// Collects the body of each response within its attempt, so that a response whose body breaks
    /// off counts as lost.
    ///
    /// Without this, the layer judges a response by its head only, and passes the body on as a
    /// stream. An error in the body reaches the caller, and the layer does not repeat the request.
    /// That is the default, because it works for every type of body and delays no stream.
    #[must_use]
    pub const fn collect_responses(self) -> CollectingCallLayer {
        CollectingCallLayer {
            calls: self,
            bounds: Bounds {
                bytes: 2 << 20,
                time: Duration::from_secs(10),
            },
        }
    }
}

impl CollectingCallLayer {
    /// Sets the maximum number of bytes of a body that the layer collects. The caller gets a longer
    /// response as a stream. Default: 2 MiB.
    #[must_use]
    pub const fn with_response_limit(mut self, bytes: usize) -> Self {
        self.bounds.bytes = bytes;
        self
    }

    /// Sets how long a body may take, from the head of its response to its end. A body that takes
    /// longer is lost. Default: 10 s.
    #[must_use]
    pub const fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.bounds.time = timeout;
        self
    }
}

impl<S> Layer<S> for CollectingCallLayer {
    type Service = CollectingCall<S>;

    fn layer(&self, inner: S) -> CollectingCall<S> {
        let bounds = self.bounds;
        CollectingCall {
            call: self.calls.layer(Collecting { inner, bounds }),
        }
    }
}

/// A client that retries requests, collects responses and reports the outcome.
/// [`CollectingCallLayer`] makes it.
#[derive(Clone, Debug)]
pub struct CollectingCall<S> {
    call: Call<Collecting<S>>,
}

impl<S, B, R> Service<Request<B>> for CollectingCall<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    S::Error: 'static,
    B: CloneBody,
    R: RebuildBody,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Response = Response<R>;
    type Error = CallError<CollectError<S::Error>>;
    type Future = CollectingCallFuture<ResponseFuture<RetryPolicy, Collecting<S>, Request<B>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let ready = self.call.poll_ready(cx);
        ready.map_err(|error| error.map(CollectError::Service))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        CollectingCallFuture {
            call: self.call.call(request),
        }
    }
}

pin_project! {
    /// The future of [`CollectingCall`].
    pub struct CollectingCallFuture<F> {
        #[pin]
        call: CallFuture<F>,
    }
}

impl<F, R, E> Future for CollectingCallFuture<F>
where
    F: Future<Output = Result<Response<Gathered<R>>, E>>,
    E: 'static,
{
    type Output = Result<Response<R>, CallError<CollectError<E>>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response = match ready!(self.project().call.poll(cx)) {
            Ok(response) => response,
            Err(error) => return Poll::Ready(Err(error.map(CollectError::Service))),
        };
        let (head, body) = response.into_parts();
        Poll::Ready(match body {
            Gathered::Body(body) => Ok(Response::from_parts(head, body)),
            Gathered::Lost(error) => {
                let delivery = head.extensions.get::<CallReport>();
                let (attempts, outcome) = delivery.map_or((1, CallOutcome::Unknown), |delivery| {
                    (delivery.attempts, delivery.outcome)
                });
                Err(CallError::new(CollectError::Body(error), attempts, outcome))
            }
        })
    }
}

impl<F> fmt::Debug for CollectingCallFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CollectingCallFuture").field(&self.call).finish()
    }
}
