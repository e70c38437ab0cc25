//! Checks whether a response can have a body, and whether a body ended too early.

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{Method, StatusCode, response};

/// Returns whether a response to a request with this method can have a body (RFC 9110 section
/// 6.4.1). The tunnel after CONNECT is no body.
pub(crate) fn has_body(method: &Method, status: StatusCode) -> bool {
    let is_tunnel = method == Method::CONNECT && status.is_success();
    let is_empty = status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    method != Method::HEAD && !is_tunnel && !is_empty
}

/// Returns whether a body that ended after `read` bytes is shorter than its declared length. RFC
/// 9112 section 8 says that such a response is incomplete. hyper reports it as an error, but other
/// clients may not.
///
/// A body that is longer than declared is complete. Either the client stops at the declared length,
/// or a layer has decoded the body.
pub(crate) fn is_cut_short(head: &response::Parts, read: usize) -> bool {
    // RFC 9112 section 6.3: a transfer coding overrides the declared length.
    if head.headers.contains_key(TRANSFER_ENCODING) {
        return false;
    }
    let declared = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    let declared = declared.and_then(|length| length.trim().parse::<u64>().ok());
    declared.is_some_and(|declared| u64::try_from(read).is_ok_and(|read| read < declared))
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    fn is_short(fields: &[(&'static str, &'static str)], read: usize) -> bool {
        let mut response = Response::builder();
        for (name, value) in fields {
            response = response.header(*name, *value);
        }
        is_cut_short(&response.body(()).unwrap().into_parts().0, read)
    }

    #[test]
    fn only_a_body_that_is_shorter_than_declared_is_cut_short() {
        assert!(is_short(&[("content-length", "5")], 4));
        assert!(!is_short(&[("content-length", "5")], 5));
        assert!(!is_short(&[("content-length", "5")], 6));
        assert!(!is_short(&[], 0));
        for nonsense in ["", "-1", "five", "5, 5", "99999999999999999999999"] {
            assert!(!is_short(&[("content-length", nonsense)], 0), "{nonsense:?}");
        }
        assert!(!is_short(
            &[("content-length", "5"), ("transfer-encoding", "chunked")],
            4
        ));
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
        // RFC 9112 section 6.3: every other response to such a request has a body.
        for status in (200..1000).filter(|status| ![204, 304].contains(status)) {
            let status = StatusCode::from_u16(status).unwrap();
            assert!(has_body(&Method::POST, status), "{status}");
        }
    }
}
