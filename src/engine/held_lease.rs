//! The lease of an owner: the state that decides whether it is renewed, and one renewal of it.

use std::time::Duration;

use tokio::runtime::{Handle, Id};

use super::schedule::Schedule;
use super::transaction_state::TransactionState;
use crate::clock::Stopwatch;
use crate::protocol::{Grant, Owner, Renewal, StorageKey};
use crate::sharded::lock;
use crate::store::{Store, with_timeout};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use crate::telemetry::{self, Event};

/// The grant of a key to an owner, and the renewal of its lease. The owner, its handler and the
/// tasks that renew leases share it.
pub(crate) struct HeldLease {
    grant: Grant,
    /// The schedule by which the lease is renewed; `None` if the lease needs no renewal.
    schedule: Option<Schedule>,
    /// The runtime whose task renews the lease.
    runtime: Mutex<Option<Id>>,
    /// Whether another attempt has taken the key over. A task that reads an old value only
    /// sends a request that the store refuses, because the store compares the owner (I8). So the
    /// flag needs no memory order.
    superseded: AtomicBool,
    /// The last step towards the end of the ownership, as the number of an [`End`]; zero until the
    /// owner begins to end.
    /// The owner sets the end before it writes to the store, and a renewal reads the end after its
    /// reply. So a renewal that reaches the store after the owner's write sees the end.
    end: AtomicU8,
    /// The handler's transaction that completes the record.
    pub(crate) transaction: TransactionState,
}

/// A step towards the end of the ownership of a key. A later step in this order replaces an earlier
/// one.
#[derive(Clone, Copy)]
#[repr(u8)]
enum End {
    /// The owner records its outcome. Its lease is still renewed.
    Completing = 1,
    /// The owner has ended without giving the lease up. Its outcome is recorded, or cannot be.
    Over = 2,
    /// The owner gives the lease up.
    GivenUp = 3,
    /// The owner releases the key.
    Released = 4,
}

impl HeldLease {
    /// Makes the lease of a grant. `started` returns a stopwatch that was started before the claim,
    /// because the store may have started the lease at any time since then.
    pub(crate) fn new(grant: Grant, started: impl FnOnce() -> Stopwatch) -> Self {
        let runtime = grant.lease.and_then(|_| Handle::try_current().ok());
        Self {
            grant,
            schedule: grant.lease.map(|lease| Schedule::new(lease, started())),
            runtime: Mutex::new(runtime.map(|runtime| runtime.id())),
            superseded: AtomicBool::new(false),
            end: AtomicU8::new(0),
            transaction: TransactionState::default(),
        }
    }

    pub(crate) const fn grant(&self) -> &Grant {
        &self.grant
    }

    pub(crate) const fn owner(&self) -> Owner {
        self.grant.owner
    }

    /// Whether the lease ends unless it is renewed.
    pub(super) const fn has_end(&self) -> bool {
        self.schedule.is_some()
    }

