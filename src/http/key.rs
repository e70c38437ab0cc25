//! From header field to key.

use http::header::{HeaderMap, HeaderName};

use crate::protocol::{IdempotencyKey, InvalidKey, KeyError, KeyParser};

/// What a request says about its key.
#[derive(Debug)]
pub(crate) enum FoundKey {
    Absent,
    Invalid(KeyError),
    Present(IdempotencyKey),
}

pub(crate) fn find_key(headers: &HeaderMap, name: &HeaderName, parser: &KeyParser) -> FoundKey {
    let mut lines = headers.get_all(name).iter();
    let Some(value) = lines.next() else {
        return FoundKey::Absent;
    };
    // RFC 9651 section 4.2: field lines are combined with a comma, and parsing that as an Item fails.
    if lines.next().is_some() {
        return FoundKey::Invalid(KeyError::new(InvalidKey::Repeated));
    }
    match parser.parse(value.as_bytes()) {
        Ok(key) => FoundKey::Present(key),
        Err(error) => FoundKey::Invalid(error),
    }
}
