//! Orders from a Redis Stream, each of which is handled once.
//!
//! A consumer group remembers who has which entry, and nothing more: whoever crashes keeps his, until another consumer claims what
//! nobody has given a sign of for a while (XAUTOCLAIM). Producers send again when they do not know whether an entry was added. The id
//! of an order is a field of its entry, which is the same in all copies; the id of the *entry* is another for each.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use redis::aio::MultiplexedConnection;
use redis::streams::{
    StreamAutoClaimOptions, StreamAutoClaimReply, StreamId, StreamPendingCountReply, StreamRangeReply,
    StreamReadOptions, StreamReadReply,
};
use redis::{AsyncCommands, AsyncConnectionConfig};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::{Service, ServiceExt};
use tower_idempotency::receiver::{Disposition, MessageId, MessageLease, Receipt, ReceiveError};

/// Whatever can go wrong outside of a message.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

const ORDERS: &str = "orders";
const DEAD: &str = "orders:dead";
const GROUP: &str = "orders";

/// An order, as its handler sees it.
#[derive(Clone, Debug)]
pub struct Order {
    /// What its producer chose once, and sends with every copy.
    pub id: MessageId,
    /// What it says.
    pub payload: String,
    /// The attempt under which it is handled; the receiver puts it here.
    pub lease: Option<MessageLease>,
}

/// An entry of the stream that was given to a consumer.
#[derive(Clone, Debug)]
pub struct Delivery {
    entry: StreamId,
    /// The number of this delivery, from 1.
    pub number: usize,
}

impl Delivery {
    fn order(&self) -> Order {
        Order {
            id: MessageId::from(self.entry.get::<String>("id")),
            payload: self.entry.get("order").unwrap_or_default(),
            lease: None,
        }
    }
}

/// How orders are delivered.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// After how long without a sign of life an entry is given to another consumer. What is to come again comes again then: a group
    /// knows no other pause.
    pub idle: Duration,
    /// After how many deliveries an order is dead. Those count in which another consumer was found at work.
    pub max_deliver: usize,
    /// How many orders are handled at once, by a consumer.
    pub concurrency: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(30),
            max_deliver: 20,
            concurrency: 16,
        }
    }
}

/// A consumer of the group.
#[derive(Clone)]
pub struct Broker {
    name: String,
    settings: Settings,
    /// For what waits: it would keep all that comes behind it on its connection waiting, too.
    reading: MultiplexedConnection,
    connection: MultiplexedConnection,
}

