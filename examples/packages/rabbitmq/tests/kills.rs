//! Consumers that are killed at random, acknowledgements that are lost, every order sent up to three times: and still the effects are
//! as many as is promised.
//!
//! `MESSAGES=10000` makes it longer; some consumer is killed for every 25 of them.

use std::collections::{BTreeMap, HashSet};
use std::process::Command;
use std::time::Duration;

use futures::future::try_join_all;
use harness::{Fleet, Folder, Ledger, PostgresServer, RabbitServer, RedisServer, Told};
use lapin::message::Delivery;
use rabbitmq::{deliveries, Broker, Order, Settings};
use sqlx::PgPool;
use tower::{service_fn, Layer, Service};
use tower_idempotency::protocol::Status;
use tower_idempotency::receiver::{ids, Disposition, Receipt, ReceiveError, ReceiverLayer};
use tower_idempotency::{BoxStore, MemoryStore, Store};

/// Short, so that what was killed is soon lost.
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
        .pass_lease(|order: &mut Order, lease| order.lease = Some(lease))
}

/// What came of a run.
struct Seen {
    orders: usize,
    effects: BTreeMap<String, usize>,
    /// Orders whose record says that they were handled.
    handled: HashSet<usize>,
    /// Orders in the dead-letter queue.
    dead: HashSet<usize>,
}

/// A process that consumes.
fn consumer(server: &RabbitServer, store: &str, folder: &Folder) -> Command {
    let mut command = harness::this_test("consume_if_told");
    command
        .env("CONSUME_BROKER", server.url())
        .env("CONSUME_STORE", store)
        .env("CONSUME_EFFECTS", folder.file("effects"))
        .env("CONSUME_TOLD", folder.file("told"));
    command
}

/// Sends orders while the consumers are killed, and waits until all are settled.
async fn run(url: &str) -> Seen {
    let orders = harness::number_from("MESSAGES", 200);
    let (server, folder) = (RabbitServer::start(), Folder::new("kills"));
    let (effects, told) = (Ledger::open(&folder.file("effects")), Told::open(&folder.file("told")));
    // The first one also makes the table, where there is one.
    let store = BoxStore::from_url(url).await.unwrap();
    let pool = match url.starts_with("postgres") {
        true => Some(PgPool::connect(url).await.unwrap()),
        false => None,
    };
    if let Some(pool) = &pool {
        let table = sqlx::raw_sql("CREATE TABLE effects (message text NOT NULL)");
        table.execute(pool).await.unwrap();
    }
    let broker = Broker::connect(&server.url(), settings()).await.unwrap();
    let start = || Fleet::start(2, || consumer(&server, url, &folder));
    let (mut fleet, mut sent) = (start(), 0);
    for batch in harness::batches(orders) {
        tokio::time::sleep(Duration::from_millis(100) + harness::up_to(100)).await;
        sent += batch.len();
        // All at once, so that the kill finds consumers at work.
        let published = batch.iter().map(async |order| {
            let order = order.to_string();
            broker.publish(Some(&order), &order).await
        });
        try_join_all(published).await.unwrap();
        fleet.kill_one();
    }
    let kills = fleet.kills();
    // What a consumer has is not counted as waiting, until the consumer is gone.
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

    let mut seen = Seen {
        orders,
        effects: effects.counts(),
        handled: HashSet::new(),
        dead: HashSet::new(),
    };
    for payload in broker.take_dead().await.unwrap() {
        seen.dead.insert(String::from_utf8_lossy(&payload).parse().unwrap());
    }
    let layer = layer(store.clone());
    for order in 0..orders {
        let key = layer.storage_key(ids::amqp(Some(order.to_string()))).unwrap();
        let record = store.peek(&key).await.unwrap();
        if record.is_some_and(|record| matches!(record.status, Status::Completed(_))) {
            seen.handled.insert(order);
        }
    }
    if let Some(pool) = &pool {
        let rows = sqlx::query_as::<_, (String, i64)>("SELECT message, count(*) FROM effects GROUP BY message");
        for (order, count) in rows.fetch_all(pool).await.unwrap() {
            seen.effects.insert(order, count.try_into().unwrap());
        }
    }
    let (receipts, redeliveries) = (told.receipts(), told.redeliveries());
    eprintln!(
        "over {}: {orders} orders sent {sent} times, {kills} kills, {redeliveries} redeliveries, {} dead; {receipts:?}",
        url.split(':').next().unwrap_or_default(),
        seen.dead.len(),
    );
    assert!(kills > 0 && redeliveries > 0 && receipts.contains_key("Duplicate"));
    for order in 0..orders {
        let is_settled = seen.handled.contains(&order) || seen.dead.contains(&order);
        assert!(is_settled, "{order} was lost");
    }
    seen
}

