//! What lies in the topics, and how far the group has come.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaResult;
use rdkafka::{Message, Offset, TopicPartitionList};

use crate::{Settings, DEAD, ORDERS, PARTITIONS, RETRY};

const PATIENCE: Duration = Duration::from_secs(10);

/// Looks at the topics and at the offsets of a group, without being in it.
#[derive(Debug)]
pub struct Overview<'s> {
    settings: &'s Settings,
}

impl<'s> Overview<'s> {
    #[must_use]
    pub const fn new(settings: &'s Settings) -> Self {
        Self { settings }
    }

    /// The offset that the group has committed in each partition of a topic, and the end of that partition.
    ///
    /// # Errors
    ///
    /// As `librdkafka` has them.
    pub fn offsets(&self, topic: &str) -> KafkaResult<Vec<(i64, i64)>> {
        let consumer: BaseConsumer = self.settings.client(topic).create()?;
        let mut asked = TopicPartitionList::new();
        asked.add_partition_range(topic, 0, PARTITIONS - 1);
        let committed = consumer.committed_offsets(asked, PATIENCE)?;
        let mut offsets = Vec::new();
        for element in committed.elements() {
            let (_, end) = consumer.fetch_watermarks(topic, element.partition(), PATIENCE)?;
            let at = match element.offset() {
                Offset::Offset(at) => at,
                _ => 0,
            };
            offsets.push((at, end));
        }
        Ok(offsets)
    }

    /// Whether all that was sent is settled, and that is committed. What moves on to be tried again does so before its offset is stored:
    /// the orders are looked at first.
    ///
    /// # Errors
    ///
    /// As `librdkafka` has them.
    pub fn is_done(&self) -> KafkaResult<bool> {
        for topic in [ORDERS, RETRY] {
            if self.offsets(topic)?.iter().any(|(at, end)| at < end) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits for that.
    ///
    /// # Errors
    ///
    /// As `librdkafka` has them.
    ///
    /// # Panics
    ///
    /// If it does not come within two minutes.
    pub async fn until_done(&self) -> KafkaResult<()> {
        for _ in 0..600 {
            if self.is_done()? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!(
            "the group does not come to an end: {:?} {:?}",
            self.offsets(ORDERS),
            self.offsets(RETRY)
        );
    }

    /// The names of the dead letters.
    ///
    /// # Errors
    ///
    /// As `librdkafka` has them.
    pub fn dead(&self) -> KafkaResult<Vec<String>> {
        let mut left = 0;
        let mut all = TopicPartitionList::new();
        let consumer: BaseConsumer = self.settings.client(DEAD).create()?;
        for partition in 0..PARTITIONS {
            let (_, end) = consumer.fetch_watermarks(DEAD, partition, PATIENCE)?;
            left += end;
            all.add_partition_offset(DEAD, partition, Offset::Beginning)?;
        }
        consumer.assign(&all)?;
        let mut names = Vec::new();
        while left > 0 {
            let message = consumer.poll(PATIENCE).expect("what is there comes")?;
            names.push(String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned());
            left -= 1;
        }
        Ok(names)
    }
}
