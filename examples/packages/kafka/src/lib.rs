//! A consumer in a group of Kafka's that handles each message once.
//!
//! * The **id** is what the producer put into the header `message-id`. Where it put none, it is the place where the message was first
//!   found, topic, partition and offset: that tells redeliveries apart from news, and not what a producer sends twice.
//! * An **offset** is stored when it is settled what becomes of its message and of all before it in the partition, and committed a little
//!   later. A consumer that dies before is sent those messages again: they are duplicates.
//! * What **fails**, or is in flight elsewhere, goes to a topic of its own and is tried again later; what cannot succeed goes to another
//!   one for dead letters. Neither blocks its partition.

mod brokers;
mod consumer;
mod delivery;
mod overview;

pub use brokers::Brokers;
pub use consumer::{consume, Settings};
pub use delivery::{Delivery, Place};
pub use overview::Overview;

use std::time::Duration;

use futures::future::try_join_all;
use rdkafka::error::KafkaResult;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::ClientConfig;

pub const ORDERS: &str = "orders";
pub const RETRY: &str = "orders.retry";
pub const DEAD: &str = "orders.dead";

pub(crate) const PARTITIONS: i32 = 4;

/// The header with the id that the producer chose.
pub const MESSAGE_ID: &str = "message-id";

/// # Errors
///
/// As `librdkafka` has them.
pub fn producer(servers: &str) -> KafkaResult<FutureProducer> {
    ClientConfig::new()
        .set("bootstrap.servers", servers)
        // A partition at random for each message, not for each batch.
        .set("sticky.partitioning.linger.ms", "0")
        .create()
}

/// An order, and the id that its producer gives it.
#[derive(Clone, Debug)]
pub struct Order {
    pub id: Option<String>,
    pub name: String,
}

impl Order {
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            id: Some(format!("id-of-{name}")),
            name,
        }
    }

    #[must_use]
    pub fn without_id(name: &str) -> Self {
        Self {
            id: None,
            name: name.to_owned(),
        }
    }
}

/// Sends them, and waits until the brokers have them.
///
/// # Errors
///
/// As `librdkafka` has them.
pub async fn send(producer: &FutureProducer, orders: &[Order]) -> KafkaResult<()> {
    let sends = orders.iter().map(|order| async {
        let headers = OwnedHeaders::new().insert(Header {
            key: "sent-by",
            value: Some("shop"),
        });
        let headers = match &order.id {
            Some(id) => headers.insert(Header {
                key: MESSAGE_ID,
                value: Some(id),
            }),
            None => headers,
        };
        // No key: copies of one message may lie in two partitions, and so be handled by two consumers at once.
        let record = FutureRecord::<(), _>::to(ORDERS).payload(&order.name).headers(headers);
        producer.send(record, Duration::from_secs(10)).await
    });
    try_join_all(sends).await.map_err(|(error, _)| error)?;
    Ok(())
}
