//! A signer of webhooks for tests of handlers.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use data_encoding::{BASE64, HEXLOWER};
use hmac::{Hmac, KeyInit, Mac};
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Request};
use ring::rand::SystemRandom;
use ring::rsa;
use ring::signature::{Ed25519KeyPair, RSA_PKCS1_SHA256};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};

use crate::clock::wall_clock;
use crate::receiver::webhooks::Webhook;
use crate::receiver::webhooks::signing::{
    Item, PublicUrl, Signed, body_hash, decoded_key, decoded_secret, is_form, paypal_time, sign_item, signed_text,
};

/// Signs requests as a provider signs its webhooks, so that a test of a webhook handler is five
/// lines.
///
/// ```
/// # #[cfg(feature = "axum")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use axum::{body::Body, http::Request, routing::post, Router};
/// use tower::{ServiceBuilder, ServiceExt};
/// use tower_idempotency::receiver::testing::WebhookSigner;
/// use tower_idempotency::receiver::webhooks::{StripeWebhooks, WebhookLayer};
/// use tower_idempotency::{IdempotencyLayer, MemoryStore};
///
/// // The application.
/// let layers = ServiceBuilder::new()
///     .layer(WebhookLayer::new("billing", StripeWebhooks::new(["whsec_test"])?))
///     .layer(IdempotencyLayer::new(MemoryStore::new()).webhooks());
/// let app = Router::new().route("/stripe", post(|| async { "thanks" })).layer(layers);
///
/// // The test.
/// let signer = WebhookSigner::stripe("whsec_test");
/// let request = signer.sign(Request::post("/stripe").body(r#"{"id":"evt_1"}"#)?);
/// let response = app.oneshot(request.map(Body::from)).await?;
/// assert_eq!(response.status(), 200);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "axum"))]
/// # fn main() {}
/// ```
///
/// If the request has the header field of an id, the signer does not change it. Otherwise each
/// request gets a new id. Therefore sign twice with the same id to get a duplicate:
///
/// ```
/// use http::Request;
/// use tower_idempotency::receiver::testing::WebhookSigner;
///
/// # fn main() -> Result<(), http::Error> {
/// let signer = WebhookSigner::standard("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
/// let delivery = || Request::post("/webhooks").header("webhook-id", "msg_1").body("paid");
/// let (first, duplicate) = (signer.sign(delivery()?), signer.sign(delivery()?));
/// assert_eq!(first.headers()["webhook-id"], duplicate.headers()["webhook-id"]);
/// # Ok(())
/// # }
/// ```
///
/// # Panics
///
/// The constructors and [`sign`](Self::sign) panic if a key or a body cannot be used. The message
/// gives the reason.
pub struct WebhookSigner {
    scheme: Scheme,
    time: Option<SystemTime>,
}

enum Scheme {
    Adyen(Vec<u8>),
    AdyenPlatform(Vec<u8>),
    GitHub(Vec<u8>),
    PayPal { webhook_id: String, key: rsa::KeyPair },
    Shopify(Vec<u8>),
    Slack(Vec<u8>),
    Square { url: String, key: Vec<u8> },
    Standard { prefix: &'static str, key: StandardKey },
    Stripe(Vec<u8>),
    Twilio { url: PublicUrl, token: Vec<u8> },
}

enum StandardKey {
    Shared(Vec<u8>),
    Private(Ed25519KeyPair),
}

impl WebhookSigner {
    /// Signs by Standard Webhooks: `v1` with a secret (`whsec_..`, `v1,whsec_..` or base64), `v1a`
    /// with a private key (`whsk_..`).
    #[must_use]
    pub fn standard(secret: &str) -> Self {
        let (prefix, key) = ("webhook", StandardKey::new(secret));
        Self::new(Scheme::Standard { prefix, key })
    }

    /// Signs as Svix does, in `svix-id`, `svix-timestamp` and `svix-signature`. Takes the same keys
    /// as [`standard`](Self::standard).
    #[must_use]
    pub fn svix(secret: &str) -> Self {
        let (prefix, key) = ("svix", StandardKey::new(secret));
        Self::new(Scheme::Standard { prefix, key })
    }

    /// Signs as Stripe does. The id is the member `id` of the body.
    #[must_use]
    pub fn stripe(secret: &str) -> Self {
        Self::new(Scheme::Stripe(secret.into()))
    }

    /// Signs as GitHub does. The id is in `X-GitHub-Delivery`.
    #[must_use]
    pub fn github(secret: &str) -> Self {
        Self::new(Scheme::GitHub(secret.into()))
    }

    /// Signs as Shopify does. The id is in `X-Shopify-Event-Id`.
    #[must_use]
    pub fn shopify(secret: &str) -> Self {
        Self::new(Scheme::Shopify(secret.into()))
    }

