//! Where records live: the [`Store`] trait with its contract, and the stores of this crate.
//!
//! [`MemoryStore`] is the embedded default; [`BoxStore`] is any store, chosen at run time.
//!
//! A store of your own is a struct with seven methods; where it can run Rust beside its data,
//! [`Record`](crate::protocol::Record) holds all the logic, and under 100 lines are enough (see `examples/custom_store.rs`).
//! Whether it keeps the contract is for the module `conformance` to say (feature `conformance`).

mod boxed;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod checked;
#[cfg(feature = "conformance")]
pub mod conformance;
mod late;
mod memory;
mod patience;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
#[cfg(any(feature = "postgres-rustls", feature = "redis-rustls"))]
mod tls;

use std::any::Any;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

pub use boxed::BoxStore;
#[cfg(feature = "postgres")]
pub(crate) use late::decide_late;
pub(crate) use late::{end_late, release_late, End, LostClaim, MANY_LOST_CLAIMS};
pub use memory::{MemoryStore, MemoryStoreBuilder, MemoryWatch, StoreStats};
pub(crate) use patience::{claim_in_time, in_time, limit_in_wait, Patience, LAST_LOOK, LATE};
#[cfg(feature = "postgres")]
pub(crate) use postgres::{attended, failed, make_table, Bound, Gate, Lent, Sending, Statement, TableName, Within};
#[cfg(feature = "postgres")]
pub use postgres::{PostgresStore, PostgresStoreBuilder, PostgresWatch};
#[cfg(feature = "redis")]
pub use redis::{RedisStore, RedisStoreBuilder, RedisWatch};

use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};

