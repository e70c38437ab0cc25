//! Background jobs that apalis runs and Redis stores. Each job has one effect.
//!
//! * The **id** of a job is its order. A producer that got no confirmation enqueues the same order
//!   again. Then apalis has two tasks with the same id.
//! * The receiver is **inside** the worker, in the service that `WorkerBuilder::build` takes. As an
//!   outer layer, added by `WorkerBuilder::layer`, it would stop duplicates before the service
//!   whose result apalis records. Then apalis would never count them as done.
//! * If a worker misses its heartbeats, apalis gives its task to another worker. If the first
//!   worker was only paused, both run the task. The receiver reports to the second worker that the
//!   task is in flight, and apalis tries it again later.

mod queue;
mod worker;

pub use queue::Queue;
pub use worker::{Settings, work};

use std::time::Duration;

use apalis_redis::Config;
use serde::{Deserialize, Serialize};

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A job: charges an order.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Charge {
    pub order: String,
}

/// Returns the configuration of the queue. apalis gives a worker up a little more than 1 s after
/// its last heartbeat, because it counts in seconds.
fn config() -> Config {
    Config::default()
        .queue("charges")
        .batch_size(5)
        .heartbeat_interval(Duration::from_millis(250))
        .missed_heartbeats(4)
}
