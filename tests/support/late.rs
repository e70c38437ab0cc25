//! A store whose server carries out every operation, but replies after its callers have given up.
#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(unreachable_pub, reason = "every test binary includes this module as its own")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use tower_idempotency::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};
use tower_idempotency::{Error, Store};

use super::RemoteStore;

/// The time between a request and its reply. The layer waits for 5 s by default.
const DELAY: Duration = Duration::from_secs(6);

/// A [`RemoteStore`] that can be made late. Every second operation then takes effect at once, and
/// the others take effect after [`DELAY`]. The replies to both come after that time. As on a real
/// server, an operation goes on after its caller has left.
#[derive(Clone, Default)]
pub struct LateStore {
    pub store: RemoteStore,
    server: Arc<Server>,
}

#[derive(Default)]
struct Server {
    is_late: AtomicBool,
    operations: AtomicUsize,
    open: AtomicUsize,
}

impl LateStore {
    pub fn set_late(&self, is_late: bool) {
        self.server.is_late.store(is_late, Ordering::SeqCst);
    }

    /// Returns the number of operations that the server works on.
    pub fn open(&self) -> usize {
        self.server.open.load(Ordering::SeqCst)
    }

    /// Returns the number of operations that the server has received while it was late.
    pub fn received(&self) -> usize {
        self.server.operations.load(Ordering::SeqCst)
    }

    async fn serve<R: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<R, Error>> + Send + 'static,
    ) -> Result<R, Error> {
        if !self.server.is_late.load(Ordering::SeqCst) {
            return operation.await;
        }
        let server = Arc::clone(&self.server);
        let number = server.operations.fetch_add(1, Ordering::SeqCst);
        server.open.fetch_add(1, Ordering::SeqCst);
        let (before, after) = match number % 2 {
            0 => (Duration::ZERO, DELAY),
            _ => (DELAY, Duration::ZERO),
        };
        let serving = tokio::spawn(async move {
            tokio::time::sleep(before).await;
            let reply = operation.await;
            tokio::time::sleep(after).await;
            server.open.fetch_sub(1, Ordering::SeqCst);
            reply
        });
        serving.await.unwrap()
    }
}

impl Store for LateStore {
    type Watch = BoxFuture<'static, ()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        let (store, claim) = (self.store.clone(), claim.clone());
        self.serve(async move { store.claim(&claim).await }).await
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        let (store, key) = (self.store.clone(), *key);
        self.serve(async move { store.renew(&key, owner, lease).await }).await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let (store, key, outcome) = (self.store.clone(), *key, outcome.clone());
        self.serve(async move { store.complete(&key, owner, &outcome, retention).await })
            .await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        let (store, key) = (self.store.clone(), *key);
        self.serve(async move { store.release(&key, owner).await }).await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        let (store, key, resolution) = (self.store.clone(), *key, resolution.clone());
        self.serve(async move { store.resolve(&key, fence, &resolution).await })
            .await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let (store, key) = (self.store.clone(), *key);
        self.serve(async move { store.peek(&key).await }).await
    }

    async fn watch(&self, key: &StorageKey) -> Result<Self::Watch, Error> {
        self.store.watch(key).await
    }
}
