//! Parses JSON in which no object has two members with one name.
//!
//! If a member occurs twice, parsers disagree about which one counts. The check would verify one,
//! and the handler would read the other.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// Parses JSON. Returns `None` if it is malformed or has a member twice.
pub(super) fn parse(body: &[u8]) -> Option<Value> {
    let Unique = serde_json::from_slice(body).ok()?;
    serde_json::from_slice(body).ok()
}

/// A value whose objects have each member once. It stores nothing of the value, because the form of
/// a number depends on the features of `serde_json`. With `arbitrary_precision`, a fraction arrives
/// here as an object with one member.
struct Unique;

/// The name of a member that `serde_json` reserves. With the feature `raw_value`, `serde_json`
/// parses the string in this member as JSON. The members of that JSON are not checked here, so an
/// object with this member is rejected.
const RAW_VALUE: &str = "$serde_json::private::RawValue";

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without repeated members")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_unit<E>(self) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Unique, A::Error> {
        while let Some(Unique) = elements.next_element()? {}
        Ok(Unique)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Unique, A::Error> {
        let mut names = HashSet::new();
        while let Some((name, Unique)) = members.next_entry::<String, Unique>()? {
            if name == RAW_VALUE || !names.insert(name) {
                return Err(A::Error::custom("a member occurs twice, or a string holds JSON"));
            }
        }
        Ok(Unique)
    }
}

#[cfg(test)]
mod tests {
    use serde::de::value::{Error, MapDeserializer};

    use super::*;

    #[test]
    fn every_kind_of_value_is_read_as_it_stands() {
        let body = br#"{"a": [null, true, -1, 18446744073709551615, 1.5, "b"], "c": {"a": {}, "c": []}}"#;
        let expected: Value = serde_json::from_slice(body).unwrap();
        assert_eq!(parse(body), Some(expected));
    }

    #[test]
    fn a_member_that_is_there_twice_is_rejected_at_every_depth() {
        for body in [
            &br#"{"a": 1, "a": 1}"#[..],
            br#"{"a": 1, "\u0061": 2}"#,
            br#"[{"b": [{"a": 1, "c": 2, "a": 3}]}]"#,
            br#"{"a": {"b": 1}, "b": {"a": 1, "a": 1}}"#,
        ] {
            assert_eq!(parse(body), None, "{body:?}");
        }
    }

    /// Any crate of a build can enable this feature of `serde_json`. With it, the number arrives as
    /// an object.
    #[test]
    fn a_number_of_arbitrary_precision_is_a_value() {
        let number = MapDeserializer::<_, Error>::new([("$serde_json::private::Number", "1.5")].into_iter());
        assert!(Unique::deserialize(number).is_ok());
    }

    #[test]
    fn no_member_is_there_twice_within_a_string_that_serde_json_reads_as_json() {
        let body = br#"{"a": {"$serde_json::private::RawValue": "{\"b\": 1, \"b\": 2}"}}"#;
        assert_eq!(parse(body), None);
    }
}
