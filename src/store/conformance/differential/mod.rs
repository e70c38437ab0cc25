//! Random histories, played to a store and to the pure record alike.

mod step;
mod twin;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use self::step::Step;
use self::twin::Twin;
use crate::clock::{Clock, Timestamp};
use crate::store::Store;

/// How many keys a history has.
const KEYS: usize = 2;

/// Compares the store with the pure [`Record`](crate::protocol::Record) over random histories.
///
/// Each of the `sequences` is a history of 4 to 40 operations over two fresh keys: claims by few claimants, with few
/// fingerprints, every [`IfLost`](crate::protocol::IfLost) and caps of 1 to 4; renewals and losses; completions, releases and
/// resolutions by owners, earlier owners and strangers. After every operation `peek` must agree as well. Which operations they
/// are depends on `seed` alone; keys and nonces are new in each run.
///
/// Fences are compared by equality and order, not by number. What depends on time is left out: leases and retentions are
/// long, and the time that is left of them is not compared.
///
/// # Panics
///
/// When an answer differs, with the seed, the history up to there, and both answers; and when the store fails.
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

/// Plays a history; else says how many steps were played, and what the last one showed.
async fn play<S: Store>(store: &S, steps: &[Step]) -> Result<(), (usize, String)> {
    let clock = Clock::manual(Timestamp::from_micros(1_700_000_000_000_000));
    let mut twins: Vec<Twin> = (0..KEYS).map(|_| Twin::new(clock.clone())).collect();
    for (n, step) in steps.iter().enumerate() {
        let played = twins[step.key].play(store, step.action).await;
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
