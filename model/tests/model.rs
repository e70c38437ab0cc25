//! The protocol keeps its promises under faults, and breaks one of them without any of its rules.
//!
//! Each exploration is complete within its bounds, and prints them with the number of its states. If
//! `THOROUGH` is set, there is another process or there are more faults.

use std::collections::BTreeSet;

use idempotency_model::rules::{IfLost, Rule};
use idempotency_model::{
    ATTEMPTS, Budget, CLAIMANT, Configuration, EFFECTS, EVIDENCE, Effect, FENCES, ONE_EXECUTION, OWNER, REQUEST,
    SAME_RESPONSE, STORED, STUCK, USEFUL, WAIT, World,
};
use stateright::{Checker, HasDiscoveries, Model, Path};

/// The promise of the protocol: at most one effect, at least one, or exactly one by a check or by a
/// transaction.
#[derive(Clone, Copy)]
enum Promise {
    AtMostOnce,
    AtLeastOnce,
    Checked,
    Transaction,
}

/// Returns the protocol for two processes with the same request.
fn protocol(promise: Promise, budget: Budget) -> Configuration {
    let (if_lost, effect) = match promise {
        Promise::AtMostOnce => (IfLost::Refuse, Effect::Anywhere),
        Promise::AtLeastOnce => (IfLost::Execute, Effect::Anywhere),
        Promise::Checked => (IfLost::Recover, Effect::Fenced),
        Promise::Transaction => (IfLost::Execute, Effect::InTransaction),
    };
    Configuration {
        fingerprints: vec![0, 0],
        if_lost,
        effect,
        budget,
        without: None,
    }
}

/// How often an event may happen that only a thorough exploration has.
fn thorough() -> u8 {
    u8::from(std::env::var_os("THOROUGH").is_some_and(|value| !value.is_empty() && value != "0"))
}

fn faults() -> Budget {
    Budget {
        ticks: 2,
        lost_messages: 1,
        duplicated_messages: thorough(),
        crashes: 1,
        failures: 1,
        hang_ups: thorough(),
        renewals: 1,
        resolutions: 1,
        ..Budget::default()
    }
}

/// Messages that arrive twice, and two resolutions of the same attempt.
fn duplicates() -> Budget {
    Budget {
        ticks: 2,
        duplicated_messages: 1,
        crashes: 1,
        failures: 1,
        renewals: thorough(),
        resolutions: 1 + thorough(),
        ..Budget::default()
    }
}

fn hang_ups() -> Budget {
    Budget {
        ticks: 2,
        lost_messages: 1,
        failures: 1,
        hang_ups: 1,
        ..Budget::default()
    }
}

fn failover() -> Budget {
    Budget {
        ticks: 1,
        lost_messages: thorough(),
        crashes: 1,
        failures: 1,
        failovers: 1,
        unacknowledged: 1,
        ..Budget::default()
    }
}

fn clock_turned_back() -> Budget {
    Budget {
        ticks: 2,
        turns: 1,
        lost_messages: 1,
        crashes: 1,
        failures: 1,
        renewals: thorough(),
        ..Budget::default()
    }
}

fn damage() -> Budget {
    Budget {
        ticks: 2,
        crashes: 1,
        failures: 1,
        renewals: 1,
        damages: 1,
        ..Budget::default()
    }
}

/// Returns the protocol for three processes. `fingerprints` has the fingerprint of each request.
fn three(promise: Promise, fingerprints: [u8; 3]) -> Configuration {
    let budget = Budget {
        ticks: 2,
        lost_messages: thorough(),
        duplicated_messages: thorough(),
        crashes: 1 + thorough(),
        failures: thorough(),
        ..Budget::default()
    };
    Configuration {
        fingerprints: fingerprints.to_vec(),
        ..protocol(promise, budget)
    }
}

/// Explores every state. Panics with the shortest path to a broken promise.
fn holds(name: &str, configuration: Configuration) {
    let bounds = format!("{configuration:?}");
    let checker = configuration.checker().spawn_bfs().join();
    println!(
        "{name}: {} unique states by {} steps, at most {} deep: {bounds}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
    );
    for (property, path) in checker.discoveries() {
        assert!(property == USEFUL, "{name} breaks \"{property}\":{}", shown(path));
    }
    assert!(checker.discovery(USEFUL).is_some(), "{name}: no run is useful");
}

fn shown(path: Path<World, idempotency_model::Action>) -> String {
    let last = path.last_state().clone();
    let steps: Vec<_> = path
        .into_actions()
        .iter()
        .map(|action| format!("\n  {action:?}"))
        .collect();
    format!("{}\nThe last state is {last:#?}", steps.concat())
}

#[test]
fn at_most_once_holds() {
    holds("at most once", protocol(Promise::AtMostOnce, faults()));
    holds("at most once, duplicates", protocol(Promise::AtMostOnce, duplicates()));
    holds("at most once, hang-ups", protocol(Promise::AtMostOnce, hang_ups()));
}

#[test]
fn at_least_once_holds() {
    holds("at least once", protocol(Promise::AtLeastOnce, faults()));
    holds(
        "at least once, duplicates",
        protocol(Promise::AtLeastOnce, duplicates()),
    );
}

