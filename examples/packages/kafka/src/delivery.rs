//! A message, as the brokers delivered it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rdkafka::Message;
use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use tower_idempotency::receiver::{MessageId, ids};

use crate::MESSAGE_ID;

/// The header with the place where a message was first delivered. Copies in other topics have the
/// same value.
const ORIGIN: &str = "origin";
const FAILURES: &str = "failures";
const WAIT: &str = "wait-ms";
const REASON: &str = "reason";

/// A place in a topic: `topic/partition/offset`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
}

impl Place {
    fn id(&self) -> MessageId {
        ids::kafka_offset(&self.topic, self.partition, self.offset)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/');
        let place = Self {
            topic: parts.next()?.to_owned(),
            partition: parts.next()?.parse().ok()?,
            offset: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(place)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.topic, self.partition, self.offset)
    }
}

/// A message, as the brokers delivered it.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub place: Place,
    pub name: String,
    id: Option<Vec<u8>>,
    origin: Place,
    /// The number of failures of the handler so far.
    pub failures: u32,
    /// The time to wait before the next attempt.
    pub wait: Duration,
}

impl From<OwnedMessage> for Delivery {
    fn from(message: OwnedMessage) -> Self {
        let place = Place {
            topic: message.topic().to_owned(),
            partition: message.partition(),
            offset: message.offset(),
        };
        let text = |name| header(&message, name).and_then(|value| String::from_utf8(value).ok());
        let origin = text(ORIGIN).and_then(|text| Place::parse(&text));
        Self {
            name: String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned(),
            id: header(&message, MESSAGE_ID),
            origin: origin.unwrap_or_else(|| place.clone()),
            failures: number(text(FAILURES)),
            wait: Duration::from_millis(number(text(WAIT))),
            place,
        }
    }
}

impl Delivery {
    /// Returns the id that the producer chose. Without one, it returns the place where the message
    /// was first delivered.
    #[must_use]
    pub fn message_id(&self) -> MessageId {
        match &self.id {
            Some(id) => ids::kafka(Some(id)),
            None => self.origin.id(),
        }
    }

    /// Returns the headers for a copy in another topic.
    pub(crate) fn headers(&self, failures: u32, wait: Duration, reason: &str) -> OwnedHeaders {
        let headers = OwnedHeaders::new();
        let headers = match &self.id {
            Some(id) => headers.insert(Header {
                key: MESSAGE_ID,
                value: Some(id),
            }),
            None => headers,
        };
        let wait = wait.as_millis().to_string();
        let (origin, failures) = (self.origin.to_string(), failures.to_string());
        [
            (ORIGIN, origin.as_str()),
            (FAILURES, &failures),
            (WAIT, &wait),
            (REASON, reason),
        ]
        .into_iter()
        .fold(headers, |headers, (key, value)| {
            headers.insert(Header {
                key,
                value: Some(value),
            })
        })
    }
}

fn header(message: &OwnedMessage, name: &str) -> Option<Vec<u8>> {
    let mut headers = message.headers()?.iter();
    headers.find(|header| header.key == name)?.value.map(<[u8]>::to_owned)
}

fn number<N: FromStr + Default>(text: Option<String>) -> N {
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}
