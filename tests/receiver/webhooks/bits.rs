//! An altered webhook is rejected, whichever bit changes.

use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Uri};
use serde_json::Value;
use tower_idempotency::receiver::webhooks::InvalidWebhook;

use super::senders::{Sender, adyen, adyen_colon, all, twilio, twilio_json};

/// Calls `check` with each form of `bytes` in which one bit is different.
fn each_flip(bytes: &[u8], mut check: impl FnMut(usize, &[u8])) {
    let mut flipped = bytes.to_vec();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            flipped[at] = bytes[at] ^ (1 << bit);
            check(at, &flipped);
        }
        flipped[at] = bytes[at];
    }
}

/// Returns the head with another value in a field, or `None` if a header field cannot have the
/// value.
fn with_header(sender: &Sender, name: &'static str, value: &[u8]) -> Option<Parts> {
    let mut head = sender.head();
    let value = HeaderValue::from_bytes(value).ok()?;
    head.headers.insert(HeaderName::from_static(name), value);
    Some(head)
}

#[test]
fn every_changed_bit_of_a_signed_field_is_rejected() {
    for sender in all() {
        for name in sender.signed.iter().copied() {
            let genuine = sender.head().headers[name].clone();
            let mut tried = 0;
            each_flip(genuine.as_bytes(), |_, value| {
                if let Some(head) = with_header(&sender, name, value) {
                    tried += 1;
                    let verified = sender.verify(&head, &sender.body);
                    assert!(verified.is_err(), "{}: {name}: {value:?}", sender.name);
                }
            });
            assert!(tried > genuine.len(), "{}: {name}", sender.name);
        }
    }
}

#[test]
fn every_changed_bit_of_a_body_is_rejected() {
    // Parts of a standard notification of Adyen are not signed.
    for sender in all()
        .iter()
        .filter(|sender| !sender.name.starts_with("Adyen") || !sender.signed.is_empty())
    {
        each_flip(&sender.body, |_, body| {
            let verified = sender.verify(&sender.head(), body);
            assert!(verified.is_err(), "{}: {}", sender.name, String::from_utf8_lossy(body));
        });
    }
}

#[test]
fn every_changed_bit_of_a_signed_url_is_rejected() {
    for sender in [twilio(), twilio_json()] {
        let mut tried = 0;
        each_flip(sender.uri.as_bytes(), |_, uri| {
            // A client does not send a fragment, and an invalid target never arrives.
            let uri = std::str::from_utf8(uri).ok().filter(|uri| !uri.contains('#'));
            if let Some(uri) = uri.and_then(|uri| uri.parse::<Uri>().ok()) {
                tried += 1;
                let mut head = sender.head();
                head.uri = uri;
                assert!(sender.verify(&head, &sender.body).is_err(), "{}", head.uri);
            }
        });
        assert!(tried > sender.uri.len());
    }
}

/// The signed members and the signature of a notification of Adyen.
fn signed_members(body: &Value) -> [Option<Value>; 9] {
    [
        "/pspReference",
        "/originalReference",
        "/merchantAccountCode",
        "/merchantReference",
        "/amount/value",
        "/amount/currency",
        "/eventCode",
        "/success",
        "/additionalData/hmacSignature",
    ]
    .map(|name| {
        let item = body.pointer("/notificationItems/0/NotificationRequestItem")?;
        item.pointer(name).cloned()
    })
}

/// Adyen signs eight members and no other part of the body.
#[test]
fn every_changed_bit_of_a_signed_member_is_rejected() {
    for sender in [adyen(), adyen_colon()] {
        let genuine: Value = serde_json::from_slice(&sender.body).unwrap();
        let genuine_id = sender.verify(&sender.head(), &sender.body).unwrap();
        let text = String::from_utf8(sender.body.clone()).unwrap();
        let mut covered = vec![false; text.len()];
        for member in signed_members(&genuine).iter().flatten() {
            let written = member.to_string();
            let at = text.find(&written).unwrap();
            covered[at..at + written.len()].fill(true);
        }
        let mut accepted = 0;
        each_flip(&sender.body, |at, body| {
            if let Ok(id) = sender.verify(&sender.head(), body) {
                let shown = String::from_utf8_lossy(body);
                assert!(!covered[at], "{shown}");
                assert_eq!(id, genuine_id, "{shown}");
                let altered: Value = serde_json::from_slice(body).unwrap();
                assert_eq!(signed_members(&altered), signed_members(&genuine), "{shown}");
                accepted += 1;
            }
        });
        // Only white space and unsigned members may change.
        assert!(accepted < 200, "{accepted}");
    }
}

#[test]
fn no_truncated_body_passes() {
    for sender in all() {
        for end in 0..sender.body.len() {
            let verified = sender.verify(&sender.head(), &sender.body[..end]);
            // Twilio signs each different parameter once, so a repetition at the end can be cut
            // off.
            let is_cut_repetition = sender.body[..end].ends_with(b"&Digits=1234");
            if sender.name == "Twilio, repeated values" && is_cut_repetition {
                assert!(verified.is_ok());
                continue;
            }
            let reason = verified.expect_err(sender.name);
            let reasons = [InvalidWebhook::Signature, InvalidWebhook::Body];
            assert!(reasons.contains(&reason), "{}: {end}: {reason:?}", sender.name);
        }
    }
}

/// With two lines, the check could read one and the handler the other.
#[test]
fn a_field_that_the_check_reads_may_not_be_repeated() {
    for sender in all() {
        let ids = ["x-github-delivery", "x-shopify-event-id", "i-twilio-idempotency-token"];
        let has = |name: &&str| sender.headers.iter().any(|(found, _)| found == name);
        for name in sender.signed.iter().copied().chain(ids.into_iter().filter(has)) {
            for other in ["1", sender.head().headers[name].to_str().unwrap()] {
                let mut head = sender.head();
                head.headers.append(name, HeaderValue::from_str(other).unwrap());
                assert!(sender.verify(&head, &sender.body).is_err(), "{}: {name}", sender.name);
            }
        }
    }
}

#[test]
fn a_missing_field_is_the_reason_that_is_reported() {
    for sender in all() {
        for name in sender.signed {
            let mut head = sender.head();
            head.headers.remove(*name);
            assert_eq!(
                sender.verify(&head, &sender.body),
                Err(InvalidWebhook::MissingHeader),
                "{}: {name}",
                sender.name
            );
        }
    }
    for sender in all() {
        let signature = sender
            .signed
            .iter()
            .find(|name| name.contains("sig") || name.contains("hmac"));
        if let Some(signature) = signature {
            assert!(sender.provider.is_signed(&sender.head().headers), "{}", sender.name);
            let mut unsigned = sender.head();
            unsigned.headers.remove(*signature);
            assert!(!sender.provider.is_signed(&unsigned.headers), "{}", sender.name);
        }
    }
}
