//! Reads the tokens of a JSON text.

use super::number::Number;
use super::string::{RawString, escape};

pub(super) enum Scalar<'a> {
    /// The first letter of `false`, `null` or `true`.
    Literal(u8),
    Number(Number<'a>),
    String(RawString<'a>),
}

/// Reads tokens. A method returns `None` if the next token is not what it reads.
pub(super) struct Cursor<'a> {
    text: &'a str,
    pub(super) at: usize,
}

// Methods that both passes call for each token are `#[inline]`. The passes are other modules and
// perhaps other codegen units. Without the attribute, a body of numbers took a third longer.
impl<'a> Cursor<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// Moves to the next byte that is not white space, and returns it. Returns `None` at the end.
    #[inline]
    pub(super) fn token(&mut self) -> Option<u8> {
        // RFC 8259, section 2: "Insignificant whitespace is allowed before or after any of the six
        // structural characters."
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
        self.peek()
    }

    #[inline]
    pub(super) fn skip(&mut self, token: u8) -> bool {
        self.token() == Some(token) && self.take(|_| true)
    }

    #[inline]
    pub(super) fn expect(&mut self, token: u8) -> Option<()> {
        self.skip(token).then_some(())
    }

    #[inline]
    pub(super) fn scalar(&mut self) -> Option<Scalar<'a>> {
        match self.peek()? {
            b'"' => self.string().map(Scalar::String),
            b'-' | b'0'..=b'9' => self.number().map(Scalar::Number),
            b'f' => self.literal("false"),
            b'n' => self.literal("null"),
            b't' => self.literal("true"),
            _ => None,
        }
    }

    fn literal(&mut self, word: &str) -> Option<Scalar<'a>> {
        if !self.rest().starts_with(word) {
            return None;
        }
        let tag = self.peek()?;
        self.at += word.len();
        Some(Scalar::Literal(tag))
    }

    /// RFC 8259, section 7: "All Unicode characters may be placed within the quotation marks,
    /// except for the characters that MUST be escaped: quotation mark, reverse solidus, and the
    /// control characters (U+0000 through U+001F)."
    pub(super) fn string(&mut self) -> Option<RawString<'a>> {
        self.expect(b'"')?;
        let start = self.at;
        let mut escaped = false;
        loop {
            let rest = self.rest().as_bytes();
            self.at += rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | ..=0x1f))?;
            match self.peek()? {
                b'"' => break,
                b'\\' => self.at += escape(self.rest())?.1,
                _ => return None,
            }
            escaped = true;
        }
        let content = self.text.get(start..self.at)?;
        self.at += 1;
        Some(RawString { content, escaped })
    }

    /// RFC 8259, section 6: `number = [ minus ] int [ frac ] [ exp ]`.
    #[inline]
    fn number(&mut self) -> Option<Number<'a>> {
        let start = self.at;
        let negative = self.take(|byte| byte == b'-');
        let integer = self.digits()?;
        // "Leading zeros are not allowed."
        if integer.len() > 1 && integer.starts_with('0') {
            return None;
        }
        let fraction = if self.take(|byte| byte == b'.') {
            self.digits()?
        } else {
            ""
        };
        let exponent = if self.take(|byte| matches!(byte, b'e' | b'E')) {
            self.exponent()?
        } else {
            "0"
        };
        Some(Number {
            text: self.text.get(start..self.at)?,
            negative,
            integer,
            fraction,
            exponent,
        })
    }

    fn exponent(&mut self) -> Option<&'a str> {
        let start = self.at;
        self.take(|byte| matches!(byte, b'+' | b'-'));
        self.digits()?;
        self.text.get(start..self.at)
    }

    fn digits(&mut self) -> Option<&'a str> {
        let start = self.at;
        while self.take(|byte| byte.is_ascii_digit()) {}
        self.text.get(start..self.at).filter(|digits| !digits.is_empty())
    }

    fn take(&mut self, accepts: impl Fn(u8) -> bool) -> bool {
        let taken = self.peek().is_some_and(accepts);
        self.at += usize::from(taken);
        taken
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }
}
