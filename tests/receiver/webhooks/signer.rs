//! The signer of the test kit signs as each provider verifies.

use axum::http::{Method, Request};
use bytes::Bytes;
use tower_idempotency::receiver::MessageId;
use tower_idempotency::receiver::testing::WebhookSigner;
use tower_idempotency::receiver::webhooks::{InvalidWebhook, TwilioWebhooks, VerifyWebhook, Webhook};

use super::senders::{
    PAYPAL_KEY, STANDARD_SECRET, STANDARD_SIGNATURE, STANDARD_TIME, adyen, adyen_platform, at, github, paypal, shopify,
    slack, square, standard, standard_v1a, stripe, svix, twilio, twilio_json,
};

const PRIVATE_KEY: &str = "whsk_VEVTVFNJR05JTkdLRVlET05PVFVTRVRISVNGT1JBTlk=";
const ADYEN_KEY: &str = "44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056";
const PLATFORM_KEY: &str = "D7DD5BA6146493707BF0BE7496F6404EC7A63616B7158EC927B9F54BB436765F";

fn verify(provider: &dyn VerifyWebhook, request: Request<Bytes>) -> Result<MessageId, InvalidWebhook> {
    let (head, body) = request.into_parts();
    assert_eq!(head.method, Method::POST);
    provider.verify(&Webhook::new(&head, &body, at(STANDARD_TIME)))
}

#[test]
fn a_signed_request_of_every_sender_passes() {
    let twilio_signer = || WebhookSigner::twilio("https://mycompany.com", "12345");
    for (sender, signer) in [
        (standard(), WebhookSigner::standard(STANDARD_SECRET)),
        (standard_v1a(), WebhookSigner::standard(PRIVATE_KEY)),
        (svix(), WebhookSigner::svix(STANDARD_SECRET)),
        (stripe(), WebhookSigner::stripe("whsec_test")),
        (github(), WebhookSigner::github("It's a Secret to Everybody")),
        (shopify(), WebhookSigner::shopify("hush")),
        (slack(), WebhookSigner::slack("8f742231b10e8888abcd99yyyzzz85a5")),
        (twilio(), twilio_signer()),
        (adyen(), WebhookSigner::adyen(ADYEN_KEY)),
        (adyen_platform(), WebhookSigner::adyen_platform(PLATFORM_KEY)),
        (paypal(), WebhookSigner::paypal("3TR748995U920805P", PAYPAL_KEY)),
        (
            square(),
            WebhookSigner::square("https://example.com/webhook", "asdf1234"),
        ),
    ] {
        let signer = signer.at(at(STANDARD_TIME));
        let sign = || signer.sign(Request::post(sender.uri).body(sender.body.clone()).unwrap());
        let verified = verify(&*sender.provider, sign());
        assert!(verified.is_ok(), "{}: {verified:?}", sender.name);
        let (late, body) = sign().into_parts();
        let late = sender
            .provider
            .verify(&Webhook::new(&late, &body, at(STANDARD_TIME + 400_000)));
        let has_a_time = ["Standard", "Svix", "Stripe", "Slack", "PayPal"];
        let has_a_time = has_a_time.iter().any(|name| sender.name.starts_with(name));
        assert_eq!(
            late.err(),
            has_a_time.then_some(InvalidWebhook::Timestamp),
            "{}",
            sender.name
        );
    }
    // A proxy may remove the beginning of the path, which then belongs to the public URL.
    let behind_a_proxy = TwilioWebhooks::new("https://mycompany.com/api", ["12345"]).unwrap();
    let (mut head, body) = twilio_signer()
        .sign(Request::post("/api/sms?a=b").body("Body=hi").unwrap())
        .into_parts();
    assert!(
        behind_a_proxy
            .verify(&Webhook::new(&head, &body, at(STANDARD_TIME)))
            .is_err()
    );
    head.uri = "/sms?a=b".parse().unwrap();
    assert!(
        behind_a_proxy
            .verify(&Webhook::new(&head, &body, at(STANDARD_TIME)))
            .is_ok()
    );
    // A nested router strips the beginning of the path and leaves the whole path in an extension.
    let original = axum::extract::OriginalUri("/api/sms?a=b".parse().unwrap());
    head.extensions.insert(original);
    let verified = twilio().provider.verify(&Webhook::new(&head, &body, at(STANDARD_TIME)));
    assert!(verified.is_ok());
    // A body that is no form has its hash in the URL.
    for uri in ["/", "/a?b=c"] {
        let request = Request::post(uri).header("content-type", "application/json");
        let signed = twilio_signer().sign(request.body("{}").unwrap());
        assert!(signed.uri().query().unwrap().contains("bodySHA256="));
        assert!(verify(&*twilio_json().provider, signed).is_ok());
    }
}

#[test]
fn the_signer_reproduces_the_published_vector_and_keeps_ids_that_are_set() {
    let signer = WebhookSigner::standard(STANDARD_SECRET).at(at(STANDARD_TIME));
    let request = Request::post("/").header("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek");
    let signed = signer.sign(request.body(r#"{"test": 2432232314}"#).unwrap());
    assert_eq!(signed.headers()["webhook-signature"], STANDARD_SIGNATURE);
    let id = || {
        let signed = signer.sign(Request::post("/").body("").unwrap());
        signed.headers()["webhook-id"].clone()
    };
    assert_ne!(id(), id());
    assert_eq!(format!("{signer:?}"), "WebhookSigner { .. }");
}

#[test]
fn a_signer_reports_why_it_cannot_sign() {
    let cases: [(&str, fn()); 4] = [
        ("the secret", || drop(WebhookSigner::standard("whsec_no base64!"))),
        ("the key", || drop(WebhookSigner::adyen("no hex"))),
        ("the private key", || drop(WebhookSigner::paypal("1", "no PEM"))),
        ("the body", || {
            drop(WebhookSigner::adyen(ADYEN_KEY).sign(Request::new("{}")));
        }),
    ];
    for (what, make) in cases {
        let panic = std::panic::catch_unwind(make).unwrap_err();
        assert!(panic.downcast_ref::<String>().unwrap().starts_with(what), "{what}");
    }
}
