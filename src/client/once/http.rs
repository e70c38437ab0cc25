//! One-time calls over HTTP.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::FutureExt;
use http::header::HOST;
use http::request::Parts;
use http::{Method, Request, Response};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::super::classes::{ErrorClass, ErrorClasses};
use super::super::keys::{Meaning, Profile};
use super::failure::OnceError;
use super::terms::term_setters;
use crate::error::{Error, ErrorKind};
use crate::http::{collect, is_stream, AnswerHeaders, Collected, Fingerprinting, RebuildBody, Shortfall};
use crate::job::{Attempt, Drain, Ended, Found, Job, Settled, Terms, Verdict, Work};
use crate::protocol::{Answer, Fingerprint, IfLost, KeyParser, Outcome, Scope};
use crate::store::Store;

type KeyFn = Arc<dyn Fn(&Parts) -> Option<String> + Send + Sync>;
type ScopeFn = Arc<dyn Fn(&Parts) -> Option<Scope> + Send + Sync>;
type AttemptFn = Arc<dyn Fn(&mut Parts, &Attempt) + Send + Sync>;
type CheckFn = Arc<dyn Fn(LostCall) -> BoxFuture<'static, Found<Response<Bytes>>> + Send + Sync>;

/// Makes each logical request of a client once, across tasks, processes and crashes, as far as the store reaches: the answer is
/// recorded, and whoever makes the same call again is given it. It is the [`IdempotencyLayer`](crate::IdempotencyLayer) turned
/// around, for a third party that has no idempotency of its own.
///
/// It needs a key that is the same when the call is repeated after a crash, so the key comes from outside: by the header field of the
/// [`Profile`], set by the caller or by an [`IdempotencyKeyLayer`](super::super::IdempotencyKeyLayer) around this layer with a derived
/// key, or [from the request](Self::with_key). A request without one is not sent.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use http_body_util::Full;
/// use tower::{service_fn, ServiceBuilder, ServiceExt};
/// use tower_idempotency::client::{OnceLayer, Profile};
/// use tower_idempotency::MemoryStore;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let http = service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, Infallible>(Response::new(Full::from("sent"))) });
/// let client = ServiceBuilder::new()
///     .layer(OnceLayer::new(MemoryStore::new(), Profile::draft()))
///     .service(http);
/// let mail = || Request::post("/mails").header("idempotency-key", "welcome-7").body(Full::from("hello")).unwrap();
/// client.clone().oneshot(mail()).await.unwrap();
/// let again = client.oneshot(mail()).await.unwrap();
/// assert_eq!(again.headers()["idempotent-replayed"], "true");
/// # }
/// ```
///
/// # What it promises
///
/// At most one call, by default: when an attempt is lost, the outcome of its key is [`OnceError::Unknown`] until it is resolved.
/// [`at_least_once`](Self::at_least_once) sends it again, [`with_recovery`](Self::with_recovery) asks first.
///
/// What an answer does to the key follows from what it [means](Profile::meaning): dealt with, it is kept, and so is a 4xx that comes
/// of the request itself; one of a gatekeeper (400, 401, 403, 404, 413, ...), a 425 or a 429 passes through and frees the key; after a 5xx, a 408
/// or an error of the client the attempt counts as lost, unless the [error is known](Self::with_errors) to come before the sending.
///
/// # Defaults
///
/// | setting | default |
/// |---|---|
/// | [methods](Self::with_methods) | POST and PATCH; everything else passes untouched |
/// | [lease](Self::with_lease) | 30 s, renewed at a third |
/// | [retention](Self::with_retention) | 24 h from the completion |
/// | [wait](Self::with_wait) for the same call elsewhere | 30 s |
/// | [attempts](Self::with_max_attempts) | 5 |
/// | [bounds](Self::with_limits) of the request's and the answer's body | 2 MiB each |
/// | what is compared | method, target and body; not `Authorization`, which is ours |
#[derive(Clone)]
pub struct OnceLayer<St> {
    store: St,
    settings: Arc<Settings>,
}

