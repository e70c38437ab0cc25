//! Claims whose caller gave up before their fate was known.
//!
//! The server may grant such a claim although no caller waits for it. So the store pursues the claim until its fate is
//! known, and releases the grant. A caller that repeats the claim takes it over from the pursuit. If a statement of the
//! claim is still running, the caller gets its reply. Otherwise the pursuit ends, and the caller sends its own
//! statement. So a grant has one holder at any time: a caller, or the pursuit, which releases it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{oneshot, Notify, Semaphore};

use super::ask::{Failed, Fate};
use super::lent::{patient, Lent, LATE, NO_RUNTIME};
use super::{Inner, PostgresStore};
use crate::clock::{sleep, within};
use crate::error::Error;
use crate::protocol::{Claim, Decision, Nonce, Owner, Status};
use crate::sharded::lock;
use crate::telemetry::{self, Event};
use crate::uncut::uncut;

/// The largest number of claims that are pursued. If there are more, their grants end with their leases.
const MOST: usize = 1_024;

/// The largest number of claims that are looked up at once.
const LOOKS: usize = 2;

/// The longest pause before a claim of unknown fate is looked up again.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

type Reply = Result<Decision, Failed>;

/// The claims that are pursued, by their nonces.
pub(super) struct Pursuits {
    /// Limits the looks that run at once, so that they leave connections of the pool to callers.
    turns: Semaphore,
    /// The number of pursued claims, so that a claim takes no lock while there are none.
    count: AtomicUsize,
    open: Mutex<Open>,
    /// Notifies a running statement that a caller waits for it, because its connection may be dead.
    hurry: Notify,
}

#[derive(Default)]
struct Open {
    claims: HashMap<Nonce, Pursued>,
    rests: u64,
}

enum Pursued {
    /// A statement of the claim is running. Its reply goes to the last caller that repeated the claim.
    Asked(Option<oneshot::Sender<Reply>>),
    /// The task with this number will look the claim up later.
    Resting(u64),
}

/// The result of looking a claim up.
enum Look {
    /// The fate of the claim is known, and its grant, if any, was released.
    Known,
    /// The reply went to a caller that repeated the claim.
    Over,
    Unknown,
}

impl Look {
    const fn of(is_known: bool) -> Self {
        match is_known {
            true => Self::Known,
            false => Self::Unknown,
        }
    }
}

/// The receiver of the reply to a claim.
enum Goes {
    /// The caller of the statement, which still waits.
    Back(Reply),
    /// A caller that repeated the claim, and has the reply already.
    Over,
    /// No caller.
    Nowhere(Reply),
}

impl Default for Pursuits {
    fn default() -> Self {
        Self {
            turns: Semaphore::new(LOOKS),
            count: AtomicUsize::new(0),
            open: Mutex::default(),
            hurry: Notify::new(),
        }
    }
}

impl Pursuits {
    fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    fn change<T>(&self, change: impl FnOnce(&mut Open) -> T) -> T {
        let mut open = lock(&self.open);
        let changed = change(&mut open);
        self.count.store(open.claims.len(), Ordering::Release);
        changed
    }

    /// Begins the pursuit of a claim whose statement is running and whose caller has left.
    fn abandon(&self, nonce: Nonce) {
        self.change(|open| open.claims.insert(nonce, Pursued::Asked(None)));
    }

    /// Returns a receiver for the reply to the running statement of a claim; `None` if no such statement is pursued.
    fn join(&self, nonce: Nonce) -> Option<oneshot::Receiver<Reply>> {
        if self.is_empty() {
            return None;
        }
        match lock(&self.open).claims.get_mut(&nonce) {
            Some(Pursued::Asked(caller)) => {
                let (sender, receiver) = oneshot::channel();
                *caller = Some(sender);
                self.hurry.notify_waiters();
                Some(receiver)
            }
            _ => None,
        }
    }

    /// Ends the pursuit of a claim that a caller repeats. Returns whether the claim was pursued; `None` if a statement
    /// of it is running, so that the caller must wait for its reply.
    fn take_over(&self, nonce: Nonce) -> Option<bool> {
        if self.is_empty() {
            return Some(false);
        }
        self.change(|open| match open.claims.get(&nonce) {
            None => Some(false),
            Some(Pursued::Asked(_)) => None,
            Some(Pursued::Resting(_)) => Some(open.claims.remove(&nonce).is_some()),
        })
    }

