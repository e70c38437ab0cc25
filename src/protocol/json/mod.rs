//! Canonical JSON for fingerprints: the same document, however it was written, gives the same bytes; any other
//! document gives other bytes.
//!
//! Two passes over the text, neither of which builds a tree. The first checks all of it against RFC 8259 and notes
//! where the members of each object are, sorted by name; the second follows these notes and writes the canonical form.
//! Both read with the same [`Cursor`](cursor::Cursor), which trusts nothing, so the second pass cannot stumble where the first did not.
//! Time is that of the sorting, memory 16 bytes per object and per member, recursion ends at [`MAX_DEPTH`](reader::MAX_DEPTH).
//!
//! The canonical form is prefix-free and can be decoded (the tests do), hence injective:
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
mod left_out;
mod notes;
mod number;
mod output;
mod quoted;
mod reader;
mod settings;
#[cfg(test)]
mod tests;
mod writer;

pub use settings::CanonicalJson;
