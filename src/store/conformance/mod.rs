//! Checks that a store fulfils its [contract](super::Store#contract), with one function per clause,
//! named after the clause.
//!
//! A store that passes [`all`] and [`differential`](differential()) behaves as the pure
//! [`Record`](crate::protocol::Record) does, alone and under contention. Five lines test any store:
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
//! # Requirements
//!
//! * **A multi-thread tokio runtime** with its timers. On a single thread, tasks switch only where
//!   the store awaits, so races between the steps of an operation may stay hidden.
//! * **A handle that can be cloned**, for the clauses about concurrency. Put a store that is not
//!   `Clone` into an [`Arc`](std::sync::Arc).
//! * **Room** for about 300 small records, two more per sequence of
//!   [`differential`](differential()), and 1 MiB of responses. All of them expire within an hour
//!   and ten minutes. Keys are random, so one store can serve many runs, also at the same time, and
//!   may hold other records.
//!
//! The functions check stores with leases and stores whose owners live as long as the store
//! ([`Grant::lease`](crate::protocol::Grant::lease) is `None`) in the same way. For the latter,
//! they skip the properties that only leases can show. If a store implements
//! [`claim_now`](super::Store::claim_now), they check it as they check
//! [`claim`](super::Store::claim).
//!
//! # Limits
//!
//! * [`durable`], [`unreadable_is_not_absent`] and [`bounded`] need the help of the store's author
//!   and are not in [`all`].
//! * A store passes even if it loses acknowledged writes when its machine dies or its network
//!   parts.
//! * The functions provoke races and cannot prove their absence. A run that passes is evidence.
//!
//! # Sensitivity
//!
//! The tests of this crate run the functions on about forty faulty stores. Each store leaves one
//! rule out, and the function of the rule's clause detects it. If single steps can show the fault,
//! 300 sequences of [`differential`](differential()) detect it, too.
//!
//! # Panics
//!
//! Every function panics if the store breaks the clause or fails. The message names the clause and
//! shows what the function saw.

mod claiming;
mod concurrency;
mod differential;
mod hooks;
mod outcomes;
mod owning;
mod probe;
mod time;
mod watching;

pub use claiming::{attempts_are_capped, fence_grows, fingerprint_first, repeatable};
pub use concurrency::{atomic, one_owner};
pub use differential::differential;
pub use hooks::{bounded, durable, unreadable_is_not_absent};
pub use outcomes::{exact_responses, late_completions_heal, rejection_is_unknown};
pub use owning::{owners_only, release_leaves_evidence};
pub use time::{own_clock, record_outlives_lease};
pub use watching::subscribe_then_look;

use super::Store;

/// Checks every clause that needs no help of the store's author: all except 13, 14 and 15.
///
/// Takes about two seconds of real time if the store has leases, because some clauses are about
/// time. Otherwise it takes less than one second. A store that needs more than a millisecond for an
/// operation needs more time, because most operations run one after another.
pub async fn all<S: Store + Clone>(store: &S) {
    Box::pin(fingerprint_first(store)).await;
    Box::pin(repeatable(store)).await;
    Box::pin(owners_only(store)).await;
    Box::pin(fence_grows(store)).await;
    Box::pin(release_leaves_evidence(store)).await;
    Box::pin(attempts_are_capped(store)).await;
    Box::pin(late_completions_heal(store)).await;
    Box::pin(exact_responses(store)).await;
    Box::pin(rejection_is_unknown(store)).await;
    Box::pin(subscribe_then_look(store)).await;
    Box::pin(own_clock(store)).await;
    Box::pin(record_outlives_lease(store)).await;
    Box::pin(one_owner(store)).await;
    Box::pin(atomic(store)).await;
}