    /// Sends a reply to the caller that waits for it. A reply that leaves the fate of the claim unknown goes only to
    /// the caller of its own statement; a later caller asks again.
    fn reply(&self, nonce: Nonce, reply: Reply, is_known: bool) -> Goes {
        if self.is_empty() {
            return Goes::Back(reply);
        }
        self.change(|open| {
            let Some(Pursued::Asked(caller)) = open.claims.get_mut(&nonce) else {
                return Goes::Back(reply);
            };
            match caller.take().filter(|_| is_known) {
                None => Goes::Nowhere(reply),
                Some(caller) => match caller.send(reply) {
                    Err(reply) => Goes::Nowhere(reply),
                    Ok(()) => {
                        open.claims.remove(&nonce);
                        Goes::Over
                    }
                },
            }
        })
    }

    /// Ends the pursuit of a claim when its task ends or is dropped. `rest` is the number of a waiting task; `None` if
    /// a statement of the claim was running.
    fn end(&self, nonce: Nonce, rest: Option<u64>) {
        if self.is_empty() {
            return;
        }
        self.change(|open| {
            let is_its_own = match (open.claims.get(&nonce), rest) {
                (Some(Pursued::Resting(number)), Some(rest)) => *number == rest,
                // A caller that waits for the reply finds that none comes, and asks by itself.
                (Some(Pursued::Asked(_)), None) => true,
                _ => false,
            };
            if is_its_own {
                open.claims.remove(&nonce);
            }
        });
    }

    /// Plans to look the claim up later, and returns the number for the task that does so; `None` if too many claims
    /// are pursued.
    fn rest(&self, nonce: Nonce) -> Option<u64> {
        self.change(|open| {
            open.claims.remove(&nonce);
            if open.claims.len() >= MOST {
                return None;
            }
            open.rests += 1;
            open.claims.insert(nonce, Pursued::Resting(open.rests));
            Some(open.rests)
        })
    }

    /// Continues a pursuit. Returns false if a caller has taken the claim over.
    fn resume(&self, nonce: Nonce, rest: u64) -> bool {
        self.change(|open| match open.claims.get_mut(&nonce) {
            Some(Pursued::Resting(number)) if *number == rest => {
                open.claims.insert(nonce, Pursued::Asked(None));
                true
            }
            _ => false,
        })
    }
}

/// A pursuing task. Dropping it ends its pursuit. If the runtime ends early, a grant stays until its lease ends.
struct Pursuer {
    inner: Weak<Inner>,
    nonce: Nonce,
    at: At,
}

/// The state of a pursuing task.
#[derive(Clone, Copy)]
enum At {
    /// A statement of the claim may be running.
    Asking,
    /// The task with this number waits before it looks the claim up.
    Resting(u64),
    /// The pursuit has ended, or another task or caller continues it.
    End,
}

impl Drop for Pursuer {
    fn drop(&mut self) {
        let rest = match self.at {
            At::Asking => None,
            At::Resting(rest) => Some(rest),
            At::End => return,
        };
        if let Some(inner) = self.inner.upgrade() {
            inner.pursuits.end(self.nonce, rest);
        }
    }
}

/// A caller of a claim. If it is dropped while its statement is running, the pursuit takes the claim.
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

