//! The layer: a store and the settings.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Response, response};
use tower_layer::Layer;

use super::errors::ServiceFailure;
use super::guard::Shared;
use super::policy::{LostAttempt, RecoveryCheck, Statuses};
use super::service::Idempotency;
use super::settings::{Paths, Selector, Settings, Values};
use crate::callback::Callback;
use crate::engine::{Drain, OnError, OnLost, Recovered};
use crate::error::Error;
use crate::http::{BodyForm, IDEMPOTENCY_KEY, Refusal, RefusalStyle, StreamTypes};
use crate::protocol::{CanonicalJson, IfLost, KeyError, KeyParser, KeySyntax, Outcome, Scope, StorageKey};
use crate::store::Store;

/// Makes any HTTP service idempotent. A request that carries a key takes effect once, and every
/// retry gets the first response, byte for byte.
///
/// The layer is its own builder. Clones share the store, the lock for each key and the
/// [`drain`](Self::drain). Each clone may have its own settings, for example for one route:
///
/// ```
/// use std::time::Duration;
/// use tower_idempotency::{IdempotencyLayer, MemoryStore};
///
/// let idempotency = IdempotencyLayer::new(MemoryStore::new());
/// let payments = idempotency.clone().require_key().with_retention(Duration::from_secs(7 * 86_400));
/// let reports = idempotency.with_wait(Duration::ZERO);
/// # let _ = (payments, reports);
/// ```
///
/// # Where to put it
///
/// Outermost first: CORS, compression, authentication, rate limit, **idempotency**, concurrency
/// limit, timeout, handler. The guide [layers](crate::guide::layers) has the reasons, and shows the
/// order in code.
///
/// # Defaults
///
/// | setting | default | change it with |
/// |---|---|---|
/// | header | `Idempotency-Key`: a structured-field string or the bare value, where `"k"` and `k` are the same key; 1 to 255 bytes of visible ASCII; case-sensitive | [`with_header`](Self::with_header), [`with_key_syntax`](Self::with_key_syntax), [`with_max_key_length`](Self::with_max_key_length), [`with_key_validator`](Self::with_key_validator) |
/// | methods | POST and PATCH; others pass | [`with_methods`](Self::with_methods) |
/// | no key | the request passes | [`require_key`](Self::require_key) |
/// | scope | none; without a scope, the fingerprint includes `Authorization`, `X-Api-Key` and the host name | [`with_scope`](Self::with_scope), [`without_authority_in_fingerprint`](Self::without_authority_in_fingerprint) |
/// | fingerprint | method, full path, query, body bytes | [`add_fingerprint_header`](Self::add_fingerprint_header), [`with_json_fingerprint`](Self::with_json_fingerprint), [`with_multipart_fingerprint`](Self::with_multipart_fingerprint), [`with_fingerprint`](Self::with_fingerprint), [`dangerously_without_fingerprint`](Self::dangerously_without_fingerprint) |
/// | body limits | 2 MiB for requests (413), 2 MiB for stored responses | [`with_body_limit`](Self::with_body_limit), [`with_response_limit`](Self::with_response_limit) |
/// | body timeouts | 30 s for requests (408), 10 s for responses, counted from the head | [`with_body_timeout`](Self::with_body_timeout), [`with_response_timeout`](Self::with_response_timeout) |
/// | stored | 2xx, 3xx, 4xx except 401, 403, 404, 405, 406, 407, 408, 412, 415, 417, 421, 425, 426, 428, 429, 431; not 5xx | [`store_if`](Self::store_if), or [marks](crate::guide::responses#marks-for-one-response) of a handler |
/// | streams | known by seven media types, status 101, and a mark | [`with_stream_types`](Self::with_stream_types), [`StreamResponse`](crate::StreamResponse) |
/// | failures: 5xx, 408, a panic | the key is released, the next attempt runs | [`on_error`](Self::on_error), and [`with_errors`](Self::with_errors) for requests that an inner service rejects |
/// | a lost attempt | [`OnLost::Refuse`]: 409 until the key is completed, resolved or expired; at most 5 attempts otherwise | [`on_lost`](Self::on_lost), [`at_least_once`](Self::at_least_once), [`with_recovery`](Self::with_recovery), [`with_max_attempts`](Self::with_max_attempts) |
/// | replay | status, headers, body, trailers, and `Idempotent-Replayed: true`; never the [fields of one exchange](crate::guide::responses#header-fields-that-are-not-replayed) | [`with_replay_header`](Self::with_replay_header), [`exclude_response_header`](Self::exclude_response_header), [`include_response_header`](Self::include_response_header) |
/// | duplicates in flight | wait up to 30 s, then 409 with `Retry-After`; at most 16,384 for a key and 65,536 in all | [`with_wait`](Self::with_wait), [`with_max_waiters_per_key`](Self::with_max_waiters_per_key), [`with_max_waiters`](Self::with_max_waiters), [`with_retry_after`](Self::with_retry_after) |
/// | executions whose callers left | at most 16,384; then new keys get 503 | [`with_max_detached`](Self::with_max_detached) |
/// | retention | 24 h from completion | [`with_retention`](Self::with_retention), [`StoreFor`](crate::StoreFor) |
/// | lease | 30 s, renewed after each third | [`with_lease`](Self::with_lease) |
/// | the store fails | 5 s for each operation; the layer repeats a claim once, then refuses the request with 503; a completion is repeated for 10 s, then without the caller for two minutes | [`with_store_timeout`](Self::with_store_timeout), [`with_completion_timeout`](Self::with_completion_timeout), [`dangerously_run_unprotected_when_the_store_fails`](Self::dangerously_run_unprotected_when_the_store_fails) |
/// | the store is misconfigured, or a record unreadable | 500, not retryable, logged at `ERROR` | |
/// | refusals | `application/problem+json` with the titles of draft-ietf-httpapi-idempotency-key-header-07 | [`with_problem_base`](Self::with_problem_base), [`with_refusals`](Self::with_refusals), [`with_should_retry_header`](Self::with_should_retry_header), `with_grpc_refusals` (feature `tonic`) |
/// | shared stores | one namespace for the keys of all applications; keys hashed without a secret | [`with_namespace`](Self::with_namespace), [`with_secret`](Self::with_secret) |
/// | one layer over a whole app | the same settings for every request | [`with_settings_for`](Self::with_settings_for) |
/// | memory of a [`MemoryStore`](crate::MemoryStore) | 1,000,000 records, 256 MiB of responses | [`MemoryStore::builder`](crate::MemoryStore::builder) |
///
/// Presets: [`ietf`](Self::ietf), [`stripe`](Self::stripe), [`webhooks`](Self::webhooks), and
/// `grpc` (feature `tonic`).
#[must_use = "a layer does nothing until it is put around a service"]
pub struct IdempotencyLayer<St> {
    shared: Arc<Shared<St>>,
    values: Arc<Values>,
    selector: Option<Selector>,
    /// Functions that change the settings for single paths. They take precedence over the selector.
    pub(super) by_path: Vec<(String, Configure<St>)>,
}

