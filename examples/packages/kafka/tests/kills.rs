//! Each message has at most one effect and none is lost, although the test kills consumers of the
//! group at random, and sends each message up to three times. `MESSAGES` sets the number of
//! messages, `KILLS` the number of kills.

use std::process::Command;
use std::time::Duration;

use harness::{Fleet, Folder, Ledger, Outcome, RedisServer, assert_fails_unprotected, assert_prints, number_from};
use kafka::{Brokers, Order, Overview, Settings, producer, send};

const PROGRAM: &str = env!("CARGO_BIN_EXE_kafka");

struct World {
    _brokers: Brokers,
    _redis: RedisServer,
    _folder: Folder,
    settings: Settings,
    effects: Ledger,
    deliveries: Ledger,
}

impl World {
    fn new() -> Self {
        let (brokers, redis, folder) = (
            Brokers::start().unwrap(),
            RedisServer::start(),
            Folder::new("kafka-kills"),
        );
        let (effects, deliveries) = (folder.ledger("effects"), folder.ledger("deliveries"));
        let settings = Settings {
            servers: brokers.servers(),
            group: "billing".to_owned(),
            store: redis.url(),
            effects: effects.path().to_owned(),
            deliveries: deliveries.path().to_owned(),
            commit_every: Duration::from_millis(300),
            lease: Duration::from_secs(1),
        };
        Self {
            _brokers: brokers,
            _redis: redis,
            _folder: folder,
            settings,
            effects,
            deliveries,
        }
    }

    /// Kills one of two consumers again and again, each time after some further effects, and starts
    /// a new one in its place. Then waits until all messages are settled.
    async fn kill(&self, start: impl Fn() -> Command, kills: usize, effects_between: usize) {
        let mut consumers = Fleet::start(2, start);
        consumers.kill_one_by_one(kills, &self.effects, effects_between).await;
        Overview::new(&self.settings).until_done().await.unwrap();
        consumers.check();
    }

    /// Returns the number of places in a topic that were delivered more than once.
    fn redelivered(&self) -> usize {
        let tally = self.deliveries.tally();
        tally
            .iter()
            .filter(|(line, times)| line.starts_with("came ") && **times > 1)
            .count()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_consumers_repeat_no_effect_and_lose_no_message() {
    let world = World::new();
    let (messages, kills) = (number_from("MESSAGES", 2_000), number_from("KILLS", 5));
    let names = (0..messages).map(|number| match number % 100 {
        99 => format!("poison-{number}"),
        _ => format!("order-{number}"),
    });
    let orders: Vec<Order> = names.map(Order::new).collect();
    let producer = producer(&world.settings.servers).unwrap();
    // Send each message once, twice or three times.
    for copy in 0..3 {
        let copies: Vec<Order> = orders.iter().skip(copy).step_by(copy + 1).cloned().collect();
        send(&producer, &copies).await.unwrap();
    }
    let start = || world.settings.command(PROGRAM);
    world.kill(start, kills, messages / (3 * kills)).await;

    let dead = Overview::new(&world.settings).dead().unwrap();
    let names = orders.into_iter().map(|order| order.name);
    let outcome = Outcome::of(names, &world.effects.tally(), &dead);
    let (words, redelivered) = (world.deliveries.counts(), world.redelivered());
    println!("{messages} messages, {kills} kills, {redelivered} places redelivered: {words:?}");
    println!(
        "messages with one effect: {}; dead letters without an effect: {}",
        outcome.once, outcome.dead
    );
    assert!(outcome.is_as_promised(), "{outcome:?}");

    let poisons = dead.iter().filter(|name| name.starts_with("poison")).count();
    assert!(
        poisons >= messages / 100,
        "not every message that always fails is a dead letter"
    );
    assert!(
        outcome.dead <= messages / 100 + kills * 16,
        "more dead letters than the kills explain: {outcome:?}"
    );
    assert!(
        kills > 0 && redelivered > 0,
        "nothing was redelivered, so nothing was tested"
    );
    assert!(words["duplicate"] > 0, "no duplicate came, so nothing was tested");
    assert!(words["unknown"] > 0, "no handler was killed, so nothing was tested");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_receiver_the_same_kills_repeat_effects() {
    let world = World::new();
    let orders: Vec<Order> = (0..500).map(|number| Order::new(format!("order-{number}"))).collect();
    send(&producer(&world.settings.servers).unwrap(), &orders)
        .await
        .unwrap();
    let start = || harness::unprotected(world.settings.command(PROGRAM));
    world.kill(start, 2, 150).await;
    let outcome = Outcome::of(orders.into_iter().map(|order| order.name), &world.effects.tally(), &[]);
    assert!(
        !outcome.repeated.is_empty(),
        "the kills repeated no effect: {outcome:?}"
    );
}

#[test]
fn the_example_does_what_it_says() {
    let last = "effects: 29 messages had one effect each; dead letters: [\"poison-1\"]";
    assert_prints(PROGRAM, &[last]);
}

#[test]
fn the_example_fails_without_the_receiver() {
    assert_fails_unprotected(PROGRAM);
}
