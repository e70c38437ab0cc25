//! Each job has at most one effect and none is lost, although the test kills and pauses workers at
//! random, and enqueues each job up to three times. `MESSAGES` sets the number of jobs, `KILLS` the
//! number of kills.

use std::process::Command;
use std::time::Duration;

use harness::{
    Fleet, Folder, Ledger, Outcome, Process, RedisServer, assert_fails_unprotected, assert_prints, number_from,
};
use jobs::{Queue, Settings};

const PROGRAM: &str = env!("CARGO_BIN_EXE_jobs");

struct World {
    redis: RedisServer,
    _folder: Folder,
    settings: Settings,
    effects: Ledger,
    runs: Ledger,
}

impl World {
    fn new() -> Self {
        let (redis, folder) = (RedisServer::start(), Folder::new("jobs-kills"));
        let (effects, runs) = (folder.ledger("effects"), folder.ledger("runs"));
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

    /// Kills one of three workers again and again, each time after some further effects, and starts
    /// a new one in its place. Pauses every third victim instead, for longer than its heartbeat and
    /// its leases, and resumes it at the end. When this returns, all workers run.
    async fn kill(&self, start: impl Fn() -> Command, kills: usize, effects_between: usize) -> impl Sized {
        let (mut workers, mut paused) = (Fleet::start(3, start), Vec::new());
        for kill in 0..kills {
            workers.progress(&self.effects, effects_between).await;
            let mut victim = workers.replace_one();
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
        workers.check();
        assert!(paused.iter_mut().all(Process::is_up), "a worker ended by itself");
        (workers, paused)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_paused_workers_repeat_no_effect_and_lose_no_job() {
    let world = World::new();
    let (messages, kills) = (number_from("MESSAGES", 500), number_from("KILLS", 6));
    let names = (0..messages).map(|number| match number % 100 {
        49 => format!("flaky-{number}"),
        99 => format!("poison-{number}"),
        _ => format!("order-{number}"),
    });
    let names: Vec<String> = names.collect();
    let mut queue = Queue::open(&world.redis).await.unwrap();
    // Enqueue each job once, twice or three times.
    let mut pushed = 0;
    for copy in 0..3 {
        for name in names.iter().skip(copy).step_by(copy + 1) {
            queue.push(name).await.unwrap();
            pushed += 1;
        }
    }
    let start = || world.settings.command(PROGRAM);
    let _workers = world.kill(start, kills, messages / (3 * kills)).await;
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
    let counted: Vec<String> = words.map(|word| format!("{} {word}", count(word))).into();
    println!(
        "{messages} jobs, enqueued {pushed} times, {kills} workers killed or paused: {}",
        counted.join(", ")
    );
    println!(
        "jobs with one effect: {}; dead jobs without an effect: {}",
        outcome.once, outcome.dead
    );
    assert!(outcome.is_as_promised(), "{outcome:?}");

    assert!(
        dead.iter().any(|name| name.starts_with("poison")),
        "no job that always fails is dead"
    );
    assert!(
        outcome.dead <= messages / 50 + kills * 5,
        "more jobs are dead than the kills explain: {outcome:?}"
    );
    assert!(
        kills > 0 && count("came") > pushed,
        "no job was delivered again, so nothing was tested"
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
    let start = || harness::unprotected(world.settings.command(PROGRAM));
    let _workers = world.kill(start, 4, 20).await;
    queue.until_ended().await.unwrap();
    let outcome = Outcome::of(names, &world.effects.tally(), &[]);
    assert!(
        !outcome.repeated.is_empty(),
        "the kills repeated no effect: {outcome:?}"
    );
}

#[test]
fn the_example_does_what_it_says() {
    let lines = [
        "10 jobs, each enqueued twice, with two workers: 10 effects",
        "5 failures, 1 effect, dead: [\"poison-1\"]",
        "effects: 12 of 14 jobs had one effect each",
    ];
    assert_prints(PROGRAM, &lines);
}

#[test]
fn the_example_fails_without_the_receiver() {
    assert_fails_unprotected(PROGRAM);
}
