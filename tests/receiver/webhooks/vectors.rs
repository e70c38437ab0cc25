//! Each provider verifies as its sender signs.

use axum::http::Request;
use data_encoding::BASE64;
use serde_json::json;
use tower_idempotency::receiver::ids;
use tower_idempotency::receiver::testing::WebhookSigner;
use tower_idempotency::receiver::webhooks::{
    AdyenPlatformWebhooks, AdyenWebhooks, GitHubWebhooks, InvalidWebhook, PayPalWebhooks, ShopifyWebhooks,
    SlackWebhooks, SquareWebhooks, StandardWebhooks, StripeWebhooks, TwilioWebhooks, VerifyWebhook,
};
use tower_idempotency::{Error, ErrorKind};

use super::mac;
use super::senders::{
    ED25519_KEY, ED25519_SIGNATURE, PAYPAL_TIME, STANDARD_SECRET, STANDARD_SIGNATURE, STANDARD_TIME, Sender, adyen,
    all, github, paypal, paypal_with, shopify, slack, square, square_without_id, standard, standard_v1a, stripe, svix,
    twilio,
};

const OTHER: &str = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

fn with(sender: Sender, provider: impl VerifyWebhook) -> Sender {
    let provider = Box::new(provider);
    Sender { provider, ..sender }
}

#[test]
fn genuine_webhooks_of_every_sender_pass() {
    for sender in all() {
        let verified = sender.verify(&sender.head(), &sender.body);
        assert!(verified.is_ok_and(|id| !id.is_missing()), "{}", sender.name);
    }
    // The published vector has no id, and has no other fault.
    let sender = square_without_id();
    assert_eq!(sender.verify(&sender.head(), &sender.body), Err(InvalidWebhook::Id));
}

#[test]
fn ids_are_those_of_the_senders() {
    let id = |sender: &Sender| sender.verify(&sender.head(), &sender.body).unwrap();
    for (sender, expected) in [
        (standard(), ids::standard_webhooks(&standard().head().headers)),
        (svix(), ids::standard_webhooks(&standard().head().headers)),
        (stripe(), ids::stripe("evt_1")),
        (github(), ids::github(&github().head().headers)),
        (shopify(), ids::shopify(&shopify().head().headers)),
        (twilio(), ids::twilio(&twilio().head().headers)),
        (
            adyen(),
            ids::adyen("TestMerchant", "AUTHORISATION", "7914073381342284", "true"),
        ),
        (paypal(), ids::paypal("WH-82L71649W50323023-5WC64761VS637831A")),
        (square(), ids::square("evt-1")),
    ] {
        assert_eq!(id(&sender), expected, "{}", sender.name);
    }
}

#[test]
fn secrets_of_standard_webhooks_may_be_written_in_every_usual_way() {
    let bare = STANDARD_SECRET.strip_prefix("whsec_").unwrap();
    let versioned = format!("v1,{STANDARD_SECRET}");
    let versioned_key = format!("v1a,{ED25519_KEY}");
    for secrets in [
        vec![STANDARD_SECRET],
        vec![bare],
        vec![&versioned],
        vec![OTHER, STANDARD_SECRET],
        vec![STANDARD_SECRET, OTHER],
        vec![ED25519_KEY, STANDARD_SECRET],
    ] {
        let sender = with(standard(), StandardWebhooks::new(&secrets).unwrap());
        assert!(sender.verify_at(STANDARD_TIME).is_ok(), "{secrets:?}");
    }
    for keys in [vec![versioned_key.as_str()], vec![STANDARD_SECRET, ED25519_KEY]] {
        let sender = with(standard_v1a(), StandardWebhooks::new(&keys).unwrap());
        assert!(sender.verify_at(STANDARD_TIME).is_ok(), "{keys:?}");
    }
}

