//! Refusals: responses that the layer itself returns.

use std::borrow::Cow;
use std::time::Duration;

use http::StatusCode;
use http::header::HeaderName;

use super::refusal_kind::{Effect, RefusalKind};

/// The reason why the layer itself returned a response. It is an extension of every such response,
/// for logs and for outer layers.
///
/// ```
/// # use tower_idempotency::{Refusal, RefusalKind};
/// fn log<B>(response: &http::Response<B>) {
///     if let Some(refusal) = response.extensions().get::<Refusal>() {
///         println!("refused: {}", refusal.code());
///     }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub(super) kind: RefusalKind,
    pub(super) retry_after: Option<Duration>,
    /// Whether the failure is final for this key, so that a retry does not help.
    pub(super) is_final: bool,
    /// Whether the handler had started when the layer refused the request.
    after_run: bool,
    /// The header field with the key, if it is not `Idempotency-Key`. Set when the refusal is
    /// rendered.
    pub(super) header: Option<Box<HeaderName>>,
}

impl Refusal {
    pub(crate) const fn new(kind: RefusalKind) -> Self {
        Self {
            kind,
            retry_after: None,
            is_final: false,
            after_run: false,
            header: None,
        }
    }

    /// Returns a refusal that is final for this key. Retries get it again, or `outcome-unknown`.
    pub(crate) const fn final_for_key(kind: RefusalKind) -> Self {
        Self {
            kind,
            retry_after: None,
            is_final: true,
            after_run: false,
            header: None,
        }
    }

    pub(crate) const fn retry_after(kind: RefusalKind, after: Duration) -> Self {
        Self {
            kind,
            retry_after: Some(after),
            is_final: false,
            after_run: false,
            header: None,
        }
    }

    /// Marks this refusal as one of a request whose handler had started. Another attempt took the
    /// key over, so the kind alone does not describe the effect of this request.
    pub(crate) const fn after_run(mut self) -> Self {
        self.after_run = true;
        self
    }

    /// Returns the effect of the request, as far as this refusal shows it.
    pub(crate) const fn effect(&self) -> Effect {
        match self.kind.effect() {
            Effect::Nothing if self.after_run => Effect::Unknown,
            effect => effect,
        }
    }

    /// Returns the reason.
    #[must_use]
    pub const fn kind(&self) -> RefusalKind {
        self.kind
    }

