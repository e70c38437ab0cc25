//! Ends the tests if a simulation hangs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

/// A simulation takes some hundredths of a second.
const LIMIT: Duration = Duration::from_secs(60);

/// The simulations that run: a number, the seed, and the start.
static RUNNING: Mutex<Vec<(u64, u64, Instant)>> = Mutex::new(Vec::new());

/// Removes a simulation from the list when it ends.
pub(crate) struct Watch(u64);

impl Drop for Watch {
    fn drop(&mut self) {
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|(number, ..)| *number != self.0);
    }
}

#[expect(clippy::disallowed_methods, reason = "the real time, which no simulation sees")]
fn now() -> Instant {
    Instant::now()
}

/// Watches a simulation. If the simulation does not end, nothing can stop its thread, so the whole
/// process ends with a message.
pub(crate) fn watch(seed: u64) -> Watch {
    static START: Once = Once::new();
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    START.call_once(|| drop(std::thread::spawn(end_the_process_if_one_hangs)));
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.push((number, seed, now()));
    Watch(number)
}

fn end_the_process_if_one_hangs() {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let hanging = running
            .iter()
            .find(|(_, _, start)| now().duration_since(*start) > LIMIT);
        if let Some((_, seed, _)) = hanging {
            eprintln!(
                "The simulation of seed {seed} does not end: a task wakes itself again and again, or waits for a \
                 thread. Run it alone with SEED={seed}, and look at its stacks in a debugger."
            );
            std::process::abort();
        }
    }
}
