//! How the providers sign their webhooks.

use std::time::SystemTime;

use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};
use http::HeaderMap;

use super::signature::{is_recent, Secrets};
use super::{InvalidWebhook, VerifyWebhook};
use crate::error::{Error, ErrorKind};
use crate::receiver::id::MessageId;
use crate::receiver::ids;

const GITHUB_SIGNATURE: &str = "x-hub-signature-256";
const SHOPIFY_SIGNATURE: &str = "x-shopify-hmac-sha256";
const STANDARD_SIGNATURE: &str = "webhook-signature";
const STRIPE_SIGNATURE: &str = "stripe-signature";

/// Standard Webhooks 1.0: `webhook-id`, `webhook-timestamp`, and `webhook-signature` with one or more signatures of the kind `v1`. The
/// timestamp may be five minutes away, either way. An id with a `.` in it is none: the signature covers id, timestamp and body with dots
/// between them, and could then be read in two ways.
#[derive(Clone, Debug)]
pub struct StandardWebhooks(Secrets);

/// Stripe's: `Stripe-Signature` with a timestamp, which may be five minutes away, either way, and one or more signatures of the kind
/// `v1`. The id is that of the event, in the body.
#[derive(Clone, Debug)]
pub struct StripeWebhooks(Secrets);

/// GitHub's: `X-Hub-Signature-256`, over the body alone. The id is in a header field that is not signed, and there is no timestamp: who
/// records a webhook can send it again under another id.
#[derive(Clone, Debug)]
pub struct GitHubWebhooks(Secrets);

/// Shopify's: `X-Shopify-Hmac-SHA256`. The id is in header fields that are not signed: who records a webhook can send it again under
/// another id.
#[derive(Clone, Debug)]
pub struct ShopifyWebhooks(Secrets);

impl StandardWebhooks {
    /// With these secrets, in base64 with or without `whsec_` before it.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when there is none, or one is no base64.
    pub fn new<S: AsRef<str>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        const NO_BASE64: Error = Error::new(
            ErrorKind::Configuration,
            "a secret for Standard Webhooks is no base64; it looks like `whsec_` with base64 behind it",
        );
        let decode = |secret: S| {
            let secret = secret.as_ref().trim();
            let encoded = secret.strip_prefix("whsec_").unwrap_or(secret);
            BASE64.decode(encoded.as_bytes()).map_err(|_| NO_BASE64)
        };
        let secrets: Vec<_> = secrets.into_iter().map(decode).collect::<Result<_, _>>()?;
        Ok(Self(Secrets::new(secrets)?))
    }
}

impl VerifyWebhook for StandardWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(STANDARD_SIGNATURE)
    }

    fn verify(&self, headers: &HeaderMap, body: &[u8], now: SystemTime) -> Result<MessageId, InvalidWebhook> {
        let id = present(ids::standard_webhooks(headers))?;
        let id_bytes = headers.get("webhook-id").map_or(&b""[..], |id| id.as_bytes());
        // Of `msg_1.T.T2.5` nothing says where the id ends. A timestamp, which must be a number, has none.
        if id_bytes.contains(&b'.') {
            return Err(InvalidWebhook::Id);
        }
        let timestamp = text(headers, "webhook-timestamp").ok_or(InvalidWebhook::Timestamp)?;
        let signatures = text(headers, STANDARD_SIGNATURE).ok_or(InvalidWebhook::Signature)?;
        let signatures: Vec<_> = signatures
            .split(' ')
            .filter_map(|signature| BASE64.decode(signature.strip_prefix("v1,")?.as_bytes()).ok())
            .collect();
        let signed = [id_bytes, b".", timestamp.as_bytes(), b".", body];
        self.0.verify(&signed, &signatures)?;
        // Only what is genuine is told more.
        is_recent(timestamp, now)?;
        Ok(id)
    }
}

impl StripeWebhooks {
    /// With these secrets of the endpoint, `whsec_...`, as they stand.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when there is none, or an empty one.
    pub fn new<S: AsRef<[u8]>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        Ok(Self(Secrets::new(secrets)?))
    }
}

