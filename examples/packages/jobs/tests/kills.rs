//! Workers that are killed and paused at random, and jobs that are enqueued up to three times: at most one effect each, and none is
//! lost. `MESSAGES` says how many jobs, `KILLS` how many kills.

use std::process::Command;
use std::time::Duration;

use jobs::{Queue, Settings};
use queue_kit::{number, up_to, Book, Folder, Outcome, Process, RedisServer};

const PROGRAM: &str = env!("CARGO_BIN_EXE_jobs");

struct World {
    redis: RedisServer,
    _folder: Folder,
    settings: Settings,
    effects: Book,
    runs: Book,
}

impl World {
    fn new() -> Self {
        let (redis, folder) = (RedisServer::start(), Folder::new("jobs-kills"));
        let (effects, runs) = (folder.book("effects"), folder.book("runs"));
        let settings = Settings {
            redis: redis.url(),
            effects: effects.path().to_owned(),
            runs: runs.path().to_owned(),
            lease: Duration::from_millis(1_500),
        };
        Self {
            redis,
            _folder: folder,
            settings,
            effects,
            runs,
        }
    }

    /// Ends one of two workers, again and again, each time after some effects more, and starts another in its place. Every third is
    /// paused for longer than its heartbeat and its leases last, and goes on.
    async fn kill(&self, start: impl Fn() -> Process, kills: usize, effects_between: usize) {
        let (mut workers, mut paused) = ([start(), start()], Vec::new());
        for kill in 0..kills {
            self.progress(effects_between).await;
            tokio::time::sleep(up_to(Duration::from_millis(20))).await;
            let victim = &mut workers[kill % 2];
            assert!(victim.is_up(), "a worker ended by itself");
            let mut victim = std::mem::replace(victim, start());
            if kill % 3 == 2 {
                victim.signal("-STOP");
                paused.push(victim);
            } else {
                victim.kill();
            }
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        for worker in &paused {
            worker.signal("-CONT");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(workers.iter_mut().chain(&mut paused).all(Process::is_up));
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
async fn killed_and_paused_workers_repeat_no_effect_and_lose_no_job() {
    let world = World::new();
    let (messages, kills) = (number("MESSAGES", 500), number("KILLS", 6));
    let names = (0..messages).map(|number| match number % 100 {
        49 => format!("flaky-{number}"),
        99 => format!("poison-{number}"),
        _ => format!("order-{number}"),
    });
    let names: Vec<String> = names.collect();
    let mut queue = Queue::open(&world.redis).await.unwrap();
    // Once, twice or three times.
    let mut pushed = 0;
    for copy in 0..3 {
        for name in names.iter().skip(copy).step_by(copy + 1) {
            queue.push(name).await.unwrap();
            pushed += 1;
        }
    }
    let start = || Process::start(&mut world.settings.command(PROGRAM));
    let _last = start();
    world.kill(start, kills, messages / (3 * kills)).await;
    queue.until_ended().await.unwrap();

    let dead = queue.dead().unwrap();
    let outcome = Outcome::of(names, &world.effects.tally(), &dead);
    let count = |word| world.runs.count(word);
    let words = [
        "came",
        "first",
        "duplicate",
        "in-flight",
        "unknown",
        "failed",
        "worker-ended",
    ];
    let told: Vec<String> = words.map(|word| format!("{} {word}", count(word))).into();
    println!(
        "{messages} jobs, {pushed} times enqueued, {kills} killed or paused: {}",
        told.join(", ")
    );
    println!("one effect: {}; none, and dead: {}", outcome.once, outcome.dead);
    assert!(outcome.is_as_promised(), "{outcome:?}");

    assert!(
        dead.iter().any(|name| name.starts_with("poison")),
        "what cannot be done is dead"
    );
    assert!(
        outcome.dead <= messages / 50 + kills * 5,
        "more are dead than were killed: {outcome:?}"
    );
    assert!(
        kills > 0 && count("came") > pushed,
        "nothing ran again, so nothing was tested"
    );
    assert!(count("duplicate") > 0, "no duplicate came, so nothing was tested");
    assert!(count("unknown") > 0, "no job was killed, so nothing was tested");
    assert!(
        count("first") < messages,
        "no worker was killed between an effect and its record, or within a job"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_receiver_the_same_kills_repeat_effects() {
    let world = World::new();
    let names: Vec<String> = (0..200).map(|number| format!("order-{number}")).collect();
    let mut queue = Queue::open(&world.redis).await.unwrap();
    for name in &names {
        queue.push(name).await.unwrap();
    }
    let start = || Process::start(world.settings.command(PROGRAM).env("UNPROTECTED", "1"));
    let _last = start();
    world.kill(start, 4, 20).await;
    queue.until_ended().await.unwrap();
    let outcome = Outcome::of(names, &world.effects.tally(), &[]);
    assert!(!outcome.repeated.is_empty(), "each was enqueued once: {outcome:?}");
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
        "10 jobs, each enqueued twice, and two workers: 10 effects",
        "5 failures, 1 effect, dead: [\"poison-1\"]",
        "effects: 12 of 14 jobs had one each",
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
