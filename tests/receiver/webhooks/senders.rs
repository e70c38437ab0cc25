//! A genuine webhook of each sender. Most were published by the sender or its library.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Request};
use tower_idempotency::receiver::MessageId;
use tower_idempotency::receiver::webhooks::{
    AdyenPlatformWebhooks, AdyenWebhooks, GitHubWebhooks, InvalidWebhook, PayPalWebhooks, ShopifyWebhooks,
    SlackWebhooks, SquareWebhooks, StandardWebhooks, StripeWebhooks, TwilioWebhooks, VerifyWebhook, Webhook,
};

/// A webhook and the provider that verifies it.
pub(crate) struct Sender {
    pub(crate) name: &'static str,
    pub(crate) provider: Box<dyn VerifyWebhook>,
    pub(crate) uri: &'static str,
    pub(crate) headers: Vec<(&'static str, String)>,
    /// The header fields that carry or are covered by the signature.
    pub(crate) signed: &'static [&'static str],
    pub(crate) body: Vec<u8>,
    /// When it arrives, in seconds since the Unix epoch.
    pub(crate) arrives: u64,
}

impl Sender {
    fn new(name: &'static str, provider: impl VerifyWebhook) -> Self {
        Self {
            name,
            provider: Box::new(provider),
            uri: "/webhooks",
            headers: Vec::new(),
            signed: &[],
            body: Vec::new(),
            arrives: 0,
        }
    }

    fn uri(self, uri: &'static str) -> Self {
        Self { uri, ..self }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn signed(self, signed: &'static [&'static str]) -> Self {
        Self { signed, ..self }
    }

    fn body(self, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { body, ..self }
    }

    fn arrives(self, arrives: u64) -> Self {
        Self { arrives, ..self }
    }

    pub(crate) fn head(&self) -> Parts {
        let mut request = Request::post(self.uri);
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        request.body(()).unwrap().into_parts().0
    }

    pub(crate) fn verify(&self, head: &Parts, body: &[u8]) -> Result<MessageId, InvalidWebhook> {
        self.provider.verify(&Webhook::new(head, body, at(self.arrives)))
    }

    pub(crate) fn verify_at(&self, seconds: u64) -> Result<MessageId, InvalidWebhook> {
        self.provider
            .verify(&Webhook::new(&self.head(), &self.body, at(seconds)))
    }

    /// Verifies the webhook with another value in a header field.
    pub(crate) fn verify_with(&self, name: &'static str, value: &str) -> Result<MessageId, InvalidWebhook> {
        let mut head = self.head();
        let value = HeaderValue::from_str(value).unwrap();
        head.headers.insert(HeaderName::from_static(name), value);
        self.verify(&head, &self.body)
    }
}

pub(crate) fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// The time of the vectors that Standard Webhooks and Svix publish.
pub(crate) const STANDARD_TIME: u64 = 1_614_265_330;
pub(crate) const STANDARD_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
pub(crate) const STANDARD_SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
/// The public key that belongs to the private key of the vector, computed with Python's
/// `cryptography`.
pub(crate) const ED25519_KEY: &str = "whpk_ZlN4eg7dSSqi0moX9hQUk3orrOouK3QVQSlJa248c/g=";
pub(crate) const ED25519_SIGNATURE: &str =
    "v1a,tQ9V2XOqn7jL/DQenEFpqIugdBVtiMmER5mhSkXBNwM0mkATuDe6KYYUuxqtaiHeYGb7KaaBRdM5WqyeFiL8Ag==";

