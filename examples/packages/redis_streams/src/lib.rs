//! A consumer that handles each order from a Redis Stream once.
//!
//! A consumer group only remembers which consumer has which entry. If a consumer crashes, its
//! entries stay with it until another consumer claims the entries that have been idle for some time
//! (XAUTOCLAIM). A producer sends an order again if it does not know whether Redis added the entry.
//! The id of an order is a field of its entry, which is the same in all copies. The id of the
//! *entry* differs in each copy.

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

/// Any error that does not concern a single order.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

const ORDERS: &str = "orders";
const DEAD: &str = "orders:dead";
const GROUP: &str = "orders";

/// An order, as its handler sees it.
#[derive(Clone, Debug)]
pub struct Order {
    /// The id, which the producer chose once and sends with every copy.
    pub id: MessageId,
    /// The content of the order.
    pub payload: String,
    /// The lease of the current attempt. The receiver puts it here.
    pub lease: Option<MessageLease>,
}

/// An entry of the stream that a consumer got.
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

/// The settings for deliveries.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The time after which another consumer claims an idle entry. It is also the pause before a
    /// failed order is delivered again, because a consumer group has no other pause.
    pub idle: Duration,
    /// The number of deliveries after which an order is a dead letter. Deliveries that find the
    /// order in flight at another consumer count, too.
    pub max_deliver: usize,
    /// The number of orders that a consumer handles at the same time.
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
    /// The connection for blocking reads. On a shared connection, a blocking read would delay all
    /// later commands.
    reading: MultiplexedConnection,
    connection: MultiplexedConnection,
}

impl Broker {
    /// Connects, and creates the group if it does not exist. Every consumer needs a unique name.
    ///
    /// # Errors
    ///
    /// Fails if the server cannot be reached, or refuses.
    pub async fn connect(url: &str, name: impl Into<String>, settings: Settings) -> Result<Self, Error> {
        let client = redis::Client::open(url)?;
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(5)));
        let reading = client.get_multiplexed_async_connection_with_config(&config).await?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let created: redis::RedisResult<()> = connection.xgroup_create_mkstream(ORDERS, GROUP, "0").await;
        match created {
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

    /// Adds an order to the stream.
    ///
    /// # Errors
    ///
    /// Fails if Redis does not confirm the order. Redis may still have added the order, so add it
    /// again with the same id.
    pub async fn publish(&self, id: Option<&str>, payload: &str) -> Result<(), Error> {
        let mut fields = vec![("order", payload)];
        fields.extend(id.map(|id| ("id", id)));
        let _: String = self.connection.clone().xadd(ORDERS, "*", &fields).await?;
        Ok(())
    }

    /// Handles orders until Redis fails. `decide` returns the disposition of each order, or `None`
    /// to leave the entry as it is.
    ///
    /// # Errors
    ///
    /// Fails if Redis fails.
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

    /// Reads entries that no consumer has got yet.
    async fn read(&self, count: usize) -> Result<Vec<Delivery>, Error> {
        let options = StreamReadOptions::default()
            .group(GROUP, &self.name)
            .count(count)
            .block(100);
        let read: Option<StreamReadReply> = self.reading.clone().xread_options(&[ORDERS], &[">"], &options).await?;
        let entries = read.into_iter().flat_map(|read| read.keys).flat_map(|key| key.ids);
        Ok(entries.map(|entry| Delivery { entry, number: 1 }).collect())
    }

    /// Claims idle entries of other consumers. Moves entries that were delivered too often to the
    /// stream of dead letters.
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
        if let Some(disposition) = decide(&delivery, received)
            && let Err(error) = self.settle(&delivery, disposition).await
        {
            eprintln!("Redis did not get the disposition of an order, and another consumer will claim it: {error}");
        }
    }

    /// Runs a handler, and meanwhile resets the idle time of the entry, early enough that no other
    /// consumer claims it.
    async fn reporting<F: Future>(&self, delivery: &Delivery, handling: F) -> F::Output {
        let mut handling = pin!(handling);
        loop {
            let pause = self.settings.idle / 3;
            match tokio::time::timeout(pause, &mut handling).await {
                Ok(handled) => return handled,
                Err(_) => drop(self.reset_idle_time(&delivery.entry.id).await),
            }
        }
    }

    /// Claims an entry that this consumer has already, which resets its idle time. With `JUSTID`,
    /// Redis does not count this as a delivery.
    async fn reset_idle_time(&self, entry: &str) -> redis::RedisResult<()> {
        let mut claim = redis::cmd("XCLAIM");
        claim.arg(ORDERS).arg(GROUP).arg(&self.name);
        // The claim has no effect on an entry that another consumer has just claimed.
        claim.arg(millis(self.settings.idle / 4)).arg(entry).arg("JUSTID");
        claim.exec_async(&mut self.connection.clone()).await
    }

    async fn settle(&self, delivery: &Delivery, disposition: Disposition) -> Result<(), Error> {
        let entry = &delivery.entry;
        let mut transaction = redis::pipe();
        transaction.atomic();
        match disposition {
            // Leave the entry. A consumer claims it after it has been idle for long enough.
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

    /// Returns the number of orders that are not settled yet.
    ///
    /// # Errors
    ///
    /// Fails if Redis fails.
    pub async fn waiting(&self) -> Result<usize, Error> {
        Ok(self.connection.clone().xlen(ORDERS).await?)
    }

    /// Returns the payloads in the stream of dead letters.
    ///
    /// # Errors
    ///
    /// Fails if Redis fails.
    pub async fn dead(&self) -> Result<Vec<String>, Error> {
        let dead: StreamRangeReply = self.connection.clone().xrange_all(DEAD).await?;
        Ok(dead.ids.iter().filter_map(|entry| entry.get("order")).collect())
    }
}

fn millis(time: Duration) -> usize {
    usize::try_from(time.as_millis()).unwrap_or(usize::MAX)
}
