//! The settings that all one-time calls share.

/// Defines the setters of [`EngineSettings`]. The type must have a method `engine`. The arguments are
/// the documentation of those setters whose meaning differs.
macro_rules! shared_setters {
    ($(#[$at_least_once:meta])* at_least_once; $(#[$on_lost:meta])* on_lost;) => {
        $(#[$at_least_once])*
        #[must_use]
        pub fn at_least_once(self) -> Self {
            self.on_lost(OnLost::Execute)
        }

        $(#[$on_lost])*
        #[must_use]
        pub fn on_lost(mut self, on_lost: OnLost) -> Self {
            self.engine().if_lost = on_lost.into();
            self
        }

        /// Sets a name that separates these calls from others in the same store. Default: empty.
        #[must_use]
        pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
            self.engine().space.namespace = namespace.into();
            self
        }

        /// Sets a secret that keys the hashes of the keys, so that a reader of the store, or of an
        /// id that is made of a key, cannot test guesses. Default: none. Every process needs the
        /// same secret.
        ///
        /// # Errors
        ///
        /// [`Configuration`](crate::ErrorKind::Configuration) if the secret is shorter than
        /// 16 bytes.
        pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, crate::error::Error> {
            self.engine().space.set_secret(secret)?;
            Ok(self)
        }

        /// Sets how long an attempt may go without a renewal before it counts as lost. At least
        /// 1 s. Default: 30 s. The lease is renewed after each third of this time while the call
        /// runs, so the call may run for longer than the lease.
        #[must_use]
        pub fn with_lease(mut self, lease: std::time::Duration) -> Self {
            self.engine().set_lease(lease);
            self
        }

        /// Sets how long a response is stored, from the completion of its call. Default: 24 hours.
        /// It should be longer than the time over which your own callers, queues and jobs retry.
        #[must_use]
        pub fn with_retention(mut self, retention: std::time::Duration) -> Self {
            self.engine().retention = retention;
            self
        }

        /// Sets how long a call waits for another process, or another task, that is making the same
        /// call. Default: 30 s. A call that waits holds no capacity of its client. Once the key is
        /// free, the time until the client is ready counts as waiting time. If it runs out, the call
        /// ends with [`InFlight`](crate::client::OnceError::InFlight).
        #[must_use]
        pub fn with_wait(mut self, wait: std::time::Duration) -> Self {
            self.engine().wait = wait;
            self
        }

        /// Sets the largest number of attempts at a key. At least 1. Default: 5. If the last
        /// attempt is lost, the outcome is unknown until an operator resolves the key or the
        /// retention is over. Attempts that failed without effect count only after an attempt was
        /// lost.
        #[must_use]
        pub fn with_max_attempts(mut self, attempts: u32) -> Self {
            self.engine().set_max_attempts(attempts);
            self
        }

        /// Sets the pause before the check of a lost attempt, so that the request of that attempt
        /// can settle. Default: none. The request of a caller that died may still be in flight. If
        /// the check comes too early, the third party correctly reports no effect, and then the
        /// request arrives. The pause narrows this gap. Only a third party that refuses an older
        /// [fence](Attempt::fence) closes it.
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

        /// Sets how long the operation that records the outcome of a call is repeated while the
        /// store fails. Default: 10 s. After that, a task without a caller repeats the operation
        /// for twelve times as long, two minutes by default.
        #[must_use]
        pub fn with_completion_timeout(mut self, timeout: std::time::Duration) -> Self {
            self.engine().completion_timeout = timeout;
            self
        }
    };
}
pub(super) use shared_setters;