/// From the tests of the libraries of Standard Webhooks.
pub(crate) fn standard() -> Sender {
    Sender::new("Standard Webhooks", StandardWebhooks::new([STANDARD_SECRET]).unwrap())
        .header("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek")
        .header("webhook-timestamp", "1614265330")
        .header("webhook-signature", STANDARD_SIGNATURE)
        .signed(&["webhook-id", "webhook-timestamp", "webhook-signature"])
        .body(r#"{"test": 2432232314}"#)
        .arrives(STANDARD_TIME)
}

/// The same vector under the names of Svix, whose libraries publish it as well.
pub(crate) fn svix() -> Sender {
    Sender::new("Svix", StandardWebhooks::new([STANDARD_SECRET]).unwrap())
        .header("svix-id", "msg_p5jXN8AQM9LWM0D4loKWxJek")
        .header("svix-timestamp", "1614265330")
        .header("svix-signature", STANDARD_SIGNATURE)
        .signed(&["svix-id", "svix-timestamp", "svix-signature"])
        .body(r#"{"test": 2432232314}"#)
        .arrives(STANDARD_TIME)
}

/// From the Go library of Standard Webhooks (`TestAsymmetricWebhookSign`).
pub(crate) fn standard_v1a() -> Sender {
    Sender::new("Standard Webhooks v1a", StandardWebhooks::new([ED25519_KEY]).unwrap())
        .header("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek")
        .header("webhook-timestamp", "1614265330")
        .header("webhook-signature", ED25519_SIGNATURE)
        .signed(&["webhook-id", "webhook-timestamp", "webhook-signature"])
        .body(r#"{"test": 2432232314}"#)
        .arrives(STANDARD_TIME)
}

/// Stripe publishes no signature with its secret. Computed with Python:
/// `hmac.new(secret, b"1614265330." + body, "sha256").hexdigest()`.
pub(crate) fn stripe() -> Sender {
    Sender::new("Stripe", StripeWebhooks::new(["whsec_test"]).unwrap())
        .header(
            "stripe-signature",
            "t=1614265330,v1=9ac111b4a635c6f720c27290b8297e4ccdfeb07170d2ea5b3c3109b1576b7919",
        )
        .signed(&["stripe-signature"])
        .body(r#"{"id":"evt_1","object":"event"}"#)
        .arrives(STANDARD_TIME)
}

/// From GitHub's documentation, "Validating webhook deliveries".
pub(crate) fn github() -> Sender {
    Sender::new("GitHub", GitHubWebhooks::new(["It's a Secret to Everybody"]).unwrap())
        .header(
            "x-hub-signature-256",
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
        )
        .header("x-github-delivery", "72d3162e")
        .signed(&["x-hub-signature-256"])
        .body("Hello, World!")
}

/// Shopify publishes no signature with its secret. Computed with Python:
/// `base64.b64encode(hmac.new(secret, body, "sha256").digest())`.
pub(crate) fn shopify() -> Sender {
    Sender::new("Shopify", ShopifyWebhooks::new(["hush"]).unwrap())
        .header("x-shopify-hmac-sha256", "Y5yh1MBcvmylNdRGRmMjSnWMAU5vK6ZYOwIowkFMvRk=")
        .header("x-shopify-event-id", "98880550")
        .signed(&["x-shopify-hmac-sha256"])
        .body(r#"{"id":"evt_1","object":"event"}"#)
}

/// From Slack's documentation, "Verifying requests from Slack".
pub(crate) fn slack() -> Sender {
    Sender::new("Slack", SlackWebhooks::new(["8f742231b10e8888abcd99yyyzzz85a5"]).unwrap())
        .header(
            "x-slack-signature",
            "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
        )
        .header("x-slack-request-timestamp", "1531420618")
        .signed(&["x-slack-signature", "x-slack-request-timestamp"])
        .body(
            "token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name=foobar\
             &user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com\
             %2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN\
             &trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c",
        )
        .arrives(1_531_420_618)
}

fn twilio_provider() -> TwilioWebhooks {
    TwilioWebhooks::new("https://mycompany.com", ["12345"]).unwrap()
}

/// From the tests of Twilio's libraries (`RequestValidatorTest`), with the parameters as a form.
pub(crate) fn twilio() -> Sender {
    Sender::new("Twilio", twilio_provider())
        .uri("/myapp.php?foo=1&bar=2")
        .header("x-twilio-signature", "RSOYDt4T1cUTdK1PDd93/VVr8B8=")
        .header("content-type", "application/x-www-form-urlencoded; charset=UTF-8")
        .header("i-twilio-idempotency-token", "7e5bd6c5")
        .signed(&["x-twilio-signature"])
        .body("CallSid=CA1234567890ABCDE&Caller=%2B14158675309&Digits=1234&From=%2B14158675309&To=%2B18005551212")
}

/// From the tests of Twilio's libraries: repeated values.
pub(crate) fn twilio_repeated() -> Sender {
    Sender::new("Twilio, repeated values", twilio_provider())
        .uri("/myapp.php?foo=1&bar=2")
        .header("x-twilio-signature", "IK+Dwps556ElfBT0I3Rgjkr1wJU=")
        .header("content-type", "application/x-www-form-urlencoded")
        .header("i-twilio-idempotency-token", "7e5bd6c5")
        .signed(&["x-twilio-signature"])
        .body("Sid=CA123&SidAccount=AC123&Digits=5678&Digits=1234&Digits=1234")
}

/// From the tests of Twilio's libraries: a body with its hash in the URL.
pub(crate) fn twilio_json() -> Sender {
    Sender::new("Twilio, JSON", twilio_provider())
        .uri("/myapp.php?foo=1&bar=2&bodySHA256=0a1ff7634d9ab3b95db5c9a2dfe9416e41502b283a80c7cf19632632f96e6620")
        .header("x-twilio-signature", "a9nBmqA0ju/hNViExpshrM61xv4=")
        .header("content-type", "application/json")
        .header("i-twilio-idempotency-token", "7e5bd6c5")
        .signed(&["x-twilio-signature"])
        .body(r#"{"property": "value", "boolean": true}"#)
}

/// From the tests of Adyen's libraries (`test_notification_request_item_hmac` in Python), in the
/// envelope of a delivery.
pub(crate) fn adyen() -> Sender {
    let key = "44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056";
    Sender::new("Adyen", AdyenWebhooks::new([key]).unwrap()).body(
        r#"{"live":"false","notificationItems":[{"NotificationRequestItem":{
            "pspReference":"7914073381342284","merchantReference":"TestPayment-1407325143704","merchantAccountCode":"TestMerchant",
            "amount":{"currency":"EUR","value":1130},"eventCode":"AUTHORISATION","success":"true",
            "additionalData":{"hmacSignature":"coqCmt/IZ4E3CzPvMY8zTjQVL5hYJUiBRg8UU+iCWo0="}}}]}"#,
    )
}

/// From the tests of Adyen's library for Python (`colon_notification.json`), in the envelope of a
/// delivery. The reference has a colon.
pub(crate) fn adyen_colon() -> Sender {
    let key = "74F490DD33F7327BAECC88B2947C011FC02D014A473AAA33A8EC93E4DC069174";
    Sender::new("Adyen, colon", AdyenWebhooks::new([key]).unwrap()).body(
        r#"{"notificationItems":[{"NotificationRequestItem":{
            "additionalData":{"hmacSignature":"2EQYm7YJpKO4EtHSPu55SQTyWf8dkW5u2nD1tJFpViA="},
            "amount":{"currency":"EUR","value":1000},"eventCode":"AUTHORISATION","merchantAccountCode":"AntoniStroinski",
            "merchantReference":":slashes are fun","pspReference":"M8NB66SBZSGLNK82","success":"true"}}]}"#,
    )
}

