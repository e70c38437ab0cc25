//! A consumer that handles each order from RabbitMQ once.
//!
//! When the connection of a consumer ends, RabbitMQ delivers its unacknowledged orders again. A
//! producer sends an order again if RabbitMQ did not confirm it. The id of an order is the AMQP
//! property `message-id`, which is the same in all copies. The orders are in a quorum queue with a
//! delivery limit. RabbitMQ moves an order to the dead-letter queue when the order exceeds the
//! limit or is rejected.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, BasicQosOptions,
    BasicRejectOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::task::JoinSet;
use tower::{Service, ServiceExt};
use tower_idempotency::receiver::{Disposition, MessageId, MessageLease, Receipt, ReceiveError, ids};

/// Any error that does not concern a single order.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

const ORDERS: &str = "orders";
const DEAD: &str = "orders.dead";

/// An order, as its handler sees it.
#[derive(Clone, Debug)]
pub struct Order {
    /// The id, which the producer chose once and sends with every copy.
    pub id: MessageId,
    /// The content of the order.
    pub payload: Vec<u8>,
    /// The lease of the current attempt. The receiver puts it here.
    pub lease: Option<MessageLease>,
}

impl Order {
    fn of(delivery: &Delivery) -> Self {
        let id = delivery.properties.message_id().as_ref();
        Self {
            id: ids::amqp(id.map(|id| id.as_str())),
            payload: delivery.data.clone(),
            lease: None,
        }
    }
}

/// The settings for deliveries.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The number of deliveries after which an order is a dead letter. Deliveries that find the
    /// order in flight at another consumer count, too.
    pub max_deliver: i64,
    /// The pause before a failed order is delivered again. It doubles with each delivery, up to
    /// about a thousand times. RabbitMQ has no such pause, so the consumer holds the order for this
    /// time.
    pub pause: Duration,
    /// The number of orders that a consumer has at the same time, including orders that it holds.
    pub concurrency: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_deliver: 20,
            pause: Duration::from_millis(100),
            concurrency: 16,
        }
    }
}

/// A channel to RabbitMQ.
#[derive(Clone)]
pub struct Broker {
    channel: Channel,
    settings: Settings,
    /// The last clone of the broker closes the connection.
    _connection: Arc<Connection>,
}

impl Broker {
    /// Connects, and creates the queues if they do not exist.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached, or refuses.
    pub async fn connect(url: &str, settings: Settings) -> Result<Self, Error> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let text = |text: &str| AMQPValue::LongString(text.into());
        let mut dead = FieldTable::default();
        dead.insert("x-queue-type".into(), text("quorum"));
        let mut orders = dead.clone();
        orders.insert(
            "x-delivery-limit".into(),
            AMQPValue::LongLongInt(settings.max_deliver - 1),
        );
        orders.insert("x-dead-letter-exchange".into(), text(""));
        orders.insert("x-dead-letter-routing-key".into(), text(DEAD));
        // RabbitMQ removes an order from its queue only after the dead-letter queue has stored it.
        orders.insert("x-dead-letter-strategy".into(), text("at-least-once"));
        orders.insert("x-overflow".into(), text("reject-publish"));
        for (queue, arguments) in [(DEAD, dead), (ORDERS, orders)] {
            let declared = channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments);
            declared.await?;
        }
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        channel
            .basic_qos(settings.concurrency, BasicQosOptions::default())
            .await?;
        Ok(Self {
            channel,
            settings,
            _connection: Arc::new(connection),
        })
    }

    /// Publishes an order, and waits until RabbitMQ has stored it.
    ///
    /// # Errors
    ///
    /// Fails if RabbitMQ does not confirm the order. RabbitMQ may still have stored the order, so
    /// publish it again with the same id.
    pub async fn publish(&self, id: Option<&str>, payload: &str) -> Result<(), Error> {
        const PERSISTENT: u8 = 2;
        let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let properties = match id {
            Some(id) => properties.with_message_id(id.into()),
            None => properties,
        };
        let options = BasicPublishOptions::default();
        let published = self
            .channel
            .basic_publish("".into(), ORDERS.into(), options, payload.as_bytes(), properties);
        match published.await?.await? {
            Confirmation::Ack(None) => Ok(()),
            _ => Err("RabbitMQ did not confirm the order; publish it again with the same id".into()),
        }
    }

    /// Handles orders until the connection is closed. `decide` returns the disposition of each
    /// order.
    ///
    /// # Errors
    ///
    /// Fails when RabbitMQ delivers no further orders.
    pub async fn consume<S, T, E>(
        &self,
        receiver: S,
        decide: impl Fn(&Delivery, Result<Receipt<T>, ReceiveError<E>>) -> Disposition + Clone + Send + 'static,
    ) -> Result<(), Error>
    where
        S: Service<Order, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + 'static,
        S::Future: Send,
        T: Send,
        E: Send,
    {
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let consumer = self.channel.basic_consume(ORDERS.into(), "".into(), options, arguments);
        let mut orders = consumer.await?;
        let mut deliveries = JoinSet::new();
        while let Some(delivery) = orders.next().await {
            let delivery = delivery?;
            while deliveries.try_join_next().is_some() {}
            let (broker, receiver, decide) = (self.clone(), receiver.clone(), decide.clone());
            deliveries.spawn(async move {
                let received = receiver.oneshot(Order::of(&delivery)).await;
                let disposition = decide(&delivery, received);
                if let Err(error) = broker.settle(&delivery, disposition).await {
                    eprintln!("RabbitMQ did not get the disposition of an order, and will deliver it again: {error}");
                }
            });
        }
        Err("RabbitMQ delivers no further orders".into())
    }

    async fn settle(&self, delivery: &Delivery, disposition: Disposition) -> Result<(), Error> {
        match disposition {
            Disposition::Acknowledge => delivery.ack(BasicAckOptions::default()).await?,
            Disposition::Redeliver(pause) => {
                tokio::time::sleep(pause.unwrap_or_else(|| self.pause(deliveries(delivery)))).await;
                let options = BasicNackOptions {
                    requeue: true,
                    ..BasicNackOptions::default()
                };
                delivery.nack(options).await?
            }
            Disposition::Reject => delivery.reject(BasicRejectOptions { requeue: false }).await?,
        };
        Ok(())
    }

    fn pause(&self, deliveries: i64) -> Duration {
        let doublings = u32::try_from(deliveries).unwrap_or(0).min(10);
        self.settings.pause * 2_u32.pow(doublings)
    }

    /// Returns the number of orders that wait for their delivery.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached.
    pub async fn waiting(&self) -> Result<u32, Error> {
        let options = QueueDeclareOptions::durable().passive();
        let queue = self
            .channel
            .queue_declare(ORDERS.into(), options, FieldTable::default())
            .await?;
        Ok(queue.message_count())
    }

    /// Removes all orders from the dead-letter queue, and returns their payloads.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached.
    pub async fn take_dead(&self) -> Result<Vec<Vec<u8>>, Error> {
        let mut dead = Vec::new();
        while let Some(message) = self.channel.basic_get(DEAD.into(), BasicGetOptions::default()).await? {
            message.delivery.ack(BasicAckOptions::default()).await?;
            dead.push(message.delivery.data);
        }
        Ok(dead)
    }
}

/// Returns how often RabbitMQ delivered a message before this delivery.
pub fn deliveries(delivery: &Delivery) -> i64 {
    let headers = delivery.properties.headers().as_ref();
    let count = headers.and_then(|headers| headers.inner().get("x-delivery-count"));
    count.and_then(AMQPValue::as_long_long_int).unwrap_or(0)
}
