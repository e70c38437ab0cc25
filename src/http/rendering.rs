//! The forms of refusals: problem documents, Stripe's shape, gRPC statuses, and the application's own.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, MaxSizeReached, RETRY_AFTER};
use http::request::Parts;
use http::{Response, StatusCode};

#[cfg(feature = "tonic")]
use super::grpc;
use super::problem_text::ProblemText;
use super::refusal::Refusal;
use super::refusal_kind::RefusalKind;
use super::{BufferedBody, RebuildBody};

impl Refusal {
    /// Returns the response as the layer renders it, with `Cache-Control: no-store`, `Retry-After`
    /// where it applies, and this refusal as an extension. `head` is the head of the refused
    /// request.
    pub(crate) fn into_response<B: RebuildBody>(self, rendering: &Rendering, head: Option<&Parts>) -> Response<B> {
        self.render(rendering, head)
            .map(|bytes| B::rebuild(BufferedBody::from_bytes(bytes)))
    }

    /// Returns the same response with its body as bytes.
    pub(crate) fn render(mut self, rendering: &Rendering, head: Option<&Parts>) -> Response<Bytes> {
        self.header.clone_from(&rendering.header);
        let mut response = match (&rendering.style, head) {
            (RefusalStyle::Custom(render), Some(head)) => render(&self, head),
            // There is no request if an operator resolves a key.
            (RefusalStyle::Custom(_), None) => self.problem(PROBLEM_BASE),
            #[cfg(feature = "tonic")]
            (RefusalStyle::Grpc, _) => grpc::render(&self),
            (RefusalStyle::Problem { type_base }, _) => self.problem(type_base),
            (RefusalStyle::Stripe, _) => self.stripe(),
        };
        if self
            .protect(response.headers_mut(), rendering.should_retry.as_ref())
            .is_err()
        {
            // The application's renderer has left no room for these headers. Without them, a cache
            // could return the refusal to other clients.
            let plain = Rendering {
                style: RefusalStyle::default(),
                ..rendering.clone()
            };
            return self.render(&plain, head);
        }
        response.extensions_mut().insert(self);
        response
    }

    /// Sets the headers that a refusal has in every style.
    fn protect(&self, headers: &mut HeaderMap, should_retry: Option<&HeaderName>) -> Result<(), MaxSizeReached> {
        headers.try_insert(CACHE_CONTROL, HeaderValue::from_static("no-store"))?;
        if let Some(seconds) = self.retry_after_seconds() {
            headers.try_insert(RETRY_AFTER, HeaderValue::from(seconds))?;
        }
        if let Some(name) = should_retry {
            let advice = if self.is_retryable() { "true" } else { "false" };
            headers.try_insert(name.clone(), HeaderValue::from_static(advice))?;
        }
        Ok(())
    }

    /// Renders a problem document (RFC 9457). Nothing in it needs escaping. The texts are static
    /// and free of quotes, the base was checked when it was set, and a field name is a token (RFC
    /// 9110 section 5.1).
    fn problem(&self, type_base: &str) -> Response<Bytes> {
        let ProblemText {
            status, code, detail, ..
        } = self.kind.problem_text();
        let (title, retryable) = (self.title(), self.is_retryable());
        let body = format!(
            "{{\"type\":\"{type_base}{code}\",\"title\":\"{title}\",\"status\":{},\"detail\":\"{detail}\",\
             \"code\":\"{code}\",\"retryable\":{retryable}}}",
            status.as_u16()
        );
        response(status, "application/problem+json", body)
    }

    /// Renders an error in Stripe's shape. Stripe reports a mismatch as 400.
    fn stripe(&self) -> Response<Bytes> {
        let ProblemText {
            status, code, detail, ..
        } = self.kind.problem_text();
        let (status, kind) = match self.kind {
            RefusalKind::Mismatch => (StatusCode::BAD_REQUEST, "idempotency_error"),
            RefusalKind::ResponseNotStored
            | RefusalKind::CheckUndecided
            | RefusalKind::Outstanding
            | RefusalKind::OutcomeUnknown => (status, "idempotency_error"),
            _ if status.is_server_error() => (status, "api_error"),
            _ => (status, "invalid_request_error"),
        };
        let code = match self.kind {
            RefusalKind::Outstanding => "idempotency_key_in_use".to_owned(),
            _ => code.replace('-', "_"),
        };
        let title = self.title();
        let body =
            format!("{{\"error\":{{\"type\":\"{kind}\",\"code\":\"{code}\",\"message\":\"{title}: {detail}\"}}}}");
        response(status, "application/json", body)
    }
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(crate) type Renderer = Arc<dyn Fn(&Refusal, &Parts) -> Response<Bytes> + Send + Sync>;

/// The settings by which a layer renders its refusals.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rendering {
    pub(crate) style: RefusalStyle,
    /// The header field with the key, if it is not `Idempotency-Key`.
    pub(crate) header: Option<Box<HeaderName>>,
    /// The header field that tells the client's SDK whether a retry can help.
    pub(crate) should_retry: Option<HeaderName>,
}

impl Rendering {
    /// Copies the head of a request for a refusal that may follow after the handler has received
    /// the request. Copies nothing if no renderer will read the head.
    pub(crate) fn copy_head(&self, head: &Parts) -> Option<Box<Parts>> {
        match self.style {
            RefusalStyle::Custom(_) => Some(Box::new(head.clone())),
            #[cfg(feature = "tonic")]
            RefusalStyle::Grpc => None,
            RefusalStyle::Problem { .. } | RefusalStyle::Stripe => None,
        }
    }
}

/// The form of refusals.
#[derive(Clone)]
pub(crate) enum RefusalStyle {
    Custom(Renderer),
    #[cfg(feature = "tonic")]
    Grpc,
    Problem {
        type_base: Arc<str>,
    },
    Stripe,
}

const PROBLEM_BASE: &str = "urn:problem-type:idempotency:";

impl Default for RefusalStyle {
    fn default() -> Self {
        Self::Problem {
            type_base: PROBLEM_BASE.into(),
        }
    }
}

impl fmt::Debug for RefusalStyle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Custom(_) => "Custom",
            #[cfg(feature = "tonic")]
            Self::Grpc => "Grpc",
            Self::Problem { .. } => "Problem",
            Self::Stripe => "Stripe",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debug_form_names_the_style_and_hides_the_renderer() {
        let custom = RefusalStyle::Custom(Arc::new(|_, _| Response::default()));
        assert_eq!(format!("{custom:?} {:?}", RefusalStyle::Stripe), "Custom Stripe");
    }
}
