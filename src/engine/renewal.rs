//! The tasks that renew leases. Servers, clients and receivers use them alike.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::{Handle, Id};

use super::held_lease::HeldLease;
use crate::clock::sleep;
use crate::detach::spawn_apart;
use crate::sharded::lock;
use crate::sync::Mutex;

/// The interval at which a task checks the leases. The shortest lease is four times as long.
const TICK: Duration = Duration::from_millis(250);

/// The leases of a layer, or of one call, and the way to renew them.
pub(crate) trait Renewer: Send + Sync + 'static {
    /// A handle to an owner's lease.
    type Holder: Send + 'static;

    /// Returns the tasks that renew these leases.
    fn tasks(&self) -> &Arc<RenewalTasks>;

    /// Returns the owners for whose leases `is` returns `true`.
    fn holders(&self, is: impl FnMut(&HeldLease) -> bool) -> Vec<Self::Holder>;

    /// Whether `is` returns `true` for any lease.
    fn any(&self, is: impl Fn(&HeldLease) -> bool) -> bool;

    /// Renews a lease once.
    fn renew(self: Arc<Self>, holder: Self::Holder) -> impl Future<Output = ()> + Send + 'static;
}

/// The tasks that renew the leases of one layer. Each runtime that polls an owner has one such
/// task, as long as the layer has any leases. The task renews a lease of its own runtime after each
/// third of the lease. The task renews a lease of another runtime only if the renewal is overdue,
/// because that runtime may have ended or be blocked.
#[derive(Debug, Default)]
pub(crate) struct RenewalTasks {
    runtimes: Mutex<Vec<Id>>,
}

/// Starts the task that renews leases on this runtime, unless the task runs already.
pub(super) fn ensure_renewal_task<R: Renewer>(renewer: &Arc<R>, runtime: &Handle) {
    let id = runtime.id();
    {
        let mut runtimes = lock(&renewer.tasks().runtimes);
        if runtimes.contains(&id) {
            return;
        }
        runtimes.push(id);
    }
    let entry = TaskEntry {
        tasks: Arc::clone(renewer.tasks()),
        runtime: id,
        has_ended: false,
    };
    // tokio puts a newly spawned task into the LIFO slot of this worker, from which other workers
    // cannot steal. The handler that is called next may block this worker, so `spawn_apart` moves
    // the task to the queue.
    drop(spawn_apart(runtime, renew_while_any(Arc::downgrade(renewer), entry)));
}

/// The entry of a renewal task in the list of runtimes. Dropping it removes the entry.
struct TaskEntry {
    tasks: Arc<RenewalTasks>,
    runtime: Id,
    has_ended: bool,
}

impl TaskEntry {
    /// Removes the entry if no leases are left, and returns whether it did. The check happens under
    /// the lock of the list, so that the next lease finds a running task, or finds no entry and
    /// starts a new task.
    fn ends(&mut self, any_leased: impl FnOnce() -> bool) -> bool {
        let mut runtimes = lock(&self.tasks.runtimes);
        self.has_ended = !any_leased();
        if self.has_ended {
            runtimes.retain(|runtime| *runtime != self.runtime);
        }
        self.has_ended
    }
}

impl Drop for TaskEntry {
    fn drop(&mut self) {
        if !self.has_ended {
            lock(&self.tasks.runtimes).retain(|runtime| *runtime != self.runtime);
        }
    }
}

/// Renews leases on one runtime until no leases are left or the layer is dropped.
async fn renew_while_any<R: Renewer>(renewer: Weak<R>, mut entry: TaskEntry) {
    loop {
        sleep(TICK).await;
        let Some(renewer) = renewer.upgrade() else { return };
        for holder in renewer.holders(|lease| lease.take_renewal(entry.runtime, TICK)) {
            // Begin each renewal in its own task, so that a renewal that hangs or panics does not
            // delay the others. If one renewal waits for a blocked thread, a later one can still
            // succeed.
            drop(tokio::spawn(Arc::clone(&renewer).renew(holder)));
        }
        if entry.ends(|| renewer.any(HeldLease::is_leased)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tasks: &Arc<RenewalTasks>, runtime: Id) -> TaskEntry {
        lock(&tasks.runtimes).push(runtime);
        TaskEntry {
            tasks: Arc::clone(tasks),
            runtime,
            has_ended: false,
        }
    }

    /// An entry without a task would leave all later leases of its runtime without renewals.
    #[test]
    fn the_entry_of_a_task_goes_once_with_the_last_lease_or_with_its_runtime() {
        let runtimes = [(); 2].map(|()| tokio::runtime::Builder::new_current_thread().build().unwrap());
        let [first, second] = runtimes.each_ref().map(|runtime| runtime.handle().id());
        let tasks = Arc::<RenewalTasks>::default();
        let listed = || lock(&tasks.runtimes).clone();
        let (mut ending, dropped) = (entry(&tasks, first), entry(&tasks, second));
        assert!(!ending.ends(|| true));
        assert_eq!(listed(), [first, second]);
        assert!(ending.ends(|| false));
        assert_eq!(listed(), [second]);
        // The next lease starts another task before the old one is dropped.
        let next = entry(&tasks, first);
        drop(ending);
        assert_eq!(listed(), [second, first]);
        drop(dropped);
        assert_eq!(listed(), [first]);
        drop(next);
        assert!(listed().is_empty());
    }
}