/// A caller that waits for the reply to an earlier statement. If it is dropped with an unread reply, the pursuit looks
/// the claim up and releases its grant.
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
    /// Claims a key. The statement continues if its caller leaves, and a grant that reaches no caller is released.
    pub(super) async fn claim_and_pursue(&self, claim: &Claim) -> Result<Decision, Error> {
        let (pursuits, nonce) = (&self.0.pursuits, claim.nonce);
        let (lent, is_doubtful) = loop {
            if let Some(receiver) = pursuits.join(nonce) {
                match Box::pin(self.joined(claim, receiver)).await {
                    Some(reply) => return reply.map_err(Error::from),
                    None => continue,
                }
            }
            let lent = self.lend().await?;
            match pursuits.take_over(nonce) {
                Some(is_doubtful) => break (lent, is_doubtful),
                None => drop(lent.give_back(Ok(()))),
            }
        };
        let pursuer = self.pursuer(nonce, At::Asking);
        let claiming = self.clone().claim_to_the_end(lent, claim.clone(), is_doubtful, pursuer);
        let mut claiming = uncut(claiming, None).ok_or(NO_RUNTIME)?;
        // Declared after the statement so that it drops first: the claim must be abandoned before the statement
        // continues in a task.
        let mut caller = Caller {
            pursuits,
            waits_for: Some(nonce),
        };
        let done = within(self.0.timeout, &mut claiming).await;
        if done.is_ok() {
            caller.waits_for = None;
        }
        done.unwrap_or(Err(Failed::unknown(LATE))).map_err(Error::from)
    }

    async fn await_server<T>(&self, asked: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
        let Inner { pool, table, .. } = &*self.0;
        patient(self.0.timeout, pool, table.name(), &self.0.pursuits.hurry, asked).await
    }

    /// Waits for the reply to the statement of an earlier caller; `None` if the pursuit has ended without a reply.
    async fn joined(&self, claim: &Claim, receiver: oneshot::Receiver<Reply>) -> Option<Reply> {
        let mut joined = Joined {
            store: self,
            claim,
            receiver,
        };
        match within(self.0.timeout, &mut joined.receiver).await {
            Ok(reply) => reply.ok(),
            Err(_) => Some(Err(Failed::unknown(LATE))),
        }
    }

    /// Sends the statement of a claim. If its caller has left, releases the grant, or hands the claim to the pursuit.
    async fn claim_to_the_end(self, mut lent: Lent, claim: Claim, is_doubtful: bool, mut pursuer: Pursuer) -> Reply {
        let asked = async { self.on(lent.connection()?).claim(&claim).await };
        let reply = self.await_server(asked).await;
        let is_known = is_known(&reply, is_doubtful);
        match self.0.pursuits.reply(claim.nonce, reply, is_known) {
            Goes::Back(reply) => {
                pursuer.at = At::End;
                if let (false, Ok(runtime)) = (is_known, Handle::try_current()) {
                    self.pursue(&runtime, &claim, self.0.timeout);
                }
                lent.give_back(reply)
            }
            Goes::Over => {
                pursuer.at = At::End;
                lent.give_back(Err(Failed::refused(LATE)))
            }
            Goes::Nowhere(reply) => {
                let is_known = self.end_claim(lent, &claim, reply, is_known).await;
                if let (false, Ok(runtime)) = (is_known, Handle::try_current()) {
                    pursuer.at = At::End;
                    self.pursue(&runtime, &claim, self.0.timeout);
                }
                drop(pursuer);
                Err(Failed::unknown(LATE))
            }
        }
    }

    /// Releases a grant that reached no caller. Returns false if the fate of the claim is still unknown.
    async fn end_claim(&self, mut lent: Lent, claim: &Claim, reply: Reply, is_known: bool) -> bool {
        match reply {
            Ok(Decision::Execute(grant) | Decision::Recover(grant)) => {
                let released = self.release_on(&mut lent, claim, grant.owner).await;
                lent.give_back(released).is_ok()
            }
            reply => {
                drop(lent.give_back(reply));
                is_known
            }
        }
    }

    async fn release_on(&self, lent: &mut Lent, claim: &Claim, owner: Owner) -> Result<(), Failed> {
        let released = async { self.on(lent.connection()?).release(&claim.key, owner).await };
        self.await_server(released).await?;
        telemetry::event(Event::ReleasedBehind);
        Ok(())
    }

    fn pursuer(&self, nonce: Nonce, at: At) -> Pursuer {
        Pursuer {
            inner: Arc::downgrade(&self.0),
            nonce,
            at,
        }
    }

    /// Spawns a task that looks the claim up after pauses, until its fate is known or a caller takes it over.
    fn pursue(&self, runtime: &Handle, claim: &Claim, pause: Duration) {
        match self.0.pursuits.rest(claim.nonce) {
            Some(rest) => {
                let pursuer = self.pursuer(claim.nonce, At::Resting(rest));
                runtime.spawn(pursue(pursuer, claim.clone(), rest, pause));
            }
            None => telemetry::failure(Event::Unrecorded, &LATE),
        }
    }

    /// Looks a claim up in the table, and releases its grant.
    async fn look_up(&self, claim: &Claim) -> Look {
        let Ok(mut lent) = self.lend().await else {
            return Look::Unknown;
        };
        let peeked = async { self.on(lent.connection()?).peek(&claim.key).await };
        match self.await_server(peeked).await {
            Ok(Some(seen)) if seen.nonce == claim.nonce && !matches!(seen.status, Status::Completed(_)) => {
                let owner = Owner {
                    nonce: seen.nonce,
                    fence: seen.fence,
                };
                let released = self.release_on(&mut lent, claim, owner).await;
                Look::of(lent.give_back(released).is_ok())
            }
            // The record belongs to another claim or is completed. Do not claim again, because that could use up an
            // attempt.
            Ok(Some(_)) => Look::of(lent.give_back(Ok(())).is_ok()),
            // The first statement may still arrive. Claim with the same nonce, so that both statements get the same
            // grant, and release it.
            Ok(None) => {
                let asked = async { self.on(lent.connection()?).claim(claim).await };
                let reply = self.await_server(asked).await;
                let is_known = is_known(&reply, true);
                match self.0.pursuits.reply(claim.nonce, reply, is_known) {
                    Goes::Over => {
                        drop(lent.give_back(Ok(())));
                        Look::Over
                    }
                    Goes::Back(reply) | Goes::Nowhere(reply) => {
                        Look::of(self.end_claim(lent, claim, reply, is_known).await)
                    }
                }
            }
            Err(failed) => Look::of(lent.give_back(Err::<(), _>(failed)).is_ok()),
        }
    }
}

