//! Recognises gRPC responses, and makes them from bytes without trailers.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::super::body::Collected;
use super::GRPC_STATUS;

const TYPE: HeaderValue = HeaderValue::from_static("application/grpc");

/// The fields that stand in the trailers of a response with messages.
const OF_TRAILERS: [HeaderName; 3] = [
    GRPC_STATUS,
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status-details-bin"),
];

/// Returns a gRPC response of one message, which is not compressed, with the status `OK`.
///
/// For a response that you make outside of a handler: for [`Recovered::Happened`](crate::Recovered::Happened), and for
/// [`outcome_of`](crate::IdempotencyLayer::outcome_of) when you resolve a key. Encode the message first, with prost by
/// `encode_to_vec`. For an error, take [`tonic::Status::into_http`] instead.
///
/// ```
/// use tower_idempotency::{grpc_response, IdempotencyLayer, MemoryStore, Recovered};
///
/// let layer = IdempotencyLayer::new(MemoryStore::new()).grpc().with_recovery(|lost| async move {
///     // You asked the bank, and it has booked the payment: here is the encoded receipt.
///     Recovered::Happened(grpc_response(b"\x0a\x03r-1"))
/// });
/// # let _ = layer;
/// ```
#[cfg(feature = "tonic")]
#[must_use]
pub fn grpc_response(message: &[u8]) -> http::Response<bytes::Bytes> {
    // No message is longer: its length has four bytes.
    let prefix = super::framing::plain_prefix(message.len()).unwrap_or_default();
    let mut response = http::Response::new([&prefix[..], message].concat().into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, TYPE);
    headers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
    response
}

/// Whether a response of a server for gRPC is one of gRPC, by its HTTP status and its head: a 200 that has gRPC's content
/// type or a status. A server may have other routes beside its gRPC services, and gRPC clients take any other response for
/// a failure.
pub(crate) fn is_response(status: StatusCode, head: &HeaderMap) -> bool {
    is_typed(status, head) || (status == StatusCode::OK && head.contains_key(GRPC_STATUS))
}

/// Whether a response of any server is one of gRPC. Only the content type shows it, because an application may use the
/// field `grpc-status` in other responses, too.
pub(crate) fn is_typed(status: StatusCode, head: &HeaderMap) -> bool {
    status == StatusCode::OK && head.get(CONTENT_TYPE).is_some_and(is_grpc_type)
}

/// Whether a content type is `application/grpc`, alone, with a suffix (`+proto`) or with parameters. The types of gRPC-Web,
/// such as `application/grpc-web`, are others, because the status of a gRPC-Web response is a part of its body.
fn is_grpc_type(content_type: &HeaderValue) -> bool {
    const NAME: &[u8] = b"application/grpc";
    let parts = content_type.as_bytes().split_at_checked(NAME.len());
    parts.is_some_and(|(name, rest)| {
        let is_end = matches!(rest.trim_ascii_start().first(), None | Some(b'+' | b';'));
        is_end && name.eq_ignore_ascii_case(NAME)
    })
}

/// Sets a field that is missing. A header map that is full stays as it is.
fn set_default(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    if !headers.contains_key(&name) {
        drop(headers.try_insert(name, value));
    }
}

/// Gives a response the content type and the status that clients expect. Without a content type, it is
/// `application/grpc`. Unless the body has trailers, moves the status of a response with messages from its head to its
/// trailers, where clients look for it. If the head has no status, the status is `OK`. The status of a response without
/// messages stays in the head.
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
