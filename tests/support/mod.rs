//! Support for the tests: a store with leases and faults, bodies that stall or break off, a handler
//! that counts its runs, and functions that send requests.
#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(unreachable_pub, reason = "every test binary includes this module as its own")]

#[cfg(feature = "conformance")]
pub mod ablated;
#[cfg(feature = "postgres")]
pub mod bouncer;
#[cfg(all(feature = "postgres", feature = "redis"))]
pub mod garbling_proxy;
pub mod late;
pub mod operation;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub mod port;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod proxy;
#[cfg(feature = "redis")]
pub mod redis;
pub mod rules;
pub mod settings;
#[cfg(all(feature = "postgres", feature = "redis"))]
pub mod turned_clock;

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use tower::{Service, ServiceExt};
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Outcome, Owner, Record, Release, Renewal, Resolution, ResolveResult,
    Snapshot, StorageKey, Transition,
};
use tower_idempotency::{Clock, Error, ErrorKind, Store, Timestamp};

/// How many random sequences a test sends to a store on a server: as many as the documentation of
/// the conformance kit recommends if the tests are thorough, or a fifth.
pub fn sequences() -> usize {
    if settings::is_thorough() { 300 } else { 60 }
}

pub type AnyBody = UnsyncBoxBody<Bytes, Broken>;

/// The error of a body that broke off.
#[derive(Debug)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken off")
    }
}

impl std::error::Error for Broken {}

/// A shared store that behaves like a remote one: every operation yields first, owners must renew
/// their leases, and operations fail on request.
#[derive(Clone, Default)]
pub struct RemoteStore(Arc<Remote>);

#[derive(Default)]
struct Remote {
    records: Mutex<HashMap<StorageKey, Record>>,
    clock: Clock,
    yields: AtomicUsize,
    timers: AtomicBool,
    at_once: AtomicBool,
    claim_limit: Mutex<Option<Duration>>,
    late_claim: Mutex<Option<Duration>>,
    faults: Mutex<HashMap<&'static str, Vec<Fault>>>,
    calls: Mutex<HashMap<&'static str, usize>>,
}

/// The fault of one call of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The operation fails and has no effect.
    Before,
    /// The operation takes effect, and its reply is lost.
    After,
    /// The operation never returns and has no effect.
    Hang,
    /// The operation succeeds after this number of seconds.
    Slow(u8),
    /// The operation takes effect after this number of seconds, and its reply is lost.
    SlowAfter(u8),
    /// The operation takes effect at once, and its reply takes this number of seconds.
    SlowReply(u8),
    /// The record cannot be read.
    Corrupt,
    /// The operation fails because the store is misconfigured, and has no effect.
    Misconfigured,
    /// The operation panics and has no effect.
    Panic,
}

impl RemoteStore {
    pub fn new() -> Self {
        let store = Self::default();
        store.set_yields(1);
        store
    }

    pub fn with_clock(clock: Clock) -> Self {
        let remote = Remote {
            clock,
            ..Remote::default()
        };
        let store = Self(Arc::new(remote));
        store.set_yields(1);
        store
    }

    /// Sets how many times an operation yields before it takes effect, and again before it returns.
    pub fn set_yields(&self, yields: usize) {
        self.0.yields.store(yields, Ordering::SeqCst);
    }

    /// Sets whether operations need the timers of a tokio runtime, as those of a real client do.
    pub fn set_timers(&self, timers: bool) {
        self.0.timers.store(timers, Ordering::SeqCst);
    }

    /// Makes the store report that it ends its claims within this time, although it does not end
    /// them.
    pub fn set_claim_limit(&self, limit: Duration) {
        *self.0.claim_limit.lock().unwrap() = Some(limit);
    }

    /// Makes the next claim fail at once and take effect after this time.
    pub fn delay_claim(&self, delay: Duration) {
        *self.0.late_claim.lock().unwrap() = Some(delay);
    }

    /// Returns a store that decides claims at once, as a store in this process does, although its
    /// owners must renew their leases.
    pub fn deciding_at_once() -> Self {
        let store = Self::new();
        store.0.at_once.store(true, Ordering::SeqCst);
        store
    }

    /// Gives the next calls of `operation` these faults, in order.
    pub fn fail(&self, operation: &'static str, faults: impl IntoIterator<Item = Fault>) {
        self.0
            .faults
            .lock()
            .unwrap()
            .entry(operation)
            .or_default()
            .extend(faults);
    }

