//! Background jobs of apalis', kept in Redis, each of which has one effect.
//!
//! * The **id** is the order that a job is about: whoever enqueues it again, because the first answer was lost, enqueues the same job,
//!   and apalis has two tasks.
//! * The receiver is **within** the worker, in the service that `WorkerBuilder::build` takes. Around it, by `WorkerBuilder::layer`, it
//!   would keep duplicates from the service whose result apalis records, and they would never count as done.
//! * A task whose worker misses its heartbeats is given to another, also when that worker only paused: then both run it. The second one
//!   is told that it is in flight, and comes again.

mod queue;
mod worker;

pub use queue::Queue;
pub use worker::{work, Settings};

use std::time::Duration;

use apalis_redis::Config;
use serde::{Deserialize, Serialize};

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// What is to be done.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Charge {
    pub order: String,
}

/// A worker is given up after 1 s without a heartbeat, and a bit: apalis counts in seconds.
fn config() -> Config {
    Config::default()
        .queue("charges")
        .batch_size(5)
        .heartbeat_interval(Duration::from_millis(250))
        .missed_heartbeats(4)
}
