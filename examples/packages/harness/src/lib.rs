//! Helpers of the example programs and their tests. They start servers on free ports and in
//! temporary folders, and end each server by its process id. Ledgers count effects. Fleets of
//! consumers are killed at random times and started again.

mod delivery_log;
mod environment;
mod ledger;
mod nats;
mod outcome;
#[path = "../../../../tests/support/port.rs"]
mod port;
#[path = "../../../../tests/support/postgres.rs"]
mod postgres_server;
mod process;
mod rabbit;
#[path = "../../../../tests/support/redis.rs"]
mod redis_server;
mod run;
mod server;

pub use delivery_log::{DeliveryLog, word};
pub use environment::virtual_environment;
pub use ledger::Ledger;
pub use nats::NatsServer;
pub use outcome::Outcome;
pub use postgres_server::PostgresServer;
pub use process::{Fleet, Process, assert_fails_unprotected, assert_prints, this_test};
pub use rabbit::RabbitServer;
pub use redis_server::RedisServer;
pub use run::{Consumer, Error, Run, RunReport, Work, run_consumer};
pub use server::Folder;

use std::process::Command;
use std::time::Duration;

use tower_idempotency::receiver::{MessageId, OnMissingId, ReceiverLayer};

/// Returns a number from an environment variable, such as `MESSAGES=10000`, or the default.
///
/// # Panics
///
/// Panics if the variable is not a whole number of at least 1.
pub fn number_from(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(value) => {
            let number = value.parse().ok().filter(|number| *number > 0);
            number.unwrap_or_else(|| panic!("{variable} must be a whole number of at least 1, and is {value}"))
        }
        Err(_) => default,
    }
}

/// Returns the batches of messages to send. Each message is in one, two or three successive
/// batches. There is a batch for every 25 messages, and two more.
pub fn batches(messages: usize) -> impl Iterator<Item = Vec<usize>> {
    const BATCH: usize = 25;
    let begun = messages.div_ceil(BATCH);
    (0..begun + 2).map(move |batch| {
        let copies = (0..3).filter_map(move |copy| Some((copy, batch.checked_sub(copy)?)));
        let messages = copies.flat_map(|(copy, batch)| {
            let of_batch = batch * BATCH..messages.min((batch + 1) * BATCH);
            of_batch.filter(move |message| message % 3 >= copy)
        });
        messages.collect()
    })
}

/// Waits until a condition is true.
///
/// # Panics
///
/// Panics if the condition is still false after ten minutes.
pub async fn until(condition: &str, mut is_true: impl AsyncFnMut() -> bool) {
    for _ in 0..6_000 {
        if is_true().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("timed out after ten minutes: still waiting until {condition}");
}

/// Returns a random time from 0 to `millis` milliseconds.
pub fn up_to(millis: u64) -> Duration {
    Duration::from_millis(rand::random_range(0..=millis))
}

/// Returns true at random, on average once in `times` calls.
pub fn one_in(times: u32) -> bool {
    rand::random_range(0..times) == 0
}

const UNPROTECTED: &str = "UNPROTECTED";

/// Returns the layer. In an [`unprotected`] process, it returns a layer that lets every delivery
/// through, so that tests can show that they notice this.
pub fn unless_unprotected<St, M>(layer: ReceiverLayer<St, M>) -> ReceiverLayer<St, M> {
    if std::env::var_os(UNPROTECTED).is_none() {
        return layer;
    }
    layer
        .with_id(|_| MessageId::missing())
        .on_missing_id(OnMissingId::Unprotected)
}

/// Configures a program so that its layers let every delivery through.
pub fn unprotected(mut program: Command) -> Command {
    program.env(UNPROTECTED, "1");
    program
}
