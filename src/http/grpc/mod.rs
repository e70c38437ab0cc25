//! gRPC over HTTP/2: the parts of a message that are neither head nor opaque bytes.
//!
//! A gRPC response has status 200 whatever happened; its result is the field `grpc-status`, in the trailers or, if there
//! is no message, in the head. The body is a sequence of messages, each behind a prefix of five bytes, and each message
//! may be compressed by itself. Source: "gRPC over HTTP2" (`PROTOCOL-HTTP2.md`) and `compression.md` of the gRPC
//! repository.

//! Only an application with the feature `tonic` can set that its services speak gRPC. What depends on that setting is
//! compiled without the feature, too, unless it needs another crate.

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
pub(crate) use compression::{plain, Limits, MOST_COMPRESSED};
pub(crate) use framing::FirstMessage;
#[cfg(feature = "tonic")]
pub(crate) use marks::add_marks;
#[cfg(feature = "tonic")]
pub use marks::MarkStatus;
#[cfg(feature = "tonic")]
pub(crate) use refusal::render;
pub(crate) use replay::Accepted;
#[cfg(feature = "tonic")]
pub use response::grpc_response;
pub(crate) use response::{complete, is_response, is_typed};
#[cfg(feature = "postgres")]
pub(crate) use status::code_of;
pub(crate) use status::{result_of, Outcome};

/// The encoding of the compressed messages in a body.
pub(crate) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// The encodings that a client reads.
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
/// The result of a call.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