/// From the tests of Adyen's library for PHP (`testBankingWebhookHmacValidation`).
pub(crate) fn adyen_platform() -> Sender {
    let key = "D7DD5BA6146493707BF0BE7496F6404EC7A63616B7158EC927B9F54BB436765F";
    Sender::new("Adyen for platforms", AdyenPlatformWebhooks::new([key]).unwrap())
        .header("hmacsignature", "9Qz9S/0xpar1klkniKdshxpAhRKbiSAewPpWoxKefQA=")
        .signed(&["hmacsignature"])
        .body(
            r#"{"data":{"balancePlatform":"Integration_tools_test","accountId":"BA32272223222H5HVKTBK4MLB","sweep":{"id":"SWPC42272223222H5HVKV6H8C64DP5","schedule":{"type":"balance"},"status":"active","targetAmount":{"currency":"EUR","value":0},"triggerAmount":{"currency":"EUR","value":0},"type":"pull","counterparty":{"balanceAccountId":"BA3227C223222H5HVKT3H9WLC"},"currency":"EUR"}},"environment":"test","type":"balancePlatform.balanceAccountSweep.updated"}"#,
        )
}

/// The time of PayPal's webhook.
pub(crate) const PAYPAL_TIME: u64 = 1_475_679_460;
pub(crate) const PAYPAL_KEY: &str = include_str!("paypal_test_key.pem");

