//! The rendering of refusals, with any base of problem types and any header field of the key.
//!
//! A problem document and an error in Stripe's shape are JSON with exactly the expected members. A
//! gRPC status has a message that decodes to the texts of the refusal. All have the headers that
//! protect them from caches.

use std::time::Duration;

use bytes::Bytes;
use futures::executor::block_on;
use http::{HeaderMap, HeaderName, Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower_idempotency::protocol::Decision;
use tower_idempotency::{Error, ErrorKind, Refusal};

use crate::exchange::{Layered, layer, refused};
use crate::input::{Input, halves};

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let style = input.byte() % 3;
    let reply = reply(&mut input);
    let (name, base) = halves(input.rest());
    let Ok(name) = HeaderName::from_bytes(name) else { return };
    let base = String::from_utf8_lossy(base);
    let plain = layer(reply).with_wait(Duration::ZERO).with_should_retry_header(None);
    let is_uri = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&byte);
    let styled = match style {
        0 => match plain.with_problem_base(&base) {
            Ok(styled) if base.bytes().all(is_uri) => styled,
            Err(error) if !base.bytes().all(is_uri) => return assert_eq!(error.kind(), ErrorKind::Configuration),
            other => panic!("{base:?}: {:?}", other.map(drop)),
        },
        1 => plain.stripe(),
        _ => plain.grpc(),
    };
    check(style, &base, &styled.with_header(name.clone()), &name);
}

/// Chooses the reply of the store.
fn reply(input: &mut Input<'_>) -> Result<Decision, Error> {
    const WHAT: &str = "the store fails";
    let left = Duration::from_micros(u64::from_le_bytes(input.take()));
    match input.byte() % 8 {
        0 => Ok(Decision::Mismatch),
        1 => Ok(Decision::NotStored),
        2 => Ok(Decision::Unknown),
        3 => Err(Error::new(ErrorKind::Configuration, WHAT)),
        4 => Err(Error::new(ErrorKind::CorruptRecord, WHAT)),
        5 => Err(Error::new(ErrorKind::StoreFull, WHAT)),
        6 => Err(Error::new(ErrorKind::StoreUnavailable, WHAT)),
        _ => Ok(Decision::Wait { left }),
    }
}

fn check(style: u8, base: &str, layer: &Layered, name: &HeaderName) {
    let request = Request::post("/")
        .header(name, "k")
        .header("content-type", "application/grpc");
    let (_, response) = refused(layer, request.body(Bytes::new()).unwrap());
    let (head, body) = response.into_parts();
    let body = block_on(body.collect()).unwrap().to_bytes();
    let refusal = head.extensions.get::<Refusal>().expect("the layer refuses");
    assert_eq!(head.headers["cache-control"], "no-store");
    let after = refusal.retry_after_seconds().map(|seconds| seconds.to_string());
    assert_eq!(text(&head.headers, "retry-after"), after.as_deref());
    if name != "idempotency-key" && refusal.title().contains("dempotency-") {
        assert!(refusal.title().contains(name.as_str()), "{}", refusal.title());
    }
    let (title, detail) = (refusal.title(), refusal.detail());
    let sent: Value = serde_json::from_slice(&body).unwrap_or_default();
    match style {
        0 => {
            assert_eq!(head.headers["content-type"], "application/problem+json");
            let expected = json!({
                "type": format!("{base}{}", refusal.code()),
                "title": title,
                "status": head.status.as_u16(),
                "detail": detail,
                "code": refusal.code(),
                "retryable": refusal.is_retryable(),
            });
            assert_eq!(sent, expected);
        }
        1 => {
            assert_eq!(head.headers["content-type"], "application/json");
            let advice = if refusal.is_retryable() { "true" } else { "false" };
            assert_eq!(text(&head.headers, "stripe-should-retry"), Some(advice));
            let error = sent["error"].as_object().unwrap();
            assert_eq!((sent.as_object().unwrap().len(), error.len()), (1, 3));
            assert_eq!(error["message"], format!("{title}: {detail}"));
            assert!(error["code"].is_string() && error["type"].is_string());
        }
        _ => {
            assert_eq!((head.status.as_u16(), &body[..]), (200, &b""[..]));
            let message = decoded(text(&head.headers, "grpc-message").unwrap());
            assert_eq!(message, format!("{title}: {detail}"));
            let code: u8 = text(&head.headers, "grpc-status").unwrap().parse().unwrap();
            assert!((1..=16).contains(&code), "{code}");
        }
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).map(|value| value.to_str().unwrap())
}

/// Decodes the percent-encoding of a gRPC message.
fn decoded(message: &str) -> String {
    let mut parts = message.split('%');
    let mut out = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at(2);
        out.push(u8::from_str_radix(digits, 16).unwrap());
        out.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(out).unwrap()
}