#[derive(Clone)]
struct Settings {
    profile: Profile,
    terms: Terms,
    methods: Vec<Method>,
    key: Option<KeyFn>,
    scope: Option<ScopeFn>,
    send_key: bool,
    on_attempt: Option<AttemptFn>,
    if_lost: IfLost,
    check: Option<CheckFn>,
    classes: ErrorClasses,
    request_limit: usize,
    answer_limit: usize,
    answers: AnswerHeaders,
}

/// A call that was lost, to be looked into. Its `Debug` form hides key and headers.
#[non_exhaustive]
pub struct LostCall {
    /// The key of the call.
    pub key: String,
    /// The attempt that asks. Raise its [fence](Attempt::fence) at the third party before you look there.
    pub attempt: Attempt,
    /// The head of the request.
    pub head: Parts,
}

impl<St> OnceLayer<St> {
    /// Records the answers of a server of this profile in `store`.
    #[must_use]
    pub fn new(store: St, profile: Profile) -> Self {
        let settings = Settings {
            profile,
            terms: Terms::default(),
            methods: vec![Method::POST, Method::PATCH],
            key: None,
            scope: None,
            send_key: true,
            on_attempt: None,
            if_lost: IfLost::Refuse,
            check: None,
            classes: ErrorClasses::default(),
            request_limit: 2 << 20,
            answer_limit: 2 << 20,
            answers: AnswerHeaders::default(),
        };
        Self {
            store,
            settings: Arc::new(settings),
        }
    }

    term_setters!();

    fn terms(&mut self) -> &mut Terms {
        &mut self.settings().terms
    }

    fn settings(&mut self) -> &mut Settings {
        Arc::make_mut(&mut self.settings)
    }

    /// Waits for what goes on without its caller: before the process ends, stop calling, then wait.
    #[must_use]
    pub fn drain(&self) -> Drain {
        Drain::new(&self.settings.terms.tracker)
    }

    /// The methods whose requests are made once; POST and PATCH by default.
    #[must_use]
    pub fn with_methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.settings().methods = methods.into_iter().collect();
        self
    }

    /// Takes the key from the request by a function, instead of from the profile's header field. `None` or an empty key: the request is
    /// not sent.
    #[must_use]
    pub fn with_key(mut self, key: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        self.settings().key = Some(Arc::new(key));
        self
    }

    /// Whose key it is; nobody's by default. Needed wherever two callers could send the same key. `None`: the request is not sent.
    #[must_use]
    pub fn with_scope(mut self, scope: impl Fn(&Parts) -> Option<Scope> + Send + Sync + 'static) -> Self {
        self.settings().scope = Some(Arc::new(scope));
        self
    }

    /// Takes the profile's header field off before the request is sent; it stays by default.
    #[must_use]
    pub fn without_sending_key(mut self) -> Self {
        self.settings().send_key = false;
        self
    }

    /// Changes the head of a request before it is sent: puts the fence into it, or an [id](Attempt::id), for a third party that heeds
    /// them. The attempt is an extension of the request, too, and of the answer that it got.
    #[must_use]
    pub fn on_attempt(mut self, change: impl Fn(&mut Parts, &Attempt) + Send + Sync + 'static) -> Self {
        self.settings().on_attempt = Some(Arc::new(change));
        self
    }

    /// Sends a request again whose attempt was lost, instead of leaving it unknown. [Without its key](Self::without_sending_key),
    /// an answer to it that is no success leaves the outcome unknown: it may say that the lost attempt was there before.
    #[must_use]
    pub fn at_least_once(mut self) -> Self {
        self.settings().if_lost = IfLost::Execute;
        self
    }

    /// Asks what became of an attempt that was lost, before the request is sent again.
    ///
    /// One effect is promised where the check shuts the lost attempt out, by raising the [fence](Attempt::fence) at the third party
    /// before it looks, or where that attempt's request has settled before the check ([`with_settling`](Self::with_settling) narrows
    /// the gap). A request that arrives after the check has an effect of its own.
    #[must_use]
    pub fn with_recovery<F>(mut self, check: impl Fn(LostCall) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Found<Response<Bytes>>> + Send + 'static,
    {
        let settings = self.settings();
        settings.if_lost = IfLost::Recover;
        settings.check = Some(Arc::new(move |lost| check(lost).boxed()));
        self
    }

    /// Tells what an error of the client's says about the effect; without it, every error may have taken effect. For several types,
    /// call it several times.
    #[must_use]
    pub fn with_errors<E: 'static>(mut self, classify: impl Fn(&E) -> ErrorClass + Send + Sync + 'static) -> Self {
        self.settings().classes.add(classify);
        self
    }

    /// The bounds of the request's body, beyond which it is not sent, and of the answer's, beyond which it is given and not kept; in
    /// bytes, 2 MiB each by default.
    #[must_use]
    pub fn with_limits(mut self, request: usize, answer: usize) -> Self {
        let settings = self.settings();
        (settings.request_limit, settings.answer_limit) = (request, answer);
        self
    }
}

