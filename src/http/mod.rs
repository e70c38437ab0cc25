//! Conversions between HTTP and the protocol: from header field to key, from request to
//! fingerprint, and from response to outcome and back. Also reads bodies within bounds and renders
//! refusals. This module knows no store.

mod authority;
mod body;
mod fingerprint;
mod first_message;
mod grpc;
mod key;
mod length;
mod multipart;
mod problem_text;
mod refusal;
mod refusal_kind;
mod rendering;
mod request_body;
mod response;
mod service;
mod streams;

pub(crate) use body::{BodyBounds, Collect, Collected, Shortfall, collect, collect_messages};
pub use body::{BufferedBody, RebuildBody};
#[cfg(feature = "webhooks")]
pub(crate) use fingerprint::uri_as_received;
pub(crate) use fingerprint::{BodyForm, Fingerprinting};
#[cfg(feature = "tonic")]
pub(crate) use grpc::add_marks;
#[cfg(feature = "postgres")]
pub(crate) use grpc::code_of as grpc_code;
pub(crate) use grpc::{
    Accepted, Outcome as GrpcOutcome, complete as complete_grpc, is_response as is_grpc_response,
    is_typed as is_typed_grpc, result_of as grpc_result,
};
#[cfg(feature = "tonic")]
pub use grpc::{MarkStatus, grpc_response};
pub(crate) use key::{FoundKey, IDEMPOTENCY_KEY, find_key};
pub(crate) use length::{has_body, is_cut_short};
pub use refusal::Refusal;
pub(crate) use refusal_kind::Effect;
pub use refusal_kind::RefusalKind;
pub(crate) use rendering::{RefusalStyle, Rendering};
pub(crate) use request_body::{Checked, collect_request};
pub(crate) use response::{ResponseHeaders, reframe, reframe_stream};
pub(crate) use service::HttpService;
pub(crate) use streams::{StreamTypes, is_stream};