    /// Signs as Slack does. The id of an event is the member `event_id` of the body.
    #[must_use]
    pub fn slack(signing_secret: &str) -> Self {
        Self::new(Scheme::Slack(signing_secret.into()))
    }

    /// Signs as Square does for this notification URL. The id is the member `event_id` of the body.
    #[must_use]
    pub fn square(notification_url: &str, signature_key: &str) -> Self {
        let (url, key) = (notification_url.to_owned(), signature_key.into());
        Self::new(Scheme::Square { url, key })
    }

    /// Signs as Twilio does for this public URL. See `TwilioWebhooks`. A request without a
    /// `Content-Type` gets that of a form. If its `Content-Type` is not that of a form, the signer
    /// adds `bodySHA256` to the query. The id is in `I-Twilio-Idempotency-Token`.
    #[must_use]
    pub fn twilio(public_url: &str, auth_token: &str) -> Self {
        let url = usable(PublicUrl::new(public_url), "the public URL");
        let token = auth_token.into();
        Self::new(Scheme::Twilio { url, token })
    }

    /// Signs the only item of a standard notification of Adyen. Adds `hmacSignature` to its
    /// `additionalData`.
    #[must_use]
    pub fn adyen(hmac_key: &str) -> Self {
        Self::new(Scheme::Adyen(usable(decoded_key(hmac_key), "the key")))
    }

    /// Signs as Adyen does for platforms, with `HmacSignature` over the body.
    #[must_use]
    pub fn adyen_platform(hmac_key: &str) -> Self {
        Self::new(Scheme::AdyenPlatform(usable(decoded_key(hmac_key), "the key")))
    }

    /// Signs as PayPal does, for the webhook of this id, with an RSA key in PEM (`BEGIN PRIVATE
    /// KEY`). The id is the member `id` of the body. `openssl genpkey -algorithm RSA -out key.pem`
    /// makes a key, and `openssl pkey -in key.pem -pubout` prints the public key for
    /// `PayPalWebhooks`.
    #[must_use]
    pub fn paypal(webhook_id: &str, private_key: &str) -> Self {
        let key = PrivatePkcs8KeyDer::from_pem_slice(private_key.as_bytes());
        let key = usable(key, "the private key");
        let key = usable(rsa::KeyPair::from_pkcs8(key.secret_pkcs8_der()), "the private key");
        let webhook_id = webhook_id.to_owned();
        Self::new(Scheme::PayPal { webhook_id, key })
    }

    const fn new(scheme: Scheme) -> Self {
        Self { scheme, time: None }
    }

    /// Sets the time of the signatures' timestamps. Default: the time when [`sign`](Self::sign) is
    /// called.
    #[must_use]
    pub const fn at(mut self, time: SystemTime) -> Self {
        self.time = Some(time);
        self
    }

