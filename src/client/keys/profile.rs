//! Profiles of servers: how they accept keys, and what their responses mean.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use http::header::{HeaderMap, HeaderName, RETRY_AFTER};

use crate::callback::Callback;
use crate::http::IDEMPOTENCY_KEY;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

type InFlightFn = Callback<dyn Fn(&HeaderMap) -> bool + Send + Sync>;

/// A description of a server: how it accepts idempotency keys, and what its responses mean for a
/// retry.
///
/// The presets follow the documentation of the providers. If a provider documents nothing about a
/// part, the preset uses that part of [`ProviderProfile::draft`] and its docs say so. Every part
/// can be changed.
///
/// ```
/// use std::time::Duration;
/// use http::HeaderName;
/// use tower_idempotency::client::ProviderProfile;
///
/// let bank = ProviderProfile::draft()
///     .with_header(HeaderName::from_static("x-request-id"))
///     .with_quotes(false)
///     .with_max_len(40)
///     .with_retention(Duration::from_secs(3600));
/// # drop(bank);
/// ```
#[derive(Clone, Debug)]
pub struct ProviderProfile {
    pub(crate) header: HeaderName,
    pub(crate) quoted: bool,
    pub(crate) max_len: usize,
    pub(crate) first_sent: Option<HeaderName>,
    pub(crate) retention: Duration,
    replayed: Option<HeaderName>,
    should_repeat: Option<HeaderName>,
    in_flight: InFlightFn,
    repeated: Vec<StatusCode>,
}

/// Advice about sending a request again, if it has a key or its method is idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum RetryAdvice {
    /// Do not send it again. This response is the result.
    Final,
    /// Send it again later.
    Repeat,
}

/// The meaning of a response for the effect of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "a caller must handle every case")]
pub enum ResponseMeaning {
    /// The server processed the request, and the response describes the effect.
    Responded {
        /// Whether this also holds for earlier attempts under the key whose responses were lost. It
        /// is false for a status such as 401, 403 or 413, because a gateway in front of the server
        /// may have sent it.
        settles: bool,
    },
    /// The server reports that it did not start to process the request.
    NotTaken,
    /// It is unknown whether the request took effect.
    Unknown,
}

impl ProviderProfile {
    /// Returns the profile of draft-ietf-httpapi-idempotency-key-header-07, as
    /// [`IdempotencyLayer`](crate::IdempotencyLayer) implements it.
    ///
    /// The field is `Idempotency-Key`, a structured-field string in quotes, up to 255 bytes.
    /// `Idempotent-Replayed` marks a replay. A 409 with `Retry-After` means that the first request
    /// is in flight, or that the server does not know its outcome yet. The client sends a request again after 408, 425, 429, 500, 502, 503 and 504.
    /// The draft leaves the retention to the server; this profile assumes 24 hours.
    #[must_use]
    pub fn draft() -> Self {
        Self {
            header: IDEMPOTENCY_KEY,
            quoted: true,
            max_len: 255,
            first_sent: None,
            retention: DAY,
            replayed: Some(HeaderName::from_static("idempotent-replayed")),
            should_repeat: None,
            in_flight: Callback(Arc::new(|headers| headers.contains_key(RETRY_AFTER))),
            repeated: [408, 425, 429, 500, 502, 503, 504]
                .into_iter()
                .filter_map(|status| StatusCode::from_u16(status).ok())
                .collect(),
        }
    }

    /// Returns the profile of Stripe: `Idempotency-Key` without quotes, up to 255 bytes, stored for
    /// at least 24 hours.
    ///
    /// `Stripe-Should-Retry` decides about a retry if the response has it. Every 409 means that the
    /// first request is in flight. Stripe replays a 500, and its outcome is unknown.
    #[must_use]
    pub fn stripe() -> Self {
        Self {
            should_repeat: Some(HeaderName::from_static("stripe-should-retry")),
            in_flight: Callback(Arc::new(|_| true)),
            ..Self::draft().with_quotes(false)
        }
    }

    /// Returns the profile of Adyen: `Idempotency-Key` without quotes, up to 64 bytes, stored for
    /// at least 7 days. `transient-error` decides about a retry if the response has it.
    #[must_use]
    pub fn adyen() -> Self {
        Self {
            should_repeat: Some(HeaderName::from_static("transient-error")),
            retention: DAY * 7,
            ..Self::draft().with_quotes(false).with_max_len(64)
        }
    }

    /// Returns the profile of PayPal: `PayPal-Request-Id` without quotes, up to 108 bytes (older
    /// endpoints accept 38), stored for 6 hours or more, depending on the endpoint.
    #[must_use]
    pub fn paypal() -> Self {
        Self {
            replayed: None,
            retention: DAY / 4,
            ..Self::draft()
                .with_header(HeaderName::from_static("paypal-request-id"))
                .with_quotes(false)
                .with_max_len(108)
        }
    }

    /// Returns the profile of Checkout.com: `Cko-Idempotency-Key` without quotes, stored for 24
    /// hours. The maximum length is not documented, so this profile assumes 255 bytes.
    #[must_use]
    pub fn checkout() -> Self {
        Self {
            replayed: None,
            ..Self::draft()
                .with_header(HeaderName::from_static("cko-idempotency-key"))
                .with_quotes(false)
        }
    }

