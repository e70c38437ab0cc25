//! An event from the broker, as its handler sees it.

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use tower_idempotency::receiver::ids::{self, CloudEvents};
use tower_idempotency::receiver::{MessageId, MessageLease};

/// An event.
#[derive(Clone, Debug)]
pub struct Event {
    /// The id, which the producer chose once and sends with every copy.
    pub id: MessageId,
    /// The content of the event.
    pub payload: Bytes,
    /// The lease of the current attempt. The receiver puts it here.
    pub lease: Option<MessageLease>,
}

impl Event {
    /// Creates the event of a message.
    pub fn of(message: &jetstream::Message) -> Self {
        Self {
            id: message.headers.as_ref().map_or_else(MessageId::missing, id),
            payload: message.payload.clone(),
            lease: None,
        }
    }
}

/// Returns the id of a CloudEvent in binary mode. Every other message has the id of NATS.
fn id(headers: &HeaderMap) -> MessageId {
    let header = |name: &str| Some(headers.get(name)?.as_str());
    let event = ids::cloud_event_in(CloudEvents::Nats, header);
    if event.is_missing() {
        return ids::nats(header(NATS_MESSAGE_ID.as_ref()));
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&'static str, &str)]) -> MessageId {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        id(&map)
    }

    #[test]
    fn source_and_id_of_a_cloud_event_are_one() {
        let event = [("ce-source", "/shop"), ("ce-id", "7"), ("Nats-Msg-Id", "8")];
        assert_eq!(of(&event), ids::cloud_event("/shop", "7"));
        assert_eq!(of(&event[1..]), ids::nats(Some("8")));
        assert!(of(&event[..1]).is_missing() && of(&[]).is_missing());
        assert_ne!(of(&event), of(&[("ce-source", "/other"), ("ce-id", "7")]));
    }
}
