//! Simulates processes of an application from a seed, with every kind of fault, and checks the
//! guarantees over the history.
//!
//! The layer, its engine and the records are real. Each process has a runtime of its own, whose
//! clock stands still unless the simulation moves it. The store and the bank are reached by
//! messages, which the simulation delays, loses and duplicates. One seed always gives one plan.
//!
//! `SIMULATIONS=1000000` sets the number of seeds, and `SEED=17` runs one seed and prints its history.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use ablated::Rule;
use plan::Plan;
use world::{Outcome, World};

#[path = "../support/ablated/mod.rs"]
mod ablated;
mod audit;
mod bank;
mod history;
mod host;
mod link;
mod plan;
mod process;
mod random;
mod world;

fn simulate(plan: &Plan, rule: Rule) -> Outcome {
    World::new(plan, rule).run()
}

fn is_thorough() -> bool {
    std::env::var_os("THOROUGH").is_some()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {value}"))
    })
}

/// Removes faults, operations and tries for as long as the plan still violates a guarantee.
fn shrunk(mut plan: Plan, rule: Rule) -> Plan {
    let violates = |plan: &Plan| !simulate(plan, rule).violations.is_empty();
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
        match smaller.into_iter().find(|less| violates(less)) {
            Some(less) => plan = less,
            None => return plan,
        }
    }
}

fn report(plan: &Plan, rule: Rule) -> String {
    let plan = shrunk(plan.clone(), rule);
    let outcome = simulate(&plan, rule);
    format!(
        "seed {} violates a guarantee ({rule:?}, {:?}, lease {:?}, wait {:?}):\n{}\n{}\nRepeat it with SEED={}.",
        plan.seed,
        plan.mode,
        plan.lease,
        plan.wait,
        outcome.history,
        outcome.violations.join("\n"),
        plan.seed
    )
}

/// Runs seeds on all cores until one violates a guarantee. Returns the first one found.
fn search(seeds: u64, rule: Rule) -> Option<u64> {
    let (next, found) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let (messages, effects) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while found.load(Ordering::Relaxed) == u64::MAX {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let outcome = simulate(&Plan::of(seed), rule);
                    messages.fetch_add(outcome.messages, Ordering::Relaxed);
                    effects.fetch_add(outcome.effects, Ordering::Relaxed);
                    if !outcome.violations.is_empty() {
                        found.fetch_min(seed, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    println!("{rule:?}: {seeds} histories, {messages:?} messages, {effects:?} effects");
    Some(found.into_inner()).filter(|seed| *seed != u64::MAX)
}

#[test]
fn no_guarantee_is_violated_under_any_fault() {
    if let Some(seed) = number("SEED") {
        let plan = Plan::of(seed);
        let outcome = simulate(&plan, Rule::Correct);
        println!("{plan:#?}\n{}", outcome.history);
        assert!(outcome.violations.is_empty(), "{}", report(&plan, Rule::Correct));
        return;
    }
    let seeds = number("SIMULATIONS").unwrap_or(if is_thorough() { 5_000 } else { 1_000 });
    if let Some(seed) = search(seeds, Rule::Correct) {
        panic!("{}", report(&Plan::of(seed), Rule::Correct));
    }
}

/// A violation that a seed shows once must show again, or nobody could look into it.
#[test]
fn one_seed_gives_one_history() {
    for seed in 0..60 {
        let [first, second] = [(); 2].map(|()| simulate(&Plan::of(seed), Rule::Correct));
        assert_eq!(first.history, second.history, "seed {seed}");
    }
}

/// The rules whose violation the simulation does not show, each with the reason.
const NOT_SHOWN: [(Rule, &str); 10] = [
    (Rule::ClaimNowIgnoresFingerprint, "a remote store has no `claim_now`"),
    (Rule::CompleteByNonce, "no two owners choose one nonce"),
    (Rule::CompleteTwoSteps, "a takeover between the two steps is too rare"),
    (Rule::CorruptIsAbsent, "no record is damaged"),
    (Rule::EvictsWhenFull, "the store has room for all keys"),
    (Rule::FullIsUnavailable, "the store has room for all keys"),
    (Rule::RejectedIsCompleted, "no message is rejected"),
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

/// The rules that need more than 150 seeds.
const RARE: [Rule; 2] = [Rule::CompleteByFence, Rule::ResolveTwoSteps];

/// A simulation that finds nothing might look at nothing. So the store breaks each rule of the
/// protocol in turn, and some seed must violate a guarantee.
#[test]
fn every_rule_that_the_store_breaks_is_found() {
    let mut missed = Vec::new();
    for rule in Rule::ALL {
        let seeds = match RARE.contains(&rule) {
            true if is_thorough() => 5_000,
            false if NOT_SHOWN.iter().all(|(known, _)| *known != rule) => 150,
            _ => continue,
        };
        if search(seeds, rule).is_none() {
            missed.push(rule);
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