    /// Removes all faults.
    pub fn heal(&self) {
        self.0.faults.lock().unwrap().clear();
    }

    pub fn calls(&self, operation: &'static str) -> usize {
        self.0.calls.lock().unwrap().get(operation).copied().unwrap_or(0)
    }

    pub fn len(&self) -> usize {
        self.0.records.lock().unwrap().len()
    }

    /// Returns the only record in the store. Panics if the store has none or several.
    pub fn only(&self) -> (StorageKey, Record) {
        let records = self.0.records.lock().unwrap();
        assert_eq!(records.len(), 1);
        let (key, record) = records.iter().next().unwrap();
        (*key, record.clone())
    }

    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    fn apply<R>(&self, key: &StorageKey, transition: impl FnOnce(Option<&Record>) -> Transition<R>) -> R {
        let mut records = self.0.records.lock().unwrap();
        let Transition { reply, change } = transition(records.get(key));
        match change {
            Change::Unchanged => {}
            Change::Put(record) => drop(records.insert(*key, record)),
            Change::Remove => drop(records.remove(key)),
        }
        reply
    }

    async fn call<R>(
        &self,
        operation: &'static str,
        key: &StorageKey,
        transition: impl FnOnce(Option<&Record>) -> Transition<R>,
    ) -> Result<R, Error> {
        *self.0.calls.lock().unwrap().entry(operation).or_default() += 1;
        let fault = {
            let mut faults = self.0.faults.lock().unwrap();
            faults
                .get_mut(operation)
                .filter(|faults| !faults.is_empty())
                .map(|faults| faults.remove(0))
        };
        yield_times(self.0.yields.load(Ordering::SeqCst)).await;
        if self.0.timers.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        match fault {
            Some(Fault::Before) => return Err(Error::unavailable("connection refused")),
            Some(Fault::Corrupt) => return Err(Error::new(ErrorKind::CorruptRecord, "a record cannot be read")),
            Some(Fault::Misconfigured) => {
                return Err(Error::new(ErrorKind::Configuration, "the table does not exist"));
            }
            Some(Fault::Panic) => panic!("the test wants this operation to panic"),
            Some(Fault::Hang) => return std::future::pending().await,
            Some(Fault::Slow(seconds) | Fault::SlowAfter(seconds)) => {
                tokio::time::sleep(Duration::from_secs(seconds.into())).await;
            }
            Some(Fault::After | Fault::SlowReply(_)) | None => {}
        }
        let reply = self.apply(key, transition);
        if let Some(Fault::SlowReply(seconds)) = fault {
            tokio::time::sleep(Duration::from_secs(seconds.into())).await;
        }
        yield_times(self.0.yields.load(Ordering::SeqCst)).await;
        if self.0.timers.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        match fault {
            Some(Fault::After | Fault::SlowAfter(_)) => Err(Error::unavailable("connection reset")),
            _ => Ok(reply),
        }
    }
}

impl Store for RemoteStore {
    type Watch = BoxFuture<'static, ()>;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        let now = || self.0.clock.now();
        let late = self.0.late_claim.lock().unwrap().take();
        if let Some(delay) = late {
            let (store, claim) = (self.clone(), claim.clone());
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                store.apply(&claim.key, |record| Record::claim(record, &claim, store.0.clock.now()));
            });
            return Err(Error::unavailable("connection reset"));
        }
        self.call("claim", &claim.key, |record| Record::claim(record, claim, now()))
            .await
    }

    fn claim_limit(&self) -> Option<Duration> {
        *self.0.claim_limit.lock().unwrap()
    }

    fn claim_now(&self, claim: &Claim) -> Option<Result<Decision, Error>> {
        if !self.0.at_once.load(Ordering::SeqCst) {
            return None;
        }
        Some(Ok(self.apply(&claim.key, |record| {
            Record::claim(record, claim, self.0.clock.now())
        })))
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        self.call("renew", key, |record| {
            Record::renew(record, owner, lease, self.0.clock.now())
        })
        .await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let complete =
            |record: Option<&Record>| Record::complete(record, owner, outcome, retention, self.0.clock.now());
        self.call("complete", key, complete).await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        self.call("release", key, |record| {
            Record::release(record, owner, self.0.clock.now())
        })
        .await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        self.call("resolve", key, |record| {
            Record::resolve(record, fence, resolution, self.0.clock.now())
        })
        .await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let peek = |record: Option<&Record>| Transition {
            reply: Record::peek(record, self.0.clock.now()),
            change: Change::Unchanged,
        };
        self.call("peek", key, peek).await
    }

    /// Never wakes, so a waiter must poll.
    async fn watch(&self, _: &StorageKey) -> Result<Self::Watch, Error> {
        Ok(Box::pin(std::future::pending()))
    }
}

