//! The wait for an owner in another process.

use std::future::{pending, Future};
use std::pin::pin;
use std::time::Duration;

use futures::future::{poll_fn, select};
use http::{Request, Response};
use tower_service::Service;

use super::exchange::{Cargo, Claimed, Exchange};
use super::flights::{Flight, Landing};
use super::settings::Values;
use crate::clock::{within, Deadline};
use crate::http::{RebuildBody, Refusal, RefusalKind};
use crate::protocol::{Fingerprint, IfLost, Outcome, Snapshot, Status};
use crate::store::{in_time, limit_in_wait, Store};
use crate::telemetry::{self, Event};

/// The meaning of a record for a request that does not own it.
enum Seen {
    /// The next claim is granted.
    Free,
    /// Its owner works on it.
    InFlight,
    Landed(Landing),
}

/// The end of a wait for an owner elsewhere.
enum Elsewhere {
    /// The key can be claimed.
    Free,
    Landed(Landing),
    TimeUp,
}

impl<St: Store, S> Exchange<St, S> {
    /// Waits for the owner in another process. Returns `None` when the key is free and this request can claim it; the
    /// service is then ready again.
    pub(super) async fn wait_for_owner_elsewhere<B, R>(&mut self) -> Option<Result<Response<R>, S::Error>>
    where
        S: Service<Request<B>, Response = Response<R>>,
        R: RebuildBody,
    {
        let waiting = self.settings.waiting;
        // Count the waiter before the store makes a subscription for it. A request that may not wait only looks once,
        // so the limit does not apply.
        let place = self.hold.wait(&waiting);
        if place.is_none() && !waiting.time.is_zero() {
            return Some(Ok(self.refuse(self.later(RefusalKind::TooManyWaiters))));
        }
        let elsewhere = self.outcome_elsewhere().await;
        drop(place);
        match elsewhere {
            Elsewhere::Landed(landing) => Some(Ok(self.settle(landing))),
            Elsewhere::Free if self.may_claim_again() => match self.get_ready().await {
                Some(Ok(())) => None,
                Some(Err(error)) => Some(Err(error)),
                None => Some(Ok(self.refuse(self.later(RefusalKind::Overloaded)))),
            },
            // The time of this request is up. Requests that joined later still have time, and look at the record
            // themselves.
            Elsewhere::Free | Elsewhere::TimeUp => Some(Ok(self.refuse(self.later(RefusalKind::Outstanding)))),
        }
    }

    /// Returns the response for an owner whose key was taken over: the outcome that the key holds in the end.
    pub(super) async fn stand_by<R: RebuildBody>(&mut self) -> Response<R> {
        match self.outcome_elsewhere().await {
            Elsewhere::Landed(landing) => self.settle(landing),
            Elsewhere::Free => self.settle(Landing::Refused(self.later(RefusalKind::Outstanding))),
            Elsewhere::TimeUp => self.refuse(self.later(RefusalKind::Outstanding)),
        }
    }

    async fn outcome_elsewhere(&mut self) -> Elsewhere {
        // The caller left during the claim or the run, and nobody gets the response. Those that joined look for themselves.
        if self.hold.flight.is_detached() {
            return Elsewhere::TimeUp;
        }
        let deadline = self.wait().owner;
        let waiting = outcome_elsewhere(&self.hold.shared.store, &self.settings, &self.hold.flight, deadline);
        self.times.waiting(waiting).await
    }

    /// Whether this request can still run: it has kept its request and service, and has time left. After its time is
    /// up, it may claim a free key once.
    fn may_claim_again(&mut self) -> bool {
        let is_time_up = self.wait().owner.left().is_zero();
        let may = matches!(self.cargo, Cargo::Waiting(_)) && !(is_time_up && self.has_claimed_late);
        self.has_claimed_late |= is_time_up;
        may
    }

    /// Waits until the service is ready again; `None` if the time is up first.
    async fn get_ready<B>(&mut self) -> Option<Result<(), S::Error>>
    where
        S: Service<Request<B>>,
    {
        let left = self.wait().owner.left();
        let Cargo::Waiting(waiting) = &mut self.cargo else {
            return None;
        };
        let ready = within(left, poll_fn(|cx| waiting.service.poll_ready(cx))).await.ok()?;
        if let Cargo::Waiting(waiting) = std::mem::replace(&mut self.cargo, Cargo::Nothing) {
            self.cargo = Cargo::Admitted(waiting);
        }
        Some(ready)
    }

