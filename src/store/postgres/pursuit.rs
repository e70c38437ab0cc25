//! Claims whose caller left before their fate was known.
//!
//! The server may grant such a claim although no caller waits for it. So the store pursues the
//! claim until its fate is known, and releases the grant. A caller that repeats the claim takes it
//! over from the pursuit:
//!
//! * If a statement of the claim is still running, the caller waits for its reply.
//! * Otherwise the pursuit ends, and the caller sends a statement of its own.
//!
//! So a grant has one holder at any time: a caller, or the pursuit, which releases it (I1, I7).

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, oneshot};

use super::ask::{Failed, Fate};
use super::pooled::{NO_RUNTIME, PooledConnection, TIMED_OUT, run_until_reply};
use super::{Inner, PostgresStore};
use crate::clock::{sleep, within};
use crate::detach::detach_on_drop;
use crate::error::Error;
use crate::protocol::{Claim, Decision, Nonce, Owner, Status};
use crate::sharded::lock;
use crate::telemetry::{self, Event};

/// The largest number of claims that are pursued. The grants of any further claims end with their
/// leases.
const MOST_PURSUED: usize = 1_024;

/// The largest number of claims that are looked up at the same time.
const CONCURRENT_LOOKUPS: usize = 2;

/// The longest pause before a claim of unknown fate is looked up again.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

type Reply = Result<Decision, Failed>;

/// The pursued claims by their nonces.
pub(super) struct Pursuits {
    /// Limits the concurrent lookups, so that they leave connections of the pool to callers.
    lookups: Semaphore,
    /// The number of pursued claims. A claim takes no lock while it is zero.
    count: AtomicUsize,
    open: Mutex<Open>,
    /// Signals a running statement that a caller waits for it, because its connection may be dead.
    hurry: Notify,
}

#[derive(Default)]
struct Open {
    claims: HashMap<Nonce, Pursued>,
    waits: u64,
}

enum Pursued {
    /// A statement of the claim is running. Its reply goes to the last caller that repeated the
    /// claim.
    Running(Option<oneshot::Sender<Reply>>),
    /// The task with this number will look the claim up later.
    Waiting(u64),
}

/// The result of a lookup.
enum Lookup {
    /// The fate of the claim is known, and its grant, if any, was released.
    Known,
    /// The reply went to a caller that repeated the claim.
    TakenOver,
    Unknown,
}

impl Lookup {
    const fn of(is_known: bool) -> Self {
        match is_known {
            true => Self::Known,
            false => Self::Unknown,
        }
    }
}

/// The recipient of the reply to a claim.
enum Recipient {
    /// The caller of the statement, which still waits.
    Caller(Reply),
    /// A caller that repeated the claim, and already has the reply.
    LaterCaller,
    /// No caller waits.
    Nobody(Reply),
}

impl Default for Pursuits {
    fn default() -> Self {
        Self {
            lookups: Semaphore::new(CONCURRENT_LOOKUPS),
            count: AtomicUsize::new(0),
            open: Mutex::default(),
            hurry: Notify::new(),
        }
    }
}

