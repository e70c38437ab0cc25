//! One key, once in the store and once as a pure record.

use std::fmt::Debug;
use std::time::Duration;

use super::step::{Action, Actor, CLAIMANTS, ClaimParameters, Ending, Found};
use crate::clock::{Clock, Timestamp};
use crate::error::Error;
use crate::protocol::{
    Change, Claim, Decision, Fence, Fingerprint, Grant, Nonce, Outcome, Owner, Record, Resolution, ResolveResult,
    Snapshot, StorageKey, Transition,
};
use crate::store::Store;
use crate::store::conformance::probe::{LEASE, RETENTION, random, stored, timeless, timeless_view};

/// The same owner as the model and as the store identify it. The two fences may differ.
#[derive(Clone, Copy, Debug)]
struct Pair {
    model: Owner,
    store: Owner,
}

#[derive(Debug)]
pub(super) struct Model {
    key: StorageKey,
    clock: Clock,
    record: Option<Record>,
    claimants: [Nonce; CLAIMANTS],
    /// All owners of the record. The last one is the current owner.
    owners: Vec<Pair>,
    /// The owners of earlier records of the key.
    previous_owners: Vec<Pair>,
}

impl Model {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            key: StorageKey::from_bytes(random()),
            clock,
            record: None,
            claimants: nonces(),
            owners: Vec::new(),
            previous_owners: Vec::new(),
        }
    }

    /// Runs an operation on the model and on the store, compares the replies, and then compares the
    /// records.
    pub(super) async fn play<S: Store>(&mut self, store: &S, action: Action) -> Result<(), String> {
        // Advance the clock first, so that no two attempts begin at the same time.
        self.clock.advance(Duration::from_micros(1));
        let now = self.clock.now();
        match action {
            Action::Claim(parameters) => self.claim(store, parameters, now).await?,
            Action::Complete { by, ending } => {
                let outcome = match ending {
                    Ending::StoredResponse(head) => stored([head, b'\n'].to_vec(), "body"),
                    Ending::Rejected => Outcome::Rejected,
                    Ending::Tombstone => Outcome::Tombstone,
                };
                let by = self.pair(by);
                let wanted = Record::complete(self.record.as_ref(), by.model, &outcome, RETENTION, now);
                let wanted = self.apply(wanted);
                let got = store.complete(&self.key, by.store, &outcome, RETENTION).await;
                same("complete", got, &wanted)?;
            }
            Action::Release { by } => {
                let by = self.pair(by);
                let wanted = self.apply(Record::release(self.record.as_ref(), by.model, now));
                same("release", store.release(&self.key, by.store).await, &wanted)?;
            }
            Action::Renew { by, give_up } => {
                let lease = if give_up { Duration::ZERO } else { LEASE };
                let by = self.pair(by);
                let wanted = self.apply(Record::renew(self.record.as_ref(), by.model, lease, now));
                same("renew", store.renew(&self.key, by.store, lease).await, &wanted)?;
            }
            Action::Resolve { by, found } => self.resolve(store, by, found, now).await?,
        }
        // After the operation, both records must look the same.
        let wanted = self.with_known_nonce(self.view(now));
        let seen = store.peek(&self.key).await.map(timeless_view);
        same("peek", seen.map(|seen| self.with_known_nonce(seen)), &wanted)
    }

    async fn claim<S: Store>(&mut self, store: &S, parameters: ClaimParameters, now: Timestamp) -> Result<(), String> {
        let claim = Claim {
            key: self.key,
            fingerprint: Fingerprint::of(if parameters.other_request { b"other" } else { b"pay" }),
            nonce: self.claimants[parameters.claimant],
            lease: LEASE,
            retention: RETENTION,
            if_lost: parameters.if_lost,
            max_attempts: parameters.max_attempts,
        };
        let wanted = self.apply(Record::claim(self.record.as_ref(), &claim, now));
        let immediate = if parameters.now { store.claim_now(&claim) } else { None };
        let got = match immediate {
            Some(Ok(decision)) => decision,
            _ => store.claim(&claim).await.map_err(|error| failed("claim", &error))?,
        };
        // Record the owner first, so that its fence in the model has a counterpart in the store.
        if let (Some(model), Some(store)) = (grant_of(&wanted), grant_of(&got)) {
            self.record_grant(Pair {
                model: model.owner,
                store: store.owner,
            })?;
            let fits = store.lease.is_none_or(|lease| lease == LEASE);
            fits.then_some(())
                .ok_or_else(|| format!("a claim with a lease of {LEASE:?} got the grant {store:?}"))?;
        }
        same("claim", Ok(timeless(got)), &timeless(self.with_store_fences(wanted)))
    }

    async fn resolve<S: Store>(&mut self, store: &S, by: Actor, found: Found, now: Timestamp) -> Result<(), String> {
        let resolution = match found {
            Found::Absent => Resolution::Absent,
            Found::Completed => Resolution::Completed(stored("head", "found"), RETENTION),
            Found::Rejected => Resolution::Completed(Outcome::Rejected, RETENTION),
            Found::Tombstone => Resolution::Completed(Outcome::Tombstone, RETENTION),
        };
        // A resolution compares only the fence. The store may reuse the fence of a record that was
        // removed, so a resolution by a previous owner could succeed there and fail in the model.
        // An unknown owner acts instead.
        let by = self.pair(if matches!(by, Actor::PreviousOwner(_)) {
            Actor::Nobody
        } else {
            by
        });
        let wanted = self.apply(Record::resolve(self.record.as_ref(), by.model.fence, &resolution, now));
        let wanted = match wanted {
            ResolveResult::Conflict(Some(fence)) => ResolveResult::Conflict(Some(self.store_fence(fence))),
            other => other,
        };
        let got = store.resolve(&self.key, by.store.fence, &resolution).await;
        same("resolve", got, &wanted)
    }

    /// Makes the change in the model. If the record is removed, its owners become previous owners,
    /// and the claimants get new nonces, so that a later claim is no repetition of an earlier one.
    fn apply<R>(&mut self, transition: Transition<R>) -> R {
        match transition.change {
            Change::Unchanged => {}
            Change::Put(record) => self.record = Some(record),
            Change::Remove => {
                self.record = None;
                self.claimants = nonces();
                self.previous_owners.append(&mut self.owners);
            }
        }
        transition.reply
    }

    /// Records an owner to which both the model and the store granted the key. Returns the
    /// difference if the order or the equality of their fences disagrees.
    fn record_grant(&mut self, granted: Pair) -> Result<(), String> {
        let Some(last) = self.owners.last() else {
            self.owners.push(granted);
            return Ok(());
        };
        if last.model == granted.model {
            let repeated = last.store == granted.store;
            return repeated.then_some(()).ok_or_else(|| {
                format!(
                    "the repeated claim of {:?} was granted to {:?}",
                    last.store, granted.store
                )
            });
        }
        if granted.store.fence <= last.store.fence {
            return Err(format!(
                "the fence {:?} did not grow: {:?}",
                last.store.fence, granted.store.fence
            ));
        }
        self.owners.push(granted);
        Ok(())
    }

    fn pair(&self, by: Actor) -> Pair {
        let nobody = Owner {
            nonce: Nonce::random(),
            fence: Fence::new(1),
        };
        let nobody = Pair {
            model: nobody,
            store: nobody,
        };
        let of = |pairs: &[Pair], n: usize| pairs.get(n % pairs.len().max(1)).copied();
        let last = self.owners.last().copied();
        let pair = match by {
            Actor::PreviousOwner(n) => of(&self.previous_owners, n),
            Actor::Nobody => None,
            Actor::OtherFence => last.map(|pair| {
                pair.with(|owner| Owner {
                    fence: after(owner.fence),
                    ..owner
                })
            }),
            Actor::OtherNonce => last.map(|pair| {
                pair.with(|owner| Owner {
                    nonce: nobody.model.nonce,
                    ..owner
                })
            }),
            Actor::Owner => last,
            Actor::Predecessor(n) => of(&self.owners, n),
        };
        pair.unwrap_or(nobody)
    }

    fn view(&self, now: Timestamp) -> Option<Snapshot> {
        let mut view = timeless_view(Record::peek(self.record.as_ref(), now))?;
        view.fence = self.store_fence(view.fence);
        Some(view)
    }

    /// Returns the view with a zero nonce in place of a nonce that no claimant has. The contract
    /// does not say which nonce a record has after a resolution has completed it.
    fn with_known_nonce(&self, view: Option<Snapshot>) -> Option<Snapshot> {
        let mut view = view?;
        let is_known = self.owners.iter().any(|pair| pair.store.nonce == view.nonce);
        if !is_known && !self.claimants.contains(&view.nonce) {
            view.nonce = Nonce::from_bytes([0; 16]);
        }
        Some(view)
    }

    fn with_store_fences(&self, decision: Decision) -> Decision {
        let grant = |grant: Grant| {
            let fence = self.store_fence(grant.owner.fence);
            let nonce = grant.owner.nonce;
            Grant {
                owner: Owner { nonce, fence },
                ..grant
            }
        };
        match decision {
            Decision::Execute(granted) => Decision::Execute(grant(granted)),
            Decision::Recover(granted) => Decision::Recover(grant(granted)),
            other => other,
        }
    }

    /// Returns the fence of the store for a fence of the model.
    fn store_fence(&self, fence: Fence) -> Fence {
        let pair = self.owners.iter().find(|pair| pair.model.fence == fence);
        pair.map_or(fence, |pair| pair.store.fence)
    }
}