#[test]
fn one_fitting_signature_of_several_is_enough() {
    let genuine = "v1=9ac111b4a635c6f720c27290b8297e4ccdfeb07170d2ea5b3c3109b1576b7919";
    for signatures in [
        genuine.to_owned(),
        format!("v0=00,v1=00,{genuine}"),
        format!("{genuine},v1=zz"),
    ] {
        let verified = stripe().verify_with("stripe-signature", &format!("t=1614265330,{signatures}"));
        assert_eq!(verified, Ok(ids::stripe("evt_1")), "{signatures}");
    }
    let both = || StandardWebhooks::new([STANDARD_SECRET, ED25519_KEY]).unwrap();
    for signatures in [
        format!("v1,AAAA {STANDARD_SIGNATURE}"),
        format!("v1a,x v2,y {STANDARD_SIGNATURE} z"),
        format!("{ED25519_SIGNATURE} v1,AAAA"),
        format!("{ED25519_SIGNATURE} {STANDARD_SIGNATURE}"),
    ] {
        let verified = with(standard(), both()).verify_with("webhook-signature", &signatures);
        assert!(verified.is_ok(), "{signatures}");
    }
    for signatures in [
        "",
        "v1,",
        "v1,AAAA v1a,AAAA",
        &STANDARD_SIGNATURE[3..],
        "v1,g0hM",
        " v1,g0hM ",
    ] {
        let verified = with(standard(), both()).verify_with("webhook-signature", signatures);
        assert_eq!(verified, Err(InvalidWebhook::Signature), "{signatures}");
    }
    // A signature under the name of another kind does not count.
    for (kind, signature) in [
        ("v1a", STANDARD_SIGNATURE),
        ("v1", ED25519_SIGNATURE),
        ("v2", STANDARD_SIGNATURE),
    ] {
        let (_, bytes) = signature.split_once(',').unwrap();
        let verified = with(standard(), both()).verify_with("webhook-signature", &format!("{kind},{bytes}"));
        assert!(verified.is_err(), "{kind}");
    }
}

/// A forged webhook with thousands of signatures, parameters or elements would cost as much work or
/// memory.
#[test]
fn the_input_that_is_read_before_the_signature_check_is_bounded() {
    for (others, is_genuine) in [(15, true), (16, false)] {
        let expected = if is_genuine {
            None
        } else {
            Some(InvalidWebhook::Signature)
        };
        let many = format!("{}{STANDARD_SIGNATURE}", "v1,AAAA ".repeat(others));
        assert_eq!(standard().verify_with("webhook-signature", &many).err(), expected);
        let many = stripe().headers[0].1.clone() + &",v1=00".repeat(others);
        assert_eq!(stripe().verify_with("stripe-signature", &many).err(), expected);
    }
    // Each signature of this kind hashes the whole body.
    for (others, reason) in [(3, None), (4, Some(InvalidWebhook::Signature))] {
        let many = format!("{}{ED25519_SIGNATURE}", "v1a,AAAA ".repeat(others));
        assert_eq!(standard_v1a().verify_with("webhook-signature", &many).err(), reason);
    }
    let mut sender = twilio();
    for (parameters, reason) in [(1_000, InvalidWebhook::Signature), (1_001, InvalidWebhook::Body)] {
        sender.body = vec!["a=b"; parameters].join("&").into_bytes();
        assert_eq!(sender.verify_at(0), Err(reason));
    }
    let mut sender = adyen();
    sender.body.resize(256 << 10, b' ');
    assert!(sender.verify_at(0).is_ok());
    sender.body.push(b' ');
    assert_eq!(sender.verify_at(0), Err(InvalidWebhook::Body));
}

#[test]
fn a_signature_of_a_kind_without_a_key_is_reported_as_a_secret_that_does_not_fit() {
    for (sender, provider) in [(standard_v1a(), STANDARD_SECRET), (standard(), ED25519_KEY)] {
        let sender = with(sender, StandardWebhooks::new([provider]).unwrap());
        assert_eq!(sender.verify_at(STANDARD_TIME), Err(InvalidWebhook::Secret));
    }
    let verified = paypal().verify_with("paypal-auth-algo", "SHA1withRSA");
    assert_eq!(verified, Err(InvalidWebhook::Secret));
    let sender = with(standard(), StandardWebhooks::new([OTHER]).unwrap());
    assert_eq!(sender.verify_at(STANDARD_TIME), Err(InvalidWebhook::Signature));
}

