//! The layer: a store, and what is set.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::request::Parts;
use http::{response, Method, Response};
use tower_layer::Layer;

use super::errors::ServiceFailure;
use super::guard::Shared;
use super::policy::{LostAttempt, RecoveryCheck, Statuses};
use super::service::Idempotency;
use super::settings::{Paths, Selector, Settings, Values};
use crate::engine::{Drain, OnError, OnLost, Recovered};
use crate::error::{Error, ErrorKind};
use crate::http::{BodyForm, Refusal, RefusalStyle, StreamTypes, IDEMPOTENCY_KEY};
use crate::protocol::{CanonicalJson, IfLost, KeyError, KeyParser, KeySyntax, Outcome, Scope, StorageKey};
use crate::store::Store;

/// Makes any HTTP service idempotent: a request that carries a key takes effect once, and every retry gets the first response,
/// byte for byte.
///
/// The layer is its own builder. Clones share the store, the lock for each key and the [`drain`](Self::drain), and each may have its
/// own settings, for example for one route:
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
/// Outermost first: CORS, compression, authentication, rate limit, **idempotency**, concurrency limit, timeout,
/// handler. The guide [layers](crate::guide::layers) has the reasons, and shows the order in code.
///
/// # Defaults
///
/// | setting | default | change it with |
/// |---|---|---|
/// | header | `Idempotency-Key`: a structured-field string or the bare value, `"k"` and `k` being one key; 1 to 255 bytes of visible ASCII; case counts | [`with_header`](Self::with_header), [`with_key_syntax`](Self::with_key_syntax), [`with_max_key_length`](Self::with_max_key_length), [`with_key_validator`](Self::with_key_validator) |
/// | methods | POST and PATCH; others pass | [`with_methods`](Self::with_methods) |
/// | no key | the request passes | [`require_key`](Self::require_key) |
/// | scope | none; then the fingerprint includes `Authorization`, `X-Api-Key` and the host name | [`with_scope`](Self::with_scope), [`without_authority_in_fingerprint`](Self::without_authority_in_fingerprint) |
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
/// | lease | 30 s, renewed at a third | [`with_lease`](Self::with_lease) |
/// | the store fails | 5 s for each operation; a claim is repeated once, then 503; a completion is repeated for 10 s, and for two minutes after the response | [`with_store_timeout`](Self::with_store_timeout), [`with_completion_timeout`](Self::with_completion_timeout), [`dangerously_run_unprotected_when_the_store_fails`](Self::dangerously_run_unprotected_when_the_store_fails) |
/// | the store is misconfigured, or a record unreadable | 500, not retryable, logged at `ERROR` | |
/// | refusals | `application/problem+json` with the titles of draft-ietf-httpapi-idempotency-key-header-07 | [`with_problem_base`](Self::with_problem_base), [`with_refusals`](Self::with_refusals), [`with_should_retry_header`](Self::with_should_retry_header), `with_grpc_refusals` (feature `tonic`) |
/// | shared stores | the keys of all applications in one space, hashed without a secret | [`with_namespace`](Self::with_namespace), [`with_secret`](Self::with_secret) |
/// | one layer over a whole app | the same settings for every request | [`with_settings_for`](Self::with_settings_for) |
/// | memory of a [`MemoryStore`](crate::MemoryStore) | 1,000,000 records, 256 MiB of responses | [`MemoryStore::builder`](crate::MemoryStore::builder) |
///
/// Presets: [`ietf`](Self::ietf), [`stripe`](Self::stripe), [`webhooks`](Self::webhooks), and `grpc` (feature `tonic`).
#[must_use = "a layer does nothing until it is put around a service"]
pub struct IdempotencyLayer<St> {
    shared: Arc<Shared<St>>,
    values: Arc<Values>,
    selector: Option<Selector>,
    /// Functions that change the settings for single paths. They come before the selector.
    pub(super) by_path: Vec<(String, Configure<St>)>,
}

/// Changes the settings of a layer.
pub(super) type Configure<St> = Arc<dyn Fn(IdempotencyLayer<St>) -> IdempotencyLayer<St> + Send + Sync>;

