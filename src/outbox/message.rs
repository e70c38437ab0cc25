//! A message to be sent.

use std::fmt;

use bytes::Bytes;
use rand::Rng;
use uuid::Builder;

use crate::clock::unix_millis;

/// A message to be sent: an id that all its copies carry, a topic, headers and a payload.
#[derive(Clone, PartialEq, Eq)]
pub struct OutboxMessage {
    pub(super) id: String,
    pub(super) topic: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) payload: Bytes,
    pub(super) failures: u32,
}

impl OutboxMessage {
    /// A message under a new id, a UUID of version 7 (RFC 9562). The topic holds no zero character.
    #[must_use]
    pub fn new(topic: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        let mut random = [0; 10];
        rand::rng().fill_bytes(&mut random);
        let id = Builder::from_unix_timestamp_millis(unix_millis(), &random).into_uuid();
        Self {
            id: id.to_string(),
            topic: topic.into(),
            headers: Vec::new(),
            payload: payload.into(),
            failures: 0,
        }
    }

    /// Gives it an id of yours, such as one derived from what brought it about ([`MessageLease::id`](crate::receiver::MessageLease::id)): 1 to 255
    /// bytes, none of them zero. Put twice under one id, it waits once.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Adds a header, without zero characters.
    #[must_use]
    pub fn add_header(mut self, name: impl Into<String>, content: impl Into<String>) -> Self {
        self.headers.push((name.into(), content.into()));
        self
    }

    /// The same in all copies. Send it where the receiver finds it: as `Nats-Msg-Id`, as AMQP's `message-id`, as a header of Kafka's.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it is to be sent.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// The headers, in the order in which they were added.
    #[must_use]
    pub fn headers(&self) -> &[(String, String)] {
        &self.headers
    }

    /// What it says.
    #[must_use]
    pub const fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// How often it was tried before: could not be published, or was taken by a relay that died.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

impl fmt::Debug for OutboxMessage {
    /// Without id, headers and payload.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutboxMessage")
            .field("topic", &self.topic)
            .field("failures", &self.failures)
            .finish_non_exhaustive()
    }
}
