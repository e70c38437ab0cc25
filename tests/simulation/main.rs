//! Simulates processes of an application from a seed, with every kind of fault, and checks the
//! guarantees over the history.
//!
//! The layer, its engine and the records are real. Each process has one or two runtimes, whose
//! clocks stand still unless the simulation moves them. The store and the bank are reached by
//! messages, which the simulation delays, loses and duplicates. One seed always gives one plan.
//!
//! `SIMULATIONS=1000000` sets the number of seeds, and `SIMULATIONS=500000..1000000` their range.
//! `SEED=17` runs one seed and prints its history.
//! The folder `found` has plans that violated a guarantee before a fault was fixed, or while a guard
//! was switched off.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once};

use ablated::Rule;
use plan::{Fault, Plan, Planned};
use world::{Counts, Simulated, World};

#[path = "../support/ablated/mod.rs"]
mod ablated;
mod audit;
mod bank;
mod entry;
mod history;
mod host;
mod link;
mod plan;
mod process;
mod random;
#[expect(dead_code, reason = "only some test binaries read a plain number")]
#[path = "../support/settings.rs"]
mod settings;
mod watchdog;
mod work;
mod world;

fn simulate(plan: &Plan, rule: Rule) -> Simulated {
    let _watch = watchdog::watch(plan.seed);
    World::new(plan, rule).run()
}

/// The number of histories that shrinking may try.
const SHRINK_LIMIT: usize = 3_000;

/// Removes faults, resolutions, operations and tries as long as the plan still violates the same
/// guarantee. Returns whether nothing was left to remove.
fn shrunk(mut plan: Plan, rule: Rule) -> (Plan, bool) {
    let mut tried = 0;
    // A violation begins with the name of its guarantee, such as `I2`.
    let name = |plan: &Plan| {
        let violations = simulate(plan, rule).violations;
        let first = violations.first()?.split(':').next()?;
        Some(first.to_owned())
    };
    let wanted = name(&plan);
    let violates = |plan: &Plan| name(plan) == wanted;
    loop {
        let mut smaller: Vec<Plan> = Vec::new();
        for at in 0..plan.faults.len() {
            let mut less = plan.clone();
            less.faults.remove(at);
            smaller.push(less);
        }
        for at in 0..plan.resolutions.len() {
            let mut less = plan.clone();
            less.resolutions.remove(at);
            smaller.push(less);
        }
        for at in 0..plan.operations.len() {
            let mut less = plan.clone();
            less.operations.remove(at);
            smaller.push(less);
            if plan.operations[at].tries.len() > 1 {
                let mut less = plan.clone();
                less.operations[at].tries.pop();
                smaller.push(less);
            }
        }
        let found = smaller.into_iter().find(|less| {
            tried += 1;
            tried <= SHRINK_LIMIT && violates(less)
        });
        match found {
            Some(less) => plan = less,
            None => return (plan, tried <= SHRINK_LIMIT),
        }
    }
}

fn report(plan: &Plan, rule: Rule) -> String {
    let (seed, tag) = (plan.seed, plan.tag());
    let (plan, is_shortest) = shrunk(plan.clone(), rule);
    let outcome = simulate(&plan, rule);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("simulation-{seed}.json"));
    fs::write(&file, serde_json::to_string_pretty(&plan).unwrap()).unwrap();
    let note = match is_shortest {
        true => "",
        false => "This history may not be the shortest one, because shrinking stopped at its limit.\n",
    };
    format!(
        "seed {seed} violates a guarantee ({rule:?}, {:?}, {:?}, lease {:?}, wait {:?}, retention {:?}):\n{}\n{}\n{note}\
         Repeat the whole history with SEED={seed}-{tag}. To keep this plan as a regression, copy\n{}\n\
         to tests/simulation/found.",
        plan.kind,
        plan.mode,
        plan.lease,
        plan.wait,
        plan.retention,
        outcome.history,
        outcome.violations.join("\n"),
        file.display(),
    )
}

/// Returns the plan of the variable `SEED`: a number, or a number and the tag of its plan.
fn plan_of_the_variable() -> Option<Plan> {
    let value = std::env::var("SEED").ok()?;
    let (seed, tag) = value.split_once('-').unwrap_or((&value, ""));
    let seed = seed
        .parse()
        .unwrap_or_else(|_| panic!("SEED must be a number, such as 17 or 17-1a2b3c4d, and is {value}"));
    let plan = Plan::of(seed);
    assert!(
        tag.is_empty() || tag == plan.tag(),
        "SEED={value} is from another version of the simulation, which made another plan from this seed. Check out \
         the commit that printed it, or search again with SIMULATIONS=100000.",
    );
    Some(plan)
}

