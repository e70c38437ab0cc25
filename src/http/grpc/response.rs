//! Recognises gRPC responses, and builds their trailers.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::super::body::Collected;
use super::GRPC_STATUS;

const TYPE: HeaderValue = HeaderValue::from_static("application/grpc");

/// The fields that belong into the trailers of a response with messages.
const OF_TRAILERS: [HeaderName; 3] = [
    GRPC_STATUS,
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status-details-bin"),
];

/// Returns a gRPC response with the status `OK` and one message, which is not compressed.
///
/// Use it for a response that you make outside of a handler. Examples are
/// [`Recovered::Happened`](crate::Recovered::Happened), and
/// [`outcome_of`](crate::IdempotencyLayer::outcome_of) when you resolve a key. Encode the message
/// first; prost has `encode_to_vec` for that. For an error, use [`tonic::Status::into_http`]
/// instead.
///
/// ```
/// use tower_idempotency::{grpc_response, IdempotencyLayer, MemoryStore, Recovered};
///
/// let layer = IdempotencyLayer::new(MemoryStore::new()).grpc().with_recovery(|lost| async move {
///     // You asked the bank, and it has booked the payment. This is the encoded receipt.
///     Recovered::Happened(grpc_response(b"\x0a\x03r-1"))
/// });
/// # let _ = layer;
/// ```
#[cfg(feature = "tonic")]
#[must_use]
pub fn grpc_response(message: &[u8]) -> http::Response<bytes::Bytes> {
    // The prefix always fits a real message, because gRPC gives its length four bytes.
    let prefix = super::framing::plain_prefix(message.len()).unwrap_or_default();
    let mut response = http::Response::new([&prefix[..], message].concat().into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, TYPE);
    headers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
    response
}

/// Returns whether a response of a gRPC server is a gRPC response, by its HTTP status and its head.
/// It is one if it is a 200 with gRPC's content type or a status. A server may have other routes
/// beside its gRPC services, and gRPC clients treat any other response as a failure.
pub(crate) fn is_response(status: StatusCode, head: &HeaderMap) -> bool {
    is_typed(status, head) || (status == StatusCode::OK && head.contains_key(GRPC_STATUS))
}

/// Returns whether a response of any server is a gRPC response. Only the content type shows that,
/// because an application may use the field `grpc-status` in other responses too.
pub(crate) fn is_typed(status: StatusCode, head: &HeaderMap) -> bool {
    status == StatusCode::OK && head.get(CONTENT_TYPE).is_some_and(is_grpc_type)
}

/// Returns whether a content type is `application/grpc`, alone, with a suffix (`+proto`) or with
/// parameters. The types of gRPC-Web, such as `application/grpc-web`, do not match, because the
/// status of a gRPC-Web response is part of its body.
fn is_grpc_type(content_type: &HeaderValue) -> bool {
    const NAME: &[u8] = b"application/grpc";
    let parts = content_type.as_bytes().split_at_checked(NAME.len());
    parts.is_some_and(|(name, rest)| {
        let is_end = matches!(rest.trim_ascii_start().first(), None | Some(b'+' | b';'));
        is_end && name.eq_ignore_ascii_case(NAME)
    })
}

/// Sets a field if it is missing. Leaves a full header map unchanged.
fn set_default(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    if !headers.contains_key(&name) {
        drop(headers.try_insert(name, value));
    }
}

/// Completes a response with the content type and the status that clients expect.
///
/// * If the content type is missing, it becomes `application/grpc`.
/// * If the body has trailers, nothing else changes.
/// * The status of a response with messages moves from its head to its trailers, where clients look
///   for it. If the head has no status, the status is `OK`.
/// * The status of a response without messages stays in the head, and is `OK` if it is missing.
pub(crate) fn complete(head: &mut HeaderMap, body: Collected) -> Collected {
    set_default(head, CONTENT_TYPE, TYPE);
    if body.trailers.is_some() {
        return body;
    }
    let bytes = body.bytes;
    if bytes.is_empty() {
        set_default(head, GRPC_STATUS, HeaderValue::from_static("0"));
        return Collected { bytes, trailers: None };
    }
    let mut trailers = HeaderMap::new();
    for name in OF_TRAILERS {
        if let Some(value) = head.remove(&name) {
            trailers.insert(name, value);
        }
    }
    set_default(&mut trailers, GRPC_STATUS, HeaderValue::from_static("0"));
    let trailers = Some(trailers);
    Collected { bytes, trailers }
}
