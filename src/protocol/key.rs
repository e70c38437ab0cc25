//! The client's key, as its header field contains it.

use std::borrow::Cow;
use std::fmt;

use super::structured;
use crate::callback::Callback;

/// The syntax in which the layer reads the header field of the key. Default:
/// [`Lenient`](Self::Lenient).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeySyntax {
    /// A structured-field string (`"k"`, as draft-ietf-httpapi-idempotency-key-header-07 section
    /// 2.1 requires) or a bare value (`k`, as Stripe and most providers accept it). Both name the
    /// same key. Parameters are ignored.
    #[default]
    Lenient,
    /// The value as it is: `"k"` and `k` are two keys.
    Raw,
    /// The value as it is, with spaces between visible characters, as Stripe accepts it. Other
    /// characters are rejected as in every syntax, because two clients may encode the same text
    /// differently and would then send two keys for one operation.
    RawWithSpaces,
    /// A structured-field string and nothing else (RFC 9651 section 3.3.3). Parameters are ignored.
    Strict,
}

/// A key that a client chose, read from its header field.
///
/// A key has 1 to 255 bytes of visible ASCII, and its case matters. The upper bound is a setting.
/// Only [`KeySyntax::RawWithSpaces`] allows spaces, and only between other characters. The `Debug`
/// form hides the value.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct IdempotencyKey(Box<str>);

impl IdempotencyKey {
    /// Returns the key without quotes and parameters. Do not log it, because anyone who has the key
    /// can ask for the stored response.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdempotencyKey(..)")
    }
}

/// The reason why a key is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InvalidKey {
    /// The key has no characters.
    Empty,
    /// The key has a character that is neither visible ASCII (0x21 to 0x7E) nor a space that the
    /// syntax allows.
    NotVisibleAscii,
    /// The key is not a structured-field string. In the lenient syntax, it starts with a quotation
    /// mark and is not a complete string.
    NotAString,
    /// The application's validator rejected the key.
    Refused,
    /// The header field occurs more than once.
    Repeated,
    /// The key is longer than the bound.
    TooLong,
}

/// The error for a key that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyError(InvalidKey);

impl KeyError {
    pub(crate) const fn new(reason: InvalidKey) -> Self {
        Self(reason)
    }

    /// Returns why the key is invalid.
    #[must_use]
    pub const fn reason(&self) -> InvalidKey {
        self.0
    }
}

impl KeyError {
    /// Returns what is wrong with the key and what to send instead. The text contains nothing of
    /// the key.
    #[must_use]
    pub const fn detail(&self) -> &'static str {
        match self.0 {
            InvalidKey::Empty => "The key is empty. Send 1 or more visible ASCII characters.",
            InvalidKey::NotAString => "The key is not a structured-field string. Send it in double quotes.",
            InvalidKey::NotVisibleAscii => {
                "The key has a character that is not visible ASCII. Send a UUID, for example."
            }
            InvalidKey::Refused => "The key does not have the form that this server requires.",
            InvalidKey::Repeated => "The header field of the key occurs more than once. Send it once.",
            InvalidKey::TooLong => "The key is longer than this server accepts. Send a shorter one, such as a UUID.",
        }
    }
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.detail())
    }
}

impl std::error::Error for KeyError {}

type Validator = Callback<dyn Fn(&str) -> bool + Send + Sync>;

/// Reads keys from header values by the configured rules.
#[derive(Clone, Debug)]
pub(crate) struct KeyParser {
    pub(crate) syntax: KeySyntax,
    pub(crate) max_len: usize,
    pub(crate) validator: Option<Validator>,
}

impl Default for KeyParser {
    fn default() -> Self {
        Self {
            syntax: KeySyntax::default(),
            max_len: 255,
            validator: None,
        }
    }
}

impl KeyParser {
    pub(crate) fn parse(&self, value: &[u8]) -> Result<IdempotencyKey, KeyError> {
        let key = self.unquoted(value).map_err(KeyError::new)?;
        self.check(&key)?;
        Ok(IdempotencyKey(key.into()))
    }

