//! The store's server: records, their clock, and the operations that it runs.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tower_idempotency::protocol::{Fence, Grant, Snapshot, Status, StorageKey};
use tower_idempotency::{Clock, Error, Store, Timestamp};

use crate::ablated::{Ablated, Rule};
use crate::audit::{Audit, Noted, Step};
use crate::link::{Place, Sender, StoreReply, StoreRequest};

type Operation = BoxFuture<'static, Result<Done, Error>>;

/// The result of an operation.
enum Done {
    Reply(StoreReply),
    Watch(BoxFuture<'static, ()>),
}

struct Running {
    from: Sender,
    request: StoreRequest,
    operation: Operation,
    place: Option<Place<StoreReply>>,
    /// Whether the operation has done a first step.
    has_begun: bool,
}

/// One write, which a failover can undo.
struct Write {
    number: u64,
    key: StorageKey,
    before: Option<Bytes>,
    noted: Noted,
    grant: Option<Fence>,
    /// Whether a process has seen the record after this write.
    is_seen: bool,
}

/// The number of seen writes that a wrong store loses at a failover.
const LOST_WRITES: usize = 3;

/// An operation that has ended, with the place for its reply.
pub(crate) struct Ended {
    /// The number of the last write so far.
    pub(crate) number: u64,
    pub(crate) from: Sender,
    pub(crate) request: StoreRequest,
    pub(crate) reply: Result<StoreReply, Error>,
    pub(crate) place: Option<Place<StoreReply>>,
    /// The grant of a new owner, or the rule that the store broke.
    pub(crate) audited: Result<Option<Grant>, String>,
}

pub(crate) struct Host {
    store: Ablated,
    clock: Clock,
    /// The time of the clock in microseconds.
    micros: u64,
    running: Vec<Running>,
    watches: Vec<(StorageKey, Sender, BoxFuture<'static, ()>, oneshot::Sender<()>)>,
    audit: Audit,
    writes: Vec<Write>,
    written: u64,
}

impl Host {
    pub(crate) fn new(rule: Rule) -> Self {
        let micros = 1_700_000_000_000_000;
        let clock = Clock::manual(Timestamp::from_micros(micros));
        Self {
            store: Ablated::with_clock(rule, clock.clone()),
            clock,
            micros,
            running: Vec::new(),
            watches: Vec::new(),
            audit: Audit::default(),
            writes: Vec::new(),
            written: 0,
        }
    }

    pub(crate) fn advance(&mut self, time: Duration) {
        self.micros += u64::try_from(time.as_micros()).unwrap();
        self.clock.advance(time);
    }

    pub(crate) fn turn_clock(&mut self, millis: i64) {
        self.micros = self.micros.saturating_add_signed(millis * 1_000);
        self.clock = Clock::manual(Timestamp::from_micros(self.micros));
        self.store.set_clock(self.clock.clone());
    }

    /// Drops all connections and the operations that are not done.
    pub(crate) fn restart(&mut self) {
        self.running.clear();
        self.watches.clear();
    }

    /// Marks all writes of a key up to this number as seen.
    pub(crate) fn see(&mut self, key: &StorageKey, number: u64) {
        let writes = self.writes.iter_mut();
        for write in writes.filter(|write| write.key == *key && write.number <= number) {
            write.is_seen = true;
        }
    }

    /// Undoes the unseen writes. A wrong store also undoes the last [`LOST_WRITES`] seen ones. Returns
    /// the key and the fence of each unseen grant that is lost.
    pub(crate) fn fail_over(&mut self, loses_seen: bool) -> Vec<(StorageKey, Fence)> {
        let mut grants = Vec::new();
        let mut lost = 0;
        for write in std::mem::take(&mut self.writes).into_iter().rev() {
            if write.is_seen && (!loses_seen || lost == LOST_WRITES) {
                continue;
            }
            lost += usize::from(write.is_seen);
            self.store.put_back(&write.key, write.before);
            self.audit.go_back(write.key, write.noted);
            // A process may have used a grant that it has seen.
            grants.extend(write.grant.filter(|_| !write.is_seen).map(|fence| (write.key, fence)));
        }
        grants
    }

