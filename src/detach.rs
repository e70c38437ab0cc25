//! Operations that continue after their callers have left.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::task::JoinHandle;

use crate::sync::atomic::{AtomicUsize, Ordering};

/// A future that its caller polls in place, and that continues in a spawned task if the caller
/// drops it early. Only an abandoned call costs a task.
pub(crate) struct DetachOnDrop<T: 'static, D: Detach = Option<Arc<TaskTracker>>> {
    operation: Option<BoxFuture<'static, T>>,
    /// The runtime of the last poll. The runtime of the first poll may have ended.
    runtime: Option<Handle>,
    /// Continues the rest of the operation if the caller leaves.
    rest: D,
}

/// Continues the rest of an operation whose caller has left.
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

/// The default limit of executions without a caller (I10). At this limit, no new executions begin.
pub(crate) const MOST_DETACHED: usize = 16_384;

/// The limit of lost claims that wait for a store to be reachable again, and of ends of attempts
/// that do (I10).
const MOST_DEFERRED: usize = 1_024;

/// Counts operations with and without a caller, so that a drain can wait for them (I11).
///
/// An operation that hands its work over adds to `running` before it subtracts from `attended`. A
/// drain reads the two in the other order. The subtraction releases and the read acquires, so a
/// drain that no longer finds the operation in `attended` finds its work in `running`. In the same
/// way, a drain that reads zero in `running` sees all effects of the tasks that have ended.
#[derive(Debug, Default)]
pub(crate) struct TaskTracker {
    /// Tasks without a caller.
    running: AtomicUsize,
    /// Operations whose callers are still waiting.
    attended: AtomicUsize,
    bounded: Arc<Bounded>,
    /// Notified when the last running task ends.
    ended: Notify,
}

/// The counts of work without a caller that have an upper bound. No other data depends on a count,
/// so each needs only that its steps are atomic.
#[derive(Debug, Default)]
struct Bounded {
    /// Executions whose callers have left.
    detached: AtomicUsize,
    /// Claims to release once the store is reachable again.
    claims: AtomicUsize,
    /// Ends of attempts to record once the store is reachable again.
    ends: AtomicUsize,
    /// The bytes of these ends.
    bytes: AtomicUsize,
}

/// A write that the process owes a store. The two kinds are counted separately, because claims keep
/// failing while a store is unreachable. They must not use up the room for the ends of earlier
/// attempts.
#[derive(Clone, Copy)]
pub(crate) enum Deferred {
    /// Releases a claim that may have been granted.
    ReleaseClaim,
    /// Records the end of an attempt. Holds the size of its response in bytes.
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

/// Counts a deferred write until it is dropped.
struct DeferredPermit {
    tracker: Arc<TaskTracker>,
    write: Deferred,
}

impl DeferredPermit {
    fn count(&self) -> &AtomicUsize {
        match self.write {
            Deferred::ReleaseClaim => &self.tracker.bounded.claims,
            Deferred::RecordEnd(_) => &self.tracker.bounded.ends,
        }
    }
}

impl Drop for DeferredPermit {
    fn drop(&mut self) {
        self.count().fetch_sub(1, Ordering::AcqRel);
        self.tracker
            .bounded
            .bytes
            .fetch_sub(self.write.bytes(), Ordering::AcqRel);
    }
}

/// Counts an operation whose caller is still waiting, until it is dropped.
pub(crate) struct Attended<'t>(&'t TaskTracker);