impl<St> fmt::Debug for OnceLayer<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnceLayer")
            .field("profile", &self.settings.profile)
            .field("terms", &self.settings.terms)
            .field("methods", &self.settings.methods)
            .field("if_lost", &self.settings.if_lost)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LostCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LostCall")
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

impl<S, St: Clone> Layer<S> for OnceLayer<St> {
    type Service = OnceClient<S, St>;

    fn layer(&self, inner: S) -> OnceClient<S, St> {
        OnceClient {
            inner,
            layer: self.clone(),
        }
    }
}

/// A client whose requests are made once; made by [`OnceLayer`].
#[derive(Clone, Debug)]
pub struct OnceClient<S, St> {
    inner: S,
    layer: OnceLayer<St>,
}

impl<S, St, B, R> Service<Request<B>> for OnceClient<S, St>
where
    St: Store + Clone,
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: RebuildBody + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    R: RebuildBody + Send + 'static,
    R::Error: Send,
{
    type Response = Response<R>;
    type Error = OnceError<Response<R>, S::Error>;
    type Future = OnceFuture<S::Future, R, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(OnceError::Failed)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let settings = &self.layer.settings;
        let state = if settings.methods.contains(request.method()) {
            // The service that was polled ready is the one that is called.
            let clone = self.inner.clone();
            let ready = std::mem::replace(&mut self.inner, clone);
            let call = make(ready, self.layer.store.clone(), Arc::clone(settings), request);
            State::Guarded { future: Box::pin(call) }
        } else {
            State::Passed {
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
        Passed { #[pin] future: F, settings: Arc<Settings> },
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
            StateProjection::Passed { future, settings } => future.poll(cx).map_err(|error| failed(settings, error)),
        }
    }
}

impl<F, R, E> fmt::Debug for OnceFuture<F, R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnceFuture").finish_non_exhaustive()
    }
}

fn failed<R, E: 'static>(settings: &Settings, error: E) -> OnceError<Response<R>, E> {
    match settings.classes.of(&error) {
        ErrorClass::Final | ErrorClass::NotSent => OnceError::Failed(error),
        ErrorClass::Lost => OnceError::Unknown(Some(error)),
    }
}

