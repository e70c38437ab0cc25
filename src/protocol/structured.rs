//! Parses the one structured field that this crate reads: an Item whose bare item is a String (RFC
//! 9651).
//!
//! The parser is strict and total: for any bytes, it returns the string or `None`. It checks the
//! syntax of parameters to the last byte, as the RFC requires, and then ignores them.

use std::borrow::Cow;

/// Writes a string in quotes (RFC 9651 section 4.1.6). Bytes other than visible ASCII and spaces
/// have no such form, so they are written unchanged.
pub(crate) fn quoted(text: &str) -> Vec<u8> {
    let escaped = text.bytes().filter(|byte| is_escaped(*byte)).count();
    let mut out = Vec::with_capacity(text.len() + escaped + 2);
    out.push(b'"');
    for byte in text.bytes() {
        if is_escaped(byte) {
            out.push(b'\\');
        }
        out.push(byte);
    }
    out.push(b'"');
    out
}

fn is_escaped(byte: u8) -> bool {
    matches!(byte, b'"' | b'\\')
}

/// Parses `input` as an Item that holds a String, and returns the string. It is borrowed if it
/// contains no escapes.
///
/// Returns `None` for any other value: another type, a list, a string with a character that is not
/// allowed, or a parameter that is malformed.
pub(crate) fn string_item(input: &[u8]) -> Option<Cow<'_, str>> {
    let mut parser = Parser { rest: input };
    // Section 4.2: "Discard any leading SP characters from input_string."
    parser.discard_spaces();
    let string = parser.string()?;
    parser.parameters()?;
    // "Discard any leading SP characters from input_string. If input_string is not empty, fail
    // parsing."
    parser.discard_spaces();
    parser.rest.is_empty().then_some(string)
}

#[derive(PartialEq)]
enum Number {
    Decimal,
    Integer,
}

/// The unread part of the input. There is no backtracking: once a method returns `None`, the whole
/// value is invalid.
struct Parser<'a> {
    rest: &'a [u8],
}

impl<'a> Parser<'a> {
    /// Section 4.2.3.2. The RFC lets a later duplicate key overwrite an earlier one. This parser
    /// ignores both.
    fn parameters(&mut self) -> Option<()> {
        while self.take(b';') {
            self.discard_spaces();
            self.key()?;
            // A key without a value is Boolean true.
            if self.take(b'=') {
                self.bare_item()?;
            }
        }
        Some(())
    }

    /// Section 4.2.3.3: "If the first character of `input_string` is not lcalpha or "*", fail
    /// parsing."
    fn key(&mut self) -> Option<()> {
        self.next_if(|byte| byte.is_ascii_lowercase() || byte == b'*')?;
        self.take_while(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.*".contains(&byte));
        Some(())
    }

    /// Section 4.2.3.1.
    fn bare_item(&mut self) -> Option<()> {
        match self.rest.first()? {
            b'-' | b'0'..=b'9' => self.number().map(drop),
            b'"' => self.string().map(drop),
            b'*' | b'A'..=b'Z' | b'a'..=b'z' => self.token(),
            b':' => self.byte_sequence(),
            b'?' => self.boolean(),
            b'@' => self.date(),
            b'%' => self.display_string(),
            _ => None,
        }
    }

    /// Section 4.2.4: an Integer has up to 15 digits. A Decimal has up to 12 digits before the
    /// point and 1 to 3 after it.
    fn number(&mut self) -> Option<Number> {
        self.take(b'-');
        let integer_digits = self.take_while(|byte| byte.is_ascii_digit()).len();
        if !self.take(b'.') {
            return (1..=15).contains(&integer_digits).then_some(Number::Integer);
        }
        let fraction_digits = self.take_while(|byte| byte.is_ascii_digit()).len();
        ((1..=12).contains(&integer_digits) && (1..=3).contains(&fraction_digits)).then_some(Number::Decimal)
    }

    /// Section 4.2.5.
    fn string(&mut self) -> Option<Cow<'a, str>> {
        self.expect(b'"')?;
        let plain = self.take_while(is_unescaped);
        if self.take(b'"') {
            return std::str::from_utf8(plain).ok().map(Cow::Borrowed);
        }
        let mut string = plain.to_vec();
        while !self.take(b'"') {
            self.expect(b'\\')?;
            // "If next_char is not DQUOTE or "\", fail parsing."
            string.push(self.next_if(|byte| matches!(byte, b'"' | b'\\'))?);
            string.extend_from_slice(self.take_while(is_unescaped));
        }
        String::from_utf8(string).ok().map(Cow::Owned)
    }