    /// Records that another attempt has taken the key over.
    pub(crate) fn set_superseded(&self) {
        self.superseded.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Relaxed)
    }

    /// Records that the outcome is being written. From here on, the record may have the outcome
    /// although the owner does not know it yet.
    pub(super) fn set_completing(&self) {
        self.set_end(End::Completing);
    }

    /// Records that the owner has ended without giving the lease up. No renewal starts from here
    /// on.
    pub(super) fn set_over(&self) {
        self.set_end(End::Over);
    }

    /// Records that the lease is being given up. No renewal starts from here on, and a renewal in
    /// flight must not prolong the lease.
    pub(super) fn set_given_up(&self) {
        self.set_end(End::GivenUp);
    }

    /// Records that the key is being released. A renewal in flight must not prolong the lease.
    pub(super) fn set_released(&self) {
        self.set_end(End::Released);
    }

    fn set_end(&self, end: End) {
        self.end.fetch_max(end as u8, Ordering::AcqRel);
    }

    fn has_reached(&self, end: End) -> bool {
        self.end.load(Ordering::Acquire) >= end as u8
    }

    /// Whether the lease is given up or the key is released.
    pub(crate) fn is_given_up(&self) -> bool {
        self.has_reached(End::GivenUp)
    }

    /// Returns the schedule of the lease, as long as the owner holds it.
    fn schedule(&self) -> Option<&Schedule> {
        let schedule = self.schedule.as_ref()?;
        (!self.is_superseded() && !self.has_reached(End::Over)).then_some(schedule)
    }

    /// Returns the schedule of the lease, unless renewals are skipped at the moment.
    fn renewals(&self) -> Option<&Schedule> {
        // The transaction that completes the record holds its row lock. A renewal would only wait
        // for the lock. The claim of another attempt waits for it, too, so the key is safe without
        // renewals (I1).
        if self.transaction.is_completed() {
            return None;
        }
        self.schedule()
    }

    /// Whether the owner holds a lease that ends, also if its renewals are skipped at the moment.
    pub(super) fn is_leased(&self) -> bool {
        self.schedule().is_some()
    }

    /// Whether this attempt certainly owns its key and has not begun to end. If not, only the store
    /// knows the state of the key.
    pub(crate) fn is_in_flight(&self) -> bool {
        let is_ending = self.has_reached(End::Completing) || self.transaction.has_begun();
        self.certainly_lasts() && !is_ending
    }

    /// Whether the lease cannot have ended yet, by this process's clock, and no reply has reported
    /// another owner. The key may be free nevertheless, if a release took effect without a reply.
    pub(super) fn certainly_lasts(&self) -> bool {
        let may_have_ended = self.schedule.as_ref().is_some_and(Schedule::may_have_ended);
        !self.is_superseded() && !may_have_ended
    }

    /// Takes the renewal of the lease for the task of this runtime. Returns whether the task must
    /// renew the lease now. If the lease belongs to this runtime, the renewal may be due within
    /// `soon`. Otherwise the renewal must be overdue.
    pub(super) fn take_renewal(&self, runtime: Id, soon: Duration) -> bool {
        self.renewals().is_some_and(|schedule| {
            if *lock(&self.runtime) == Some(runtime) {
                schedule.take(soon)
            } else {
                schedule.take_overdue()
            }
        })
    }

    /// Takes the renewal of the lease if it is overdue and no task has begun it. Returns whether
    /// the caller must renew the lease now.
    pub(super) fn take_overdue_renewal(&self) -> bool {
        self.renewals().is_some_and(Schedule::take_overdue)
    }

    /// Moves the lease to the runtime that polls its owner now.
    pub(super) fn move_to(&self, runtime: Id) {
        *lock(&self.runtime) = Some(runtime);
    }

    /// Notes that the completion in a transaction failed. Renewals may have been skipped since an
    /// earlier completion that was rolled back, so the next one is due now.
    #[cfg(feature = "postgres")]
    pub(crate) fn fail_completion(&self) {
        self.transaction.fail();
        if let Some(schedule) = self.schedule() {
            schedule.hurry();
        }
    }

    /// Renews the lease once.
    pub(crate) async fn renew<St: Store>(&self, store: &St, key: &StorageKey, store_timeout: Duration) {
        let Some(lease) = self.grant.lease else { return };
        // If a renewal hangs, there must be time for another one before the lease ends.
        let timeout = store_timeout.min(lease / 6);
        let end = self.schedule.as_ref().map(Schedule::end_after_renewal);
        let mut unfinished = Unfinished(Some(self));
        let reply = with_timeout(timeout, store.renew(key, self.owner(), lease)).await;
        if reply.is_ok() {
            unfinished.0 = None;
        }
        drop(unfinished);
        match reply {
            // The owner gave the lease up meanwhile. This renewal may have reached the store later,
            // and prolonged the lease.
            Ok(Renewal::Renewed) if self.is_given_up() => self.take_back(store, key, timeout).await,
            Ok(Renewal::Renewed) => {
                if let (Some(schedule), Some(end)) = (&self.schedule, end) {
                    schedule.renewed(end);
                }
            }
            // The end of the ownership, or the handler's own transaction, may have completed the
            // record while the renewal waited for the store. The attempt is not lost.
            Ok(Renewal::Superseded) if self.transaction.is_completed() || self.has_reached(End::Completing) => {}
            Ok(Renewal::Superseded) => self.set_superseded(),
            Err(error) if self.is_given_up() => {
                telemetry::failure(Event::RenewalFailed, &error);
                self.take_back(store, key, timeout).await;
            }
            Err(error) => telemetry::failure(Event::RenewalFailed, &error),
        }
    }

    /// Ends a lease that a renewal may have prolonged after it was given up. If the key is being
    /// released, releases the key here, too, because the other release may reach the store later.
    /// Until then, a lease of zero would look like a lost attempt.
    async fn take_back<St: Store>(&self, store: &St, key: &StorageKey, timeout: Duration) {
        if self.has_reached(End::Released) {
            drop(with_timeout(timeout, store.release(key, self.owner())).await);
        } else {
            drop(with_timeout(timeout, store.renew(key, self.owner(), Duration::ZERO)).await);
        }
    }
}

/// A renewal that has not succeeded yet. Dropping it makes the next renewal due soon, even if the
/// store panics or the runtime ends in the middle.
struct Unfinished<'l>(Option<&'l HeldLease>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(schedule) = self.0.and_then(HeldLease::schedule) {
            schedule.repeat();
        }
    }
}

