//! A store that is chosen at run time.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use super::{MemoryStore, Store};
use crate::error::Error;
use crate::protocol::{
    Claim, Completion, Decision, Fence, Outcome, Owner, Release, Renewal, Resolution, ResolveResult, Snapshot,
    StorageKey,
};

/// Any [`Store`] behind one type, for programs whose configuration decides where records live.
///
/// Each operation is the same operation of the inner store and keeps all of its promises. It costs
/// one more allocation, except [`Store::claim_now`], which costs none.
///
/// Clones share one store.
///
/// ```
/// use tower_idempotency::{BoxStore, IdempotencyLayer};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tower_idempotency::Error> {
/// let url = std::env::var("IDEMPOTENCY_STORE").unwrap_or_else(|_| "memory:".to_owned());
/// let layer = IdempotencyLayer::new(BoxStore::from_url(&url).await?);
/// # let _: IdempotencyLayer<BoxStore> = layer;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct BoxStore {
    store: Arc<dyn Erased>,
    name: &'static str,
}

impl BoxStore {
    /// Wraps a store of any type.
    #[must_use]
    pub fn new<S: Store>(store: S) -> Self {
        Self {
            store: Arc::new(store),
            name: std::any::type_name::<S>(),
        }
    }

    /// Connects to the store that a URL names, with the defaults of its type:
    ///
    /// | URL | store | feature |
    /// |---|---|---|
    /// | `memory:` | [`MemoryStore`] | |
    /// | `redis://..`, `rediss://..` | Redis or Valkey | `redis`, `redis-rustls` |
    /// | `postgres://..`, `postgresql://..` | PostgreSQL | `postgres` |
    ///
    /// If PostgreSQL is behind a pooler in transaction mode, such as PgBouncer, add
    /// `transaction_pooler=true` to the query of the URL.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the URL has none of these schemes, or
    /// needs a feature that is not enabled. Otherwise the error of the store's own `connect`. An
    /// error that this function makes does not contain the URL, because the URL may hold a
    /// password.
    pub async fn from_url(url: &str) -> Result<Self, Error> {
        match scheme(url) {
            Some(Scheme::Memory) => Ok(Self::new(MemoryStore::new())),
            #[cfg(feature = "postgres")]
            Some(Scheme::Postgres) => super::postgres::PostgresStore::connect(url).await.map(Self::new),
            #[cfg(not(feature = "postgres"))]
            Some(Scheme::Postgres) => Err(Error::configuration(
                "a store in PostgreSQL needs the feature `postgres` of tower-idempotency",
            )),
            #[cfg(feature = "redis")]
            Some(Scheme::Redis) => super::redis::RedisStore::connect(url).await.map(Self::new),
            #[cfg(not(feature = "redis"))]
            Some(Scheme::Redis) => Err(Error::configuration(
                "a store in Redis needs the feature `redis` of tower-idempotency",
            )),
            None => Err(Error::configuration(
                "the URL of the store has an unknown scheme; use `memory:`, `redis://..`, `rediss://..`, `postgres://..` or `postgresql://..`",
            )),
        }
    }
}

impl fmt::Debug for BoxStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BoxStore").field(&format_args!("{}", self.name)).finish()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Memory,
    Postgres,
    Redis,
}

/// "Schemes are case-insensitive" (RFC 3986, section 3.1).
fn scheme(url: &str) -> Option<Scheme> {
    let (scheme, rest) = url.split_once(':')?;
    let is = |name: &str| scheme.eq_ignore_ascii_case(name);
    if is("memory") {
        return (rest.is_empty() || rest == "//").then_some(Scheme::Memory);
    }
    if !rest.starts_with("//") {
        return None;
    }
    if is("redis") || is("rediss") {
        return Some(Scheme::Redis);
    }
    (is("postgres") || is("postgresql")).then_some(Scheme::Postgres)
}