impl Pursuits {
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of pursued claims.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Open) -> T) -> T {
        let mut open = lock(&self.open);
        let changed = change(&mut open);
        self.count.store(open.claims.len(), Ordering::Release);
        changed
    }

    /// Begins the pursuit of a claim whose statement is running and whose caller has left.
    fn abandon(&self, nonce: Nonce) {
        self.change(|open| open.claims.insert(nonce, Pursued::Running(None)));
    }

    /// Returns a receiver for the reply to the running statement of a claim; `None` if no such
    /// statement is pursued.
    fn join(&self, nonce: Nonce) -> Option<oneshot::Receiver<Reply>> {
        if self.is_empty() {
            return None;
        }
        match lock(&self.open).claims.get_mut(&nonce) {
            Some(Pursued::Running(caller)) => {
                let (sender, receiver) = oneshot::channel();
                *caller = Some(sender);
                self.hurry.notify_waiters();
                Some(receiver)
            }
            _ => None,
        }
    }

    /// Ends the pursuit of a claim that a caller repeats. Returns whether the claim was pursued;
    /// `None` if a statement of the claim is running, so that the caller must wait for its reply.
    fn take_over(&self, nonce: Nonce) -> Option<bool> {
        if self.is_empty() {
            return Some(false);
        }
        self.change(|open| match open.claims.get(&nonce) {
            None => Some(false),
            Some(Pursued::Running(_)) => None,
            Some(Pursued::Waiting(_)) => Some(open.claims.remove(&nonce).is_some()),
        })
    }

    /// Sends a reply to the caller that waits for it. A reply that leaves the fate of the claim
    /// unknown goes only to the caller of its own statement. A later caller sends a statement of
    /// its own.
    fn reply(&self, nonce: Nonce, reply: Reply, is_known: bool) -> Recipient {
        if self.is_empty() {
            return Recipient::Caller(reply);
        }
        self.change(|open| {
            let Some(Pursued::Running(caller)) = open.claims.get_mut(&nonce) else {
                return Recipient::Caller(reply);
            };
            match caller.take().filter(|_| is_known) {
                None => Recipient::Nobody(reply),
                Some(caller) => match caller.send(reply) {
                    Err(reply) => Recipient::Nobody(reply),
                    Ok(()) => {
                        open.claims.remove(&nonce);
                        Recipient::LaterCaller
                    }
                },
            }
        })
    }

    /// Ends the pursuit of a claim when its task ends or is dropped. `wait` is the number of a
    /// waiting task; `None` if a statement of the claim was running.
    fn end(&self, nonce: Nonce, wait: Option<u64>) {
        if self.is_empty() {
            return;
        }
        self.change(|open| {
            let is_its_own = match (open.claims.get(&nonce), wait) {
                (Some(Pursued::Waiting(number)), Some(wait)) => *number == wait,
                // A caller that waits for the reply notices that none comes, and sends its own
                // statement.
                (Some(Pursued::Running(_)), None) => true,
                _ => false,
            };
            if is_its_own {
                open.claims.remove(&nonce);
            }
        });
    }

    /// Schedules a later lookup, and returns the number of the task that will make it; `None` if
    /// too many claims are pursued.
    fn schedule(&self, nonce: Nonce) -> Option<u64> {
        self.change(|open| {
            open.claims.remove(&nonce);
            if open.claims.len() >= MOST_PURSUED {
                return None;
            }
            open.waits += 1;
            open.claims.insert(nonce, Pursued::Waiting(open.waits));
            Some(open.waits)
        })
    }

    /// Continues a pursuit with a lookup. Returns false if a caller has taken the claim over.
    fn resume(&self, nonce: Nonce, wait: u64) -> bool {
        self.change(|open| match open.claims.get_mut(&nonce) {
            Some(Pursued::Waiting(number)) if *number == wait => {
                open.claims.insert(nonce, Pursued::Running(None));
                true
            }
            _ => false,
        })
    }
}

/// A pursuing task. Dropping it ends its pursuit. If the runtime ends early, a grant remains until
/// its lease ends.
struct Pursuer {
    inner: Weak<Inner>,
    nonce: Nonce,
    at: At,
}

/// The state of a pursuing task.
#[derive(Clone, Copy)]
enum At {
    /// A statement of the claim may be running.
    Running,
    /// The task with this number waits before it looks the claim up.
    Waiting(u64),
    /// The pursuit has ended, or another task or caller continues it.
    End,
}

impl Drop for Pursuer {
    fn drop(&mut self) {
        let wait = match self.at {
            At::Running => None,
            At::Waiting(wait) => Some(wait),
            At::End => return,
        };
        if let Some(inner) = self.inner.upgrade() {
            inner.pursuits.end(self.nonce, wait);
        }
    }
}

/// A caller of a claim. If it is dropped while its statement is running, the pursuit takes the
/// claim.
struct Caller<'s> {
    pursuits: &'s Pursuits,
    waits_for: Option<Nonce>,
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        if let Some(nonce) = self.waits_for {
            self.pursuits.abandon(nonce);
        }
    }
}