impl Drop for Attended<'_> {
    fn drop(&mut self) {
        self.0.attended.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Counts an execution whose caller has left, until it is dropped.
struct Detached(Arc<TaskTracker>);

impl Drop for Detached {
    fn drop(&mut self) {
        self.0.bounded.detached.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Counts a task without a caller, until it is dropped.
struct Running(Arc<TaskTracker>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

impl TaskTracker {
    /// Makes a tracker that shares its bounds with all other trackers from this function, for work
    /// that has no layer to share a tracker.
    #[cfg(any(test, feature = "once"))]
    pub(crate) fn with_bounds_of_process() -> Self {
        static OF_PROCESS: std::sync::LazyLock<Arc<Bounded>> = std::sync::LazyLock::new(Arc::default);
        Self {
            bounded: Arc::clone(&OF_PROCESS),
            ..Self::default()
        }
    }

    /// Spawns a task that a drain waits for.
    pub(crate) fn spawn(self: &Arc<Self>, runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) {
        self.running.fetch_add(1, Ordering::AcqRel);
        let running = Running(Arc::clone(self));
        runtime.spawn(async move {
            work.await;
            drop(running);
        });
    }

    /// Continues an execution whose caller has left. This never fails, because the effect may have
    /// happened. Check [`detached`](Self::detached) before a new execution begins.
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

    /// Returns whether so many claims got no reply that no more may be sent. Once the store is
    /// reachable again, it may grant each of them, and this process must then release each of them.
    pub(crate) fn has_many_lost_claims(&self) -> bool {
        self.bounded.claims.load(Ordering::Acquire) >= MOST_DEFERRED
    }

    /// Spawns a deferred write. Drops the end of an attempt if 1,024 ends or 64 MiB of them are
    /// pending (I10); the lease of the record then expires instead. Never drops the release of a
    /// lost claim, because [no more claims are sent](Self::has_many_lost_claims) while many are
    /// pending.
    pub(crate) fn spawn_deferred(
        self: &Arc<Self>,
        runtime: &Handle,
        write: Deferred,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        const MOST_BYTES: usize = 64 << 20;
        let permit = DeferredPermit {
            tracker: Arc::clone(self),
            write,
        };
        let others = permit.count().fetch_add(1, Ordering::AcqRel);
        let bytes = self.bounded.bytes.fetch_add(write.bytes(), Ordering::AcqRel);
        let has_room = others < MOST_DEFERRED && bytes.saturating_add(write.bytes()) <= MOST_BYTES;
        if has_room || matches!(write, Deferred::ReleaseClaim) {
            self.spawn(runtime, async move {
                work.await;
                drop(permit);
            });
        }
    }

    /// Counts an operation whose caller is still waiting, until the returned value is dropped.
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

    /// Waits until the last running task ends.
    pub(crate) fn ended(&self) -> Notified<'_> {
        self.ended.notified()
    }
}

/// Spawns a task that another thread can run at once, even if the calling task then blocks its own
/// thread.
///
/// A worker thread of tokio keeps the task that was spawned last in a private slot, from which no
/// other thread takes it. So this function spawns an empty task afterwards, which takes the slot
/// and moves the first task to the queue.
pub(crate) fn spawn_apart(runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let spawned = runtime.spawn(task);
    drop(runtime.spawn(std::future::ready(())));
    spawned
}

/// Makes an operation that runs to its end, even if its caller leaves before the first poll.
/// Returns `None` outside of a runtime.
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
    /// Makes an operation that continues without its caller. An operation that was never polled
    /// within a runtime is dropped with its caller.
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
        // Take the operation out while it runs. If it panics, it is dropped here and never polled
        // again.
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
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use futures::FutureExt;
    use tokio::sync::{Semaphore, oneshot};

    use super::*;

    #[tokio::test]
    async fn dropped_operation_continues_in_a_task() {
        let (resume, resumed) = oneshot::channel();
        let (done, is_done) = oneshot::channel();
        let mut operation = detach_on_drop(
            async move {
                let received: Result<(), _> = resumed.await;
                done.send(received).unwrap();
            },
            None,
        );
        assert!(operation.as_mut().unwrap().now_or_never().is_none());
        drop(operation);
        resume.send(()).unwrap();
        assert_eq!(is_done.await, Ok(Ok(())));
    }

    #[test]
    fn dropped_operation_continues_on_the_runtime_of_its_last_poll() {
        let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (first, last) = (runtime(), runtime());
        let (resume, resumed) = oneshot::channel::<()>();
        let (done, is_done) = oneshot::channel();
        let work = async move { done.send(resumed.await).unwrap() };
        let entered = first.enter();
        let mut operation = detach_on_drop(work, None).unwrap();
        drop(entered);
        last.block_on(async { assert!((&mut operation).now_or_never().is_none()) });
        drop(first);
        drop(operation);
        resume.send(()).unwrap();
        assert_eq!(last.block_on(is_done), Ok(Ok(())));
    }

    #[tokio::test]
    async fn trackers_of_the_process_share_their_bounds_but_not_their_drains() {
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
    async fn operation_that_panicked_is_not_polled_again() {
        let mut operation = detach_on_drop(async { panic!("in the operation") }, None).unwrap();
        let polled = catch_unwind(AssertUnwindSafe(|| (&mut operation).now_or_never()));
        assert!(polled.map(|_: Option<()>| ()).is_err());
        assert!((&mut operation).now_or_never().is_none());
    }

    #[test]
    fn outside_of_a_runtime_there_is_no_operation() {
        assert!(detach_on_drop(async {}, None).is_none());
    }

    #[tokio::test]
    async fn ends_of_attempts_that_wait_for_the_store_are_bounded_in_number_and_bytes() {
        const MEBIBYTE: usize = 1 << 20;
        let runtime = Handle::current();
        let defer = |tracker: &Arc<TaskTracker>, write, until: &Arc<Semaphore>| {
            let until = Arc::clone(until);
            tracker.spawn_deferred(&runtime, write, async move { drop(until.acquire().await) });
            tracker.running()
        };
        let (tracker, reachable) = (Arc::<TaskTracker>::default(), Arc::new(Semaphore::new(0)));
        for number in 1..=MOST_DEFERRED {
            assert_eq!(defer(&tracker, Deferred::RecordEnd(0), &reachable), number);
        }
        assert_eq!(defer(&tracker, Deferred::RecordEnd(0), &reachable), MOST_DEFERRED);
        assert_eq!(defer(&tracker, Deferred::ReleaseClaim, &reachable), MOST_DEFERRED + 1);

        let tracker = Arc::<TaskTracker>::default();
        for _ in 0..2 {
            let reachable = Arc::new(Semaphore::new(0));
            for (mebibytes, running) in [(60, 1), (5, 1), (4, 2)] {
                let write = Deferred::RecordEnd(mebibytes * MEBIBYTE);
                assert_eq!(defer(&tracker, write, &reachable), running);
            }
            reachable.close();
            while tracker.running() > 0 {
                tokio::task::yield_now().await;
            }
        }
    }
}
