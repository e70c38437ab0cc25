//! Renders refusals as gRPC statuses with the details of AIP-193.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::super::refusal::Refusal;
use super::super::refusal_kind::RefusalKind;

/// The domain of the reasons in `ErrorInfo`.
const DOMAIN: &str = "tower-idempotency";

/// The header field with the delay, in milliseconds, after which gRPC's own retries send the call
/// again, if their policy covers its status (gRPC proposal A6).
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// Renders a refusal as a response without messages, with the status in its head.
pub(crate) fn render(refusal: &Refusal) -> Response<Bytes> {
    let is_retryable = refusal.is_retryable();
    let mut details = ErrorDetails::new();
    let reason = refusal.code().replace('-', "_").to_ascii_uppercase();
    let metadata = HashMap::from([("retryable".to_owned(), is_retryable.to_string())]);
    details.set_error_info(reason, DOMAIN, metadata);
    let after = refusal.retry_after_seconds().filter(|_| is_retryable);
    if let Some(seconds) = after {
        details.set_retry_info(Some(Duration::from_secs(seconds)));
    }
    let message = format!("{}: {}", refusal.title(), refusal.detail());
    let mut response = Status::with_error_details(code(refusal.kind()), message, details).into_http();
    if let Some(millis) = after.and_then(|seconds| seconds.checked_mul(1_000)) {
        response.headers_mut().insert(PUSHBACK, HeaderValue::from(millis));
    }
    response
}

/// Returns the status code of a refusal. AIP-193 and gRPC's guide to status codes allow a client to
/// repeat `UNAVAILABLE` at once by itself, and `ABORTED` at a higher level. After
/// `FAILED_PRECONDITION`, a client must not repeat the call before a person or the client has
/// looked up the result.
const fn code(kind: RefusalKind) -> Code {
    match kind {
        RefusalKind::InvalidKey(_) | RefusalKind::MissingKey | RefusalKind::Mismatch => Code::InvalidArgument,
        RefusalKind::BodyTimeout => Code::DeadlineExceeded,
        RefusalKind::InvalidWebhook => Code::Unauthenticated,
        RefusalKind::InvalidWebhookMethod => Code::Unimplemented,
        RefusalKind::BodyTooLarge | RefusalKind::TooManyWaiters => Code::ResourceExhausted,
        RefusalKind::ResponseNotStored | RefusalKind::EncodingNotAccepted | RefusalKind::OutcomeUnknown => {
            Code::FailedPrecondition
        }
        RefusalKind::CheckUndecided | RefusalKind::Outstanding => Code::Aborted,
        RefusalKind::ResponseBroken
        | RefusalKind::HandlerFailed
        | RefusalKind::MissingScope
        | RefusalKind::NotCovered
        | RefusalKind::RecordUnreadable
        | RefusalKind::StoreMisconfigured => Code::Internal,
        RefusalKind::BodyBroken
        | RefusalKind::NotRun
        | RefusalKind::OutcomeUnrecorded
        | RefusalKind::Overloaded
        | RefusalKind::StoreFull
        | RefusalKind::StoreUnavailable => Code::Unavailable,
    }
}
