//! The promised number of effects holds, although the test kills consumers at random, loses
//! acknowledgements, and sends every order up to three times.
//!
//! `MESSAGES` sets the number of orders. The test kills a consumer for every 25 orders.

use std::time::Duration;

use harness::{Consumer, Fleet, Folder, PostgresServer, RedisServer, Run, RunReport};
use redis_streams::{Broker, Delivery, Order, Settings};
use tower::{Layer, service_fn};
use tower_idempotency::receiver::{Disposition, ReceiverLayer};
use tower_idempotency::{BoxStore, MemoryStore};

/// The lease. It is short, so that the orders of killed consumers are soon taken over.
const LEASE: Duration = Duration::from_secs(1);

fn settings() -> Settings {
    Settings {
        idle: Duration::from_secs(1),
        max_deliver: 1_000,
        concurrency: 8,
    }
}

fn layer(store: BoxStore) -> ReceiverLayer<BoxStore, Order> {
    ReceiverLayer::new(store, "orders")
        .with_id(|order: &Order| order.id.clone())
        .with_payload(|order| order.payload.as_bytes())
        .with_lease(LEASE)
        .with_max_attempts(1_000)
}

/// Sends orders, kills consumers meanwhile, and waits until all orders are settled.
async fn run(url: &str) -> RunReport {
    let orders = harness::number_from("MESSAGES", 200);
    let (server, run) = (RedisServer::start(), Run::over(url).await);
    let broker = Broker::connect(&server.url(), "producer", settings()).await.unwrap();
    let mut fleet = Fleet::start(2, || run.consumer(&server.url()));
    let mut sent = 0;
    for batch in harness::batches(orders) {
        tokio::time::sleep(Duration::from_millis(100) + harness::up_to(100)).await;
        for order in batch {
            let order = order.to_string();
            broker.publish(Some(&order), &order).await.unwrap();
            sent += 1;
        }
        fleet.kill_one();
    }
    let kills = fleet.kills();
    harness::until("all orders are settled", async || {
        fleet.check();
        broker.waiting().await.unwrap() == 0
    })
    .await;
    drop(fleet);

    let layer = layer(BoxStore::new(MemoryStore::new()));
    let key = |order: usize| layer.storage_key(order.to_string()).unwrap();
    let report = run.report(orders, broker.dead().await.unwrap(), key).await;
    eprintln!("{orders} orders in {sent} copies, {kills} kills; {report}");
    assert!(kills > 0);
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_there_is_at_most_one_effect_each_over_redis() {
    let report = run(&RedisServer::start().url()).await;
    report.assert_at_most_one_effect_each();
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_transaction_of_the_record_there_is_one_effect_each() {
    let report = run(&PostgresServer::start().url()).await;
    report.assert_one_effect_each();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_delivery_can_help_goes_to_the_dead_letter_stream_and_blocks_no_other() {
    let server = RedisServer::start();
    let settings = Settings {
        idle: Duration::from_millis(200),
        max_deliver: 5,
        ..settings()
    };
    let broker = Broker::connect(&server.url(), "consumer", settings).await.unwrap();
    let folder = Folder::new("poison");
    let [runs, counting] = [(); 2].map(|()| folder.ledger("runs"));
    let handler = service_fn(move |order: Order| {
        let order = order.payload;
        counting.append(&order);
        std::future::ready(if order == "poison" { Err("no") } else { Ok(()) })
    });
    let receiver = layer(BoxStore::new(MemoryStore::new())).layer(handler);
    let consumer = broker.clone();
    let decide = |_: &Delivery, received: Result<_, _>| Some(Disposition::of(&received));
    tokio::spawn(async move { consumer.consume(receiver, decide).await });
    broker.publish(Some("0"), "poison").await.unwrap();
    for order in 1..=100 {
        broker
            .publish(Some(&order.to_string()), &order.to_string())
            .await
            .unwrap();
    }
    broker.publish(Some("1"), "another order of this id").await.unwrap();
    broker.publish(None, "without an id").await.unwrap();
    harness::until("all orders are settled", async || broker.waiting().await.unwrap() == 0).await;
    let mut dead = broker.dead().await.unwrap();
    dead.sort_unstable();
    assert_eq!(dead, ["another order of this id", "poison", "without an id"]);
    let runs = runs.counts();
    assert_eq!((runs["poison"], runs.values().sum::<usize>()), (5, 105));
}

/// Not a test: consumes until the process is killed, if a [`Run`] has started this process.
#[test]
fn consume_if_started_by_a_run() {
    harness::run_consumer(
        async |Consumer {
                   broker,
                   store,
                   log,
                   work,
               }: Consumer| {
            let name = std::process::id().to_string();
            let broker = Broker::connect(&broker, name, settings()).await.unwrap();
            let layer = match work.has_transactions() {
                true => layer(store)
                    .at_least_once()
                    .pass_lease(|order, lease| order.lease = Some(lease)),
                false => layer(store),
            };
            let handler = service_fn(move |order: Order| {
                let work = work.clone();
                async move { work.take_effect(&order.payload, order.lease).await }
            });
            let decide = move |delivery: &Delivery, received: Result<_, _>| {
                log.record(delivery.number == 1, &received, Disposition::of(&received))
            };
            broker.consume(layer.layer(handler), decide).await.unwrap();
        },
    );
}
