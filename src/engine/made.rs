//! Attempts that a test makes without a claim.

use super::attempt::Attempt;
use super::held_lease::HeldLease;
use crate::clock::Stopwatch;
#[cfg(feature = "postgres")]
use crate::error::Error;
#[cfg(feature = "postgres")]
use crate::protocol::{Claim, Decision, IfLost};
use crate::protocol::{Fence, Fingerprint, Grant, Nonce, Owner, StorageKey};
#[cfg(feature = "postgres")]
use crate::store::{PostgresStore, Store};

/// The error of a completion in a transaction if the lease has no store.
#[cfg(feature = "postgres")]
pub(crate) const MADE_WITHOUT_STORE: Error =
    Error::configuration("the lease was made for a test and has no store; claim its key with `TestLease::claimed_in`");

/// The properties of an attempt that a test makes.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) storage_key: StorageKey,
    pub(crate) grant: Grant,
    pub(crate) is_superseded: bool,
    #[cfg(feature = "postgres")]
    pub(crate) store: Option<PostgresStore>,
}

impl Made {
    pub(crate) fn new(key: &str) -> Self {
        let owner = Owner {
            nonce: Nonce::random(),
            fence: Fence::new(1),
        };
        Self {
            storage_key: StorageKey::from_bytes(blake3::derive_key(
                "tower-idempotency 2026 key of a test",
                key.as_bytes(),
            )),
            grant: Grant {
                owner,
                attempt: 1,
                lease: None,
            },
            is_superseded: false,
            #[cfg(feature = "postgres")]
            store: None,
        }
    }

    pub(crate) fn attempt(&self) -> Attempt {
        let lease = HeldLease::new(self.grant, Stopwatch::start);
        if self.is_superseded {
            lease.set_superseded();
        }
        Attempt::new(self.storage_key, Fingerprint::NONE, lease)
    }

    /// Claims the key in the store, and takes the store's grant. Nothing renews the lease.
    #[cfg(feature = "postgres")]
    pub(crate) async fn claim_in(&mut self, store: &PostgresStore) -> Result<(), Error> {
        use std::time::Duration;

        const IN_USE: Error = Error::superseded(
            "the store already has a record of the test's key; choose a key that neither another test nor an earlier run of \
             this test has used",
        );
        const HOUR: Duration = Duration::from_secs(60 * 60);
        let claim = Claim {
            key: self.storage_key,
            fingerprint: Fingerprint::NONE,
            nonce: self.grant.owner.nonce,
            lease: HOUR,
            retention: HOUR,
            if_lost: IfLost::Refuse,
            max_attempts: 1,
        };
        match store.claim(&claim).await? {
            Decision::Execute(grant) | Decision::Recover(grant) => self.grant = grant,
            _ => return Err(IN_USE),
        }
        self.store = Some(store.clone());
        Ok(())
    }
}