type Reply<'a, T> = BoxFuture<'a, Result<T, Error>>;

/// The object-safe form of [`Store`].
trait Erased: Send + Sync {
    /// The innermost store.
    fn as_any(&self) -> &dyn Any;
    fn claim<'a>(&'a self, claim: &'a Claim) -> Reply<'a, Decision>;
    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>>;

    fn claim_limit(&self) -> Option<Duration>;
    fn renew<'a>(&'a self, key: &'a StorageKey, owner: Owner, lease: Duration) -> Reply<'a, Renewal>;
    fn complete<'a>(
        &'a self,
        key: &'a StorageKey,
        owner: Owner,
        outcome: &'a Outcome,
        retention: Duration,
    ) -> Reply<'a, Completion>;
    fn release<'a>(&'a self, key: &'a StorageKey, owner: Owner) -> Reply<'a, Release>;
    fn resolve<'a>(&'a self, key: &'a StorageKey, fence: Fence, resolution: &'a Resolution)
    -> Reply<'a, ResolveResult>;
    fn peek<'a>(&'a self, key: &'a StorageKey) -> Reply<'a, Option<Snapshot>>;
    fn watch<'a>(&'a self, key: &'a StorageKey) -> Reply<'a, BoxFuture<'static, ()>>;
}

impl<S: Store> Erased for S {
    fn as_any(&self) -> &dyn Any {
        Store::innermost(self)
    }

    fn claim<'a>(&'a self, claim: &'a Claim) -> Reply<'a, Decision> {
        Box::pin(Store::claim(self, claim))
    }

    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        Store::claim_now(self, claim)
    }

    fn claim_limit(&self) -> Option<Duration> {
        Store::claim_limit(self)
    }

    fn renew<'a>(&'a self, key: &'a StorageKey, owner: Owner, lease: Duration) -> Reply<'a, Renewal> {
        Box::pin(Store::renew(self, key, owner, lease))
    }

    fn complete<'a>(
        &'a self,
        key: &'a StorageKey,
        owner: Owner,
        outcome: &'a Outcome,
        retention: Duration,
    ) -> Reply<'a, Completion> {
        Box::pin(Store::complete(self, key, owner, outcome, retention))
    }

    fn release<'a>(&'a self, key: &'a StorageKey, owner: Owner) -> Reply<'a, Release> {
        Box::pin(Store::release(self, key, owner))
    }

    fn resolve<'a>(
        &'a self,
        key: &'a StorageKey,
        fence: Fence,
        resolution: &'a Resolution,
    ) -> Reply<'a, ResolveResult> {
        Box::pin(Store::resolve(self, key, fence, resolution))
    }

    fn peek<'a>(&'a self, key: &'a StorageKey) -> Reply<'a, Option<Snapshot>> {
        Box::pin(Store::peek(self, key))
    }

    fn watch<'a>(&'a self, key: &'a StorageKey) -> Reply<'a, BoxFuture<'static, ()>> {
        Box::pin(async move {
            let watch = Store::watch(self, key).await?;
            Ok(Box::pin(watch) as BoxFuture<'static, ()>)
        })
    }
}

impl Store for BoxStore {
    type Watch = BoxFuture<'static, ()>;

    fn innermost(&self) -> &dyn Any {
        self.store.as_any()
    }

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        self.store.claim(claim).await
    }

    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        self.store.claim_now(claim)
    }

    fn claim_limit(&self) -> Option<Duration> {
        self.store.claim_limit()
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        self.store.renew(key, owner, lease).await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        self.store.complete(key, owner, outcome, retention).await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        self.store.release(key, owner).await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        self.store.resolve(key, fence, resolution).await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        self.store.peek(key).await
    }

    async fn watch(&self, key: &StorageKey) -> Result<Self::Watch, Error> {
        self.store.watch(key).await
    }
}

#[cfg(test)]
#[path = "boxed_tests.rs"]
mod tests;