    /// Checks a key, received or to be sent, against the rules.
    pub(crate) fn check(&self, key: &str) -> Result<(), KeyError> {
        let refusal = match key {
            "" => InvalidKey::Empty,
            key if key.len() > self.max_len => InvalidKey::TooLong,
            key if !self.is_well_formed(key) => InvalidKey::NotVisibleAscii,
            key if self.validator.as_ref().is_some_and(|valid| !valid(key)) => InvalidKey::Refused,
            _ => return Ok(()),
        };
        Err(KeyError::new(refusal))
    }

    fn is_well_formed(&self, key: &str) -> bool {
        match self.syntax {
            // RFC 9110 section 5.5: a field value neither starts nor ends with white space.
            KeySyntax::RawWithSpaces => {
                key.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) && key.trim_ascii() == key
            }
            KeySyntax::Lenient | KeySyntax::Raw | KeySyntax::Strict => is_visible_ascii(key),
        }
    }

    /// Checks the value of a header field against the rules.
    pub(crate) fn check_value(&self, value: &[u8]) -> Result<(), KeyError> {
        self.check(&self.unquoted(value).map_err(KeyError::new)?)
    }

    fn unquoted<'v>(&self, value: &'v [u8]) -> Result<Cow<'v, str>, InvalidKey> {
        // RFC 9110 section 5.5: white space around a field value is not part of it.
        let value = value.trim_ascii();
        let quoted = value.first() == Some(&b'"');
        match self.syntax {
            KeySyntax::Lenient if quoted => structured::string_item(value).ok_or(InvalidKey::NotAString),
            KeySyntax::Strict if value.is_empty() => Err(InvalidKey::Empty),
            KeySyntax::Strict => structured::string_item(value).ok_or(InvalidKey::NotAString),
            KeySyntax::Lenient | KeySyntax::Raw | KeySyntax::RawWithSpaces => std::str::from_utf8(value)
                .map(Cow::Borrowed)
                .map_err(|_| InvalidKey::NotVisibleAscii),
        }
    }
}

