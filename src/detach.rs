//! Operations that go on when nobody waits for them any more.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::futures::Notified;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// An operation that its caller polls in place. When the caller drops it half-way, the rest continues in a task. So only a caller
/// that leaves costs a task.
pub(crate) struct DetachOnDrop<T: 'static, D: Detach = Option<Arc<TaskTracker>>> {
    operation: Option<BoxFuture<'static, T>>,
    /// The runtime of the last poll, because the runtime of the first poll may have ended.
    runtime: Option<Handle>,
    rest: D,
}

/// The owner of the rest of an operation whose caller left.
pub(crate) trait Detach: Unpin {
    /// Continues the rest in a task on `runtime`, or drops it.
    fn detach(&self, runtime: &Handle, rest: impl Future<Output = ()> + Send + 'static);
}

impl Detach for Option<Arc<TaskTracker>> {
    fn detach(&self, runtime: &Handle, rest: impl Future<Output = ()> + Send + 'static) {
        match self {
            Some(tracker) => tracker.detach(runtime, rest),
            None => drop(runtime.spawn(rest)),
        }
    }
}

/// The default limit of executions without a caller. At this limit, no new executions begin.
pub(crate) const MOST_DETACHED: usize = 16_384;

/// The limit of the claims, and of the ends of attempts, that wait for a store to be back.
const MOST_DEFERRED: usize = 1_024;

/// Counts what runs without a caller.
#[derive(Debug, Default)]
pub(crate) struct TaskTracker {
    running: AtomicUsize,
    attended: AtomicUsize,
    bounded: Arc<Bounded>,
    ended: Notify,
}

/// The counts of work without a caller that has an upper bound.
#[derive(Debug, Default)]
struct Bounded {
    /// Executions whose callers left.
    detached: AtomicUsize,
    /// Claims that are to be released once the store is back.
    claims: AtomicUsize,
    /// Ends that are to be recorded once the store is back.
    ends: AtomicUsize,
    /// The bytes of those ends.
    held: AtomicUsize,
}

/// What a store is to be told later. The two are counted apart: claims fail all the while that a store is away, and must not keep it
/// from being told how those ended that were under way before.
#[derive(Clone, Copy)]
pub(crate) enum Deferred {
    /// That a claim of unknown fate is void.
    ReleaseClaim,
    /// How an attempt ended, in so many bytes.
    RecordEnd(usize),
}

impl Deferred {
    const fn bytes(self) -> usize {
        match self {
            Self::ReleaseClaim => 0,
            Self::RecordEnd(bytes) => bytes,
        }
    }
}

struct DeferredPermit {
    tracker: Arc<TaskTracker>,
    word: Deferred,
}

impl DeferredPermit {
    fn count(&self) -> &AtomicUsize {
        match self.word {
            Deferred::ReleaseClaim => &self.tracker.bounded.claims,
            Deferred::RecordEnd(_) => &self.tracker.bounded.ends,
        }
    }
}

impl Drop for DeferredPermit {
    fn drop(&mut self) {
        self.count().fetch_sub(1, Ordering::AcqRel);
        self.tracker.bounded.held.fetch_sub(self.word.bytes(), Ordering::AcqRel);
    }
}

/// Something that runs with a caller, as long as this lives.
pub(crate) struct Attended<'t>(&'t TaskTracker);

impl Drop for Attended<'_> {
    fn drop(&mut self) {
        self.0.attended.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Detached(Arc<TaskTracker>);

impl Drop for Detached {
    fn drop(&mut self) {
        self.0.bounded.detached.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Running(Arc<TaskTracker>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

impl TaskTracker {
    /// A tracker that shares its bounds with all others that are made here, for work that has no layer to share a tracker.
    #[cfg(any(test, feature = "once"))]
    pub(crate) fn with_bounds_of_process() -> Self {
        static OF_PROCESS: std::sync::LazyLock<Arc<Bounded>> = std::sync::LazyLock::new(Arc::default);
        Self {
            bounded: Arc::clone(&OF_PROCESS),
            ..Self::default()
        }
    }

    pub(crate) fn spawn(self: &Arc<Self>, runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) {
        self.running.fetch_add(1, Ordering::AcqRel);
        let running = Running(Arc::clone(self));
        runtime.spawn(async move {
            work.await;
            drop(running);
        });
    }

    /// Continues an execution whose caller has left. This never fails, because the effect may have happened. Check
    /// [`detached`](Self::detached) before a new execution begins.
    pub(crate) fn detach(self: &Arc<Self>, runtime: &Handle, rest: impl Future<Output = ()> + Send + 'static) {
        self.bounded.detached.fetch_add(1, Ordering::AcqRel);
        let detached = Detached(Arc::clone(self));
        self.spawn(runtime, async move {
            rest.await;
            drop(detached);
        });
    }

    /// Returns the number of running executions whose callers have left.
    pub(crate) fn detached(&self) -> usize {
        self.bounded.detached.load(Ordering::Acquire)
    }

    /// Whether so many claims got no reply that no more may be sent. A store that is back may grant each of them, and each
    /// must then be released.
    pub(crate) fn has_many_lost_claims(&self) -> bool {
        self.bounded.claims.load(Ordering::Acquire) >= MOST_DEFERRED
    }

    /// Reports to a store later what could not be reported now. No lost claim is dropped, because
    /// [no more are sent](Self::has_many_lost_claims) when there are many. Ends have an upper bound; beyond it, the leases end the attempts.
    pub(crate) fn spawn_deferred(
        self: &Arc<Self>,
        runtime: &Handle,
        word: Deferred,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        const MOST_BYTES: usize = 64 << 20;
        let behind = DeferredPermit {
            tracker: Arc::clone(self),
            word,
        };
        let others = behind.count().fetch_add(1, Ordering::AcqRel);
        let held = self.bounded.held.fetch_add(word.bytes(), Ordering::AcqRel);
        let has_room = others < MOST_DEFERRED && held.saturating_add(word.bytes()) <= MOST_BYTES;
        if has_room || matches!(word, Deferred::ReleaseClaim) {
            self.spawn(runtime, async move {
                work.await;
                drop(behind);
            });
        }
    }

    /// Counts what has a caller, who may go away at any moment.
    pub(crate) fn attend(&self) -> Attended<'_> {
        self.attended.fetch_add(1, Ordering::AcqRel);
        Attended(self)
    }

    pub(crate) fn attended(&self) -> usize {
        self.attended.load(Ordering::Acquire)
    }

    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::Acquire)
    }

    /// Wakes whoever waits when the last one ends.
    pub(crate) fn ended(&self) -> Notified<'_> {
        self.ended.notified()
    }
}

