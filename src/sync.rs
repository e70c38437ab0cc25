//! The locks and atomics of all state that threads share in the layer, the engine and the memory
//! store.
//!
//! They are those of the standard library. `schedules/` compiles these modules with `--cfg
//! tower_idempotency_shuttle` or `--cfg tower_idempotency_loom`, so that a checker of schedules sees
//! every step that threads can interleave.

#[cfg(tower_idempotency_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(tower_idempotency_shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(any(tower_idempotency_loom, tower_idempotency_shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// The source of the seeds of hash maps.
#[cfg(not(any(tower_idempotency_loom, tower_idempotency_shuttle)))]
pub(crate) use std::hash::RandomState;
/// The same seed in every execution, because a replay needs each key in the same shard.
#[cfg(any(tower_idempotency_loom, tower_idempotency_shuttle))]
pub(crate) type RandomState = std::hash::BuildHasherDefault<std::hash::DefaultHasher>;
