//! A process with a worker.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use apalis::prelude::{AbortError, RetryAfterError, Task, WorkerBuilder};
use apalis_redis::RedisStorage;
use harness::{Ledger, unless_unprotected, up_to, word};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::RedisStore;
use tower_idempotency::receiver::{Disposition, ReceiverLayer};

use crate::{Charge, Error, config};

/// The number of attempts after which a job is dead.
const ATTEMPTS: usize = 3;

/// The settings of a worker.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The URL of the Redis with the jobs and the records.
    pub redis: String,
    /// The path of the ledger of effects.
    pub effects: PathBuf,
    /// The path of the ledger with each delivery of a job, its result, and each run of the handler.
    pub runs: PathBuf,
    /// The lease: how long a job stays in flight after its worker died.
    pub lease: Duration,
}

impl Settings {
    /// Returns a command that runs this program as a worker.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(["work", &self.redis])
            .args([&self.effects, &self.runs])
            .arg(self.lease.as_millis().to_string());
        command
    }

    /// Parses the arguments that [`command`](Self::command) passes, without the first one.
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

/// Runs workers until the process is killed. If a worker pauses for too long, the other workers
/// give it up and apalis ends it. Then this function starts a new one.
///
/// # Errors
///
/// Fails if the servers cannot be reached.
pub async fn work(settings: Settings) -> Result<(), Error> {
    let store = RedisStore::connect(&settings.redis).await?;
    let connection = apalis_redis::connect(settings.redis.as_str()).await?;
    let (effects, runs) = (Ledger::open(&settings.effects), Ledger::open(&settings.runs));
    let layer = ReceiverLayer::new(store, "charges")
        .with_id(|task: &Task<Charge>| task.args.order.clone())
        .with_lease(settings.lease);
    let receiver = ServiceBuilder::new().layer(unless_unprotected(layer)).service({
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
                runs.append(format_args!("came {order} {attempt}"));
                let received = receiver.oneshot(task).await;
                runs.append(format_args!("{} {order} {attempt}", word(&received)));
                verdict(Disposition::of(&received), attempt)
            }
        });
        let worker = WorkerBuilder::new(format!("worker-{}-{number}", std::process::id()))
            .backend(RedisStorage::new(connection.clone()).with_config(config()))
            .build(ServiceBuilder::new().concurrency_limit(5).service(once));
        let error = worker.run().await;
        ended.append(format_args!("worker-ended {error:?}"));
    }
    Ok(())
}

/// Translates a disposition into a result for apalis. apalis ignores the requested pause, and waits
/// one second for each attempt so far.
fn verdict(disposition: Disposition, attempt: usize) -> Result<(), Error> {
    match disposition {
        Disposition::Acknowledge => Ok(()),
        Disposition::Redeliver(Some(after)) => Err(RetryAfterError::new("the job is in flight", after).into()),
        Disposition::Redeliver(None) if attempt < ATTEMPTS => Err("the job failed".into()),
        Disposition::Redeliver(None) => Err(AbortError::new("the job failed too often").into()),
        Disposition::Reject => Err(AbortError::new("nobody knows whether the job was done").into()),
    }
}

/// The handler: waits up to 10 ms, has its effect, and waits up to 5 ms. An order `flaky` fails
/// until its last attempt, an order `poison` always fails, and an order `slow` takes 2 s longer.
async fn charge(effects: Ledger, runs: Ledger, task: Task<Charge>) -> Result<(), Error> {
    let order = &task.args.order;
    runs.append(format_args!("began {order}"));
    if order.starts_with("poison") || (order.starts_with("flaky") && task.attempt() < ATTEMPTS) {
        return Err(format!("{order} cannot be charged").into());
    }
    if order.starts_with("slow") {
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    tokio::time::sleep(up_to(10)).await;
    effects.append(order);
    tokio::time::sleep(up_to(5)).await;
    Ok(())
}