impl VerifyWebhook for StripeWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(STRIPE_SIGNATURE)
    }

    fn verify(&self, headers: &HeaderMap, body: &[u8], now: SystemTime) -> Result<MessageId, InvalidWebhook> {
        let header = text(headers, STRIPE_SIGNATURE).ok_or(InvalidWebhook::Signature)?;
        let all = |name: &'static str| {
            let pairs = header.split(',').filter_map(|pair| pair.split_once('='));
            pairs
                .filter(move |(found, _)| found.trim() == name)
                .map(|(_, value)| value)
        };
        let timestamp = all("t").next().ok_or(InvalidWebhook::Timestamp)?;
        let signatures: Vec<_> = all("v1").filter_map(hex).collect();
        self.0.verify(&[timestamp.as_bytes(), b".", body], &signatures)?;
        is_recent(timestamp, now)?;
        let event: serde_json::Value = serde_json::from_slice(body).map_err(|_| InvalidWebhook::Id)?;
        present(ids::stripe(event["id"].as_str().unwrap_or_default()))
    }
}

impl GitHubWebhooks {
    /// With these secrets, as they stand.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when there is none, or an empty one.
    pub fn new<S: AsRef<[u8]>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        Ok(Self(Secrets::new(secrets)?))
    }
}

impl VerifyWebhook for GitHubWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(GITHUB_SIGNATURE)
    }

    fn verify(&self, headers: &HeaderMap, body: &[u8], _: SystemTime) -> Result<MessageId, InvalidWebhook> {
        let signature = text(headers, GITHUB_SIGNATURE).and_then(|signature| hex(signature.strip_prefix("sha256=")?));
        self.0.verify(&[body], &[signature.ok_or(InvalidWebhook::Signature)?])?;
        present(ids::github(headers))
    }
}

impl ShopifyWebhooks {
    /// With these secrets of the app, as they stand.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when there is none, or an empty one.
    pub fn new<S: AsRef<[u8]>>(secrets: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        Ok(Self(Secrets::new(secrets)?))
    }
}

