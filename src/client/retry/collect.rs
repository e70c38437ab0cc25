//! Reads the body of a response within its attempt, so that the retry notices a lost body.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, response};
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::http::{Collect, RebuildBody, Shortfall, collect, has_body, is_cut_short, is_stream};

/// The limits for the body of a response.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) bytes: usize,
    /// The longest time from the head of the response to the end of its body.
    pub(super) time: Duration,
}

/// The extension of a response whose body was lost. The [`RetryPolicy`](super::RetryPolicy) needs
/// it, because it does not know the type of the body.
#[derive(Clone, Copy, Debug)]
pub(super) struct IsLost;

/// The body of a response, or the reason why it was lost.
#[derive(Debug)]
pub enum Gathered<R> {
    /// The whole body, or the body of a stream or of a response that is too long.
    Body(R),
    /// The body was lost.
    Lost(BodyError),
}

/// A service that collects the bodies of its responses. It returns a response whose body was lost
/// as a response, because its head shows more about the effect than an error does.
#[derive(Clone, Debug)]
pub struct Collecting<S> {
    pub(super) inner: S,
    pub(super) bounds: Bounds,
}

impl<S, B, R> Service<Request<B>> for Collecting<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: RebuildBody,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Response = Response<Gathered<R>>;
    type Error = S::Error;
    type Future = CollectingFuture<S::Future, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        CollectingFuture {
            method: request.method().clone(),
            bounds: self.bounds,
            sent: self.inner.call(request),
            reading: None,
        }
    }
}

pin_project! {
    /// The future of [`Collecting`].
    #[derive(Debug)]
    pub struct CollectingFuture<F, R> {
        #[pin]
        sent: F,
        method: Method,
        bounds: Bounds,
        reading: Option<Reading<R>>,
    }
}

#[derive(Debug)]
struct Reading<R> {
    head: response::Parts,
    body: Collect<R>,
}

impl<F, R, E> Future for CollectingFuture<F, R>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: RebuildBody,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Output = Result<Response<Gathered<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut reading = match this.reading.take() {
            Some(reading) => reading,
            None => {
                let (head, body) = ready!(this.sent.poll(cx))?.into_parts();
                if !has_body(this.method, head.status) || is_stream(&head) {
                    return Poll::Ready(Ok(Response::from_parts(head, Gathered::Body(body))));
                }
                let body = collect(body, this.bounds.bytes, this.bounds.time);
                Reading { head, body }
            }
        };
        let Poll::Ready(read) = Pin::new(&mut reading.body).poll(cx) else {
            *this.reading = Some(reading);
            return Poll::Pending;
        };
        let mut head = reading.head;
        let lost = |cause| BodyError {
            status: head.status,
            cause,
        };
        let body = match read {
            Ok(whole) if !is_cut_short(&head, whole.bytes.len()) => Gathered::Body(whole.rebuild()),
            Ok(part) | Err(Shortfall::Short(part)) => Gathered::Lost(lost(Cause::CutShort(part.bytes.len()))),
            Err(Shortfall::TooLarge(body)) => Gathered::Body(R::rebuild(body)),
            Err(Shortfall::TooSlow(_)) => Gathered::Lost(lost(Cause::TooSlow(this.bounds.time))),
            Err(Shortfall::Broken(error)) => Gathered::Lost(lost(Cause::Broken(error.into()))),
        };
        if let Gathered::Lost(_) = &body {
            head.extensions.insert(IsLost);
        }
        Poll::Ready(Ok(Response::from_parts(head, body)))
    }
}

/// The error of an attempt whose response is collected. Either the client failed, or the body of
/// its response was lost.
#[derive(Debug)]
#[non_exhaustive]
pub enum CollectError<E> {
    /// The head of a response arrived, and its body was lost.
    Body(BodyError),
    /// The error of the inner client.
    Service(E),
}

impl<E: fmt::Display> fmt::Display for CollectError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Body(error) => error.fmt(f),
            Self::Service(error) => error.fmt(f),
        }
    }
}

impl<E: StdError + 'static> StdError for CollectError<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Body(error) => error.source(),
            Self::Service(error) => error.source(),
        }
    }
}

/// The error of a response whose head arrived and whose body was lost. The connection broke, the
/// body ended before its declared length, or it exceeded the time limit.
#[derive(Debug)]
pub struct BodyError {
    status: StatusCode,
    cause: Cause,
}

#[derive(Debug)]
enum Cause {
    Broken(Box<dyn StdError + Send + Sync>),
    /// The body ended after this number of bytes.
    CutShort(usize),
    TooSlow(Duration),
}

impl BodyError {
    /// Returns the status of the response.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        self.status
    }

    /// Returns whether the body exceeded the [time
    /// limit](super::CollectingCallLayer::with_response_timeout).
    #[must_use]
    pub const fn is_timeout(&self) -> bool {
        matches!(self.cause, Cause::TooSlow(_))
    }
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the body of the response with status {} ", self.status.as_u16())?;
        match &self.cause {
            Cause::Broken(_) => f.write_str("broke off"),
            Cause::CutShort(read) => write!(f, "ended after {read} bytes, before its declared length"),
            Cause::TooSlow(limit) => write!(f, "did not end within {limit:?}"),
        }
    }
}

impl StdError for BodyError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.cause {
            Cause::Broken(error) => Some(&**error),
            Cause::CutShort(_) | Cause::TooSlow(_) => None,
        }
    }
}
