//! From header field to key.

use http::header::{HeaderMap, HeaderName};

use crate::protocol::{IdempotencyKey, InvalidKey, KeyError, KeyParser};

/// Where a key stands, unless something else is set.
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What a request says about its key.
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
    // RFC 9651 section 4.2: field lines are combined with a comma, and parsing that as an Item fails. Most requests have no
    // repeated field at all.
    let some_repeated = headers.len() > headers.keys_len();
    if some_repeated && headers.get_all(name).iter().nth(1).is_some() {
        return FoundKey::Invalid(KeyError::new(InvalidKey::Repeated));
    }
    match parser.parse(value.as_bytes()) {
        Ok(key) => FoundKey::Present(key),
        Err(error) => FoundKey::Invalid(error),
    }
}