/// Makes a call once, or gives what it gave.
async fn make<S, St, B, R>(service: S, store: St, settings: Arc<Settings>, request: Request<B>) -> Outcomes<R, S::Error>
where
    St: Store + Clone,
    S: Service<Request<B>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: RebuildBody + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    R: RebuildBody + Send + 'static,
    R::Error: Send,
{
    let (head, body) = request.into_parts();
    let (key, scope) = name(&settings, &head).map_err(OnceError::NotRun)?;
    let body = read(body, settings.request_limit).await.map_err(OnceError::NotRun)?;
    let job = Job {
        store,
        key: settings.terms.space.call_key(scope.as_ref(), &key, None),
        fingerprint: fingerprint(&head, &body),
        if_lost: settings.if_lost,
        terms: settings.terms.clone(),
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
            given: Given::Answer(given),
            recorded: Ok(()),
        } => Ok(given),
        Settled::Ran {
            given: Given::Answer(given),
            recorded: Err(error),
        } => Err(OnceError::Unrecorded {
            given: Box::new(given),
            error,
        }),
        Settled::Ran {
            given: Given::Broken, ..
        } => Err(OnceError::NotKept),
        Settled::Ran {
            given: Given::Doubtful, ..
        } => Err(OnceError::Unknown(None)),
        Settled::Ran {
            given: Given::Error(error, attempt),
            ..
        } => Err(match failed(&settings, error) {
            // Of an attempt that was lost before this one, and not asked about, it says nothing.
            OnceError::Failed(error) if attempt > 1 && settings.if_lost == IfLost::Execute => {
                OnceError::Unknown(Some(error))
            }
            failed => failed,
        }),
        Settled::Replay(answer) => replay(&settings, &answer),
        Settled::Refused(refused) => Err(OnceError::refused(refused)),
    }
}