impl Pair {
    fn with(self, change: impl Fn(Owner) -> Owner) -> Self {
        let (model, store) = (change(self.model), change(self.store));
        Self { model, store }
    }
}

fn nonces() -> [Nonce; CLAIMANTS] {
    std::array::from_fn(|_| Nonce::random())
}

const fn after(fence: Fence) -> Fence {
    Fence::new(fence.as_u64().saturating_add(1))
}

const fn grant_of(decision: &Decision) -> Option<&Grant> {
    match decision {
        Decision::Execute(grant) | Decision::Recover(grant) => Some(grant),
        _ => None,
    }
}

fn same<T: Debug + PartialEq>(operation: &str, got: Result<T, Error>, wanted: &T) -> Result<(), String> {
    let got = got.map_err(|error| failed(operation, &error))?;
    if got == *wanted {
        return Ok(());
    }
    let (seen, expected) = (format!("{got:?}"), format!("{wanted:?}"));
    // The `Debug` forms of responses and nonces hide their bytes.
    let hidden = if seen == expected {
        "; they differ in bytes that are not shown"
    } else {
        ""
    };
    Err(format!("`{operation}` got {seen}, expected {expected}{hidden}"))
}

fn failed(operation: &str, error: &Error) -> String {
    format!("`{operation}` failed: {error:?}")
}
