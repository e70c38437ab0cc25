//! gRPC over HTTP/2: the parts of a message that are neither head nor opaque bytes.
//!
//! A gRPC response always has the HTTP status 200. The result of the call is the field
//! `grpc-status`. It is in the trailers, or in the head if there is no message. The body is a
//! sequence of messages, each after a prefix of five bytes. Each message may be compressed
//! separately. Source: "gRPC over HTTP2" (`PROTOCOL-HTTP2.md`) and `compression.md` of the gRPC
//! repository.
//!
//! Only an application with the feature `tonic` can set that its services speak gRPC. Code that
//! depends on that setting is also compiled without the feature, unless it needs another crate.

mod compression;
#[cfg(feature = "tonic")]
mod decoder;
mod framing;
#[cfg(feature = "tonic")]
mod marks;
#[cfg(feature = "tonic")]
mod refusal;
mod replay;
mod response;
mod status;

use http::header::HeaderName;

#[cfg(feature = "tonic")]
pub(crate) use compression::{Limits, MOST_COMPRESSED, plain};
#[cfg(feature = "tonic")]
pub use marks::MarkStatus;
#[cfg(feature = "tonic")]
pub(crate) use marks::add_marks;
#[cfg(feature = "tonic")]
pub(crate) use refusal::render;
pub(crate) use replay::Accepted;
#[cfg(feature = "tonic")]
pub use response::grpc_response;
pub(crate) use response::{complete, is_response, is_typed};
#[cfg(feature = "postgres")]
pub(crate) use status::code_of;
pub(crate) use status::{Outcome, result_of};

/// The header field with the encoding of the compressed messages in a body.
pub(crate) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// The header field with the encodings that a client accepts.
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
/// The header field with the result of a call.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
