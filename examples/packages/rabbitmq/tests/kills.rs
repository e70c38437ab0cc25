//! The promised number of effects holds, although the test kills consumers at random, loses
//! acknowledgements, and sends every order up to three times.
//!
//! `MESSAGES` sets the number of orders. The test kills a consumer for every 25 orders.

use std::collections::HashSet;
use std::time::Duration;

use futures::future::try_join_all;
use harness::{Consumer, Fleet, Folder, PostgresServer, RabbitServer, RedisServer, Run, RunReport};
use lapin::message::Delivery;
use rabbitmq::{Broker, Order, Settings, deliveries};
use tower::{Layer, service_fn};
use tower_idempotency::receiver::{Disposition, ReceiverLayer, ids};
use tower_idempotency::{BoxStore, MemoryStore};

/// The lease. It is short, so that the orders of killed consumers are soon taken over.
const LEASE: Duration = Duration::from_secs(1);

fn settings() -> Settings {
    Settings {
        max_deliver: 1_000,
        pause: Duration::from_millis(20),
        concurrency: 8,
    }
}

fn layer(store: BoxStore) -> ReceiverLayer<BoxStore, Order> {
    ReceiverLayer::new(store, "orders")
        .with_id(|order: &Order| order.id.clone())
        .with_payload(|order| &order.payload)
        .with_lease(LEASE)
        .with_max_attempts(1_000)
}

/// Sends orders, kills consumers meanwhile, and waits until all orders are settled.
async fn run(url: &str) -> RunReport {
    let orders = harness::number_from("MESSAGES", 200);
    let (server, run) = (RabbitServer::start(), Run::over(url).await);
    let broker = Broker::connect(&server.url(), settings()).await.unwrap();
    let start = || Fleet::start(2, || run.consumer(&server.url()));
    let (mut fleet, mut sent) = (start(), 0);
    for batch in harness::batches(orders) {
        tokio::time::sleep(Duration::from_millis(100) + harness::up_to(100)).await;
        sent += batch.len();
        // Publish the whole batch at the same time, so that the kill finds busy consumers.
        let published = batch.iter().map(async |order| {
            let order = order.to_string();
            broker.publish(Some(&order), &order).await
        });
        try_join_all(published).await.unwrap();
        fleet.kill_one();
    }
    let kills = fleet.kills();
    // RabbitMQ counts the orders of a consumer as waiting only after the consumer has ended. So end
    // the consumers, and look again.
    loop {
        harness::until("no order waits", async || {
            fleet.check();
            broker.waiting().await.unwrap() == 0
        })
        .await;
        tokio::time::sleep(2 * LEASE).await;
        drop(fleet);
        tokio::time::sleep(Duration::from_millis(500)).await;
        if broker.waiting().await.unwrap() == 0 {
            break;
        }
        fleet = start();
    }

    let layer = layer(BoxStore::new(MemoryStore::new()));
    let key = |order: usize| layer.storage_key(ids::amqp(Some(order.to_string()))).unwrap();
    let report = run.report(orders, broker.take_dead().await.unwrap(), key).await;
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
async fn what_no_delivery_can_help_goes_to_the_dead_letter_queue_and_blocks_no_other() {
    let server = RabbitServer::start();
    let settings = Settings {
        max_deliver: 5,
        ..settings()
    };
    let broker = Broker::connect(&server.url(), settings).await.unwrap();
    let folder = Folder::new("poison");
    let [runs, counting] = [(); 2].map(|()| folder.ledger("runs"));
    let handler = service_fn(move |order: Order| {
        let order = String::from_utf8(order.payload).unwrap();
        counting.append(&order);
        std::future::ready(if order == "poison" { Err("no") } else { Ok(()) })
    });
    let receiver = layer(BoxStore::new(MemoryStore::new())).layer(handler);
    let consumer = broker.clone();
    let decide = |_: &Delivery, received: Result<_, _>| Disposition::of(&received);
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
    let mut dead = Vec::new();
    for _ in 0..600 {
        if dead.len() == 3 && runs.counts().len() == 101 {
            break;
        }
        dead.extend(broker.take_dead().await.unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    dead.sort_unstable();
    let expected: [&[u8]; 3] = [b"another order of this id", b"poison", b"without an id"];
    assert_eq!(dead, expected);
    let runs = runs.counts();
    assert_eq!((runs["poison"], runs.values().sum::<usize>()), (5, 105));
}

/// The store refuses lost orders, so the order kills only one consumer. The orders that this
/// consumer had are lost as well, and the others are handled.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_kills_its_consumer_kills_one_and_blocks_no_other() {
    let (server, redis) = (RabbitServer::start(), RedisServer::start());
    let run = Run::over(&redis.url()).await;
    let broker = Broker::connect(&server.url(), settings()).await.unwrap();
    let orders: Vec<String> = (0..100).map(|order| order.to_string()).collect();
    let (before, after) = orders.split_at(50);
    for order in before.iter().chain([&"deadly".to_owned()]).chain(after) {
        broker.publish(Some(order), order).await.unwrap();
    }
    let mut fleet = Fleet::start(2, || run.consumer(&server.url()));
    let (mut died, mut dead) = (0, HashSet::new());
    harness::until("every order is settled", async || {
        died += fleet.replace_ended();
        let letters = broker.take_dead().await.unwrap();
        dead.extend(letters.into_iter().map(|letter| String::from_utf8(letter).unwrap()));
        let effects = run.effects().counts();
        let is_settled = |order: &String| effects.contains_key(order) || dead.contains(order);
        dead.contains("deadly") && orders.iter().all(is_settled)
    })
    .await;
    assert_eq!(died, 1);
    assert!(dead.len() <= usize::from(settings().concurrency), "{dead:?}");
    assert!(run.effects().counts().values().all(|effects| *effects == 1));
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
            let broker = Broker::connect(&broker, settings()).await.unwrap();
            let layer = match work.has_transactions() {
                true => layer(store)
                    .at_least_once()
                    .pass_lease(|order, lease| order.lease = Some(lease)),
                false => layer(store),
            };
            let handler = service_fn(move |order: Order| {
                let work = work.clone();
                async move {
                    if order.payload == b"deadly" {
                        std::process::exit(1);
                    }
                    work.take_effect(&String::from_utf8_lossy(&order.payload), order.lease)
                        .await
                }
            });
            let decide = move |delivery: &Delivery, received: Result<_, _>| {
                let disposition = log.record(deliveries(delivery) == 0, &received, Disposition::of(&received));
                // RabbitMQ also redelivers an order if the connection ends before the
                // acknowledgement.
                disposition.unwrap_or(Disposition::Redeliver(Some(Duration::ZERO)))
            };
            broker.consume(layer.layer(handler), decide).await.unwrap();
        },
    );
}