/// The number of panics in this process, apart from those of handlers, which call no hook.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts panics, because a panic of a task of the layer would otherwise stay unseen.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            print(panic);
        }));
    });
}

/// Runs seeds on all cores until one violates a guarantee. Returns the first one found.
fn search(seeds: Range<u64>, rule: Rule) -> Option<u64> {
    let (seeds, found) = (Mutex::new(seeds), AtomicU64::new(u64::MAX));
    let counts = Mutex::new(Counts::default());
    count_panics();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while found.load(Ordering::Relaxed) == u64::MAX {
                    let Some(seed) = seeds.lock().unwrap().next() else {
                        return;
                    };
                    let outcome = simulate(&Plan::of(seed), rule);
                    counts.lock().unwrap().add(outcome.counts);
                    if !outcome.violations.is_empty() {
                        found.fetch_min(seed, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    println!("{rule:?}: {:?}", counts.into_inner().unwrap());
    assert_eq!(
        PANICS.load(Ordering::Relaxed),
        0,
        "a task panicked; its message is above"
    );
    Some(found.into_inner()).filter(|seed| *seed != u64::MAX)
}

#[test]
fn no_guarantee_is_violated_under_any_fault() {
    if let Some(plan) = plan_of_the_variable() {
        let outcome = simulate(&plan, Rule::Correct);
        println!("{plan:#?}\n{}", outcome.history);
        assert!(outcome.violations.is_empty(), "{}", report(&plan, Rule::Correct));
        return;
    }
    let seeds = settings::seeds("SIMULATIONS").unwrap_or(0..500);
    if let Some(seed) = search(seeds, Rule::Correct) {
        panic!("{}", report(&Plan::of(seed), Rule::Correct));
    }
}

#[test]
fn plans_that_once_violated_a_guarantee_are_correct() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/simulation/found");
    let mut tried = 0;
    for file in fs::read_dir(folder).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let plan: Plan = serde_json::from_str(&text).unwrap();
        let outcome = simulate(&plan, Rule::Correct);
        assert!(outcome.violations.is_empty(), "{}", report(&plan, Rule::Correct));
        tried += 1;
    }
    assert!(tried > 0);
}

/// A seed must show its violation again, so that a developer can look into it.
#[test]
fn one_seed_gives_one_history() {
    for seed in 0..if settings::is_thorough() { 2_000 } else { 200 } {
        let [first, second] = [(); 2].map(|()| simulate(&Plan::of(seed), Rule::Correct));
        assert_eq!(first.history, second.history, "seed {seed}");
    }
}

/// The rules whose violation the simulation does not show, each with the reason.
const NOT_SHOWN: [(Rule, &str); 8] = [
    (Rule::ClaimNowIgnoresFingerprint, "a remote store has no `claim_now`"),
    (Rule::CompleteByNonce, "no two owners choose one nonce"),
    (Rule::CorruptIsAbsent, "no record is damaged"),
    (Rule::EvictsWhenFull, "the store has room for all keys"),
    (Rule::FullIsUnavailable, "the store has room for all keys"),
    (Rule::TakesUnbounded, "the store has room for all keys"),
    (
        Rule::WatchNeverWakes,
        "a waiter also looks at the record from time to time, so it only waits longer",
    ),
    (
        Rule::WatchSubscribesLate,
        "a waiter also looks at the record from time to time, so it only waits longer",
    ),
];

/// Shows that the checks work: a failover that loses writes after processes have seen them must
/// violate a guarantee.
#[test]
fn a_failover_that_loses_seen_writes_is_found() {
    let is_failover = |planned: &Planned| matches!(planned.fault, Fault::Failover { .. });
    let plans = (0..500).map(Plan::of);
    let mut plans = plans.filter(|plan| plan.faults.iter().any(is_failover));
    let is_found = plans.any(|mut plan| {
        for planned in &mut plan.faults {
            if let Fault::Failover { loses_seen } = &mut planned.fault {
                *loses_seen = true;
            }
        }
        !simulate(&plan, Rule::Correct).violations.is_empty()
    });
    assert!(is_found);
}

/// Shows that the checks work: the store breaks each rule in turn, and some seed must violate a
/// guarantee.
#[test]
fn every_rule_that_the_store_breaks_is_found() {
    let mut missed = Vec::new();
    for rule in Rule::ALL {
        let is_shown = NOT_SHOWN.iter().all(|(known, _)| *known != rule);
        if is_shown && search(0..1_500, rule).is_none() {
            missed.push(rule);
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