    /// Section 4.2.6.
    fn token(&mut self) -> Option<()> {
        self.next_if(|byte| byte.is_ascii_alphabetic() || byte == b'*')?;
        self.take_while(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:/".contains(&byte));
        Some(())
    }

    /// Section 4.2.7.
    fn byte_sequence(&mut self) -> Option<()> {
        self.expect(b':')?;
        let symbols = self
            .take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'))
            .len();
        let padding = self.take_while(|byte| byte == b'=').len();
        self.expect(b':')?;
        // "base64-decoding [RFC4648] b64_content, synthesizing padding if necessary". Therefore
        // padding may be short or missing, but not too long. A single symbol after the last full
        // group is less than a byte.
        let allowed = match symbols % 4 {
            0 => 0,
            2 => 2,
            3 => 1,
            _ => return None,
        };
        (padding <= allowed).then_some(())
    }

    /// Section 4.2.8.
    fn boolean(&mut self) -> Option<()> {
        self.expect(b'?')?;
        self.next_if(|byte| matches!(byte, b'0' | b'1')).map(drop)
    }

    /// Section 4.2.9: "If `output_date` is a Decimal, fail parsing."
    fn date(&mut self) -> Option<()> {
        self.expect(b'@')?;
        (self.number()? == Number::Integer).then_some(())
    }

    /// Section 4.2.10.
    fn display_string(&mut self) -> Option<()> {
        self.expect(b'%')?;
        self.expect(b'"')?;
        let mut octets = Vec::new();
        loop {
            match self.next_if(|byte| matches!(byte, b' '..=b'~'))? {
                b'"' => break,
                b'%' => octets.push((self.hex_digit()? << 4) | self.hex_digit()?),
                plain => octets.push(plain),
            }
        }
        // "Let unicode_sequence be the result of decoding byte_array as a UTF-8 string [UTF8]. Fail
        // parsing if decoding fails."
        std::str::from_utf8(&octets).ok().map(drop)
    }

    /// "If `octet_hex` contains characters outside the range %x30-39 or %x61-66 [...], fail
    /// parsing". This excludes capital letters.
    fn hex_digit(&mut self) -> Option<u8> {
        match self.next_if(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))? {
            digit @ b'0'..=b'9' => Some(digit - b'0'),
            letter => Some(letter - b'a' + 10),
        }
    }

    fn discard_spaces(&mut self) {
        self.take_while(|byte| byte == b' ');
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }

    fn take(&mut self, byte: u8) -> bool {
        self.next_if(|next| next == byte).is_some()
    }

    fn next_if(&mut self, accepts: impl Fn(u8) -> bool) -> Option<u8> {
        let (&first, rest) = self.rest.split_first()?;
        accepts(first).then(|| {
            self.rest = rest;
            first
        })
    }

