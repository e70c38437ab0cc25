//! Values as the store holds them, in JSON.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::catch_panic::catch_panic_in;
use crate::protocol::{Outcome, StoredResponse};
use crate::telemetry::{self, Event};

/// The head of a stored value. Responses to HTTP requests begin with 1.
const JSON: &[u8] = &[2];

/// Returns the value as a replay will return it, and the outcome to store. If JSON cannot hold the
/// value, returns the value unchanged and a tombstone.
pub(super) fn encode<T: Serialize + DeserializeOwned>(value: T) -> (T, Outcome) {
    // The call has taken effect, so a panic in the type's own code must not make the outcome
    // unknown.
    let stored = catch_panic_in(|| round_trip(&value)).ok().flatten();
    if let Some((body, read)) = stored {
        let head = Bytes::from_static(JSON);
        return (read, Outcome::Stored(StoredResponse { head, body }));
    }
    // The event leaves out the error, which may quote the value.
    telemetry::event(Event::Tombstone);
    (value, Outcome::Tombstone)
}

/// Returns the JSON of a value, and the value read from that JSON.
fn round_trip<T: Serialize + DeserializeOwned>(value: &T) -> Option<(Bytes, T)> {
    let body = serde_json::to_vec(value).ok()?;
    let read = serde_json::from_slice(&body).ok()?;
    Some((body.into(), read))
}

/// Reads a stored value.
///
/// # Errors
///
/// If the record holds anything other than a `T`.
pub(super) fn decode<T: DeserializeOwned>(
    response: &StoredResponse,
) -> Result<T, Box<dyn std::error::Error + Send + Sync>> {
    if response.head != JSON {
        return Err("the stored response is an HTTP response, or was stored by a newer version of this crate".into());
    }
    Ok(serde_json::from_slice(&response.body)?)
}
