//! A message as it came.

use std::str::FromStr;
use std::time::Duration;

use rdkafka::message::{Header, Headers, OwnedHeaders, OwnedMessage};
use rdkafka::Message;
use tower_idempotency::receiver::MessageId;

use crate::MESSAGE_ID;

/// Where a message without an id was first found; kept when it is moved to another topic.
const ORIGIN: &str = "origin";
const FAILURES: &str = "failures";
const WAIT: &str = "wait-ms";
const REASON: &str = "reason";

/// A message as it came.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub name: String,
    id: Option<Vec<u8>>,
    origin: String,
    /// How often its handler has failed.
    pub failures: u32,
    /// How long it is to be left alone.
    pub wait: Duration,
}

impl From<OwnedMessage> for Delivery {
    fn from(message: OwnedMessage) -> Self {
        let (topic, partition, offset) = (message.topic(), message.partition(), message.offset());
        let text = |name| header(&message, name).and_then(|value| String::from_utf8(value).ok());
        Self {
            topic: topic.to_owned(),
            partition,
            offset,
            name: String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned(),
            id: header(&message, MESSAGE_ID),
            origin: text(ORIGIN).unwrap_or_else(|| format!("{topic}/{partition}/{offset}")),
            failures: number(text(FAILURES)),
            wait: Duration::from_millis(number(text(WAIT))),
        }
    }
}

impl Delivery {
    /// What its producer called it; else where it was first found. A producer's id never equals a place: that has two parts.
    #[must_use]
    pub fn message_id(&self) -> MessageId {
        match &self.id {
            Some(id) => MessageId::from(id.as_slice()),
            None => MessageId::of(["place", &self.origin]),
        }
    }

    #[must_use]
    pub fn place(&self) -> String {
        let Self {
            topic,
            partition,
            offset,
            ..
        } = self;
        format!("{topic}/{partition}/{offset}")
    }

    /// The headers under which it goes to another topic.
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
        let failures = failures.to_string();
        [
            (ORIGIN, self.origin.as_str()),
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