impl Seen {
    fn effects(&self, order: usize) -> usize {
        self.effects.get(&order.to_string()).copied().unwrap_or(0)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_there_is_at_most_one_effect_each_over_redis() {
    let seen = run(&RedisServer::start().url()).await;
    for order in 0..seen.orders {
        let effects = seen.effects(order);
        assert!(effects <= 1, "{order}: {effects}");
        if seen.handled.contains(&order) && !seen.dead.contains(&order) {
            assert_eq!(effects, 1, "{order} was handled");
        }
    }
    // Some were killed between their claim and their record.
    assert!(!seen.dead.is_empty(), "nothing was lost, so that nothing was refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_transaction_of_the_record_there_is_one_effect_each() {
    let seen = run(&PostgresServer::start().url()).await;
    for order in 0..seen.orders {
        assert_eq!(seen.effects(order), 1, "{order}");
    }
    assert_eq!(seen.dead, HashSet::new());
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
    let [runs, counting] = [(); 2].map(|()| Ledger::open(&folder.file("runs")));
    let handler = service_fn(move |order: Order| {
        let order = String::from_utf8(order.payload).unwrap();
        counting.note(&order);
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

/// Where lost orders are refused it kills one; whatever that one had in hand is lost with it, and everything else goes on.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_kills_its_consumer_kills_one_and_blocks_no_other() {
    let (server, redis, folder) = (RabbitServer::start(), RedisServer::start(), Folder::new("deadly"));
    let broker = Broker::connect(&server.url(), settings()).await.unwrap();
    let effects = Ledger::open(&folder.file("effects"));
    let orders: Vec<String> = (0..100).map(|order| order.to_string()).collect();
    let (before, behind) = orders.split_at(50);
    for order in before.iter().chain([&"deadly".to_owned()]).chain(behind) {
        broker.publish(Some(order), order).await.unwrap();
    }
    let mut fleet = Fleet::start(2, || consumer(&server, &redis.url(), &folder));
    let (mut died, mut dead) = (0, HashSet::new());
    harness::until("every order is settled", async || {
        died += fleet.replace_ended();
        let letters = broker.take_dead().await.unwrap();
        dead.extend(letters.into_iter().map(|letter| String::from_utf8(letter).unwrap()));
        let effects = effects.counts();
        let is_settled = |order: &String| effects.contains_key(order) || dead.contains(order);
        dead.contains("deadly") && orders.iter().all(is_settled)
    })
    .await;
    assert_eq!(died, 1);
    assert!(dead.len() <= usize::from(settings().concurrency), "{dead:?}");
    assert!(effects.counts().values().all(|effects| *effects == 1));
}

/// No test: consumes until it is killed, where [`run`] has started this process.
#[test]
fn consume_if_told() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let Ok(url) = std::env::var("CONSUME_STORE") else {
        return;
    };
    let effects = Ledger::open(variable("CONSUME_EFFECTS").as_ref());
    let told = Told::open(variable("CONSUME_TOLD").as_ref());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let store = BoxStore::from_url(&url).await.unwrap();
        let broker = Broker::connect(&variable("CONSUME_BROKER"), settings()).await.unwrap();
        if url.starts_with("postgres") {
            let pool = PgPool::connect(&url).await.unwrap();
            let handler = service_fn(move |order| take_effect(pool.clone(), order));
            consume(&broker, told, layer(store).at_least_once().layer(handler)).await;
        } else {
            let handler = service_fn(move |order: Order| {
                let effects = effects.clone();
                async move {
                    pause().await;
                    if order.payload == b"deadly" {
                        std::process::exit(1);
                    }
                    effects.enter(&String::from_utf8_lossy(&order.payload));
                    pause().await;
                    Ok::<_, rabbitmq::Error>(())
                }
            });
            consume(&broker, told, layer(store).layer(handler)).await;
        }
    });
}

async fn consume<S, T, E>(broker: &Broker, told: Told, receiver: S)
where
    S: Service<Order, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + 'static,
    S::Future: Send,
    T: Send + 'static,
    E: Send + 'static,
{
    let decide = move |delivery: &Delivery, received| {
        let disposition = told.note(deliveries(delivery) == 0, &received, Disposition::of(&received));
        // What RabbitMQ does when the connection ends before the acknowledgement has come.
        disposition.unwrap_or(Disposition::Redeliver(Some(Duration::ZERO)))
    };
    broker.consume(receiver, decide).await.unwrap();
}

async fn pause() {
    tokio::time::sleep(harness::up_to(40)).await;
}

async fn take_effect(pool: PgPool, order: Order) -> Result<(), rabbitmq::Error> {
    pause().await;
    let mut transaction = pool.begin().await?;
    let message = String::from_utf8(order.payload)?;
    let insert = sqlx::query("INSERT INTO effects (message) VALUES ($1)").bind(message);
    insert.execute(&mut *transaction).await?;
    pause().await;
    order.lease.ok_or("no lease")?.complete_in(&mut transaction).await?;
    transaction.commit().await?;
    Ok(())
}
