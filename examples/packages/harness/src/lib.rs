//! What the examples' programs and tests share: servers of their own, on free ports and in temporary folders, each ended by its
//! process id; ledgers in which effects are counted; consumers that are killed at random times and started again.

mod environment;
mod ledger;
mod nats;
mod outcome;
#[path = "../../../../tests/support/postgres.rs"]
mod postgres_server;
mod process;
mod rabbit;
#[path = "../../../../tests/support/redis.rs"]
mod redis_server;
mod run;
mod server;
mod told;

pub use environment::virtual_environment;
pub use ledger::Ledger;
pub use nats::NatsServer;
pub use outcome::Outcome;
pub use postgres_server::PostgresServer;
pub use process::{assert_fails_unprotected, assert_says, this_test, Fleet, Process};
pub use rabbit::RabbitServer;
pub use redis_server::RedisServer;
pub use run::{play, Error, Part, Run, Seen, Work};
pub use server::Folder;
pub use told::{word, Told};

use std::process::Command;
use std::time::Duration;

use tower_idempotency::receiver::{MessageId, OnMissingId, ReceiverLayer};

/// A number from the environment, or its default: `MESSAGES=10000 cargo test`.
///
/// # Panics
///
/// If it is none.
pub fn number_from(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(number) => number.parse().expect("a number"),
        Err(_) => default,
    }
}

/// What to send, and in which order: each message in one, two or three batches, one after the other. There is a batch for every 25
/// messages, and two more.
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

/// Waits until something is so.
///
/// # Panics
///
/// If it is not so within ten minutes.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..6_000 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("it does not come that {what}");
}

/// A random time up to so many milliseconds.
pub fn up_to(millis: u64) -> Duration {
    Duration::from_millis(rand::random_range(0..=millis))
}

/// Whether something happens once in so many times.
pub fn one_in(times: u32) -> bool {
    rand::random_range(0..times) == 0
}

const UNPROTECTED: &str = "UNPROTECTED";

/// The layer; or, in an [`unprotected`] process, one that lets every delivery through: for the tests of the tests.
pub fn unless_told<St, M>(layer: ReceiverLayer<St, M>) -> ReceiverLayer<St, M> {
    if std::env::var_os(UNPROTECTED).is_none() {
        return layer;
    }
    layer
        .with_id(|_| MessageId::missing())
        .on_missing_id(OnMissingId::Unprotected)
}

/// A program whose layers are to let every delivery through.
pub fn unprotected(mut program: Command) -> Command {
    program.env(UNPROTECTED, "1");
    program
}
