//! One key, kept by the store and by the pure record.

use std::fmt::Debug;
use std::time::Duration;

use super::step::{Action, Asked, By, Ending, Found, CLAIMANTS};
use crate::clock::{Clock, Timestamp};
use crate::error::Error;
use crate::protocol::{
    Change, Claim, Decision, Fence, Fingerprint, Grant, Nonce, Outcome, Owner, Record, Resolution, ResolveResult,
    Snapshot, StorageKey, Transition,
};
use crate::store::conformance::probe::{kept, random, timeless, timeless_view, LEASE, RETENTION};
use crate::store::Store;

/// An owner by the fences of both.
#[derive(Clone, Copy, Debug)]
struct Pair {
    model: Owner,
    store: Owner,
}

#[derive(Debug)]
pub(super) struct Twin {
    key: StorageKey,
    clock: Clock,
    record: Option<Record>,
    claimants: [Nonce; CLAIMANTS],
    /// Every owner of the record, the last one being the current.
    owners: Vec<Pair>,
    /// The owners of the records that the key had before.
    ghosts: Vec<Pair>,
}

impl Twin {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            key: StorageKey::from_bytes(random()),
            clock,
            record: None,
            claimants: nonces(),
            owners: Vec::new(),
            ghosts: Vec::new(),
        }
    }

    /// Plays an operation to both and looks at both.
    pub(super) async fn play<S: Store>(&mut self, store: &S, action: Action) -> Result<(), String> {
        // No two attempts begin at one time.
        self.clock.advance(Duration::from_micros(1));
        let now = self.clock.now();
        match action {
            Action::Claim(asked) => self.claim(store, asked, now).await?,
            Action::Complete { by, ending } => {
                let outcome = match ending {
                    Ending::StoredResponse(answer) => kept([answer, b'\n'].to_vec(), "body"),
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
        let wanted = self.with_known_nonce(self.view(now));
        let seen = store.peek(&self.key).await.map(timeless_view);
        same("peek", seen.map(|seen| self.with_known_nonce(seen)), &wanted)
    }

    async fn claim<S: Store>(&mut self, store: &S, asked: Asked, now: Timestamp) -> Result<(), String> {
        let claim = Claim {
            key: self.key,
            fingerprint: Fingerprint::of(if asked.other_request { b"other" } else { b"pay" }),
            nonce: self.claimants[asked.claimant],
            lease: LEASE,
            retention: RETENTION,
            if_lost: asked.if_lost,
            max_attempts: asked.max_attempts,
        };
        let wanted = self.apply(Record::claim(self.record.as_ref(), &claim, now));
        let quick = if asked.now { store.claim_now(&claim) } else { None };
        let got = match quick {
            Some(Ok(decision)) => decision,
            _ => store.claim(&claim).await.map_err(|error| failed("claim", &error))?,
        };
        if let (Some(model), Some(store)) = (grant_of(&wanted), grant_of(&got)) {
            self.meet(Pair {
                model: model.owner,
                store: store.owner,
            })?;
            let fits = store.lease.is_none_or(|lease| lease == LEASE);
            fits.then_some(())
                .ok_or_else(|| format!("a lease of {LEASE:?} was granted as {store:?}"))?;
        }
        same("claim", Ok(timeless(got)), &timeless(self.in_store_terms(wanted)))
    }

    async fn resolve<S: Store>(&mut self, store: &S, by: By, found: Found, now: Timestamp) -> Result<(), String> {
        let resolution = match found {
            Found::Absent => Resolution::Absent,
            Found::Completed => Resolution::Completed(kept("head", "found"), RETENTION),
            Found::Tombstone => Resolution::Completed(Outcome::Tombstone, RETENTION),
        };
        // Only the fence counts, and those of records that are gone may come again.
        let by = self.pair(if matches!(by, By::Ghost(_)) { By::Nobody } else { by });
        let wanted = self.apply(Record::resolve(self.record.as_ref(), by.model.fence, &resolution, now));
        let wanted = match wanted {
            ResolveResult::Conflict(Some(fence)) => ResolveResult::Conflict(Some(self.store_fence(fence))),
            other => other,
        };
        let got = store.resolve(&self.key, by.store.fence, &resolution).await;
        same("resolve", got, &wanted)
    }

    /// Makes the model's change. With a record go its owners: whoever claims now is somebody new.
    fn apply<R>(&mut self, transition: Transition<R>) -> R {
        match transition.change {
            Change::Unchanged => {}
            Change::Put(record) => self.record = Some(record),
            Change::Remove => {
                self.record = None;
                self.claimants = nonces();
                self.ghosts.append(&mut self.owners);
            }
        }
        transition.reply
    }

    /// Notes an owner that both granted; else says how their fences differ.
    fn meet(&mut self, met: Pair) -> Result<(), String> {
        let Some(last) = self.owners.last() else {
            self.owners.push(met);
            return Ok(());
        };
        if last.model == met.model {
            let repeated = last.store == met.store;
            return repeated
                .then_some(())
                .ok_or_else(|| format!("the repeated claim of {:?} was granted to {:?}", last.store, met.store));
        }
        if met.store.fence <= last.store.fence {
            return Err(format!("after {:?} came {:?}", last.store.fence, met.store.fence));
        }
        self.owners.push(met);
        Ok(())
    }

    fn pair(&self, by: By) -> Pair {
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
            By::Ghost(n) => of(&self.ghosts, n),
            By::Nobody => None,
            By::OtherFence => last.map(|pair| {
                pair.with(|owner| Owner {
                    fence: after(owner.fence),
                    ..owner
                })
            }),
            By::OtherNonce => last.map(|pair| {
                pair.with(|owner| Owner {
                    nonce: nobody.model.nonce,
                    ..owner
                })
            }),
            By::Owner => last,
            By::Predecessor(n) => of(&self.owners, n),
        };
        pair.unwrap_or(nobody)
    }

    fn view(&self, now: Timestamp) -> Option<Snapshot> {
        let mut view = timeless_view(Record::peek(self.record.as_ref(), now))?;
        view.fence = self.store_fence(view.fence);
        Some(view)
    }

    /// Returns the view with zeros in place of a nonce that no claimant has. The contract leaves it to the store which
    /// nonce a record has after a resolution has completed it.
    fn with_known_nonce(&self, view: Option<Snapshot>) -> Option<Snapshot> {
        let mut view = view?;
        let is_known = self.owners.iter().any(|pair| pair.store.nonce == view.nonce);
        if !is_known && !self.claimants.contains(&view.nonce) {
            view.nonce = Nonce::from_bytes([0; 16]);
        }
        Some(view)
    }

    fn in_store_terms(&self, decision: Decision) -> Decision {
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

    /// What the store calls a fence of the model.
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
    let (seen, wished) = (format!("{got:?}"), format!("{wanted:?}"));
    // Answers and nonces hide their bytes.
    let hidden = if seen == wished {
        "; bytes that are not shown differ"
    } else {
        ""
    };
    Err(format!("`{operation}` got {seen}, not {wished}{hidden}"))
}

fn failed(operation: &str, error: &Error) -> String {
    format!("`{operation}` failed: {error:?}")
}
