//! Marks: response extensions by which a handler decides what the layer does with one response.

use std::time::Duration;

use http::response;

/// Response extension: the layer stores this response, whatever its status.
///
/// In axum, a mark implements `IntoResponseParts`, so a handler or an error type can return it in a
/// tuple:
///
/// ```
/// # #[cfg(feature = "axum")]
/// # mod example {
/// use axum::http::StatusCode;
/// use axum::response::{IntoResponse, Response};
/// use tower_idempotency::{DoNotStore, StoreResponse};
///
/// enum PaymentError {
///     BankIsClosed,
///     Declined,
/// }
///
/// impl IntoResponse for PaymentError {
///     fn into_response(self) -> Response {
///         match self {
///             // Nothing happened, so the same request may run again.
///             Self::BankIsClosed => (StatusCode::CONFLICT, DoNotStore, "the bank is closed").into_response(),
///             // This is final, although the status says "bad gateway".
///             Self::Declined => (StatusCode::BAD_GATEWAY, StoreResponse, "declined by the bank").into_response(),
///         }
///     }
/// }
///
/// async fn pay() -> Result<&'static str, PaymentError> {
///     Err(PaymentError::Declined)
/// }
///
/// // The error type of another crate takes a mark in the return type.
/// async fn refund() -> Result<&'static str, (DoNotStore, StatusCode)> {
///     Err((DoNotStore, StatusCode::CONFLICT))
/// }
/// # }
/// ```
///
/// Elsewhere, insert the mark into the extensions:
///
/// ```
/// use tower_idempotency::StoreResponse;
///
/// let mut response = http::Response::new("declined by the bank");
/// *response.status_mut() = http::StatusCode::BAD_GATEWAY;
/// response.extensions_mut().insert(StoreResponse);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a mark has no fields")]
pub struct StoreResponse;

/// Response extension: the layer does not store this response, and the next request with the key
/// runs again.
///
/// Use it for a response without an effect, such as "try again later". It takes precedence over
/// every other mark. The layer frees the key and then streams the response, so a caller may get its
/// first bytes before the rest exists. On a response that is
/// [recovered](crate::Recovered::Happened) or [resolved](crate::IdempotencyLayer::outcome_of), the
/// mark means the same as [`StoreOutcomeOnly`], because the request took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a mark has no fields")]
pub struct DoNotStore;

/// Response extension: the layer stores that the request took effect, but not its response.
///
/// Use it for one-time secrets that must not be stored, such as a new API key. The layer stores a
/// tombstone, whatever the status, and then passes the response to its caller. Every duplicate gets
/// 409 `response-not-stored`, including one that was waiting, and the handler never runs again.
///
/// [`webhooks`](crate::IdempotencyLayer::webhooks) differs: a duplicate of a 2xx gets a bare 200. For
/// any other status, the layer stores the refusal 500 `handler-failed` instead of a tombstone, and a
/// duplicate gets that refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a mark has no fields")]
pub struct StoreOutcomeOnly;

/// Response extension: the layer does not wait for the end of this response's body.
///
/// Use it for a response whose body takes long or never ends. If the response is one that the layer
/// stores, the layer stores a tombstone instead, and the body streams from its first byte.
/// Duplicates get 409 `response-not-stored`, and the handler never runs again. Without this mark
/// the layer recognises a stream by its `Content-Type`; see
/// [`with_stream_types`](crate::IdempotencyLayer::with_stream_types).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a mark has no fields")]
pub struct StreamResponse;

/// Response extension: the store holds this outcome for this time, counted from its completion.
/// Default: the layer's [retention](crate::IdempotencyLayer::with_retention).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a mark has this one field")]
pub struct StoreFor(pub Duration);

/// Whether the store must not have the content of a response whose request took effect. The mark
/// [`DoNotStore`] cannot free the key after an effect, so it means the same as
/// [`StoreOutcomeOnly`].
pub(super) fn is_not_for_store(head: &response::Parts) -> bool {
    let marks = &head.extensions;
    marks.get::<StoreOutcomeOnly>().is_some() || marks.get::<DoNotStore>().is_some()
}

/// Returns the retention that the handler set for its outcome.
pub(super) fn retention_of(head: &response::Parts) -> Option<Duration> {
    head.extensions.get().map(|StoreFor(retention)| *retention)
}

#[cfg(feature = "axum")]
mod parts {
    use std::convert::Infallible;

    use axum::response::{IntoResponseParts, ResponseParts};

    use super::{DoNotStore, StoreFor, StoreOutcomeOnly, StoreResponse, StreamResponse};

    macro_rules! response_part {
        ($($mark:ty),*) => {$(
            impl IntoResponseParts for $mark {
                type Error = Infallible;

                fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Infallible> {
                    parts.extensions_mut().insert(self);
                    Ok(parts)
                }
            }
        )*};
    }

    response_part!(DoNotStore, StoreResponse, StoreFor, StoreOutcomeOnly, StreamResponse);
}
