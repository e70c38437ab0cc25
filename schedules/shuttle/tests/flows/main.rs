//! The whole flows of the layer and of the memory store, under many orders of their tasks.

mod abandoned;
mod deferred;
mod duplicates;
mod handler;
mod memory;
mod remote;
mod renewal;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner};

/// Runs a test in as many orders of its tasks as the variable `SCHEDULES` says. One half of the
/// orders is random. The other half follows PCT, which finds bugs that need a task to starve.
///
/// A test that fails names the file of its order. If the variable `SCHEDULE` names such a file, the
/// test runs in that order only.
fn check(test: fn()) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.silence_warnings = true;
    if let Some(file) = std::env::var_os("SCHEDULE") {
        let replay = ReplayScheduler::new_from_file(file).expect("SCHEDULE must name a file that a failed test wrote");
        return run(replay, config, test);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).to_owned();
    config.failure_persistence = FailurePersistence::File(Some(folder));
    let schedules = std::env::var("SCHEDULES").map_or(2_000, |value| {
        let number = value.parse().ok().filter(|number| *number > 0);
        number.unwrap_or_else(|| panic!("SCHEDULES must be a whole number of at least 1, and is {value}"))
    });
    run(RandomScheduler::new(schedules / 2), config.clone(), test);
    run(PctScheduler::new(3, schedules.div_ceil(2)), config, test);
}

fn run(scheduler: impl Scheduler + 'static, config: Config, test: fn()) {
    let tried = catch_unwind(AssertUnwindSafe(|| Runner::new(scheduler, config).run(test)));
    if let Err(panic) = tried {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or_default();
        eprintln!("To run the order in the file above again:");
        eprintln!("SCHEDULE=<file> cargo test --manifest-path schedules/Cargo.toml --test flows -- --exact {test}");
        resume_unwind(panic);
    }
}
