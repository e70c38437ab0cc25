//! The future of a response.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{ready, Context, Poll};

use futures::future::BoxFuture;
use http::Response;
use pin_project_lite::pin_project;
use tokio::runtime::Handle;

use super::buffering::{BufferRequest, Buffered};
use super::singleflight::InFlight;
use crate::detach::TaskTracker;
use crate::telemetry::{self, Event};

pin_project! {
    /// The future of an answer of [`Idempotency`](super::Idempotency).
    ///
    /// # Cancel safety
    ///
    /// Dropped before the request is read, nothing has happened. Dropped later, the execution goes on in a task of its own until
    /// its outcome is recorded: the caller may hang up, the effect and its answer stay one. A duplicate that merely waits is
    /// dropped without a trace.
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

/// The course of a guarded request.
enum Course<R: 'static, E: 'static> {
    BufferRequest(Box<dyn BufferRequest<R, E>>),
    DetachOnDrop(DetachOnDrop<R, E>),
    Ended,
}

/// An exchange that goes on when it is dropped, if it must.
pub(super) struct DetachOnDrop<R: 'static, E: 'static> {
    exchange: Option<BoxFuture<'static, Result<Response<R>, E>>>,
    in_flight: Arc<InFlight>,
    tracker: Arc<TaskTracker>,
    /// The runtime that polled it last: it may be dropped elsewhere, and the runtime of its first poll may have ended.
    runtime: Option<Handle>,
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

    /// A request for which the store must show whether a layer further out already guards the same record.
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
            // Taken out: should it panic, it is not polled again.
            let Self::BufferRequest(buffering) = std::mem::replace(self, Self::Ended) else {
                return Poll::Pending;
            };
            match buffering.proceed(body) {
                Buffered::Response(response) => return Poll::Ready(Ok(response)),
                Buffered::DetachOnDrop(running) => *self = Self::DetachOnDrop(running),
            }
        }
        match self {
            Self::DetachOnDrop(running) => running.poll(cx),
            _ => Poll::Pending,
        }
    }
}

impl<R, E> DetachOnDrop<R, E> {
    pub(super) fn new(
        exchange: BoxFuture<'static, Result<Response<R>, E>>,
        in_flight: Arc<InFlight>,
        tracker: Arc<TaskTracker>,
    ) -> Self {
        Self {
            exchange: Some(exchange),
            in_flight,
            tracker,
            runtime: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<R>, E>> {
        // Taken out while it runs: should it panic, it is dropped here and not polled again.
        let Some(mut exchange) = self.exchange.take() else {
            return Poll::Pending;
        };
        let polled = exchange.as_mut().poll(cx);
        if polled.is_pending() {
            self.exchange = Some(exchange);
            if let Ok(runtime) = Handle::try_current() {
                self.runtime = Some(runtime);
            }
        }
        polled
    }
}

impl<R, E> Drop for DetachOnDrop<R, E> {
    fn drop(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            if self.in_flight.is_guarded() {
                // Without a runtime it is dropped, and its guards give up.
                if let Some(runtime) = &self.runtime {
                    telemetry::event(Event::Rescued);
                    self.in_flight.set_detached();
                    self.tracker.detach(runtime, async move { drop(exchange.await) });
                }
            }
        }
    }
}

impl<F, R, E> fmt::Debug for ResponseFuture<F, R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
