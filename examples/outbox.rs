//! Two services that share nothing but messages. One marks an order as paid, and the other ships it
//! once, although every message is sent twice.
//!
//! ```text
//! DATABASE_URL=postgres://postgres@127.0.0.1/postgres cargo run --features postgres --example outbox
//! ```
//!
//! The payments service inserts the payment and a message about it in one transaction (the outbox).
//! A relay publishes the message. The first publication of each message arrives, but reports a
//! failure, so the relay publishes the message again. The shipping service records the message and
//! ships the order in one transaction (the inbox). The example creates its tables in a schema of
//! its own and drops the schema at the end. It ends with an error if an order was shipped twice or
//! not at all.

use std::error::Error;
use std::time::Duration;

use sqlx::PgPool;
use tower_idempotency::PostgresStore;
use tower_idempotency::outbox::{Outbox, OutboxMessage};
use tower_idempotency::receiver::{Inbox, Receipt};

const ORDERS: i64 = 20;

/// The payments service: one transaction inserts both the payment and the message, or neither.
async fn pay(pool: &PgPool, outbox: &Outbox, order: i64) -> Result<(), Box<dyn Error>> {
    let mut transaction = pool.begin().await?;
    let paid = sqlx::query("INSERT INTO outbox_example.paid (id) VALUES ($1)").bind(order);
    paid.execute(&mut *transaction).await?;
    let message = OutboxMessage::new("orders.paid", order.to_string());
    outbox.put(&mut transaction, &message).await?;
    if order % 5 == 0 {
        // Simulates a failure after both inserts. The rollback removes both.
        return Ok(transaction.rollback().await?);
    }
    Ok(transaction.commit().await?)
}

/// The shipping service: one transaction records the message and ships the order, or does neither.
async fn ship(pool: PgPool, inbox: Inbox, message: OutboxMessage) -> Result<(), Box<dyn Error + Send + Sync>> {
    let order: i64 = std::str::from_utf8(message.payload())?.parse()?;
    let mut transaction = pool.begin().await?;
    let receipt = inbox.receive(&mut transaction, message.id()).await?;
    println!("order {order}, publication {}: {receipt:?}", message.failures() + 1);
    if receipt == Receipt::First(()) {
        let shipped = sqlx::query("INSERT INTO outbox_example.shipped (id) VALUES ($1)").bind(order);
        shipped.execute(&mut *transaction).await?;
        transaction.commit().await?;
    }
    if message.failures() == 0 {
        return Err("the acknowledgement was lost".into());
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("DATABASE_URL")
        .map_err(|_| "set DATABASE_URL, for example to postgres://postgres@127.0.0.1/postgres")?;
    let pool = PgPool::connect(&url).await?;
    let tables = "DROP SCHEMA IF EXISTS outbox_example CASCADE; CREATE SCHEMA outbox_example;
        CREATE TABLE outbox_example.paid (id bigint PRIMARY KEY); CREATE TABLE outbox_example.shipped (id bigint)";
    sqlx::raw_sql(tables).execute(&pool).await?;
    let store = PostgresStore::builder()
        .with_table("outbox_example.records")
        .with_pool(pool.clone())?;
    store.migrate().await?;
    let outbox = Outbox::in_table(pool.clone(), "outbox_example.outgoing")?;
    outbox.migrate().await?;
    let inbox = Inbox::new(store, "shipping");

    let publish = {
        let pool = pool.clone();
        move |message| ship(pool.clone(), inbox.clone(), message)
    };
    let pause = Duration::from_millis(50);
    let relay = outbox
        .relay(publish)
        .with_interval(pause)
        .with_initial_backoff(pause)
        .with_max_backoff(pause);
    let relaying = tokio::spawn(relay.run());
    for order in 1..=ORDERS {
        pay(&pool, &outbox, order).await?;
    }
    while outbox.waiting().await? > 0 {
        tokio::time::sleep(pause).await;
    }
    relaying.abort();

    let count =
        "SELECT (SELECT count(*) FROM outbox_example.paid), count(*), count(DISTINCT id) FROM outbox_example.shipped";
    let (paid, shipped, orders): (i64, i64, i64) = sqlx::query_as(count).fetch_one(&pool).await?;
    sqlx::raw_sql("DROP SCHEMA outbox_example CASCADE")
        .execute(&pool)
        .await?;
    println!("{paid} orders paid, {shipped} shipped");
    if (paid, shipped, orders) != (ORDERS - ORDERS / 5, paid, paid) {
        return Err("an order was shipped twice, or not at all".into());
    }
    Ok(())
}
