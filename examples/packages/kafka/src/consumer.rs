//! A process with two consumers: one for new orders, and one for orders to retry.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use harness::{Ledger, unless_unprotected, up_to, word};
use rdkafka::ClientConfig;
use rdkafka::consumer::{Consumer, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::RDKafkaErrorCode;
use tower::{Layer, Service, ServiceExt};
use tower_idempotency::RedisStore;
use tower_idempotency::receiver::{Disposition, ReceiveError, Receiver, ReceiverLayer};

use crate::{DEAD, Delivery, ORDERS, Place, RETRY, producer};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The number of messages that a consumer handles at the same time.
const CONCURRENCY: usize = 8;

/// The number of failures after which a message is a dead letter.
const FAILURES: u32 = 3;

/// The settings of a process with consumers.
#[derive(Clone, Debug)]
pub struct Settings {
    pub servers: String,
    /// The name of the group, which is also the name of the receiver.
    pub group: String,
    /// The URL of the Redis with the records.
    pub store: String,
    /// The path of the ledger of effects.
    pub effects: PathBuf,
    /// The path of the ledger of deliveries and their results.
    pub deliveries: PathBuf,
    /// The interval between commits of offsets.
    pub commit_every: Duration,
    /// The lease: how long a message stays in flight after its consumer died.
    pub lease: Duration,
}

impl Settings {
    /// Returns a command that runs this program as a consumer.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(["consume", &self.servers, &self.group, &self.store])
            .args([&self.effects, &self.deliveries])
            .arg(self.commit_every.as_millis().to_string())
            .arg(self.lease.as_millis().to_string());
        command
    }

    /// Parses the arguments that [`command`](Self::command) passes, without the first one.
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let mut next = || arguments.next();
        Some(Self {
            servers: next()?,
            group: next()?,
            store: next()?,
            effects: next()?.into(),
            deliveries: next()?.into(),
            commit_every: Duration::from_millis(next()?.parse().ok()?),
            lease: Duration::from_millis(next()?.parse().ok()?),
        })
    }

    pub(crate) fn client(&self, topic: &str) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.servers)
            .set("group.id", format!("{}.{topic}", self.group))
            .set("auto.offset.reset", "earliest")
            // The client commits the offsets that were stored. The consumer stores an offset only
            // after it has settled the message.
            .set("enable.auto.offset.store", "false")
            .set("enable.auto.commit", "true")
            .set("auto.commit.interval.ms", self.commit_every.as_millis().to_string())
            .set("session.timeout.ms", "1500")
            .set("heartbeat.interval.ms", "300");
        config
    }
}

/// Consumes until an error occurs.
///
/// # Errors
///
/// Fails if `librdkafka` or the store reports an error.
pub async fn consume(settings: Settings) -> Result<(), Error> {
    let store = RedisStore::connect(&settings.store).await?;
    let handler = Handler {
        effects: Ledger::open(&settings.effects),
    };
    let layer = ReceiverLayer::new(store, settings.group.as_str())
        .with_id(Delivery::message_id)
        .with_lease(settings.lease);
    let worker = Worker {
        receiver: unless_unprotected(layer).layer(handler),
        producer: producer(&settings.servers)?,
        deliveries: Ledger::open(&settings.deliveries),
    };
    tokio::try_join!(worker.run(&settings, ORDERS), worker.run(&settings, RETRY))?;
    Ok(())
}

#[derive(Clone)]
struct Worker {
    receiver: Receiver<Handler, RedisStore, Delivery>,
    producer: FutureProducer,
    deliveries: Ledger,
}

impl Worker {
    async fn run(&self, settings: &Settings, topic: &str) -> Result<(), Error> {
        let consumer: StreamConsumer = settings.client(topic).create()?;
        consumer.subscribe(&[topic])?;
        // `buffered` keeps the order of the offsets. So when the consumer stores an offset, all
        // earlier messages are settled, too.
        let mut settled = consumer
            .stream()
            .map(|message| self.settle(message.map(|message| message.detach().into())))
            .buffered(CONCURRENCY);
        while let Some(delivery) = settled.next().await {
            let Place { partition, offset, .. } = delivery?.place;
            match consumer.store_offset(topic, partition, offset) {
                // The group has moved the partition to another consumer, which gets the message
                // again.
                Err(KafkaError::StoreOffset(RDKafkaErrorCode::State)) => {}
                stored => stored?,
            }
        }
        Ok(())
    }

    /// Handles a message. When this returns, the message is handled, or it is in another topic.
    async fn settle(&self, delivery: KafkaResult<Delivery>) -> Result<Delivery, Error> {
        let delivery = delivery?;
        self.deliveries.append(format_args!("came {}", delivery.place));
        tokio::time::sleep(delivery.wait).await;
        let received = loop {
            let received = self.receiver.clone().oneshot(delivery.clone()).await;
            match received {
                // Every other message would fail in the same way, so let the partition wait.
                Err(ReceiveError::Store(_)) => tokio::time::sleep(Duration::from_secs(1)).await,
                received => break received,
            }
        };
        let word = word(&received);
        self.deliveries.append(format_args!("{word} {}", delivery.name));
        let failures = delivery.failures;
        match Disposition::of(&received) {
            Disposition::Acknowledge => {}
            Disposition::Redeliver(Some(after)) => self.move_to(RETRY, &delivery, failures, after, word).await?,
            Disposition::Redeliver(None) if failures + 1 < FAILURES => {
                let pause = Duration::from_millis(100) * 2_u32.pow(failures);
                self.move_to(RETRY, &delivery, failures + 1, pause, word).await?;
            }
            Disposition::Redeliver(None) | Disposition::Reject => {
                self.move_to(DEAD, &delivery, failures + 1, Duration::ZERO, word)
                    .await?;
            }
        }
        Ok(delivery)
    }

    /// Copies a message to another topic, and returns when the brokers have stored it. If this
    /// process dies before the commit of the offset, the next consumer makes another copy.
    async fn move_to(
        &self,
        topic: &str,
        delivery: &Delivery,
        failures: u32,
        wait: Duration,
        reason: &str,
    ) -> KafkaResult<()> {
        let record = FutureRecord::<(), _>::to(topic)
            .payload(&delivery.name)
            .headers(delivery.headers(failures, wait, reason));
        let sent = self.producer.send(record, Duration::from_secs(10)).await;
        sent.map_err(|(error, _)| error)?;
        Ok(())
    }
}

/// The handler: waits up to 10 ms, has its effect, and waits up to 5 ms. A message `poison` always
/// fails, and a message `slow` takes 3 s longer.
#[derive(Clone)]
struct Handler {
    effects: Ledger,
}

impl Service<Delivery> for Handler {
    type Response = ();
    type Error = String;
    type Future = BoxFuture<'static, Result<(), String>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), String>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, delivery: Delivery) -> Self::Future {
        let effects = self.effects.clone();
        async move {
            if delivery.name.starts_with("poison") {
                return Err(format!("{} cannot be handled", delivery.name));
            }
            if delivery.name.starts_with("slow") {
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
            tokio::time::sleep(up_to(10)).await;
            effects.append(&delivery.name);
            tokio::time::sleep(up_to(5)).await;
            Ok(())
        }
        .boxed()
    }
}