/// Whether a reply shows the fate of its claim. If an earlier statement of the same claim may still be running
/// (`is_doubtful`), a refusal of this statement says nothing about the earlier one, which may hold the lock for which
/// this one waited.
fn is_known(reply: &Reply, is_doubtful: bool) -> bool {
    match reply {
        Ok(_) => true,
        Err(failed) => failed.fate == Fate::Refused && !is_doubtful,
    }
}

/// Looks a claim up until its fate is known. Ends when the store is dropped.
async fn pursue(mut pursuer: Pursuer, claim: Claim, mut rest: u64, mut pause: Duration) {
    loop {
        sleep(pause).await;
        pause = (pause * 2).clamp(Duration::from_secs(1), LONGEST_PAUSE);
        let Some(store) = pursuer.inner.upgrade().map(PostgresStore) else {
            return;
        };
        let Ok(_turn) = store.0.pursuits.turns.acquire().await else {
            return;
        };
        if !store.0.pursuits.resume(claim.nonce, rest) {
            pursuer.at = At::End;
            return;
        }
        pursuer.at = At::Asking;
        match store.look_up(&claim).await {
            // Dropping the pursuer ends the pursuit.
            Look::Known => return,
            Look::Over => {
                pursuer.at = At::End;
                return;
            }
            Look::Unknown => {}
        }
        match store.0.pursuits.rest(claim.nonce) {
            Some(next) => rest = next,
            None => {
                pursuer.at = At::End;
                return telemetry::failure(Event::Unrecorded, &LATE);
            }
        }
        pursuer.at = At::Resting(rest);
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

    /// Such entries stayed until the process ended, and took the places of other claims.
    #[test]
    fn pursuits_end_with_the_runtime_of_their_tasks() {
        let (lasting, ending) = (runtime(), runtime());
        let _entered = lasting.enter();
        // Nothing listens at this address, and no test waits for it.
        let pool = PgPool::connect_lazy("postgres://app@127.0.0.1:1/postgres").unwrap();
        let store = PostgresStore::builder().with_pool(pool).unwrap();
        let pursuits = &store.0.pursuits;
        for _ in 0..10 {
            store.pursue(ending.handle(), &claim(), HOUR);
        }
        // These tasks look their claims up, two of them at once.
        for _ in 0..10 {
            store.pursue(ending.handle(), &claim(), Duration::ZERO);
        }
        ending.block_on(tokio::task::yield_now());
        assert!(!pursuits.is_empty());
        let abandoned = claim().nonce;
        let running = store.pursuer(abandoned, At::Asking);
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
        let first = pursuits.rest(nonce).unwrap();
        let second = pursuits.rest(nonce).unwrap();
        pursuits.end(nonce, Some(first));
        pursuits.end(nonce, None);
        assert!(!pursuits.is_empty());
        pursuits.end(nonce, Some(second));
        assert!(pursuits.is_empty());
    }
}
