//! Messages in a process of the application: the outbox that its handlers use, a relay that
//! publishes the messages, and consumers with an inbox each.

use std::time::Duration;

use bytes::Bytes;
use sqlx::PgPool;
use tower_idempotency::PostgresStore;
use tower_idempotency::outbox::{Outbox, OutboxMessage};
use tower_idempotency::receiver::{Inbox, Receipt};

use crate::app::{AnyError, BankClient, LEASE, pause};
use crate::broker::{CONSUMERS, key_of};

/// The longest time for an operation of the relay and for a delivery. A connection may have died.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The number of deliveries that a consumer handles at the same time in one process.
const AT_ONCE: usize = 2;

/// Starts a relay and the consumers, and returns the outbox.
pub(crate) async fn start(url: &str, bank: &BankClient) -> Outbox {
    let pool = PgPool::connect_lazy(url).unwrap();
    let outbox = Outbox::new(pool.clone()).with_timeout(TIMEOUT);
    while outbox.migrate().await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let publisher = bank.clone();
    let relay = outbox
        .relay(move |message| publish(publisher.clone(), message))
        .with_batch(8)
        .with_interval(Duration::from_millis(100))
        .with_lease(LEASE)
        .with_initial_backoff(Duration::from_millis(50))
        .with_max_backoff(Duration::from_millis(500));
    tokio::spawn(relay.run());
    let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
    for consumer in CONSUMERS {
        for _ in 0..AT_ONCE {
            let inbox = Inbox::new(store.clone(), consumer);
            tokio::spawn(consume(consumer, inbox, pool.clone(), bank.clone()));
        }
    }
    outbox
}

async fn publish(bank: BankClient, message: OutboxMessage) -> Result<(), &'static str> {
    let path = format!("publish/{}", message.id());
    let reply = bank.send(&path, message.payload().clone()).await;
    let is_accepted = reply.is_some_and(|(status, _)| status.is_success());
    is_accepted.then_some(()).ok_or("the broker has not accepted it")
}

async fn consume(consumer: &'static str, inbox: Inbox, pool: PgPool, bank: BankClient) {
    loop {
        let Some((_, reply)) = bank.send(&format!("next/{consumer}"), Bytes::new()).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let parts: Vec<&str> = reply.splitn(3, ' ').collect();
        let [delivery, id, payload] = parts[..] else {
            continue;
        };
        let handled = tokio::time::timeout(TIMEOUT, handle(consumer, &inbox, &pool, id, payload)).await;
        if matches!(handled, Ok(Ok(receipt)) if receipt.is_handled()) {
            drop(bank.send(&format!("acknowledge/{delivery}"), Bytes::new()).await);
        }
    }
}

/// Records the message and inserts a row, in one transaction.
async fn handle(
    consumer: &str,
    inbox: &Inbox,
    pool: &PgPool,
    id: &str,
    payload: &str,
) -> Result<Receipt<()>, AnyError> {
    let mut transaction = pool.begin().await?;
    let receipt = inbox.receive(&mut transaction, id).await?;
    if receipt == Receipt::First(()) {
        sqlx::query("INSERT INTO handled (consumer, key, message) VALUES ($1, $2, $3)")
            .bind(consumer)
            .bind(i64::try_from(key_of(payload))?)
            .bind(id)
            .execute(&mut *transaction)
            .await?;
        pause().await;
        transaction.commit().await?;
    }
    Ok(receipt)
}
