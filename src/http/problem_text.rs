//! The texts of each refusal.

use http::StatusCode;

use super::refusal_kind::RefusalKind;
use crate::protocol::KeyError;

/// The status, the texts and the retry advice of a refusal.
#[derive(Clone, Copy)]
pub(super) struct ProblemText {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) title: &'static str,
    pub(super) detail: &'static str,
    pub(super) retryable: bool,
}

impl RefusalKind {
    pub(super) const fn problem_text(self) -> ProblemText {
        match self {
            RefusalKind::ResponseBroken => RESPONSE_BROKEN,
            RefusalKind::ResponseNotStored => RESPONSE_NOT_STORED,
            RefusalKind::BodyBroken => BODY_BROKEN,
            RefusalKind::BodyTimeout => BODY_TIMEOUT,
            RefusalKind::BodyTooLarge => BODY_TOO_LARGE,
            RefusalKind::CheckUndecided => CHECK_UNDECIDED,
            RefusalKind::EncodingNotAccepted => ENCODING_NOT_ACCEPTED,
            RefusalKind::HandlerFailed => HANDLER_FAILED,
            RefusalKind::InvalidKey(reason) => ProblemText {
                detail: KeyError::new(reason).detail(),
                ..INVALID_KEY
            },
            RefusalKind::InvalidWebhook => INVALID_WEBHOOK,
            RefusalKind::InvalidWebhookMethod => INVALID_WEBHOOK_METHOD,
            RefusalKind::MissingKey => MISSING_KEY,
            RefusalKind::MissingScope => MISSING_SCOPE,
            RefusalKind::Mismatch => MISMATCH,
            RefusalKind::NotCovered => NOT_COVERED,
            RefusalKind::NotRun => NOT_RUN,
            RefusalKind::Outstanding => OUTSTANDING,
            RefusalKind::OutcomeUnknown => OUTCOME_UNKNOWN,
            RefusalKind::OutcomeUnrecorded => OUTCOME_UNRECORDED,
            RefusalKind::Overloaded => OVERLOADED,
            RefusalKind::RecordUnreadable => RECORD_UNREADABLE,
            RefusalKind::StoreFull => STORE_FULL,
            RefusalKind::StoreMisconfigured => STORE_MISCONFIGURED,
            RefusalKind::StoreUnavailable => STORE_UNAVAILABLE,
            RefusalKind::TooManyWaiters => TOO_MANY_WAITERS,
        }
    }
}

const RESPONSE_BROKEN: ProblemText = ProblemText {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "response-broken",
    title: "The response broke off",
    detail: "The request was processed, but its response broke off and could not be stored. Look up the result; \
                         sending the request again does not process it again.",
    retryable: false,
};

const RESPONSE_NOT_STORED: ProblemText = ProblemText {
    status: StatusCode::CONFLICT,
    code: "response-not-stored",
    title: "The response was not stored",
    detail: "A request with this key was processed, and its response is not available for replay. Look up the \
                         result; the request is not processed again.",
    retryable: false,
};

const BODY_BROKEN: ProblemText = ProblemText {
    status: StatusCode::BAD_REQUEST,
    code: "body-broken",
    title: "The request body broke off",
    detail: "The request body could not be read to its end. Nothing was processed; send the request again.",
    retryable: true,
};

const BODY_TIMEOUT: ProblemText = ProblemText {
    status: StatusCode::REQUEST_TIMEOUT,
    code: "body-timeout",
    title: "The request body took too long",
    detail: "The request body did not arrive in time. Nothing was processed; send the request again.",
    retryable: true,
};

const BODY_TOO_LARGE: ProblemText = ProblemText {
    status: StatusCode::PAYLOAD_TOO_LARGE,
    code: "body-too-large",
    title: "The request body is too large",
    detail: "A request with an idempotency key may not have a body as long as this one. Nothing was processed.",
    retryable: false,
};

const CHECK_UNDECIDED: ProblemText = ProblemText {
    status: StatusCode::CONFLICT,
    code: "check-undecided",
    title: "The outcome is not known yet",
    detail: "An earlier attempt with this key was interrupted, and the server could not find out whether it took effect. Send \
             the request again later with the same key.",
    retryable: true,
};

const ENCODING_NOT_ACCEPTED: ProblemText = ProblemText {
    status: StatusCode::NOT_ACCEPTABLE,
    code: "encoding-not-accepted",
    title: "The stored response has another encoding",
    detail: "A request with this key was processed, and its response is stored in an encoding that this request does not \
             accept. Send the request again and list the encoding of the first response in grpc-accept-encoding.",
    retryable: false,
};

const HANDLER_FAILED: ProblemText = ProblemText {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "handler-failed",
    title: "Internal server error",
    detail: "The request failed inside the server.",
    retryable: true,
};

