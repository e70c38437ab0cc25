//! A process of the application: a runtime of its own, and the entry for its requests.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tower_idempotency::Drain;

use crate::entry::{Entry, Incoming};
use crate::link::{Link, Sender, Shared};
use crate::plan::Plan;

pub(crate) struct Process {
    runtime: Runtime,
    link: Link,
    entry: Entry,
    pub(crate) drain: Drain,
    /// The start of the process, by its own clock.
    epoch: Instant,
    /// The time since the start, by its own clock.
    local: Duration,
    /// The requests that run: the operation, the number of its try, and the task.
    requests: Vec<(usize, usize, AbortHandle)>,
}

impl Process {
    pub(crate) fn start(plan: &Plan, shared: &Arc<Mutex<Shared>>, number: usize) -> Self {
        let sender = Sender {
            process: number,
            incarnation: shared.lock().unwrap().processes[number].incarnation,
        };
        let link = Link {
            shared: Arc::clone(shared),
            sender,
        };
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        #[expect(
            clippy::disallowed_methods,
            reason = "the clock of the process, which the simulation turns"
        )]
        let epoch = runtime.block_on(async { Instant::now() });
        let (entry, drain) = Entry::new(plan, &link);
        Self {
            runtime,
            entry,
            drain,
            link,
            epoch,
            local: Duration::ZERO,
            requests: Vec::new(),
        }
    }

    /// Runs everything that the process does in this time of its own clock.
    pub(crate) fn run_for(&mut self, time: Duration) {
        self.local += time;
        let until = self.epoch + self.local;
        self.runtime.block_on(async { tokio::time::sleep_until(until).await });
    }

    /// Lets the clock of the process jump. All timers in between are due at once.
    pub(crate) fn jump(&mut self, time: Duration) {
        self.local += time;
        self.runtime.block_on(async { tokio::time::advance(time).await });
    }

    /// Takes a request.
    pub(crate) fn take(&mut self, operation: usize, number: usize, request: Incoming) {
        let (entry, link) = (self.entry.clone(), self.link.clone());
        let task = self.runtime.spawn(async move {
            link.respond(operation, number, entry.call(request).await);
        });
        self.requests.push((operation, number, task.abort_handle()));
    }

    /// Drops the request of a client that left.
    pub(crate) fn leave(&mut self, operation: usize, number: usize) {
        self.requests.retain(|(of, at, task)| {
            let is_it = (*of, *at) == (operation, number);
            if is_it {
                task.abort();
            }
            !is_it
        });
    }

    pub(crate) fn alive_tasks(&self) -> usize {
        self.runtime.metrics().num_alive_tasks()
    }

    /// Whether nothing is left to wait for.
    pub(crate) fn is_drained(&mut self) -> bool {
        let drain = self.drain.clone();
        let waiting = async { tokio::time::timeout(Duration::ZERO, drain.wait()).await.is_ok() };
        self.runtime.block_on(waiting)
    }

    /// Ends the process at once.
    pub(crate) fn kill(self) {
        self.runtime.shutdown_background();
    }
}
