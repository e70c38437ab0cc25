//! Runs each model. A model that fails prints its order of steps if `LOOM_LOG=trace` is set.

use tower_idempotency_on_loom::models;

#[test]
fn a_drain_sees_work_that_is_handed_over() {
    models::a_drain_sees_work_that_is_handed_over();
}

#[test]
fn deferred_writes_stay_within_their_bounds() {
    models::deferred_writes_stay_within_their_bounds();
}

#[test]
fn one_of_two_renews_an_overdue_lease() {
    models::one_of_two_renews_an_overdue_lease();
}

#[test]
fn a_renewal_leaves_a_released_key_free() {
    models::a_renewal_leaves_a_released_key_free();
}

#[test]
fn owners_of_a_key_in_the_memory_store_see_the_effects_before_theirs() {
    models::owners_of_a_key_in_the_memory_store_see_the_effects_before_theirs();
}
