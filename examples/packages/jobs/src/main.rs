//! A queue of jobs, with workers that pause and workers that are killed, in four scenarios.
//!
//! `cargo run --manifest-path examples/packages/Cargo.toml -p jobs`

use std::process::ExitCode;
use std::time::Duration;

use harness::{Folder, Outcome, Process, RedisServer};
use jobs::{Error, Queue, Settings, work};

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    let mut arguments = std::env::args();
    let program = arguments
        .next()
        .ok_or("the first argument, the name of this program, is missing")?;
    if arguments.next().as_deref() == Some("work") {
        let settings = Settings::from_arguments(arguments)
            .ok_or("arguments are missing or wrong; only the parent process starts workers")?;
        work(settings).await?;
        return Ok(ExitCode::SUCCESS);
    }
    run_scenarios(&program).await
}

async fn run_scenarios(program: &str) -> Result<ExitCode, Error> {
    let (redis, folder) = (RedisServer::start(), Folder::new("jobs"));
    let (effects, runs) = (folder.ledger("effects"), folder.ledger("runs"));
    let settings = Settings {
        redis: redis.url(),
        effects: effects.path().to_owned(),
        runs: runs.path().to_owned(),
        lease: Duration::from_secs(5),
    };
    let start = || Process::start(&mut settings.command(program));
    let mut queue = Queue::open(&redis).await?;

    let mut orders: Vec<String> = (1..=10).map(|number| format!("order-{number}")).collect();
    for _ in 0..2 {
        for order in &orders {
            queue.push(order).await?;
        }
    }
    let (paused, other) = (start(), start());
    queue.until_ended().await?;
    println!(
        "10 jobs, each enqueued twice, with two workers: {} effects",
        effects.lines().len()
    );

    for order in ["flaky-1", "poison-1"] {
        queue.push(order).await?;
        orders.push(order.to_owned());
    }
    queue.until_ended().await?;
    println!(
        "a job that fails twice and a job that always fails: {} failures, {} effect, dead: {:?}",
        runs.count("failed"),
        usize::from(effects.tally().contains_key("flaky-1")),
        queue.dead()?
    );

    drop(other);
    queue.push("slow-1").await?;
    orders.push("slow-1".to_owned());
    until(|| count(&runs.lines(), "began slow-1") == 1).await?;
    paused.signal("-STOP");
    let other = start();
    until(|| count(&runs.lines(), "came slow-1") == 2).await?;
    paused.signal("-CONT");
    queue.until_ended().await?;
    println!(
        "a worker paused in the middle of a job, another worker got the job, and the first one resumed: {} deliveries of \
         the job, {} refused as in flight, {} reported as done",
        count(&runs.lines(), "came slow-1"),
        count(&runs.lines(), "in-flight slow-1"),
        count(&runs.lines(), "duplicate slow-1")
    );
    drop(paused);

    queue.push("slow-2").await?;
    orders.push("slow-2".to_owned());
    // Wait until the receiver has claimed the job. If the worker were killed earlier, the next
    // worker would simply do the job.
    until(|| count(&runs.lines(), "began slow-2") == 1).await?;
    let mut killed = other;
    killed.kill();
    let last = start();
    queue.until_ended().await?;
    println!(
        "a worker was killed in the middle of a job: another worker got the job, and nobody knows whether it was done, so \
         it is dead: {:?}",
        queue.dead()?
    );
    drop(last);

    let mut dead = queue.dead()?;
    dead.sort();
    let runs_at_once = count(&runs.lines(), "in-flight slow-1");
    let outcome = Outcome::of(orders, &effects.tally(), &dead);
    if !outcome.is_as_promised() || dead != ["poison-1", "slow-2"] || runs_at_once == 0 {
        eprintln!("the outcome is not as promised: {outcome:?}");
        return Ok(ExitCode::FAILURE);
    }
    println!(
        "effects: {} of {} jobs had one effect each",
        outcome.once,
        outcome.once + outcome.dead
    );
    Ok(ExitCode::SUCCESS)
}

fn count(lines: &[String], beginning: &str) -> usize {
    lines.iter().filter(|line| line.starts_with(beginning)).count()
}

async fn until(mut is_true: impl FnMut() -> bool) -> Result<(), Error> {
    for _ in 0..2_000 {
        if is_true() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("the next step of the scenario did not happen within 20 s".into())
}
