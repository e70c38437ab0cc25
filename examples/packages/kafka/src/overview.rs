//! An overview of the messages in the topics and of the offsets of the group.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::{Message, Offset, TopicPartitionList};

use crate::{DEAD, ORDERS, PARTITIONS, RETRY, Settings};

const TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the topics and the offsets of a group, without being a member of the group.
#[derive(Debug)]
pub struct Overview<'s> {
    settings: &'s Settings,
}

impl<'s> Overview<'s> {
    #[must_use]
    pub const fn new(settings: &'s Settings) -> Self {
        Self { settings }
    }

    /// Returns, for each partition of a topic, the offset that the group has committed and the end
    /// of the partition.
    ///
    /// # Errors
    ///
    /// Fails if `librdkafka` reports an error.
    pub fn offsets(&self, topic: &str) -> KafkaResult<Vec<(i64, i64)>> {
        let consumer: BaseConsumer = self.settings.client(topic).create()?;
        let mut partitions = TopicPartitionList::new();
        partitions.add_partition_range(topic, 0, PARTITIONS - 1);
        let committed = consumer.committed_offsets(partitions, TIMEOUT)?;
        let mut offsets = Vec::new();
        for element in committed.elements() {
            let (_, end) = consumer.fetch_watermarks(topic, element.partition(), TIMEOUT)?;
            let at = match element.offset() {
                Offset::Offset(at) => at,
                _ => 0,
            };
            offsets.push((at, end));
        }
        Ok(offsets)
    }

    /// Whether the group has settled all messages and committed their offsets. It reads the topic
    /// of the orders first, because a consumer copies a message to the topic for retries before it
    /// stores the offset.
    ///
    /// # Errors
    ///
    /// Fails if `librdkafka` reports an error.
    pub fn is_done(&self) -> KafkaResult<bool> {
        for topic in [ORDERS, RETRY] {
            if self.offsets(topic)?.iter().any(|(at, end)| at < end) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until [`is_done`](Self::is_done) returns true.
    ///
    /// # Errors
    ///
    /// Fails if `librdkafka` reports an error.
    ///
    /// # Panics
    ///
    /// Panics if this takes more than two minutes.
    pub async fn until_done(&self) -> KafkaResult<()> {
        for _ in 0..600 {
            if self.is_done()? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!(
            "the group did not settle all messages within two minutes: {:?} {:?}",
            self.offsets(ORDERS),
            self.offsets(RETRY)
        );
    }

    /// Returns the names of the dead letters.
    ///
    /// # Errors
    ///
    /// Fails if `librdkafka` reports an error.
    pub fn dead(&self) -> KafkaResult<Vec<String>> {
        let mut left = 0;
        let mut all = TopicPartitionList::new();
        let consumer: BaseConsumer = self.settings.client(DEAD).create()?;
        for partition in 0..PARTITIONS {
            let (_, end) = consumer.fetch_watermarks(DEAD, partition, TIMEOUT)?;
            left += end;
            all.add_partition_offset(DEAD, partition, Offset::Beginning)?;
        }
        consumer.assign(&all)?;
        let mut names = Vec::new();
        while left > 0 {
            let message = consumer
                .poll(TIMEOUT)
                .expect("the message arrives within the timeout")?;
            names.push(String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned());
            left -= 1;
        }
        Ok(names)
    }
}
