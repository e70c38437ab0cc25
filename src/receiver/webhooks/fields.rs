//! Reads header fields, encodings and ids of webhooks strictly. A signature has only one accepted
//! spelling, so a changed bit never passes.

use data_encoding::{BASE64, HEXLOWER};
use http::HeaderMap;

use super::InvalidWebhook;
use crate::receiver::id::MessageId;

/// Returns the only line of a header field. Returns the error `otherwise` if the field is repeated
/// or its value is not visible ASCII.
///
/// A second line is ambiguous, because the check could read one line and the handler the other.
pub(super) fn field<'h>(
    headers: &'h HeaderMap,
    name: &str,
    otherwise: InvalidWebhook,
) -> Result<&'h str, InvalidWebhook> {
    let mut lines = headers.get_all(name).iter();
    let line = lines.next().ok_or(InvalidWebhook::MissingHeader)?;
    if lines.next().is_some() {
        return Err(otherwise);
    }
    line.to_str().map_err(|_| otherwise)
}

/// Decodes lower-case hexadecimal. Upper case would be the same signature with other bits, so it is
/// rejected.
pub(super) fn hex(text: &str) -> Option<Vec<u8>> {
    HEXLOWER.decode(text.as_bytes()).ok()
}

/// Decodes base64 with its padding. Rejects unused bits that are not zero.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    BASE64.decode(text.as_bytes()).ok()
}

/// Rejects a missing id.
pub(super) fn present(id: MessageId) -> Result<MessageId, InvalidWebhook> {
    if id.is_missing() {
        return Err(InvalidWebhook::Id);
    }
    Ok(id)
}

/// Returns a member of a JSON body that holds a string, for bodies whose every byte is signed.
pub(super) fn member(body: &[u8], name: &str) -> Option<String> {
    let mut event: serde_json::Value = serde_json::from_slice(body).ok()?;
    match event.get_mut(name).map(serde_json::Value::take) {
        Some(serde_json::Value::String(value)) => Some(value),
        _ => None,
    }
}