    /// Looks at the record instead of claiming the key, because no execution may begin. Duplicates still get the
    /// outcome that the record holds.
    pub(super) async fn look(&mut self) -> Claimed {
        let flight = &self.hold.flight;
        let peeked = self.hold.shared.store.peek(&flight.storage_key);
        let seen = match in_time(self.settings.store_timeout, peeked).await {
            Ok(snapshot) => self.settings.see(&flight.fingerprint, snapshot),
            Err(error) => {
                telemetry::store_failed(&error);
                Seen::Landed(Landing::Refused(self.settings.store_failed(&error)))
            }
        };
        match seen {
            Seen::Landed(landing) => Claimed::Settled(landing),
            Seen::InFlight => Claimed::Wait,
            Seen::Free => {
                telemetry::event(Event::Overloaded);
                Claimed::Settled(Landing::Refused(self.later(RefusalKind::Overloaded)))
            }
        }
    }
}

/// Waits for an owner in another process: subscribes, looks and waits, in that order. Changes no record.
async fn outcome_elsewhere<St: Store>(store: &St, settings: &Values, flight: &Flight, deadline: Deadline) -> Elsewhere {
    const POLL: Duration = Duration::from_millis(500);
    let timeout = settings.store_timeout;
    loop {
        let watch = if deadline.left().is_zero() {
            None
        } else {
            in_time(timeout.min(deadline.left()), store.watch(&flight.storage_key))
                .await
                .ok()
        };
        let limit = limit_in_wait(timeout, deadline);
        let look = flight.begin_look();
        let snapshot = match in_time(limit, store.peek(&flight.storage_key)).await {
            Ok(snapshot) => snapshot,
            // The look failed because the wait is over, which says nothing about the store.
            Err(_) if limit < timeout && deadline.left().is_zero() => return Elsewhere::TimeUp,
            Err(error) => {
                telemetry::store_failed(&error);
                return Elsewhere::Landed(Landing::Refused(settings.store_failed(&error)));
            }
        };
        let is_same = snapshot
            .as_ref()
            .is_some_and(|seen| seen.fingerprint == flight.fingerprint);
        match settings.see(&flight.fingerprint, snapshot) {
            Seen::Free => return Elsewhere::Free,
            Seen::Landed(landing) => {
                if is_same {
                    flight.confirm(look);
                }
                return Elsewhere::Landed(landing);
            }
            Seen::InFlight => flight.confirm(look),
        }
        // Even a request that may not wait looks once, because the key may hold the response.
        if deadline.left().is_zero() {
            return Elsewhere::TimeUp;
        }
        let (watched, asked) = (pin!(watched(watch)), pin!(flight.asked_to_look()));
        drop(within(POLL.min(deadline.left()), select(watched, asked)).await);
    }
}

async fn watched(watch: Option<impl Future<Output = ()>>) {
    match watch {
        Some(watch) => watch.await,
        None => pending().await,
    }
}

impl Values {
    fn see(&self, fingerprint: &Fingerprint, snapshot: Option<Snapshot>) -> Seen {
        let Some(snapshot) = snapshot else {
            return Seen::Free;
        };
        if snapshot.fingerprint != *fingerprint {
            return Seen::Landed(Landing::Refused(Refusal::new(RefusalKind::Mismatch)));
        }
        Seen::Landed(match snapshot.status {
            Status::InFlight { .. } => return Seen::InFlight,
            Status::Completed(Outcome::Kept(answer)) => Landing::Answer { answer, kept: true },
            Status::Completed(Outcome::Tombstone) => Landing::Refused(Refusal::new(RefusalKind::AnswerNotKept)),
            Status::Lost if self.on_lost.in_protocol() != IfLost::Refuse => return Seen::Free,
            Status::Lost | Status::Unknown => Landing::Refused(Refusal::new(RefusalKind::OutcomeUnknown)),
        })
    }
}