    fn take_while(&mut self, accepts: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self.rest.iter().position(|&byte| !accepts(byte));
        let (taken, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        taken
    }
}

/// Section 4.2.5: "if char is in the range %x00-1f or %x7f-ff (i.e., it is not in VCHAR or SP),
/// fail parsing."
fn is_unescaped(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::{Index, select};
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// The oracle. It follows RFC 9651 in every case that this test has compared. If base64 padding
    /// is present but short, the RFC leaves a choice. Both parsers accept it, as "synthesizing
    /// padding if necessary" suggests.
    fn by_oracle(input: &[u8]) -> Option<String> {
        let item: sfv::Item = sfv::Parser::new(input).parse().ok()?;
        item.bare_item.as_string().map(|string| string.as_str().to_owned())
    }

    fn owned(input: &[u8]) -> Option<String> {
        string_item(input).map(Cow::into_owned)
    }

    #[test]
    fn a_string_without_escapes_is_borrowed() {
        for input in [&br#""8e03978e-40d5""#[..], br#"  "8e03978e-40d5";a;b=1  "#] {
            assert!(matches!(string_item(input), Some(Cow::Borrowed("8e03978e-40d5"))));
        }
        assert!(matches!(string_item(br#""""#), Some(Cow::Borrowed(""))));
    }

    #[test]
    fn escapes_are_resolved() {
        assert_eq!(string_item(br#""\"a\\b\"""#).as_deref(), Some(r#""a\b""#));
        assert_eq!(string_item(br#""a\b""#), None);
        assert_eq!(string_item(br#""a\"#), None);
        assert_eq!(string_item(br#""a\""#), None);
    }

    #[test]
    fn other_values_are_refused() {
        let others: [&[u8]; 16] = [
            b"",
            b" ",
            b"a",
            b"1",
            b"?1",
            b":YQ==:",
            b"(\"a\")",
            b"\"a\", \"b\"",
            b"\"a\" \"b\"",
            b"\"a",
            b"a\"",
            b"\t\"a\"",
            b"\"a\"\t",
            b"\"\x7f\"",
            b"\"\xc3\xa9\"",
            b"\"a\" ;b",
        ];
        for input in others {
            assert_eq!(string_item(input), None, "{:?}", input.escape_ascii().to_string());
        }
    }

    #[test]
    fn parameters_of_every_type_are_accepted_and_ignored() {
        for parameter in VALID_PARAMETERS {
            let input = format!("\"k\"{parameter}");
            assert_eq!(string_item(input.as_bytes()).as_deref(), Some("k"), "{input}");
        }
    }

    #[test]
    fn malformed_parameters_are_refused() {
        for parameter in INVALID_PARAMETERS {
            let input = format!("\"k\"{parameter}");
            assert_eq!(string_item(input.as_bytes()), None, "{input}");
        }
    }

    #[test]
    fn oracle_agrees_on_the_listed_parameters() {
        for parameter in VALID_PARAMETERS.iter().chain(INVALID_PARAMETERS) {
            let input = format!("\"k\"{parameter}");
            assert_eq!(owned(input.as_bytes()), by_oracle(input.as_bytes()), "{input}");
        }
    }

    #[test]
    fn oracle_agrees_on_every_short_byte_sequence() {
        let symbols = [b'A', b'b', b'/', b'=', b' '];
        for length in 0..=6_u32 {
            for number in 0..symbols.len().pow(length) {
                let digits = (0..length).map(|place| symbols[number / symbols.len().pow(place) % symbols.len()]);
                let input: Vec<u8> = b"\"k\";b=:".iter().copied().chain(digits).chain([b':']).collect();
                assert_eq!(owned(&input), by_oracle(&input), "{}", input.escape_ascii());
            }
        }
    }

    #[test]
    fn oracle_agrees_on_every_byte_everywhere() {
        let places = [
            "{}",
            "\"{}\"",
            "\"\\{}\"",
            "\"k\"{}",
            "\"k\";{}",
            "\"k\";a{}",
            "\"k\";a={}",
            "\"k\";a={}\"",
            "\"k\";a=b{}",
            "\"k\";a=1{}",
            "\"k\";a=?{}",
            "\"k\";a=@1{}",
            "\"k\";a=:A{}A:",
            "\"k\";a=%\"{}\"",
            "\"k\";a=%\"%{}0\"",
            "\"k\";a=%\"%0{}\"",
        ];
        for (place, byte) in places
            .iter()
            .flat_map(|place| (0..=u8::MAX).map(move |byte| (place, byte)))
        {
            let (before, after) = place.split_once("{}").unwrap();
            let input = [before.as_bytes(), &[byte], after.as_bytes()].concat();
            assert_eq!(owned(&input), by_oracle(&input), "{}", input.escape_ascii());
        }
    }

    #[test]
    fn oracle_agrees_on_numbers_of_every_length() {
        for (integer, fraction) in (0..18).flat_map(|integer| (0..6).map(move |fraction| (integer, fraction))) {
            for point in ["", "."] {
                let number = format!("{}{point}{}", "9".repeat(integer), "0".repeat(fraction));
                for input in [
                    format!("\"k\";n={number}"),
                    format!("\"k\";n=-{number}"),
                    format!("\"k\";n=@{number}"),
                ] {
                    assert_eq!(owned(input.as_bytes()), by_oracle(input.as_bytes()), "{input}");
                }
            }
        }
    }

    const VALID_PARAMETERS: &[&str] = &[
        ";a",
        ";a;a=2",
        ";  *_-.*9=1",
        ";i=-999999999999999",
        ";d=-123456789012.123",
        ";d=00.0",
        ";s=\"a\\\"\\\\ ;b=\"",
        ";t=*a/b:c!#$%&'*+-.^_`|~",
        ";b=::",
        ";b=:YWJj:",
        ";b=:YQ==:",
        ";b=:YQ=:",
        ";b=:YQ:",
        ";b=:YR==:",
        ";o=?0;p=?1",
        ";d=@-1659578233",
        ";s=%\"f%c3%bc %25\"",
    ];

    const INVALID_PARAMETERS: &[&str] = &[
        ";",
        ";A",
        ";1=1",
        ";a=",
        ";a =1",
        ";a= 1",
        " ;a",
        ";i=1000000000000000",
        ";i=--1",
        ";i=-",
        ";d=1234567890123.1",
        ";d=1.",
        ";d=.1",
        ";d=1.1234",
        ";d=1.1.1",
        ";s=\"a",
        ";s=\"\\a\"",
        ";b=:YQ===:",
        ";b=:Y:",
        ";b=:Y===:",
        ";b=:=:",
        ";b=:YW-_:",
        ";b=:YWJj",
        ";o=?2",
        ";o=?",
        ";d=@1.5",
        ";d=@",
        ";s=%a",
        ";s=%\"%C3%BC\"",
        ";s=%\"%ff\"",
        ";s=%\"%e\"",
        ";s=%\"a",
        ";l=(1)",
        ";a,",
    ];

    /// Generates the content of a string, already escaped.
    fn content() -> impl Strategy<Value = String> {
        prop_oneof!["[ !#-\\[\\]-~]{0,12}", "([ !#-\\[\\]-~]|\\\\\"|\\\\\\\\){0,12}"]
    }

    fn parameter_value() -> impl Strategy<Value = String> {
        prop_oneof![
            "-?[0-9]{1,15}",
            "-?[0-9]{1,12}\\.[0-9]{1,3}",
            content().prop_map(|content| format!("\"{content}\"")),
            "[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]{0,8}",
            "([A-Za-z0-9+/]{4}){0,3}([A-Za-z0-9+/]{2}={0,2}|[A-Za-z0-9+/]{3}=?)?".prop_map(|text| format!(":{text}:")),
            select(vec!["?0".to_owned(), "?1".to_owned()]),
            "@-?[0-9]{1,15}",
            any::<String>().prop_map(|text| format!("%\"{}\"", percent_encoded(&text))),
        ]
    }

    fn percent_encoded(text: &str) -> String {
        let encode = |byte: u8| match byte {
            b'"' | b'%' => format!("%{byte:02x}"),
            b' '..=b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02x}"),
        };
        text.bytes().map(encode).collect()
    }

    fn parameter() -> impl Strategy<Value = String> {
        (
            "; {0,2}[a-z*][a-z0-9_.*-]{0,6}",
            proptest::option::of(parameter_value()),
        )
            .prop_map(|(key, value)| value.map_or(key.clone(), |value| format!("{key}={value}")))
    }

    fn valid() -> impl Strategy<Value = Vec<u8>> {
        (
            " {0,2}",
            content(),
            proptest::collection::vec(parameter(), 0..4),
            " {0,2}",
        )
            .prop_map(|(before, content, parameters, after)| {
                format!("{before}\"{content}\"{}{after}", parameters.concat()).into_bytes()
            })
    }

    #[derive(Clone, Debug)]
    enum Edit {
        Insert(Index, u8),
        Remove(Index),
        Replace(Index, u8),
        Truncate(Index),
    }

    fn edit() -> impl Strategy<Value = Edit> {
        let telling = || prop_oneof![4 => select(br#" "\;=:?@%*-.019aZf,()"#.to_vec()), 1 => any::<u8>()];
        prop_oneof![
            4 => (any::<Index>(), telling()).prop_map(|(at, byte)| Edit::Insert(at, byte)),
            4 => (any::<Index>(), telling()).prop_map(|(at, byte)| Edit::Replace(at, byte)),
            4 => any::<Index>().prop_map(Edit::Remove),
            1 => any::<Index>().prop_map(Edit::Truncate),
        ]
    }

    fn edited(mut input: Vec<u8>, edits: Vec<Edit>) -> Vec<u8> {
        for edit in edits {
            if input.is_empty() {
                break;
            }
            match edit {
                Edit::Insert(at, byte) => input.insert(at.index(input.len() + 1), byte),
                Edit::Remove(at) => drop(input.remove(at.index(input.len()))),
                Edit::Replace(at, byte) => {
                    let at = at.index(input.len());
                    input[at] = byte;
                }
                Edit::Truncate(at) => input.truncate(at.index(input.len())),
            }
        }
        input
    }

    fn mutated() -> impl Strategy<Value = Vec<u8>> {
        (valid(), proptest::collection::vec(edit(), 0..3)).prop_map(|(input, edits)| edited(input, edits))
    }

    #[test]
    fn mutated_inputs_are_both_accepted_and_refused() {
        let mut runner = TestRunner::deterministic();
        let accepted = (0..2000).filter(|_| {
            let input = mutated().new_tree(&mut runner).unwrap().current();
            string_item(&input).is_some()
        });
        let accepted = accepted.count();
        assert!((600..1800).contains(&accepted), "{accepted} of 2000 accepted");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn oracle_agrees_on_valid_inputs(input in valid()) {
            prop_assert!(string_item(&input).is_some());
            prop_assert_eq!(owned(&input), by_oracle(&input));
        }

        #[test]
        fn oracle_agrees_on_mutated_inputs(input in mutated()) {
            prop_assert_eq!(owned(&input), by_oracle(&input));
        }

        #[test]
        fn oracle_agrees_on_arbitrary_bytes(input in any::<Vec<u8>>()) {
            prop_assert_eq!(owned(&input), by_oracle(&input));
        }

        #[test]
        fn every_string_comes_back_as_it_was_written(string in "[ -~]{0,40}") {
            let escaped = string.replace('\\', "\\\\").replace('"', "\\\"");
            let input = format!("\"{escaped}\"");
            let parsed = string_item(input.as_bytes()).unwrap();
            prop_assert_eq!(&parsed, &string);
            prop_assert_eq!(quoted(&string), input.as_bytes());
            prop_assert_eq!(matches!(parsed, Cow::Borrowed(_)), escaped == string);
        }
    }
}
