//! The conformance kit: the stores of this crate pass it, and a store that lacks one rule fails it.

#[cfg(feature = "axum")]
#[path = "../../examples/custom_store.rs"]
#[expect(
    dead_code,
    unreachable_pub,
    reason = "tests/examples.rs runs the server of the example; this test needs only its store"
)]
mod custom_store;

use std::sync::Arc;

use futures::FutureExt;
use futures::future::join;
use tower_idempotency::store::conformance;
use tower_idempotency::{BoxStore, MemoryStore, Store};

use crate::support::ablated::{Ablated, ROOM, Rule};

/// The number of sequences that the documentation of the kit recommends.
const SEQUENCES: usize = 300;

/// Runs the checks that the author of a store runs.
async fn passes<S: Store + Clone>(store: S) {
    conformance::all(&store).await;
    conformance::differential(&store, SEQUENCES, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_store_passes() {
    passes(MemoryStore::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_behind_an_arc_passes() {
    passes(Arc::new(MemoryStore::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boxed_store_passes() {
    passes(BoxStore::from_url("memory:").await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_with_leases_passes() {
    passes(Ablated::new(Rule::Correct)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boxed_store_with_leases_passes() {
    passes(BoxStore::new(Ablated::new(Rule::Correct))).await;
}

#[tokio::test]
async fn a_store_passes_on_a_single_thread() {
    passes(MemoryStore::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_passes_for_many_at_a_time() {
    let store = Ablated::new(Rule::Correct);
    join(conformance::all(&store), conformance::all(&store)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_store_is_bounded() {
    let store = MemoryStore::builder().with_record_budget(500).build();
    conformance::bounded(&store, 500).await;
    let store = MemoryStore::builder()
        .with_record_budget(500)
        .with_byte_budget(1_000)
        .build();
    conformance::bounded(&store, 500).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_with_restart_damage_and_limits_passes() {
    let store = Ablated::new(Rule::Correct);
    conformance::durable(store.clone(), || async { store.reopened() }).await;
    let damage = |key| {
        store.damage(&key);
        std::future::ready(())
    };
    conformance::unreadable_is_not_absent(&store, damage).await;
    conformance::bounded(&Ablated::new(Rule::Correct), ROOM).await;
}

#[cfg(feature = "axum")]
#[tokio::test(flavor = "multi_thread")]
async fn the_store_of_the_example_passes() {
    use tower_idempotency::Clock;

    let directory = std::env::temp_dir().join(format!("tower-idempotency-conformance-{}", std::process::id()));
    let open = || custom_store::DirectoryStore::open(directory.clone(), Clock::system()).unwrap();
    let store = open();
    conformance::all(&store).await;
    conformance::differential(&store, 40, 1).await;
    conformance::durable(store.clone(), || async { open() }).await;
    let damage = |key: tower_idempotency::protocol::StorageKey| {
        let name: String = key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(directory.join(name), b"\x02 of a newer version").unwrap();
        std::future::ready(())
    };
    conformance::unreadable_is_not_absent(&store, damage).await;
    std::fs::remove_dir_all(directory).unwrap();
}

/// Runs a check that must fail, and returns its panic message.
async fn failure_message(rule: Rule, check: impl Future<Output = ()>) -> String {
    let failed = std::panic::AssertUnwindSafe(check).catch_unwind().await;
    let panicked = failed.expect_err(&format!("the check did not detect {rule:?}"));
    panicked.downcast_ref::<String>().unwrap().clone()
}

/// Each rule has a test: its clause detects that the rule is missing. `differential` detects it as
/// well, where a history of single steps can show it.
macro_rules! detected {
    ($($test:ident: $rule:ident, $clause:ident, $number:literal $(, $differential:ident)?;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $test() {
            let store = Ablated::new(Rule::$rule);
            let message = failure_message(Rule::$rule, conformance::$clause(&store)).await;
            assert!(message.contains(concat!("clause ", $number, " ")), "{message}");
            $(
                for seed in 0..4 {
                    let check = conformance::$differential(&store, SEQUENCES, seed);
                    let message = failure_message(Rule::$rule, check).await;
                    assert!(message.contains(&format!("(seed {seed}, sequence ")), "{message}");
                }
            )?
        }
    )*};
}

detected! {
    a_claim_in_two_steps_is_not_atomic: ClaimTwoSteps, atomic, 1;
    a_completion_in_two_steps_is_not_atomic: CompleteTwoSteps, atomic, 1;
    a_release_in_two_steps_is_not_atomic: ReleaseTwoSteps, atomic, 1;
    a_renewal_in_two_steps_is_not_atomic: RenewTwoSteps, atomic, 1;
    a_resolution_in_two_steps_is_not_atomic: ResolveTwoSteps, atomic, 1;
    a_caller_whose_clock_is_ahead_takes_a_live_lease: ClockOfCallers, own_clock, 2, differential;
    a_claim_in_two_steps_makes_two_owners: ClaimTwoSteps, one_owner, 3;
    a_lease_is_not_the_expiry_of_its_record: LeaseIsExpiry, record_outlives_lease, 4, differential;
    a_record_is_retained_when_its_lease_is_over: RetentionForgotten, record_outlives_lease, 4, differential;
    the_fingerprint_is_compared: FingerprintIgnored, fingerprint_first, 5, differential;
    the_fingerprint_of_a_completed_record_is_compared: FingerprintOfCompletedIgnored, fingerprint_first, 5, differential;
    claim_now_compares_the_fingerprint_too: ClaimNowIgnoresFingerprint, fingerprint_first, 5, differential;
    a_repeated_claim_keeps_its_fence: RepeatedClaimIsAnother, repeatable, 6, differential;
    a_repeated_claim_does_not_wait_for_itself: RepeatedClaimWaits, repeatable, 6, differential;
    a_repeated_recovery_still_asks_first: RepeatedRecoveryExecutes, repeatable, 6, differential;
    a_repeated_completion_changes_nothing: CompleteBesideRecord, repeatable, 6, differential;
    a_completion_compares_its_owner: CompleteByAnybody, owners_only, 7, differential;
    a_completion_compares_the_nonce: CompleteByFence, owners_only, 7, differential;
    a_completion_compares_the_fence: CompleteByNonce, owners_only, 7, differential;
    a_release_compares_its_owner: ReleaseByAnybody, owners_only, 7, differential;
    a_renewal_compares_its_owner: RenewByAnybody, owners_only, 7, differential;
    a_release_leaves_a_completed_record: ReleaseOfCompleted, owners_only, 7, differential;
    the_fence_grows: FenceStays, fence_grows, 8, differential;
    a_release_does_not_erase_an_earlier_attempt: ReleaseErases, release_leaves_evidence, 9, differential;
    a_release_of_an_only_attempt_frees_the_key: ReleaseKeepsOnlyAttempt, release_leaves_evidence, 9, differential;
    attempts_are_counted: AttemptStays, attempts_are_capped, 10, differential;
    attempts_have_a_cap: AttemptsUncapped, attempts_are_capped, 10, differential;
    an_unknown_outcome_stays_unknown: UnknownNotNoted, attempts_are_capped, 10, differential;
    an_unknown_outcome_never_runs_again: UnknownRunsAgain, attempts_are_capped, 10, differential;
    a_late_completion_is_accepted: CompleteLateRefused, late_completions_heal, 11, differential;
    an_unknown_outcome_can_be_completed: CompleteUnknownRefused, late_completions_heal, 11, differential;
    a_live_attempt_cannot_be_resolved: ResolveAlive, late_completions_heal, 11, differential;
    a_resolution_compares_the_fence: ResolveByAnyFence, late_completions_heal, 11, differential;
    a_resolution_ends_the_ownership: ResolveKeepsOwner, late_completions_heal, 11, differential;
    a_completed_record_cannot_be_resolved: ResolveCompleted, late_completions_heal, 11, differential;
    a_tombstone_never_runs_again: TombstoneRunsAgain, exact_responses, 12, differential;
    a_response_is_bytes_not_text: ResponseInUtf8, exact_responses, 12, differential;
    a_response_is_not_trimmed: ResponseTrimmed, exact_responses, 12, differential;
    a_rejection_can_be_resolved: RejectedIsCompleted, rejection_is_unknown, 17, differential;
}

// On paused time, because the checks wait for these faults.
#[tokio::test(start_paused = true)]
async fn a_watch_wakes_and_subscribes_before_it_is_polled() {
    for rule in [Rule::WatchNeverWakes, Rule::WatchSubscribesLate] {
        let message = failure_message(rule, conformance::subscribe_then_look(&Ablated::new(rule))).await;
        assert!(message.contains("clause 16 "), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_forgets_is_not_durable() {
    let reopen = || async { Ablated::new(Rule::Correct) };
    let message = failure_message(Rule::Correct, conformance::durable(Ablated::new(Rule::Correct), reopen)).await;
    assert!(message.contains("clause 13 "), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_read_is_not_absent() {
    let store = Ablated::new(Rule::CorruptIsAbsent);
    let damage = |key| {
        store.damage(&key);
        std::future::ready(())
    };
    let message = failure_message(
        Rule::CorruptIsAbsent,
        conformance::unreadable_is_not_absent(&store, damage),
    )
    .await;
    assert!(message.contains("clause 14 "), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_neither_evicts_nor_grows_and_reports_that_it_is_full() {
    for rule in [Rule::EvictsWhenFull, Rule::FullIsUnavailable, Rule::TakesUnbounded] {
        let message = failure_message(rule, conformance::bounded(&Ablated::new(rule), ROOM)).await;
        assert!(message.contains("clause 15 "), "{message}");
    }
}
