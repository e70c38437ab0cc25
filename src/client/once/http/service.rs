//! The service: finds the key of a request, makes the call once, and returns its result.

use std::fmt;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::header::HOST;
use http::request::Parts;
use http::{Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::call::{HttpCall, Output};
use super::settings::Settings;
use crate::client::classes::ErrorClass;
use crate::client::once::failure::OnceError;
use crate::engine::{Job, Settled};
use crate::error::Error;
use crate::http::{Collected, Fingerprinting, HttpService, RebuildBody, Shortfall, collect};
use crate::protocol::{Fingerprint, KeyParser, Scope, StoredResponse};
use crate::store::Store;

/// A client that makes each logical request once. [`OnceLayer`](super::OnceLayer) makes this
/// client.
#[derive(Clone)]
pub struct OnceClient<S, St> {
    inner: S,
    store: St,
    settings: Arc<Settings>,
}

impl<S: fmt::Debug, St> fmt::Debug for OnceClient<S, St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnceClient")
            .field("inner", &self.inner)
            .field("profile", &self.settings.profile)
            .finish_non_exhaustive()
    }
}

impl<S, St> OnceClient<S, St> {
    pub(super) const fn new(inner: S, store: St, settings: Arc<Settings>) -> Self {
        Self { inner, store, settings }
    }
}

impl<S, St, B, R> Service<Request<B>> for OnceClient<S, St>
where
    St: Store + Clone,
    S: Service<Request<B>, Response = Response<R>, Error: Send, Future: Send> + Clone + Send + 'static,
    B: RebuildBody<Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
    R: RebuildBody<Error: Send> + Send + 'static,
{
    type Response = Response<R>;
    type Error = OnceError<Response<R>, S::Error>;
    type Future = OnceFuture<S::Future, R, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(OnceError::Failed)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let settings = &self.settings;
        let state = if settings.methods.contains(request.method()) {
            // Call the service that was polled ready and leave its clone behind; the clone is not
            // ready.
            let clone = self.inner.clone();
            let ready = std::mem::replace(&mut self.inner, clone);
            let call = make(ready, self.store.clone(), Arc::clone(settings), request);
            State::Guarded { future: Box::pin(call) }
        } else {
            State::Passed {
                is_safe: request.method().is_safe(),
                future: self.inner.call(request),
                settings: Arc::clone(settings),
            }
        };
        OnceFuture { state }
    }
}

type Outcomes<R, E> = Result<Response<R>, OnceError<Response<R>, E>>;

pin_project! {
    /// The future of [`OnceClient`].
    pub struct OnceFuture<F, R, E> {
        #[pin]
        state: State<F, R, E>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F, R, E> {
        Guarded { future: BoxFuture<'static, Outcomes<R, E>> },
        Passed { #[pin] future: F, settings: Arc<Settings>, is_safe: bool },
    }
}

impl<F, R, E: 'static> Future for OnceFuture<F, R, E>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Outcomes<R, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Guarded { future } => future.as_mut().poll(cx),
            StateProjection::Passed {
                future,
                settings,
                is_safe,
            } => future.poll(cx).map_err(|error| failed(settings, *is_safe, error)),
        }
    }
}

impl<F, R, E> fmt::Debug for OnceFuture<F, R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnceFuture").finish_non_exhaustive()
    }
}

/// The error of a request that the layer does not cover. Such a request carries no report, so the
/// layer cannot know whether the error belongs to a later hop. It trusts the class of the error
/// only after a safe method, which has no effect.
fn failed<R, E: 'static>(settings: &Settings, is_safe: bool, error: E) -> OnceError<Response<R>, E> {
    match settings.classes.of(&error, true) {
        ErrorClass::Final | ErrorClass::NotSent if is_safe => OnceError::Failed(error),
        _ => OnceError::Unknown(Some(error)),
    }
}