    /// Signs a request. Sign the request last, because a later change can make the signature
    /// invalid.
    #[must_use]
    pub fn sign(&self, request: Request<impl Into<Bytes>>) -> Request<Bytes> {
        let (mut head, body) = request.into_parts();
        let mut body: Bytes = body.into();
        let time = self.time.unwrap_or_else(wall_clock);
        let seconds = usable(time.duration_since(UNIX_EPOCH), "the time")
            .as_secs()
            .to_string();
        match &self.scheme {
            Scheme::Adyen(key) => body = adyen(key, &body),
            Scheme::AdyenPlatform(key) => set(&mut head, "hmacsignature", &BASE64.encode(&mac(key, &[&body]))),
            Scheme::GitHub(key) => {
                or_new_id(&mut head, "x-github-delivery");
                let signature = HEXLOWER.encode(&mac(key, &[&body]));
                set(&mut head, "x-hub-signature-256", &format!("sha256={signature}"));
            }
            Scheme::PayPal { webhook_id, key } => paypal(&mut head, &body, &paypal_time(time), webhook_id, key),
            Scheme::Shopify(key) => {
                or_new_id(&mut head, "x-shopify-event-id");
                set(&mut head, "x-shopify-hmac-sha256", &BASE64.encode(&mac(key, &[&body])));
            }
            Scheme::Slack(key) => {
                let signature = HEXLOWER.encode(&mac(key, &[b"v0:", seconds.as_bytes(), b":", &body]));
                set(&mut head, "x-slack-request-timestamp", &seconds);
                set(&mut head, "x-slack-signature", &format!("v0={signature}"));
            }
            Scheme::Square { url, key } => {
                let signature = BASE64.encode(&mac(key, &[url.as_bytes(), &body]));
                set(&mut head, "x-square-hmacsha256-signature", &signature);
            }
            Scheme::Standard { prefix, key } => standard(&mut head, &body, &seconds, prefix, key),
            Scheme::Stripe(key) => {
                let signature = HEXLOWER.encode(&mac(key, &[seconds.as_bytes(), b".", &body]));
                set(&mut head, "stripe-signature", &format!("t={seconds},v1={signature}"));
            }
            Scheme::Twilio { url, token } => twilio(&mut head, &body, url, token),
        }
        Request::from_parts(head, body)
    }
}

impl StandardKey {
    fn new(secret: &str) -> Self {
        match secret.strip_prefix("whsk_") {
            Some(private) => {
                let private = usable(BASE64.decode(private.as_bytes()), "the private key");
                // The key is a seed, alone or with its public key after it.
                let seed = private.get(..32).unwrap_or_default();
                Self::Private(usable(Ed25519KeyPair::from_seed_unchecked(seed), "the private key"))
            }
            None => Self::Shared(usable(decoded_secret(secret), "the secret")),
        }
    }
}

fn standard(head: &mut Parts, body: &[u8], seconds: &str, prefix: &str, key: &StandardKey) {
    let id = or_new_id(head, &format!("{prefix}-id"));
    let signed = [id.as_bytes(), b".", seconds.as_bytes(), b".", body];
    let signature = match key {
        StandardKey::Shared(key) => format!("v1,{}", BASE64.encode(&mac(key, &signed))),
        StandardKey::Private(key) => format!("v1a,{}", BASE64.encode(key.sign(&signed.concat()).as_ref())),
    };
    set(head, &format!("{prefix}-timestamp"), seconds);
    set(head, &format!("{prefix}-signature"), &signature);
}

fn adyen(key: &[u8], body: &[u8]) -> Bytes {
    let mut body = usable(serde_json::from_slice(body), "the body, which must be JSON");
    let signed = Item::only_of(&body).and_then(|item| item.signed_text());
    let signed = usable(
        signed.ok_or("no such item"),
        "the body, which must have one `NotificationRequestItem`",
    );
    sign_item(&mut body, BASE64.encode(&mac(key, &[signed.as_bytes()])));
    body.to_string().into()
}

fn paypal(head: &mut Parts, body: &[u8], time: &str, webhook_id: &str, key: &rsa::KeyPair) {
    let id = or_new_id(head, "paypal-transmission-id");
    let signed = signed_text(&id, time, webhook_id, body);
    let mut signature = vec![0; key.public().modulus_len()];
    let made = key.sign(
        &RSA_PKCS1_SHA256,
        &SystemRandom::new(),
        signed.as_bytes(),
        &mut signature,
    );
    usable(made, "the private key");
    set(head, "paypal-auth-algo", "SHA256withRSA");
    set(head, "paypal-transmission-time", time);
    set(head, "paypal-transmission-sig", &BASE64.encode(&signature));
}

fn twilio(head: &mut Parts, body: &[u8], url: &PublicUrl, token: &[u8]) {
    const FORM: HeaderValue = HeaderValue::from_static("application/x-www-form-urlencoded");
    head.headers.entry(CONTENT_TYPE).or_insert(FORM);
    let target = head.uri.to_string();
    if !is_form(&head.headers) && body_hash(&target).is_none() {
        let before = if target.contains('?') { '&' } else { '?' };
        let hash = HEXLOWER.encode(&Sha256::digest(body));
        head.uri = usable(
            format!("{target}{before}bodySHA256={hash}").parse(),
            "the request's URI",
        );
    }
    or_new_id(head, "i-twilio-idempotency-token");
    let signed = usable(Signed::of(&Webhook::new(head, body, UNIX_EPOCH)), "the body").text(&url.spellings[0]);
    let token = ring::hmac::Key::new(ring::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, token);
    let signature = BASE64.encode(ring::hmac::sign(&token, &signed).as_ref());
    set(head, "x-twilio-signature", &signature);
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = usable(Hmac::<Sha256>::new_from_slice(key), "the secret");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().to_vec()
}

fn set(head: &mut Parts, name: &str, value: &str) {
    let name = usable(HeaderName::try_from(name), "a header field");
    let value = usable(HeaderValue::try_from(value), "a header field");
    head.headers.insert(name, value);
}

/// Returns the id that the request has in this field, or adds a new one.
fn or_new_id(head: &mut Parts, name: &str) -> String {
    if !head.headers.contains_key(name) {
        set(head, name, &format!("test-{:032x}", rand::random::<u128>()));
    }
    String::from_utf8_lossy(head.headers[name].as_bytes()).into_owned()
}

#[track_caller]
#[expect(clippy::panic, reason = "it is for tests")]
fn usable<T, E: fmt::Display>(result: Result<T, E>, what: &str) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{what} cannot be used to sign a webhook: {error}"),
    }
}

/// Shows no key.
impl fmt::Debug for WebhookSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookSigner").finish_non_exhaustive()
    }
}
