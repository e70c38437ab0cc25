//! Canonical JSON for fingerprints. Every spelling of a document gives the same bytes, and any
//! other document gives other bytes.
//!
//! Two passes read the text, and neither builds a tree. The first pass checks all of it against RFC
//! 8259 and builds an index of the members of each object, sorted by name. The second pass follows
//! the index and writes the canonical form. Both passes read with the same
//! [`Cursor`](cursor::Cursor), which trusts nothing, so the second pass cannot fail where the first
//! did not. The time is that of the sorting. The memory is 16 bytes per object and per member. The
//! recursion is limited to [`MAX_DEPTH`](reader::MAX_DEPTH).
//!
//! No canonical form is a prefix of another, and the tests decode the form. Therefore it is
//! injective:
//!
//! | value | bytes |
//! |---|---|
//! | `null`, `true`, `false` | `n`, `t`, `f` |
//! | string | `"`, the UTF-8 of its characters, `FF` (which UTF-8 never contains) |
//! | number: integer *d* × 10^*x* | `#`, sign, *d* without zeros at either end, `e`, *x* as big-endian `i64` |
//! | the same if *x* is 0 | `#`, sign, *d*, `;` |
//! | the same if *x* does not fit | `~`, the text as sent, `FF` |
//! | array | `[`, its elements, `]` |
//! | object | `{`, name and value of each member sorted by name, `}` |

mod cursor;
mod exclusions;
mod index;
mod number;
mod output;
mod reader;
mod settings;
mod string;
#[cfg(test)]
mod tests;
mod writer;

pub use settings::CanonicalJson;
