//! The attempt that a job can see, and the result of a check of an earlier attempt.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use uuid::Builder;

use super::renewal::Schedule;
use crate::clock::Stopwatch;
use crate::protocol::{Fence, Fingerprint, Grant, StorageKey};

/// The attempt under which a call is made.
#[derive(Clone)]
pub struct Attempt {
    key: StorageKey,
    fingerprint: Fingerprint,
    grant: Grant,
    marks: Arc<Marks>,
}

struct Marks {
    is_lost: AtomicBool,
    /// The schedule by which the lease is renewed; `None` if the lease needs no renewal.
    schedule: Option<Schedule>,
    /// Whether a completion of the record was sent within a transaction.
    #[cfg(feature = "postgres")]
    is_in_transaction: AtomicBool,
    /// Whether that completion succeeded, as far as this process knows.
    #[cfg(feature = "postgres")]
    is_completed: AtomicBool,
}

impl Attempt {
    /// Makes the attempt of a grant. `since_claim` was started before the claim.
    pub(crate) fn new(key: StorageKey, fingerprint: Fingerprint, grant: Grant, since_claim: Stopwatch) -> Self {
        let marks = Marks {
            is_lost: AtomicBool::new(false),
            schedule: grant.lease.map(|lease| Schedule::new(lease, since_claim)),
            #[cfg(feature = "postgres")]
            is_in_transaction: AtomicBool::new(false),
            #[cfg(feature = "postgres")]
            is_completed: AtomicBool::new(false),
        };
        Self {
            key,
            fingerprint,
            grant,
            marks: Arc::new(marks),
        }
    }

    /// Returns the number of this attempt under its key, from 1. An attempt that failed without
    /// effect and released its key does not count. Once an attempt was lost, all later attempts
    /// count.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.grant.attempt
    }

    /// Returns the fence, which grows with every attempt under a key. Pass it to a third party that
    /// can refuse an older fence. Such a third party refuses the request of a lost attempt that
    /// arrives late.
    #[must_use]
    pub const fn fence(&self) -> Fence {
        self.grant.owner.fence
    }

    /// Returns a key or an id for the third party: a UUID (version 8, RFC 9562 section 5.8). It is
    /// the same in every attempt under this key and input, differs for each `name`, and does not
    /// reveal the key.
    ///
    /// A third party that takes the id as an idempotency key, or as the id of the object to create,
    /// has one effect, however often the call runs. Set a secret if keys can be guessed and the
    /// third party shows an object to anyone who knows its id.
    #[must_use]
    pub fn id(&self, name: &str) -> String {
        self.derive(&self.fingerprint, name)
    }

    /// Returns an id like [`id`](Self::id) that does not depend on the input, for calls that the
    /// key alone identifies.
    pub(crate) fn id_of_key(&self, name: &str) -> String {
        self.derive(&Fingerprint::NONE, name)
    }

    fn derive(&self, input: &Fingerprint, name: &str) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("tower-idempotency 2026 id for a third party");
        hasher.update(self.key.as_bytes());
        hasher.update(input.digest());
        hasher.update(name.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Builder::from_custom_bytes(bytes).into_uuid().to_string()
    }

    /// Returns whether this attempt still owns its key, as far as the last renewal knows. If
    /// another attempt has taken the key over, the layer discards the result of this attempt.
    #[must_use]
    pub fn is_held(&self) -> bool {
        !self.marks.is_lost.load(Ordering::Relaxed)
    }

    pub(crate) fn lose(&self) {
        self.marks.is_lost.store(true, Ordering::Relaxed);
    }

    pub(super) fn schedule(&self) -> Option<&Schedule> {
        self.marks.schedule.as_ref()
    }

    pub(crate) const fn grant(&self) -> Grant {
        self.grant
    }

    pub(crate) const fn key(&self) -> &StorageKey {
        &self.key
    }

    /// Notes that a completion is sent within a transaction. From here on, only the record shows
    /// how the attempt ended.
    #[cfg(feature = "postgres")]
    pub(crate) fn set_in_transaction(&self) {
        self.marks.is_completed.store(false, Ordering::Release);
        self.marks.is_in_transaction.store(true, Ordering::Release);
    }

    /// Notes that a completion in a transaction failed. The lease may not have been renewed since
    /// an earlier completion, so its renewal is due now.
    #[cfg(feature = "postgres")]
    pub(crate) fn set_completion_failed(&self) {
        if let Some(schedule) = self.schedule() {
            schedule.hurry();
        }
    }

    /// Notes that the transaction has completed the record, and locks it until the transaction
    /// ends.
    #[cfg(feature = "postgres")]
    pub(crate) fn set_completed(&self) {
        self.marks.is_completed.store(true, Ordering::Release);
    }

    pub(super) fn is_completed(&self) -> bool {
        #[cfg(feature = "postgres")]
        return self.marks.is_completed.load(Ordering::Acquire);
        #[cfg(not(feature = "postgres"))]
        false
    }

    #[cfg(feature = "postgres")]
    pub(crate) fn is_in_transaction(&self) -> bool {
        self.marks.is_in_transaction.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt")
            .field("number", &self.number())
            .field("fence", &self.fence())
            .finish_non_exhaustive()
    }
}

/// The result of a check of a lost attempt. Its `Debug` form hides the value.
#[derive(Clone, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "there is no fourth")]
pub enum Recovered<T> {
    /// The attempt took effect. The layer records this value and returns it. On a server the value
    /// is the response, and if it has the mark [`StoreOutcomeOnly`](crate::StoreOutcomeOnly) or
    /// [`DoNotStore`](crate::DoNotStore), the layer stores only that the request is done.
    Happened(T),
    /// The attempt had no effect and never will have one, so the next attempt runs.
    NotHappened,
    /// The check could not decide, so the next attempt does not run. The next request runs the
    /// check again, until the attempts are used up.
    Unknown,
}

impl<T> fmt::Debug for Recovered<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Happened(_) => "Happened(..)",
            Self::NotHappened => "NotHappened",
            Self::Unknown => "Unknown",
        })
    }
}