/// A caller that waits for the reply to an earlier statement. If it is dropped with an unread
/// reply, the pursuit looks the claim up and releases its grant.
struct Joined<'s> {
    store: &'s PostgresStore,
    claim: &'s Claim,
    receiver: oneshot::Receiver<Reply>,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        if let (Ok(Ok(_)), Ok(runtime)) = (self.receiver.try_recv(), Handle::try_current()) {
            self.store.pursue(&runtime, self.claim, Duration::ZERO);
        }
    }
}

impl PostgresStore {
    /// Claims a key by the following steps.
    ///
    /// 1. If an earlier statement of the same claim is running, wait for its reply.
    /// 2. Otherwise acquire a connection, and take the claim over from its pursuit. If a statement
    ///    of the claim has begun meanwhile, return the connection and start again.
    /// 3. Send the statement in a future that continues in a task if this caller leaves. A grant
    ///    that reaches no caller is released.
    /// 4. Wait for at most the store's timeout.
    pub(super) async fn claim_and_pursue(&self, claim: &Claim) -> Result<Decision, Error> {
        let (pursuits, nonce) = (&self.0.pursuits, claim.nonce);
        let (pooled, is_doubtful) = loop {
            if let Some(receiver) = pursuits.join(nonce) {
                match Box::pin(self.joined(claim, receiver)).await {
                    Some(reply) => return reply.map_err(Error::from),
                    None => continue,
                }
            }
            let pooled = self.acquire().await?;
            match pursuits.take_over(nonce) {
                Some(is_doubtful) => break (pooled, is_doubtful),
                None => drop(pooled.finish(Ok(()))),
            }
        };
        let pursuer = self.pursuer(nonce, At::Running);
        let claiming = self
            .clone()
            .claim_to_the_end(pooled, claim.clone(), is_doubtful, pursuer);
        let mut claiming = detach_on_drop(claiming, None).ok_or(NO_RUNTIME)?;
        // Declared after the statement so that it drops first. The claim must be abandoned before
        // the statement continues in a task.
        let mut caller = Caller {
            pursuits,
            waits_for: Some(nonce),
        };
        let done = within(self.0.timeout, &mut claiming).await;
        if done.is_ok() {
            caller.waits_for = None;
        }
        done.unwrap_or(Err(Failed::unknown(TIMED_OUT))).map_err(Error::from)
    }

    async fn await_server<T>(&self, operation: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
        let Inner { pool, table, .. } = &*self.0;
        run_until_reply(self.0.timeout, pool, table.name(), &self.0.pursuits.hurry, operation).await
    }

    /// Waits for the reply to the statement of an earlier caller; `None` if the pursuit has ended
    /// without a reply.
    async fn joined(&self, claim: &Claim, receiver: oneshot::Receiver<Reply>) -> Option<Reply> {
        let mut joined = Joined {
            store: self,
            claim,
            receiver,
        };
        match within(self.0.timeout, &mut joined.receiver).await {
            Ok(reply) => reply.ok(),
            Err(_) => Some(Err(Failed::unknown(TIMED_OUT))),
        }
    }

    /// Sends the statement of a claim, and gives the reply to a caller that waits. If no caller
    /// waits, releases the grant. If the fate of the claim is unknown, starts a pursuit.
    async fn claim_to_the_end(
        self,
        mut pooled: PooledConnection,
        claim: Claim,
        is_doubtful: bool,
        mut pursuer: Pursuer,
    ) -> Reply {
        let claiming = async { self.on(pooled.connection()?).claim(&claim).await };
        let reply = self.await_server(claiming).await;
        let is_known = is_known(&reply, is_doubtful);
        match self.0.pursuits.reply(claim.nonce, reply, is_known) {
            // The caller gets the reply. If that leaves the fate unknown, look the claim up later.
            Recipient::Caller(reply) => {
                pursuer.at = At::End;
                if let (false, Ok(runtime)) = (is_known, Handle::try_current()) {
                    self.pursue(&runtime, &claim, self.0.timeout);
                }
                pooled.finish(reply)
            }
            // A later caller already has the reply, and with it the grant.
            Recipient::LaterCaller => {
                pursuer.at = At::End;
                pooled.finish(Err(Failed::refused(TIMED_OUT)))
            }
            // Release the grant. If the fate is still unknown, look the claim up later.
            Recipient::Nobody(reply) => {
                let is_known = self.end_claim(pooled, &claim, reply, is_known).await;
                if let (false, Ok(runtime)) = (is_known, Handle::try_current()) {
                    pursuer.at = At::End;
                    self.pursue(&runtime, &claim, self.0.timeout);
                }
                drop(pursuer);
                Err(Failed::unknown(TIMED_OUT))
            }
        }
    }

