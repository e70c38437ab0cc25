//! How a server takes idempotency keys, and what its answers mean.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, RETRY_AFTER};
use http::StatusCode;

use crate::http::IDEMPOTENCY_KEY;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

type InFlightFn = Arc<dyn Fn(&HeaderMap) -> bool + Send + Sync>;

/// How a server takes idempotency keys, and what its answers mean to whoever thinks of asking again.
///
/// The presets hold what the providers publish; where one publishes nothing, the default of [`Profile::draft`] stands and the preset
/// says so. Every part can be changed.
///
/// ```
/// use std::time::Duration;
/// use http::HeaderName;
/// use tower_idempotency::client::Profile;
///
/// let bank = Profile::draft()
///     .with_header(HeaderName::from_static("x-request-id"))
///     .with_quotes(false)
///     .with_max_len(40)
///     .with_retention(Duration::from_secs(3600));
/// # drop(bank);
/// ```
#[derive(Clone)]
pub struct Profile {
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

/// Whether to send a request again, if it has a key or is idempotent by its method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no third")]
pub enum Advice {
    /// No: this is the answer.
    Final,
    /// Yes, later.
    Repeat,
}

/// The meaning of an answer for the effect of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "whoever asks must handle every case")]
pub enum Meaning {
    /// The server dealt with the request; the effect is as the answer says.
    Answered {
        /// Whether that holds for earlier attempts under the key as well, whose answers were lost. A gatekeeper that stands in
        /// front of the key's records cannot know: of a 401, 403 or 413, say, this is false.
        settles: bool,
    },
    /// The server says that it did not begin.
    NotTaken,
    /// Whether it took effect is not known.
    Unknown,
}

impl Profile {
    /// draft-ietf-httpapi-idempotency-key-header-07, as [`IdempotencyLayer`](crate::IdempotencyLayer) serves it: `Idempotency-Key`,
    /// a structured-field string in quotes, up to 255 bytes; replays marked by `Idempotent-Replayed`; a 409 with `Retry-After` is in
    /// flight. Asked again after 408, 425, 429, 500, 502, 503 and 504. The draft leaves the retention to the server; 24 hours
    /// here.
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
            in_flight: Arc::new(|headers| headers.contains_key(RETRY_AFTER)),
            repeated: [408, 425, 429, 500, 502, 503, 504]
                .into_iter()
                .filter_map(|status| StatusCode::from_u16(status).ok())
                .collect(),
        }
    }

    /// Stripe: `Idempotency-Key` as it is, up to 255 bytes, kept for at least 24 hours; `Stripe-Should-Retry` decides where it is
    /// sent, every 409 is in flight. Answers of 500 are replayed, and mean "indeterminate".
    #[must_use]
    pub fn stripe() -> Self {
        Self {
            should_repeat: Some(HeaderName::from_static("stripe-should-retry")),
            in_flight: Arc::new(|_| true),
            ..Self::draft().with_quotes(false)
        }
    }

    /// Adyen: `Idempotency-Key` as it is, up to 64 bytes, kept for at least 7 days; `transient-error` decides where it is sent.
    #[must_use]
    pub fn adyen() -> Self {
        Self {
            should_repeat: Some(HeaderName::from_static("transient-error")),
            retention: DAY * 7,
            ..Self::draft().with_quotes(false).with_max_len(64)
        }
    }

    /// PayPal: `PayPal-Request-Id` as it is, up to 108 bytes (older endpoints take 38), kept for 6 hours or more, by endpoint.
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

    /// Checkout.com: `Cko-Idempotency-Key` as it is, kept for 24 hours. Its greatest length is not known to us: 255 here.
    #[must_use]
    pub fn checkout() -> Self {
        Self {
            replayed: None,
            ..Self::draft()
                .with_header(HeaderName::from_static("cko-idempotency-key"))
                .with_quotes(false)
        }
    }

    /// OASIS Repeatable Requests 1.0: `Repeatability-Request-ID` as it is and `Repeatability-First-Sent`, the date of
    /// the first attempt, unchanged in every later one, also after a crash. If the layer did not make the key at
    /// random, set the date by [`KeyOrigin::with_first_sent`](super::KeyOrigin::with_first_sent) or as a header field;
    /// without a date, the layer does not send the request. The specification leaves the retention to the server; this
    /// profile assumes 24 hours.
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

    /// The header field that carries the key.
    #[must_use]
    pub fn with_header(mut self, header: HeaderName) -> Self {
        self.header = header;
        self
    }

    /// Whether the key is sent as a structured-field string in quotes (RFC 9651 section 3.3.3) or as it is.
    #[must_use]
    pub const fn with_quotes(mut self, quoted: bool) -> Self {
        self.quoted = quoted;
        self
    }

    /// The greatest length of a key in bytes, without quotes. A longer one is an error, and nothing is sent.
    #[must_use]
    pub const fn with_max_len(mut self, bytes: usize) -> Self {
        self.max_len = bytes;
        self
    }

    /// For how long the server knows a key. Nothing is repeated beyond nine tenths of it.
    #[must_use]
    pub const fn with_retention(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// The header field that marks an answer as replayed, by the value `true`; `None`: the server does not say.
    #[must_use]
    pub fn with_replay_marker(mut self, header: Option<HeaderName>) -> Self {
        self.replayed = header;
        self
    }

    /// Sets the header field in which the server says whether to send the request again, by `true` or `false`. It wins over
    /// the status and over the replay marker. Without such a field, or with any other value, the status decides.
    #[must_use]
    pub fn with_repeat_marker(mut self, header: Option<HeaderName>) -> Self {
        self.should_repeat = header;
        self
    }

    /// How a 409 is recognised as "the first request is still in flight", by its headers. Any other 409 is final.
    #[must_use]
    pub fn with_in_flight(mut self, is_in_flight: impl Fn(&HeaderMap) -> bool + Send + Sync + 'static) -> Self {
        self.in_flight = Arc::new(is_in_flight);
        self
    }

    /// The statuses after which a request is sent again, instead of 408, 425, 429, 500, 502, 503 and 504.
    #[must_use]
    pub fn with_repeated(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.repeated = statuses.into_iter().collect();
        self
    }

    /// Whether an answer repeats that of an earlier attempt, as far as the server says.
    #[must_use]
    pub fn is_replay(&self, headers: &HeaderMap) -> bool {
        says(headers, self.replayed.as_ref()) == Some(true)
    }

    fn is_in_flight(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        status == StatusCode::CONFLICT && (self.in_flight)(headers)
    }

    /// Whether to ask again after an answer.
    #[must_use]
    pub fn advice(&self, status: StatusCode, headers: &HeaderMap) -> Advice {
        let says = says(headers, self.should_repeat.as_ref());
        let is_repeated = || {
            // The server would replay a stored response again and again.
            !self.is_replay(headers) && (self.is_in_flight(status, headers) || self.repeated.contains(&status))
        };
        if says.unwrap_or_else(is_repeated) {
            Advice::Repeat
        } else {
            Advice::Final
        }
    }

    /// Returns the meaning of an answer for the effect of its request. A 5xx says nothing, except for 501; nor does a 1xx,
    /// a 408, or a 409 in flight.
    #[must_use]
    pub fn meaning(&self, status: StatusCode, headers: &HeaderMap) -> Meaning {
        let is_replay = self.is_replay(headers);
        match status.as_u16() {
            409 if self.is_in_flight(status, headers) => Meaning::Unknown,
            // RFC 8470 section 5.2 and RFC 6585 section 4: the server did not begin.
            425 | 429 => Meaning::NotTaken,
            // An interim status or an upgrade is not a final response.
            ..=199 => Meaning::Unknown,
            // RFC 9110 section 15.6.2: the server knows no such method.
            501 => Meaning::Answered { settles: is_replay },
            408 | 500.. => Meaning::Unknown,
            // RFC 9110 sections 15.4.8 and 15.4.9: the same request is to be made elsewhere. A 302 may as well point to what was made.
            307 | 308 => Meaning::Answered { settles: is_replay },
            // A 4xx may come from somebody who never saw the key's records: a gateway, an expired login, a bound on sizes.
            200..=399 | 402 | 409 | 410 | 412 | 422 => Meaning::Answered { settles: true },
            _ => Meaning::Answered { settles: is_replay },
        }
    }
}

/// The word of a header field, if it is there and is one.
fn says(headers: &HeaderMap, name: Option<&HeaderName>) -> Option<bool> {
    let value = headers.get(name?)?.as_bytes();
    // `?1` is a boolean of RFC 9651.
    let is = |words: [&[u8]; 2]| words.iter().any(|word| value.eq_ignore_ascii_case(word));
    match (is([b"true", b"?1"]), is([b"false", b"?0"])) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    }
}

impl Default for Profile {
    /// [`Profile::draft`].
    fn default() -> Self {
        Self::draft()
    }
}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Profile")
            .field("header", &self.header)
            .field("quoted", &self.quoted)
            .field("max_len", &self.max_len)
            .field("retention", &self.retention)
            .field("repeated", &self.repeated)
            .finish_non_exhaustive()
    }
}
