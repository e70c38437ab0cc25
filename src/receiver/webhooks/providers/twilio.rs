//! Webhooks of Twilio.

use std::fmt;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, Uri};
use ring::hmac;
use sha2::{Digest, Sha256};

use super::form::{Pair, pairs};
use crate::error::Error;
use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{base64, field, hex, present};
use crate::receiver::webhooks::signature::NO_SECRET;
use crate::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};

const SIGNATURE: &str = "x-twilio-signature";

/// The field that announces a signature with a shared key, such as `key=..,algorithm=HMAC_SHA256`.
const SHARED_KEY: &str = "x-twilio-webhooks-signature-settings";

/// Twilio: `X-Twilio-Signature`, an HMAC-SHA-1 that starts with the URL.
///
/// * **Signed**: the full URL, and either the sorted parameters of a form, up to 1,000, or the hash
///   of another body. URL, names and values are joined into **one text without separators**. Any
///   other split of the same text into a URL, names and values has the same signature. Someone who
///   has recorded a webhook can move text between a name and its value, between parameters, and
///   between the URL and the parameters. Therefore trust no single parameter of a recorded webhook.
///   The signature covers neither the order of parameters nor the repetition of an equal one.
/// * **Body**: a body with the `Content-Type` `application/x-www-form-urlencoded` is a form, and
///   the signature always covers its parameters. Any other body must have its hash in the URL, as
///   `bodySHA256` at the end of the query, where Twilio puts it. The check ignores a hash in any
///   other place, because that hash can be part of a recorded parameter. One attack remains: a
///   forger who can choose the end of the last parameter (in sorted order) and can record the
///   webhook can place the hash of another body there.
/// * **Id**: `I-Twilio-Idempotency-Token`, which Twilio repeats when it sends a webhook again. A
///   webhook without this field is rejected. The field is **not signed**, and the signed parts have
///   no id. For example, two presses of a key in one call can have equal parameters.
/// * **Replays**: there is no timestamp. Someone who has recorded a webhook can send it again under
///   another token, and it runs again. Make the handler safe against an old event, by the `CallSid`
///   or `MessageSid` and the state that it reports.
///
/// Choose POST for the webhook at Twilio. The layer rejects GET, whose parameters would be in the
/// URL.
///
/// Signatures by an auth token use HMAC-SHA-1. The weaknesses of SHA-1 against collisions do not
/// break HMAC. Twilio's shared keys (a public beta) sign with HMAC-SHA-256, which this check does
/// not support. It rejects a webhook that has their field `X-Twilio-Webhooks-Signature-Settings` as
/// [`Secret`](InvalidWebhook::Secret), whatever the field contains.
#[derive(Clone)]
pub struct TwilioWebhooks {
    url: PublicUrl,
    tokens: Vec<hmac::Key>,
}

impl TwilioWebhooks {
    /// Verifies for this public URL with these auth tokens.
    ///
    /// `public_url` is the start of the URL that you entered at Twilio, without the request's path
    /// and query: `https://hooks.example`. Proxies change scheme, host and port, so the layer
    /// cannot find them out. If a proxy also removes the start of the path, add it:
    /// `https://example.com/api`. If you entered a user and a password, add them:
    /// `https://user:password@hooks.example`. As in Twilio's libraries, a URL with and without its
    /// port is the same.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the URL has no scheme or host, or has
    /// a query, and if there is no token or an empty one.
    pub fn new<S: AsRef<[u8]>>(
        public_url: impl AsRef<str>,
        auth_tokens: impl IntoIterator<Item = S>,
    ) -> Result<Self, Error> {
        let url = PublicUrl::new(public_url.as_ref())?;
        let tokens = auth_tokens.into_iter().map(|token| {
            let token = token.as_ref();
            (!token.is_empty())
                .then(|| hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, token))
                .ok_or(NO_SECRET)
        });
        let tokens: Vec<_> = tokens.collect::<Result<_, _>>()?;
        if tokens.is_empty() {
            return Err(NO_SECRET);
        }
        Ok(Self { url, tokens })
    }
}

impl VerifyWebhook for TwilioWebhooks {
    fn is_signed(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(SIGNATURE)
    }

