//! A process with a worker.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use apalis::prelude::{AbortError, RetryAfterError, Task, WorkerBuilder};
use apalis_redis::RedisStorage;
use harness::{unless_told, up_to, word, Ledger};
use tower::{service_fn, ServiceBuilder, ServiceExt};
use tower_idempotency::receiver::{Disposition, ReceiverLayer};
use tower_idempotency::RedisStore;

use crate::{config, Charge, Error};

/// After so many failures a job is dead.
const ATTEMPTS: usize = 3;

/// What a worker is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The URL of the Redis with the jobs and the records.
    pub redis: String,
    /// Where the effects are counted.
    pub effects: PathBuf,
    /// Where each delivery of a job is noted, with its result, and each run of the charge that it began.
    pub runs: PathBuf,
    /// How long a record outlives the worker that claimed it, if that dies.
    pub lease: Duration,
}

impl Settings {
    /// The same process as this one, told to work.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(["work", &self.redis])
            .args([&self.effects, &self.runs])
            .arg(self.lease.as_millis().to_string());
        command
    }

    /// What [`command`](Self::command) tells, after the first word.
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let mut next = || arguments.next();
        Some(Self {
            redis: next()?,
            effects: next()?.into(),
            runs: next()?.into(),
            lease: Duration::from_millis(next()?.parse().ok()?),
        })
    }
}

/// Works for ever. A worker that was given up by the others while it paused is ended by apalis; another one takes its place.
///
/// # Errors
///
/// When the servers are not there.
pub async fn work(settings: Settings) -> Result<(), Error> {
    let store = RedisStore::connect(&settings.redis).await?;
    let connection = apalis_redis::connect(settings.redis.as_str()).await?;
    let (effects, runs) = (Ledger::open(&settings.effects), Ledger::open(&settings.runs));
    let layer = ReceiverLayer::new(store, "charges")
        .with_id(|task: &Task<Charge>| task.args.order.clone())
        .with_lease(settings.lease);
    let receiver = ServiceBuilder::new().layer(unless_told(layer)).service({
        let runs = runs.clone();
        service_fn(move |task| charge(effects.clone(), runs.clone(), task))
    });
    for number in 0.. {
        let (receiver, runs) = (receiver.clone(), runs.clone());
        let ended = runs.clone();
        let once = service_fn(move |task: Task<Charge>| {
            let (receiver, runs) = (receiver.clone(), runs.clone());
            async move {
                let (order, attempt) = (task.args.order.clone(), task.attempt());
                runs.note(format_args!("came {order} {attempt}"));
                let received = receiver.oneshot(task).await;
                runs.note(format_args!("{} {order} {attempt}", word(&received)));
                verdict(Disposition::of(&received), attempt)
            }
        });
        let worker = WorkerBuilder::new(format!("worker-{}-{number}", std::process::id()))
            .backend(RedisStorage::new(connection.clone()).with_config(config()))
            .build(ServiceBuilder::new().concurrency_limit(5).service(once));
        let error = worker.run().await;
        ended.note(format_args!("worker-ended {error:?}"));
    }
    Ok(())
}

/// What apalis is told. It tries again after so many seconds as there were attempts, whatever time is asked for.
fn verdict(disposition: Disposition, attempt: usize) -> Result<(), Error> {
    match disposition {
        Disposition::Acknowledge => Ok(()),
        Disposition::Redeliver(Some(after)) => Err(RetryAfterError::new("it is in flight", after).into()),
        Disposition::Redeliver(None) if attempt < ATTEMPTS => Err("it failed".into()),
        Disposition::Redeliver(None) => Err(AbortError::new("it failed too often").into()),
        Disposition::Reject => Err(AbortError::new("nobody knows whether it was done").into()),
    }
}

/// Takes up to 10 ms, has its effect, and takes a little longer. What is `flaky` fails at first, a `poison` always; what is `slow` takes
/// 2 s.
async fn charge(effects: Ledger, runs: Ledger, task: Task<Charge>) -> Result<(), Error> {
    let order = &task.args.order;
    runs.note(format_args!("began {order}"));
    if order.starts_with("poison") || (order.starts_with("flaky") && task.attempt() < ATTEMPTS) {
        return Err(format!("{order} cannot be charged").into());
    }
    if order.starts_with("slow") {
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    tokio::time::sleep(up_to(10)).await;
    effects.note(order);
    tokio::time::sleep(up_to(5)).await;
    Ok(())
}
