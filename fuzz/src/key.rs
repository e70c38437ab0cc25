//! The header field `Idempotency-Key` in every syntax.
//!
//! A strict key is the string that `sfv`, another parser of structured fields, reads. A lenient key
//! is that string if the field begins with a quotation mark. All other keys are the field itself.
//! The layer claims the storage key of exactly this key, or refuses the request.

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode};
use tower_idempotency::protocol::Decision;
use tower_idempotency::{KeySyntax, Refusal, RefusalKind};

use crate::exchange::{layer, refused};

const LONGEST: usize = 255;

pub fn property(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else {
        return;
    };
    for syntax in [
        KeySyntax::Lenient,
        KeySyntax::Raw,
        KeySyntax::RawWithSpaces,
        KeySyntax::Strict,
    ] {
        let layer = layer(Ok(Decision::Unknown)).with_key_syntax(syntax);
        let request = Request::post("/").header("idempotency-key", value.clone());
        let (claim, response) = refused(&layer, request.body(Bytes::new()).unwrap());
        let by_name = layer.clone().with_key_syntax(KeySyntax::RawWithSpaces);
        let expected = expected(value.as_bytes(), syntax);
        let storage_key = expected.map(|key| by_name.storage_key(None, &key).unwrap());
        assert_eq!(claim.map(|claim| claim.key), storage_key, "{syntax:?}");
        let refusal = response.extensions().get::<Refusal>().unwrap();
        if storage_key.is_none() {
            assert!(matches!(refusal.kind(), RefusalKind::InvalidKey(_)), "{refusal:?}");
            assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        }
    }
}

fn expected(value: &[u8], syntax: KeySyntax) -> Option<String> {
    let value = value.trim_ascii();
    let is_string = match syntax {
        KeySyntax::Lenient => value.starts_with(b"\""),
        KeySyntax::Strict => true,
        _ => false,
    };
    let key = if is_string {
        let item: sfv::Item = sfv::Parser::new(value).parse().ok()?;
        item.bare_item.as_string()?.as_str().to_owned()
    } else {
        String::from_utf8(value.to_vec()).ok()?
    };
    let is_allowed = |byte: u8| byte.is_ascii_graphic() || syntax == KeySyntax::RawWithSpaces && byte == b' ';
    ((1..=LONGEST).contains(&key.len()) && key.bytes().all(is_allowed)).then_some(key)
}
