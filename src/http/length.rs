//! Checks whether a response can have a body, and whether a body ended too early.

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{response, Method, StatusCode};

/// Whether a response to a request with this method can have a body (RFC 9110 section 6.4.1). The tunnel after CONNECT
/// is no body.
pub(crate) fn has_body(method: &Method, status: StatusCode) -> bool {
    let is_tunnel = method == Method::CONNECT && status.is_success();
    let is_empty = status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    method != Method::HEAD && !is_tunnel && !is_empty
}

/// Returns the declared length of a body that ended after `read` bytes, if it ended too early. RFC 9112 section 8 says
/// that such a response is incomplete. hyper reports it as an error, other clients may not.
///
/// A body that is longer than declared is complete, because the client stops at the declared length, or a layer has
/// decoded the body.
pub(crate) fn cut_short(head: &response::Parts, read: usize) -> Option<u64> {
    if head.headers.contains_key(TRANSFER_ENCODING) {
        // RFC 9112 section 6.3: the declared length does not count.
        return None;
    }
    let declared: u64 = head.headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()?;
    u64::try_from(read)
        .is_ok_and(|read| read < declared)
        .then_some(declared)
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    fn declared(fields: &[(&'static str, &'static str)], read: usize) -> Option<u64> {
        let mut response = Response::builder();
        for (name, value) in fields {
            response = response.header(*name, *value);
        }
        cut_short(&response.body(()).unwrap().into_parts().0, read)
    }

    #[test]
    fn only_a_body_that_is_shorter_than_declared_is_cut_short() {
        assert_eq!(declared(&[("content-length", "5")], 4), Some(5));
        assert_eq!(declared(&[("content-length", "5")], 5), None);
        assert_eq!(declared(&[("content-length", "5")], 6), None);
        assert_eq!(declared(&[], 0), None);
        for nonsense in ["", "-1", "five", "5, 5", "99999999999999999999999"] {
            assert_eq!(declared(&[("content-length", nonsense)], 0), None, "{nonsense:?}");
        }
        assert_eq!(
            declared(&[("content-length", "5"), ("transfer-encoding", "chunked")], 4),
            None
        );
    }

    #[test]
    fn some_responses_have_no_body() {
        for (method, status, expected) in [
            (Method::POST, 200, true),
            (Method::GET, 500, true),
            (Method::HEAD, 200, false),
            (Method::GET, 204, false),
            (Method::GET, 304, false),
            (Method::GET, 101, false),
            (Method::CONNECT, 200, false),
            (Method::CONNECT, 403, true),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(has_body(&method, status), expected, "{method} {status}");
        }
    }
}