/// Spawns a task that another thread can run at once, even if the calling task then blocks its own thread.
///
/// A worker thread of tokio keeps the task that was spawned last in a private slot, from which no other thread takes
/// it. So this function spawns an empty task afterwards, which takes the slot and moves the first task to the queue.
pub(crate) fn spawn_apart(runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let spawned = runtime.spawn(task);
    drop(runtime.spawn(std::future::ready(())));
    spawned
}

/// Runs an operation to its end, also if its caller leaves. Returns `None` outside of a runtime.
pub(crate) fn detach_on_drop<T>(
    operation: impl Future<Output = T> + Send + 'static,
    tracker: Option<Arc<TaskTracker>>,
) -> Option<DetachOnDrop<T>> {
    let runtime = Handle::try_current().ok()?;
    let mut operation = DetachOnDrop::new(Box::pin(operation), tracker);
    operation.runtime = Some(runtime);
    Some(operation)
}

impl<T, D: Detach> DetachOnDrop<T, D> {
    /// An operation that was never polled within a runtime is dropped with its caller.
    pub(crate) const fn new(operation: BoxFuture<'static, T>, rest: D) -> Self {
        Self {
            operation: Some(operation),
            runtime: None,
            rest,
        }
    }
}

impl<T, D: Detach> Future for DetachOnDrop<T, D> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // Take the operation out while it runs. If it panics, it is dropped here and never polled again.
        let Some(mut operation) = self.operation.take() else {
            return Poll::Pending;
        };
        let polled = operation.as_mut().poll(cx);
        if polled.is_pending() {
            self.operation = Some(operation);
            if let Ok(runtime) = Handle::try_current() {
                self.runtime = Some(runtime);
            }
        }
        polled
    }
}

impl<T, D: Detach> Drop for DetachOnDrop<T, D> {
    fn drop(&mut self) {
        if let (Some(operation), Some(runtime)) = (self.operation.take(), &self.runtime) {
            self.rest.detach(runtime, async move { drop(operation.await) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, AssertUnwindSafe};

    use futures::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_is_dropped_half_way_goes_on() {
        let (go_on, told_to) = oneshot::channel();
        let (done, is_done) = oneshot::channel();
        let mut operation = detach_on_drop(
            async move {
                let told: Result<(), _> = told_to.await;
                done.send(told).unwrap();
            },
            None,
        );
        assert!(operation.as_mut().unwrap().now_or_never().is_none());
        drop(operation);
        go_on.send(()).unwrap();
        assert_eq!(is_done.await, Ok(Ok(())));
    }

    #[test]
    fn what_is_dropped_after_the_runtime_in_which_it_was_made_goes_on_where_it_was_polled_last() {
        let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (first, last) = (runtime(), runtime());
        let (go_on, told_to) = oneshot::channel::<()>();
        let (done, is_done) = oneshot::channel();
        let work = async move { done.send(told_to.await).unwrap() };
        let entered = first.enter();
        let mut operation = detach_on_drop(work, None).unwrap();
        drop(entered);
        last.block_on(async { assert!((&mut operation).now_or_never().is_none()) });
        drop(first);
        drop(operation);
        go_on.send(()).unwrap();
        assert_eq!(last.block_on(is_done), Ok(Ok(())));
    }

    #[tokio::test]
    async fn trackers_with_the_bounds_of_the_process_count_together_and_wait_apart() {
        let (one, other) = (
            TaskTracker::with_bounds_of_process(),
            TaskTracker::with_bounds_of_process(),
        );
        let (one, other) = (Arc::new(one), Arc::new(other));
        one.detach(&Handle::current(), std::future::pending());
        assert_eq!((one.detached(), other.detached()), (1, 1));
        assert_eq!((one.running(), other.running()), (1, 0));
        assert_eq!(TaskTracker::default().detached(), 0);
    }

    #[tokio::test]
    async fn what_has_panicked_is_not_polled_again() {
        let mut operation = detach_on_drop(async { panic!("the driver's") }, None).unwrap();
        let polled = catch_unwind(AssertUnwindSafe(|| (&mut operation).now_or_never()));
        assert!(polled.map(|_: Option<()>| ()).is_err());
        assert!((&mut operation).now_or_never().is_none());
    }

    #[test]
    fn outside_of_a_runtime_there_is_no_operation() {
        assert!(detach_on_drop(async {}, None).is_none());
    }
}
