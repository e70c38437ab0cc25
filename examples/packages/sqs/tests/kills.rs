//! Each message has at most one effect and none is lost, although the test kills consumers of the
//! queue at random, loses deletions, and sends each message up to three times. `MESSAGES` sets the
//! number of messages, `KILLS` the number of kills.

use std::process::Command;
use std::time::Duration;

use harness::{Fleet, Folder, Ledger, Outcome, RedisServer, assert_fails_unprotected, assert_prints, number_from};
use sqs::{Moto, Queue, Settings, client};

const PROGRAM: &str = env!("CARGO_BIN_EXE_sqs");

struct World {
    _moto: Moto,
    _redis: RedisServer,
    _folder: Folder,
    queue: Queue,
    dead: Queue,
    settings: Settings,
    effects: Ledger,
    deliveries: Ledger,
}

impl World {
    async fn new() -> Self {
        let (moto, redis, folder) = (Moto::start().unwrap(), RedisServer::start(), Folder::new("sqs-kills"));
        let (effects, deliveries) = (folder.ledger("effects"), folder.ledger("deliveries"));
        let (client, visibility) = (client(&moto.url()), Duration::from_secs(2));
        let dead = Queue::create(&client, "dead", visibility, None).await.unwrap();
        let queue = Queue::create(&client, "orders", visibility, Some(&dead)).await.unwrap();
        let settings = Settings {
            server: moto.url(),
            queue: queue.url.clone(),
            dead: dead.url.clone(),
            store: redis.url(),
            effects: effects.path().to_owned(),
            deliveries: deliveries.path().to_owned(),
            visibility,
            extends: true,
            lease: Duration::from_secs(1),
            lose_every: 10,
        };
        Self {
            _moto: moto,
            _redis: redis,
            _folder: folder,
            queue,
            dead,
            settings,
            effects,
            deliveries,
        }
    }

    /// Sends all messages in parts, because moto reads every message of the queue for each request.
    async fn send(&self, names: &[String]) {
        const PART: usize = 200;
        for part in names.chunks(PART) {
            while self.queue.length().await.unwrap() > PART {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            for name in part {
                self.queue.send(name).await.unwrap();
            }
        }
    }

    /// Sends all messages. Meanwhile kills one of two consumers again and again, each time after
    /// some further effects, and starts a new one in its place. Then waits until the queue is
    /// empty.
    async fn run(&self, sent: &[String], start: impl Fn() -> Command, kills: usize, effects_between: usize) {
        let mut consumers = Fleet::start(2, start);
        tokio::join!(
            self.send(sent),
            consumers.kill_one_by_one(kills, &self.effects, effects_between)
        );
        self.queue.until_empty().await.unwrap();
        consumers.check();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_consumers_repeat_no_effect_and_lose_no_message() {
    let world = World::new().await;
    let messages = number_from("MESSAGES", 100);
    let kills = number_from("KILLS", 5.max(messages / 25));
    let names = (0..messages).map(|number| match number % 50 {
        49 => format!("poison-{number}"),
        _ => format!("order-{number}"),
    });
    let names: Vec<String> = names.collect();
    // Send each message once, twice or three times.
    let copies = |number: usize| 1 + usize::from(number % 2 == 1) + usize::from(number % 3 == 2);
    let mut sent = Vec::new();
    for part in (0..messages).collect::<Vec<_>>().chunks(100) {
        // Some copies arrive while the first one is in flight, and others after it is handled.
        for copy in 0..3 {
            let copied = part.iter().filter(|number| copies(**number) > copy);
            sent.extend(copied.map(|number| names[*number].clone()));
        }
    }
    let start = || world.settings.command(PROGRAM);
    world.run(&sent, start, kills, messages / (3 * kills)).await;
    let sent = sent.len();

    let dead = world.dead.drain().await.unwrap();
    let outcome = Outcome::of(names, &world.effects.tally(), &dead);
    let count = |word| world.deliveries.count(word);
    let words = ["came", "first", "duplicate", "in-flight", "unknown", "failed", "lost"];
    let counted: Vec<String> = words.map(|word| format!("{} {word}", count(word))).into();
    println!(
        "{messages} messages, {sent} copies, {kills} kills: {}",
        counted.join(", ")
    );
    println!(
        "messages with one effect: {}; dead letters without an effect: {}",
        outcome.once, outcome.dead
    );
    assert!(outcome.is_as_promised(), "{outcome:?}");

    assert!(
        dead.iter().any(|name| name.starts_with("poison")),
        "no message that always fails is a dead letter"
    );
    assert!(
        outcome.dead <= messages / 50 + kills * 10,
        "more dead letters than the kills explain: {outcome:?}"
    );
    assert!(
        kills > 0 && count("came") > sent,
        "nothing was redelivered, so nothing was tested"
    );
    assert!(count("lost") > 0, "no deletion was lost, so nothing was tested");
    assert!(count("duplicate") > 0, "no duplicate came, so nothing was tested");
    assert!(count("unknown") > 0, "no handler was killed, so nothing was tested");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_receiver_the_same_kills_repeat_effects() {
    let world = World::new().await;
    let names: Vec<String> = (0..60).map(|number| format!("order-{number}")).collect();
    let start = || harness::unprotected(world.settings.command(PROGRAM));
    world.run(&names, start, 2, 15).await;
    let outcome = Outcome::of(names, &world.effects.tally(), &[]);
    assert!(
        !outcome.repeated.is_empty(),
        "the kills repeated no effect: {outcome:?}"
    );
}

#[test]
fn the_example_does_what_it_says() {
    let lines = [
        "which the consumer extends: 1 deliveries, 0 of them refused",
        "has 1 message after a message was sent twice, and 2 after another copy",
        "the window of 2 s: 1 effect, 1 duplicate",
        "duplicates, 10 effects",
        "a batch of 10 messages with one that always fails: 9 effects, 5 failures, 1 dead letter",
    ];
    assert_prints(PROGRAM, &lines);
}

#[test]
fn the_example_fails_without_the_receiver() {
    assert_fails_unprotected(PROGRAM);
}