impl Broker {
    /// Connects, and makes the group where it is missing. Every consumer needs a name of its own.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached, or refuses.
    pub async fn connect(url: &str, name: impl Into<String>, settings: Settings) -> Result<Self, Error> {
        let client = redis::Client::open(url)?;
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(5)));
        let reading = client.get_multiplexed_async_connection_with_config(&config).await?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let made: redis::RedisResult<()> = connection.xgroup_create_mkstream(ORDERS, GROUP, "0").await;
        match made {
            Err(error) if error.code() != Some("BUSYGROUP") => return Err(error.into()),
            _ => {}
        }
        Ok(Self {
            name: name.into(),
            settings,
            reading,
            connection,
        })
    }

    /// Adds an order.
    ///
    /// # Errors
    ///
    /// When it is not known whether it was added. It may be there all the same: add it again with the same id.
    pub async fn publish(&self, id: Option<&str>, payload: &str) -> Result<(), Error> {
        let mut fields = vec![("order", payload)];
        fields.extend(id.map(|id| ("id", id)));
        let _: String = self.connection.clone().xadd(ORDERS, "*", &fields).await?;
        Ok(())
    }

    /// Handles orders until Redis fails. What to tell it about each, `decide` says; nothing, where it gives `None`.
    ///
    /// # Errors
    ///
    /// When Redis fails.
    pub async fn consume<S, T, E>(
        &self,
        receiver: S,
        decide: impl Fn(&Delivery, Result<Receipt<T>, ReceiveError<E>>) -> Option<Disposition> + Clone + Send + 'static,
    ) -> Result<(), Error>
    where
        S: Service<Order, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + 'static,
        S::Future: Send,
        T: Send,
        E: Send,
    {
        let free = Arc::new(Semaphore::new(self.settings.concurrency));
        let mut handling = JoinSet::new();
        let mut lost_are_due = tokio::time::interval(self.settings.idle / 2);
        loop {
            let permit = Arc::clone(&free).acquire_owned().await?;
            let room = free.available_permits() + 1;
            drop(permit);
            while handling.try_join_next().is_some() {}
            let deliveries = match lost_are_due.tick().now_or_never() {
                Some(_) => self.claim_lost(room).await?,
                None => self.read(room).await?,
            };
            for delivery in deliveries {
                let permit = Arc::clone(&free).acquire_owned().await?;
                let (broker, receiver, decide) = (self.clone(), receiver.clone(), decide.clone());
                handling.spawn(async move {
                    broker.deliver(delivery, receiver, decide).await;
                    drop(permit);
                });
            }
        }
    }

    /// Entries that nobody has had.
    async fn read(&self, count: usize) -> Result<Vec<Delivery>, Error> {
        let options = StreamReadOptions::default()
            .group(GROUP, &self.name)
            .count(count)
            .block(100);
        let read: Option<StreamReadReply> = self.reading.clone().xread_options(&[ORDERS], &[">"], &options).await?;
        let entries = read.into_iter().flat_map(|read| read.keys).flat_map(|key| key.ids);
        Ok(entries.map(|entry| Delivery { entry, number: 1 }).collect())
    }

    /// Entries of consumers that give no sign of life; those that were delivered too often are dead.
    async fn claim_lost(&self, count: usize) -> Result<Vec<Delivery>, Error> {
        let mut connection = self.connection.clone();
        let (idle, options) = (
            millis(self.settings.idle),
            StreamAutoClaimOptions::default().count(count),
        );
        let claimed = connection.xautoclaim_options(ORDERS, GROUP, &self.name, idle, "0-0", options);
        let StreamAutoClaimReply { claimed, .. } = claimed.await?;
        let mut deliveries = Vec::new();
        for entry in claimed {
            let pending: StreamPendingCountReply = connection
                .xpending_count(ORDERS, GROUP, &entry.id, &entry.id, 1)
                .await?;
            let number = pending.ids.first().map_or(1, |pending| pending.times_delivered);
            let delivery = Delivery { entry, number };
            if number > self.settings.max_deliver {
                self.settle(&delivery, Disposition::Reject).await?;
            } else {
                deliveries.push(delivery);
            }
        }
        Ok(deliveries)
    }

    async fn deliver<S, T, E>(
        &self,
        delivery: Delivery,
        receiver: S,
        decide: impl Fn(&Delivery, Result<Receipt<T>, ReceiveError<E>>) -> Option<Disposition>,
    ) where
        S: Service<Order, Response = Receipt<T>, Error = ReceiveError<E>>,
    {
        let received = self.reporting(&delivery, receiver.oneshot(delivery.order())).await;
        if let Some(disposition) = decide(&delivery, received) {
            if let Err(error) = self.settle(&delivery, disposition).await {
                eprintln!("Redis was not told about an order, and somebody will claim it: {error}");
            }
        }
    }

    /// Gives a sign of life, well before somebody else claims the entry.
    async fn reporting<F: Future>(&self, delivery: &Delivery, handling: F) -> F::Output {
        let mut handling = pin!(handling);
        loop {
            let pause = self.settings.idle / 3;
            match tokio::time::timeout(pause, &mut handling).await {
                Ok(handled) => return handled,
                Err(_) => drop(self.keep(&delivery.entry.id).await),
            }
        }
    }

    /// Claims an entry that is ours already, which is no delivery: JUSTID.
    async fn keep(&self, entry: &str) -> redis::RedisResult<()> {
        let mut claim = redis::cmd("XCLAIM");
        claim.arg(ORDERS).arg(GROUP).arg(&self.name);
        // Somebody else who has just claimed it keeps it.
        claim.arg(millis(self.settings.idle / 4)).arg(entry).arg("JUSTID");
        claim.exec_async(&mut self.connection.clone()).await
    }

    async fn settle(&self, delivery: &Delivery, disposition: Disposition) -> Result<(), Error> {
        let entry = &delivery.entry;
        let mut transaction = redis::pipe();
        transaction.atomic();
        match disposition {
            // It stays where it is, until it has been idle for long enough.
            Disposition::Redeliver(_) => return Ok(()),
            Disposition::Acknowledge => {}
            Disposition::Reject => {
                let fields = entry
                    .map
                    .keys()
                    .filter_map(|name| Some((name, entry.get::<Vec<u8>>(name)?)));
                transaction.xadd(DEAD, "*", &fields.collect::<Vec<_>>()).ignore();
            }
        }
        transaction.xack(ORDERS, GROUP, &[&entry.id]).ignore();
        transaction.xdel(ORDERS, &[&entry.id]).ignore();
        transaction.exec_async(&mut self.connection.clone()).await?;
        Ok(())
    }

    /// How many orders are not settled yet.
    ///
    /// # Errors
    ///
    /// When Redis fails.
    pub async fn waiting(&self) -> Result<usize, Error> {
        Ok(self.connection.clone().xlen(ORDERS).await?)
    }

    /// What lies in the dead-letter stream.
    ///
    /// # Errors
    ///
    /// When Redis fails.
    pub async fn dead(&self) -> Result<Vec<String>, Error> {
        let dead: StreamRangeReply = self.connection.clone().xrange_all(DEAD).await?;
        Ok(dead.ids.iter().filter_map(|entry| entry.get("order")).collect())
    }
}

fn millis(time: Duration) -> usize {
    usize::try_from(time.as_millis()).unwrap_or(usize::MAX)
}
