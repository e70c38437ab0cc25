//! Finds the key in a request's header fields.

use http::header::{HeaderMap, HeaderName};

use crate::protocol::{IdempotencyKey, InvalidKey, KeyError, KeyParser};

/// The default header field of the key.
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The key of a request, if it has one.
#[derive(Debug)]
pub(crate) enum FoundKey {
    Absent,
    Invalid(KeyError),
    Present(IdempotencyKey),
}

pub(crate) fn find_key(headers: &HeaderMap, name: &HeaderName, parser: &KeyParser) -> FoundKey {
    let Some(value) = headers.get(name) else {
        return FoundKey::Absent;
    };
    // RFC 9651 section 4.2 combines field lines with a comma, and the combined value does not parse
    // as an Item. The first check is cheap, because most requests repeat no field at all.
    let some_repeated = headers.len() > headers.keys_len();
    if some_repeated && headers.get_all(name).iter().nth(1).is_some() {
        return FoundKey::Invalid(KeyError::new(InvalidKey::Repeated));
    }
    match parser.parse(value.as_bytes()) {
        Ok(key) => FoundKey::Present(key),
        Err(error) => FoundKey::Invalid(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_repeated_line_of_the_key_itself_is_rejected() {
        let found = |lines: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(*name, value.parse().unwrap());
            }
            match find_key(&headers, &IDEMPOTENCY_KEY, &KeyParser::default()) {
                FoundKey::Absent => None,
                FoundKey::Invalid(error) => Some(Err(error.reason())),
                FoundKey::Present(key) => Some(Ok(key.as_str().to_owned())),
            }
        };
        let (key, other) = (("idempotency-key", "k"), ("accept", "a/b"));
        assert_eq!(found(&[other, other]), None);
        assert_eq!(found(&[key]), Some(Ok("k".to_owned())));
        assert_eq!(found(&[key, other, other]), Some(Ok("k".to_owned())));
        assert_eq!(found(&[key, key]), Some(Err(InvalidKey::Repeated)));
        assert_eq!(found(&[key, other, key]), Some(Err(InvalidKey::Repeated)));
        assert_eq!(found(&[("idempotency-key", "")]), Some(Err(InvalidKey::Empty)));
    }
}