/// A handler that reads the other set would read unsigned fields.
#[test]
fn fields_of_svix_and_of_standard_webhooks_are_never_mixed() {
    let names = ["id", "timestamp", "signature"];
    let svix_head = svix().head();
    // Equal copies of all fields, or of some, are no contradiction.
    for copied in [&names[..], &names[..1], &names[1..]] {
        let mut sender = standard();
        for name in copied {
            let value = &svix_head.headers[format!("svix-{name}").as_str()];
            let name = svix()
                .headers
                .iter()
                .find(|(found, _)| found.ends_with(name))
                .unwrap()
                .0;
            sender.headers.push((name, value.to_str().unwrap().to_owned()));
        }
        assert!(sender.verify_at(STANDARD_TIME).is_ok(), "{copied:?}");
    }
    for (name, reason) in [
        ("svix-id", InvalidWebhook::Id),
        ("svix-timestamp", InvalidWebhook::Timestamp),
        ("svix-signature", InvalidWebhook::Signature),
    ] {
        assert_eq!(standard().verify_with(name, "1"), Err(reason), "{name}");
    }
    for (name, reason) in [
        ("webhook-id", InvalidWebhook::Id),
        ("webhook-timestamp", InvalidWebhook::Timestamp),
        ("webhook-signature", InvalidWebhook::Signature),
    ] {
        assert_eq!(svix().verify_with(name, "1"), Err(reason), "{name}");
    }
    // The provider does not complete one set with fields of the other.
    for missing in names {
        let mut sender = standard();
        let (at, svix) = (
            sender.headers.iter().position(|(name, _)| name.ends_with(missing)),
            svix(),
        );
        let other = svix
            .headers
            .into_iter()
            .find(|(name, _)| name.ends_with(missing))
            .unwrap();
        sender.headers[at.unwrap()] = other;
        assert_eq!(
            sender.verify_at(STANDARD_TIME),
            Err(InvalidWebhook::MissingHeader),
            "{missing}"
        );
    }
}

/// Id `msg_1`, T and the body `T2.5` were signed. Id `msg_1.T`, T2 and the body `5` have the same
/// signature.
#[test]
fn the_signed_parts_cannot_be_shifted() {
    let key = BASE64.decode(&STANDARD_SECRET.as_bytes()[6..]).unwrap();
    let signature = BASE64.encode(&mac(&key, b"msg_1.1614265330.1614265331.5"));
    let verify = |id: &str, timestamp: &str, body: &str| {
        let mut sender = standard();
        sender.headers = vec![
            ("webhook-id", id.to_owned()),
            ("webhook-timestamp", timestamp.to_owned()),
            ("webhook-signature", format!("v1,{signature}")),
        ];
        sender.body = body.into();
        sender.verify_at(STANDARD_TIME)
    };
    assert!(verify("msg_1", "1614265330", "1614265331.5").is_ok());
    assert_eq!(verify("msg_1.1614265330", "1614265331", "5"), Err(InvalidWebhook::Id));
    assert_eq!(
        verify("msg_1", "1614265330.1614265331", "5"),
        Err(InvalidWebhook::Timestamp)
    );
}

#[test]
fn a_timestamp_may_be_five_minutes_away_either_way() {
    for sender in [standard(), svix(), standard_v1a(), stripe(), slack()] {
        let sent = sender.arrives;
        for (now, is_genuine) in [
            (sent - 301, false),
            (sent - 300, true),
            (sent + 300, true),
            (sent + 301, false),
            (0, false),
        ] {
            let expected = if is_genuine {
                None
            } else {
                Some(InvalidWebhook::Timestamp)
            };
            assert_eq!(sender.verify_at(now).err(), expected, "{}: {now}", sender.name);
        }
    }
    for nonsense in [
        "",
        "+1614265330",
        "-1",
        "1e9",
        "1614265330.5",
        "18446744073709551615",
        "99999999999999999999999",
    ] {
        let key = BASE64.decode(&STANDARD_SECRET.as_bytes()[6..]).unwrap();
        let signature = BASE64.encode(&mac(&key, format!("msg_1.{nonsense}.5").as_bytes()));
        let mut sender = standard();
        sender.headers = vec![
            ("webhook-id", "msg_1".to_owned()),
            ("webhook-timestamp", nonsense.to_owned()),
            ("webhook-signature", format!("v1,{signature}")),
        ];
        sender.body = b"5".to_vec();
        assert_eq!(
            sender.verify_at(STANDARD_TIME),
            Err(InvalidWebhook::Timestamp),
            "{nonsense}"
        );
    }
}

