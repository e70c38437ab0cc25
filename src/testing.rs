//! Leases and attempts for unit tests of handlers, without a layer.
//!
//! A test can call a handler that takes a [`Lease`] as a plain function. The page
//! [`guide::testing`](crate::guide::testing) shows this, and the tests of a whole application.

use crate::client::Attempt;
use crate::engine::Made;
use crate::protocol::{Fence, IdempotencyKey, KeyParser};
use crate::receiver;
use crate::server::Lease;

/// Makes leases and attempts with the properties that a test sets.
///
/// ```
/// use tower_idempotency::testing::TestLease;
/// use tower_idempotency::Lease;
///
/// async fn pay(lease: Lease) -> String {
///     match lease.attempt().is_first() {
///         true => format!("charged with key {}", lease.derive_key("charge")),
///         false => "asked the bank first".to_owned(),
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let first = TestLease::new("order-7");
/// let key = first.for_server().derive_key("charge");
/// assert_eq!(pay(first.for_server()).await, format!("charged with key {key}"));
/// assert_eq!(pay(first.with_attempt(2).for_server()).await, "asked the bank first");
/// # }
/// ```
///
/// All three kinds of one `TestLease` have the same key. The keys and ids that they derive are the
/// same in every run and for every attempt, as under a layer. They differ from those of a layer.
#[derive(Clone, Debug)]
#[must_use = "a TestLease only makes leases; call for_server, for_receiver or for_client"]
pub struct TestLease {
    key: IdempotencyKey,
    made: Made,
}

impl TestLease {
    /// Creates the first attempt under `key`, with fence 1, whose key is held.
    ///
    /// # Panics
    ///
    /// If the key is not 1 to 255 bytes of visible ASCII.
    #[track_caller]
    #[expect(clippy::panic, reason = "it is for tests")]
    pub fn new(key: &str) -> Self {
        match KeyParser::default().parse(key.as_bytes()) {
            Ok(parsed) => Self {
                made: Made::new(parsed.as_str()),
                key: parsed,
            },
            Err(error) => panic!("{error}"),
        }
    }

    /// Sets the number of the attempt, at least 1. Default: 1. A number of 2 or more means that an
    /// earlier attempt was lost. Raises the fence to the same number, if it is lower, because each
    /// attempt has a higher fence than the one before.
    pub fn with_attempt(mut self, attempt: u32) -> Self {
        let grant = &mut self.made.grant;
        grant.attempt = attempt.max(1);
        grant.owner.fence = grant.owner.fence.max(Fence::new(u64::from(grant.attempt)));
        self
    }

    /// Sets the fence. Default: 1.
    pub fn with_fence(mut self, fence: Fence) -> Self {
        self.made.grant.owner.fence = fence;
        self
    }

    /// Makes leases whose key another attempt has taken over. `is_held` then returns false.
    pub fn superseded(mut self) -> Self {
        self.made.is_superseded = true;
        self
    }

    /// Claims the key in `store` for an hour, so that `complete_in` of a lease works in a
    /// transaction of the test. Uses the attempt and the fence that the store gives. Without this
    /// call, `complete_in` fails with [`Configuration`](crate::ErrorKind::Configuration).
    ///
    /// The record outlives the test. It stays for two hours, or for 24 hours from its completion.
    /// If the same database serves several runs of the test, use a key of this run, such as one
    /// with a random part.
    ///
    /// # Errors
    ///
    /// [`Superseded`](crate::ErrorKind::Superseded) if the store has a record of the key, from
    /// another test or from an earlier run of the same test. Choose another key. Other errors are
    /// those of [`Store::claim`](crate::Store::claim).
    #[cfg(feature = "postgres")]
    pub async fn claimed_in(mut self, store: &crate::store::PostgresStore) -> Result<Self, crate::error::Error> {
        self.made.claim_in(store).await?;
        Ok(self)
    }

    /// Returns the lease of a request, for a handler behind an
    /// [`IdempotencyLayer`](crate::IdempotencyLayer).
    #[must_use]
    pub fn for_server(&self) -> Lease {
        Lease::made(self.key.clone(), &self.made)
    }

    /// Returns the lease of a message, for a handler behind a
    /// [`ReceiverLayer`](receiver::ReceiverLayer).
    #[must_use]
    pub fn for_receiver(&self) -> receiver::MessageLease {
        receiver::MessageLease::made(&self.made)
    }

    /// Returns the attempt of a call, for a function that `client::once` runs.
    #[must_use]
    pub fn for_client(&self) -> Attempt {
        self.made.attempt()
    }
}
