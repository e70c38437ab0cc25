//! Random histories that run on a store and on the pure record, and must have the same results.

mod model;
mod step;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use self::model::Model;
use self::step::Step;
use crate::clock::{Clock, Timestamp};
use crate::store::Store;

/// The number of keys of a history.
const KEYS: usize = 2;

/// Compares the store with the pure [`Record`](crate::protocol::Record) over random histories.
///
/// Each of the `sequences` is a history of 4 to 40 operations over two fresh keys. It consists of
/// claims by few claimants with few fingerprints, with every [`IfLost`](crate::protocol::IfLost)
/// and caps of 1 to 4; of renewals and losses; and of completions, releases and resolutions by
/// owners, earlier owners and strangers. After every operation the results of `peek` must agree as
/// well. Only `seed` decides which operations a history has. Keys and nonces are new in each run.
///
/// The function compares fences by equality and order, not by number. It compares no values that
/// depend on time: leases and retentions are long, and the time that is left of them is ignored.
///
/// # Panics
///
/// Panics if a reply differs, or if the store fails. The message has the seed, the history up to
/// that operation, and both replies.
pub async fn differential<S: Store>(store: &S, sequences: usize, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    for sequence in 0..sequences {
        let length = 4 + sequence % 37;
        let steps: Vec<Step> = (0..length).map(|_| Step::random(&mut random, KEYS)).collect();
        if let Err((played, difference)) = play(store, &steps).await {
            differs(seed, sequence, &steps[..played], &difference);
        }
    }
}

/// Runs a history. On a difference, returns the number of steps that ran, and the difference that
/// the last one showed.
async fn play<S: Store>(store: &S, steps: &[Step]) -> Result<(), (usize, String)> {
    let clock = Clock::manual(Timestamp::from_micros(1_700_000_000_000_000));
    let mut models: Vec<Model> = (0..KEYS).map(|_| Model::new(clock.clone())).collect();
    for (n, step) in steps.iter().enumerate() {
        let played = models[step.key].play(store, step.action).await;
        played.map_err(|difference| (n + 1, difference))?;
    }
    Ok(())
}

#[expect(clippy::panic, reason = "the kit reports to tests, by panicking")]
fn differs(seed: u64, sequence: usize, steps: &[Step], difference: &str) -> ! {
    let steps: String = steps.iter().map(|step| format!("\n  {step:?}")).collect();
    panic!("the store differs from the pure record (seed {seed}, sequence {sequence}): {difference}; the steps:{steps}")
}

fn chance(random: &mut StdRng, of: u32) -> bool {
    random.random_range(0..of) == 0
}