    /// Returns the status of the problem document.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.kind.problem_text().status
    }

    /// Returns a stable identifier of the reason, the `code` member of a problem document.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.kind.problem_text().code
    }

    /// Returns the reason as a title. Three titles are those of
    /// draft-ietf-httpapi-idempotency-key-header-07 section 2.7. If the layer reads the key from
    /// [another header field](crate::IdempotencyLayer::with_header), the title names that field, in
    /// lower case.
    #[must_use]
    pub fn title(&self) -> Cow<'static, str> {
        let title = self.kind.problem_text().title;
        match &self.header {
            None => Cow::Borrowed(title),
            Some(header) => Cow::Owned(title.replace("Idempotency-Key", header.as_str())),
        }
    }

    /// Returns what happened and what to do about it. The text contains nothing from any request.
    #[must_use]
    pub fn detail(&self) -> &'static str {
        self.kind.problem_text().detail
    }

    /// Returns whether the same request with the same key may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.kind.problem_text().retryable && !self.is_final
    }

    /// Returns the value of the `Retry-After` header: the delay before a retry in seconds, rounded
    /// up, at least 1.
    #[must_use]
    pub fn retry_after_seconds(&self) -> Option<u64> {
        let after = self.retry_after?;
        let rounded_up = after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0));
        Some(rounded_up.max(1))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use futures::executor::block_on;
    use http::Response;
    use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
    use http_body_util::{BodyExt, Full};
    use serde_json::Value;

    use super::super::rendering::{RefusalStyle, Renderer, Rendering};
    use super::*;
    use crate::protocol::InvalidKey;

    const ALL: [RefusalKind; 25] = [
        RefusalKind::ResponseBroken,
        RefusalKind::ResponseNotStored,
        RefusalKind::BodyBroken,
        RefusalKind::BodyTimeout,
        RefusalKind::BodyTooLarge,
        RefusalKind::CheckUndecided,
        RefusalKind::EncodingNotAccepted,
        RefusalKind::HandlerFailed,
        RefusalKind::InvalidKey(InvalidKey::NotAString),
        RefusalKind::MissingKey,
        RefusalKind::MissingScope,
        RefusalKind::Mismatch,
        RefusalKind::NotCovered,
        RefusalKind::NotRun,
        RefusalKind::Outstanding,
        RefusalKind::OutcomeUnknown,
        RefusalKind::OutcomeUnrecorded,
        RefusalKind::Overloaded,
        RefusalKind::RecordUnreadable,
        RefusalKind::StoreFull,
        RefusalKind::StoreMisconfigured,
        RefusalKind::StoreUnavailable,
        RefusalKind::TooManyWaiters,
        RefusalKind::InvalidWebhook,
        RefusalKind::InvalidWebhookMethod,
    ];

    fn rendered(refusal: Refusal, style: &RefusalStyle) -> (http::response::Parts, Bytes) {
        let rendering = Rendering {
            style: style.clone(),
            ..Rendering::default()
        };
        rendered_as(refusal, &rendering)
    }

    fn rendered_as(refusal: Refusal, rendering: &Rendering) -> (http::response::Parts, Bytes) {
        let head = http::Request::post("/pay").body(()).unwrap().into_parts().0;
        let response = refusal.into_response::<Full<Bytes>>(rendering, Some(&head));
        let (parts, body) = response.into_parts();
        (parts, block_on(body.collect()).unwrap().to_bytes())
    }

    #[test]
    fn every_refusal_is_a_problem_document_that_is_never_cached() {
        for kind in ALL {
            let (parts, body) = rendered(Refusal::new(kind), &RefusalStyle::default());
            let document: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(parts.headers[CONTENT_TYPE], "application/problem+json");
            assert_eq!(parts.headers[CACHE_CONTROL], "no-store");
            assert_eq!(document["status"], parts.status.as_u16());
            assert_eq!(parts.status, Refusal::new(kind).status());
            assert_eq!(document["code"], Refusal::new(kind).code());
            assert!(
                document["type"]
                    .as_str()
                    .unwrap()
                    .starts_with("urn:problem-type:idempotency:")
            );
            let sentences = document["detail"].as_str().unwrap();
            assert_eq!(sentences, Refusal::new(kind).detail());
            assert!(sentences.len() > 20 && sentences.ends_with('.'), "{sentences}");
            assert_eq!(document["retryable"], Refusal::new(kind).is_retryable());
            assert_eq!(parts.extensions.get::<Refusal>().unwrap().kind(), kind);
        }
    }

    #[test]
    fn a_retry_may_help_only_if_the_refusal_is_not_final() {
        let may_help = |refusal: Refusal| refusal.is_retryable();
        assert!(may_help(Refusal::new(RefusalKind::StoreUnavailable)));
        assert!(may_help(Refusal::new(RefusalKind::HandlerFailed)));
        assert!(!may_help(Refusal::final_for_key(RefusalKind::HandlerFailed)));
        assert!(!may_help(Refusal::new(RefusalKind::Mismatch)));
    }

    #[test]
    fn after_the_run_no_refusal_says_that_nothing_happened() {
        for kind in ALL {
            let (before, after) = (Refusal::new(kind).effect(), Refusal::new(kind).after_run().effect());
            match before {
                Effect::Nothing => assert_eq!(after, Effect::Unknown, "{kind:?}"),
                _ => assert_eq!(after, before, "{kind:?}"),
            }
        }
        assert_eq!(Refusal::new(RefusalKind::Mismatch).effect(), Effect::Nothing);
        assert_eq!(Refusal::new(RefusalKind::ResponseBroken).effect(), Effect::Done);
    }

    #[test]
    fn the_titles_are_the_drafts() {
        assert_eq!(
            Refusal::new(RefusalKind::MissingKey).title(),
            "Idempotency-Key is missing"
        );
        assert_eq!(
            Refusal::new(RefusalKind::Mismatch).title(),
            "Idempotency-Key is already used"
        );
        assert_eq!(
            Refusal::new(RefusalKind::Outstanding).title(),
            "A request is outstanding for this Idempotency-Key"
        );
    }

    #[test]
    fn a_title_names_the_header_field_of_the_key_in_every_style() {
        for style in [RefusalStyle::default(), RefusalStyle::Stripe] {
            let rendering = Rendering {
                style,
                header: Some(Box::new(HeaderName::from_static("x-!#$%&'*+.^_`|~key"))),
                should_retry: None,
            };
            for kind in ALL {
                let (parts, body) = rendered_as(Refusal::new(kind), &rendering);
                let text = serde_json::from_slice::<Value>(&body).unwrap().to_string();
                let named = Refusal::new(kind).title().contains("Idempotency-Key");
                assert_eq!(text.contains("x-!#$%&'*+.^_`|~key"), named, "{text}");
                assert!(!text.contains("Idempotency-Key"), "{text}");
                let refusal = parts.extensions.get::<Refusal>().unwrap();
                assert_eq!(refusal.title().contains("~key"), named);
            }
        }
    }

    #[test]
    fn advice_about_retries_is_the_refusals_own() {
        let rendering = Rendering {
            style: RefusalStyle::Stripe,
            header: None,
            should_retry: Some(HeaderName::from_static("stripe-should-retry")),
        };
        for kind in ALL {
            for refusal in [Refusal::new(kind), Refusal::final_for_key(kind)] {
                let wanted = refusal.is_retryable().to_string();
                let (parts, _) = rendered_as(refusal, &rendering);
                assert_eq!(parts.headers["stripe-should-retry"], wanted, "{kind:?}");
            }
            let (parts, _) = rendered(Refusal::new(kind), &RefusalStyle::Stripe);
            assert!(!parts.headers.contains_key("stripe-should-retry"));
        }
    }

    #[test]
    fn retry_after_is_rounded_up_and_at_least_one_second() {
        for (millis, seconds) in [(0, "1"), (1, "1"), (1_000, "1"), (1_001, "2")] {
            let refusal = Refusal::retry_after(RefusalKind::Outstanding, Duration::from_millis(millis));
            assert_eq!(
                rendered(refusal, &RefusalStyle::default()).0.headers[RETRY_AFTER],
                seconds
            );
        }
    }

    #[test]
    fn stripes_shape_is_stripes() {
        for kind in ALL {
            let (parts, body) = rendered(Refusal::new(kind), &RefusalStyle::Stripe);
            let document: Value = serde_json::from_slice(&body).unwrap();
            let (type_of_error, code) = match kind {
                RefusalKind::Mismatch => {
                    assert_eq!(parts.status, 400);
                    ("idempotency_error", None)
                }
                RefusalKind::Outstanding => ("idempotency_error", Some("idempotency_key_in_use")),
                RefusalKind::ResponseNotStored | RefusalKind::CheckUndecided | RefusalKind::OutcomeUnknown => {
                    ("idempotency_error", None)
                }
                _ if parts.status.as_u16() >= 500 => ("api_error", None),
                _ => ("invalid_request_error", None),
            };
            let code = code.map_or_else(|| Refusal::new(kind).code().replace('-', "_"), str::to_owned);
            let error = &document["error"];
            assert_eq!(
                (&error["type"], &error["code"]),
                (&type_of_error.into(), &code.into()),
                "{kind:?}"
            );
        }
    }

    #[cfg(feature = "tonic")]
    #[test]
    fn every_grpc_refusal_has_a_sentence_a_reason_and_a_delay_where_a_retry_helps() {
        use tonic::{Code, Status};
        use tonic_types::StatusExt;

        for kind in ALL {
            for refusal in [
                Refusal::retry_after(kind, Duration::from_millis(1_500)),
                Refusal::final_for_key(kind),
            ] {
                let (parts, body) = rendered(refusal.clone(), &RefusalStyle::Grpc);
                assert_eq!((parts.status, body.len()), (StatusCode::OK, 0));
                assert_eq!(parts.headers[CONTENT_TYPE], "application/grpc");
                let status = Status::from_header_map(&parts.headers).unwrap();
                assert!(status.message().contains(refusal.detail()), "{kind:?}");
                let details = status.get_error_details();
                let info = details.error_info().unwrap();
                assert_eq!(info.reason, refusal.code().replace('-', "_").to_uppercase());
                assert_eq!(info.metadata["retryable"], refusal.is_retryable().to_string());
                let delay = details.retry_info().and_then(|info| info.retry_delay);
                let pushback = parts.headers.get("grpc-retry-pushback-ms");
                if refusal.is_retryable() {
                    assert_eq!(delay, Some(Duration::from_secs(2)), "{kind:?}");
                    assert_eq!(pushback.unwrap(), "2000");
                } else {
                    assert_eq!((delay, pushback), (None, None), "{kind:?}");
                    // gRPC retries these two codes by itself.
                    let repeated = matches!(status.code(), Code::Unavailable | Code::Aborted);
                    assert!(!repeated || refusal == Refusal::final_for_key(kind), "{kind:?}");
                }
            }
        }
        let code = |kind| {
            Status::from_header_map(&rendered(Refusal::new(kind), &RefusalStyle::Grpc).0.headers)
                .unwrap()
                .code()
        };
        assert_eq!(code(RefusalKind::Mismatch), Code::InvalidArgument);
        assert_eq!(code(RefusalKind::Outstanding), Code::Aborted);
        assert_eq!(code(RefusalKind::StoreUnavailable), Code::Unavailable);
        assert_eq!(code(RefusalKind::OutcomeUnknown), Code::FailedPrecondition);
        assert_eq!(code(RefusalKind::ResponseNotStored), Code::FailedPrecondition);
    }

    #[cfg(feature = "tonic")]
    #[test]
    fn the_table_of_grpc_refusals_has_every_reason_that_a_client_of_grpc_gets() {
        use tonic::Status;

        let table = include_str!("../server/grpc.rs");
        for kind in ALL {
            if matches!(kind, RefusalKind::InvalidWebhook | RefusalKind::InvalidWebhookMethod) {
                continue;
            }
            let (parts, _) = rendered(Refusal::new(kind), &RefusalStyle::Grpc);
            let code = Status::from_header_map(&parts.headers).unwrap().code();
            // The table spells `FailedPrecondition` as `FAILED_PRECONDITION`.
            let name = format!("| `{code:?}` |").to_uppercase();
            let reason = format!("`{}`", Refusal::new(kind).code().replace('-', "_").to_uppercase());
            let mut rows = table
                .lines()
                .filter(|row| row.replacen('_', "", 1).contains(&name) && row.contains(&reason));
            assert!(rows.next().is_some(), "{name} {reason}");
        }
    }

    #[test]
    fn an_own_renderer_keeps_the_headers_that_protect() {
        let teapot: Renderer = Arc::new(|refusal, head| {
            assert_eq!(head.uri, "/pay");
            Response::builder()
                .status(418)
                .body(Bytes::from(refusal.code()))
                .unwrap()
        });
        let (parts, body) = rendered(Refusal::new(RefusalKind::Mismatch), &RefusalStyle::Custom(teapot));
        assert_eq!((parts.status.as_u16(), &body[..]), (418, &b"key-reused"[..]));
        assert_eq!(parts.headers[CACHE_CONTROL], "no-store");
    }

    #[test]
    fn an_own_renderer_that_leaves_no_room_for_the_headers_that_protect_is_overruled() {
        let full: Renderer = Arc::new(|_, _| {
            let mut response = Response::new(Bytes::new());
            let name = |n: u32| HeaderName::from_bytes(format!("x-{n}").as_bytes()).unwrap();
            let headers = response.headers_mut();
            while headers
                .try_insert(name(headers.len().try_into().unwrap()), HeaderValue::from_static("1"))
                .is_ok()
            {}
            response
        });
        let (parts, _) = rendered(Refusal::new(RefusalKind::Mismatch), &RefusalStyle::Custom(full));
        assert_eq!(parts.headers[CACHE_CONTROL], "no-store");
        assert_eq!(parts.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
}
