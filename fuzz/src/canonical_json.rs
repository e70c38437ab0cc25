//! Canonical JSON in a fingerprint.
//!
//! The layer reads a body as JSON if, and only if, `serde_json` does. Two documents count as the
//! same if, and only if, a model of their content is the same. The content does not depend on the
//! order of members, on white space, or on the spelling of strings and numbers, so a document that
//! is written anew in another spelling counts as the same.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytes::Bytes;
use http::Request;
use serde::de::IgnoredAny;
use tower_idempotency::CanonicalJson;
use tower_idempotency::protocol::Fingerprint;

use crate::exchange::fingerprint;
use crate::input::halves;

pub fn property(bytes: &[u8]) {
    let (one, other) = halves(bytes);
    let [one, other] = [one, other].map(|body| {
        let of = of_body(body);
        let is_json = of.algorithm() == Fingerprint::JSON;
        if let Some(accepted) = accepted_by_serde_json(body) {
            assert_eq!(is_json, accepted, "{}", body.escape_ascii());
        }
        let document = is_json.then(|| document(body)).flatten()?;
        let mut respelled = String::new();
        document.spell(&mut respelled);
        assert_eq!(of, of_body(respelled.as_bytes()), "{respelled}");
        Some((of, document))
    });
    if let (Some((first, one)), Some((second, other))) = (one, other) {
        assert_eq!(first == second, one == other, "{one:?} and {other:?}");
    }
}

fn of_body(body: &[u8]) -> Fingerprint {
    let request = Request::post("/").header("idempotency-key", "k");
    let request = request.body(Bytes::copy_from_slice(body)).unwrap();
    fingerprint(|layer| layer.with_json_fingerprint(CanonicalJson::new()), request)
}

/// Returns `None` if `serde_json` cannot decide. It rejects numbers that are too large for `f64`
/// and documents of 128 levels, and it accepts halves of surrogate pairs in values that it skips.
fn accepted_by_serde_json(body: &[u8]) -> Option<bool> {
    match serde_json::from_slice::<serde_json::Value>(body) {
        Err(error) if error.to_string().starts_with("number out of range") => {
            let syntax = serde_json::from_slice::<IgnoredAny>(body).is_ok() && std::str::from_utf8(body).is_ok();
            (!syntax || !body.windows(2).any(|pair| pair == b"\\u")).then_some(syntax)
        }
        Err(error) if error.to_string().starts_with("recursion limit exceeded") => None,
        result => Some(result.is_ok()),
    }
}

/// The content of a document.
#[derive(Debug, PartialEq)]
enum Document {
    Literal(String),
    /// The sign, the digits without zeros at either end, and the power of ten of the last digit.
    Number(bool, String, i128),
    String(String),
    Array(Vec<Document>),
    /// The values of each name, in the order in which they were sent.
    Object(BTreeMap<String, Vec<Document>>),
}

/// Reads a document whose syntax the layer has accepted. Returns `None` if a number has an exponent
/// that does not fit into 64 bits.
fn document(body: &[u8]) -> Option<Document> {
    let mut rest = std::str::from_utf8(body).ok()?.trim();
    value(&mut rest)
}

fn value(rest: &mut &str) -> Option<Document> {
    *rest = rest.trim_start();
    match rest.chars().next()? {
        '"' => string(rest).map(Document::String),
        '[' => {
            let mut elements = Vec::new();
            while let Some(()) = next_item(rest, ']', elements.is_empty()) {
                elements.push(value(rest)?);
            }
            Some(Document::Array(elements))
        }
        '{' => {
            let mut members = BTreeMap::<_, Vec<_>>::new();
            while let Some(()) = next_item(rest, '}', members.is_empty()) {
                let name = string(rest)?;
                *rest = rest.trim_start().strip_prefix(':')?;
                members.entry(name).or_default().push(value(rest)?);
            }
            Some(Document::Object(members))
        }
        _ => {
            let end = rest.find([',', ']', '}', ' ', '\t', '\n', '\r']).unwrap_or(rest.len());
            let (text, after) = rest.split_at(end);
            *rest = after;
            match text {
                "null" | "true" | "false" => Some(Document::Literal(text.to_owned())),
                number => self::number(number),
            }
        }
    }
}

/// Steps over the bracket or the comma before an item, and over white space. Returns `None` at the
/// end of the array or the object, and steps over that too.
fn next_item(rest: &mut &str, close: char, is_first: bool) -> Option<()> {
    let trimmed = rest.trim_start();
    let after = trimmed.strip_prefix(if is_first { ['[', '{'] } else { [',', ','] });
    *rest = after.unwrap_or(trimmed).trim_start();
    match rest.strip_prefix(close) {
        Some(after) => {
            *rest = after;
            None
        }
        None => Some(()),
    }
}

fn string(rest: &mut &str) -> Option<String> {
    let mut strings = serde_json::Deserializer::from_str(rest).into_iter::<String>();
    let string = strings.next()?.ok()?;
    *rest = &rest[strings.byte_offset()..];
    Some(string)
}

/// Returns the exact value of a number. Returns `None` if its exponent does not fit into 64 bits.
fn number(text: &str) -> Option<Document> {
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let exponent = i128::from(exponent.parse::<i64>().ok()?);
    let (is_negative, mantissa) = match mantissa.strip_prefix('-') {
        Some(mantissa) => (true, mantissa),
        None => (false, mantissa),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_end_matches('0');
    let zeros = i128::try_from(digits.len() - significant.len()).ok()?;
    let exponent = exponent - i128::try_from(fraction.len()).ok()? + zeros;
    let significant = significant.trim_start_matches('0').to_owned();
    let exponent = if significant.is_empty() { 0 } else { exponent };
    i64::try_from(exponent).ok()?;
    Some(Document::Number(is_negative, significant, exponent))
}

impl Document {
    /// Writes the document with white space, with escapes for every character, with numbers in
    /// scientific notation, and with the members in reverse order.
    fn spell(&self, out: &mut String) {
        match self {
            Self::Literal(text) => out.push_str(text),
            Self::Number(is_negative, digits, exponent) => {
                let sign = if *is_negative { "-" } else { "" };
                let digits = if digits.is_empty() { "0" } else { digits };
                write!(out, "{sign}{digits}.00E{}", exponent).unwrap();
            }
            Self::String(text) => spell_string(text, out),
            Self::Array(elements) => {
                out.push_str("[ ");
                for (at, element) in elements.iter().enumerate() {
                    out.push_str(if at == 0 { "" } else { "\r\n,\t" });
                    element.spell(out);
                }
                out.push(']');
            }
            Self::Object(members) => {
                out.push('{');
                let members = members.iter().rev();
                let members = members.flat_map(|(name, values)| values.iter().map(move |value| (name, value)));
                for (at, (name, value)) in members.enumerate() {
                    out.push_str(if at == 0 { "" } else { "\n, " });
                    spell_string(name, out);
                    out.push_str(" :\t");
                    value.spell(out);
                }
                out.push_str(" }");
            }
        }
    }
}

fn spell_string(text: &str, out: &mut String) {
    out.push('"');
    for unit in text.encode_utf16() {
        write!(out, "\\u{unit:04X}").unwrap();
    }
    out.push('"');
}
