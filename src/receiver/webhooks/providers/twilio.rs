//! Twilio.

use std::fmt;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, Uri};
use ring::hmac;
use sha2::{Digest, Sha256};

use super::form::{pairs, Pair};
use crate::error::{Error, ErrorKind};
use crate::receiver::id::MessageId;
use crate::receiver::ids;
use crate::receiver::webhooks::fields::{base64, field, hex, present};
use crate::receiver::webhooks::signature::NO_SECRET;
use crate::receiver::webhooks::{InvalidWebhook, VerifyWebhook, Webhook};

const SIGNATURE: &str = "x-twilio-signature";

/// Twilio: `X-Twilio-Signature`, an HMAC-SHA-1 that begins with the URL.
///
/// * **Signed**: the full URL, and either the parameters of a form or, if the URL has the query parameter `bodySHA256`, the body's hash.
///   In a form, names and values are joined without separators, so a signature also fits a form in which the end of a name has moved
///   into its value; the order of parameters, and whether an equal one is repeated, are not signed either. A form may have up to 1,000
///   parameters.
/// * **Id**: `I-Twilio-Idempotency-Token`, which Twilio repeats when it sends a webhook again. It is **not signed**, and the signed
///   parts have no id: two presses of a key in one call can have equal parameters.
/// * **Replays**: there is no timestamp. Someone who has recorded a webhook can send it again under another token, and it runs again.
///   Make the handler safe against an old event, by the `CallSid` or `MessageSid` and the state that it reports.
///
/// Choose POST for the webhook at Twilio. The layer rejects GET, whose parameters would be in the URL.
///
/// HMAC-SHA-1 is what Twilio offers. The weaknesses of SHA-1 against collisions do not break HMAC.
#[derive(Clone)]
pub struct TwilioWebhooks {
    url: PublicUrl,
    tokens: Vec<hmac::Key>,
}

impl TwilioWebhooks {
    /// Verifies for this public URL with these auth tokens.
    ///
    /// `public_url` is the beginning of the URL that you entered at Twilio, without the request's path and query: `https://hooks.example`.
    /// Proxies change scheme, host and port, so the layer cannot find them out. If a proxy removes the beginning of the path as well,
    /// add it: `https://example.com/api`. As in Twilio's libraries, a URL with and without its port is the same.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) if the URL has no scheme or host, or has a query, and if there is no token or an
    /// empty one.
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

/// The parts that the signature covers behind the public URL.
pub(in crate::receiver) struct Signed<'w> {
    path_and_query: &'w str,
    form: Vec<Pair>,
}

impl<'w> Signed<'w> {
    pub(in crate::receiver) fn of(webhook: &Webhook<'w>) -> Result<Self, InvalidWebhook> {
        let path_and_query = webhook.path_and_query();
        let form = match body_hash(path_and_query) {
            // The URL is signed, so nobody but Twilio can add or remove the hash.
            Some(hash) => {
                let hash = hex(hash).ok_or(InvalidWebhook::Signature)?;
                if hash[..] != Sha256::digest(webhook.body())[..] {
                    return Err(InvalidWebhook::Signature);
                }
                Vec::new()
            }
            None if webhook.body().is_empty() || is_form(webhook.headers()) => {
                let pairs = pairs(webhook.body()).ok_or(InvalidWebhook::Body)?;
                pairs.into_iter().collect()
            }
            None => return Err(InvalidWebhook::Body),
        };
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

fn body_hash(path_and_query: &str) -> Option<&str> {
    let (_, query) = path_and_query.split_once('?')?;
    query.split('&').find_map(|pair| pair.strip_prefix("bodySHA256="))
}

fn is_form(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default();
    kind.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded")
}

/// The part of the URL before the request's path, with and without its port.
#[derive(Clone)]
pub(in crate::receiver) struct PublicUrl {
    pub(in crate::receiver) spellings: [String; 2],
}

impl PublicUrl {
    pub(in crate::receiver) fn new(url: &str) -> Result<Self, Error> {
        const NO_URL: Error = Error::new(
            ErrorKind::Configuration,
            "the public URL for webhooks of Twilio is no `https://host` or `https://host/prefix`; enter it without path and query of the route",
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
        let host = authority.host();
        let prefix = uri.path().trim_end_matches('/');
        let other = match authority.port() {
            Some(_) => format!("{scheme}://{host}{prefix}"),
            None => format!("{scheme}://{host}:{port}{prefix}"),
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
