//! The form of a value in the store: JSON.

use std::panic::{catch_unwind, AssertUnwindSafe};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::Serialize;

use crate::protocol::{Answer, Outcome};
use crate::telemetry::{self, Event};

/// The head of a stored value. Responses to HTTP requests begin with 1.
const JSON: &[u8] = &[2];

/// The record of a value, and the value that a replay will give. If no replay could give it, the value as it is and a tombstone.
pub(super) fn encode<T: Serialize + DeserializeOwned>(value: T) -> (T, Outcome) {
    // The call has had its effect: a panic of the type's own code must not make that unknown.
    let stored = catch_unwind(AssertUnwindSafe(|| round_trip(&value))).ok().flatten();
    if let Some((body, read)) = stored {
        let head = Bytes::from_static(JSON);
        return (read, Outcome::Kept(Answer { head, body }));
    }
    // Without the error, which may quote the value.
    telemetry::event(Event::Tombstone);
    (value, Outcome::Tombstone)
}

/// The form of a value, and the value that is read from it.
fn round_trip<T: Serialize + DeserializeOwned>(value: &T) -> Option<(Bytes, T)> {
    let body = serde_json::to_vec(value).ok()?;
    let read = serde_json::from_slice(&body).ok()?;
    Some((body.into(), read))
}

/// Reads a stored value.
///
/// # Errors
///
/// If the record holds something other than a `T`.
pub(super) fn decode<T: DeserializeOwned>(answer: &Answer) -> Result<T, Box<dyn std::error::Error + Send + Sync>> {
    if answer.head != JSON {
        return Err("the stored answer is that of an HTTP request, or of a newer version of this crate".into());
    }
    Ok(serde_json::from_slice(&answer.body)?)
}
