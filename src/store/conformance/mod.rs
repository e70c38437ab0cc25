//! Checks that a store keeps its [contract](super::Store#contract): one function per clause, named after it.
//!
//! A store that passes [`all`] and [`differential`](differential()) answers as the pure [`Record`](crate::protocol::Record)
//! does, alone and under contention. Five lines are a test of any store:
//!
//! ```
//! use tower_idempotency::{store::conformance, MemoryStore};
//!
//! # tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(async {
//! let store = MemoryStore::new();
//! conformance::all(&store).await;
//! conformance::differential(&store, 300, 7).await;
//! # });
//! ```
//!
//! # What it needs
//!
//! * **A multi-thread tokio runtime** with its timers. On one of a single thread, tasks change places only where the store
//!   awaits something, and races between its steps may stay hidden.
//! * **A handle that clones**, for the clauses about concurrency; a store that does not goes in an [`Arc`](std::sync::Arc).
//! * **Room** for some 300 small records, two more per sequence of [`differential`](differential()), and 1 MiB of answers; all
//!   expire within an hour and ten minutes. Keys are random: one store can serve many runs, also at a time, and may hold what
//!   it likes beside.
//!
//! Stores with leases and stores whose owners live as long as they do ([`Grant::lease`](crate::protocol::Grant::lease) is
//! `None`) are checked alike; what only leases can show is left out for the latter. Where a store answers
//! [`claim_now`](super::Store::claim_now), that is checked as [`claim`](super::Store::claim) is.
//!
//! # What it does not show
//!
//! * [`durable`], [`unreadable_is_not_absent`] and [`bounded`] need the store's help and are not in [`all`].
//! * A store that loses acknowledged writes when its machine dies, or its network parts, passes.
//! * Races are sought, not proved absent: a run that passes is evidence.
//!
//! # How much it notices
//!
//! The crate's tests run it on stores in which one rule each is left out, some forty. Each is noticed by the function of the
//! rule's clause, and those that single steps can show also by 300 sequences of [`differential`](differential()).
//!
//! # Panics
//!
//! Every function panics when the clause is broken, and when the store fails: a message says which clause it is and what
//! was seen. That is how it reports to `#[test]`.

mod claiming;
mod concurrency;
mod differential;
mod helped;
mod outcomes;
mod owning;
mod probe;
mod time;
mod watching;

pub use claiming::{attempts_are_capped, fence_grows, fingerprint_first, repeatable};
pub use concurrency::{atomic, one_owner};
pub use differential::differential;
pub use helped::{bounded, durable, unreadable_is_not_absent};
pub use outcomes::{exact_answers, late_completions_heal, rejection_is_unknown};
pub use owning::{owners_only, release_leaves_evidence};
pub use time::{own_clock, record_outlives_lease};
pub use watching::subscribe_then_look;

use super::Store;

/// Checks every clause that needs no help of the store: all but 13, 14 and 15.
///
/// Takes about two seconds of real time where there are leases, for the sake of the clauses about time, and less than one where
/// owners live as long as the store.
pub async fn all<S: Store + Clone>(store: &S) {
    Box::pin(fingerprint_first(store)).await;
    Box::pin(repeatable(store)).await;
    Box::pin(owners_only(store)).await;
    Box::pin(fence_grows(store)).await;
    Box::pin(release_leaves_evidence(store)).await;
    Box::pin(attempts_are_capped(store)).await;
    Box::pin(late_completions_heal(store)).await;
    Box::pin(exact_answers(store)).await;
    Box::pin(rejection_is_unknown(store)).await;
    Box::pin(subscribe_then_look(store)).await;
    Box::pin(own_clock(store)).await;
    Box::pin(record_outlives_lease(store)).await;
    Box::pin(one_owner(store)).await;
    Box::pin(atomic(store)).await;
}