/// Returns whether a key is visible ASCII. Looks at every byte and branches once, because a loop
/// that stops at the first bad byte takes three times as long for a valid key.
fn is_visible_ascii(key: &str) -> bool {
    key.bytes().fold(true, |so_far, byte| so_far & byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn parser(syntax: KeySyntax) -> KeyParser {
        KeyParser {
            syntax,
            ..KeyParser::default()
        }
    }

    fn key(text: &str) -> IdempotencyKey {
        parser(KeySyntax::Raw).parse(text.as_bytes()).unwrap()
    }

    fn reason(syntax: KeySyntax, value: &[u8]) -> Option<InvalidKey> {
        parser(syntax).parse(value).err().map(|error| error.reason())
    }

    #[test]
    fn quoted_and_bare_are_one_key_when_lenient_and_two_when_raw() {
        let lenient = parser(KeySyntax::Lenient);
        assert_eq!(lenient.parse(b"\"k-1\";v=2").unwrap(), lenient.parse(b" k-1 ").unwrap());
        let raw = parser(KeySyntax::Raw);
        assert_ne!(raw.parse(b"\"k-1\"").unwrap(), raw.parse(b"k-1").unwrap());
    }

    #[test]
    fn only_the_syntax_with_spaces_takes_spaces_and_only_between_characters() {
        let spaced = parser(KeySyntax::RawWithSpaces);
        assert_eq!(spaced.parse(b" order 7  \"a\" \t").unwrap().as_str(), "order 7  \"a\"");
        for bad in [&b"a\tb"[..], b"a\x01b", b"a\x7f", b"caf\xe9", "caf\u{e9}".as_bytes()] {
            assert_eq!(reason(KeySyntax::RawWithSpaces, bad), Some(InvalidKey::NotVisibleAscii));
        }
        assert_eq!(reason(KeySyntax::RawWithSpaces, b"   "), Some(InvalidKey::Empty));
        assert!(
            spaced.check(" a").is_err() && spaced.check("a ").is_err(),
            "HTTP would trim them"
        );
        for syntax in [KeySyntax::Lenient, KeySyntax::Raw] {
            assert_eq!(reason(syntax, b"a b"), Some(InvalidKey::NotVisibleAscii));
        }
        assert_eq!(reason(KeySyntax::Strict, b"\"a b\""), Some(InvalidKey::NotVisibleAscii));
    }

    #[test]
    fn strict_takes_only_structured_field_strings() {
        assert_eq!(parser(KeySyntax::Strict).parse(b"\"a\\\"b\"").unwrap().as_str(), "a\"b");
        for bad in [
            "bare",
            "\"open",
            "'single'",
            "?1",
            ":YWJj:",
            "(\"a\")",
            "\"a\" b",
            "\"a\", \"b\"",
        ] {
            assert_eq!(
                reason(KeySyntax::Strict, bad.as_bytes()),
                Some(InvalidKey::NotAString),
                "{bad}"
            );
        }
    }

    #[test]
    fn every_malformed_key_names_its_fault() {
        use InvalidKey::{Empty, NotAString, NotVisibleAscii, TooLong};
        for (value, fault) in [
            (&b""[..], Empty),
            (b"   ", Empty),
            (b"\"\"", Empty),
            (b"a b", NotVisibleAscii),
            (b"\"a b\"", NotVisibleAscii),
            (b"a\x7f", NotVisibleAscii),
            (b"a\x01", NotVisibleAscii),
            (b"caf\xe9", NotVisibleAscii),
            (b"\"open", NotAString),
            (b"\"bad\\escape\"", NotAString),
            (&[b'x'; 256], TooLong),
        ] {
            assert_eq!(reason(KeySyntax::Lenient, value), Some(fault), "{value:?}");
        }
        assert_eq!(reason(KeySyntax::Strict, b""), Some(Empty));
        assert_eq!(reason(KeySyntax::Lenient, &[b'x'; 255]), None);
    }

    #[test]
    fn a_validator_refuses() {
        let mut only_digits = parser(KeySyntax::Lenient);
        only_digits.validator = Some(Callback(Arc::new(|key| key.bytes().all(|byte| byte.is_ascii_digit()))));
        assert!(only_digits.parse(b"123").is_ok());
        assert_eq!(only_digits.parse(b"12a").unwrap_err().reason(), InvalidKey::Refused);
    }

    #[test]
    fn every_fault_has_a_text_of_its_own_that_says_what_to_do() {
        use InvalidKey::{Empty, NotAString, NotVisibleAscii, Refused, Repeated, TooLong};
        let errors = [Empty, NotAString, NotVisibleAscii, Refused, Repeated, TooLong].map(KeyError::new);
        let texts: HashSet<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), errors.len());
        for error in errors {
            assert_eq!(error.to_string(), error.detail());
            let says_what_to_do = error.detail().contains(" Send ") || error.reason() == Refused;
            assert!(error.detail().contains("key") && says_what_to_do, "{error}");
        }
    }

    #[test]
    fn its_debug_form_hides_it() {
        assert_eq!(format!("{:?}", key("secret-key")), "IdempotencyKey(..)");
    }

    proptest! {
        #[test]
        fn parsing_is_total_and_what_it_takes_is_in_bounds(value: Vec<u8>) {
            for syntax in [KeySyntax::Lenient, KeySyntax::Raw, KeySyntax::Strict] {
                let parsed = parser(syntax).parse(&value);
                prop_assert_eq!(parser(syntax).check_value(&value), parsed.clone().map(drop));
                if let Ok(key) = parsed {
                    prop_assert!((1..=255).contains(&key.as_str().len()));
                    prop_assert!(key.as_str().bytes().all(|byte| byte.is_ascii_graphic()));
                }
            }
        }
    }
}
