//! The mock cluster of librdkafka: brokers in this process, which other processes can reach.

use std::fmt;

use rdkafka::ClientConfig;
use rdkafka::bindings::{rd_kafka_handle_mock_cluster, rd_kafka_mock_group_initial_rebalance_delay_ms};
use rdkafka::error::KafkaResult;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, DefaultProducerContext, Producer};

use crate::{DEAD, ORDERS, PARTITIONS, RETRY};

/// Two brokers with the three topics. Dropping this value ends the brokers.
pub struct Brokers {
    host: BaseProducer,
}

impl Brokers {
    /// Starts the brokers and creates the topics.
    ///
    /// # Errors
    ///
    /// Fails if `librdkafka` reports an error.
    pub fn start() -> KafkaResult<Self> {
        let host: BaseProducer = ClientConfig::new().set("test.mock.num.brokers", "2").create()?;
        let brokers = Self { host };
        for topic in [ORDERS, RETRY, DEAD] {
            brokers.cluster().create_topic(topic, PARTITIONS, 1)?;
        }
        // By default, the first member of a group waits 3 s for others. The brokers remove it from
        // the group meanwhile if its session timeout is shorter. The session timeout is short here,
        // so that the group soon notices killed members. So shorten the wait.
        //
        // SAFETY: the client is alive. Its configuration created the cluster, which lives as long
        // as the client.
        unsafe {
            let cluster = rd_kafka_handle_mock_cluster(brokers.host.client().native_ptr());
            rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 100);
        }
        Ok(brokers)
    }

    /// Returns the addresses of the brokers.
    #[must_use]
    pub fn servers(&self) -> String {
        self.cluster().bootstrap_servers()
    }

    fn cluster(&self) -> MockCluster<'_, DefaultProducerContext> {
        self.host
            .client()
            .mock_cluster()
            .expect("the client's configuration creates a mock cluster")
    }
}

impl fmt::Debug for Brokers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Brokers").finish_non_exhaustive()
    }
}