const INVALID_KEY: ProblemText = ProblemText {
    status: StatusCode::BAD_REQUEST,
    code: "key-invalid",
    title: "Idempotency-Key is invalid",
    detail: "",
    retryable: false,
};

const INVALID_WEBHOOK: ProblemText = ProblemText {
    status: StatusCode::UNAUTHORIZED,
    code: "webhook-invalid",
    title: "The webhook cannot be verified",
    detail: "Its signature, its timestamp or its id is missing or wrong. Nothing was processed.",
    retryable: false,
};

const INVALID_WEBHOOK_METHOD: ProblemText = ProblemText {
    status: StatusCode::METHOD_NOT_ALLOWED,
    code: "webhook-method",
    title: "A webhook must use POST",
    detail: "Signatures do not cover the method, so the server accepts POST only. Nothing was processed.",
    retryable: false,
};

const MISSING_KEY: ProblemText = ProblemText {
    status: StatusCode::BAD_REQUEST,
    code: "key-missing",
    title: "Idempotency-Key is missing",
    detail: "This operation is idempotent and requires a key. Choose a new unique one for each operation and send \
                         it again with every retry.",
    retryable: false,
};

const MISSING_SCOPE: ProblemText = ProblemText {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "scope-missing",
    title: "The owner of the key is not known",
    detail: "The server could not determine who owns this key. Nothing was processed.",
    retryable: false,
};

const MISMATCH: ProblemText = ProblemText {
    status: StatusCode::UNPROCESSABLE_ENTITY,
    code: "key-reused",
    title: "Idempotency-Key is already used",
    detail: "This key belongs to another request or to other credentials. Repeat that request unchanged, or choose a new key for \
                         this one.",
    retryable: false,
};

const NOT_COVERED: ProblemText = ProblemText {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "not-covered",
    title: "The operation is not idempotent here",
    detail: "The server needs a key here, but no idempotency layer covers this request. Nothing was processed.",
    retryable: false,
};

const NOT_RUN: ProblemText = ProblemText {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "not-run",
    title: "The service did not accept the request",
    detail: "The service could not accept the request. Nothing was processed. Send the request again later.",
    retryable: true,
};

const OUTSTANDING: ProblemText = ProblemText {
    status: StatusCode::CONFLICT,
    code: "request-outstanding",
    title: "A request is outstanding for this Idempotency-Key",
    detail: "A request with this key is still being processed. Send the request again later to get its response.",
    retryable: true,
};

const OUTCOME_UNKNOWN: ProblemText = ProblemText {
    status: StatusCode::CONFLICT,
    code: "outcome-unknown",
    title: "The outcome is unknown",
    detail: "An earlier attempt with this key was interrupted, and whether it took effect is not known. Look up \
                         the result before you choose a new key.",
    retryable: false,
};

const OUTCOME_UNRECORDED: ProblemText = ProblemText {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "outcome-unknown",
    title: "The outcome is unknown",
    detail: "The request was processed, but its outcome could not be recorded. Send it again with the same key.",
    retryable: true,
};

const OVERLOADED: ProblemText = ProblemText {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "overloaded",
    title: "No new requests are processed for now",
    detail: "The server still works on too many requests whose clients have disconnected. This request was not processed; \
         send it again later.",
    retryable: true,
};

const RECORD_UNREADABLE: ProblemText = ProblemText {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "record-unreadable",
    title: "The record of this key cannot be read",
    detail: "The server holds a record of this key and cannot read it. An earlier request with this key may have been processed; look \
                         up the result. Sending the request again does not process it again.",
    retryable: false,
};

const STORE_FULL: ProblemText = ProblemText {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "store-full",
    title: "No new keys are accepted for now",
    detail: "The server cannot record another key at the moment. Nothing was processed; send the request again later.",
    retryable: true,
};

const STORE_MISCONFIGURED: ProblemText = ProblemText {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "store-misconfigured",
    title: "Keys cannot be checked",
    detail: "The server is not set up to check this key. Sending the request again does not help until the operator \
             of the server has corrected the setting.",
    retryable: false,
};

const STORE_UNAVAILABLE: ProblemText = ProblemText {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "store-unavailable",
    title: "Keys cannot be checked for now",
    detail: "The server cannot check this key at the moment. Nothing was processed; send the request again later.",
    retryable: true,
};

const TOO_MANY_WAITERS: ProblemText = ProblemText {
    status: StatusCode::CONFLICT,
    code: "too-many-waiters",
    title: "A request is outstanding for this Idempotency-Key",
    detail: "Too many requests are already waiting for outstanding ones. Send the request again later.",
    retryable: true,
};
