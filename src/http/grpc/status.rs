//! Reads the result of a call from `grpc-status`, in the head or in the trailers.

use http::{HeaderMap, HeaderValue};

use super::GRPC_STATUS;

/// The effect of a request, as the status of its response shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The call took effect.
    Done,
    /// The handler decided against the call. The same request gets the same response.
    Definite,
    /// The handler failed. Nobody knows whether the call took effect.
    Failed,
    /// The handler did not act, or the caller can remove the cause and send the same request again.
    Passing,
}

/// Returns the result of a response. Returns `None` without a status. A response without messages
/// has its status in the head ("trailers-only"), every other response has it in the trailers. Two
/// different statuses, or an invalid status, do not show the effect, so they count as a failure.
pub(crate) fn result_of(head: &HeaderMap, trailers: Option<&HeaderMap>) -> Option<Outcome> {
    let mut statuses = statuses(head, trailers);
    let status = statuses.next()?;
    if statuses.any(|other| other != status) {
        return Some(Outcome::Failed);
    }
    Some(of_status(status))
}

/// Returns the code of a response's first status, to compare responses. Returns `None` without a
/// status, or if the status is no number.
#[cfg(feature = "postgres")]
pub(crate) fn code_of(head: &HeaderMap, trailers: Option<&HeaderMap>) -> Option<u8> {
    statuses(head, trailers).next()?.to_str().ok()?.parse().ok()
}

fn statuses<'h>(head: &'h HeaderMap, trailers: Option<&'h HeaderMap>) -> impl Iterator<Item = &'h HeaderValue> {
    let in_trailers = trailers.into_iter().flat_map(|trailers| trailers.get_all(GRPC_STATUS));
    head.get_all(GRPC_STATUS).iter().chain(in_trailers)
}

/// Returns the outcome of a status. `UNKNOWN` (2), `INTERNAL` (13) and `DATA_LOSS` (15) are
/// failures. A code that gRPC does not define is a failure too, because clients treat it as
/// `UNKNOWN`.
fn of_status(status: &HeaderValue) -> Outcome {
    match status.as_bytes() {
        b"0" => Outcome::Done,
        // INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION and OUT_OF_RANGE.
        b"3" | b"5" | b"6" | b"9" | b"11" => Outcome::Definite,
        // CANCELLED, DEADLINE_EXCEEDED, PERMISSION_DENIED, RESOURCE_EXHAUSTED, ABORTED,
        // UNIMPLEMENTED, UNAVAILABLE and UNAUTHENTICATED. Servers also return UNIMPLEMENTED for an
        // encoding that they do not accept (`compression.md`), and the client then sends the same
        // call without compression.
        b"1" | b"4" | b"7" | b"8" | b"10" | b"12" | b"14" | b"16" => Outcome::Passing,
        _ => Outcome::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static(value))])
    }

    #[test]
    fn a_status_counts_in_the_head_and_in_the_trailers() {
        let none = HeaderMap::new();
        for (code, outcome) in [
            ("0", Outcome::Done),
            ("1", Outcome::Passing),
            ("2", Outcome::Failed),
            ("3", Outcome::Definite),
            ("4", Outcome::Passing),
            ("5", Outcome::Definite),
            ("6", Outcome::Definite),
            ("7", Outcome::Passing),
            ("8", Outcome::Passing),
            ("9", Outcome::Definite),
            ("10", Outcome::Passing),
            ("11", Outcome::Definite),
            ("12", Outcome::Passing),
            ("13", Outcome::Failed),
            ("14", Outcome::Passing),
            ("15", Outcome::Failed),
            ("16", Outcome::Passing),
            ("17", Outcome::Failed),
            ("99999999999", Outcome::Failed),
            ("-1", Outcome::Failed),
            ("", Outcome::Failed),
            ("OK", Outcome::Failed),
        ] {
            assert_eq!(result_of(&status(code), None), Some(outcome), "{code}");
            assert_eq!(result_of(&none, Some(&status(code))), Some(outcome), "{code}");
        }
        assert_eq!(result_of(&none, Some(&none)), None);
    }

    #[test]
    fn statuses_that_differ_are_a_failure() {
        assert_eq!(result_of(&status("14"), Some(&status("0"))), Some(Outcome::Failed));
        assert_eq!(result_of(&status("0"), Some(&status("0"))), Some(Outcome::Done));
        let mut twice = status("0");
        twice.append(GRPC_STATUS, HeaderValue::from_static("5"));
        assert_eq!(result_of(&HeaderMap::new(), Some(&twice)), Some(Outcome::Failed));
    }

    #[cfg(feature = "postgres")]
    #[test]
    fn the_first_status_is_compared() {
        let none = HeaderMap::new();
        assert_eq!(code_of(&status("5"), None), Some(5));
        assert_eq!(code_of(&none, Some(&status("7"))), Some(7));
        assert_eq!(code_of(&status("5"), Some(&status("7"))), Some(5));
        assert_eq!(code_of(&status("x"), None), None);
        assert_eq!(code_of(&none, None), None);
    }
}
