//! A message of the outbox.

use std::fmt;

use bytes::Bytes;
use rand::Rng;
use uuid::Builder;

use crate::clock::unix_millis;

/// A message to publish: an id that all its copies carry, a topic, headers and a payload.
#[derive(Clone, PartialEq, Eq)]
pub struct OutboxMessage {
    pub(super) id: String,
    pub(super) topic: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) payload: Bytes,
    pub(super) failures: u32,
}

impl OutboxMessage {
    /// Makes a message with a new id, a UUID of version 7 (RFC 9562). The topic must not contain a
    /// zero character.
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

    /// Sets the id, for example an id that is derived from the cause of the message
    /// ([`MessageLease::id`](crate::receiver::MessageLease::id)). The id has 1 to 255 bytes and no zero
    /// character. If two messages with one id are put into the outbox before the first one is
    /// published, the second one is ignored. Default: a new UUID.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Adds a header. Neither its name nor its content may contain a zero character.
    #[must_use]
    pub fn add_header(mut self, name: impl Into<String>, content: impl Into<String>) -> Self {
        self.headers.push((name.into(), content.into()));
        self
    }

    /// Returns the id, which is the same in all copies. Send it where the receiver looks for it: as
    /// `Nats-Msg-Id`, as `message-id` of AMQP, or as a header of Kafka.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the topic, which is the destination of the message.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Returns the headers in the order in which they were added.
    #[must_use]
    pub fn headers(&self) -> &[(String, String)] {
        &self.headers
    }

    /// Returns the payload.
    #[must_use]
    pub const fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Returns the number of earlier attempts to publish the message. An attempt counts if
    /// `publish` failed, or if the relay died.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }
}

impl fmt::Debug for OutboxMessage {
    /// Leaves out the id, the headers and the payload.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutboxMessage")
            .field("topic", &self.topic)
            .field("failures", &self.failures)
            .finish_non_exhaustive()
    }
}
