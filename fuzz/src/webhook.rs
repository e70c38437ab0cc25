//! Webhooks of every provider.
//!
//! A signed webhook passes, and fails with one other byte in its body or in a field that the
//! signature covers. Anything that passes, however it was made, fails with one other byte in its
//! body.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Uri};
use serde_json::{Value, json};
use tower_idempotency::receiver::testing::WebhookSigner;
use tower_idempotency::receiver::webhooks::{
    AdyenPlatformWebhooks, AdyenWebhooks, GitHubWebhooks, PayPalWebhooks, ShopifyWebhooks, SlackWebhooks,
    SquareWebhooks, StandardWebhooks, StripeWebhooks, TwilioWebhooks, VerifyWebhook, Webhook,
};

use crate::input::Input;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const PRIVATE_KEY: &str = "whsk_VEVTVFNJR05JTkdLRVlET05PVFVTRVRISVNGT1JBTlk=";
const PUBLIC_KEY: &str = "whpk_ZlN4eg7dSSqi0moX9hQUk3orrOouK3QVQSlJa248c/g=";
const ADYEN_KEY: &str = "44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056";
const PAYPAL_ID: &str = "3TR748995U920805P";
const PAYPAL_KEY: &str = include_str!("../../tests/receiver/webhooks/paypal_test_key.pem");
const PAYPAL_CERTIFICATE: &str = include_str!("../../tests/receiver/webhooks/paypal_test_certificate.pem");
const URL: &str = "https://shop.example";
/// The time at which every webhook arrives.
const NOW: Duration = Duration::from_secs(1_614_265_330);
/// The number of providers. The tag of an input above it stands for a webhook as text.
const PROVIDERS: u8 = 13;

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let tag = input.byte() % (PROVIDERS + 3);
    let (place, at, flip) = (input.byte(), usize::from(input.byte()), input.byte().max(1));
    if tag >= PROVIDERS {
        let Some(request) = request(input.rest()) else { return };
        for tag in 0..PROVIDERS {
            let provider = Provider::of(tag);
            if provider.accepts(&request) {
                provider.check_body(&request, at, flip);
            }
        }
        return;
    }
    let provider = Provider::of(tag);
    let text = String::from_utf8_lossy(input.rest());
    let signed = provider.signer.sign(provider.form.request(&text));
    assert!(provider.accepts(&signed), "{} {signed:?}", provider.name);
    match place.checked_rem(u8::try_from(provider.covered.len() + 1).unwrap()) {
        Some(0) | None => provider.check_body(&signed, at, flip),
        Some(place) => provider.check_field(&signed, provider.covered[usize::from(place) - 1], at, flip),
    }
}

struct Provider {
    name: &'static str,
    verifier: Box<dyn VerifyWebhook>,
    signer: WebhookSigner,
    form: Form,
    /// The fields that contain the signature or are covered by it.
    covered: &'static [&'static str],
}

/// The form of the bodies that a provider sends.
#[derive(Clone, Copy)]
enum Form {
    Any,
    /// A notification of Adyen, which signs only some of its members.
    Item,
    /// A JSON object with an id in this member.
    Object(&'static str),
    /// Parameters of Twilio.
    Parameters,
}

impl Provider {
    fn of(tag: u8) -> Self {
        let paypal = || PayPalWebhooks::new(PAYPAL_ID, [PAYPAL_CERTIFICATE]).unwrap();
        let twilio = || TwilioWebhooks::new(URL, ["token"]).unwrap();
        let new = |name, verifier, signer: WebhookSigner, form, covered| Self {
            name,
            verifier,
            signer: signer.at(now()),
            form,
            covered,
        };
        const STANDARD: &[&str] = &["webhook-id", "webhook-timestamp", "webhook-signature"];
        const SVIX: &[&str] = &["svix-id", "svix-timestamp", "svix-signature"];
        const SLACK: &[&str] = &["x-slack-signature", "x-slack-request-timestamp"];
        const PAYPAL: &[&str] = &[
            "paypal-auth-algo",
            "paypal-transmission-id",
            "paypal-transmission-time",
            "paypal-transmission-sig",
        ];
        let standard = |secret| Box::new(StandardWebhooks::new([secret]).unwrap());
        match tag {
            0 => new(
                "Standard",
                standard(SECRET),
                WebhookSigner::standard(SECRET),
                Form::Any,
                STANDARD,
            ),
            1 => new(
                "v1a",
                standard(PUBLIC_KEY),
                WebhookSigner::standard(PRIVATE_KEY),
                Form::Any,
                STANDARD,
            ),
            2 => new("Svix", standard(SECRET), WebhookSigner::svix(SECRET), Form::Any, SVIX),
            3 => {
                let verifier = Box::new(StripeWebhooks::new([SECRET]).unwrap());
                new(
                    "Stripe",
                    verifier,
                    WebhookSigner::stripe(SECRET),
                    Form::Object("id"),
                    &["stripe-signature"],
                )
            }
            4 => {
                let verifier = Box::new(GitHubWebhooks::new([SECRET]).unwrap());
                new(
                    "GitHub",
                    verifier,
                    WebhookSigner::github(SECRET),
                    Form::Any,
                    &["x-hub-signature-256"],
                )
            }
            5 => {
                let verifier = Box::new(ShopifyWebhooks::new([SECRET]).unwrap());
                new(
                    "Shopify",
                    verifier,
                    WebhookSigner::shopify(SECRET),
                    Form::Any,
                    &["x-shopify-hmac-sha256"],
                )
            }
            6 => {
                let verifier = Box::new(SlackWebhooks::new([SECRET]).unwrap());
                new(
                    "Slack",
                    verifier,
                    WebhookSigner::slack(SECRET),
                    Form::Object("event_id"),
                    SLACK,
                )
            }
            7 => {
                let verifier = Box::new(SquareWebhooks::new(URL, [SECRET]).unwrap());
                let covered = &["x-square-hmacsha256-signature"];
                new(
                    "Square",
                    verifier,
                    WebhookSigner::square(URL, SECRET),
                    Form::Object("event_id"),
                    covered,
                )
            }
            8 => {
                let signer = WebhookSigner::twilio(URL, "token");
                new(
                    "Twilio",
                    Box::new(twilio()),
                    signer,
                    Form::Parameters,
                    &["x-twilio-signature"],
                )
            }
            9 => {
                let signer = WebhookSigner::twilio(URL, "token");
                new(
                    "Twilio, any body",
                    Box::new(twilio()),
                    signer,
                    Form::Any,
                    &["x-twilio-signature"],
                )
            }
            10 => {
                let verifier = Box::new(AdyenWebhooks::new([ADYEN_KEY]).unwrap());
                new("Adyen", verifier, WebhookSigner::adyen(ADYEN_KEY), Form::Item, &[])
            }
            11 => {
                let verifier = Box::new(AdyenPlatformWebhooks::new([ADYEN_KEY]).unwrap());
                let signer = WebhookSigner::adyen_platform(ADYEN_KEY);
                new("Adyen for platforms", verifier, signer, Form::Any, &["hmacsignature"])
            }
            _ => {
                let signer = WebhookSigner::paypal(PAYPAL_ID, PAYPAL_KEY);
                new("PayPal", Box::new(paypal()), signer, Form::Object("id"), PAYPAL)
            }
        }
    }