/// Makes a call once, or returns the recorded result if it was already made.
async fn make<S, St, B>(
    service: S,
    store: St,
    settings: Arc<Settings>,
    request: Request<B>,
) -> Outcomes<S::ResponseBody, S::Error>
where
    St: Store + Clone,
    S: HttpService<B> + Clone,
    B: RebuildBody<Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let (head, body) = request.into_parts();
    let (key, scope) = key_and_scope(&settings, &head).map_err(OnceError::NotRun)?;
    let body = read(&settings, body).await.map_err(OnceError::NotRun)?;
    let job = Job {
        store,
        key: settings.engine.space.call_key(scope.as_ref(), &key, &[]),
        fingerprint: fingerprint(&head, &body),
        settings: settings.engine.clone(),
        tracker: Arc::clone(&settings.tracker),
        leases: Arc::clone(&settings.leases),
    };
    let work = HttpCall {
        service,
        settings: Arc::clone(&settings),
        key,
        head,
        body,
        type_of_body: PhantomData,
    };
    match job.settle(work).await {
        Settled::Ran {
            output: Output::Response(response),
            recorded: Ok(()),
        } => Ok(response),
        Settled::Ran {
            output: Output::Response(response),
            recorded: Err(error),
        } => Err(OnceError::Unrecorded {
            output: Box::new(response),
            error,
        }),
        Settled::Ran {
            output: Output::Broken,
            recorded: Ok(()),
        } => Err(OnceError::NotStored),
        // No record shows the outcome, so another attempt may make the call again.
        Settled::Ran {
            output: Output::Broken | Output::Doubtful,
            ..
        } => Err(OnceError::Unknown(None)),
        Settled::Ran {
            output: Output::Failed(error),
            ..
        } => Err(OnceError::Failed(error)),
        Settled::Ran {
            output: Output::Lost(error),
            ..
        } => Err(OnceError::Unknown(Some(error))),
        Settled::Replay(response) => replay(&settings, &response),
        Settled::Refused(refused) => Err(OnceError::refused(refused)),
    }
}

/// Returns the key of a request, and its scope.
fn key_and_scope(settings: &Settings, head: &Parts) -> Result<(String, Option<Scope>), Error> {
    const NO_KEY: Error = Error::configuration(
        "the request has no idempotency key; set one, or put an IdempotencyKeyLayer with derived keys around the OnceLayer",
    );
    const TWO_KEYS: Error = Error::configuration("the request has more than one idempotency key; send one");
    const BAD_KEY: Error = Error::configuration("the request's idempotency key cannot be used");
    const NO_SCOPE: Error =
        Error::configuration("the function of `with_scope` returned no scope for the request, and the layer needs one");
    let key = match &settings.key {
        Some(key) => key(head).filter(|key| !key.is_empty()).ok_or(NO_KEY)?,
        None => {
            let mut values = head.headers.get_all(&settings.profile.header).iter();
            let value = values.next().ok_or(NO_KEY)?;
            if values.next().is_some() {
                return Err(TWO_KEYS);
            }
            let key = KeyParser::default().parse(value.as_bytes());
            key.map_err(|error| BAD_KEY.with_source(error))?.as_str().to_owned()
        }
    };
    match &settings.scope {
        None => Ok((key, None)),
        Some(scope) => Ok((key, Some(scope(head).ok_or(NO_SCOPE)?))),
    }
}

/// Reads the body of a request before the call.
async fn read<B>(settings: &Settings, body: B) -> Result<Collected, Error>
where
    B: RebuildBody<Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
{
    const TOO_LONG: Error = Error::configuration(
        "the request's body is longer than the limit of the OnceLayer; raise the limit with `with_body_limit`",
    );
    const BROKEN: Error =
        Error::configuration("the request's body broke off while the OnceLayer read it; nothing was sent");
    const SHORT: Error = Error::configuration(
        "the request's body ended before the length that it declares; nothing was sent, so send the request again with its \
         whole body",
    );
    const TOO_SLOW: Error = Error::configuration(
        "the request's body took longer than the OnceLayer allows; raise the limit with `with_body_timeout`",
    );
    let reading = collect(body, settings.request_limit, settings.body_timeout);
    reading.await.map_err(|shortfall| match shortfall {
        Shortfall::TooLarge(_) => TOO_LONG,
        Shortfall::TooSlow(_) => TOO_SLOW,
        Shortfall::Broken(error) => BROKEN.with_source(error),
        Shortfall::Short(_) => SHORT,
    })
}

/// Returns the fingerprint of a call: its target, its method and its body (I4). Credentials are
/// left out, because they may change between attempts.
fn fingerprint(head: &Parts, body: &Collected) -> Fingerprint {
    let request = Fingerprinting::default().of_call(head, &body.bytes);
    let scheme = head.uri.scheme_str().unwrap_or_default();
    let host = head.uri.host().or_else(|| head.headers.get(HOST)?.to_str().ok());
    let port = head.uri.port_u16().or(match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    });
    let host = host.unwrap_or_default().to_ascii_lowercase();
    let origin = [
        scheme.as_bytes(),
        host.as_bytes(),
        &port.unwrap_or_default().to_be_bytes(),
    ];
    Fingerprint::of(Scope::of([Scope::of(origin).as_bytes(), request.digest()]).as_bytes())
}

/// Returns the stored response of a call that was already made.
fn replay<R: RebuildBody, E>(settings: &Settings, response: &StoredResponse) -> Outcomes<R, E> {
    let replayed = settings.response_headers.replay(response, true);
    replayed.map_err(|_| OnceError::Unreadable("the stored response is not an HTTP response".into()))
}