    /// Releases a grant that reached no caller. Returns false if the fate of the claim is still
    /// unknown.
    async fn end_claim(&self, mut pooled: PooledConnection, claim: &Claim, reply: Reply, is_known: bool) -> bool {
        match reply {
            Ok(Decision::Execute(grant) | Decision::Recover(grant)) => {
                let released = self.release_on(&mut pooled, claim, grant.owner).await;
                pooled.finish(released).is_ok()
            }
            reply => {
                drop(pooled.finish(reply));
                is_known
            }
        }
    }

    async fn release_on(&self, pooled: &mut PooledConnection, claim: &Claim, owner: Owner) -> Result<(), Failed> {
        let released = async { self.on(pooled.connection()?).release(&claim.key, owner).await };
        self.await_server(released).await?;
        telemetry::event(Event::ClaimReleasedLate);
        Ok(())
    }

    fn pursuer(&self, nonce: Nonce, at: At) -> Pursuer {
        Pursuer {
            inner: Arc::downgrade(&self.0),
            nonce,
            at,
        }
    }

    /// Spawns a task that looks the claim up after pauses, until its fate is known or a caller
    /// takes it over.
    fn pursue(&self, runtime: &Handle, claim: &Claim, pause: Duration) {
        match self.0.pursuits.schedule(claim.nonce) {
            Some(wait) => {
                let pursuer = self.pursuer(claim.nonce, At::Waiting(wait));
                runtime.spawn(pursue(pursuer, claim.clone(), wait, pause));
            }
            None => telemetry::failure(Event::Unrecorded, &TIMED_OUT),
        }
    }

    /// Looks a claim up in the table, and releases its grant.
    async fn look_up(&self, claim: &Claim) -> Lookup {
        let Ok(mut pooled) = self.acquire().await else {
            return Lookup::Unknown;
        };
        let peeked = async { self.on(pooled.connection()?).peek(&claim.key).await };
        match self.await_server(peeked).await {
            // The claim was granted, and no caller has the grant.
            Ok(Some(seen)) if seen.nonce == claim.nonce && !matches!(seen.status, Status::Completed(_)) => {
                let owner = Owner {
                    nonce: seen.nonce,
                    fence: seen.fence,
                };
                let released = self.release_on(&mut pooled, claim, owner).await;
                Lookup::of(pooled.finish(released).is_ok())
            }
            // The record belongs to another claim or is completed. Do not claim again, because a
            // claim could use up an attempt.
            Ok(Some(_)) => Lookup::of(pooled.finish(Ok(())).is_ok()),
            // The first statement may still arrive. Claim with the same nonce, so that both
            // statements get the same grant, and release that grant.
            Ok(None) => {
                let claiming = async { self.on(pooled.connection()?).claim(claim).await };
                let reply = self.await_server(claiming).await;
                let is_known = is_known(&reply, true);
                match self.0.pursuits.reply(claim.nonce, reply, is_known) {
                    Recipient::LaterCaller => {
                        drop(pooled.finish(Ok(())));
                        Lookup::TakenOver
                    }
                    Recipient::Caller(reply) | Recipient::Nobody(reply) => {
                        Lookup::of(self.end_claim(pooled, claim, reply, is_known).await)
                    }
                }
            }
            Err(failed) => Lookup::of(pooled.finish(Err::<(), _>(failed)).is_ok()),
        }
    }
}

