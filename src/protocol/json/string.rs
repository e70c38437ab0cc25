//! Strings and their escapes.

use std::cmp::Ordering;

/// The text between the quotes of a string, with its escapes.
#[derive(Clone, Copy)]
pub(super) struct RawString<'a> {
    pub(super) content: &'a str,
    pub(super) escaped: bool,
}

impl<'a> RawString<'a> {
    pub(super) fn is(self, string: &str) -> bool {
        if self.escaped {
            self.chars().eq(string.chars())
        } else {
            self.content == string
        }
    }

    /// Compares by code points, which is also the order of the UTF-8 bytes.
    pub(super) fn compare(self, other: Self) -> Ordering {
        if self.escaped || other.escaped {
            self.chars().cmp(other.chars())
        } else {
            self.content.cmp(other.content)
        }
    }

    pub(super) fn chars(self) -> impl Iterator<Item = char> + 'a {
        let mut rest = self.content;
        std::iter::from_fn(move || {
            let (char, length) = match rest.chars().next()? {
                '\\' => escape(rest)?,
                plain => (plain, plain.len_utf8()),
            };
            rest = rest.get(length..)?;
            Some(char)
        })
    }
}

/// Returns the character of the escape at the start of `text`, and the length of the escape.
pub(super) fn escape(text: &str) -> Option<(char, usize)> {
    let char = match text.as_bytes().get(1)? {
        b'"' => '"',
        b'\\' => '\\',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => return code_point(text),
        _ => return None,
    };
    Some((char, 2))
}

/// Reads a `\u` escape. RFC 8259, section 7: a character outside the Basic Multilingual Plane is "a
/// 12-character sequence, encoding the UTF-16 surrogate pair". Half a pair is no character, so this
/// module rejects the string. Section 8.2 calls the behavior of such texts unpredictable.
fn code_point(text: &str) -> Option<(char, usize)> {
    let first = code_unit(text)?;
    if let Some(char) = char::from_u32(u32::from(first)) {
        return Some((char, 6));
    }
    let second = code_unit(text.get(6..)?)?;
    let char = char::decode_utf16([first, second]).next()?.ok()?;
    Some((char, 12))
}

fn code_unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.as_bytes().get(..4)?;
    digits.iter().try_fold(0, |unit: u16, &digit| {
        let digit = char::from(digit).to_digit(16)?;
        Some((unit << 4) | u16::try_from(digit).ok()?)
    })
}