#[cfg(test)]
impl HeldLease {
    /// Makes the lease of a first attempt.
    pub(super) fn of_first_attempt(lease: Duration) -> Self {
        let owner = Owner {
            nonce: crate::protocol::Nonce::random(),
            fence: crate::protocol::Fence::new(1),
        };
        let grant = Grant {
            owner,
            attempt: 1,
            lease: Some(lease),
        };
        Self::new(grant, Stopwatch::start)
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::EngineSettings;
    use super::*;
    use crate::protocol::{Decision, Fingerprint, Nonce};
    use crate::store::MemoryStore;

    const LEASE: Duration = Duration::from_secs(12);

    fn lease() -> HeldLease {
        HeldLease::of_first_attempt(LEASE)
    }

    fn another_runtime() -> Id {
        let runtime = || tokio::runtime::Builder::new_current_thread().build();
        std::thread::spawn(move || runtime().unwrap().handle().id())
            .join()
            .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_renewed_at_its_third_by_its_own_runtime_and_overdue_by_any_other() {
        let (own, other) = (Handle::current().id(), another_runtime());
        for (seconds, runtime, is_taken) in [(3, own, false), (4, own, true), (5, other, false), (6, other, true)] {
            let lease = lease();
            tokio::time::advance(Duration::from_secs(seconds)).await;
            assert_eq!(lease.take_renewal(runtime, Duration::ZERO), is_taken, "{seconds}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_moved_is_renewed_at_its_third_by_its_new_runtime() {
        let (lease, other) = (lease(), another_runtime());
        lease.move_to(other);
        tokio::time::advance(LEASE / 3).await;
        assert!(!lease.take_renewal(Handle::current().id(), Duration::ZERO));
        assert!(lease.take_renewal(other, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_has_ended_is_not_renewed() {
        for end in [
            HeldLease::set_superseded,
            HeldLease::set_over,
            HeldLease::set_given_up,
            HeldLease::set_released,
        ] {
            let lease = lease();
            tokio::time::advance(LEASE / 2).await;
            end(&lease);
            assert!(!lease.is_leased());
            assert!(!lease.is_in_flight());
            assert!(!lease.take_renewal(Handle::current().id(), Duration::ZERO));
            assert!(!lease.take_overdue_renewal());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_in_flight_until_it_may_have_ended_or_its_owner_ends() {
        let lease = lease();
        tokio::time::advance(LEASE - Duration::from_millis(1)).await;
        assert!(lease.is_in_flight());
        lease.set_completing();
        assert!(!lease.is_in_flight());
        // The lease is still renewed.
        assert!(lease.is_leased());
        let lease = HeldLease::of_first_attempt(LEASE);
        tokio::time::advance(LEASE).await;
        assert!(!lease.is_in_flight());
    }

    /// The transaction can be committed before this process knows that.
    #[cfg(feature = "postgres")]
    #[tokio::test(start_paused = true)]
    async fn a_lease_is_not_in_flight_once_a_transaction_may_complete_its_record() {
        let lease = lease();
        lease.transaction.begin();
        assert!(!lease.is_in_flight());
        lease.transaction.succeed();
        assert!(!lease.is_in_flight());
    }

    #[test]
    fn a_key_that_is_released_is_not_given_up_instead() {
        let lease = lease();
        lease.set_released();
        lease.set_given_up();
        lease.set_over();
        assert!(lease.has_reached(End::Released));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_lasts_from_its_last_renewal_until_it_is_superseded() {
        let (store, key) = (MemoryStore::new(), StorageKey::from_bytes([7; 32]));
        let claim = EngineSettings::default().claim(key, Fingerprint::NONE, Nonce::random());
        let Ok(Decision::Execute(grant)) = store.claim(&claim).await else {
            panic!("a first claim is granted");
        };
        // Leases of the memory store have no end, so give this one an end.
        let lease = HeldLease::new(
            Grant {
                lease: Some(LEASE),
                ..grant
            },
            Stopwatch::start,
        );
        let lasts = || {
            assert_eq!(lease.certainly_lasts(), lease.is_in_flight());
            lease.certainly_lasts()
        };
        tokio::time::advance(LEASE / 2).await;
        lease.renew(&store, &key, LEASE).await;
        tokio::time::advance(LEASE * 3 / 4).await;
        assert!(lasts());
        tokio::time::advance(LEASE / 2).await;
        assert!(!lasts());
        lease.renew(&store, &key, LEASE).await;
        assert!(lasts());
        lease.set_superseded();
        assert!(!lasts());
    }

    /// Renewals stayed off after a rollback, so a lease could end while the store did not accept the
    /// end of the attempt.
    #[cfg(feature = "postgres")]
    #[tokio::test(start_paused = true)]
    async fn renewals_pause_while_a_transaction_completes_and_go_on_after_its_rollback() {
        let (lease, runtime) = (lease(), Handle::current().id());
        lease.transaction.begin();
        lease.transaction.succeed();
        tokio::time::advance(LEASE / 2).await;
        assert!(lease.is_leased() && !lease.take_renewal(runtime, Duration::ZERO));
        lease.transaction.roll_back();
        assert!(lease.take_renewal(runtime, Duration::ZERO));
    }

    #[cfg(feature = "postgres")]
    #[tokio::test(start_paused = true)]
    async fn a_renewal_is_due_at_once_after_a_completion_that_failed() {
        let (lease, runtime) = (lease(), Handle::current().id());
        lease.transaction.begin();
        assert!(!lease.take_renewal(runtime, Duration::ZERO));
        lease.fail_completion();
        assert!(lease.take_renewal(runtime, Duration::ZERO));
    }
}
