//! The locks and atomics of all state that threads share in the layer, the engine and the memory
//! store.
//!
//! They are those of the standard library. `schedules/` compiles these modules with `--cfg shuttle`
//! or `--cfg loom`, so that a checker of schedules sees every step that threads can interleave.

#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// The source of the seeds of hash maps.
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::hash::RandomState;
/// The same seed in every execution, because a replay needs each key in the same shard.
#[cfg(any(loom, shuttle))]
pub(crate) type RandomState = std::hash::BuildHasherDefault<std::hash::DefaultHasher>;
