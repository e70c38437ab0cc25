//! Twilio signs one text in which nothing marks the end of the URL and of each parameter.

use axum::http::Request;
use bytes::Bytes;
use data_encoding::{BASE64, HEXLOWER};
use sha2::{Digest, Sha256};
use tower_idempotency::ErrorKind;
use tower_idempotency::receiver::MessageId;
use tower_idempotency::receiver::testing::WebhookSigner;
use tower_idempotency::receiver::webhooks::{InvalidWebhook, TwilioWebhooks, VerifyWebhook, Webhook};

use super::mac;
use super::senders::{Sender, at, twilio, twilio_json};

const FORM: &str = "application/x-www-form-urlencoded";
const URL: &str = "https://mycompany.com";

fn with(sender: Sender, provider: impl VerifyWebhook) -> Sender {
    let provider = Box::new(provider);
    Sender { provider, ..sender }
}

fn verify(provider: &TwilioWebhooks, request: Request<Bytes>) -> Result<MessageId, InvalidWebhook> {
    let (head, body) = request.into_parts();
    provider.verify(&Webhook::new(&head, &body, at(0)))
}

/// Returns the verdict on a forged webhook that has the signature of a recorded one.
fn forged(recorded: &Request<Bytes>, target: &str, kind: &str, body: &str) -> Result<MessageId, InvalidWebhook> {
    let forged = Request::post(target)
        .header("x-twilio-signature", &recorded.headers()["x-twilio-signature"])
        .header("i-twilio-idempotency-token", "another")
        .header("content-type", kind);
    let provider = TwilioWebhooks::new(URL, ["12345"]).unwrap();
    verify(&provider, forged.body(Bytes::copy_from_slice(body.as_bytes())).unwrap())
}

fn hash(body: &str) -> String {
    HEXLOWER.encode(&Sha256::digest(body))
}

/// An attacker could shift a text message with `&bodySHA256=` into the URL. The check then covered
/// only the hash of the attacker's own body.
#[test]
fn parameters_that_are_shifted_into_the_url_authenticate_no_other_body() {
    let own = "AccountSid=AC1&Body=pay+everything&From=%2B1555";
    let text = format!("&bodySHA256={}&", hash(own));
    let encoded = text.replace('&', "%26").replace('=', "%3D");
    let request = Request::post("/sms?tenant=1").body(format!("AccountSid=AC1&Body={encoded}&From=%2B1555"));
    let recorded = WebhookSigner::twilio(URL, "12345").sign(request.unwrap());
    let target = format!("/sms?tenant=1AccountSidAC1Body{text}From+1555");
    // A handler could read each of these as a form.
    for kind in [
        FORM,
        "Application/X-WWW-Form-URLEncoded; charset=UTF-8",
        "application/x-www-form-urlencoded2",
    ] {
        assert_eq!(
            forged(&recorded, &target, kind, own),
            Err(InvalidWebhook::Signature),
            "{kind}"
        );
    }
    for kind in ["application/json", "text/plain", ""] {
        assert_eq!(
            forged(&recorded, &target, kind, own),
            Err(InvalidWebhook::Body),
            "{kind}"
        );
    }
}

#[test]
fn a_form_signs_its_parameters_whatever_hash_the_url_has() {
    let signer = WebhookSigner::twilio(URL, "12345");
    let body = "Body=hi";
    let target = format!("/sms?bodySHA256={}", hash(body));
    // The signature of the URL alone, which fits a body of another type with this hash.
    let recorded = signer.sign(
        Request::post("/sms")
            .header("content-type", "text/plain")
            .body(body)
            .unwrap(),
    );
    assert_eq!(recorded.uri().to_string(), target);
    assert!(forged(&recorded, &target, "text/plain", body).is_ok());
    assert_eq!(forged(&recorded, &target, FORM, body), Err(InvalidWebhook::Signature));
    // A form whose URL has any hash.
    let target = format!("/sms?bodySHA256={}", hash("other"));
    let recorded = signer.sign(Request::post(&target).body(body).unwrap());
    assert!(forged(&recorded, &target, FORM, body).is_ok());
    assert_eq!(
        forged(&recorded, &target, FORM, "Body=ho"),
        Err(InvalidWebhook::Signature)
    );
}

/// With two lines, the check could read one and the handler the other.
#[test]
fn the_content_type_that_decides_may_not_be_repeated() {
    for sender in [twilio(), twilio_json()] {
        for other in [FORM, "application/json"] {
            let mut head = sender.head();
            head.headers.append("content-type", other.parse().unwrap());
            assert_eq!(sender.verify(&head, &sender.body), Err(InvalidWebhook::Body), "{other}");
        }
    }
}