/// Changes the settings of a layer.
pub(super) type Configure<St> = Arc<dyn Fn(IdempotencyLayer<St>) -> IdempotencyLayer<St> + Send + Sync>;

impl<St: Store> IdempotencyLayer<St> {
    /// Returns a layer with this store and the [default settings](Self#defaults).
    pub fn new(store: St) -> Self {
        Self {
            shared: Arc::new(Shared::new(store)),
            values: Arc::default(),
            selector: None,
            by_path: Vec::new(),
        }
    }

    /// Sets the behaviour of draft-ietf-httpapi-idempotency-key-header-07. The key is required
    /// (section 2.7), and is a structured-field string (section 2.1). A request that arrives while
    /// the first request is in flight gets 409 at once (section 2.6).
    pub fn ietf(mut self) -> Self {
        let refusals = &mut self.values().refusals;
        refusals.style = RefusalStyle::default();
        refusals.should_retry = None;
        self.with_key_syntax(KeySyntax::Strict)
            .require_key()
            .with_wait(Duration::ZERO)
    }

    /// Sets the behaviour of Stripe's API: POST only, an optional key without the structured-field
    /// syntax, responses stored for 24 hours, 409 at once while the first request is in flight,
    /// refusals in Stripe's shape, and 400 for a key that belongs to another request.
    ///
    /// The layer also stores 5xx and 408. It does not store 400 and 422, because Stripe does not
    /// save the results of requests that fail validation. It also does not store the other 4xx that
    /// the [table](Self#defaults) leaves out, such as 401, 404 and 429.
    ///
    /// Stripe's SDKs send a request again after 409 and 5xx, unless `Stripe-Should-Retry` is
    /// `false`. So the layer sets the field to `true` or `false` in every refusal. If the handler's
    /// response is a 4xx or 5xx and a retry of its request cannot run, the layer sets `false` in
    /// that response and in each replay.
    /// [`with_should_retry_header`](Self::with_should_retry_header) changes or removes the field.
    ///
    /// Keys may have spaces between other characters. The fingerprint includes `Stripe-Account`,
    /// even with a scope. So a request for another account under the same key gets 400, and never
    /// the response of the first account.
    pub fn stripe(mut self) -> Self {
        const STRIPE_ACCOUNT: HeaderName = HeaderName::from_static("stripe-account");
        let values = self.values();
        values.refusals.style = RefusalStyle::Stripe;
        values.refusals.should_retry = Some(HeaderName::from_static("stripe-should-retry"));
        values.required = false;
        values.policy.store_if = None;
        values.policy.statuses = Statuses::Stripe;
        if !values.fingerprinting.headers.contains(&STRIPE_ACCOUNT) {
            values.fingerprinting.headers.push(STRIPE_ACCOUNT);
        }
        self.with_key_syntax(KeySyntax::RawWithSpaces)
            .with_methods([Method::POST])
            .on_error(OnError::Store)
            .with_retention(Duration::from_secs(24 * 60 * 60))
            .with_wait(Duration::ZERO)
    }

