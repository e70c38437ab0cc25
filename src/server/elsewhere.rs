//! The wait for an owner in another process.

use futures::future::poll_fn;
use http::Response;

use super::exchange::{Claimed, Exchange, Stage};
use super::guard::{Barred, KeyGuard};
use super::settings::Values;
use super::singleflight::{InFlight, SharedResult};
use crate::clock::within;
use crate::engine::{Waited, Waiter, await_owner};
use crate::http::{HttpService, RebuildBody, Refusal, RefusalKind};
use crate::protocol::{Fingerprint, IfLost, Nonce, Outcome, Snapshot, Status};
use crate::store::{LAST_LOOK, MANY_LOST_CLAIMS, Store, with_timeout};
use crate::telemetry::{self, Event};

/// The meaning of a record for a request that does not own it.
enum Seen {
    /// The store would grant the next claim.
    Free,
    /// The owner works on the key.
    InFlight,
    /// The key has this result.
    Settled(SharedResult),
}

/// The end of a wait for an owner in another process.
enum Elsewhere {
    /// The key can be claimed.
    Free,
    /// The key has this result.
    Settled(SharedResult),
    /// The deadline has passed, and the last look failed.
    Failed(Refusal),
    /// The deadline has passed, and the owner still works on the key. Or the caller of this request
    /// has left.
    TimeUp,
}

impl<St: Store, S> Exchange<St, S> {
    /// Waits for the owner in another process. Returns `None` if the key is free and this request
    /// can claim it. The service is then ready again.
    pub(super) async fn wait_for_owner_elsewhere<B>(&mut self) -> Option<Result<Response<S::ResponseBody>, S::Error>>
    where
        S: HttpService<B>,
    {
        let waiting = self.settings.waiting;
        // Count the waiter before the store makes a subscription for it (I10). With a wait of zero
        // the request looks only once, so the limit does not apply.
        let waiter = self.key_guard.wait(&waiting);
        if waiter.is_none() && !self.settings.engine.wait.is_zero() {
            return Some(Ok(self.refuse(self.later(RefusalKind::TooManyWaiters))));
        }
        let elsewhere = self.poll_owner().await;
        drop(waiter);
        match elsewhere {
            Elsewhere::Settled(shared_result) => Some(Ok(self.finish(shared_result))),
            Elsewhere::Failed(refusal) => Some(Ok(self.refuse(refusal))),
            Elsewhere::Free if self.may_claim_again() => match self.get_ready().await {
                Some(Ok(())) => None,
                Some(Err(error)) => Some(Err(error)),
                // The service did not become ready before the deadline, or is gone. Another process may
                // have an outcome by now.
                None => Some(Ok(match self.last_look().await {
                    SharedResult::Refused(refusal) if refusal.kind() == RefusalKind::Outstanding => {
                        self.refuse(refusal)
                    }
                    shared_result => self.finish(shared_result),
                })),
            },
            // The deadline of this request has passed. Requests that joined later still have time,
            // and look at the record themselves.
            Elsewhere::Free | Elsewhere::TimeUp => Some(Ok(self.refuse(self.later(RefusalKind::Outstanding)))),
        }
    }

    /// Returns the response for an owner whose key another attempt took over. Waits for the outcome
    /// of that attempt.
    pub(super) async fn await_owner<R: RebuildBody>(&mut self) -> Response<R> {
        match self.poll_owner().await {
            Elsewhere::Settled(SharedResult::Refused(refusal)) => {
                let refusal = self.after_run(refusal);
                self.finish(SharedResult::Refused(refusal))
            }
            Elsewhere::Failed(refusal) => self.refuse(self.after_run(refusal)),
            Elsewhere::Settled(shared_result) => self.finish(shared_result),
            Elsewhere::Free => self.finish(SharedResult::Refused(self.later(RefusalKind::OutcomeUnrecorded))),
            Elsewhere::TimeUp => self.refuse(self.later(RefusalKind::Outstanding)),
        }
    }