/// Measures time as the crate does. It follows the clock of tokio, even when that clock is paused.
pub struct Timer(Clock, Timestamp);

impl Timer {
    pub fn start() -> Self {
        let clock = Clock::system();
        let now = clock.now();
        Self(clock, now)
    }

    pub fn elapsed(&self) -> Duration {
        self.0.now().saturating_since(self.1)
    }
}

pub async fn yield_times(times: usize) {
    for _ in 0..times {
        tokio::task::yield_now().await;
    }
}

/// Moves the paused clock forward after all ready tasks have run, and then lets the tasks run that
/// have become ready. The paused clock does not move by itself while a task keeps waking itself.
pub async fn advance(duration: Duration) {
    yield_times(50).await;
    tokio::time::advance(duration).await;
    yield_times(50).await;
}

/// A handler that counts its runs. By default, it responds with the number of the run.
#[derive(Clone, Default)]
pub struct Handler {
    pub started: Arc<AtomicUsize>,
    pub finished: Arc<AtomicUsize>,
    yields: usize,
    delay: Duration,
    respond: Option<Respond>,
}

type Respond = Arc<dyn Fn(usize) -> Response<AnyBody> + Send + Sync>;

impl Handler {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn yielding(mut self, times: usize) -> Self {
        self.yields = times;
        self
    }

    pub fn taking(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    pub fn responding(mut self, respond: impl Fn(usize) -> Response<AnyBody> + Send + Sync + 'static) -> Self {
        self.respond = Some(Arc::new(respond));
        self
    }

    pub fn runs(&self) -> usize {
        self.started.load(Ordering::SeqCst)
    }

    pub fn finished(&self) -> usize {
        self.finished.load(Ordering::SeqCst)
    }
}

impl Service<Request<AnyBody>> for Handler {
    type Response = Response<AnyBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<AnyBody>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let n = this.started.fetch_add(1, Ordering::SeqCst) + 1;
            drop(request.into_body().collect().await);
            yield_times(this.yields).await;
            if !this.delay.is_zero() {
                tokio::time::sleep(this.delay).await;
            }
            let response = match &this.respond {
                Some(respond) => respond(n),
                None => text(StatusCode::CREATED, format!("run {n}")),
            };
            this.finished.fetch_add(1, Ordering::SeqCst);
            Ok(response)
        })
    }
}

pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<AnyBody> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response
}

