//! Random documents.

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde::de::IgnoredAny;

use super::change::{changed, without};
use super::model::{decode, json};
use super::spelling::Spelling;
use super::{canonical, fed, leaving_out};
use crate::protocol::json::CanonicalJson;

/// Returns whether `serde_json` accepts a body. Returns `None` if `serde_json` cannot decide. It
/// rejects numbers that are too large for f64, and it accepts lone surrogates in values that it
/// skips.
fn accepted_by_serde_json(body: &[u8]) -> Option<bool> {
    match serde_json::from_slice::<serde_json::Value>(body) {
        Err(error) if error.to_string().starts_with("number out of range") => {
            let syntax = serde_json::from_slice::<IgnoredAny>(body).is_ok() && std::str::from_utf8(body).is_ok();
            (!syntax || !body.windows(2).any(|pair| pair == b"\\u")).then_some(syntax)
        }
        // The only documented difference: `Value` stops at 127 levels, and this crate at 128.
        Err(error) if error.to_string().starts_with("recursion limit exceeded") => None,
        result => Some(result.is_ok()),
    }
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let telling = || prop_oneof![4 => select(br#"{}[]:,"\/ubnte+-.019Ee"#.to_vec()), 1 => any::<u8>()];
    let edits = proptest::collection::vec((any::<Index>(), 0..3_usize, telling()), 0..3);
    (json(), any::<u64>(), edits).prop_map(|(value, seed, edits)| {
        let mut body = Spelling::spell(seed, &value).into_bytes();
        for (at, kind, byte) in edits {
            let at = at.index(body.len() + 1);
            let end = (at + usize::from(kind > 0)).min(body.len());
            body.splice(at..end, (kind < 2).then_some(byte));
        }
        body
    })
}

#[test]
fn mutated_documents_are_both_accepted_and_refused() {
    let mut runner = TestRunner::deterministic();
    let accepted = (0..1000).filter(|_| {
        let body = mutated().new_tree(&mut runner).unwrap().current();
        fed(&CanonicalJson::new(), &body).is_some()
    });
    let accepted = accepted.count();
    assert!((300..900).contains(&accepted), "{accepted} of 1000 accepted");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn two_spellings_of_a_document_have_one_form(value in json(), seeds in any::<(u64, u64)>()) {
        let (one, other) = (Spelling::spell(seeds.0, &value), Spelling::spell(seeds.1, &value));
        let form = canonical(&one);
        prop_assert!(form.is_some(), "{}", one);
        prop_assert_eq!(&form, &canonical(&other), "{} and {}", one, other);
        prop_assert_eq!(decode(&form.unwrap()), value.sorted());
    }

    #[test]
    fn two_documents_have_one_form_only_if_they_mean_the_same(
        value in json(),
        at in proptest::collection::vec(any::<Index>(), 0..5),
        kind in 0..12_usize,
        seed in any::<u64>(),
    ) {
        let other = changed(&value, &at, kind);
        let forms = [canonical(&Spelling::spell(seed, &value)), canonical(&Spelling::spell(!seed, &other))];
        prop_assert_eq!(forms[0] == forms[1], value.sorted() == other.sorted(), "{:?} and {:?}", value, other);
    }

    #[test]
    fn leaving_out_equals_never_having_sent(
        value in json(), path in proptest::collection::vec(any::<Index>(), 1..5), seed in any::<u64>(),
    ) {
        if let Some((reduced, pointer)) = without(&value, &path) {
            let form = fed(&leaving_out(&[&pointer]), Spelling::spell(seed, &value).as_bytes());
            prop_assert_eq!(form, canonical(&Spelling::spell(!seed, &reduced)), "{}", pointer);
        }
    }

    #[test]
    fn accepts_what_serde_json_accepts(body in mutated()) {
        if let Some(accepted) = accepted_by_serde_json(&body) {
            prop_assert_eq!(fed(&CanonicalJson::new(), &body).is_some(), accepted, "{}", body.escape_ascii());
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(body in any::<Vec<u8>>(), soup in "[\\[\\]{}:,\"\\\\ud8c0-9eE+. -]{0,40}") {
        for body in [&body[..], soup.as_bytes()] {
            let fed = fed(&leaving_out(&["/0", "/a/0"]), body).is_some();
            if let Some(accepted) = accepted_by_serde_json(body) {
                prop_assert_eq!(fed, accepted, "{}", body.escape_ascii());
            }
        }
    }
}
