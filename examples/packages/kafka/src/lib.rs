//! A consumer in a Kafka group that handles each message once.
//!
//! * The **id** of a message is in the header `message-id`, which the producer sets. Without this
//!   header, the id is the place where the message was first delivered: topic, partition and
//!   offset. Such an id detects redeliveries, but not a message that its producer sends twice.
//! * The consumer stores an **offset** when it has settled the message and all earlier messages of
//!   the partition. The client commits the offset a little later. If the consumer dies before, the
//!   brokers deliver these messages again, and the receiver finds that they are duplicates.
//! * The consumer copies a message that **fails**, or that is in flight elsewhere, to a topic for
//!   retries. It copies a message that cannot succeed to a topic for dead letters. So neither
//!   blocks the partition.

mod brokers;
mod consumer;
mod delivery;
mod overview;

pub use brokers::Brokers;
pub use consumer::{Settings, consume};
pub use delivery::{Delivery, Place};
pub use overview::Overview;

use std::time::Duration;

use futures::future::try_join_all;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaResult;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};

pub const ORDERS: &str = "orders";
pub const RETRY: &str = "orders.retry";
pub const DEAD: &str = "orders.dead";

pub(crate) const PARTITIONS: i32 = 4;

/// The header with the id that the producer chose.
pub const MESSAGE_ID: &str = "message-id";

/// Creates a producer for these brokers.
///
/// # Errors
///
/// Fails if `librdkafka` reports an error.
pub fn producer(servers: &str) -> KafkaResult<FutureProducer> {
    ClientConfig::new()
        .set("bootstrap.servers", servers)
        // Choose a random partition for each message, not for each batch.
        .set("sticky.partitioning.linger.ms", "0")
        .create()
}

/// An order, with the id that the producer chose.
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

/// Sends orders, and waits until the brokers have stored them.
///
/// # Errors
///
/// Fails if `librdkafka` reports an error.
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
        // The record has no key, so that two copies of a message may be in two partitions. Then two
        // consumers may get them at the same time.
        let record = FutureRecord::<(), _>::to(ORDERS).payload(&order.name).headers(headers);
        producer.send(record, Duration::from_secs(10)).await
    });
    try_join_all(sends).await.map_err(|(error, _)| error)?;
    Ok(())
}
