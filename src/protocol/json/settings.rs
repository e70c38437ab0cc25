//! The settings of canonical JSON, and the call of the two passes.

use super::exclusions::Exclusions;
use super::{reader, writer};
use crate::error::Error;

/// Settings for fingerprints of JSON bodies. The fingerprint depends on the content of a body, not
/// on its spelling.
///
/// Two bodies count as the same request if they differ only in
///
/// * white space between the tokens,
/// * the order of the members of an object,
/// * the escapes in a string (`"\u0061"` is `"a"`),
/// * the spelling of a number of the same exact decimal value (`1.0`, `1`, `10e-1`; nothing is ever
///   rounded),
/// * the members and elements that are [excluded](Self::leave_out).
///
/// Everything else counts: the order of an array, the case of a name, the type of a value, every
/// digit of a number. In doubt, two bodies are different. A wrong "different" refuses a retry, but
/// a wrong "same" replays a response to another request.
///
/// * `-0` is not `0`. The two are equal numbers, but many parsers distinguish them by sign or even
///   by type.
/// * A member that occurs twice counts twice, in the order sent, because parsers disagree about
///   which of them wins.
/// * Exponents that do not fit into 64 bits are compared as text.
/// * Strings are compared character by character, without Unicode normalization.
///
/// The layer uses the bytes of a body that is not JSON (RFC 8259), contains half a surrogate pair,
/// nests arrays and objects deeper than 128 levels, or is longer than 4 GiB.
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
/// Nothing is excluded.
#[derive(Clone, Debug, Default)]
pub struct CanonicalJson {
    exclusions: Exclusions,
}

impl CanonicalJson {
    /// Returns settings for canonical JSON of the whole body.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Excludes the value that `pointer` (a JSON pointer, RFC 6901) names, as if the client had
    /// never sent it. Default: nothing is excluded.
    ///
    /// Use it for members that change with every retry, such as the time of sending: `/sent_at`,
    /// `/meta/trace`, `/items/0/nonce`. If a member occurs twice, every occurrence is excluded.
    /// Indexes count the elements as they were sent, also the excluded ones. `-` names no element.
    /// A pointer that names nothing in a body changes nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Configuration`](crate::ErrorKind::Configuration) if `pointer` is not a JSON
    /// pointer, if it is empty and so names the whole body, or if it has more than 128 steps, the
    /// maximum depth of a body.
    pub fn leave_out(mut self, pointer: &str) -> Result<Self, Error> {
        self.exclusions.add(pointer)?;
        Ok(self)
    }

    /// Feeds the canonical form of `body` to `sink` and returns true. If `body` has no canonical
    /// form, feeds nothing and returns false, and the caller uses the bytes of the body.
    ///
    /// Hash the form with an algorithm id of its own, because the bytes of another body may equal
    /// the form.
    pub(crate) fn feed(&self, body: &[u8], sink: &mut dyn FnMut(&[u8])) -> bool {
        // RFC 8259, section 8.1: "JSON text exchanged between systems that are not part of a closed
        // ecosystem MUST be encoded using UTF-8".
        let index = std::str::from_utf8(body).ok().and_then(reader::read);
        if let Some(index) = &index {
            writer::write(index, &self.exclusions, sink);
        }
        index.is_some()
    }
}
