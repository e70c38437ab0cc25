//! The future of a response.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;
use http::Response;
use pin_project_lite::pin_project;

use super::buffering::{BufferRequest, Buffered};
use super::detached::Running;

pin_project! {
    /// The future of a response of [`Idempotency`](super::Idempotency).
    ///
    /// # Cancel safety
    ///
    /// If this future is dropped before the body of the request is read, nothing has happened. If
    /// it is dropped after the claim, the execution continues in a task until its outcome is
    /// recorded, so that an effect never lacks its record. If a duplicate is dropped while it
    /// waits, it leaves no trace.
    pub struct ResponseFuture<F, R: 'static, E: 'static> {
        #[pin]
        kind: Kind<F, R, E>,
    }
}

pin_project! {
    #[project = KindProjection]
    enum Kind<F, R: 'static, E: 'static> {
        Passed { #[pin] future: F },
        Refused { response: Option<Box<Response<R>>> },
        Guarded { course: Course<R, E> },
        Nested { future: BoxFuture<'static, Result<Response<R>, E>> },
    }
}

/// The phases of a guarded request.
enum Course<R: 'static, E: 'static> {
    BufferRequest(Box<dyn BufferRequest<R, E>>),
    Running(Running<R, E>),
    Ended,
}

impl<F, R, E> ResponseFuture<F, R, E> {
    pub(super) fn passed(future: F) -> Self {
        Self {
            kind: Kind::Passed { future },
        }
    }

    pub(super) fn refused(response: Response<R>) -> Self {
        Self {
            kind: Kind::Refused {
                response: Some(Box::new(response)),
            },
        }
    }

    /// Returns the future of a request for which the store must show whether an outer layer already
    /// guards the same record.
    pub(super) fn nested(future: BoxFuture<'static, Result<Response<R>, E>>) -> Self {
        Self {
            kind: Kind::Nested { future },
        }
    }

    pub(super) fn guarded(buffering: Box<dyn BufferRequest<R, E>>) -> Self {
        Self {
            kind: Kind::Guarded {
                course: Course::BufferRequest(buffering),
            },
        }
    }
}

impl<F, R, E> Future for ResponseFuture<F, R, E>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<R>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().kind.project() {
            KindProjection::Passed { future } => future.poll(cx),
            KindProjection::Refused { response } => match response.take() {
                Some(response) => Poll::Ready(Ok(*response)),
                None => Poll::Pending,
            },
            KindProjection::Guarded { course } => course.poll(cx),
            KindProjection::Nested { future } => future.as_mut().poll(cx),
        }
    }
}

impl<R, E> Course<R, E> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<R>, E>> {
        if let Self::BufferRequest(buffering) = self {
            let body = ready!(buffering.poll_body(cx));
            // Take the request out of `self`, so that it is never polled again after a panic.
            let Self::BufferRequest(buffering) = std::mem::replace(self, Self::Ended) else {
                return Poll::Pending;
            };
            match buffering.proceed(body) {
                Buffered::Response(response) => return Poll::Ready(Ok(response)),
                Buffered::Running(running) => *self = Self::Running(running),
            }
        }
        match self {
            Self::Running(running) => Pin::new(running).poll(cx),
            _ => Poll::Pending,
        }
    }
}

impl<F, R, E> fmt::Debug for ResponseFuture<F, R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