impl<St: Store> IdempotencyLayer<St> {
    /// A layer with the [defaults](Self#defaults) on this store.
    pub fn new(store: St) -> Self {
        Self {
            shared: Arc::new(Shared::new(store)),
            values: Arc::default(),
            selector: None,
            by_path: Vec::new(),
        }
    }

    /// Sets what draft-ietf-httpapi-idempotency-key-header-07 says: the key is required (section 2.7), a structured-field
    /// string (section 2.1), and a request that comes while the first is outstanding gets 409 at once (section 2.6).
    pub fn ietf(mut self) -> Self {
        let refusals = &mut self.values().refusals;
        refusals.style = RefusalStyle::default();
        refusals.should_retry = None;
        self.with_key_syntax(KeySyntax::Strict)
            .require_key()
            .with_wait(Duration::ZERO)
    }

    /// Sets the behaviour of Stripe's API: POST only, the key as it stands and optional, responses stored for 24 hours,
    /// 409 at once while the first request is in flight, refusals in Stripe's shape, 400 for a key that belongs to
    /// another request.
    ///
    /// The layer also stores 5xx and 408. It does not store 400 and 422, because Stripe does not save the results of requests
    /// that fail validation. It also does not store the other 4xx that the [table](Self#defaults) leaves out, such as 401,
    /// 404 and 429.
    ///
    /// Stripe's SDKs send a request again after 409 and 5xx, unless `Stripe-Should-Retry` is `false`. So the layer sets the
    /// field to `true` or `false` in every refusal. If the handler's response is a 4xx or 5xx and a retry of its request
    /// cannot run, the layer sets `false` in that response and in each replay.
    /// [`with_should_retry_header`](Self::with_should_retry_header) changes or removes the field.
    ///
    /// Keys may have spaces between other characters. The fingerprint includes `Stripe-Account`, also beside a scope: a
    /// request for another account under the same key gets 400, and never the response of the first account.
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

    /// Sets what webhooks need behind a `receiver::webhooks::WebhookLayer` (feature `webhooks`); what has a setting of its own can
    /// be set otherwise afterwards:
    ///
    /// * POST only, 409 with `Retry-After` at once while the first is outstanding, 7 days of retention.
    /// * The key that a `WebhookLayer` gives, and no other: required, in `Idempotency-Key`, without a validator of yours.
    /// * No fingerprint: who it is has been verified, and providers change what does not matter when they send again.
    /// * Only 2xx answers are kept. After any other the next delivery runs the handler again, which may have been mended by then; for
    ///   one that is final, a 410 for instance, the handler says [`StoreResponse`](crate::StoreResponse). Failures release the key.
    /// * No answer is given of which nothing is recorded, since a 2xx acknowledges: 503 instead.
    /// * If the response of a success was not stored (it was too long, too slow, or dropped for want of room), a
    ///   duplicate gets a bare 200 instead of 409 `response-not-stored`. Providers stop sending to an endpoint that never
    ///   answers with 2xx.
    /// * The scope `Scope::of(["tower-idempotency", "webhooks"])`, so that no request with a key of a client's own takes a webhook's, on
    ///   whatever layer of the same store.
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

    /// Sets the header field that carries the key. Default: `Idempotency-Key`. Refusals name this field.
    ///
    /// For an API that has the key in the body, a small middleware outside of this layer can copy it into the header
    /// field: see `examples/key_in_body.rs`.
    pub fn with_header(mut self, name: HeaderName) -> Self {
        self.values().set_header(name);
        self
    }

    /// [`KeySyntax::Lenient`] by default: how the header's value is read.
    pub fn with_key_syntax(mut self, syntax: KeySyntax) -> Self {
        self.values().parser.syntax = syntax;
        self
    }

    /// 255 bytes by default, 1 at least: the length of the longest key; a longer one is refused with 400.
    pub fn with_max_key_length(mut self, bytes: usize) -> Self {
        self.values().parser.max_len = bytes.max(1);
        self
    }