/// Whether a reply shows the fate of its claim. If an earlier statement of the same claim may still
/// be running (`is_doubtful`), a refusal of this statement says nothing about the earlier one. The
/// earlier one may hold the lock for which this one waited.
fn is_known(reply: &Reply, is_doubtful: bool) -> bool {
    match reply {
        Ok(_) => true,
        Err(failed) => failed.fate == Fate::Refused && !is_doubtful,
    }
}

/// Looks a claim up until its fate is known. Ends when the store is dropped.
async fn pursue(mut pursuer: Pursuer, claim: Claim, mut wait: u64, mut pause: Duration) {
    loop {
        sleep(pause).await;
        pause = (pause * 2).clamp(Duration::from_secs(1), LONGEST_PAUSE);
        let Some(store) = pursuer.inner.upgrade().map(PostgresStore) else {
            return;
        };
        let Ok(_permit) = store.0.pursuits.lookups.acquire().await else {
            return;
        };
        if !store.0.pursuits.resume(claim.nonce, wait) {
            pursuer.at = At::End;
            return;
        }
        pursuer.at = At::Running;
        match store.look_up(&claim).await {
            // Dropping the pursuer ends the pursuit.
            Lookup::Known => return,
            Lookup::TakenOver => {
                pursuer.at = At::End;
                return;
            }
            Lookup::Unknown => {}
        }
        match store.0.pursuits.schedule(claim.nonce) {
            Some(next) => wait = next,
            None => {
                pursuer.at = At::End;
                return telemetry::failure(Event::Unrecorded, &TIMED_OUT);
            }
        }
        pursuer.at = At::Waiting(wait);
    }
}

#[cfg(test)]
mod tests {
    use sqlx::PgPool;
    use tokio::runtime::{Builder, Runtime};

    use super::*;
    use crate::protocol::{Fingerprint, IfLost, StorageKey};

    const HOUR: Duration = Duration::from_secs(3_600);

    fn claim() -> Claim {
        Claim {
            key: StorageKey::from_bytes([1; 32]),
            fingerprint: Fingerprint::of(b"pay"),
            nonce: Nonce::random(),
            lease: HOUR,
            retention: HOUR,
            if_lost: IfLost::Refuse,
            max_attempts: 1,
        }
    }

    fn runtime() -> Runtime {
        Builder::new_current_thread().enable_all().build().unwrap()
    }

    /// Checks for a leak: such entries stayed until the process ended, and used up the limit of
    /// pursued claims.
    #[test]
    fn pursuits_end_with_the_runtime_of_their_tasks() {
        let (lasting, ending) = (runtime(), runtime());
        let _entered = lasting.enter();
        // Nothing listens at this address, and the test never waits for a connection.
        let pool = PgPool::connect_lazy("postgres://app@127.0.0.1:1/postgres").unwrap();
        let store = PostgresStore::builder().with_pool(pool).unwrap();
        let pursuits = &store.0.pursuits;
        for _ in 0..10 {
            store.pursue(ending.handle(), &claim(), HOUR);
        }
        // These tasks look their claims up, two of them at the same time.
        for _ in 0..10 {
            store.pursue(ending.handle(), &claim(), Duration::ZERO);
        }
        ending.block_on(tokio::task::yield_now());
        assert!(!pursuits.is_empty());
        let abandoned = claim().nonce;
        let running = store.pursuer(abandoned, At::Running);
        pursuits.abandon(abandoned);
        drop((running, ending));
        assert!(pursuits.is_empty());
        // A runtime that has ended drops the task at once.
        let ended = runtime();
        let handle = ended.handle().clone();
        drop(ended);
        store.pursue(&handle, &claim(), HOUR);
        assert!(pursuits.is_empty());
    }

    #[test]
    fn a_task_that_is_dropped_leaves_the_pursuit_of_another_task() {
        let pursuits = Pursuits::default();
        let nonce = Nonce::random();
        let first = pursuits.schedule(nonce).unwrap();
        let second = pursuits.schedule(nonce).unwrap();
        pursuits.end(nonce, Some(first));
        pursuits.end(nonce, None);
        assert!(!pursuits.is_empty());
        pursuits.end(nonce, Some(second));
        assert!(pursuits.is_empty());
    }
}
