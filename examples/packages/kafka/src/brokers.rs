//! Brokers within this process, which other processes reach: librdkafka's own mock cluster.

use std::fmt;

use rdkafka::bindings::{rd_kafka_handle_mock_cluster, rd_kafka_mock_group_initial_rebalance_delay_ms};
use rdkafka::error::KafkaResult;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, DefaultProducerContext, Producer};
use rdkafka::ClientConfig;

use crate::{DEAD, ORDERS, PARTITIONS, RETRY};

/// Two brokers with the three topics. They end with this value.
pub struct Brokers {
    host: BaseProducer,
}

impl Brokers {
    /// # Errors
    ///
    /// As `librdkafka` has them.
    pub fn start() -> KafkaResult<Self> {
        let host: BaseProducer = ClientConfig::new().set("test.mock.num.brokers", "2").create()?;
        let brokers = Self { host };
        for topic in [ORDERS, RETRY, DEAD] {
            brokers.cluster().create_topic(topic, PARTITIONS, 1)?;
        }
        // By default they let the first member of a group wait for others for 3 s, and throw it out meanwhile when its session is
        // shorter; which it is here, so that members that were killed are soon missed.
        //
        // SAFETY: the client lives, and so does its cluster, which it has by its configuration.
        unsafe {
            let cluster = rd_kafka_handle_mock_cluster(brokers.host.client().native_ptr());
            rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 100);
        }
        Ok(brokers)
    }

    /// Where they listen.
    #[must_use]
    pub fn servers(&self) -> String {
        self.cluster().bootstrap_servers()
    }

    fn cluster(&self) -> MockCluster<'_, DefaultProducerContext> {
        self.host
            .client()
            .mock_cluster()
            .expect("the client was told to have one")
    }
}

impl fmt::Debug for Brokers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Brokers").finish_non_exhaustive()
    }
}