/// PayPal publishes signatures in the samples of its SDKs, but not their certificates, so this
/// webhook has a key of its own:
///
/// ```sh
/// openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out paypal_test_key.pem
/// openssl req -x509 -new -key paypal_test_key.pem -subj "/CN=messageverificationcerts.example" -days 36500 \
///     -addext "basicConstraints=critical,CA:FALSE" -out paypal_test_certificate.pem
/// printf '%s' "103e3700-8b0c-11e6-8695-6b62a8a99ac4|2016-10-05T14:57:40Z|3TR748995U920805P|3749668375" |
///     openssl dgst -sha256 -sign paypal_test_key.pem | base64 -w0
/// ```
///
/// 3749668375 is the CRC-32 of the body by Python's `zlib.crc32`.
pub(crate) fn paypal() -> Sender {
    paypal_with(include_str!("paypal_test_certificate.pem"))
}

pub(crate) fn paypal_with(pem: &str) -> Sender {
    let signature = "pJnt8LheuY5BKFsq+iaK2cFEpAbKdD/hHqr63s7Se6TFvZt1E1f2rEYblRoD6V8fwjgQ6QzOV6s3uGgxV+Hdy7myDiFAwLOA32xGHemBLBY5\
                     wTR3LP0/fitXedw5As8znYjb74Qm4jsP5INNvXONZ5gflfzn8niJHHChuIzQYFuChkvJcWLehhd0CF9yTMEPdMpqkVYnVnmghg6wWiYPmRIA\
                     UD+pXkS3q/0mn61ohhpf1DvmGWRNBY2iFOy8zVI3DUo4cUDAWz+S0KxSC0XItB7J2CParQffgIcDRaDZWg6gTd8+iTIUk5oRq5exJeyvBK+U\
                     GvUh52QzLIa77H6BYg==";
    Sender::new("PayPal", PayPalWebhooks::new("3TR748995U920805P", [pem]).unwrap())
        .header("paypal-auth-algo", "SHA256withRSA")
        .header("paypal-transmission-id", "103e3700-8b0c-11e6-8695-6b62a8a99ac4")
        .header("paypal-transmission-time", "2016-10-05T14:57:40Z")
        .header("paypal-transmission-sig", signature)
        .signed(&[
            "paypal-auth-algo",
            "paypal-transmission-id",
            "paypal-transmission-time",
            "paypal-transmission-sig",
        ])
        .body(r#"{"id":"WH-82L71649W50323023-5WC64761VS637831A","event_type":"PAYMENT.SALE.COMPLETED","resource_type":"sale"}"#)
        .arrives(PAYPAL_TIME)
}

fn square_provider() -> SquareWebhooks {
    SquareWebhooks::new("https://example.com/webhook", ["asdf1234"]).unwrap()
}

/// From Square's documentation and SDKs (`WebhooksHelper`). It has no event id, so it proves only
/// the signature.
pub(crate) fn square_without_id() -> Sender {
    Sender::new("Square, without id", square_provider())
        .header(
            "x-square-hmacsha256-signature",
            "2kRE5qRU2tR+tBGlDwMEw2avJ7QM4ikPYD/PJ3bd9Og=",
        )
        .signed(&["x-square-hmacsha256-signature"])
        .body(r#"{"hello":"world"}"#)
}

/// A webhook with an id, signed with the key of the published vector. Computed with Python:
/// `base64.b64encode(hmac.new(key, url + body, "sha256").digest())`.
pub(crate) fn square() -> Sender {
    Sender::new("Square", square_provider())
        .header(
            "x-square-hmacsha256-signature",
            "O3TpoLyP83s+1tJjmVDy6UCglsFNRZ+1gzp1gTS9X/Y=",
        )
        .signed(&["x-square-hmacsha256-signature"])
        .body(r#"{"event_id":"evt-1","hello":"world"}"#)
}

/// One genuine webhook or more of each sender.
pub(crate) fn all() -> Vec<Sender> {
    vec![
        standard(),
        svix(),
        standard_v1a(),
        stripe(),
        github(),
        shopify(),
        slack(),
        twilio(),
        twilio_repeated(),
        twilio_json(),
        adyen(),
        adyen_colon(),
        adyen_platform(),
        paypal(),
        square(),
    ]
}