    /// Sets the behaviour for webhooks behind a `receiver::webhooks::WebhookLayer` (feature
    /// `webhooks`). You can change each setting that has its own method afterwards.
    ///
    /// * POST only, 409 with `Retry-After` at once while the first delivery is in flight, 7 days of
    ///   retention.
    /// * The key is the one that the `WebhookLayer` sets in `Idempotency-Key`. It is required, and
    ///   no validator applies.
    /// * No fingerprint, because the `WebhookLayer` has verified the sender, and providers change
    ///   irrelevant parts when they send an event again.
    /// * The layer stores only 2xx responses. After any other response, the next delivery runs the
    ///   handler again, which may have been fixed by then. For a final response, such as a 410, the
    ///   handler adds the mark [`StoreResponse`](crate::StoreResponse). Failures release the key.
    /// * If the store did not record the outcome, the provider gets 503 instead of the response,
    ///   because a 2xx acknowledges the delivery.
    /// * If the response of a success was not stored (it was too long, too slow, or dropped for
    ///   lack of space), a duplicate gets a bare 200 instead of 409 `response-not-stored`.
    ///   Providers disable endpoints that never respond with 2xx. A duplicate of a stored failure
    ///   also gets this 200 if the store dropped its response for lack of space. The record then
    ///   shows only that the event was handled.
    /// * The scope `Scope::of(["tower-idempotency", "webhooks"])`, so that a client's own key never
    ///   equals the key of a webhook, even if both layers share one store.
    pub fn webhooks(mut self) -> Self {
        let values = self.values();
        values.policy.store_if = None;
        values.policy.statuses = Statuses::SuccessOnly;
        values.acknowledges = true;
        values.run_unprotected = false;
        values.set_header(IDEMPOTENCY_KEY);
        values.parser = KeyParser::default();
        self.require_key()
            .on_error(OnError::Release)
            .with_methods([Method::POST])
            .with_wait(Duration::ZERO)
            .with_retention(Duration::from_secs(7 * 24 * 60 * 60))
            .with_scope(|_| Scope::of(["tower-idempotency", "webhooks"]))
            .dangerously_without_fingerprint()
    }

    /// Sets the header field that carries the key. Refusals name this field. Default:
    /// `Idempotency-Key`.
    ///
    /// If the key is in the body, a small middleware outside of this layer can copy it into the
    /// header field, as in `examples/key_in_body.rs`.
    pub fn with_header(mut self, name: HeaderName) -> Self {
        self.values().set_header(name);
        self
    }

    /// Sets how the layer reads the value of the header field. Default: [`KeySyntax::Lenient`].
    pub fn with_key_syntax(mut self, syntax: KeySyntax) -> Self {
        self.values().parser.syntax = syntax;
        self
    }

    /// Sets the maximum length of a key, in bytes. The layer refuses a longer key with 400. At
    /// least 1. Default: 255.
    pub fn with_max_key_length(mut self, bytes: usize) -> Self {
        self.values().parser.max_len = bytes.max(1);
        self
    }

    /// Sets an additional check of the key, such as "is a UUID". The layer refuses a key with 400
    /// if the check returns `false`. Default: none.
    pub fn with_key_validator(mut self, is_valid: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        self.values().parser.validator = Some(Callback(Arc::new(is_valid)));
        self
    }

    /// Refuses a request without a key with 400, if its method is [covered](Self::with_methods).
    /// Requests with other methods still pass through. Default: a request without a key passes
    /// through.
    pub fn require_key(mut self) -> Self {
        self.values().required = true;
        self
    }

