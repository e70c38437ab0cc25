//! Parses both forms of `Retry-After`.

use std::time::{Duration, SystemTime};

use http::header::{DATE, HeaderMap, RETRY_AFTER};

use crate::clock::wall_clock;

/// Returns how long the server asks the client to wait (RFC 9110 section 10.2.3). The field is a
/// number of seconds, or a date. A date is relative to the `Date` of the response if there is one,
/// and otherwise to the clock of this machine. Any other value counts as no value.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number of seconds that does not fit is longer than every horizon.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let now = date(headers).unwrap_or_else(wall_clock);
    Some(until.duration_since(now).unwrap_or_default())
}

fn date(headers: &HeaderMap) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requested(fields: &[(&'static str, &str)]) -> Option<Duration> {
        let fields = fields
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        retry_after(&fields.collect())
    }

    #[test]
    fn both_forms_are_read_and_nonsense_is_ignored() {
        const SECOND: Duration = Duration::from_secs(1);
        assert_eq!(requested(&[("retry-after", "7")]), Some(SECOND * 7));
        assert_eq!(requested(&[("retry-after", " 0 ")]), Some(Duration::ZERO));
        assert_eq!(
            requested(&[("retry-after", "99999999999999999999999")]),
            Some(Duration::from_secs(u64::MAX))
        );
        for nonsense in ["", "-1", "1.5", "soon", "1 2"] {
            assert_eq!(requested(&[("retry-after", nonsense)]), None, "{nonsense:?}");
        }
        assert_eq!(requested(&[]), None);
    }

    #[test]
    fn a_date_is_taken_by_the_servers_clock() {
        let until = ("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT");
        assert_eq!(
            requested(&[until, ("date", "Fri, 31 Dec 1999 23:59:49 GMT")]),
            Some(Duration::from_secs(10))
        );
        // The date has passed by both clocks.
        assert_eq!(
            requested(&[until, ("date", "Sat, 01 Jan 2000 00:00:00 GMT")]),
            Some(Duration::ZERO)
        );
        assert_eq!(requested(&[until]), Some(Duration::ZERO));
        assert_eq!(requested(&[until, ("date", "yesterday")]), Some(Duration::ZERO));
    }
}