    fn verify(&self, webhook: &Webhook<'_>) -> Result<MessageId, InvalidWebhook> {
        let headers = webhook.headers();
        // The field is not signed, so it must not choose the check.
        if headers.contains_key(SHARED_KEY) {
            return Err(InvalidWebhook::Secret);
        }
        let signature = base64(field(headers, SIGNATURE, InvalidWebhook::Signature)?);
        let signature = signature.ok_or(InvalidWebhook::Signature)?;
        let signed = Signed::of(webhook)?;
        let fits = |url: &String| {
            let signed = signed.text(url);
            // `hmac::verify` compares in constant time.
            let mut tokens = self.tokens.iter();
            tokens.any(|token| hmac::verify(token, &signed, &signature).is_ok())
        };
        if !self.url.spellings.iter().any(fits) {
            return Err(InvalidWebhook::Signature);
        }
        field(headers, "i-twilio-idempotency-token", InvalidWebhook::Id)?;
        present(ids::twilio(headers))
    }
}

/// The parts that the signature covers after the public URL.
pub(in crate::receiver) struct Signed<'w> {
    path_and_query: &'w str,
    form: Vec<Pair>,
}

impl<'w> Signed<'w> {
    pub(in crate::receiver) fn of(webhook: &Webhook<'w>) -> Result<Self, InvalidWebhook> {
        let path_and_query = webhook.path_and_query();
        // Reject a second line, because the check could read one line and the handler the other.
        if webhook.headers().get_all(CONTENT_TYPE).iter().nth(1).is_some() {
            return Err(InvalidWebhook::Body);
        }
        let mut form = Vec::new();
        if is_form(webhook.headers()) {
            let pairs = pairs(webhook.body()).ok_or(InvalidWebhook::Body)?;
            form.extend(pairs);
        } else if let Some(hash) = body_hash(path_and_query) {
            let hash = hex(hash).ok_or(InvalidWebhook::Signature)?;
            if hash[..] != Sha256::digest(webhook.body())[..] {
                return Err(InvalidWebhook::Signature);
            }
        } else if !webhook.body().is_empty() {
            return Err(InvalidWebhook::Body);
        }
        Ok(Self { path_and_query, form })
    }

    pub(in crate::receiver) fn text(&self, public_url: &str) -> Vec<u8> {
        let mut text = [public_url.as_bytes(), self.path_and_query.as_bytes()].concat();
        for (name, value) in &self.form {
            text.extend_from_slice(name);
            text.extend_from_slice(value);
        }
        text
    }
}

/// Returns the hash in the last pair of the query.
///
/// The signed text does not mark the end of the URL, so someone could shift the parameters of a
/// recorded form into the query. A hash within a parameter is not at the end, unless no other
/// parameter sorts after this one.
pub(in crate::receiver) fn body_hash(path_and_query: &str) -> Option<&str> {
    let (_, query) = path_and_query.split_once('?')?;
    let last = query.rsplit('&').next()?;
    last.strip_prefix("bodySHA256=")
}

/// Returns whether a handler could read the body as a form. Compares the start of the type, as
/// axum's `Form` does, so that no form passes as another body.
pub(in crate::receiver) fn is_form(headers: &HeaderMap) -> bool {
    const FORM: &[u8] = b"application/x-www-form-urlencoded";
    let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
    let start = kind.trim_ascii_start().get(..FORM.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(FORM))
}

/// The part of the URL before the request's path, with and without its port.
#[derive(Clone)]
pub(in crate::receiver) struct PublicUrl {
    pub(in crate::receiver) spellings: [String; 2],
}

impl PublicUrl {
    pub(in crate::receiver) fn new(url: &str) -> Result<Self, Error> {
        const NO_URL: Error = Error::configuration(
            "the public URL for webhooks of Twilio is not `https://host` or `https://host/prefix`; enter it without path and query \
             of the route",
        );
        let uri: Uri = url.parse().map_err(|_| NO_URL)?;
        let (Some(scheme), Some(authority), None) = (uri.scheme_str(), uri.authority(), uri.query()) else {
            return Err(NO_URL);
        };
        let port = match scheme {
            "https" => 443,
            "http" => 80,
            _ => return Err(NO_URL),
        };
        let given = url.trim_end_matches('/').to_owned();
        // The authority may have a user and a password, which are signed.
        let authority_text = authority.as_str().trim_end_matches(':');
        let prefix = uri.path().trim_end_matches('/');
        let without_port = authority
            .port()
            .and_then(|given| authority_text.strip_suffix(given.as_str())?.strip_suffix(':'));
        let other = match without_port {
            Some(host) => format!("{scheme}://{host}{prefix}"),
            None => format!("{scheme}://{authority_text}:{port}{prefix}"),
        };
        Ok(Self {
            spellings: [given, other],
        })
    }
}

impl fmt::Debug for TwilioWebhooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TwilioWebhooks").finish_non_exhaustive()
    }
}