    /// Sets the methods that the layer covers. Requests with other methods pass through untouched.
    /// If you add GET, add HEAD, too, because axum runs the handler of a GET route for a HEAD
    /// request. Default: POST and PATCH.
    pub fn with_methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.values().methods = methods.into_iter().collect();
        self
    }

    /// Sets the scope of a key, such as the account of the caller. The same key in two scopes is
    /// two keys. Default: none.
    ///
    /// The function returns a [`Scope`], or an `Option` of one. The layer refuses a request with
    /// 500 `scope-missing` if the function returns `None`, because unidentified callers must not
    /// share keys. Build the scope from the identity that authentication established, for example
    /// an extension that a layer further out has set.
    ///
    /// Set a scope wherever your application identifies callers by anything other than
    /// `Authorization`, `X-Api-Key` or the host name, such as a session cookie. Without a scope,
    /// the layer compares only these three. With a scope, the fingerprint includes none of them, so
    /// that a caller with a renewed token still gets the replay.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// #[derive(Clone)]
    /// struct Account(String);
    ///
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .with_scope(|head| head.extensions.get::<Account>().map(|account| Scope::from(&account.0)));
    /// # let _ = layer;
    /// ```
    pub fn with_scope<R: Into<Option<Scope>>>(mut self, scope: impl Fn(&Parts) -> R + Send + Sync + 'static) -> Self {
        self.values().scope = Some(Callback(Arc::new(move |head| scope(head).into())));
        self
    }

    /// Sets a namespace that separates the keys of several applications in one store. It also
    /// separates two versions of an API, where the same key under another path would be a mismatch.
    /// Default: empty.
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.values().engine.space.namespace = namespace.into();
        self
    }

    /// Sets a secret for the hash of storage keys, so that someone who can read the store cannot
    /// verify guessed keys of clients. Every process that shares the store needs the same secret.
    /// If you change the secret, the layer no longer finds any existing key. Default: none.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the secret is shorter than 16 bytes.
    pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, Error> {
        self.values().engine.space.set_secret(secret)?;
        Ok(self)
    }

    /// Adds a header field to the fingerprint, so that requests with different values of the field
    /// are different requests. Default: none.
    pub fn add_fingerprint_header(mut self, name: HeaderName) -> Self {
        self.values().fingerprinting.headers.push(name);
        self
    }

    /// Leaves the authority out of the fingerprint, for a service that clients reach by several
    /// names. By default, and only without a scope, the fingerprint includes `:authority` or
    /// `Host`, ignoring letter case and default ports. The fingerprint never includes an IP
    /// address. If a proxy replaces `Host`, add the field in which the proxy passes the client's
    /// value on, for example `X-Forwarded-Host`, with
    /// [`add_fingerprint_header`](Self::add_fingerprint_header).
    pub fn without_authority_in_fingerprint(mut self) -> Self {
        self.values().fingerprinting.authority = false;
        self
    }

    /// Compares bodies as canonical JSON. The order of members, white space, the spelling of
    /// numbers and the members that `json` leaves out make no difference. The layer compares a body
    /// that is not JSON by its bytes. Default: compares bodies by their bytes.
    pub fn with_json_fingerprint(mut self, json: CanonicalJson) -> Self {
        self.values().fingerprinting.body = BodyForm::Json(json);
        self
    }

    /// Compares multipart bodies by their parts, without the boundary. Default: compares them by
    /// their bytes.
    ///
    /// Browsers, `reqwest` and other clients choose a new random boundary for each request, so by
    /// default the retry of an upload is another request and gets 422. With this setting, the
    /// fingerprint includes the content type without its boundary, and the header fields and the
    /// content of each part. If a part is multipart itself, the layer compares the boundary of that
    /// part.
    ///
    /// The setting does not change the comparison of bodies that are not multipart, of malformed
    /// bodies, and of bodies with a part that contains the boundary. It has no effect together with
    /// [`with_fingerprint`](Self::with_fingerprint).
    pub fn with_multipart_fingerprint(mut self) -> Self {
        self.values().fingerprinting.multipart = true;
        self
    }

    /// Sets a function that reduces a body to the bytes that the layer compares. The layer still
    /// compares the method, the path, the query, the added header fields and, without a scope, the
    /// credentials and the host name. Default: compares the bytes of the body.
    pub fn with_fingerprint(mut self, of_body: impl Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync + 'static) -> Self {
        self.values().fingerprinting.body = BodyForm::Custom(Arc::new(of_body));
        self
    }

    /// Compares nothing. A request with a known key in the same scope gets the response of that
    /// key, even if the requests differ. Default: the layer compares requests by their
    /// fingerprints.
    pub fn dangerously_without_fingerprint(mut self) -> Self {
        self.values().fingerprinting.body = BodyForm::Nothing;
        self
    }

    /// Sets the maximum length of the body of a request with a key, in bytes. The layer refuses a
    /// longer body with 413. Default: 2 MiB.
    pub fn with_body_limit(mut self, bytes: usize) -> Self {
        self.values().body_limit = bytes;
        self
    }

    /// Sets how long the body of a request with a key may take to arrive. The layer refuses a
    /// slower body with 408. With zero, the body must be complete at once, and the client must
    /// declare its length. Default: 30 s.
    pub fn with_body_timeout(mut self, timeout: Duration) -> Self {
        self.values().body_timeout = timeout;
        self
    }

    /// Sets the maximum length of a stored response body, in bytes. A longer response reaches its
    /// caller, and duplicates get 409 `response-not-stored`. Default: 2 MiB.
    pub fn with_response_limit(mut self, bytes: usize) -> Self {
        self.values().response_limit = bytes;
        self
    }

    /// Sets how long the body of a response may take, counted from its head. With zero, the body
    /// must be complete at once. Default: 10 s.
    ///
    /// Before the layer stores a response, it reads the body to its end. It renews the lease
    /// meanwhile. If the body is not complete in time, the layer records that the request is done,
    /// but does not store the response. It then streams the body, beginning with the part that it
    /// has read. Duplicates then get 409 `response-not-stored`. If the caller has left, the layer
    /// drops the body at this point, so that every execution ends. A response that the layer does
    /// not store streams at once.
    ///
    /// This timeout does not limit the handler. To limit the handler, put a
    /// `tower_http::timeout::TimeoutLayer` inside this layer. On a runtime without timers, a thread
    /// of this process measures the time.
    pub fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.values().response_timeout = timeout;
        self
    }

    /// Sets the media types by which the layer recognises a response as a stream. Replaces the
    /// whole list. Letter case and parameters do not count. Default: `text/event-stream`,
    /// `application/x-ndjson`, `application/ndjson`, `application/jsonl`, `application/json-seq`,
    /// `application/stream+json` and `multipart/x-mixed-replace`.
    ///
    /// A stream reaches its caller from the first byte. If the response is one that the layer
    /// stores, the layer first stores a tombstone, so duplicates get 409 `response-not-stored`, and
    /// the handler never runs again. Status 101 is always a stream. A handler marks any other
    /// stream with [`StreamResponse`](crate::StreamResponse).
    pub fn with_stream_types(mut self, types: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.values().streams = StreamTypes::new(types);
        self
    }

    /// Sets which responses the layer stores, by their heads. Default: the statuses of the
    /// [table](Self#defaults).
    ///
    /// If the function returns `false`, the layer releases the key. The function replaces
    /// [`on_error`](Self::on_error) for 5xx and 408 responses. The marks of a handler
    /// ([`StoreResponse`](crate::StoreResponse), [`DoNotStore`](crate::DoNotStore),
    /// [`StoreOutcomeOnly`](crate::StoreOutcomeOnly)) take precedence over it. If the function
    /// panics, the layer stores a tombstone, so that the handler does not run again.
    pub fn store_if(mut self, should_store: impl Fn(&response::Parts) -> bool + Send + Sync + 'static) -> Self {
        self.values().policy.store_if = Some(Callback(Arc::new(should_store)));
        self
    }

    /// Sets the effect of a failed handler on its key. Default: [`OnError::Release`].
    ///
    /// If the response is the refusal of another idempotency layer further in, this layer judges it
    /// by its [kind](crate::RefusalKind), not by its status:
    ///
    /// * If the inner handler failed, this setting applies.
    /// * If the inner outcome is unknown, this layer releases the key under [`OnError::Release`].
    ///   Under every other setting the outcome is unknown here, too.
    /// * If the inner request took effect, this layer records a tombstone.
    /// * Every other refusal means that nothing ran, so this layer releases the key.
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.values().policy.on_error = on_error;
        self
    }

    /// Adds a function that classifies the errors of the inner service. For several types of
    /// errors, call this method several times. Default: every error is [`ServiceFailure::Failed`],
    /// and [`on_error`](Self::on_error) decides.
    ///
    /// If an error means that the request did not reach the handler ([`ServiceFailure::NotRun`]),
    /// the layer releases the key under every [`OnError`], and duplicates in flight get 503
    /// `not-run`. Without a classification, a request that a load shedder inside rejects has an
    /// unknown outcome under [`OnError::Unknown`], although nothing ran.
    ///
    /// ```
    /// use tower::{buffer, load_shed, BoxError};
    /// use tower_idempotency::{IdempotencyLayer, MemoryStore, OnError, ServiceFailure};
    ///
    /// let layer = IdempotencyLayer::new(MemoryStore::new())
    ///     .on_error(OnError::Unknown)
    ///     .with_errors(|error: &BoxError| {
    ///         // `LoadShed` had no capacity, or the service behind a `Buffer` was not ready or is gone.
    ///         let not_run = error.is::<load_shed::error::Overloaded>()
    ///             || error.is::<buffer::error::ServiceError>()
    ///             || error.is::<buffer::error::Closed>();
    ///         if not_run { ServiceFailure::NotRun } else { ServiceFailure::Failed }
    ///     });
    /// # let _ = layer;
    /// ```
    ///
    /// The function gets only errors of the inner service's type. Judge the error itself, and do
    /// not search its sources. The layer recognises no error by itself, because a handler that
    /// calls other services may return an `Overloaded` of one of its clients after it had an
    /// effect. If your handler returns errors of such clients, wrap them in a type of your own.
    /// `Closed` also reports a panic within `Service::call` behind a `Buffer`; leave it out if a
    /// service there acts before it returns its future. An expired `tower::timeout` is a failure,
    /// because the handler was running. An error of `poll_ready` needs no classification, because
    /// no key is claimed yet.
    ///
    /// In an axum app, services have no errors, because a `HandleErrorLayer` around the load
    /// shedder turns its error into a response. Insert [`DoNotStore`](crate::DoNotStore) into the
    /// extensions of that response, so that the layer releases the key.
    pub fn with_errors<E: 'static>(mut self, classify: impl Fn(&E) -> ServiceFailure + Send + Sync + 'static) -> Self {
        self.values().errors.add(classify);
        self
    }

    /// Sets what happens to a key whose owner vanished. Default: [`OnLost::Refuse`].
    ///
    /// This method, [`at_least_once`](Self::at_least_once) and
    /// [`with_recovery`](Self::with_recovery) set the same value, so the last call counts.
    pub fn on_lost(mut self, on_lost: OnLost) -> Self {
        self.values().engine.if_lost = on_lost.into();
        self
    }

    /// Runs the next request with the key of a lost attempt instead of refusing it
    /// ([`OnLost::Execute`]). Use it for a handler whose effect may happen twice, is in one
    /// transaction with the record, or is at a third party that deduplicates by a [derived
    /// key](crate::Lease::derive_key).
    pub fn at_least_once(self) -> Self {
        self.on_lost(OnLost::Execute)
    }

    /// Sets a check that finds out whether a lost attempt took effect. The layer calls the check
    /// before it runs the next request with the key. Default: none.
    ///
    /// The guarantee is one effect if the check also blocks the lost attempt, by raising the
    /// [fence](LostAttempt::fence) at the third party before it looks for the effect. Otherwise a
    /// request of the lost attempt may arrive at the third party after the check, and have an
    /// effect of its own.
    pub fn with_recovery<F>(mut self, check: impl Fn(LostAttempt) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Recovered<Response<Bytes>>> + Send + 'static,
    {
        let values = self.values();
        (values.engine.if_lost, values.check) = (IfLost::Recover, Some(RecoveryCheck::new(check)));
        self
    }

    /// Sets the maximum number of attempts for a key under [`OnLost::Execute`] and
    /// [`with_recovery`](Self::with_recovery). If the last attempt is lost, too, the outcome is
    /// unknown. At least 1. Default: 5.
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.values().engine.set_max_attempts(attempts);
        self
    }

    /// Sets the header field that marks a replayed response; `None` for no mark. If a response
    /// already has the 24,576 headers that a `HeaderMap` holds at most, it is replayed without the
    /// mark. Default: `Idempotent-Replayed: true`.
    pub fn with_replay_header(mut self, marker: Option<(HeaderName, HeaderValue)>) -> Self {
        self.values().response_headers.marker = marker;
        self
    }

    /// Adds a header field that the layer leaves out of stored responses, so that replays lack it.
    /// Default: none beyond the [fields of one
    /// exchange](crate::guide::responses#header-fields-that-are-not-replayed).
    pub fn exclude_response_header(mut self, name: HeaderName) -> Self {
        self.values().response_headers.denied.push(name);
        self
    }

    /// Adds a header field that replayed responses carry although the layer leaves it out by
    /// default, such as `Age`. Default: none.
    pub fn include_response_header(mut self, name: HeaderName) -> Self {
        self.values().response_headers.allowed.push(name);
        self
    }

    /// Sets the prefix of the `type` of problem documents. The [code](Refusal::code) of the refusal
    /// follows it. Default: `urn:problem-type:idempotency:`.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the prefix has a character that no URI
    /// has (RFC 3986 section 2).
    pub fn with_problem_base(mut self, base: &str) -> Result<Self, Error> {
        let in_uri = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&byte);
        if !base.bytes().all(in_uri) {
            return Err(Error::configuration(
                "the base of problem types has a character that no URI has; percent-encode it",
            ));
        }
        self.values().refusals.style = RefusalStyle::Problem { type_base: base.into() };
        Ok(self)
    }

    /// Sets a function that renders refusals. The layer adds `Cache-Control: no-store` and
    /// `Retry-After`. Default: problem documents.
    ///
    /// The function gets the refusal and the head of the refused request, for example to read a
    /// request id or to negotiate the content. The handler gets the original head, so the layer
    /// copies the head of each request that it guards. Without this setting it copies nothing. If
    /// the layer stores a failure of the handler ([`OnError::Store`]), the function renders the
    /// failure once, for the first request, and duplicates get the same response.
    ///
    /// ```
    /// use http::Response;
    /// use tower_idempotency::{IdempotencyLayer, MemoryStore};
    ///
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_refusals(|refusal, head| {
    ///     let mut response = Response::new(format!("{}: {}", refusal.title(), refusal.detail()).into());
    ///     *response.status_mut() = refusal.status();
    ///     if let Some(id) = head.headers.get("x-request-id") {
    ///         response.headers_mut().insert("x-request-id", id.clone());
    ///     }
    ///     response
    /// });
    /// # let _ = layer;
    /// ```
    pub fn with_refusals(
        mut self,
        render: impl Fn(&Refusal, &Parts) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.values().refusals.style = RefusalStyle::Custom(Arc::new(render));
        self
    }

    /// Sets the header field that shows the client's SDK whether a retry can help, `true` or
    /// `false`. [`stripe`](Self::stripe) sets `Stripe-Should-Retry`. Other SDKs read
    /// `X-Should-Retry`. Default: none.
    ///
    /// Every refusal has the field. A response of the handler has it, with `false`, if its status
    /// is 4xx or 5xx and a retry cannot run, because the key does not become free and no attempt
    /// can take it over. The retry would get the same response or a refusal.
    pub fn with_should_retry_header(mut self, name: Option<HeaderName>) -> Self {
        self.values().refusals.should_retry = name;
        self
    }

    /// Sets how long the store holds an outcome, counted from its completion. Choose more than the
    /// sum of the lease, the longest run of a handler, and the time until the client's last retry.
    /// With zero, duplicates wait while the first request is in flight, and run again afterwards.
    /// Default: 24 hours.
    pub fn with_retention(mut self, retention: Duration) -> Self {
        self.values().engine.retention = retention;
        self
    }

    /// Sets how long an owner may go without a renewal before the store regards the owner as lost.
    /// The layer renews the lease after each third of it while the handler runs, so a slow handler
    /// needs no longer lease. A memory store does not use the lease. At least 1 s. Default: 30 s.
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.values().engine.set_lease(lease);
        self
    }

    /// Sets how long a duplicate waits for the request in flight before it gets 409. With zero, the
    /// duplicate gets 409 at once. Default: 30 s.
    ///
    /// This time covers all waits of one request until the request owns its key. Only the last
    /// operation of the store, or the decision about the claim of another request with this key,
    /// may take half a second longer. If another attempt takes the key over from its owner, the
    /// owner waits for the outcome of that attempt, for up to this time again. Set a time that is
    /// shorter than every timeout further out.
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.values().engine.wait = wait;
        self
    }

    /// Sets how many duplicates of one key may wait in this process. A further duplicate gets 409.
    /// A duplicate counts whether the request in flight runs in this process or in another one.
    /// Default: 16,384.
    pub fn with_max_waiters_per_key(mut self, duplicates: usize) -> Self {
        self.values().waiting.per_key = duplicates;
        self
    }

    /// Sets how many duplicates may wait in this process for all keys together. A further duplicate
    /// gets 409. Default: 65,536.
    pub fn with_max_waiters(mut self, duplicates: usize) -> Self {
        self.values().waiting.in_all = duplicates;
        self
    }

    /// Sets how many executions may continue in this process after their callers have left. At this
    /// limit, requests with new keys get 503 `overloaded` with `Retry-After`, and the layer claims
    /// nothing for them. Duplicates still get their responses. At least 1. Default: 16,384.
    ///
    /// The layer never stops an execution whose caller left, because its effect may have happened.
    /// Limits further out count callers, so without this limit a client that sends requests and
    /// hangs up could start any number of executions. Put a concurrency limit [inside this
    /// layer](Self#where-to-put-it), where it counts executions.
    pub fn with_max_detached(mut self, executions: usize) -> Self {
        self.values().engine.set_max_detached(executions);
        self
    }

    /// Sets how long one operation of the store may take before it counts as failed. Default: 5 s.
    pub fn with_store_timeout(mut self, timeout: Duration) -> Self {
        self.values().engine.store_timeout = timeout;
        self
    }

    /// Sets how long the layer repeats a completion while the store fails. Default: 10 s.
    ///
    /// After this time, under [`OnLost::Refuse`], the caller gets its response and the key stays
    /// claimed. Otherwise the caller gets 503. The layer then continues without the caller for
    /// twelve times as long (two minutes by default). It records the end of the handler in the
    /// store, and queries the end of a transaction of the handler (`Lease::complete_in`, feature
    /// `postgres`). It does so for at most 1,024 executions, with 64 MiB of responses. The outcome
    /// of an execution beyond that, or of one that ended before a longer outage, is unknown.
    ///
    /// For the same time the layer tries to release a key whose claim got no reply, because the
    /// store may have granted the claim. While there are 1,024 such keys or more, the layer sends
    /// no further claims. A duplicate then still gets its response, and any other request gets 503.
    pub fn with_completion_timeout(mut self, timeout: Duration) -> Self {
        self.values().engine.completion_timeout = timeout;
        self
    }

    /// Sets the delay in `Retry-After`, in whole seconds. Only refusals after which a later retry
    /// can help have this field. Default: 1 s.
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.values().retry_after = after;
        self
    }

    /// Runs a request without any protection if the store fails at its claim, every time that the
    /// request is sent. The layer reports each such request as the event `unprotected`. If the
    /// store is misconfigured or the record is unreadable, the layer still refuses the request,
    /// with 500. An unprotected request has no attempt, so a handler that takes a
    /// [`Lease`](crate::Lease) as an extractor has to take an `Option` of it. Default: the layer
    /// refuses the request with 503.
    pub fn dangerously_run_unprotected_when_the_store_fails(mut self) -> Self {
        self.values().run_unprotected = true;
        self
    }

    /// Sets a selector that chooses the settings for each request by its head, for one layer over a
    /// whole application. The layer does not cover a request if the selector returns `None`.
    /// Default: none.
    ///
    /// The layer's own settings then apply only to its gRPC methods, which take precedence over the
    /// selector. Under a nested axum router the head's `uri` lacks the prefix, but its extensions
    /// `OriginalUri` and `MatchedPath` have it.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// let idempotency = IdempotencyLayer::new(MemoryStore::new());
    /// let payments = idempotency.clone().require_key().settings();
    /// let others = idempotency.settings();
    /// let idempotency = idempotency.with_settings_for(move |head| match head.uri.path() {
    ///     "/health" => None,
    ///     path if path.starts_with("/payments") => Some(payments.clone()),
    ///     _ => Some(others.clone()),
    /// });
    /// # let _ = idempotency;
    /// ```
    pub fn with_settings_for(mut self, select: impl Fn(&Parts) -> Option<Settings> + Send + Sync + 'static) -> Self {
        self.selector = Some(Arc::new(select));
        self
    }

    /// Returns the settings of this layer for [`with_settings_for`](Self::with_settings_for),
    /// without its own selector.
    #[cfg_attr(
        feature = "tonic",
        doc = "\n\nThey include the settings of single methods ([`add_grpc_method`](Self::add_grpc_method))."
    )]
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            values: Arc::clone(&self.values),
            paths: self.paths(),
        }
    }

    /// Returns the name of a client's key in the store under these settings. An operator uses it to
    /// look up a key, or to resolve a key whose outcome is unknown.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::{protocol::{Resolution, ResolveResult, Status}, IdempotencyLayer, MemoryStore, Scope, Store};
    /// # async fn resolve(idempotency: IdempotencyLayer<MemoryStore>) -> Result<(), Box<dyn std::error::Error>> {
    /// let key = idempotency.storage_key(Some(&Scope::from("account 7")), "k-1")?;
    /// let Some(record) = idempotency.store().peek(&key).await? else {
    ///     return Err("no record: wrong scope, namespace or secret, or the retention has ended".into());
    /// };
    /// if let Status::Lost | Status::Unknown = record.status {
    ///     // The bank has confirmed the payment. `Resolution::Absent` would free the key.
    ///     let outcome = idempotency.outcome_of(http::Response::new("paid".into()));
    ///     let found = Resolution::Completed(outcome, Duration::from_secs(86_400));
    ///     let resolved = idempotency.store().resolve(&key, record.fence, &found).await?;
    ///     assert_eq!(resolved, ResolveResult::Resolved, "another attempt has the key by now");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`KeyError`] if the key is malformed under these settings.
    pub fn storage_key(&self, scope: Option<&Scope>, key: &str) -> Result<StorageKey, KeyError> {
        let values = &self.values;
        let key = values.parser.parse(key.as_bytes())?;
        Ok(values.engine.space.storage_key(scope, &key))
    }

    /// Returns the outcome to pass to [`Store::resolve`]. It has the response as the layer stores
    /// it, without the header fields that are never replayed. A response with the mark
    /// [`StoreOutcomeOnly`](crate::StoreOutcomeOnly) or [`DoNotStore`](crate::DoNotStore) becomes a
    /// tombstone.
    #[must_use]
    pub fn outcome_of(&self, response: Response<Bytes>) -> Outcome {
        let values = &self.values;
        let (mut head, body) = values.collected(response);
        let judgement = values.happened(&head);
        values.advise(&mut head, judgement.retention.is_zero());
        values.outcome_of(None, &head, &body)
    }

    /// Returns the store.
    #[must_use]
    pub fn store(&self) -> &St {
        &self.shared.store
    }

    /// Returns a handle with which a graceful shutdown waits for executions whose callers have
    /// left. It covers this layer and its clones, including clones with other settings. Another
    /// layer over the same store has its own `Drain`, so make all layers of a program as clones of
    /// one layer.
    #[must_use]
    pub fn drain(&self) -> Drain {
        self.shared.drain()
    }

    pub(super) fn values(&mut self) -> &mut Values {
        Arc::make_mut(&mut self.values)
    }
}