impl VerifyWebhook for ShopifyWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(SHOPIFY_SIGNATURE)
    }

    fn verify(&self, headers: &HeaderMap, body: &[u8], _: SystemTime) -> Result<MessageId, InvalidWebhook> {
        let signature = text(headers, SHOPIFY_SIGNATURE).and_then(|text| BASE64.decode(text.as_bytes()).ok());
        self.0.verify(&[body], &[signature.ok_or(InvalidWebhook::Signature)?])?;
        present(ids::shopify(headers))
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn hex(text: &str) -> Option<Vec<u8>> {
    HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok()
}

fn present(id: MessageId) -> Result<MessageId, InvalidWebhook> {
    if id.is_missing() {
        return Err(InvalidWebhook::Id);
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use hmac::{Hmac, KeyInit, Mac};
    use http::{HeaderName, HeaderValue};
    use sha2::Sha256;

    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const OTHER: &str = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    /// The vector that the reference libraries of Standard Webhooks publish in their tests.
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SENT: u64 = 1_614_265_330;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let fields = fields.iter().map(|(name, value)| {
            let value = HeaderValue::from_str(value).unwrap();
            (HeaderName::from_static(name), value)
        });
        fields.collect()
    }

    fn standard(signature: &str) -> HeaderMap {
        headers(&[
            ("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek"),
            ("webhook-timestamp", "1614265330"),
            ("webhook-signature", signature),
        ])
    }

    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn the_published_vector_is_genuine() {
        let scheme = StandardWebhooks::new([SECRET]).unwrap();
        let id = scheme.verify(&standard(SIGNATURE), BODY, at(SENT)).unwrap();
        assert_eq!(id, ids::standard_webhooks(&standard("")));
        // Without the prefix, beside other secrets, and among other signatures.
        for secrets in [vec![&SECRET[6..]], vec![OTHER, SECRET], vec![SECRET, OTHER]] {
            let scheme = StandardWebhooks::new(secrets).unwrap();
            for signature in [
                SIGNATURE.to_owned(),
                format!("v1,AAAA {SIGNATURE}"),
                format!("v1a,x v2,y {SIGNATURE} z"),
            ] {
                assert!(
                    scheme.verify(&standard(&signature), BODY, at(SENT)).is_ok(),
                    "{signature}"
                );
            }
        }
    }

    #[test]
    fn what_was_altered_is_not_genuine() {
        let scheme = StandardWebhooks::new([SECRET]).unwrap();
        let refused = |headers: &HeaderMap, body: &[u8]| scheme.verify(headers, body, at(SENT)).unwrap_err();
        assert_eq!(refused(&standard(SIGNATURE), b"{}"), InvalidWebhook::Signature);
        for signature in [
            "",
            "v1,",
            "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
            &SIGNATURE[3..],
            "v1,g0hM",
        ] {
            assert_eq!(
                refused(&standard(signature), BODY),
                InvalidWebhook::Signature,
                "{signature}"
            );
        }
        for (name, value) in [("webhook-id", "msg_other"), ("webhook-timestamp", "1614265331")] {
            let mut headers = standard(SIGNATURE);
            headers.insert(name, HeaderValue::from_static(value));
            assert_eq!(refused(&headers, BODY), InvalidWebhook::Signature, "{name}");
        }
        for (name, why) in [
            ("webhook-id", InvalidWebhook::Id),
            ("webhook-timestamp", InvalidWebhook::Timestamp),
            ("webhook-signature", InvalidWebhook::Signature),
        ] {
            let mut headers = standard(SIGNATURE);
            headers.remove(name);
            assert_eq!(refused(&headers, BODY), why);
        }
        let other = StandardWebhooks::new([OTHER]).unwrap();
        assert_eq!(
            other.verify(&standard(SIGNATURE), BODY, at(SENT)),
            Err(InvalidWebhook::Signature)
        );
    }

    #[test]
    fn a_timestamp_may_be_five_minutes_away_either_way() {
        let scheme = StandardWebhooks::new([SECRET]).unwrap();
        for (now, is_genuine) in [
            (SENT - 301, false),
            (SENT - 300, true),
            (SENT + 300, true),
            (SENT + 301, false),
            (0, false),
        ] {
            let verified = scheme.verify(&standard(SIGNATURE), BODY, at(now));
            assert_eq!(verified.is_ok(), is_genuine, "{now}");
        }
        for nonsense in [
            "",
            "+1614265330",
            "-1",
            "1e9",
            " 1",
            "1614265330.5",
            "18446744073709551615",
            "99999999999999999999999",
        ] {
            assert_eq!(
                is_recent(nonsense, at(SENT)),
                Err(InvalidWebhook::Timestamp),
                "{nonsense}"
            );
        }
    }

    /// `msg_1`, T and the body `T2.5` were signed; id `msg_1.T`, T2 and the body `5` have the same signature.
    #[test]
    fn the_signed_parts_cannot_be_shifted() {
        let scheme = StandardWebhooks::new([SECRET]).unwrap();
        let signature = |content: &str| {
            let mut mac = Hmac::<Sha256>::new_from_slice(&BASE64.decode(&SECRET.as_bytes()[6..]).unwrap()).unwrap();
            mac.update(content.as_bytes());
            format!("v1,{}", BASE64.encode(&mac.finalize().into_bytes()))
        };
        let signature = signature("msg_1.1614265330.1614265331.5");
        let sent = |id, timestamp| {
            headers(&[
                ("webhook-id", id),
                ("webhook-timestamp", timestamp),
                ("webhook-signature", &signature),
            ])
        };
        let verify = |headers: &HeaderMap, body: &[u8]| scheme.verify(headers, body, at(SENT));
        assert!(verify(&sent("msg_1", "1614265330"), b"1614265331.5").is_ok());
        let shifted = verify(&sent("msg_1.1614265330", "1614265331"), b"5");
        assert_eq!(shifted, Err(InvalidWebhook::Id));
        let shifted = verify(&sent("msg_1", "1614265330.1614265331"), b"5");
        assert_eq!(shifted, Err(InvalidWebhook::Timestamp));
    }

    #[test]
    fn what_has_no_signature_is_told_by_its_head() {
        let schemes: [(Box<dyn VerifyWebhook>, &str); 4] = [
            (Box::new(StandardWebhooks::new([SECRET]).unwrap()), "webhook-signature"),
            (Box::new(StripeWebhooks::new(["hush"]).unwrap()), "stripe-signature"),
            (Box::new(GitHubWebhooks::new(["hush"]).unwrap()), "x-hub-signature-256"),
            (
                Box::new(ShopifyWebhooks::new(["hush"]).unwrap()),
                "x-shopify-hmac-sha256",
            ),
        ];
        for (scheme, name) in schemes {
            assert!(scheme.is_signed(&headers(&[(name, "")])), "{name}");
            assert!(!scheme.is_signed(&headers(&[("x-hub-signature", "1")])), "{name}");
        }
    }

    #[test]
    fn githubs_published_vector_is_genuine() {
        let scheme = GitHubWebhooks::new(["It's a Secret to Everybody"]).unwrap();
        let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        let sent = headers(&[("x-hub-signature-256", signature), ("x-github-delivery", "72d3162e")]);
        assert_eq!(scheme.verify(&sent, b"Hello, World!", at(0)), Ok(ids::github(&sent)));
        assert_eq!(
            scheme.verify(&sent, b"Hello, World?", at(0)),
            Err(InvalidWebhook::Signature)
        );
        let unnamed = headers(&[("x-hub-signature-256", signature)]);
        assert_eq!(
            scheme.verify(&unnamed, b"Hello, World!", at(0)),
            Err(InvalidWebhook::Id)
        );
        let sha1 = headers(&[("x-hub-signature", "sha1=x"), ("x-github-delivery", "72d3162e")]);
        assert_eq!(
            scheme.verify(&sha1, b"Hello, World!", at(0)),
            Err(InvalidWebhook::Signature)
        );
    }

    /// Computed with Python's `hmac`.
    #[test]
    fn stripes_and_shopifys_signatures_are_what_python_computes() {
        let body = br#"{"id":"evt_1","object":"event"}"#;
        let stripe = StripeWebhooks::new(["whsec_test"]).unwrap();
        let sign = |signatures: &str| headers(&[("stripe-signature", &format!("t=1614265330,{signatures}"))]);
        let genuine = "v1=9ac111b4a635c6f720c27290b8297e4ccdfeb07170d2ea5b3c3109b1576b7919";
        for signatures in [
            genuine.to_owned(),
            format!("v0=00,v1=00,{genuine}"),
            format!("{genuine},v1=zz"),
        ] {
            let verified = stripe.verify(&sign(&signatures), body, at(SENT + 300));
            assert_eq!(verified, Ok(ids::stripe("evt_1")), "{signatures}");
        }
        assert_eq!(
            stripe.verify(&sign(genuine), body, at(SENT + 301)),
            Err(InvalidWebhook::Timestamp)
        );
        assert_eq!(
            stripe.verify(&sign("v0=00"), body, at(SENT)),
            Err(InvalidWebhook::Signature)
        );
        assert_eq!(
            stripe.verify(&sign(genuine), b"{}", at(SENT)),
            Err(InvalidWebhook::Signature)
        );
        assert_eq!(
            stripe.verify(&headers(&[]), body, at(SENT)),
            Err(InvalidWebhook::Signature)
        );
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
            let verified = stripe.verify(&sign(&format!("v1={signature}")), nameless.as_bytes(), at(SENT));
            assert_eq!(verified, Err(InvalidWebhook::Id), "{nameless}");
        }

        let shopify = ShopifyWebhooks::new(["hush"]).unwrap();
        let sent = headers(&[
            ("x-shopify-hmac-sha256", "Y5yh1MBcvmylNdRGRmMjSnWMAU5vK6ZYOwIowkFMvRk="),
            ("x-shopify-event-id", "98880550"),
        ]);
        assert_eq!(shopify.verify(&sent, body, at(0)), Ok(ids::shopify(&sent)));
        assert_eq!(shopify.verify(&sent, b"{}", at(0)), Err(InvalidWebhook::Signature));
        let unnamed = headers(&[("x-shopify-hmac-sha256", "Y5yh1MBcvmylNdRGRmMjSnWMAU5vK6ZYOwIowkFMvRk=")]);
        assert_eq!(shopify.verify(&unnamed, body, at(0)), Err(InvalidWebhook::Id));
    }

    #[test]
    fn secrets_that_could_verify_nothing_are_refused_and_none_is_shown() {
        for error in [
            StandardWebhooks::new(["whsec_not base64!"]).unwrap_err(),
            StandardWebhooks::new(["whsec_"]).unwrap_err(),
            StandardWebhooks::new::<&str>([]).unwrap_err(),
            StripeWebhooks::new([""]).unwrap_err(),
            GitHubWebhooks::new::<&str>([]).unwrap_err(),
            ShopifyWebhooks::new([b""]).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Configuration);
        }
        assert_eq!(
            format!("{:?}", GitHubWebhooks::new(["hush"]).unwrap()),
            "GitHubWebhooks(Secrets(..))"
        );
    }
}
