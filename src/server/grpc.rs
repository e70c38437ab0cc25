//! Settings of the layer for gRPC services.

use std::sync::Arc;

use http::Method;

use super::layer::IdempotencyLayer;
use super::policy::Statuses;
use crate::http::{BodyForm, IDEMPOTENCY_KEY, RefusalStyle};
use crate::store::Store;

impl<St: Store> IdempotencyLayer<St> {
    /// Sets the layer up for gRPC services.
    ///
    /// Call this first, because it replaces the header field, the methods, the fingerprint of
    /// bodies, [`store_if`](Self::store_if) and the refusals that were set before.
    ///
    /// * POST only; the key is the metadata `idempotency-key`, and optional.
    /// * The status of the call decides, in the head or in the trailers of the response. The layer
    ///   stores `OK`, `INVALID_ARGUMENT`, `NOT_FOUND`, `ALREADY_EXISTS`, `FAILED_PRECONDITION` and
    ///   `OUT_OF_RANGE`. It frees the key after `CANCELLED`, `DEADLINE_EXCEEDED`,
    ///   `PERMISSION_DENIED`, `RESOURCE_EXHAUSTED`, `ABORTED`, `UNIMPLEMENTED`, `UNAVAILABLE` and
    ///   `UNAUTHENTICATED`. [`on_error`](Self::on_error) decides about `UNKNOWN`, `INTERNAL`,
    ///   `DATA_LOSS` and a response without a status. The rules of HTTP apply to a response whose
    ///   HTTP status is not 200. They also apply to one with neither the content type
    ///   `application/grpc` nor a gRPC status in its head, such as that of a JSON route.
    ///   [`store_if`](Self::store_if) replaces all these rules, and sees only the head. The marks
    ///   of a handler ([`MarkStatus`](crate::MarkStatus)) take precedence over both.
    /// * Fingerprints cover the decompressed messages (gzip, deflate and zstd, up to the [limit of
    ///   bodies](Self::with_body_limit) and 1,024 compressed messages), so a retry may use another
    ///   compression. For a body that cannot be decompressed, the fingerprint covers its bytes and
    ///   the name of its encoding. Of the metadata, fingerprints include only credentials and host
    ///   by default, and never `grpc-timeout`.
    /// * A stored response in an encoding that a client does not list in `grpc-accept-encoding` is
    ///   decompressed for it, up to 16 MiB and 1,024 compressed messages. Beyond that, the client
    ///   gets `ENCODING_NOT_ACCEPTED`.
    /// * A response that has not ended 100 ms after its first message is a stream. The layer stores
    ///   a tombstone, and the caller gets the stream, including the first message. The layer stores
    ///   a response that ends in time, whether it has one message or many.
    /// * Refusals are gRPC statuses, as [`with_grpc_refusals`](Self::with_grpc_refusals) makes
    ///   them.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    /// # fn serve(payments: tonic::service::Routes) {
    /// let idempotency = IdempotencyLayer::new(MemoryStore::new()).grpc();
    /// let server = tonic::transport::Server::builder().layer(idempotency).add_routes(payments);
    /// # let _ = server;
    /// # }
    /// ```
    pub fn grpc(mut self) -> Self {
        let values = self.values();
        values.set_header(IDEMPOTENCY_KEY);
        values.policy.store_if = None;
        values.policy.statuses = Statuses::Grpc;
        values.fingerprinting.body = BodyForm::Grpc;
        self.with_methods([Method::POST]).with_grpc_refusals()
    }

    /// Renders refusals as gRPC statuses, in responses without messages. Default: problem
    /// documents.
    ///
    /// The text of the status explains how to proceed. The details have an `ErrorInfo` with the
    /// [code](crate::Refusal::code) as its reason (such as `KEY_REUSED`), the domain
    /// `tower-idempotency` and the metadata `retryable`. They also have a `RetryInfo` if the client
    /// is to retry after a delay.
    ///
    /// | status | reasons |
    /// |---|---|
    /// | `INVALID_ARGUMENT` | `KEY_INVALID`, `KEY_MISSING`, `KEY_REUSED` |
    /// | `ABORTED` | `REQUEST_OUTSTANDING`, `CHECK_UNDECIDED`: retry after the delay |
    /// | `FAILED_PRECONDITION` | `OUTCOME_UNKNOWN`, `RESPONSE_NOT_STORED`, `ENCODING_NOT_ACCEPTED`: look up the result |
    /// | `UNAVAILABLE` | `STORE_UNAVAILABLE`, `STORE_FULL`, `OVERLOADED`, `NOT_RUN`, and `OUTCOME_UNKNOWN` with `retryable`: retry after the delay |
    /// | `UNAVAILABLE` | `BODY_BROKEN`: retry; there is no delay |
    /// | `RESOURCE_EXHAUSTED` | `TOO_MANY_WAITERS`: retry after the delay |
    /// | `RESOURCE_EXHAUSTED` | `BODY_TOO_LARGE` |
    /// | `DEADLINE_EXCEEDED` | `BODY_TIMEOUT`: retry; there is no delay |
    /// | `INTERNAL` | `HANDLER_FAILED`: retry if it is `retryable`; there is no delay |
    /// | `INTERNAL` | `RESPONSE_BROKEN`, `RECORD_UNREADABLE`, `STORE_MISCONFIGURED`, `SCOPE_MISSING`, `NOT_COVERED` |
    pub fn with_grpc_refusals(mut self) -> Self {
        self.values().refusals.style = RefusalStyle::Grpc;
        self
    }

    /// Adds settings for one gRPC method, named as in `/pay.Payments/Charge`. `configure` gets a
    /// layer with all settings of this layer, also those that you set later, and returns it with
    /// the changes for the method.
    ///
    /// These settings take precedence over those of [`with_settings_for`](Self::with_settings_for)
    /// and of the layer itself, which apply to all other methods. On a server for gRPC and HTTP,
    /// whose layer has the settings of HTTP, `configure` must begin with [`grpc`](Self::grpc):
    /// `add_grpc_method(path, |method| method.grpc().require_key())`. Otherwise the rules of HTTP
    /// apply, and the layer stores a response with the status `UNAVAILABLE`. Or add the method to
    /// the layer for gRPC before you take its [`settings`](Self::settings) for the selector. If the
    /// layer itself and the chosen settings both have the method, the layer's settings count.
    ///
    /// A misspelled name changes nothing, and the layer does not report it. The name of a service
    /// is a constant of the server that tonic generates:
    /// `format!("/{}/Charge", PaymentsServer::<Bank>::NAME)` or `SERVICE_NAME`.
    ///
    /// ```
    /// use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore};
    ///
    /// let idempotency = IdempotencyLayer::new(MemoryStore::new())
    ///     .grpc()
    ///     .add_grpc_method("/pay.Payments/Charge", |charge| {
    ///         charge.require_key().with_retention(Duration::from_secs(7 * 86_400))
    ///     })
    ///     // Every response of this method is a stream, so its first message need not wait.
    ///     .add_grpc_method("/pay.Payments/Watch", |watch| watch.with_stream_types(["application/grpc"]));
    /// # let _ = idempotency;
    /// ```
    pub fn add_grpc_method(mut self, path: &str, configure: impl Fn(Self) -> Self + Send + Sync + 'static) -> Self {
        let path = format!("/{}", path.trim_start_matches('/'));
        self.by_path.push((path, Arc::new(configure)));
        self
    }
}
