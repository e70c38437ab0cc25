//! Multipart bodies in a fingerprint.
//!
//! If the layer compares a body by its parts, the same body with another boundary is the same
//! request, and the same body with one other byte is not.

use bytes::Bytes;
use http::{HeaderValue, Request};
use tower_idempotency::protocol::Fingerprint;

use crate::exchange::fingerprint;
use crate::input::{Input, halves};

/// A boundary that no body contains. Otherwise the property skips the body.
const OTHER: &str = "another-boundary-of-the-same-request";

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (at, flip) = (usize::from(u16::from_le_bytes(input.take())), input.byte().max(1));
    let (boundary, body) = halves(input.rest());
    let Ok(boundary) = std::str::from_utf8(boundary) else {
        return;
    };
    let Some(first) = of_parts(&type_with(boundary), body) else {
        return;
    };
    let delimiter = format!("--{boundary}").into_bytes();
    if contains(body, OTHER.as_bytes()) {
        return;
    }
    let respelled = replaced(body, &delimiter, format!("--{OTHER}").as_bytes());
    assert_eq!(of_parts(&type_with(OTHER), &respelled), Some(first));
    if let Some(byte) = body.get(at) {
        let mut changed = body.to_vec();
        changed[at] = byte ^ flip;
        assert_ne!(of_parts(&type_with(boundary), &changed), Some(first));
    }
    assert_ne!(of_parts(&type_with(boundary), &body[..body.len() - 1]), Some(first));
    let other_type = type_with(boundary).replace("form-data", "mixed");
    assert_ne!(of_parts(&other_type, body), Some(first));
}

fn type_with(boundary: &str) -> String {
    let escaped = boundary.replace('\\', "\\\\").replace('"', "\\\"");
    format!("multipart/form-data; boundary=\"{escaped}\"")
}

/// Returns the fingerprint; `None` if the layer compares the bytes of the body.
fn of_parts(content_type: &str, body: &[u8]) -> Option<Fingerprint> {
    let content_type = HeaderValue::from_str(content_type).ok()?;
    let request = Request::post("/")
        .header("idempotency-key", "k")
        .header("content-type", content_type);
    let request = request.body(Bytes::copy_from_slice(body)).unwrap();
    let of = fingerprint(|layer| layer.with_multipart_fingerprint(), request);
    (of.algorithm() == Fingerprint::MULTIPART).then_some(of)
}

fn contains(body: &[u8], text: &[u8]) -> bool {
    body.windows(text.len()).any(|window| window == text)
}

fn replaced(mut body: &[u8], text: &[u8], by: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(first) = body.first() {
        if body.starts_with(text) {
            out.extend_from_slice(by);
            body = &body[text.len()..];
        } else {
            out.push(*first);
            body = &body[1..];
        }
    }
    out
}