    /// Replaces a refusal that would be false after the handler of this attempt has run.
    fn after_run(&self, refusal: Refusal) -> Refusal {
        match refusal.kind().after_run() {
            None => refusal,
            Some(RefusalKind::OutcomeUnknown) => Refusal::new(RefusalKind::OutcomeUnknown),
            Some(kind) => self.later(kind),
        }
    }

    /// Waits until the record shows a result or a free key, or the deadline passes.
    async fn poll_owner(&mut self) -> Elsewhere {
        // If the caller left during the claim or the run, the response has no recipient, so do not
        // wait. The followers look at the record themselves.
        if self.key_guard.in_flight.is_detached() {
            return Elsewhere::TimeUp;
        }
        let deadline = self.wait().owner;
        let ours = self.lost_claim.as_ref().map(|lost| lost.claim().nonce);
        let KeyGuard { shared, in_flight, .. } = &self.key_guard;
        let bystander = Bystander {
            settings: &self.settings,
            in_flight,
            ours,
            look: 0,
        };
        let timeout = self.settings.engine.store_timeout;
        let waiting = await_owner(&*shared.store, &in_flight.storage_key, timeout, deadline, bystander);
        match self.times.waiting(waiting).await {
            Waited::Seen(elsewhere) => elsewhere,
            Waited::TimeUp(_) => Elsewhere::TimeUp,
            Waited::LastLookFailed(error) => Elsewhere::Failed(self.settings.store_failed(&error)),
            Waited::Failed(error) => Elsewhere::Settled(SharedResult::Refused(self.settings.store_failed(&error))),
        }
    }

    /// Looks at the record once, because the leader may not know the outcome. Returns the outcome in
    /// the record, or refuses the request.
    pub(super) async fn last_look(&mut self) -> SharedResult {
        let in_flight = &self.key_guard.in_flight;
        let peeked = self.key_guard.shared.store.peek(&in_flight.storage_key);
        let timeout = LAST_LOOK.min(self.settings.engine.store_timeout);
        match with_timeout(timeout, peeked).await {
            Ok(snapshot) => match self.settings.see(&in_flight.fingerprint, snapshot) {
                Seen::Settled(shared_result) => shared_result,
                Seen::Free | Seen::InFlight => self.outstanding(),
            },
            Err(error) => {
                telemetry::store_failed(&error);
                self.outstanding()
            }
        }
    }

    /// Whether this request may claim the key again. After its deadline, it may claim a free key
    /// once.
    fn may_claim_again(&mut self) -> bool {
        let may = !self.has_claimed_late;
        self.has_claimed_late = self.wait().owner.left().is_zero();
        may
    }

    /// Waits until the service is ready again. Returns `None` if the deadline passes first, or if
    /// this request has given its service away and can no longer run.
    async fn get_ready<B>(&mut self) -> Option<Result<(), S::Error>>
    where
        S: HttpService<B>,
    {
        let left = self.wait().owner.left();
        let Stage::Waiting(waiting) = &mut self.stage else {
            return None;
        };
        let ready = within(left, poll_fn(|cx| waiting.service.poll_ready(cx))).await.ok()?;
        if let Stage::Waiting(waiting) = std::mem::replace(&mut self.stage, Stage::Nothing) {
            self.stage = Stage::Admitted(waiting);
        }
        Some(ready)
    }

