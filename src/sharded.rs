//! A map of shards, each behind its own lock, for critical sections of a few instructions.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};
use std::sync::PoisonError;

use crate::sync::{Mutex, MutexGuard};

/// The number of shards of every map.
pub(crate) const SHARDS: usize = 64;

/// Sixty-four hash maps, each behind its own lock. A key always belongs to the same shard.
#[derive(Debug)]
pub(crate) struct Sharded<K, V, S> {
    shards: Box<[Mutex<HashMap<K, V, S>>]>,
    hasher: S,
}

impl<K: Eq + Hash, V, S: BuildHasher + Clone> Sharded<K, V, S> {
    pub(crate) fn new(hasher: S) -> Self {
        let shards = (0..SHARDS)
            .map(|_| Mutex::new(HashMap::with_hasher(hasher.clone())))
            .collect();
        Self { shards, hasher }
    }

    /// Locks the shard of `key`. The guard is not `Send`, so it cannot be held across an await.
    pub(crate) fn lock(&self, key: &K) -> MutexGuard<'_, HashMap<K, V, S>> {
        // The high bits choose the shard, because the map in the shard uses the low ones.
        let high = self.hasher.hash_one(key) >> 48;
        let shard = usize::try_from(high).unwrap_or(0) % SHARDS;
        lock(&self.shards[shard])
    }

    /// Locks the shard of this number, which must be less than [`SHARDS`].
    pub(crate) fn lock_nth(&self, shard: usize) -> MutexGuard<'_, HashMap<K, V, S>> {
        lock(&self.shards[shard])
    }

    /// Locks one shard after the other.
    pub(crate) fn each(&self, mut visit: impl FnMut(&mut HashMap<K, V, S>)) {
        for shard in 0..SHARDS {
            visit(&mut self.lock_nth(shard));
        }
    }
}

/// Locks a mutex. Its data is valid even after a panic. The only foreign code that runs under such
/// a lock is [`Store::claim_now`](crate::Store::claim_now), which does not touch the data.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
