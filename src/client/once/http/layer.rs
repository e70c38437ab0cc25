//! The layer and its settings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http::request::Parts;
use http::{Method, Response};
use tower_layer::Layer;

use super::service::OnceClient;
use super::settings::{LostCall, Settings};
use crate::client::classes::{ErrorClass, ErrorClasses};
use crate::client::keys::ProviderProfile;
use crate::client::once::setters::shared_setters;
use crate::engine::{Attempt, Drain, EngineSettings, OnLost, Recovered};
use crate::http::ResponseHeaders;
use crate::protocol::{IfLost, Scope};

/// Makes each logical request of a client once, across all tasks, processes and crashes that share
/// the store. The layer records the response, and returns it to every later caller of the same
/// call. It is the client-side counterpart of [`IdempotencyLayer`](crate::IdempotencyLayer), for a
/// third party without idempotency.
///
/// The key of a call must be the same after a crash. So the caller sets it in the header field of
/// the [`ProviderProfile`], or an [`IdempotencyKeyLayer`](crate::client::IdempotencyKeyLayer)
/// around this layer derives it, or a function [reads it from the request](Self::with_key). The
/// layer does not send a request without a key.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use http_body_util::Full;
/// use tower::{service_fn, ServiceBuilder, ServiceExt};
/// use tower_idempotency::client::{OnceLayer, ProviderProfile};
/// use tower_idempotency::MemoryStore;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let http = service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, Infallible>(Response::new(Full::from("sent"))) });
/// let client = ServiceBuilder::new()
///     .layer(OnceLayer::new(MemoryStore::new(), ProviderProfile::draft()))
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
/// At most one call within the retention, by default. When an attempt is lost, its own caller gets
/// the response, if there is one, or [`OnceError::Unknown`](crate::client::OnceError::Unknown).
/// Every later call with its key gets `OnceError::Unknown`, until the retention is over. The next
/// call after that is made. [`at_least_once`](Self::at_least_once) sends the request again.
/// [`with_recovery`](Self::with_recovery) calls a check before that.
///
/// The effect of a response on the key follows from its [meaning](ProviderProfile::meaning):
///
/// | the response | the key |
/// |---|---|
/// | a replay of a 307, a 308, a 501 or any 4xx but 408, 425 and 429 | the response is stored |
/// | 2xx, 3xx but 307 and 308, 402, 409 (unless the profile reads it as in flight), 410, 412, 422, also as a replay | the response is stored |
/// | 425 and 429, also as a replay, and the statuses of a server or a gateway that did nothing: 307, 308, 400, 401, 403 to 407, 411, 413 to 417, 421, 423, 426, 428, 431, 451 | free: the caller gets the response, and the next call is made |
/// | any other response: 408, 499 or 5xx | the attempt counts as lost |
/// | an error of the client | the attempt counts as lost, unless the error is [known](Self::with_errors) to come before the sending |
///
/// The layer reads the body of a response before it stores the response. If the body breaks off, or
/// ends before its declared length, the caller of this attempt and later callers get
/// [`OnceError::NotStored`](crate::client::OnceError::NotStored), because the head shows that the
/// call was made. If the store cannot record that, the caller gets `Unknown`. The next paragraph has
/// an exception. A body over the limit of bytes or time goes
/// to its caller as a stream, and later callers get `NotStored`. A response without a declared
/// length and without chunks ends with its connection, so the layer cannot see that it broke off
/// (RFC 9112 section 8). The same holds over HTTP/2 for a response without a declared length whose
/// server resets the stream with `NO_ERROR`.
///
/// A third party that honours keys ([`assume_keys_honoured`](Self::assume_keys_honoured)) replays a
/// response that broke off. So the attempt then counts as lost, and
/// [`at_least_once`](Self::at_least_once) sends the request again under its key. A `CallLayer` with
/// `collect_responses` inside of this layer sends it again within the call. The third party must
/// still remember the key then, so give this layer a [retention](Self::with_retention) that is well
/// below the third party's; otherwise a call that is known to be made is made again.
///
/// Only a response to the request itself frees the key. If the client followed a redirect, or may
/// have followed one, the layer stores a success or a redirect other than 307 and 308, and counts
/// everything else as lost.
///
/// # Defaults
///
/// | setting | default |
/// |---|---|
/// | [methods](Self::with_methods) | POST and PATCH; other requests pass unchanged |
/// | [lease](Self::with_lease) | 30 s, renewed at a third |
/// | [retention](Self::with_retention) | 24 h from the completion |
/// | [wait](Self::with_wait) for the same call elsewhere | 30 s |
/// | [attempts](Self::with_max_attempts) | 5 |
/// | longest [request body](Self::with_body_limit) and [response body](Self::with_response_limit) | 2 MiB each |
/// | [time for the request's body](Self::with_body_timeout), [for the response's](Self::with_response_timeout) | 30 s, 10 s |
/// | compared parts of a request | method, target and body; not `Authorization`, because credentials may change between attempts |
#[derive(Clone)]
pub struct OnceLayer<St> {
    store: St,
    settings: Arc<Settings>,
}

