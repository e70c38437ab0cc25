//! Orders from RabbitMQ, each of which is handled once.
//!
//! RabbitMQ delivers again what a consumer had when its connection ended, and producers send again what was not confirmed. The id of
//! an order is the AMQP property `message-id`, which is the same in all copies. Its queue is a quorum queue with a limit of deliveries:
//! beyond it, and when it is rejected, an order goes to the dead-letter queue.

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
use tower_idempotency::receiver::{ids, Disposition, MessageId, MessageLease, Receipt, ReceiveError};

/// Whatever can go wrong outside of a message.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

const ORDERS: &str = "orders";
const DEAD: &str = "orders.dead";

/// An order, as its handler sees it.
#[derive(Clone, Debug)]
pub struct Order {
    /// What its producer chose once, and sends with every copy.
    pub id: MessageId,
    /// What it says.
    pub payload: Vec<u8>,
    /// The attempt under which it is handled; the receiver puts it here.
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

/// How orders are delivered.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// After how many deliveries an order is dead. Those count in which another consumer was found at work.
    pub max_deliver: i64,
    /// The pause before a failed order comes again; doubled each time, up to a thousandfold. RabbitMQ knows none, so that the
    /// consumer keeps the order meanwhile.
    pub pause: Duration,
    /// How many orders a consumer has at once, those included that it keeps.
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
    /// It ends with its last user.
    _connection: Arc<Connection>,
}

impl Broker {
    /// Connects, and makes the queues where they are missing.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached, or refuses.
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
        // An order leaves its queue when the dead-letter queue has it, and not before.
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

    /// Publishes an order, and waits until it is stored.
    ///
    /// # Errors
    ///
    /// When that is not known. It may be stored all the same: publish it again with the same id.
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
            _ => Err("RabbitMQ did not take the order".into()),
        }
    }

    /// Handles orders until the connection is closed. What to tell RabbitMQ about each, `decide` says.
    ///
    /// # Errors
    ///
    /// When the orders end.
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
                    eprintln!("RabbitMQ was not told about an order, and will deliver it again: {error}");
                }
            });
        }
        Err("there are no orders any more".into())
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

    /// How many orders wait to be delivered.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached.
    pub async fn waiting(&self) -> Result<u32, Error> {
        let options = QueueDeclareOptions::durable().passive();
        let queue = self
            .channel
            .queue_declare(ORDERS.into(), options, FieldTable::default())
            .await?;
        Ok(queue.message_count())
    }

    /// Takes everything out of the dead-letter queue.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached.
    pub async fn take_dead(&self) -> Result<Vec<Vec<u8>>, Error> {
        let mut dead = Vec::new();
        while let Some(message) = self.channel.basic_get(DEAD.into(), BasicGetOptions::default()).await? {
            message.delivery.ack(BasicAckOptions::default()).await?;
            dead.push(message.delivery.data);
        }
        Ok(dead)
    }
}

/// How often RabbitMQ has delivered a message before.
pub fn deliveries(delivery: &Delivery) -> i64 {
    let headers = delivery.properties.headers().as_ref();
    let count = headers.and_then(|headers| headers.inner().get("x-delivery-count"));
    count.and_then(AMQPValue::as_long_long_int).unwrap_or(0)
}