/// Twilio's shared keys sign with HMAC-SHA-256, which an auth token cannot verify.
#[test]
fn a_signature_by_a_shared_key_is_reported_as_a_secret_that_does_not_fit() {
    const SETTINGS: &str = "x-twilio-webhooks-signature-settings";
    let signed = b"https://mycompany.com/myapp.php?foo=1&bar=2CallSidCA1234567890ABCDECaller+14158675309Digits1234\
                   From+14158675309To+18005551212";
    let mut by_shared_key = twilio();
    by_shared_key.headers[0].1 = BASE64.encode(&mac(b"12345", signed));
    assert_eq!(by_shared_key.verify_at(0), Err(InvalidWebhook::Signature));
    let forged = by_shared_key.verify_with("x-twilio-signature", "AAAA");
    assert_eq!(forged, Err(InvalidWebhook::Signature));
    for settings in [
        "key=SK1,algorithm=HMAC_SHA256",
        "algorithm=HMAC_SHA1",
        "algorithm=none",
        "",
    ] {
        for sender in [twilio(), twilio_json()] {
            assert_eq!(
                sender.verify_with(SETTINGS, settings),
                Err(InvalidWebhook::Secret),
                "{settings}"
            );
        }
        assert_eq!(
            by_shared_key.verify_with(SETTINGS, settings),
            Err(InvalidWebhook::Secret),
            "{settings}"
        );
    }
}

/// The URL with the other port lost the user and the password, which Twilio signs.
#[test]
fn the_public_url_of_twilio_may_have_a_user_and_a_password() {
    for (with_port, without) in [
        ("https://user:pass@mycompany.com:443", "https://user:pass@mycompany.com"),
        ("http://user@mycompany.com:80/api", "http://user@mycompany.com/api"),
        ("https://user:443@mycompany.com:443", "https://user:443@mycompany.com"),
        ("https://user:pass@[2001:db8::1]:443", "https://user:pass@[2001:db8::1]"),
    ] {
        for (signed, entered) in [(with_port, without), (without, with_port), (without, without)] {
            let signer = WebhookSigner::twilio(signed, "12345");
            let sign = || signer.sign(Request::post("/sms").body("Body=hi").unwrap());
            let verified = verify(&TwilioWebhooks::new(entered, ["12345"]).unwrap(), sign());
            assert!(verified.is_ok(), "{signed} {entered}");
            let anonymous = entered
                .replace("user:pass@", "")
                .replace("user:443@", "")
                .replace("user@", "");
            let verified = verify(&TwilioWebhooks::new(anonymous, ["12345"]).unwrap(), sign());
            assert_eq!(verified, Err(InvalidWebhook::Signature), "{signed} {entered}");
        }
    }
}

/// As in Twilio's libraries, the configured URL may have a port that the signed one lacks, or the
/// reverse.
#[test]
fn the_public_url_of_twilio_may_have_its_port_and_a_prefix() {
    for (url, uri, is_genuine) in [
        ("https://mycompany.com/", "/myapp.php?foo=1&bar=2", true),
        ("https://mycompany.com:443", "/myapp.php?foo=1&bar=2", true),
        // A proxy has removed the prefix.
        ("https://mycompany.com/myapp.php", "/?foo=1&bar=2", false),
        ("http://mycompany.com", "/myapp.php?foo=1&bar=2", false),
        ("https://mycompany.com", "/myapp.php?bar=2&foo=1", false),
        ("https://mycompany.com.example", "/myapp.php?foo=1&bar=2", false),
    ] {
        let mut sender = with(twilio(), TwilioWebhooks::new(url, ["12345"]).unwrap());
        sender.uri = uri;
        assert_eq!(sender.verify_at(0).is_ok(), is_genuine, "{url} {uri}");
    }
    // From the tests of Twilio's library for Python: a signature over the URL with the port.
    let sender = with(
        twilio(),
        TwilioWebhooks::new("http://mycompany.com", ["12345"]).unwrap(),
    );
    assert!(
        sender
            .verify_with("x-twilio-signature", "0ZXoZLH/DfblKGATFgpif+LLRf4=")
            .is_ok()
    );
    for impossible in [
        "",
        "mycompany.com",
        "/path",
        "ftp://mycompany.com",
        "https://mycompany.com/?a=b",
        "https://",
    ] {
        let error = TwilioWebhooks::new(impossible, ["12345"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{impossible}");
    }
}

#[test]
fn a_body_of_twilio_is_a_form_unless_its_hash_is_signed() {
    let verified = twilio().verify_with("content-type", "application/json");
    assert_eq!(verified, Err(InvalidWebhook::Body));
    let mut unhashed = twilio_json();
    unhashed.uri = "/myapp.php?foo=1&bar=2";
    assert_eq!(unhashed.verify_at(0), Err(InvalidWebhook::Body));
    // The order of the parameters does not matter. Their spelling does, as the loop below shows.
    let mut reordered = twilio();
    reordered.body =
        b"To=%2B18005551212&Digits=1234&From=%2B14158675309&CallSid=CA1234567890ABCDE&Caller=%2B14158675309".to_vec();
    assert!(reordered.verify_at(0).is_ok());
    for (genuine, malformed) in [
        ("%2B", "%2b"),
        ("%2B", "%2"),
        ("&Digits", "&&Digits"),
        ("Digits=", "Digits"),
    ] {
        let mut sender = twilio();
        let body = String::from_utf8(sender.body).unwrap();
        sender.body = body.replace(genuine, malformed).into_bytes();
        assert!(sender.verify_at(0).is_err(), "{malformed}");
    }
}