impl<St> OnceLayer<St> {
    /// Creates a layer that records the responses of a server of this profile in `store`.
    #[must_use]
    pub fn new(store: St, profile: ProviderProfile) -> Self {
        let settings = Settings {
            profile,
            engine: EngineSettings::default(),
            tracker: Arc::default(),
            leases: Arc::default(),
            methods: vec![Method::POST, Method::PATCH],
            key: None,
            scope: None,
            send_key: true,
            keys_are_honoured: false,
            on_attempt: None,
            check: None,
            classes: ErrorClasses::default(),
            request_limit: 2 << 20,
            response_limit: 2 << 20,
            body_timeout: Duration::from_secs(30),
            response_timeout: Duration::from_secs(10),
            response_headers: ResponseHeaders::default(),
        };
        Self {
            store,
            settings: Arc::new(settings),
        }
    }

    shared_setters! {
        /// Sends the request of a lost attempt again, instead of leaving its outcome unknown. If the
        /// request goes out [without its key](Self::without_sending_key), a response other than a
        /// success leaves the outcome unknown, because it may only mean that the lost attempt arrived
        /// before.
        at_least_once;

        /// Sets what happens after a lost attempt. Default: [`OnLost::Refuse`]. Of this setter,
        /// [`at_least_once`](Self::at_least_once) and [`with_recovery`](Self::with_recovery), the last
        /// call counts.
        on_lost;
    }

    fn engine(&mut self) -> &mut EngineSettings {
        &mut self.settings().engine
    }

    fn settings(&mut self) -> &mut Settings {
        Arc::make_mut(&mut self.settings)
    }

    /// Returns a drain that waits for the layer's calls, also if they continue after their callers
    /// have left. Before the process ends, stop calling, then wait.
    #[must_use]
    pub fn drain(&self) -> Drain {
        Drain::new(&self.settings.tracker)
    }

    /// Sets how many calls may continue in this process after their callers have left. At this
    /// limit, every call fails with [`OnceError::NotRun`](crate::client::OnceError::NotRun) and
    /// [`Overloaded`](crate::ErrorKind::Overloaded), even if its response is stored already. At
    /// least 1. Default: 16,384.
    #[must_use]
    pub fn with_max_detached(mut self, executions: usize) -> Self {
        self.engine().set_max_detached(executions);
        self
    }