    /// Returns the profile of OASIS Repeatable Requests 1.0: `Repeatability-Request-ID` without
    /// quotes, and `Repeatability-First-Sent`. The latter is the date of the first attempt, and
    /// must be the same in every later attempt, also after a crash. If the layer did not make the
    /// key at random, set the date by
    /// [`KeyOrigin::with_first_sent`](super::KeyOrigin::with_first_sent) or as a header field.
    /// Without a date, the layer does not send the request. The specification leaves the retention
    /// to the server; this profile assumes 24 hours.
    #[must_use]
    pub fn repeatable_requests() -> Self {
        Self {
            replayed: None,
            first_sent: Some(HeaderName::from_static("repeatability-first-sent")),
            ..Self::draft()
                .with_header(HeaderName::from_static("repeatability-request-id"))
                .with_quotes(false)
        }
    }

    /// Sets the header field that carries the key. Default: that of the preset.
    #[must_use]
    pub fn with_header(mut self, header: HeaderName) -> Self {
        self.header = header;
        self
    }

    /// Sets whether the client sends the key in quotes, as a structured-field string (RFC 9651
    /// section 3.3.3). Default: that of the preset.
    #[must_use]
    pub const fn with_quotes(mut self, quoted: bool) -> Self {
        self.quoted = quoted;
        self
    }

    /// Sets the maximum length of a key in bytes, without quotes. A longer key is an error, and
    /// nothing is sent. Default: that of the preset.
    #[must_use]
    pub const fn with_max_len(mut self, bytes: usize) -> Self {
        self.max_len = bytes;
        self
    }

    /// Sets how long the server stores a key. The client sends no request again after nine tenths
    /// of this time. Default: that of the preset.
    #[must_use]
    pub const fn with_retention(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// Sets the header field that marks a response as a replay with the value `true`. `None` means
    /// that the server marks no replay. Default: that of the preset.
    #[must_use]
    pub fn with_replay_marker(mut self, header: Option<HeaderName>) -> Self {
        self.replayed = header;
        self
    }

    /// Sets the header field in which the server advises whether to send the request again, with
    /// `true` or `false`. It takes precedence over the status and over the replay marker. Without
    /// such a field, or with any other value, the status decides. Default: that of the preset.
    #[must_use]
    pub fn with_repeat_marker(mut self, header: Option<HeaderName>) -> Self {
        self.should_repeat = header;
        self
    }

    /// Sets a function that recognises, by its headers, a 409 that means "the first request is
    /// still in flight". Every other 409 is final. Default: that of the preset.
    #[must_use]
    pub fn with_in_flight(mut self, is_in_flight: impl Fn(&HeaderMap) -> bool + Send + Sync + 'static) -> Self {
        self.in_flight = Callback(Arc::new(is_in_flight));
        self
    }

    /// Sets the statuses after which the client sends a request again. Default: 408, 425, 429, 500,
    /// 502, 503 and 504.
    #[must_use]
    pub fn with_repeated(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.repeated = statuses.into_iter().collect();
        self
    }

    /// Returns whether the server marks the response as a replay.
    #[must_use]
    pub fn is_replay(&self, headers: &HeaderMap) -> bool {
        boolean(headers, self.replayed.as_ref()) == Some(true)
    }

    fn is_in_flight(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        status == StatusCode::CONFLICT && (self.in_flight)(headers)
    }

    /// Returns whether to send the request again after a response with this status and these
    /// headers.
    #[must_use]
    pub fn advice(&self, status: StatusCode, headers: &HeaderMap) -> RetryAdvice {
        let advised = boolean(headers, self.should_repeat.as_ref());
        let is_repeated = || {
            // The server would replay a stored response again and again.
            !self.is_replay(headers) && (self.is_in_flight(status, headers) || self.repeated.contains(&status))
        };
        if advised.unwrap_or_else(is_repeated) {
            RetryAdvice::Repeat
        } else {
            RetryAdvice::Final
        }
    }

    /// Returns the meaning of a response for the effect of its request. The effect is unknown after
    /// a 5xx other than 501, after a 1xx, after a 408, and after a 409 in flight.
    #[must_use]
    pub fn meaning(&self, status: StatusCode, headers: &HeaderMap) -> ResponseMeaning {
        let is_replay = self.is_replay(headers);
        match status.as_u16() {
            409 if self.is_in_flight(status, headers) => ResponseMeaning::Unknown,
            // RFC 8470 section 5.2 and RFC 6585 section 4: the server did not start.
            425 | 429 => ResponseMeaning::NotTaken,
            // An interim status or an upgrade is not a final response.
            ..=199 => ResponseMeaning::Unknown,
            // RFC 9110 section 15.6.2: the server does not know the method.
            501 => ResponseMeaning::Responded { settles: is_replay },
            408 | 500.. => ResponseMeaning::Unknown,
            // RFC 9110 sections 15.4.8 and 15.4.9: the client must send the same request to another
            // target. A 302 can also point to the result.
            307 | 308 => ResponseMeaning::Responded { settles: is_replay },
            // Any other 4xx may come from a component that never read the record of the key, such
            // as a gateway or a size limit.
            200..=399 | 402 | 409 | 410 | 412 | 422 => ResponseMeaning::Responded { settles: true },
            _ => ResponseMeaning::Responded { settles: is_replay },
        }
    }
}

/// Returns the boolean in a header field. Returns `None` if the field is missing or holds another
/// value.
fn boolean(headers: &HeaderMap, name: Option<&HeaderName>) -> Option<bool> {
    let value = headers.get(name?)?.as_bytes();
    // RFC 9651 writes booleans as `?1` and `?0`.
    let is = |words: [&[u8]; 2]| words.iter().any(|word| value.eq_ignore_ascii_case(word));
    match (is([b"true", b"?1"]), is([b"false", b"?0"])) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    }
}

impl Default for ProviderProfile {
    /// Returns [`ProviderProfile::draft`].
    fn default() -> Self {
        Self::draft()
    }
}