pub fn full(body: impl Into<Bytes>) -> AnyBody {
    Full::new(body.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that plays its frames and yields before each one.
pub struct Frames {
    frames: std::vec::IntoIter<Play>,
    yielded: bool,
}

/// One step of [`Frames`].
pub enum Play {
    Data(&'static str),
    Trailers(HeaderMap),
    Break,
    Panic,
    Stall,
}

pub fn frames(frames: Vec<Play>) -> AnyBody {
    Frames {
        frames: frames.into_iter(),
        yielded: false,
    }
    .boxed_unsync()
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        self.yielded = !self.yielded;
        if self.yielded {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(match self.frames.next() {
            None => None,
            Some(Play::Data(data)) => Some(Ok(Frame::data(Bytes::from_static(data.as_bytes())))),
            Some(Play::Trailers(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Some(Play::Break) => Some(Err(Broken)),
            Some(Play::Panic) => panic!("a body that panics"),
            Some(Play::Stall) => return Poll::Pending,
        })
    }
}

/// A body that yields `front`, stalls until `rest` is ready, and then ends.
pub fn stalling(front: &'static str, rest: impl Future<Output = ()> + Send + 'static) -> AnyBody {
    let front = futures::stream::iter([Ok(Frame::data(Bytes::from_static(front.as_bytes())))]);
    let rest = futures::StreamExt::filter_map(futures::stream::once(rest), |()| async { None });
    http_body_util::StreamBody::new(futures::StreamExt::chain(front, rest)).boxed_unsync()
}

/// A body that ends without an error although `missing` bytes of its declared length are missing.
pub fn short(front: &'static str, missing: u64) -> AnyBody {
    Short {
        front: (!front.is_empty()).then(|| Bytes::from_static(front.as_bytes())),
        missing,
    }
    .boxed_unsync()
}

struct Short {
    front: Option<Bytes>,
    missing: u64,
}

impl Body for Short {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        Poll::Ready(self.front.take().map(|front| Ok(Frame::data(front))))
    }

    fn size_hint(&self) -> SizeHint {
        let front = self.front.as_ref().map_or(0, Bytes::len);
        SizeHint::with_exact(front as u64 + self.missing)
    }
}

/// A body of these frames. Its size hint is the length of the whole body and does not fall while
/// the body is read.
pub fn fixed_hint(frames: &[&'static str]) -> AnyBody {
    FixedHint {
        hint: frames.iter().map(|frame| frame.len() as u64).sum(),
        frames: frames
            .iter()
            .map(|frame| Bytes::from_static(frame.as_bytes()))
            .collect(),
    }
    .boxed_unsync()
}

struct FixedHint {
    frames: VecDeque<Bytes>,
    hint: u64,
}

impl Body for FixedHint {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        Poll::Ready(self.frames.pop_front().map(|frame| Ok(Frame::data(frame))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.hint)
    }
}

/// A body of endless empty frames, each ready at once.
pub fn empty_frames() -> AnyBody {
    let empty = futures::stream::repeat_with(|| Ok(Frame::data(Bytes::new())));
    http_body_util::StreamBody::new(empty).boxed_unsync()
}

pub fn post(key: &str, body: impl Into<Bytes>) -> Request<AnyBody> {
    request(key, full(body))
}

pub fn request(key: &str, body: AnyBody) -> Request<AnyBody> {
    Request::post("/payments")
        .header("idempotency-key", key)
        .body(body)
        .unwrap()
}

/// A response whose body has been read to its end.
#[derive(Debug)]
pub struct Got {
    pub head: http::response::Parts,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl Got {
    pub fn status(&self) -> u16 {
        self.head.status.as_u16()
    }

    pub fn is_replay(&self) -> bool {
        self.head
            .headers
            .get("idempotent-replayed")
            .is_some_and(|marker| marker == "true")
    }

    pub fn code(&self) -> &'static str {
        self.head
            .extensions
            .get::<tower_idempotency::Refusal>()
            .map_or("", tower_idempotency::Refusal::code)
    }
}

/// Sends a request through a clone of the service and reads the response to its end.
#[expect(
    clippy::future_not_send,
    reason = "the future is `Send` if the service is, and some services are not"
)]
pub async fn send<S>(service: &S, request: Request<AnyBody>) -> Got
where
    S: Service<Request<AnyBody>, Response = Response<AnyBody>> + Clone,
    S::Error: std::fmt::Debug,
{
    got(service.clone().oneshot(request).await.unwrap()).await
}

/// Sends a request in a new task.
pub fn start<S>(service: &S, request: Request<AnyBody>) -> tokio::task::JoinHandle<Got>
where
    S: Service<Request<AnyBody>, Response = Response<AnyBody>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: std::fmt::Debug + Send,
{
    let service = service.clone();
    tokio::spawn(async move { got(service.oneshot(request).await.unwrap()).await })
}

pub async fn got(response: Response<AnyBody>) -> Got {
    let (head, body) = response.into_parts();
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned();
    Got {
        head,
        body: collected.to_bytes(),
        trailers,
    }
}

/// Polls a future up to `times` times, each time after it was woken, and then drops it. Returns the
/// output if the future was ready before.
pub async fn poll_then_drop<F: Future>(times: usize, future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    for _ in 0..times {
        let woken = Arc::new(Woken::default());
        let waker = futures::task::waker(Arc::clone(&woken));
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
        // Let other tasks run until one of them wakes this future.
        for _ in 0..200 {
            if woken.0.load(Ordering::SeqCst) {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    None
}

#[derive(Default)]
struct Woken(AtomicBool);

impl futures::task::ArcWake for Woken {
    fn wake_by_ref(woken: &Arc<Self>) {
        woken.0.store(true, Ordering::SeqCst);
    }
}

/// Polls a future `polls` times, each time after it was woken, then drops it.
pub async fn drop_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    let mut polled = 0;
    std::future::poll_fn(|cx| {
        polled += 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if polled == polls => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