    /// Sets the methods whose requests are made once. Default: POST and PATCH.
    #[must_use]
    pub fn with_methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.settings().methods = methods.into_iter().collect();
        self
    }

    /// Sets a function that reads the key from the request. Default: the key is in the profile's
    /// header field. If the function returns `None` or an empty key, the request is not sent.
    #[must_use]
    pub fn with_key(mut self, key: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        self.settings().key = Some(Arc::new(key));
        self
    }

    /// Sets the scope of a key, such as the caller that owns it. Default: no scope. Set a scope if
    /// two callers can send the same key. If the function returns `None`, the request is not sent.
    #[must_use]
    pub fn with_scope(mut self, scope: impl Fn(&Parts) -> Option<Scope> + Send + Sync + 'static) -> Self {
        self.settings().scope = Some(Arc::new(scope));
        self
    }

    /// Removes the profile's header field from a request before it is sent. Default: the field
    /// stays.
    #[must_use]
    pub fn without_sending_key(mut self) -> Self {
        self.settings().send_key = false;
        self
    }

    /// States that the third party deduplicates requests by their key, so that a `RetryPolicy`
    /// inside this layer may repeat a request that may be lost. By default the policy repeats a
    /// request only if the server provably did not take it, that is, after an error that is
    /// [known](Self::with_errors) to come before the sending, a 425 or a 429.
    ///
    /// No [`ProviderProfile`] implies this. A profile describes how a key is sent, and even a
    /// provider that honours keys does not honour them at every endpoint. If the statement is
    /// false, one call through this layer can have several effects.
    #[must_use]
    pub fn assume_keys_honoured(mut self) -> Self {
        self.settings().keys_are_honoured = true;
        self
    }

    /// Changes the head of a request before it is sent, for example to add the fence or an
    /// [id](Attempt::id) for a third party that checks them. The attempt is also an extension of
    /// the request and of its response.
    #[must_use]
    pub fn on_attempt(mut self, change: impl Fn(&mut Parts, &Attempt) + Send + Sync + 'static) -> Self {
        self.settings().on_attempt = Some(Arc::new(change));
        self
    }

    /// Sets a check that finds out whether a lost attempt took effect. The layer calls the check
    /// before it sends the request again.
    ///
    /// The guarantee of one effect needs one of two conditions. Either the check blocks the lost
    /// attempt, by raising the [fence](Attempt::fence) at the third party before it looks for the
    /// effect. Or the request of the lost attempt has settled before the check;
    /// [`with_settle_delay`](Self::with_settle_delay) narrows this gap. A request that arrives
    /// after the check has an effect of its own.
    #[must_use]
    pub fn with_recovery<F>(mut self, check: impl Fn(LostCall) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Recovered<Response<Bytes>>> + Send + 'static,
    {
        let settings = self.settings();
        settings.engine.if_lost = IfLost::Recover;
        settings.check = Some(Arc::new(move |lost| check(lost).boxed()));
        self
    }

    /// Sets a function that classifies an error of the client by its effect. Default: every error
    /// may have taken effect, except for an error before the sending, if the client is a
    /// `ReqwestService` from `build` or `from_client_without_redirects`. For several types of
    /// errors, call this setter several times.
    ///
    /// The layer uses this classification only for an error of the request itself. An error that
    /// may belong to a later hop of a redirect, or that follows a lost attempt, never counts as
    /// "not sent". If the client follows redirects, put `SameOriginKey` into its policy, so that
    /// the layer knows the hops.
    #[must_use]
    pub fn with_errors<E: 'static>(mut self, classify: impl Fn(&E) -> ErrorClass + Send + Sync + 'static) -> Self {
        self.settings().classes.add(classify);
        self
    }

    /// Sets the largest size of a request's body, in bytes. Default: 2 MiB. The layer does not send
    /// a longer request.
    #[must_use]
    pub fn with_body_limit(mut self, bytes: usize) -> Self {
        self.settings().request_limit = bytes;
        self
    }

    /// Sets the largest size of a response's body, in bytes. Default: 2 MiB. The layer passes a
    /// longer response to its caller, and does not store it.
    #[must_use]
    pub fn with_response_limit(mut self, bytes: usize) -> Self {
        self.settings().response_limit = bytes;
        self
    }

    /// Sets how long the layer may take to read the request's body, which it does before the call.
    /// Default: 30 s. The layer does not send a request whose body takes longer.
    #[must_use]
    pub fn with_body_timeout(mut self, timeout: Duration) -> Self {
        self.settings().body_timeout = timeout;
        self
    }

    /// Sets how long the body of a response may take, counted from its head. Default: 10 s. The
    /// layer does not store a response that takes longer. If its status would be stored, the call
    /// counts as made: its caller gets the response as a stream, and later callers get
    /// [`OnceError::NotStored`](crate::client::OnceError::NotStored).
    #[must_use]
    pub fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.settings().response_timeout = timeout;
        self
    }
}

impl<St> fmt::Debug for OnceLayer<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnceLayer")
            .field("profile", &self.settings.profile)
            .field("engine", &self.settings.engine)
            .field("methods", &self.settings.methods)
            .finish_non_exhaustive()
    }
}

impl<S, St: Clone> Layer<S> for OnceLayer<St> {
    type Service = OnceClient<S, St>;

    fn layer(&self, inner: S) -> OnceClient<S, St> {
        OnceClient::new(inner, self.store.clone(), Arc::clone(&self.settings))
    }
}
