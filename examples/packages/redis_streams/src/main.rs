//! Starts Redis and two consumers. Sends orders up to three times and one order that always fails,
//! and counts the effects.
//!
//! `cargo run --manifest-path examples/packages/Cargo.toml -p redis_streams` stores the records in
//! memory. Add the URL of another store, `redis://127.0.0.1/` or `postgres://..`, to store the
//! records there.

use std::process::ExitCode;
use std::time::Duration;

use harness::{Folder, Ledger, RedisServer};
use redis_streams::{Broker, Error, Order, Settings};
use tower::{Layer, service_fn};
use tower_idempotency::BoxStore;
use tower_idempotency::receiver::{Disposition, ReceiverLayer};

const ORDERS: usize = 10;

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    let store = std::env::args().nth(1).unwrap_or_else(|| "memory:".to_owned());
    let store = BoxStore::from_url(&store).await?;
    let folder = Folder::new("redis_streams");
    let ledger = Ledger::open(&folder.file("ledger"));
    let server = RedisServer::start();
    let settings = Settings {
        max_deliver: 5,
        idle: Duration::from_millis(300),
        ..Settings::default()
    };
    let broker = Broker::connect(&server.url(), "producer", settings).await?;
    for consumer in ["A", "B"] {
        let broker = Broker::connect(&server.url(), consumer, settings).await?;
        tokio::spawn(consume(consumer, broker, store.clone(), ledger.clone()));
    }
    // Each run of this program sends new orders.
    let run = std::process::id();
    broker.publish(Some(&format!("{run}-poison")), "poison").await?;
    for copy in 0..3 {
        for order in (0..ORDERS).filter(|order| order % 3 >= copy) {
            broker
                .publish(Some(&format!("{run}-{order}")), &order.to_string())
                .await?;
        }
    }
    while broker.waiting().await? > 0 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let dead = broker.dead().await?;
    let orders = ledger.counts();
    println!("effects of each order: {:?}", orders.values().collect::<Vec<_>>());
    let is_once = orders.len() == ORDERS && orders.values().all(|effects| *effects == 1) && dead == ["poison"];
    println!(
        "{}",
        if is_once {
            "each order had one effect, and the order that always fails is a dead letter"
        } else {
            "the outcome is NOT as promised"
        }
    );
    Ok(if is_once { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn consume(name: &'static str, broker: Broker, store: BoxStore, ledger: Ledger) -> Result<(), Error> {
    let handler = service_fn(move |order: Order| {
        let ledger = ledger.clone();
        async move {
            let order = order.payload;
            if order == "poison" {
                return Err("this order always fails");
            }
            ledger.append_synced(&order);
            Ok(order)
        }
    });
    let receiver = ReceiverLayer::new(store, "orders")
        .with_id(|order: &Order| order.id.clone())
        .with_payload(|order| order.payload.as_bytes())
        .layer(handler);
    let decide = move |_: &_, received| {
        println!("{name}: {received:?}");
        Some(Disposition::of(&received))
    };
    broker.consume(receiver, decide).await
}