#[test]
fn exactly_once_by_a_check_holds() {
    holds("checked", protocol(Promise::Checked, faults()));
    holds("checked, duplicates", protocol(Promise::Checked, duplicates()));
}

#[test]
fn exactly_once_in_a_transaction_holds() {
    holds("transaction", protocol(Promise::Transaction, faults()));
    holds("transaction, duplicates", protocol(Promise::Transaction, duplicates()));
}

#[test]
fn the_protocol_holds_for_three_processes() {
    holds("three at most once", three(Promise::AtMostOnce, [0, 0, 1]));
    holds("three at least once", three(Promise::AtLeastOnce, [0, 0, 0]));
    holds("three checked", three(Promise::Checked, [0, 0, 0]));
}

#[test]
fn the_protocol_holds_at_a_failover() {
    holds("failover at most once", protocol(Promise::AtMostOnce, failover()));
    holds("failover checked", protocol(Promise::Checked, failover()));
}

#[test]
fn the_protocol_holds_if_the_clock_is_turned_back() {
    holds("clock at most once", protocol(Promise::AtMostOnce, clock_turned_back()));
    holds(
        "clock at least once",
        protocol(Promise::AtLeastOnce, clock_turned_back()),
    );
    holds("clock checked", protocol(Promise::Checked, clock_turned_back()));
}

#[test]
fn the_protocol_holds_if_a_record_becomes_unreadable() {
    holds("damage at most once", protocol(Promise::AtMostOnce, damage()));
    holds("damage checked", protocol(Promise::Checked, damage()));
}

/// Returns the promise that breaks without a rule, and a protocol that holds with it.
fn consequence(rule: Rule) -> (&'static str, Configuration) {
    use Promise::{AtLeastOnce, AtMostOnce, Checked};
    let of = protocol;
    match rule {
        Rule::AttemptsAreCapped => (ATTEMPTS, three(AtLeastOnce, [0, 0, 0])),
        Rule::CheckRaisesFence => (EFFECTS, of(Checked, faults())),
        Rule::ClaimIsAtomic => (ONE_EXECUTION, of(AtMostOnce, Budget::default())),
        Rule::ClaimIsReplicated => (EFFECTS, of(AtMostOnce, failover())),
        Rule::ClaimOfTheGoneEnds => (CLAIMANT, of(AtMostOnce, hang_ups())),
        Rule::CompleteByOwner => (OWNER, of(AtLeastOnce, faults())),
        Rule::FenceGrows => (FENCES, of(AtLeastOnce, faults())),
        Rule::FingerprintFirst => (REQUEST, three(AtMostOnce, [0, 0, 1])),
        Rule::HangUpChangesNothing => (EFFECTS, of(AtMostOnce, hang_ups())),
        Rule::LeaseIsCutBack => (WAIT, of(AtMostOnce, clock_turned_back())),
        Rule::LeaseIsNotExpiry => (EFFECTS, of(AtMostOnce, faults())),
        Rule::LostIsUnknown => (EFFECTS, of(AtMostOnce, faults())),
        Rule::OneClock => (ONE_EXECUTION, of(AtLeastOnce, faults())),
        Rule::ReleaseByOwner => (OWNER, of(AtLeastOnce, faults())),
        Rule::ReleaseLeavesEvidence => (EVIDENCE, of(AtLeastOnce, faults())),
        Rule::RenewByOwner => (OWNER, of(AtLeastOnce, faults())),
        Rule::RepeatedClaimIsSameGrant => (WAIT, of(AtMostOnce, faults())),
        Rule::RepeatedClaimIsSameKind => (EFFECTS, of(Checked, faults())),
        Rule::ResolveComparesFence => (EVIDENCE, of(AtLeastOnce, faults())),
        Rule::ResolveEndsOwnership | Rule::SupersededDiscards => (SAME_RESPONSE, of(AtMostOnce, faults())),
        Rule::ResolveSparesTheLiving => (OWNER, of(AtMostOnce, faults())),
        Rule::RetentionIsLong => (EFFECTS, of(AtMostOnce, faults())),
        Rule::StoredBeforeSeen => (STORED, of(AtMostOnce, faults())),
        Rule::UnreadableIsNotAbsent => (EFFECTS, of(AtMostOnce, damage())),
        Rule::WaiterClaimsAgain => (STUCK, of(AtMostOnce, faults())),
    }
}

#[test]
fn every_rule_is_necessary() {
    for rule in Rule::ALL {
        let (promise, mut configuration) = consequence(rule);
        configuration.without = Some(rule);
        let is_broken = HasDiscoveries::AnyOf(BTreeSet::from([promise]));
        let checker = configuration.checker().finish_when(is_broken).spawn_bfs().join();
        let states = checker.unique_state_count();
        let path = checker.discovery(promise);
        let path = path.unwrap_or_else(|| panic!("{states} states without {rule:?} do not break \"{promise}\""));
        let steps = path.into_actions().len();
        println!("without {rule:?}, {steps} steps break \"{promise}\"; found in {states} states");
    }
}
