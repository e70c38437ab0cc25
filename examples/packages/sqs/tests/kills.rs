//! Consumers of one queue that are killed at random, deletions that get lost, and messages that are sent up to three times: at most one
//! effect each, and none is lost. `MESSAGES` says how many messages, `KILLS` how many kills.

use std::process::Command;
use std::time::Duration;

use queue_kit::{number, up_to, Book, Folder, Outcome, Process, RedisServer};
use sqs::{client, Moto, Queue, Settings};

const PROGRAM: &str = env!("CARGO_BIN_EXE_sqs");

struct World {
    _moto: Moto,
    _redis: RedisServer,
    _folder: Folder,
    queue: Queue,
    dead: Queue,
    settings: Settings,
    effects: Book,
    deliveries: Book,
}

impl World {
    async fn new() -> Self {
        let (moto, redis, folder) = (Moto::start().unwrap(), RedisServer::start(), Folder::new("sqs-kills"));
        let (effects, deliveries) = (folder.book("effects"), folder.book("deliveries"));
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

    /// Sends all, a part at a time: moto looks at every message of a queue for every request.
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

    /// Sends all, and meanwhile kills one of two consumers, again and again, each time after some effects more, and starts another in
    /// its place; then waits for the end.
    async fn run(&self, sent: &[String], start: impl Fn() -> Process, kills: usize, effects_between: usize) {
        let mut consumers = [start(), start()];
        tokio::join!(
            self.send(sent),
            self.kill(&mut consumers, start, kills, effects_between)
        );
        self.queue.until_empty().await.unwrap();
        assert!(consumers.iter_mut().all(Process::is_up), "a consumer ended by itself");
    }

    async fn kill(
        &self,
        consumers: &mut [Process; 2],
        start: impl Fn() -> Process,
        kills: usize,
        effects_between: usize,
    ) {
        for kill in 0..kills {
            self.progress(effects_between).await;
            let victim = &mut consumers[kill % 2];
            tokio::time::sleep(up_to(Duration::from_millis(20))).await;
            assert!(victim.is_up(), "a consumer ended by itself");
            victim.kill();
            *victim = start();
        }
    }

    async fn progress(&self, effects: usize) {
        let enough = self.effects.lines().len() + effects;
        for _ in 0..4_000 {
            if self.effects.lines().len() >= enough {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("no progress within 20 s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_consumers_repeat_no_effect_and_lose_no_message() {
    let world = World::new().await;
    let messages = number("MESSAGES", 100);
    let kills = number("KILLS", 5.max(messages / 25));
    let names = (0..messages).map(|number| match number % 50 {
        49 => format!("poison-{number}"),
        _ => format!("order-{number}"),
    });
    let names: Vec<String> = names.collect();
    // Once, twice or three times.
    let copies = |number: usize| 1 + usize::from(number % 2 == 1) + usize::from(number % 3 == 2);
    let mut sent = Vec::new();
    for part in (0..messages).collect::<Vec<_>>().chunks(100) {
        // Some come while the first is in flight, others when it is done.
        for copy in 0..3 {
            let copied = part.iter().filter(|number| copies(**number) > copy);
            sent.extend(copied.map(|number| names[*number].clone()));
        }
    }
    let start = || Process::start(&mut world.settings.command(PROGRAM));
    world.run(&sent, start, kills, messages / (3 * kills)).await;
    let sent = sent.len();

    let dead = world.dead.drain().await.unwrap();
    let outcome = Outcome::of(names, &world.effects.tally(), &dead);
    let count = |word| world.deliveries.count(word);
    let words = ["came", "first", "duplicate", "in-flight", "unknown", "failed", "lost"];
    let told: Vec<String> = words.map(|word| format!("{} {word}", count(word))).into();
    println!("{messages} messages, {sent} copies, {kills} kills: {}", told.join(", "));
    println!(
        "one effect: {}; none, and a dead letter: {}",
        outcome.once, outcome.dead
    );
    assert!(outcome.is_as_promised(), "{outcome:?}");

    assert!(
        dead.iter().any(|name| name.starts_with("poison")),
        "what cannot be handled is a dead letter"
    );
    assert!(
        outcome.dead <= messages / 50 + kills * 10,
        "more dead letters than were killed: {outcome:?}"
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
    let start = || Process::start(world.settings.command(PROGRAM).env("UNPROTECTED", "1"));
    world.run(&names, start, 2, 15).await;
    let outcome = Outcome::of(names, &world.effects.tally(), &[]);
    assert!(!outcome.repeated.is_empty(), "each was sent once: {outcome:?}");
}

#[test]
fn the_example_does_what_it_says() {
    let output = Command::new(PROGRAM).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for line in [
        "which is extended: 1 deliveries, 0 of them told",
        "sent twice holds 1; with another copy after its window of 2 s, 2: 1 effect, 1 duplicate",
        "duplicates, 10 effects",
        "a batch of 10 of which one fails: 9 effects; that one failed 5 times and is one of 1 dead letters",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
}

#[test]
fn the_example_fails_without_the_receiver() {
    let output = Command::new(PROGRAM).env("UNPROTECTED", "1").output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("that is not what was promised"), "{told}");
}