/// PayPal repeats an event for three days, and does not document that it signs a new time.
#[test]
fn the_time_of_paypal_may_be_three_days_old_but_not_in_the_future() {
    let three_days = 3 * 24 * 60 * 60;
    for (now, is_genuine) in [
        (PAYPAL_TIME - 301, false),
        (PAYPAL_TIME - 300, true),
        (PAYPAL_TIME + three_days, true),
        (PAYPAL_TIME + three_days + 300, true),
        (PAYPAL_TIME + three_days + 301, false),
    ] {
        let expected = if is_genuine {
            None
        } else {
            Some(InvalidWebhook::Timestamp)
        };
        assert_eq!(paypal().verify_at(now).err(), expected, "{now}");
    }
}

#[test]
fn paypal_takes_a_certificate_or_its_public_key_and_no_other() {
    let key = include_str!("paypal_test_public_key.pem");
    assert!(paypal_with(key).verify_at(PAYPAL_TIME).is_ok());
    let other = rcgen::generate_simple_self_signed(["paypal.example".to_owned()]).unwrap();
    for unusable in ["", "nonsense", &other.cert.pem(), super::senders::PAYPAL_KEY] {
        let error = PayPalWebhooks::new("1", [unusable]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
    }
    let of_another_webhook = with(paypal(), PayPalWebhooks::new("other", [key]).unwrap());
    assert_eq!(
        of_another_webhook.verify_at(PAYPAL_TIME),
        Err(InvalidWebhook::Signature)
    );
}

#[test]
fn slack_events_have_their_id_and_other_requests_a_digest() {
    // Computed with Python: `hmac.new(secret, b"v0:1531420618:" + body, "sha256").hexdigest()`.
    let mut event = slack();
    event.body = br#"{"type":"event_callback","event_id":"Ev1"}"#.to_vec();
    let signature = "v0=789284021eb703e2d5f4f5c633302df7a58b771efbcb965e5954b383bc414e84";
    assert_eq!(event.verify_with("x-slack-signature", signature), Ok(ids::slack("Ev1")));
    // Two commands with equal bodies at different times differ.
    let command = |timestamp: &str| {
        let mut command = slack();
        command.body = b"command=%2Fpay".to_vec();
        let signed = format!("v0:{timestamp}:command=%2Fpay");
        let signature = data_encoding::HEXLOWER.encode(&mac(b"8f742231b10e8888abcd99yyyzzz85a5", signed.as_bytes()));
        command.headers = vec![
            ("x-slack-request-timestamp", timestamp.to_owned()),
            ("x-slack-signature", format!("v0={signature}")),
        ];
        command.verify_at(1_531_420_618).unwrap()
    };
    assert_eq!(command("1531420618"), command("1531420618"));
    assert_ne!(command("1531420618"), command("1531420619"));
}

#[test]
fn a_notification_of_adyen_has_one_item_and_no_member_twice() {
    let text = String::from_utf8(adyen().body).unwrap();
    let item = text[text.find('[').unwrap() + 1..text.rfind(']').unwrap()].to_owned();
    for (body, reason) in [
        (text.replace(&item, ""), InvalidWebhook::Body),
        (text.replace(&item, &format!("{item},{item}")), InvalidWebhook::Body),
        (
            text.replace("\"EUR\"", "\"EUR\",\"currency\":\"USD\""),
            InvalidWebhook::Body,
        ),
        (
            text.replace("\"EUR\"", "\"USD\",\"currency\":\"EUR\""),
            InvalidWebhook::Body,
        ),
        (text.replace("\"true\"", "true"), InvalidWebhook::Body),
        (text.replace("1130", "1130.0"), InvalidWebhook::Body),
        (text.replace("1130", "\"1130\""), InvalidWebhook::Body),
        (text.replace("hmacSignature", "other"), InvalidWebhook::Signature),
        ("[]".to_owned(), InvalidWebhook::Body),
        (String::new(), InvalidWebhook::Body),
    ] {
        let mut sender = adyen();
        sender.body = body.into_bytes();
        assert_eq!(
            sender.verify_at(0),
            Err(reason),
            "{}",
            String::from_utf8_lossy(&sender.body)
        );
    }
}

/// `TestMerchant:TestPayment` was signed. The account `TestMerchant:Test` with another reference
/// must not pass.
#[test]
fn the_parts_of_a_notification_cannot_be_shifted() {
    let mut sender = adyen();
    let key = data_encoding::HEXUPPER
        .decode(b"44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056")
        .unwrap();
    let signed = b"7914073381342284::TestMerchant:a:TestPayment-1407325143704:1130:EUR:AUTHORISATION:true";
    let signature = BASE64.encode(&mac(&key, signed));
    let body = String::from_utf8(sender.body).unwrap();
    let body = body.replace("coqCmt/IZ4E3CzPvMY8zTjQVL5hYJUiBRg8UU+iCWo0=", &signature);
    sender.body = body.replace("\"TestPayment", "\"a:TestPayment").into_bytes();
    assert!(sender.verify_at(0).is_ok());
    sender.body = body.replace("\"TestMerchant\"", "\"TestMerchant:a\"").into_bytes();
    assert_eq!(sender.verify_at(0), Err(InvalidWebhook::Body));
}

/// The reference of a report is its file name, so the report of a second merchant account counted
/// as a duplicate and was lost.
#[test]
fn reports_of_one_name_for_two_merchant_accounts_are_two() {
    let report = |account: &str, name: &str| {
        let item = json!({
            "pspReference": name, "merchantReference": "", "merchantAccountCode": account,
            "amount": {"currency": "EUR", "value": 0}, "eventCode": "REPORT_AVAILABLE", "success": "true",
        });
        let body = json!({"live": "false", "notificationItems": [{"NotificationRequestItem": item}]});
        let signer = WebhookSigner::adyen("44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056");
        let mut sender = adyen();
        sender.body = signer.sign(Request::new(body.to_string())).into_body().to_vec();
        sender.verify_at(0)
    };
    let (name, next) = (
        "settlement_detail_report_batch_12.csv",
        "settlement_detail_report_batch_13.csv",
    );
    let first = report("ShopEU", name).unwrap();
    assert_eq!(report("ShopEU", name), Ok(first.clone()));
    assert_ne!(report("ShopUS", name), Ok(first.clone()));
    assert_ne!(report("ShopEU", next), Ok(first));
    // Without an account, the report of one account could be taken for the report of another.
    assert_eq!(report("", name), Err(InvalidWebhook::Id));
}

#[test]
fn an_id_that_is_missing_or_empty_is_the_reason_that_is_reported() {
    assert_eq!(github().verify_with("x-github-delivery", ""), Err(InvalidWebhook::Id));
    assert_eq!(shopify().verify_with("x-shopify-event-id", ""), Err(InvalidWebhook::Id));
    assert_eq!(
        twilio().verify_with("i-twilio-idempotency-token", ""),
        Err(InvalidWebhook::Id)
    );
    let mut unnamed = shopify();
    unnamed.headers.pop();
    assert_eq!(unnamed.verify_at(0), Err(InvalidWebhook::Id));
    // Computed with Python.
    for (nameless, signature) in [
        ("{}", "5790023bd77209313f2e32e36caf5921bdd2fac398095f83dc2d2ecd5f696f50"),
        (
            "nonsense",
            "42f508b0235b58b6e5d13811d1a080bc7e13703b4781d3668088ffad99cd1d4c",
        ),
        (
            r#"{"id":7}"#,
            "65af867ace3877b992df9975fbc4d6d95062ec70e959e43ee227c6de9a11fc86",
        ),
    ] {
        let mut sender = stripe();
        sender.body = nameless.into();
        let verified = sender.verify_with("stripe-signature", &format!("t=1614265330,v1={signature}"));
        assert_eq!(verified, Err(InvalidWebhook::Id), "{nameless}");
    }
}

#[test]
fn secrets_that_could_verify_nothing_are_refused_and_none_is_shown() {
    let zeros = format!("whpk_{}", BASE64.encode(&[0; 32]));
    let mut small_order = [0xff; 32];
    small_order[0] = 0xec;
    let small_order = format!("v1a,whpk_{}", BASE64.encode(&small_order));
    let none: [&str; 0] = [];
    let errors: Vec<Error> = vec![
        StandardWebhooks::new(["whsec_not base64!"]).unwrap_err(),
        StandardWebhooks::new(["whsec_"]).unwrap_err(),
        StandardWebhooks::new(none).unwrap_err(),
        StandardWebhooks::new(["whpk_"]).unwrap_err(),
        StandardWebhooks::new(["whpk_AAAA"]).unwrap_err(),
        // Everyone can sign for a key of small order.
        StandardWebhooks::new([&zeros]).unwrap_err(),
        StandardWebhooks::new([&small_order]).unwrap_err(),
        StandardWebhooks::new(["whsk_VEVTVFNJR05JTkdLRVlET05PVFVTRVRISVNGT1JBTlk="]).unwrap_err(),
        StripeWebhooks::new([""]).unwrap_err(),
        GitHubWebhooks::new(none).unwrap_err(),
        ShopifyWebhooks::new([b""]).unwrap_err(),
        SlackWebhooks::new([""]).unwrap_err(),
        TwilioWebhooks::new("https://example.com", [""]).unwrap_err(),
        TwilioWebhooks::new("https://example.com", none).unwrap_err(),
        AdyenWebhooks::new(["not hexadecimal"]).unwrap_err(),
        AdyenWebhooks::new([""]).unwrap_err(),
        AdyenPlatformWebhooks::new(none).unwrap_err(),
        PayPalWebhooks::new("1", none).unwrap_err(),
        PayPalWebhooks::new("", [include_str!("paypal_test_certificate.pem")]).unwrap_err(),
        SquareWebhooks::new("", ["key"]).unwrap_err(),
        SquareWebhooks::new("https://example.com", none).unwrap_err(),
    ];
    assert!(
        errors.iter().all(|error| error.kind() == ErrorKind::Configuration),
        "{errors:?}"
    );
}

#[test]
fn debug_forms_name_their_types_and_hide_secrets() {
    const ADDRESS: &str = "https://example.com/hush";
    let standard = StandardWebhooks::new([STANDARD_SECRET, ED25519_KEY]).unwrap();
    let pay_pal = PayPalWebhooks::new("hush", [include_str!("paypal_test_certificate.pem")]).unwrap();
    for (shown, parts) in [
        (
            format!("{standard:?}"),
            ["StandardWebhooks", "Secrets(..)", "PublicKey(..)"],
        ),
        (
            format!("{:?}", GitHubWebhooks::new(["hush"]).unwrap()),
            ["GitHubWebhooks", "Secrets(..)", ""],
        ),
        (
            format!("{:?}", TwilioWebhooks::new(ADDRESS, ["hush"]).unwrap()),
            ["TwilioWebhooks", "", ""],
        ),
        (
            format!("{:?}", SquareWebhooks::new(ADDRESS, ["hush"]).unwrap()),
            ["SquareWebhooks", "", ""],
        ),
        (
            format!("{:?}", AdyenWebhooks::new(["44782d"]).unwrap()),
            ["AdyenWebhooks", "", ""],
        ),
        (format!("{pay_pal:?}"), ["PayPalWebhooks", "", ""]),
    ] {
        assert!(parts.iter().all(|part| shown.contains(part)), "{shown}");
        let secrets = ["hush", "MfKQ", "ZlN4", "44782d"];
        assert!(!secrets.iter().any(|secret| shown.contains(secret)), "{shown}");
    }
}

#[test]
fn every_reason_has_a_label_and_a_text_of_its_own() {
    let reasons = [
        InvalidWebhook::Body,
        InvalidWebhook::Id,
        InvalidWebhook::MissingHeader,
        InvalidWebhook::Secret,
        InvalidWebhook::Signature,
        InvalidWebhook::Timestamp,
    ];
    let labels: std::collections::HashSet<_> = reasons.iter().map(|reason| reason.reason()).collect();
    let texts: std::collections::HashSet<_> = reasons.iter().map(ToString::to_string).collect();
    assert_eq!((labels.len(), texts.len()), (reasons.len(), reasons.len()));
}