    pub(crate) fn begin(&mut self, from: Sender, request: StoreRequest, place: Option<Place<StoreReply>>) {
        self.running.push(Running {
            from,
            operation: Box::pin(run(self.store.clone(), request.clone())),
            request,
            place,
            has_begun: false,
        });
    }

    /// Goes on with one operation. Returns it if it has ended.
    pub(crate) fn go_on(&mut self, at: usize) -> Option<Ended> {
        let key = self.running[at].request.key();
        let before = self.look(&key);
        let (bytes, noted) = (self.store.bytes(&key), self.audit.noted(&key));
        let poll = poll(self.running[at].operation.as_mut());
        let Poll::Ready(done) = poll else {
            self.running[at].has_begun = true;
            return None;
        };
        let Running {
            from, request, place, ..
        } = self.running.swap_remove(at);
        let reply = done.map(|done| match done {
            Done::Reply(reply) => reply,
            Done::Watch(watch) => {
                let (waking, woken) = oneshot::channel();
                self.watches.push((key, from, watch, waking));
                StoreReply::Watch(woken)
            }
        });
        let audited = self.audit.check(&Step {
            request: &request,
            before,
            reply: &reply,
            after: self.look(&key),
            now: Timestamp::from_micros(self.micros),
        });
        if self.store.bytes(&key) != bytes {
            self.written += 1;
            let grant = audited.as_ref().ok().and_then(Option::as_ref);
            self.writes.push(Write {
                number: self.written,
                key,
                before: bytes,
                noted,
                grant: grant.map(|grant| grant.owner.fence),
                is_seen: false,
            });
        }
        // An operator counts as having seen the reply.
        if from.incarnation == usize::MAX {
            self.see(&key, self.written);
        }
        Some(Ended {
            number: self.written,
            from,
            request,
            reply,
            place,
            audited,
        })
    }

    /// Whether the record of a key has expired since the last call.
    pub(crate) fn expires(&mut self, key: &StorageKey) -> bool {
        let expires = self.look(key).is_none() && self.audit.expire(key, Timestamp::from_micros(self.micros));
        if expires {
            self.writes.retain(|write| write.key != *key);
        }
        expires
    }

    /// Whether an operation stands between two steps.
    pub(crate) fn has_begun(&self, at: usize) -> bool {
        self.running[at].has_begun
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// Returns the watches that a change has woken.
    pub(crate) fn woken(&mut self) -> Vec<(StorageKey, Sender, oneshot::Sender<()>)> {
        let mut woken = Vec::new();
        for (key, from, mut watch, place) in std::mem::take(&mut self.watches) {
            match poll(watch.as_mut()) {
                Poll::Ready(()) => woken.push((key, from, place)),
                Poll::Pending => self.watches.push((key, from, watch, place)),
            }
        }
        woken
    }

    /// Returns the record of a key, or `None` if there is none.
    pub(crate) fn look(&self, key: &StorageKey) -> Option<Snapshot> {
        let mut peeking = Box::pin(self.store.peek(key));
        match poll(peeking.as_mut()) {
            Poll::Ready(Ok(seen)) => seen,
            _ => panic!("the host reads its own records at once"),
        }
    }

    pub(crate) fn status(&self, key: &StorageKey) -> Option<Status> {
        self.look(key).map(|seen| seen.status)
    }
}

async fn run(store: Ablated, request: StoreRequest) -> Result<Done, Error> {
    Ok(Done::Reply(match request {
        StoreRequest::Claim(claim) => StoreReply::Claim(store.claim(&claim).await?),
        StoreRequest::Renew(key, owner, lease) => StoreReply::Renew(store.renew(&key, owner, lease).await?),
        StoreRequest::Complete(key, owner, outcome, retention) => {
            StoreReply::Complete(store.complete(&key, owner, &outcome, retention).await?)
        }
        StoreRequest::Release(key, owner) => StoreReply::Release(store.release(&key, owner).await?),
        StoreRequest::Resolve(key, fence, resolution) => {
            StoreReply::Resolve(store.resolve(&key, fence, &resolution).await?)
        }
        StoreRequest::Peek(key) => StoreReply::Peek(store.peek(&key).await?),
        StoreRequest::Watch(key) => return Ok(Done::Watch(store.watch(&key).await?)),
    }))
}

fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}
