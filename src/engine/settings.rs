//! The settings that every owner of a key has, on the server, the client and the receiver.

use std::time::Duration;

use crate::detach::{MOST_DETACHED, TaskTracker};
use crate::error::{Error, ErrorKind};
use crate::protocol::{Claim, Fingerprint, IfLost, KeySpace, Nonce, StorageKey};
use crate::store::StoreRetry;

/// The settings of keys. Their defaults are defined only here.
#[derive(Clone, Debug)]
pub(crate) struct EngineSettings {
    pub(crate) space: KeySpace,
    pub(crate) lease: Duration,
    pub(crate) retention: Duration,
    /// The longest time for which a duplicate waits for the owner of its key.
    pub(crate) wait: Duration,
    pub(crate) if_lost: IfLost,
    pub(crate) max_attempts: u32,
    /// The pause before the check of a lost attempt, in which the requests of that attempt may
    /// settle.
    pub(crate) settle_delay: Duration,
    /// The longest time for one operation of the store.
    pub(crate) store_timeout: Duration,
    /// The longest time for which an owner repeats the operation that ends its attempt.
    pub(crate) completion_timeout: Duration,
    /// The largest number of executions that may continue in this process after their callers have
    /// left (I10).
    pub(crate) max_detached: usize,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            space: KeySpace::default(),
            lease: Duration::from_secs(30),
            retention: Duration::from_secs(24 * 60 * 60),
            wait: Duration::from_secs(30),
            if_lost: IfLost::Refuse,
            max_attempts: 5,
            settle_delay: Duration::ZERO,
            store_timeout: Duration::from_secs(5),
            completion_timeout: Duration::from_secs(10),
            max_detached: MOST_DETACHED,
        }
    }
}

impl EngineSettings {
    /// Fails if too many executions run whose callers have left.
    pub(crate) fn check_load(&self, tracker: &TaskTracker) -> Result<(), Error> {
        const OVERLOADED: Error = Error::new(
            ErrorKind::Overloaded,
            "too many executions are running whose callers have left; try again later, or raise `with_max_detached`",
        );
        if tracker.detached() < self.max_detached {
            Ok(())
        } else {
            Err(OVERLOADED)
        }
    }

    /// Sets the limit of executions whose callers have left, at least 1. A limit of zero would
    /// refuse every execution.
    pub(crate) fn set_max_detached(&mut self, executions: usize) {
        self.max_detached = executions.max(1);
    }

    /// Sets the lease, at least 1 s. A busy machine may not renew a shorter lease in time.
    pub(crate) fn set_lease(&mut self, lease: Duration) {
        const SHORTEST_LEASE: Duration = Duration::from_secs(1);
        self.lease = lease.max(SHORTEST_LEASE);
    }

    /// Sets the largest number of attempts at a key, at least 1.
    pub(crate) fn set_max_attempts(&mut self, attempts: u32) {
        self.max_attempts = attempts.max(1);
    }

    /// Returns the claim of a key.
    pub(crate) const fn claim(&self, key: StorageKey, fingerprint: Fingerprint, nonce: Nonce) -> Claim {
        Claim {
            key,
            fingerprint,
            nonce,
            lease: self.lease,
            retention: self.retention,
            if_lost: self.if_lost,
            max_attempts: self.max_attempts,
        }
    }

    /// Returns the limits within which an owner repeats an operation of the store.
    pub(crate) const fn retry(&self) -> StoreRetry {
        StoreRetry::new(self.store_timeout, self.completion_timeout)
    }
}