    /// Looks at the record instead of claiming the key, because no key may be claimed at the
    /// moment. A duplicate still gets the outcome in the record.
    pub(super) async fn look(&mut self, barred: Barred) -> Claimed {
        let in_flight = &self.key_guard.in_flight;
        let peeked = self.key_guard.shared.store.peek(&in_flight.storage_key);
        let seen = match with_timeout(self.settings.engine.store_timeout, peeked).await {
            Ok(snapshot) => {
                let ours = self.lost_claim.as_ref().map(|lost| lost.claim().nonce);
                if snapshot.as_ref().is_some_and(|seen| is_granted_to(seen, ours)) {
                    // A lost claim of this request owns the key. A task releases the key after the
                    // refusal.
                    Seen::Free
                } else {
                    self.settings.see(&in_flight.fingerprint, snapshot)
                }
            }
            Err(error) if barred == Barred::LostClaims => return self.claim_failed(&error),
            Err(error) => {
                telemetry::store_failed(&error);
                Seen::Settled(SharedResult::Refused(self.settings.store_failed(&error)))
            }
        };
        match (seen, barred) {
            (Seen::Settled(shared_result), _) => Claimed::Settled(shared_result),
            (Seen::InFlight, _) => Claimed::Wait,
            (Seen::Free, Barred::LostClaims) => self.claim_failed(&MANY_LOST_CLAIMS),
            (Seen::Free, Barred::Detached) => {
                telemetry::event(Event::Overloaded);
                Claimed::Settled(SharedResult::Refused(self.later(RefusalKind::Overloaded)))
            }
        }
    }
}

/// A request that waits for an owner in another process.
struct Bystander<'a> {
    settings: &'a Values,
    in_flight: &'a InFlight,
    /// The nonce of a claim of this request that got no reply. If the store grants that claim
    /// later, the next claim with this nonce gets the same grant.
    ours: Option<Nonce>,
    /// The number of the last look.
    look: u64,
}

impl Waiter for Bystander<'_> {
    type Seen = Elsewhere;

    fn begin_look(&mut self) {
        self.look = self.in_flight.begin_look();
    }

    fn judge(&mut self, record: Option<Snapshot>) -> Option<Elsewhere> {
        if record.as_ref().is_some_and(|seen| is_granted_to(seen, self.ours)) {
            return Some(Elsewhere::Free);
        }
        let fingerprint = &self.in_flight.fingerprint;
        let is_same = record.as_ref().is_some_and(|seen| seen.fingerprint == *fingerprint);
        match self.settings.see(fingerprint, record) {
            Seen::Free => Some(Elsewhere::Free),
            Seen::Settled(shared_result) => {
                if is_same {
                    self.in_flight.confirm(self.look);
                }
                Some(Elsewhere::Settled(shared_result))
            }
            Seen::InFlight => {
                self.in_flight.confirm(self.look);
                None
            }
        }
    }

    fn lookup_requested(&self) -> impl Future<Output = ()> + Send {
        self.in_flight.look_requested()
    }
}

/// Whether the record belongs to the claim with this nonce, without an outcome.
fn is_granted_to(seen: &Snapshot, nonce: Option<Nonce>) -> bool {
    Some(seen.nonce) == nonce && matches!(seen.status, Status::InFlight { .. } | Status::Lost)
}

impl Values {
    /// Interprets a record for a request with this fingerprint. A record with another fingerprint
    /// is a mismatch (I4).
    fn see(&self, fingerprint: &Fingerprint, snapshot: Option<Snapshot>) -> Seen {
        let Some(snapshot) = snapshot else {
            return Seen::Free;
        };
        if snapshot.fingerprint != *fingerprint {
            return Seen::Settled(SharedResult::Refused(Refusal::new(RefusalKind::Mismatch)));
        }
        Seen::Settled(match snapshot.status {
            Status::InFlight { .. } => return Seen::InFlight,
            Status::Completed(Outcome::Stored(response)) => SharedResult::Response {
                response,
                is_stored: true,
            },
            Status::Completed(Outcome::Rejected | Outcome::Tombstone) => {
                SharedResult::Refused(Refusal::new(RefusalKind::ResponseNotStored))
            }
            Status::Lost if self.engine.if_lost != IfLost::Refuse => return Seen::Free,
            Status::Lost | Status::Unknown => SharedResult::Refused(Refusal::new(RefusalKind::OutcomeUnknown)),
        })
    }
}
