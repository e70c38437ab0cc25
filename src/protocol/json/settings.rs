//! What a user sets, and how the two passes follow it.

use super::left_out::LeftOut;
use super::{reader, writer};
use crate::error::Error;

/// Fingerprints of JSON bodies by what they say instead of how they are written.
///
/// Two bodies count as the same request when they differ only in
///
/// * white space between the tokens,
/// * the order of the members of an object,
/// * the escapes in a string (`"\u0061"` is `"a"`),
/// * the spelling of a number of the same exact decimal value (`1.0`, `1`, `10e-1`; no rounding ever takes place),
/// * the members and elements that are [left out](Self::leave_out).
///
/// Everything else counts: the order of an array, the case of a name, the type of a value, every digit of a number. In
/// doubt two bodies are different, since a wrong "different" refuses a retry while a wrong "same" answers a request
/// that was never made:
///
/// * `-0` is not `0`. The two are equal numbers, but many parsers tell them apart, by sign or even by type.
/// * A member that occurs twice counts twice, in the order sent: parsers disagree on which of them wins.
/// * Exponents that do not fit 64 bits are compared as text.
/// * Strings are compared character by character, without Unicode normalization.
///
/// A body that is not JSON (RFC 8259), holds half a surrogate pair, nests arrays and objects deeper than 128 levels or
/// is longer than 4 GiB is fingerprinted by its bytes.
///
/// ```
/// use tower_idempotency::{CanonicalJson, ErrorKind};
///
/// assert!(CanonicalJson::new().leave_out("/sent_at").is_ok());
///
/// let error = CanonicalJson::new().leave_out("sent_at").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Configuration);
/// ```
///
/// # Defaults
///
/// Nothing is left out.
#[derive(Clone, Debug, Default)]
pub struct CanonicalJson {
    left_out: LeftOut,
}

impl CanonicalJson {
    /// Canonical JSON of the whole body.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Leaves out what `pointer` (a JSON pointer, RFC 6901) names, as if it had never been sent. Default: nothing.
    ///
    /// For members that change with every retry, such as a time of sending: `/sent_at`, `/meta/trace`,
    /// `/items/0/nonce`. Of a member that occurs twice every occurrence is left out. Indexes count the elements as they
    /// were sent, however many of them are left out; `-` names no element. A pointer that names nothing in a body
    /// changes nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Configuration`](crate::ErrorKind::Configuration) when `pointer` is no JSON pointer, when it is
    /// empty and so names the whole body, or when it is longer than the 128 steps that bodies may be deep.
    pub fn leave_out(mut self, pointer: &str) -> Result<Self, Error> {
        self.left_out.add(pointer)?;
        Ok(self)
    }

    /// Feeds the canonical form of `body` to `sink` and returns true; returns false, having fed nothing, when `body`
    /// has none, so that the caller falls back to the bytes.
    ///
    /// The form is meant to be hashed behind an algorithm id of its own: some other body may consist of these very
    /// bytes.
    pub(crate) fn feed(&self, body: &[u8], sink: &mut dyn FnMut(&[u8])) -> bool {
        // RFC 8259, section 8.1: "JSON text exchanged between systems that are not part of a closed ecosystem MUST be
        // encoded using UTF-8".
        let notes = std::str::from_utf8(body).ok().and_then(reader::read);
        if let Some(notes) = &notes {
            writer::write(notes, &self.left_out, sink);
        }
        notes.is_some()
    }
}