    /// None by default: a further check of the key, such as "is a UUID"; `false` is answered with 400.
    pub fn with_key_validator(mut self, is_valid: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        self.values().parser.validator = Some(Arc::new(is_valid));
        self
    }

    /// Refuses a covered request without a key with 400. Default: it passes. Methods that are not covered still pass.
    pub fn require_key(mut self) -> Self {
        self.values().required = true;
        self
    }

    /// Sets the methods that are covered. Others pass through untouched. Default: POST and PATCH. If you add GET, add HEAD, too,
    /// because axum runs the handler of a GET route for it.
    pub fn with_methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.values().methods = methods.into_iter().collect();
        self
    }

    /// None by default: whose key it is. The same key in two scopes is two keys.
    ///
    /// The function returns a [`Scope`], or an `Option` of one; `None` is refused with 500 `scope-missing`, since
    /// nobody may share keys with those of whom nothing is known. Build the scope from what authenticated the request
    /// (an extension set by a layer further out), and set one wherever your application identifies callers by anything
    /// other than `Authorization`, `X-Api-Key` or the host name, such as a session cookie. Without a scope, the layer
    /// compares only these three. With a scope, the fingerprint includes none of them, so that a caller with a renewed
    /// token still gets the replay.
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
        self.values().scope = Some(Arc::new(move |head| scope(head).into()));
        self
    }

    /// Empty by default: keeps the keys of several applications apart that share one store, or of two versions of an API (where
    /// the same key under another path would be a mismatch).
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.values().engine.space.namespace = namespace.into();
        self
    }

    /// None by default: keys the hash of storage keys, so that who reads the store cannot test guesses of clients' keys. Every
    /// process that shares the store needs the same; changing it forgets every key.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Configuration`] when the secret is shorter than 16 bytes.
    pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, Error> {
        self.values().engine.space.set_secret(secret)?;
        Ok(self)
    }

    /// None by default: one more header field that makes a difference between requests.
    pub fn add_fingerprint_header(mut self, name: HeaderName) -> Self {
        self.values().fingerprinting.headers.push(name);
        self
    }

    /// Leaves the authority out of the fingerprint, for a service that clients reach by several names. By default, and
    /// only without a scope, the fingerprint includes `:authority` or `Host`, ignoring letter case and default ports.
    /// An IP address is always left out. If a proxy replaces `Host`, add the field in which the proxy passes the
    /// client's value on, for example `X-Forwarded-Host`, by [`add_fingerprint_header`](Self::add_fingerprint_header).
    pub fn without_authority_in_fingerprint(mut self) -> Self {
        self.values().fingerprinting.authority = false;
        self
    }

    /// Not by default: compares bodies as canonical JSON, so that the order of members, white space, spelling of numbers and the
    /// left-out members make no difference. A body that is no JSON is compared by its bytes.
    pub fn with_json_fingerprint(mut self, json: CanonicalJson) -> Self {
        self.values().fingerprinting.body = BodyForm::Json(json);
        self
    }

    /// Compares multipart bodies by their parts, without the boundary. Default: by their bytes.
    ///
    /// Browsers, `reqwest` and other clients choose a new random boundary for each request, so by default the retry of
    /// an upload is another request and gets 422. With this setting, the fingerprint includes the content type without
    /// its boundary, and the header fields and the content of each part. A part that is multipart itself has a boundary
    /// of its own, which is compared. Bodies that are not multipart are compared as before. The same holds for
    /// malformed bodies, and for bodies with a part that contains the boundary. This setting does not apply beside
    /// [`with_fingerprint`](Self::with_fingerprint).
    pub fn with_multipart_fingerprint(mut self) -> Self {
        self.values().fingerprinting.multipart = true;
        self
    }

    /// Not by default: compares bodies by what this function makes of them. The layer still compares method, path,
    /// query, chosen headers and, without a scope, the credentials and the host name.
    pub fn with_fingerprint(mut self, of_body: impl Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync + 'static) -> Self {
        self.values().fingerprinting.body = BodyForm::Custom(Arc::new(of_body));
        self
    }

    /// Not by default: compares nothing at all. Whoever sends a key in its scope gets the answer under it, whatever was asked.
    pub fn dangerously_without_fingerprint(mut self) -> Self {
        self.values().fingerprinting.body = BodyForm::Nothing;
        self
    }

    /// 2 MiB by default: the longest body of a request with a key; a longer one is refused with 413.
    pub fn with_body_limit(mut self, bytes: usize) -> Self {
        self.values().body_limit = bytes;
        self
    }

    /// Sets how long the body of a request with a key may take to arrive; a slower one is refused with 408.
    /// Default: 30 s. Zero: the body must be complete at once, and its client must declare its length.
    pub fn with_body_timeout(mut self, timeout: Duration) -> Self {
        self.values().body_timeout = timeout;
        self
    }

    /// 2 MiB by default: the longest body that is stored. A longer answer reaches its caller, and duplicates get 409
    /// `response-not-stored`.
    pub fn with_response_limit(mut self, bytes: usize) -> Self {
        self.values().response_limit = bytes;
        self
    }

    /// Sets how long the body of a response may take, counted from its head. Default: 10 s. Zero: the body must be complete at once.
    ///
    /// Before the layer stores a response, it reads the body to its end. It renews the lease meanwhile. If the body is not
    /// complete in time, the layer records that the request is done, but does not store the response. It then streams the
    /// body, beginning with the part that it has read. Duplicates then get 409 `response-not-stored`. If the caller has
    /// left, the layer drops the body at this point, so that every execution ends. A response that the layer does not
    /// store streams at once. This timeout does not limit the handler; put a `tower_http::timeout::TimeoutLayer` inside
    /// this layer for that. On a runtime without timers, a thread of this process measures the time.
    pub fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.values().response_timeout = timeout;
        self
    }

    /// Sets the media types by which the layer knows a response as a stream; replaces the whole list. Letter case and
    /// parameters do not count. Default: `text/event-stream`, `application/x-ndjson`, `application/ndjson`,
    /// `application/jsonl`, `application/json-seq`, `application/stream+json` and `multipart/x-mixed-replace`.
    ///
    /// A stream reaches its caller from the first byte. If the response is one that the layer stores, the layer first
    /// stores a tombstone, so duplicates get 409 `response-not-stored`, and the handler never runs again. Status 101 is
    /// always a stream. A handler marks any other stream with [`StreamResponse`](crate::StreamResponse).
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
        self.values().policy.store_if = Some(Arc::new(should_store));
        self
    }

    /// Sets what a failure of the handler does to its key. Default: [`OnError::Release`].
    ///
    /// If the response is the refusal of another idempotency layer further in, this layer judges it by its
    /// [kind](crate::RefusalKind), not by its status. If the inner handler failed, this setting applies. If the inner
    /// outcome is unknown, the key is released under [`OnError::Release`], and otherwise its outcome is unknown here,
    /// too. If the inner request took effect, this layer records a tombstone. Every other refusal means that nothing
    /// ran, and releases the key.
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.values().policy.on_error = on_error;
        self
    }

    /// Sets the meaning of an error of the inner service. Default: every error is [`ServiceFailure::Failed`], and
    /// [`on_error`](Self::on_error) decides. For several types of errors, call it several times.
    ///
    /// If an error means that the request did not reach the handler ([`ServiceFailure::NotRun`]), the layer releases
    /// the key under every [`OnError`], and duplicates in flight get 503 `not-run`. Without a classification, a request
    /// that a load shedder inside rejects has an unknown outcome under [`OnError::Unknown`], although nothing ran.
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
    /// The function gets only errors of the inner service's type. Judge the error itself, and do not search its
    /// sources. The layer recognises no error by itself, because a handler that calls other services may return an
    /// `Overloaded` of one of its clients after it had an effect. If your handler returns errors of such clients, wrap
    /// them in a type of your own. `Closed` also reports a panic within `Service::call` behind a `Buffer`; leave it out
    /// if a service there acts before it returns its future. An expired `tower::timeout` is a failure, because the
    /// handler was running. An error of `poll_ready` needs no classification, because no key is claimed yet.
    ///
    /// In an axum app, services have no errors, because a `HandleErrorLayer` around the load shedder turns its error into a
    /// response. Insert [`DoNotStore`](crate::DoNotStore) into the extensions of that response, so that the layer releases the
    /// key.
    pub fn with_errors<E: 'static>(mut self, classify: impl Fn(&E) -> ServiceFailure + Send + Sync + 'static) -> Self {
        self.values().errors.add(classify);
        self
    }

    /// Sets what happens to a key whose owner vanished. Default: [`OnLost::Refuse`]. Of this setter,
    /// [`at_least_once`](Self::at_least_once) and [`with_recovery`](Self::with_recovery), the last call counts.
    pub fn on_lost(mut self, on_lost: OnLost) -> Self {
        self.values().engine.if_lost = on_lost.into();
        self
    }

    /// Runs the next request with the key of a lost attempt, instead of refusing it: [`OnLost::Execute`]. For handlers whose
    /// effect may come twice, or is in a transaction with the record, or at a third party that heeds a
    /// [derived key](crate::Lease::derive_key).
    pub fn at_least_once(self) -> Self {
        self.on_lost(OnLost::Execute)
    }

    /// Calls `check` before the next request with the key of a lost attempt runs, to find out whether that attempt took effect.
    ///
    /// The guarantee is one effect if the check also blocks the lost attempt, by raising the [fence](LostAttempt::fence) at the
    /// third party before it looks for the effect. A request of the lost attempt that arrives there after the check has an effect
    /// of its own.
    pub fn with_recovery<F>(mut self, check: impl Fn(LostAttempt) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Recovered<Response<Bytes>>> + Send + 'static,
    {
        let values = self.values();
        (values.engine.if_lost, values.check) = (IfLost::Recover, Some(RecoveryCheck::new(check)));
        self
    }

    /// Sets how many attempts a key gets under [`OnLost::Execute`] and [`with_recovery`](Self::with_recovery). After the last one,
    /// the outcome is unknown. At least 1. Default: 5.
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.values().engine.set_max_attempts(attempts);
        self
    }

    /// `Idempotent-Replayed: true` by default: how a replayed answer is marked; `None`: not at all. An answer that
    /// fills a `HeaderMap` up to its limit of 24,576 headers is replayed without the mark.
    pub fn with_replay_header(mut self, marker: Option<(HeaderName, HeaderValue)>) -> Self {
        self.values().response_headers.marker = marker;
        self
    }

    /// None by default: one more header field that a replayed answer does not carry.
    pub fn exclude_response_header(mut self, name: HeaderName) -> Self {
        self.values().response_headers.denied.push(name);
        self
    }

    /// None by default: a header field that a replayed answer carries although it usually would not, `Age` for instance.
    pub fn include_response_header(mut self, name: HeaderName) -> Self {
        self.values().response_headers.allowed.push(name);
        self
    }

    /// `urn:problem-type:idempotency:` by default: what the `type` of problem documents begins with; the
    /// [code](Refusal::code) follows.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Configuration`] when it has a character that no URI has (RFC 3986 section 2).
    pub fn with_problem_base(mut self, base: &str) -> Result<Self, Error> {
        let in_uri = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&byte);
        if !base.bytes().all(in_uri) {
            return Err(Error::new(
                ErrorKind::Configuration,
                "the base of problem types has a character that no URI has; percent-encode it",
            ));
        }
        self.values().refusals.style = RefusalStyle::Problem { type_base: base.into() };
        Ok(self)
    }

    /// Sets a function that renders refusals. Default: problem documents. The layer adds `Cache-Control: no-store` and
    /// `Retry-After`.
    ///
    /// The function gets the refusal and the head of the refused request, for example to read a request id or to
    /// negotiate the content. The handler gets the original head, so the layer copies the head of each request that it
    /// guards. Without this setting it copies nothing. If the layer stores a failure of the handler
    /// ([`OnError::Store`]), the function renders it once, for the first request, and duplicates get the same response.
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

    /// Sets the header field that tells the client's SDK whether a retry can help, `true` or `false`. Default: none;
    /// [`stripe`](Self::stripe) sets `Stripe-Should-Retry`. Other SDKs read `X-Should-Retry`.
    ///
    /// Every refusal has the field. A response of the handler has it, with `false`, if its status is 4xx or 5xx and the
    /// key does not become free and no attempt can take it over, because a retry would get the same response or a refusal.
    pub fn with_should_retry_header(mut self, name: Option<HeaderName>) -> Self {
        self.values().refusals.should_retry = name;
        self
    }

    /// 24 hours by default: how long an outcome is kept, from its completion. Take it longer than lease, longest handler and the
    /// client's last retry together. Zero: duplicates are held while the first is in flight, and run again afterwards.
    pub fn with_retention(mut self, retention: Duration) -> Self {
        self.values().engine.retention = retention;
        self
    }

    /// 30 s by default, 1 s at least: how long an owner may go without renewal before it counts as vanished. Renewed at a third
    /// of it while the handler runs, so a slow handler needs no longer one. A memory store has no use for it.
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.values().engine.set_lease(lease);
        self
    }

    /// Sets how long a duplicate waits for the request in flight before it gets 409; zero: 409 at once. Default: 30 s.
    ///
    /// This time covers all waits of one request until the request owns its key. Only the last operation of the store,
    /// or the decision about the claim of another request with this key, may take half a second longer. An owner whose
    /// key another attempt takes over waits once more for as long, for the outcome of that attempt. Set a time that is
    /// shorter than every timeout further out.
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.values().engine.wait = wait;
        self
    }

    /// Sets how many duplicates of one key may wait in this process. The next duplicate gets 409. A duplicate counts whether the
    /// request in flight runs in this process or in another one. Default: 16,384.
    pub fn with_max_waiters_per_key(mut self, duplicates: usize) -> Self {
        self.values().waiting.per_key = duplicates;
        self
    }

    /// Sets how many duplicates may wait in this process for all keys together. The next duplicate gets 409. Default: 65,536.
    pub fn with_max_waiters(mut self, duplicates: usize) -> Self {
        self.values().waiting.in_all = duplicates;
        self
    }

    /// Sets how many executions may continue in this process after their callers have left. At this limit, requests
    /// with new keys get 503 `overloaded` with `Retry-After`, and the layer claims nothing for them. Duplicates still
    /// get their responses. At least 1. Default: 16,384.
    ///
    /// The layer never stops an execution whose caller left, because its effect may have happened. Limits further out
    /// count callers, so without this limit a client that sends requests and hangs up could start any number of
    /// executions. Put a concurrency limit [inside this layer](Self#where-to-put-it), where it counts executions.
    pub fn with_max_detached(mut self, executions: usize) -> Self {
        self.values().engine.set_max_detached(executions);
        self
    }

    /// 5 s by default: how long one operation of the store may take before it counts as failed.
    pub fn with_store_timeout(mut self, timeout: Duration) -> Self {
        self.values().engine.store_timeout = timeout;
        self
    }

    /// Sets how long the layer repeats a completion while the store fails. Default: 10 s.
    ///
    /// After this time, under [`OnLost::Refuse`], the caller gets its response and the key stays claimed; otherwise the
    /// caller gets 503. The layer then goes on for twelve times as long (two minutes) without the caller: it tells the
    /// store how the handler ended, and asks what became of a transaction of the handler (`Lease::complete_in`, feature
    /// `postgres`). It does so for at most 1,024 executions, with 64 MiB of responses. An execution beyond that, or one
    /// that ended before a longer outage, is of unknown outcome.
    ///
    /// For the same time the layer tries to release a key whose claim got no reply, because the store may have granted
    /// the claim. While there are 1,024 such keys or more, the layer sends no further claims: a duplicate still gets
    /// its response, and any other request gets 503.
    pub fn with_completion_timeout(mut self, timeout: Duration) -> Self {
        self.values().engine.completion_timeout = timeout;
        self
    }

    /// 1 s by default: what `Retry-After` says in refusals that ask for patience, in whole seconds.
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.values().retry_after = after;
        self
    }

    /// Not by default: when the store fails at a claim, runs the request without any protection, every time it is sent.
    /// Each such request is reported as the event `unprotected`. If the store is misconfigured or the record is
    /// unreadable, the layer still refuses the request, with 500. An unprotected request has no attempt, so a handler
    /// that takes a [`Lease`](crate::Lease) as an extractor has to take an `Option` of it.
    pub fn dangerously_run_unprotected_when_the_store_fails(mut self) -> Self {
        self.values().run_unprotected = true;
        self
    }

    /// None by default: for one layer over a whole application, chooses the settings by the head of the request; `None`: not
    /// covered. The settings set on this layer itself are then used only for
    /// its gRPC methods, which go before the selector. Under a nested axum router the head's `uri` lacks the prefix;
    /// its extensions `OriginalUri` and `MatchedPath` have it.
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

    /// Returns the settings of this layer for [`with_settings_for`](Self::with_settings_for), without its own selector.
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

    /// The name of a client's key in the store, as these settings make it: for an operator who looks a key up or resolves one whose
    /// outcome is unknown.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::{protocol::{Resolution, ResolveResult, Status}, IdempotencyLayer, MemoryStore, Scope, Store};
    /// # async fn resolve(idempotency: IdempotencyLayer<MemoryStore>) -> Result<(), Box<dyn std::error::Error>> {
    /// let key = idempotency.storage_key(Some(&Scope::from("account 7")), "k-1")?;
    /// let Some(record) = idempotency.store().peek(&key).await? else {
    ///     return Err("no record: another scope, namespace or secret, or the retention is over".into());
    /// };
    /// if let Status::Lost | Status::Unknown = record.status {
    ///     // You looked at the bank: the payment was made. `Resolution::Absent` would free the key.
    ///     let answer = idempotency.outcome_of(http::Response::new("paid".into()));
    ///     let found = Resolution::Completed(answer, Duration::from_secs(86_400));
    ///     let resolved = idempotency.store().resolve(&key, record.fence, &found).await?;
    ///     assert_eq!(resolved, ResolveResult::Resolved, "another attempt has the key by now");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the key is malformed by these settings.
    pub fn storage_key(&self, scope: Option<&Scope>, key: &str) -> Result<StorageKey, KeyError> {
        let values = &self.values;
        let key = values.parser.parse(key.as_bytes())?;
        Ok(values.engine.space.storage_key(scope, &key))
    }

    /// Returns the outcome to pass to [`Store::resolve`]: the response as the layer stores it, without the header fields that
    /// are never replayed. A response with the mark [`StoreOutcomeOnly`](crate::StoreOutcomeOnly) or
    /// [`DoNotStore`](crate::DoNotStore) becomes a tombstone.
    #[must_use]
    pub fn outcome_of(&self, response: Response<Bytes>) -> Outcome {
        let values = &self.values;
        let (mut head, body) = values.collected(response);
        let judgement = values.happened(&head);
        values.advise(&mut head, judgement);
        values.outcome_of(None, &head, &body)
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &St {
        &self.shared.store
    }

    /// Returns a handle with which a graceful shutdown waits for executions whose callers have left. It covers this layer and
    /// its clones, also those with other settings. Another layer over the same store has a `Drain` of its own, so make all
    /// layers of a program as clones of one.
    #[must_use]
    pub fn drain(&self) -> Drain {
        self.shared.drain()
    }

    pub(super) fn values(&mut self) -> &mut Values {
        Arc::make_mut(&mut self.values)
    }
}

impl<St> IdempotencyLayer<St> {
    /// Returns the settings for single paths. They are made here and not earlier, so that they rest on all settings of this
    /// layer, whatever the order of the calls.
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