    fn accepts(&self, request: &Request<Bytes>) -> bool {
        let (head, body) = request.clone().into_parts();
        let verified = self.verifier.verify(&Webhook::new(&head, &body, now()));
        assert!(verified.is_err() || self.verifier.is_signed(&head.headers));
        verified.is_ok()
    }

    /// Checks that a genuine webhook fails with one other byte in its body.
    fn check_body(&self, genuine: &Request<Bytes>, at: usize, flip: u8) {
        let Some(at) = at.checked_rem(genuine.body().len()) else {
            return;
        };
        let mut body = genuine.body().to_vec();
        body[at] ^= flip;
        let changed = Request::from_parts(genuine.clone().into_parts().0, Bytes::from(body));
        if self.accepts(&changed) {
            let is_signed = !matches!(self.form, Form::Item);
            assert!(!is_signed, "{}: {changed:?}", self.name);
            assert_eq!(reference(&changed), reference(genuine), "{changed:?}");
        }
    }

    /// Checks that a genuine webhook fails with one other byte in this field.
    fn check_field(&self, genuine: &Request<Bytes>, name: &str, at: usize, flip: u8) {
        let mut value = genuine.headers()[name].as_bytes().to_vec();
        let at = at % value.len();
        value[at] ^= flip;
        let Ok(value) = HeaderValue::from_bytes(&value) else {
            return;
        };
        let mut changed = genuine.clone();
        changed.headers_mut().insert(HeaderName::try_from(name).unwrap(), value);
        assert!(!self.accepts(&changed), "{}: {changed:?}", self.name);
    }
}

impl Form {
    /// Returns a request with this text in its body.
    fn request(self, text: &str) -> Request<Bytes> {
        let (content_type, body) = match self {
            Self::Any => ("text/plain", text.to_owned()),
            Self::Item => {
                let item = json!({
                    "additionalData": {},
                    "eventCode": "AUTHORISATION",
                    "merchantAccountCode": "shop",
                    "merchantReference": text,
                    "pspReference": "1",
                    "success": "true",
                });
                let body = json!({"notificationItems": [{"NotificationRequestItem": item}]});
                ("application/json", body.to_string())
            }
            Self::Object(member) => ("application/json", json!({member: "evt-1", "text": text}).to_string()),
            Self::Parameters => {
                let encoded = text.bytes().map(|byte| format!("%{byte:02X}"));
                let encoded = encoded.collect::<String>();
                ("application/x-www-form-urlencoded", format!("Body={encoded}"))
            }
        };
        let request = Request::post("/webhooks?a=b").header("content-type", content_type);
        let request = request.header("webhook-id", "msg-1").header("svix-id", "msg-1");
        request.body(body.into()).unwrap()
    }
}

/// Returns the signed text of a notification of Adyen. Without its member, the text is empty.
fn reference(request: &Request<Bytes>) -> String {
    let body: Value = serde_json::from_slice(request.body()).unwrap();
    body["notificationItems"][0]["NotificationRequestItem"]["merchantReference"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

fn now() -> SystemTime {
    UNIX_EPOCH + NOW
}

/// Reads a request as text: the target, lines of fields, an empty line, and the body.
fn request(text: &[u8]) -> Option<Request<Bytes>> {
    let mut lines = text.splitn(2, |byte| *byte == b'\n');
    let target = Uri::try_from(lines.next()?).ok()?;
    let mut request = Request::post(target);
    let mut rest = lines.next().unwrap_or_default();
    loop {
        let end = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        let line = &rest[..end];
        rest = rest.get(end + 1..).unwrap_or_default();
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            break;
        };
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
        request = request.header(name, value);
    }
    request.body(Bytes::copy_from_slice(rest)).ok()
}