/// The key of a request, and whose it is.
fn name(settings: &Settings, head: &Parts) -> Result<(String, Option<Scope>), Error> {
    const NO_KEY: Error = Error::new(
        ErrorKind::Configuration,
        "the request has no idempotency key to be made once by; set one, or put an IdempotencyKeyLayer with derived keys around the OnceLayer",
    );
    const TWO_KEYS: Error = Error::new(
        ErrorKind::Configuration,
        "the request has more than one idempotency key",
    );
    const BAD_KEY: Error = Error::new(ErrorKind::Configuration, "the request's idempotency key cannot be used");
    const NO_SCOPE: Error = Error::new(
        ErrorKind::Configuration,
        "the request has no scope, and the layer asks for one",
    );
    let key = match &settings.key {
        Some(key) => key(head).filter(|key| !key.is_empty()).ok_or(NO_KEY)?,
        None => {
            let mut lines = head.headers.get_all(&settings.profile.header).iter();
            let value = lines.next().ok_or(NO_KEY)?;
            if lines.next().is_some() {
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

async fn read<B>(body: B, limit: usize) -> Result<Collected, Error>
where
    B: RebuildBody,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    const TOO_LONG: Error = Error::new(
        ErrorKind::Configuration,
        "the request's body is longer than the bound of the OnceLayer; raise it by `with_limits`",
    );
    const BROKEN: Error = Error::new(
        ErrorKind::Configuration,
        "the request's body broke off while it was read",
    );
    collect(body, limit).await.map_err(|shortfall| match shortfall {
        Shortfall::TooLarge(_) => TOO_LONG,
        Shortfall::Broken(error) => BROKEN.with_source(error),
    })
}

/// Who is asked for what. Who we are is no part of it: credentials change between attempts.
fn fingerprint(head: &Parts, body: &Collected) -> Fingerprint {
    let request = Fingerprinting::default().of(head, &body.bytes, true);
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

fn replay<R: RebuildBody, E>(settings: &Settings, answer: &Answer) -> Outcomes<R, E> {
    let replayed = settings.answers.replay(answer, true);
    replayed.map_err(|_| OnceError::Unreadable("the kept answer is not that of an HTTP request".into()))
}

struct HttpCall<S, B> {
    service: S,
    settings: Arc<Settings>,
    key: String,
    head: Parts,
    body: Collected,
    type_of_body: PhantomData<fn(B)>,
}

enum Given<R, E> {
    Answer(Response<R>),
    /// The answer broke off while it was read.
    Broken,
    /// An answer that leaves open what became of an attempt that was lost before.
    Doubtful,
    /// And the number of the attempt.
    Error(E, u32),
}

impl<S, B, R> Work for HttpCall<S, B>
where
    S: Service<Request<B>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: RebuildBody + Send + 'static,
    R: RebuildBody + Send + 'static,
    R::Error: Send,
{
    type Given = Given<R, S::Error>;

    async fn ask(&mut self, attempt: &Attempt) -> Found<Ended<Self::Given>> {
        let HttpCall {
            settings, key, head, ..
        } = &*self;
        let Some(check) = &settings.check else {
            return Found::Unknown;
        };
        let lost = LostCall {
            key: key.clone(),
            attempt: attempt.clone(),
            head: head.clone(),
        };
        let asked = check(lost);
        match asked.await {
            Found::Happened(response) => {
                let (head, bytes) = response.into_parts();
                Found::Happened(self.settings.keep(head, Collected { bytes, trailers: None }))
            }
            Found::NotHappened => Found::NotHappened,
            Found::Unknown => Found::Unknown,
        }
    }

    async fn run(self, attempt: Attempt) -> Ended<Self::Given> {
        let HttpCall {
            mut service,
            settings,
            mut head,
            body,
            ..
        } = self;
        if !settings.send_key {
            head.headers.remove(&settings.profile.header);
        }
        if let Some(change) = &settings.on_attempt {
            change(&mut head, &attempt);
        }
        head.extensions.insert(attempt.clone());
        let number = attempt.number();
        match service.call(Request::from_parts(head, body.rebuild())).await {
            // It may say no more than that the lost attempt was there before.
            Ok(response) if number > 1 && settings.is_doubtful(&response) => Ended {
                given: Given::Doubtful,
                verdict: Verdict::GiveUp,
            },
            Ok(mut response) => {
                response.extensions_mut().insert(attempt);
                settings.answered(response).await
            }
            Err(error) => Ended {
                verdict: match settings.classes.of(&error) {
                    ErrorClass::Final | ErrorClass::NotSent => Verdict::Release,
                    ErrorClass::Lost => Verdict::GiveUp,
                },
                given: Given::Error(error, number),
            },
        }
    }
}

impl Settings {
    /// Reads an answer, and decides what becomes of the key.
    async fn answered<R: RebuildBody, E>(&self, response: Response<R>) -> Ended<Given<R, E>> {
        let verdict = match self.meaning(&response) {
            Meaning::Answered { settles: true } => Verdict::Keep(Outcome::Tombstone),
            Meaning::Answered { settles: false } | Meaning::NotTaken => Verdict::Release,
            Meaning::Unknown => Verdict::GiveUp,
        };
        let (head, body) = response.into_parts();
        if !matches!(verdict, Verdict::Keep(_)) || is_stream(&head) {
            let given = Given::Answer(Response::from_parts(head, body));
            return Ended { given, verdict };
        }
        let given = match collect(body, self.answer_limit).await {
            Ok(body) => return self.keep(head, body),
            Err(Shortfall::TooLarge(body)) => Given::Answer(Response::from_parts(head, R::rebuild(body))),
            Err(Shortfall::Broken(_)) => Given::Broken,
        };
        Ended { given, verdict }
    }

    /// Whether an answer leaves open what became of an attempt that was lost before, at a third party that knows nothing of keys.
    fn is_doubtful<R>(&self, response: &Response<R>) -> bool {
        let is_asked_blindly = self.if_lost == IfLost::Execute && !self.send_key;
        is_asked_blindly && !response.status().is_success() && !self.profile.is_replay(response.headers())
    }

    /// What an answer means, over all the attempts that were made for it.
    fn meaning<R>(&self, response: &Response<R>) -> Meaning {
        #[cfg(feature = "retry")]
        if let Some(delivery) = response.extensions().get::<super::super::retry::Delivery>() {
            if delivery.outcome() == super::super::retry::CallOutcome::Unknown {
                return Meaning::Unknown;
            }
        }
        self.profile.meaning(response.status(), response.headers())
    }

    fn keep<R: RebuildBody, E>(&self, head: http::response::Parts, body: Collected) -> Ended<Given<R, E>> {
        let answer = self.answers.store(&head, &body);
        Ended {
            given: Given::Answer(Response::from_parts(head, body.rebuild())),
            verdict: Verdict::Keep(Outcome::Kept(answer)),
        }
    }
}