impl<St> IdempotencyLayer<St> {
    /// Returns the settings for single paths. Computes them as late as possible, so that they
    /// include all settings of this layer, whatever the order of the calls.
    fn paths(&self) -> Option<Arc<Paths>> {
        if self.by_path.is_empty() {
            return None;
        }
        let mut base = self.clone();
        base.by_path.clear();
        let mut layers = HashMap::<&str, Self>::new();
        for (path, configure) in &self.by_path {
            let layer = layers.remove(path.as_str()).unwrap_or_else(|| base.clone());
            layers.insert(path, configure(layer));
        }
        let settings = layers.into_iter().map(|(path, layer)| (path.to_owned(), layer.values));
        Some(Arc::new(settings.collect()))
    }
}

impl<St> Clone for IdempotencyLayer<St> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            values: Arc::clone(&self.values),
            selector: self.selector.clone(),
            by_path: self.by_path.clone(),
        }
    }
}

impl<St> fmt::Debug for IdempotencyLayer<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyLayer")
            .field("settings", &self.values)
            .field("selector", &self.selector.is_some())
            .field("paths", &self.by_path.iter().map(|(path, _)| path).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl<S, St> Layer<S> for IdempotencyLayer<St> {
    type Service = Idempotency<S, St>;

    fn layer(&self, inner: S) -> Self::Service {
        Idempotency::new(
            inner,
            Arc::clone(&self.shared),
            Settings {
                values: Arc::clone(&self.values),
                paths: self.paths(),
            },
            self.selector.clone(),
        )
    }
}
