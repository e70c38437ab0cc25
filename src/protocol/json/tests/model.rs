//! A model of JSON documents, and a decoder of the canonical form.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::select;

use crate::protocol::json::output::END;

/// The model: the content of a document, as far as fingerprints compare it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Literal(u8),
    /// The sign, the digits without zeros at either end, and the exponent. Zero has no digits and
    /// the exponent 0.
    Number(bool, String, i64),
    Text(String),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Sorts members by name. Members of one name stay in their order.
    pub(super) fn sorted(&self) -> Self {
        match self {
            Self::Array(elements) => Self::Array(elements.iter().map(Self::sorted).collect()),
            Self::Object(members) => {
                let mut by_name = BTreeMap::<_, Vec<_>>::new();
                for (name, value) in members {
                    by_name.entry(name.clone()).or_default().push(value.sorted());
                }
                let groups = by_name.into_iter();
                let members =
                    groups.flat_map(|(name, values)| values.into_iter().map(move |value| (name.clone(), value)));
                Self::Object(members.collect())
            }
            scalar => scalar.clone(),
        }
    }
}

/// Decodes the canonical form. The form is injective because this is possible.
pub(super) fn decode(bytes: &[u8]) -> Json {
    let mut rest = bytes;
    let value = decode_value(&mut rest);
    assert!(rest.is_empty());
    value
}

fn decode_value(rest: &mut &[u8]) -> Json {
    match take(rest) {
        b'#' => {
            let negative = take(rest) == b'-';
            let end = rest.iter().copied().find(|byte| !byte.is_ascii_digit()).unwrap();
            let digits = decode_until(rest, end);
            let exponent = if end == b';' {
                [0; 8]
            } else {
                [(); 8].map(|()| take(rest))
            };
            Json::Number(negative, digits, i64::from_be_bytes(exponent))
        }
        b'~' => Json::Text(decode_until(rest, END)),
        b'"' => Json::String(decode_until(rest, END)),
        b'[' => {
            let mut elements = Vec::new();
            while rest[0] != b']' {
                elements.push(decode_value(rest));
            }
            take(rest);
            Json::Array(elements)
        }
        b'{' => {
            let mut members = Vec::new();
            while rest[0] != b'}' {
                let Json::String(name) = decode_value(rest) else {
                    panic!("names are strings")
                };
                members.push((name, decode_value(rest)));
            }
            take(rest);
            Json::Object(members)
        }
        literal => Json::Literal(literal),
    }
}

fn take(rest: &mut &[u8]) -> u8 {
    let (&first, behind) = rest.split_first().unwrap();
    *rest = behind;
    first
}

fn decode_until(rest: &mut &[u8], end: u8) -> String {
    let length = rest.iter().position(|&byte| byte == end).unwrap();
    let text = String::from_utf8(rest[..length].to_vec()).unwrap();
    *rest = &rest[length + 1..];
    text
}

fn number() -> impl Strategy<Value = Json> {
    let exponent = prop_oneof![4 => -12_i64..12, 1 => -1000_i64..1000, 1 => -(1_i64 << 62)..1_i64 << 62];
    (any::<bool>(), "|[1-9]|[1-9][0-9]{0,30}[1-9]", exponent).prop_map(|(negative, digits, exponent)| {
        let exponent = if digits.is_empty() { 0 } else { exponent };
        Json::Number(negative, digits, exponent)
    })
}

fn string() -> impl Strategy<Value = String> {
    prop_oneof![
        select(vec!["a", "b", "c", "aa", "ab", "0", "1", "", "~", "/", "a/b"]).prop_map(str::to_owned),
        "[a-c\"\\\\/\u{8}\u{c}\n\r\t\u{0}\u{7f}é\u{d7ff}\u{e000}\u{ffff}😀\u{10ffff}]{0,6}",
        any::<String>(),
    ]
}

pub(super) fn json() -> impl Strategy<Value = Json> {
    let scalar = prop_oneof![
        select(b"ntf".to_vec()).prop_map(Json::Literal),
        number(),
        string().prop_map(Json::String),
    ];
    scalar.prop_recursive(5, 60, 8, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Json::Array),
            proptest::collection::vec((string(), inner), 0..6).prop_map(Json::Object),
        ]
    })
}
