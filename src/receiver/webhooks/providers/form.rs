//! Parses forms (`application/x-www-form-urlencoded`) strictly.

use std::collections::BTreeSet;

/// A name and its value, decoded.
pub(super) type Pair = (Vec<u8>, Vec<u8>);

/// The largest number of pairs in a form. A form is read before its signature is checked, so a
/// forged form must not fill the memory with pairs.
const MAX_PAIRS: usize = 1_000;

/// Returns the different pairs of a form, sorted by name and then by value.
///
/// Returns `None` if there are more than 1,000 pairs, if a pair has no `=`, or if an escape is
/// malformed or has lower-case digits. Senders write `%2B` and not `%2b`. If both were accepted, a
/// bit of the body could change without a change of the pairs.
pub(super) fn pairs(form: &[u8]) -> Option<BTreeSet<Pair>> {
    if form.is_empty() {
        return Some(BTreeSet::new());
    }
    let mut pairs = BTreeSet::new();
    for (at, text) in form.split(|byte| *byte == b'&').enumerate() {
        if at == MAX_PAIRS {
            return None;
        }
        pairs.insert(pair(text)?);
    }
    Some(pairs)
}

fn pair(text: &[u8]) -> Option<Pair> {
    let at = text.iter().position(|byte| *byte == b'=')?;
    Some((decoded(&text[..at])?, decoded(&text[at + 1..])?))
}

fn decoded(text: &[u8]) -> Option<Vec<u8>> {
    let (mut decoded, mut rest) = (Vec::with_capacity(text.len()), text);
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        decoded.push(match first {
            b'+' => b' ',
            b'%' => {
                let (digits, after) = rest.split_at_checked(2)?;
                rest = after;
                data_encoding::HEXUPPER.decode(digits).ok()?[0]
            }
            other => other,
        });
    }
    Some(decoded)
}