/// Keeps one record per storage key and changes it only by the operations below.
///
/// # Contract
///
/// 1. **Atomic.** Every operation is one atomic step on one key. A claim made of a read and a later write lets two run.
/// 2. **Own clock.** Leases and expiry are judged by the store's clock alone, never by the caller's.
/// 3. **One owner.** Of any number of concurrent claims of an absent key, exactly one is granted.
/// 4. **Record outlives lease.** A key whose lease ran out is lost, not absent, until its retention is over too.
/// 5. **Fingerprint first.** A claim with another fingerprint is a mismatch, whatever the state of the record.
/// 6. **Repeatable.** A claim with the nonce of the current owner gets that owner's grant again, of the same kind; a
///    completion by the owner who already completed succeeds and changes nothing.
/// 7. **Owners only.** `renew`, `complete` and `release` compare nonce *and* fence, and do nothing for anybody else.
/// 8. **The fence grows** with every owner of a key, as long as its record lives.
/// 9. **A release leaves evidence.** It deletes the record only when the owner's attempt was the only one ever.
/// 10. **Attempts are capped** by the claim's `max_attempts`; then the outcome is unknown.
/// 11. **Late completions heal.** The last owner of a lost or unknown record can still complete it. A record that
///     `resolve` has completed has no owner any more, because the operator's outcome may differ from the owner's. The
///     late owner gets [`Superseded`](crate::protocol::Completion::Superseded) with the outcome that stands, and `peek`
///     shows another nonce than the owner's.
/// 12. **Exact answers.** What is read back equals what was completed, byte for byte.
/// 13. **Durable before done.** When `complete` returns, the outcome survives whatever the store promises to survive.
/// 14. **Unreadable is not absent.** A record that cannot be read is an error of kind
///     [`CorruptRecord`](crate::ErrorKind::CorruptRecord).
/// 15. **Bounded.** A store that is full refuses new claims with [`StoreFull`](crate::ErrorKind::StoreFull) and evicts no record
///     before its expiry. It may turn the oldest kept answers into tombstones.
/// 16. **Subscribe, then look.** When `watch` has returned, every later change that ends the attempt wakes its future: a completion, a
///     release, a lease that is given up, a resolution. The exception is a change by a transaction that was open when
///     `watch` returned, if the documentation of the store says so. The future may wake without cause, and the caller
///     polls as well.
/// 17. **A rejection is unknown.** A completion with [`Rejected`](crate::protocol::Outcome::Rejected) makes the record
///     unknown, for the retention of the completion and for every claim, also one that would take over a lost key. Only
///     `resolve`, a later completion of the same owner or its release changes that. The release deletes the record if
///     the owner's attempt was the only one ever (clause 9), and otherwise leaves it unknown.
///
/// # Cancel safety
///
/// A future that is dropped before it is ready may or may not have taken effect; the layer repeats or releases as needed.
pub trait Store: Send + Sync + 'static {
    /// Resolves when the record may have changed.
    type Watch: Future<Output = ()> + Send + 'static;

    /// Asks for a key.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind). With [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) the claim may have
    /// taken effect: the layer repeats it, and releases the key later if the store has granted it. With any other kind the
    /// claim has taken no effect.
    fn claim(&self, claim: &Claim) -> impl Future<Output = Result<Decision, Error>> + Send;

    /// Claims a key without waiting. Returns `None`, which is the default, if only [`claim`](Self::claim) can decide.
    ///
    /// This is for stores whose records are in this process. The layer then spares a replay all that an execution
    /// needs. It calls this while it holds a lock, so this must take no longer than a look into a map. A store that has
    /// to make room for the record first returns `None`, and makes room in `claim`.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind); the claim has *not* taken effect, and the layer asks again with [`claim`](Self::claim).
    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        let _ = claim;
        None
    }

    /// How long a claim takes at most, before it fails by itself; `None`, the default, where nothing ends it. Whoever gives it
    /// that long, or longer, needs no timer of his own.
    fn claim_limit(&self) -> Option<Duration> {
        None
    }

    /// Gives the owner a lease that ends `lease` from now; zero ends it at once and keeps its evidence.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind); the renewal may have taken effect.
    fn renew(
        &self,
        key: &StorageKey,
        owner: Owner,
        lease: Duration,
    ) -> impl Future<Output = Result<Renewal, Error>> + Send;

    /// Records how the owner's attempt ended, for `retention` from now.
    ///
    /// The bytes of an answer may be slices of larger buffers. A store that holds answers in this process must
    /// [copy](crate::protocol::StoredResponse::to_exact) them.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind); the completion may have taken effect and can be repeated.
    fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> impl Future<Output = Result<Completion, Error>> + Send;

    /// Ends the owner's attempt without an outcome.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind); the release may have taken effect and can be repeated.
    fn release(&self, key: &StorageKey, owner: Owner) -> impl Future<Output = Result<Release, Error>> + Send;

    /// Ends a lost or unknown attempt by what an operator or a hook found out, if `fence` is still its fence. If this
    /// completes the record, the record gets a nonce that no claim has, so that the attempt does not own it any more.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind); the resolution may have taken effect.
    fn resolve(
        &self,
        key: &StorageKey,
        fence: Fence,
        resolution: &Resolution,
    ) -> impl Future<Output = Result<ResolveResult, Error>> + Send;

    /// Shows the record without changing it; `None` when it is absent or expired.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind).
    fn peek(&self, key: &StorageKey) -> impl Future<Output = Result<Option<Snapshot>, Error>> + Send;

    /// Returns the store that does the work: this store, or the store inside any number of `Arc`s and [`BoxStore`]s.
    #[doc(hidden)]
    fn innermost(&self) -> &dyn Any
    where
        Self: Sized,
    {
        self
    }

    /// Subscribes to changes of the record: from the moment this returns, a change resolves the watch.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind); the caller then polls.
    fn watch(&self, key: &StorageKey) -> impl Future<Output = Result<Self::Watch, Error>> + Send;
}

impl<S: Store> Store for Arc<S> {
    type Watch = S::Watch;

    fn innermost(&self) -> &dyn Any {
        (**self).innermost()
    }

    fn claim(&self, claim: &Claim) -> impl Future<Output = Result<Decision, Error>> + Send {
        (**self).claim(claim)
    }

    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        (**self).claim_now(claim)
    }

    fn claim_limit(&self) -> Option<Duration> {
        (**self).claim_limit()
    }

    fn renew(
        &self,
        key: &StorageKey,
        owner: Owner,
        lease: Duration,
    ) -> impl Future<Output = Result<Renewal, Error>> + Send {
        (**self).renew(key, owner, lease)
    }

    fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> impl Future<Output = Result<Completion, Error>> + Send {
        (**self).complete(key, owner, outcome, retention)
    }

    fn release(&self, key: &StorageKey, owner: Owner) -> impl Future<Output = Result<Release, Error>> + Send {
        (**self).release(key, owner)
    }

    fn resolve(
        &self,
        key: &StorageKey,
        fence: Fence,
        resolution: &Resolution,
    ) -> impl Future<Output = Result<ResolveResult, Error>> + Send {
        (**self).resolve(key, fence, resolution)
    }

    fn peek(&self, key: &StorageKey) -> impl Future<Output = Result<Option<Snapshot>, Error>> + Send {
        (**self).peek(key)
    }

    fn watch(&self, key: &StorageKey) -> impl Future<Output = Result<Self::Watch, Error>> + Send {
        (**self).watch(key)
    }
}
