//! Stores of records: the [`Store`] trait with its contract, and the stores of this crate.
//!
//! [`MemoryStore`] is the embedded default. [`BoxStore`] holds a store that is chosen at run time.
//!
//! A store of your own is a struct with seven methods. If the store can run Rust next to its data,
//! [`Record`](crate::protocol::Record) holds all the logic, and fewer than 100 lines are enough
//! (see `examples/custom_store.rs`). The module `conformance` (feature `conformance`) checks that a
//! store fulfils the contract.

mod boxed;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod checked;
#[cfg(feature = "conformance")]
pub mod conformance;
mod deferred;
mod memory;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod retry;
#[cfg(any(feature = "postgres-rustls", feature = "redis-rustls"))]
mod tls;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

pub use boxed::BoxStore;
#[cfg(feature = "postgres")]
pub(crate) use deferred::resolve_transaction_late;
pub(crate) use deferred::{AttemptEnd, LostClaim, MANY_LOST_CLAIMS, record_end, release_lost_claim};
pub use memory::{MemoryStore, MemoryStoreBuilder, MemoryWatch, StoreStats};
#[cfg(feature = "postgres")]
pub(crate) use postgres::{
    Bound, Gate, PooledConnection, Sending, Statement, TableName, Within, failed, make_table, run_detachable,
    statements,
};
#[cfg(feature = "postgres")]
pub use postgres::{PostgresStore, PostgresStoreBuilder, PostgresWatch};
#[cfg(feature = "redis")]
pub use redis::{RedisStore, RedisStoreBuilder, RedisWatch};
pub(crate) use retry::{LAST_LOOK, StoreRetry, TIMED_OUT, claim_with_timeout, limit_in_wait, with_timeout};

use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};

