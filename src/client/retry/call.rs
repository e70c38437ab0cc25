//! One logical call: repeated as the policy says, and reported.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{ready, Context, Poll};

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower::retry::{future::ResponseFuture, Retry};
use tower_layer::Layer;
use tower_service::Service;

use super::super::report::Report;
use super::body::CloneBody;
use super::delivery::{CallOutcome, Delivery};
use super::policy::RetryPolicy;

/// Repeats requests as a [`RetryPolicy`] says, and tells its caller what became of them: a [`Delivery`] among the extensions of
/// every response, or a [`CallError`], which tells "unknown" from "not sent".
///
/// It goes within [`IdempotencyKeyLayer`](super::super::IdempotencyKeyLayer). Who does not want to know takes
/// `tower::retry::RetryLayer` with the same policy.
///
/// ```
/// use std::io;
/// use http::{Request, Response};
/// use tower::{service_fn, ServiceBuilder, ServiceExt};
/// use tower_idempotency::client::{
///     CallError, CallLayer, CallOutcome, Delivery, IdempotencyKeyLayer, KeyedError, Profile, RetryPolicy,
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let http = service_fn(|_: Request<String>| async { Err::<Response<String>, _>(io::Error::other("reset")) });
/// let policy = RetryPolicy::new(Profile::stripe()).with_max_attempts(2);
/// let client = ServiceBuilder::new()
///     .layer(IdempotencyKeyLayer::new(Profile::stripe()))
///     .layer(CallLayer::new(policy))
///     .service(http);
///
/// let charge = Request::post("/v1/charges").body(String::new()).unwrap();
/// match client.oneshot(charge).await {
///     Ok(response) => println!("sent {} times", response.extensions().get::<Delivery>().unwrap().attempts()),
///     Err(KeyedError::Service(error)) => {
///         assert_eq!((error.attempts(), error.outcome()), (2, CallOutcome::Unknown));
///     }
///     Err(_) => unreachable!("a random key is always taken"),
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CallLayer {
    policy: RetryPolicy,
}

impl CallLayer {
    /// Repeats as `policy` says.
    #[must_use]
    pub const fn new(policy: RetryPolicy) -> Self {
        Self { policy }
    }
}

impl<S> Layer<S> for CallLayer {
    type Service = Call<S>;

    fn layer(&self, inner: S) -> Call<S> {
        Call {
            retry: Retry::new(self.policy.clone(), inner),
            policy: self.policy.clone(),
        }
    }
}

/// A client that repeats what it may and reports what became of it; made by [`CallLayer`].
#[derive(Clone, Debug)]
pub struct Call<S> {
    retry: Retry<RetryPolicy, S>,
    policy: RetryPolicy,
}

impl<S, B, R> Service<Request<B>> for Call<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    S::Error: 'static,
    B: CloneBody,
{
    type Response = Response<R>;
    type Error = CallError<S::Error>;
    type Future = CallFuture<ResponseFuture<RetryPolicy, S, Request<B>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.retry.poll_ready(cx).map_err(CallError::before)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // Inner layers report to this layer, and this layer reports to the layer around it.
        let outer = request.extensions_mut().remove::<Report>();
        let report = Report::of::<S>(outer.as_ref());
        request.extensions_mut().insert(report.clone());
        if let Some(outer) = &outer {
            outer.begin();
        }
        CallFuture {
            attempts: self.retry.call(request),
            report,
            outer,
            policy: self.policy.clone(),
        }
    }
}

pin_project! {
    /// The future of [`Call`].
    pub struct CallFuture<F> {
        #[pin]
        attempts: F,
        report: Report,
        outer: Option<Report>,
        policy: RetryPolicy,
    }
}

impl<F, R, E> Future for CallFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: 'static,
{
    type Output = Result<Response<R>, CallError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.attempts.poll(cx));
        let (_, meaning) = this.policy.read(&result, Some(this.report));
        let (attempts, meaning) = this.report.sum(meaning);
        if let Some(outer) = this.outer {
            outer.adopt(this.report);
            outer.enter(meaning);
        }
        let outcome = CallOutcome::from(meaning);
        Poll::Ready(match result {
            Ok(mut response) => {
                let is_replay = this.policy.profile().is_replay(response.headers());
                let delivery = Delivery {
                    attempts,
                    is_replay,
                    outcome,
                };
                response.extensions_mut().insert(delivery);
                Ok(response)
            }
            Err(source) => Err(CallError {
                source,
                attempts,
                // An earlier attempt had a response, which the caller never sees.
                outcome: match outcome {
                    CallOutcome::Answered => CallOutcome::Unknown,
                    outcome => outcome,
                },
            }),
        })
    }
}

impl<F> fmt::Debug for CallFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallFuture")
            .field("report", &self.report)
            .finish_non_exhaustive()
    }
}

/// A call that got no answer.
#[derive(Debug)]
pub struct CallError<E> {
    source: E,
    attempts: u32,
    outcome: CallOutcome,
}

impl<E> CallError<E> {
    /// The client was not ready.
    const fn before(source: E) -> Self {
        Self {
            source,
            attempts: 0,
            outcome: CallOutcome::NotTaken,
        }
    }

    /// Returns how often this call sent the request. All attempts of another [`CallLayer`] further in count as one.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Returns the knowledge about the effect; never [`CallOutcome::Answered`].
    #[must_use]
    pub const fn outcome(&self) -> CallOutcome {
        self.outcome
    }

    /// The error of the last attempt.
    #[must_use]
    pub fn into_source(self) -> E {
        self.source
    }
}

impl<E> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.outcome {
            CallOutcome::NotTaken => "the call had no effect: the request could not be sent",
            _ => "the call got no answer: whether it took effect is not known",
        })
    }
}

impl<E: std::error::Error + 'static> std::error::Error for CallError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}
