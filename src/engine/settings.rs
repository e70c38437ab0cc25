//! The settings that all jobs share.

use std::sync::Arc;
use std::time::Duration;

use crate::detach::{TaskTracker, MOST_DETACHED};
use crate::error::{Error, ErrorKind};
use crate::protocol::KeySpace;

#[derive(Clone, Debug)]
pub(crate) struct EngineSettings {
    pub(crate) space: KeySpace,
    pub(crate) lease: Duration,
    pub(crate) retention: Duration,
    pub(crate) wait: Duration,
    pub(crate) max_attempts: u32,
    pub(crate) settling: Duration,
    pub(crate) store_timeout: Duration,
    pub(crate) completion_timeout: Duration,
    pub(crate) max_detached: usize,
    pub(crate) tracker: Arc<TaskTracker>,
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            space: KeySpace::default(),
            lease: Duration::from_secs(30),
            retention: Duration::from_secs(24 * 60 * 60),
            wait: Duration::from_secs(30),
            max_attempts: 5,
            settling: Duration::ZERO,
            store_timeout: Duration::from_secs(5),
            completion_timeout: Duration::from_secs(10),
            max_detached: MOST_DETACHED,
            tracker: Arc::default(),
        }
    }
}

impl EngineSettings {
    /// Fails if too many executions run whose callers have left.
    pub(crate) fn check_load(&self) -> Result<(), Error> {
        const OVERLOADED: Error = Error::new(
            ErrorKind::Overloaded,
            "too many executions run whose callers left; try again later, or raise `with_max_detached`",
        );
        if self.tracker.detached() < self.max_detached {
            Ok(())
        } else {
            Err(OVERLOADED)
        }
    }

    /// Sets the limit of executions whose callers have left, at least 1: a limit of zero would refuse every execution.
    pub(crate) fn set_max_detached(&mut self, executions: usize) {
        self.max_detached = executions.max(1);
    }

    pub(crate) fn set_lease(&mut self, lease: Duration) {
        /// A shorter one may be over before a busy machine has renewed it.
        const SHORTEST_LEASE: Duration = Duration::from_secs(1);
        self.lease = lease.max(SHORTEST_LEASE);
    }
}