/// A store of one record per storage key, which only the operations below change.
///
/// # Contract
///
/// 1. **Atomic.** Every operation is one atomic step on one key. A claim that consists of a read
///    and a later write lets two attempts run.
/// 2. **Own clock.** Only the store's clock decides about leases and expiry, never the caller's
///    clock.
/// 3. **One owner.** Of any number of concurrent claims of an absent key, the store grants exactly
///    one.
/// 4. **Record outlives lease.** A key whose lease ran out is lost, not absent, until its retention
///    is over too.
/// 5. **Fingerprint first.** A claim with another fingerprint is a mismatch, whatever the state of
///    the record.
/// 6. **Repeatable.** A claim with the nonce of the current owner gets that owner's grant again, of
///    the same kind. A completion by the owner that already completed succeeds and changes nothing.
/// 7. **Owners only.** `renew`, `complete` and `release` compare nonce *and* fence, and change
///    nothing for any other caller.
/// 8. **The fence grows** with every owner of a key, as long as its record lives.
/// 9. **A release leaves evidence.** It deletes the record only if the owner's attempt was the only
///    one ever.
/// 10. **Attempts are capped** by the claim's `max_attempts`. After the last one the outcome is
///     unknown.
/// 11. **Late completions heal.** The last owner of a lost or unknown record can still complete it.
///     A record that `resolve` has completed has no owner any more, because the operator's outcome
///     may differ from the owner's. The late owner gets
///     [`Superseded`](crate::protocol::Completion::Superseded) with the outcome that stands, and
///     `peek` shows another nonce than the owner's.
/// 12. **Exact responses.** The store returns exactly the bytes that were completed.
/// 13. **Durable before done.** When `complete` returns, the outcome survives every failure that
///     the store promises to survive.
/// 14. **Unreadable is not absent.** A record that cannot be read is an error of kind
///     [`CorruptRecord`](crate::ErrorKind::CorruptRecord).
/// 15. **Bounded.** A store that is full refuses new claims with
///     [`StoreFull`](crate::ErrorKind::StoreFull) and evicts no record before its expiry. It may
///     turn the oldest stored responses into tombstones.
/// 16. **Subscribe, then look.** When `watch` has returned, every later change that ends the
///     attempt wakes its future: a completion, a release, a lease that is given up, a resolution.
///     The exception is a change by a transaction that was open when `watch` returned, if the
///     documentation of the store says so. The future may wake without cause, and the caller polls
///     as well.
/// 17. **A rejection is unknown.** A completion with
///     [`Rejected`](crate::protocol::Outcome::Rejected) makes the record unknown, for the retention
///     of the completion and for every claim, including a claim that would take over a lost key.
///     Only `resolve`, a later completion by the same owner or a release by that owner changes the
///     record. The release deletes the record if the owner's attempt was the only one ever (clause
///     9). Otherwise the record stays unknown.
///
/// # Cancel safety
///
/// A future that is dropped before it is ready may or may not have taken effect. The layer repeats
/// or releases as needed.
pub trait Store: Send + Sync + 'static {
    /// A future that resolves when the record may have changed.
    type Watch: Future<Output = ()> + Send + 'static;

    /// Claims a key.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind). With
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) the claim may have taken effect.
    /// The layer repeats it, and releases the key later if the store has granted it. With any other
    /// kind the claim has taken no effect.
    fn claim(&self, claim: &Claim) -> impl Future<Output = Result<Decision, Error>> + Send;

    /// Claims a key without waiting. Returns `None`, which is the default, if only
    /// [`claim`](Self::claim) can decide.
    ///
    /// This method is an optimisation for stores whose records are in this process. With it, the
    /// layer serves a replay without the resources that an execution needs. The layer calls it
    /// while it holds a lock, so it must take no longer than a lookup in a map. A store that has to
    /// make room for the record first returns `None`, and makes room in `claim`.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind). The claim has *not* taken effect, and the layer calls
    /// [`claim`](Self::claim).
    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        let _ = claim;
        None
    }

    /// Returns the longest time that a claim takes before it fails by itself. `None`, which is the
    /// default, means that nothing ends it. A caller whose timeout is at least this long can skip
    /// its own timer.
    fn claim_limit(&self) -> Option<Duration> {
        None
    }

    /// Gives the owner a lease that ends `lease` from now. A lease of zero gives the key up: the
    /// lease ends at once, and the record stays as evidence.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind). The renewal may have taken effect.
    fn renew(
        &self,
        key: &StorageKey,
        owner: Owner,
        lease: Duration,
    ) -> impl Future<Output = Result<Renewal, Error>> + Send;

    /// Records how the owner's attempt ended, for `retention` from now.
    ///
    /// The bytes of a response may be slices of larger buffers. A store that holds responses in
    /// this process must [copy](crate::protocol::StoredResponse::to_exact) them.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind). The completion may have taken effect and can be
    /// repeated.
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
    /// Any [`ErrorKind`](crate::ErrorKind). The release may have taken effect and can be repeated.
    fn release(&self, key: &StorageKey, owner: Owner) -> impl Future<Output = Result<Release, Error>> + Send;

    /// Ends a lost or unknown attempt with the result that an operator or a hook found, if `fence`
    /// is still the fence of that attempt. If the resolution completes the record, the record gets
    /// a nonce that no claim has, so that the attempt no longer owns it.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind). The resolution may have taken effect.
    fn resolve(
        &self,
        key: &StorageKey,
        fence: Fence,
        resolution: &Resolution,
    ) -> impl Future<Output = Result<ResolveResult, Error>> + Send;

    /// Returns a view of the record without changing it; `None` if the record is absent or expired.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind).
    fn peek(&self, key: &StorageKey) -> impl Future<Output = Result<Option<Snapshot>, Error>> + Send;

    /// Returns the store that does the work: this store, or the store inside any number of `Arc`s
    /// and [`BoxStore`]s.
    #[doc(hidden)]
    fn innermost(&self) -> &dyn Any
    where
        Self: Sized,
    {
        self
    }

    /// Subscribes to changes of the record. From the moment at which this returns, a change
    /// resolves the watch.
    ///
    /// # Errors
    ///
    /// Any [`ErrorKind`](crate::ErrorKind), if the store fails at the moment. The caller polls
    /// instead. A store that has no subscriptions returns a watch that resolves after a pause.
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
