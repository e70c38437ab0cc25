//! Documents that were written by hand.

use super::model::{Json, decode};
use super::{assert_all_different, assert_same, canonical, fed, leaving_out};
use crate::error::ErrorKind;
use crate::protocol::json::CanonicalJson;
use crate::protocol::json::output::CHUNK;
use crate::protocol::json::reader::MAX_DEPTH;

#[test]
fn the_form_is_the_documented_one() {
    let form = canonical(r#" { "b" : [ null, true, false, 0 ], "a" : -12.50, "c" : 1e99999999999999999999 } "#);
    let expected = [
        b"{\"a\xff#-125e" as &[u8],
        &(-1_i64).to_be_bytes(),
        b"\"b\xff[ntf#+;]\"c\xff~1e99999999999999999999\xff}",
    ];
    assert_eq!(form.unwrap(), expected.concat());
}

#[test]
fn spelling_does_not_matter() {
    assert_same(&[r#"{"a":1,"b":[]}"#, "\t{\r\n \"b\" : [ ] ,\"a\": 1 } "]);
    assert_same(&[r#""a/é😀\n""#, r#""\u0061\/\u00e9\uD83d\ude00\u000A""#]);
    assert_same(&[r#"{"a":1,"\u0062":2}"#, r#"{"b":2,"\u0061":1}"#]);
}

#[test]
fn meaning_matters() {
    assert_all_different(&[
        "1",
        "\"1\"",
        "[1]",
        "{\"1\":1}",
        "null",
        "true",
        "false",
        "\"null\"",
        "[]",
        "{}",
        "[[]]",
    ]);
    assert_all_different(&["[1,2]", "[2,1]", "[12]", "[[1],2]", "[1,[2]]", "[[1,2]]", "[1,2,2]"]);
    assert_all_different(&[
        r#"{"a":1}"#,
        r#"{"A":1}"#,
        r#"{"a":{}}"#,
        r#"{"a":1,"b":null}"#,
        r#"{"a\u0000":1}"#,
    ]);
    assert_all_different(&[
        r#"{"a":{"b":1}}"#,
        r#"{"a":{},"b":1}"#,
        r#"{"b":{"a":1}}"#,
        r#"{"a":["b",1]}"#,
    ]);
    // The composed and the decomposed form of a character differ, because JSON has no
    // normalization.
    assert_all_different(&[r#""é""#, r#""e\u0301""#]);
}

#[test]
fn duplicate_members_all_count_in_their_order() {
    assert_all_different(&[
        r#"{"a":1,"a":2}"#,
        r#"{"a":2,"a":1}"#,
        r#"{"a":1}"#,
        r#"{"a":2}"#,
        r#"{"a":[1,2]}"#,
    ]);
    assert_same(&[r#"{"a":1,"b":0,"a":2}"#, r#"{"b":0,"a":1,"\u0061":2}"#]);
}

#[test]
fn many_duplicate_members_keep_their_order() {
    let body = |values: &[usize]| {
        let members = values
            .iter()
            .map(|value| format!("\"{}\":{value}", ["b", "a", "\\u0061"][value % 3]));
        format!("{{{}}}", members.collect::<Vec<_>>().join(","))
    };
    let values: Vec<_> = (1..1000).collect();
    let Json::Object(members) = decode(&canonical(&body(&values)).unwrap()) else {
        panic!("an object was sent")
    };
    let names_in_order = values
        .iter()
        .filter(|&value| value % 3 > 0)
        .chain(values.iter().filter(|&value| value % 3 == 0));
    for ((_, value), expected) in members.iter().zip(names_in_order) {
        let expected = decode(&canonical(&expected.to_string()).unwrap());
        assert_eq!(*value, expected);
    }
}

#[test]
fn every_byte_is_judged_as_serde_json_does() {
    for byte in 0..=u8::MAX {
        for (before, after) in [
            ("", ""),
            ("1", ""),
            ("", "1"),
            ("\"", "\""),
            ("\"\\", "\""),
            ("\"\\u00", "0\""),
        ] {
            let body = [before.as_bytes(), &[byte], after.as_bytes()].concat();
            let expected = serde_json::from_slice::<serde_json::Value>(&body).is_ok();
            assert_eq!(
                fed(&CanonicalJson::new(), &body).is_some(),
                expected,
                "{}",
                body.escape_ascii()
            );
        }
    }
}

#[test]
fn numbers_compare_by_exact_decimal_value() {
    assert_same(&[
        "1", "1.0", "10e-1", "1E0", "1e+0", "1e-00", "0.1e1", "0.001e3", "100e-2",
    ]);
    assert_same(&["1200", "12e2", "1.2E+3", "0.0012e6", "12000.00e-1"]);
    assert_same(&["-0.5", "-5e-1", "-0.50"]);
    assert_all_different(&["12345678901234567890123", "12345678901234567890124"]);
    assert_all_different(&[
        "0.1",
        "0.10000000000000000000000000000000000000001",
        "1",
        "10",
        "-1",
        "101",
        "1001",
    ]);
    assert_all_different(&["1e400", "1e401", "1e-400", "1e-401", "0"]);
}

#[test]
fn minus_zero_is_zero_of_another_sign() {
    assert_same(&["0", "0.00", "0e5", "0e99999999999999999999", "0.0E-7"]);
    assert_same(&["-0", "-0.0", "-0e1"]);
    assert_all_different(&["0", "-0"]);
    // The reason: a handler that expects an unsigned number accepts `0` and rejects `-0`.
    assert!(serde_json::from_str::<u64>("0").is_ok());
    assert!(serde_json::from_str::<u64>("-0").is_err());
}

#[test]
fn exponents_up_to_64_bits_are_exact_and_beyond_are_text() {
    assert_same(&["1e9223372036854775807", "1.0e9223372036854775807"]);
    assert_same(&["1e-9223372036854775808", "1e-0000009223372036854775808"]);
    assert_all_different(&[
        "1e9223372036854775807",
        "1e9223372036854775808",
        "10e9223372036854775807",
        "0.1e-9223372036854775808",
        "1e-9223372036854775808",
        "1e-9223372036854775809",
        "1e99999999999999999999",
        "1e99999999999999999998",
        "-1e99999999999999999999",
    ]);
    let long = format!("1e{}1", "0".repeat(100_000));
    assert_same(&["10", &long]);
    assert!(canonical(&format!("1e{}", "9".repeat(100_000))).is_some());
}

#[test]
fn what_is_not_json_is_refused_and_feeds_nothing() {
    let refused = r#"{ [ ] [1 [1,] [,1] {"a"} {"a":} {"a":1,} {a:1} {1:1} {,} {"a"1} [} {] [1]] {}{} //
        01 -01 - +1 --1 1. .1 1e 1e+ 1e1.5 0x1 NaN Infinity nul nulll True
        " "a "\" "\x" "\é" "\u12" "\u+123" "\u12G4" "\ "\u "\ud800\ 'a'"#;
    let spaced = [
        "",
        " ",
        "1 2",
        "[1 2]",
        "\"\n\"",
        "\"\t\"",
        "\u{feff}1",
        "1\u{a0}",
        "// a\n1",
        "\u{b}1",
        "nu ll",
    ];
    for body in refused.split_whitespace().chain(spaced) {
        assert_eq!(canonical(body), None, "{body:?}");
        assert!(serde_json::from_str::<serde_json::Value>(body).is_err(), "{body:?}");
    }
}

#[test]
fn half_a_surrogate_pair_and_invalid_utf8_are_refused() {
    for body in [
        r#""\ud800""#,
        r#""\udc00""#,
        r#""\ud800\ud800""#,
        r#""\ud800a""#,
        r#""\ud800\n""#,
        r#""\udc00\ud800""#,
    ] {
        assert_eq!(canonical(body), None, "{body}");
    }
    let settings = CanonicalJson::new();
    for body in [
        &b"\"\xff\""[..],
        b"\"\xc3\"",
        b"\"\xed\xa0\x80\"",
        b"\xff",
        b"1\xff",
        b"\"\xc0\xaf\"",
    ] {
        assert_eq!(fed(&settings, body), None, "{body:?}");
    }
}

#[test]
fn nesting_is_bounded_at_128() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]")] {
        let levels = open.chars().filter(|char| "[{".contains(*char)).count();
        let nested = |times: usize| format!("{}1{}", open.repeat(times), close.repeat(times));
        assert!(canonical(&nested(MAX_DEPTH / levels)).is_some());
        assert_eq!(canonical(&nested(MAX_DEPTH / levels + 1)), None);
        assert_eq!(canonical(&nested(100_000)), None);
        assert_eq!(canonical(&open.repeat(100_000)), None);
    }
    let wide = format!("[{}[]]", "[[]],".repeat(1000));
    assert!(canonical(&wide).is_some(), "depth is not the number of arrays");
}

#[test]
fn left_out_members_were_never_sent() {
    let cases: [(&[&str], &str, &str); 14] = [
        (&["/a"], r#"{"a":{"x":[1]},"b":2}"#, r#"{"b":2}"#),
        (&["/a"], r#"{"\u0061":1,"b":2,"a":3}"#, r#"{"b":2}"#),
        (&["/a"], r#"{"b":{"a":1}}"#, r#"{"b":{"a":1}}"#),
        (&["/b/a", "/c"], r#"{"b":{"a":1,"c":3},"c":2}"#, r#"{"b":{"c":3}}"#),
        (&["/b/a", "/b"], r#"{"b":{"a":1,"c":3},"c":2}"#, r#"{"c":2}"#),
        (
            &["/a~1b", "/m~0n", "/~01"],
            r#"{"a/b":1,"m~n":2,"~1":3,"/":4}"#,
            r#"{"/":4}"#,
        ),
        (&["/"], r#"{"":1," ":2}"#, r#"{" ":2}"#),
        (&["//"], r#"{"":{"":1,"a":2}}"#, r#"{"":{"a":2}}"#),
        (&["/0", "/2"], "[1,[2],{\"a\":3},4]", "[[2],4]"),
        (&["/1/0/a"], r#"[{"a":1},[{"a":1,"b":2}]]"#, r#"[{"a":1},[{"b":2}]]"#),
        (
            &["/00", "/-", "/+1", "/01", "/5", "/99999999999999999999"],
            "[1,2]",
            "[1,2]",
        ),
        (&["/0", "/01", "/-"], r#"{"0":0,"01":1,"-":2,"1":3}"#, r#"{"1":3}"#),
        (&["/a/b"], r#"{"a":"b","c":null}"#, r#"{"a":"b","c":null}"#),
        (&["/a"], "1", "1"),
    ];
    for (pointers, sent, counted) in cases {
        let form = fed(&leaving_out(pointers), sent.as_bytes());
        assert_eq!(form, canonical(counted), "{sent} without {pointers:?}");
    }
}

#[test]
fn pointers_that_are_none_are_refused() {
    for pointer in ["", "a", "#/a", "/~", "/a~2", "/~a/b", "/a/~", &"/a".repeat(129)] {
        let error = CanonicalJson::new().leave_out(pointer).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{pointer}");
    }
    assert!(CanonicalJson::new().leave_out(&"/a".repeat(128)).is_ok());
}

#[test]
fn long_documents_arrive_whole_whatever_the_chunks() {
    let body = format!(
        "[{},\"{}\",\"\\u0061{}\"]",
        "1,".repeat(9999) + "1",
        "x".repeat(3 * CHUNK),
        "é".repeat(CHUNK)
    );
    let expected = decode(&canonical(&body).unwrap());
    let Json::Array(elements) = expected else {
        panic!("an array was sent")
    };
    assert_eq!(elements.len(), 10_002);
    assert_eq!(elements[10_000], Json::String("x".repeat(3 * CHUNK)));
    assert_eq!(elements[10_001], Json::String(format!("a{}", "é".repeat(CHUNK))));
}
