//! A process of the application: one or two runtimes, which share the entry for its requests.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tower_idempotency::Drain;

use crate::entry::{Entry, Incoming};
use crate::link::{Link, Sender, Shared};
use crate::plan::Plan;
use crate::random::Random;

pub(crate) struct Process {
    /// The runtimes. One that has ended is `None`.
    runtimes: Vec<Option<OneRuntime>>,
    link: Link,
    entry: Entry,
    pub(crate) drain: Drain,
    /// The start of the process, by the clock of all its runtimes.
    epoch: Instant,
    /// The time since the start, by its own clock. Whole milliseconds give the timers of two runtimes
    /// the same order in each simulation of a seed.
    local: Duration,
    /// The time that is left to run, shorter than a millisecond.
    rest: Duration,
}

struct OneRuntime {
    runtime: Runtime,
    is_blocked: bool,
    /// The time for which it has been blocked or has had no tasks. Its clock does not show this time yet.
    behind: Duration,
    /// The requests that run: the operation, the number of its try, and the task.
    requests: Vec<(usize, usize, AbortHandle)>,
}

/// The time by which the clock of a process is ahead when it starts. A runtime that starts later
/// jumps forward to this clock, so the time must be longer than a simulation takes.
const AHEAD: Duration = Duration::from_secs(600);

impl OneRuntime {
    /// Starts a runtime. Its clock stands still.
    fn start() -> Self {
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        Self {
            runtime,
            is_blocked: false,
            behind: Duration::ZERO,
            requests: Vec::new(),
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the clock of the process, which the simulation turns"
    )]
    fn now(&self) -> Instant {
        self.runtime.block_on(async { Instant::now() })
    }

    fn has_no_tasks(&self) -> bool {
        self.runtime.metrics().num_alive_tasks() == 0
    }

    /// Lets the clock jump. All timers in between are due at once.
    fn jump(&self, time: Duration) {
        self.runtime.block_on(async { tokio::time::advance(time).await });
    }

    fn jump_to(&self, time: Instant) {
        self.jump(time - self.now());
    }
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
        let runtimes: Vec<OneRuntime> = (0..plan.runtimes).map(|_| OneRuntime::start()).collect();
        // The clocks of all runtimes show the same time, to a millisecond.
        let epoch = runtimes.iter().map(OneRuntime::now).max().unwrap() + AHEAD;
        for runtime in &runtimes {
            runtime.jump_to(epoch);
        }
        let (entry, drain) = Entry::new(plan, &link);
        Self {
            runtimes: runtimes.into_iter().map(Some).collect(),
            entry,
            drain,
            link,
            epoch,
            local: Duration::ZERO,
            rest: Duration::ZERO,
        }
    }

    /// Runs everything that the process does in this time of its own clock.
    pub(crate) fn run_for(&mut self, time: Duration, random: &mut Random) {
        let time = self.rest + time;
        let whole = Duration::from_millis(u64::try_from(time.as_millis()).unwrap());
        self.rest = time - whole;
        self.local += whole;
        let until = self.epoch + self.local;
        let mut order: Vec<usize> = (0..self.runtimes.len()).collect();
        random.shuffle(&mut order);
        for number in order {
            match &mut self.runtimes[number] {
                Some(one) if one.is_blocked || one.has_no_tasks() => one.behind += whole,
                Some(one) => {
                    if !one.behind.is_zero() {
                        let behind = std::mem::take(&mut one.behind);
                        one.jump(behind);
                    }
                    one.runtime.block_on(async { tokio::time::sleep_until(until).await });
                }
                None => {}
            }
        }
    }

    /// Lets the clock of the process jump.
    pub(crate) fn jump(&mut self, time: Duration) {
        self.local += time;
        for one in self.runtimes.iter_mut().flatten() {
            match one.is_blocked {
                true => one.behind += time,
                false => one.jump(time),
            }
        }
    }

    /// Lets a runtime stand still while its clock goes on, or lets it run again.
    pub(crate) fn block(&mut self, number: usize, is_blocked: bool) {
        if let Some(one) = &mut self.runtimes[number] {
            one.is_blocked = is_blocked;
        }
    }

    /// Ends a runtime and drops its tasks. Returns the operations of the requests that it served.
    pub(crate) fn end_runtime(&mut self, number: usize) -> Vec<(usize, usize)> {
        let Some(one) = self.runtimes[number].take() else {
            return Vec::new();
        };
        one.runtime.shutdown_background();
        one.requests
            .iter()
            .map(|(operation, number, _)| (*operation, *number))
            .collect()
    }

    /// Starts a new runtime in the place of one that has ended.
    pub(crate) fn start_runtime(&mut self, number: usize) {
        if self.runtimes[number].is_none() {
            let one = OneRuntime::start();
            one.jump_to(self.epoch + self.local);
            self.runtimes[number] = Some(one);
        }
    }

    /// Starts a request. Returns `false` if its runtime has ended.
    pub(crate) fn take(&mut self, operation: usize, number: usize, runtime: usize, request: Incoming) -> bool {
        let (entry, link) = (self.entry.clone(), self.link.clone());
        let Some(one) = &mut self.runtimes[runtime] else {
            return false;
        };
        let task = one.runtime.spawn(async move {
            let arrived = request.number;
            link.respond(arrived, operation, number, entry.call(request).await);
        });
        one.requests.push((operation, number, task.abort_handle()));
        true
    }

    /// Drops the request of a client that left.
    pub(crate) fn leave(&mut self, operation: usize, number: usize) {
        for one in self.runtimes.iter_mut().flatten() {
            one.requests.retain(|(of, at, task)| {
                let is_it = (*of, *at) == (operation, number);
                if is_it {
                    task.abort();
                }
                !is_it
            });
        }
    }

    pub(crate) fn alive_tasks(&self) -> usize {
        let runtimes = self.runtimes.iter().flatten();
        runtimes.map(|one| one.runtime.metrics().num_alive_tasks()).sum()
    }

    /// Whether nothing is left to wait for.
    pub(crate) fn is_drained(&mut self) -> bool {
        let drain = self.drain.clone();
        let waiting = async { tokio::time::timeout(Duration::ZERO, drain.wait()).await.is_ok() };
        let mut runtimes = self.runtimes.iter().flatten();
        let one = runtimes.next().expect("no fault is left, so all runtimes run");
        one.runtime.block_on(waiting)
    }

    /// Ends the process at once.
    pub(crate) fn kill(self) {
        for one in self.runtimes.into_iter().flatten() {
            one.runtime.shutdown_background();
        }
    }
}
