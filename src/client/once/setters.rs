//! The settings that all one-time calls share.

/// The setters of [`EngineSettings`], for whatever has them.
macro_rules! shared_setters {
    () => {
        /// Separates these calls from others in the same store; empty by default.
        #[must_use]
        pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
            self.engine().space.namespace = namespace.into();
            self
        }

        /// Keys the hashes of the keys, so that who reads the store, or an id made of one, cannot test guesses; none by default.
        /// Every process needs the same.
        ///
        /// # Errors
        ///
        /// [`Configuration`](crate::ErrorKind::Configuration) when it is shorter than 16 bytes.
        pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, crate::error::Error> {
            self.engine().space.set_secret(secret)?;
            Ok(self)
        }

        /// How long an attempt may go without a sign of life before it counts as lost; 30 s by default, at least 1 s. It is
        /// renewed at a third while the call runs.
        #[must_use]
        pub fn with_lease(mut self, lease: std::time::Duration) -> Self {
            self.engine().set_lease(lease);
            self
        }

        /// How long an answer is kept, from its completion; 24 hours by default. It should exceed the time over which your own
        /// callers, queues and jobs retry.
        #[must_use]
        pub fn with_retention(mut self, retention: std::time::Duration) -> Self {
            self.engine().retention = retention;
            self
        }

        /// How long to wait for another process, or another task, that is making the same call; 30 s by default.
        #[must_use]
        pub fn with_wait(mut self, wait: std::time::Duration) -> Self {
            self.engine().wait = wait;
            self
        }

        /// How many attempts a key gets in all; 5 by default, 1 or more. Then its outcome is unknown until it is resolved. Those that
        /// failed without effect count from when one was lost.
        #[must_use]
        pub fn with_max_attempts(mut self, attempts: u32) -> Self {
            self.engine().set_max_attempts(attempts);
            self
        }

        /// How long to let a lost attempt's request settle before it is asked what became of it; not at all by default. A request
        /// of a caller that died may still be under way: asked too early, the third party truly says that nothing is there, and
        /// then it arrives. This narrows the gap; only a third party that refuses an older [fence](Attempt::fence) shuts it.
        #[must_use]
        pub fn with_settle_delay(mut self, delay: std::time::Duration) -> Self {
            self.engine().settle_delay = delay;
            self
        }

        /// Sets how long one operation of the store may take. Default: 5 s.
        #[must_use]
        pub fn with_store_timeout(mut self, timeout: std::time::Duration) -> Self {
            self.engine().store_timeout = timeout;
            self
        }

        /// Sets how long the operation that records the outcome of a call is repeated. Default: 10 s. Without its caller, the
        /// operation is repeated for twelve times as long, two minutes by default.
        #[must_use]
        pub fn with_completion_timeout(mut self, timeout: std::time::Duration) -> Self {
            self.engine().completion_timeout = timeout;
            self
        }
    };
}
pub(super) use shared_setters;
