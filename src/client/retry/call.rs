//! One logical call. Sends attempts as the policy decides, and reports the outcome.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower::retry::{Retry, future::ResponseFuture};
use tower_layer::Layer;
use tower_service::Service;

use super::super::report::Report;
use super::body::CloneBody;
use super::collect::IsLost;
use super::delivery::{CallOutcome, CallReport};
use super::policy::RetryPolicy;

/// Retries requests as a [`RetryPolicy`] decides, and reports the outcome. Every response has a
/// [`CallReport`] in its extensions, and a [`CallError`] distinguishes "outcome unknown" from "no
/// effect".
///
/// Put it inside of [`IdempotencyKeyLayer`](super::super::IdempotencyKeyLayer), so that all
/// attempts carry the same key. If you do not need the report, use `tower::retry::RetryLayer` with
/// the same policy.
///
/// The guide [calling others](crate::guide::calling_others#send-one-key-with-all-attempts) has a complete client.
///
/// # Response bodies
///
/// The layer judges a response by its head and passes the body on as a stream. If the body breaks
/// off later, the caller gets an error from the body, and the layer does not retry. With
/// [`collect_responses`](Self::collect_responses), the layer reads the body within a bound, and
/// treats a body that breaks off or stalls like a lost response.
///
/// # Example
///
/// ```
/// use std::io;
/// use http::{Request, Response};
/// use tower::{service_fn, ServiceBuilder, ServiceExt};
/// use tower_idempotency::client::{
///     CallError, CallLayer, CallOutcome, CallReport, IdempotencyKeyLayer, KeyPlacementError, ProviderProfile, RetryPolicy,
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let http = service_fn(|_: Request<String>| async { Err::<Response<String>, _>(io::Error::other("reset")) });
/// let policy = RetryPolicy::new(ProviderProfile::stripe()).with_max_attempts(2);
/// let client = ServiceBuilder::new()
///     .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()))
///     .layer(CallLayer::new(policy))
///     .service(http);
///
/// let charge = Request::post("/v1/charges").body(String::new()).unwrap();
/// match client.oneshot(charge).await {
///     Ok(response) => println!("sent {} times", response.extensions().get::<CallReport>().unwrap().attempts()),
///     Err(KeyPlacementError::Service(error)) => {
///         assert_eq!((error.attempts(), error.outcome()), (2, CallOutcome::Unknown));
///         assert_eq!(error.to_string(), "the HTTP call failed after 2 attempts; outcome unknown");
///     }
///     Err(_) => unreachable!("a random key is always accepted"),
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CallLayer {
    policy: RetryPolicy,
}

impl CallLayer {
    /// Creates a layer that retries as `policy` decides.
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

/// A client that retries requests and reports the outcome. [`CallLayer`] makes it.
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
        let (_, evidence) = this.policy.read(&result, Some(this.report));
        let (attempts, evidence) = this.report.sum(evidence);
        if let Some(outer) = this.outer {
            outer.adopt(this.report);
            outer.enter(evidence);
        }
        Poll::Ready(match result {
            Ok(mut response) => {
                let is_replay = this.policy.profile().is_replay(response.headers());
                let is_lost = response.extensions().get::<IsLost>().is_some();
                let outcome = if is_lost {
                    CallOutcome::without_body(evidence)
                } else {
                    CallOutcome::from(evidence.meaning)
                };
                let delivery = CallReport {
                    attempts,
                    is_replay,
                    outcome,
                };
                response.extensions_mut().insert(delivery);
                Ok(response)
            }
            Err(source) => {
                let outcome = match CallOutcome::without_body(evidence) {
                    // An inner layer reports a response, but this call returns an error. Therefore
                    // its caller sees no status.
                    CallOutcome::Responded => CallOutcome::Unknown,
                    outcome => outcome,
                };
                Err(CallError::new(source, attempts, outcome))
            }
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

/// The error of a call that got no response, or (with
/// [`collect_responses`](CallLayer::collect_responses)) no complete response.
#[derive(Debug)]
pub struct CallError<E> {
    source: E,
    attempts: u32,
    outcome: CallOutcome,
}

impl<E> CallError<E> {
    pub(super) const fn new(source: E, attempts: u32, outcome: CallOutcome) -> Self {
        Self {
            source,
            attempts,
            outcome,
        }
    }

    pub(super) fn map<T>(self, change: impl FnOnce(E) -> T) -> CallError<T> {
        CallError::new(change(self.source), self.attempts, self.outcome)
    }

    /// Returns the error of a client that did not become ready.
    const fn before(source: E) -> Self {
        Self {
            source,
            attempts: 0,
            outcome: CallOutcome::NotTaken,
        }
    }

    /// Returns how often this call sent the request. All attempts of an inner [`CallLayer`] count
    /// as one.
    #[must_use]
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Returns whether the call took effect, as far as this is known.
    ///
    /// The outcome is [`CallOutcome::Responded`] only if the head of a response settled the effect
    /// and its body was lost ([`CollectError::Body`](super::CollectError::Body)). A server that
    /// honours the key replays that response if the call is sent again under the same key. A
    /// [`OnceLayer`](super::super::OnceLayer) around this layer sends it again only with
    /// [`at_least_once`](super::super::OnceLayer::at_least_once) and
    /// [`assume_keys_honoured`](super::super::OnceLayer::assume_keys_honoured).
    #[must_use]
    pub const fn outcome(&self) -> CallOutcome {
        self.outcome
    }

    /// Returns the error of the last attempt.
    #[must_use]
    pub fn into_source(self) -> E {
        self.source
    }
}

impl<E> fmt::Display for CallError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.attempts {
            0 => f.write_str("the HTTP call failed before its first attempt")?,
            1 => f.write_str("the HTTP call failed after 1 attempt")?,
            attempts => write!(f, "the HTTP call failed after {attempts} attempts")?,
        }
        f.write_str(match self.outcome {
            CallOutcome::Responded => "; the server has processed it, but the response was lost",
            CallOutcome::NotTaken => "; no effect",
            CallOutcome::Unknown => "; outcome unknown",
        })
    }
}

impl<E: std::error::Error + 'static> std::error::Error for CallError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}
