//! The idle connections that a store keeps between two operations.
//!
//! sqlx tests every connection that returns to its pool, which takes a round trip and a task. So a
//! store keeps the connections of its own pool, and the next operation takes the one that was used
//! last. A connection returns to the pool after [a number of operations](MOST_USES), so that the
//! pool can test it and close it after its lifetime.
//!
//! The pool does not know that an idle connection of the store is free. So the store keeps none
//! while an operation waits for the pool. Each operation first takes a [`Turn`], and the store has
//! as many turns as its pool has connections.

use std::fmt;
use std::mem::take;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::Postgres;
use sqlx::pool::PoolConnection;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock::{Stopwatch, within};
use crate::sharded::lock;

/// The idle time after which a connection is tested before it is used.
pub(super) const MAY_BE_DEAD: Duration = Duration::from_secs(1);

/// The time limit of the test of an idle connection, because a dead peer may never reply. An
/// operation that finds all idle connections dead waits for these tests.
pub(super) const LONGEST_TEST: Duration = Duration::from_secs(1);

/// The time limit of the test after an operation. It is longer, because the server has just
/// replied, so it is more likely slow than dead.
const LONGEST_RETURN: Duration = Duration::from_secs(5);

/// The number of operations after which a connection returns to the pool.
const MOST_USES: u32 = 64;

/// The idle connections of a store.
pub(crate) struct Spare {
    state: Mutex<State>,
    /// As many turns as the pool has connections; `None` for a pool of the application.
    turns: Option<Arc<Semaphore>>,
}

/// The right to use a connection, or to wait for the pool. Operations get their turns in the order
/// of their requests.
pub(super) type Turn = Option<OwnedSemaphorePermit>;

#[derive(Default)]
struct State {
    /// The connection that was used last is the last one.
    idle: Vec<Idle>,
    /// The number of operations that wait for a connection of the pool.
    waiting: usize,
    keeps_idle: bool,
}

struct Idle {
    used: Used,
    since: Stopwatch,
}

/// A connection of the pool, and the number of operations that have used it since it left the pool.
pub(super) struct Used {
    pub(super) connection: PoolConnection<Postgres>,
    uses: u32,
}

impl Spare {
    /// Makes the idle connections of a store whose own pool has `connections` connections.
    pub(super) fn of_own_pool(connections: u32) -> Arc<Self> {
        let turns = usize::try_from(connections).unwrap_or(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            state: Mutex::new(State {
                keeps_idle: true,
                ..State::default()
            }),
            turns: Some(Arc::new(Semaphore::new(turns.min(Semaphore::MAX_PERMITS)))),
        })
    }

    /// Returns a turn if no other operation waits for one.
    pub(super) fn turn_now(&self) -> Option<Turn> {
        match &self.turns {
            Some(turns) => Arc::clone(turns).try_acquire_owned().ok().map(Some),
            None => Some(None),
        }
    }

    /// Whether the pool belongs to the store.
    pub(super) const fn is_of_own_pool(&self) -> bool {
        self.turns.is_some()
    }

    pub(super) async fn turn(&self) -> Turn {
        match &self.turns {
            Some(turns) => Arc::clone(turns).acquire_owned().await.ok(),
            None => None,
        }
    }

    /// Takes the connection that was used last. If it has been idle for too long, all others have
    /// been, too, and all return to the pool.
    pub(super) fn take(&self) -> Option<Used> {
        let mut state = lock(&self.state);
        let last = state.idle.pop()?;
        if last.since.elapsed() < MAY_BE_DEAD {
            return Some(last.used);
        }
        state.idle.push(last);
        let idle = take(&mut state.idle);
        drop(state);
        return_to_pool(idle);
        None
    }

    /// Keeps a connection on which an operation has succeeded, or returns it to the pool.
    pub(super) fn store(&self, mut used: Used, turn: Turn) {
        used.uses += 1;
        let mut state = lock(&self.state);
        if state.keeps_idle && state.waiting == 0 && used.uses < MOST_USES {
            state.idle.push(Idle {
                used,
                since: Stopwatch::start(),
            });
        } else {
            drop(state);
            used.return_to_pool(turn);
        }
    }

    /// Records that an operation waits for a connection of the pool, and returns all idle ones to
    /// the pool.
    pub(super) fn wait(&self) -> Waiting<'_> {
        let mut state = lock(&self.state);
        state.waiting += 1;
        let idle = take(&mut state.idle);
        drop(state);
        return_to_pool(idle);
        Waiting(self)
    }

    /// Returns all idle connections to the pool, and keeps none from now on.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        state.keeps_idle = false;
        let idle = take(&mut state.idle);
        drop(state);
        return_to_pool(idle);
    }
}

/// The state of a store that keeps no idle connections, because the application uses its pool, too.
impl Default for Spare {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            turns: None,
        }
    }
}

impl fmt::Debug for Spare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("Spare")
            .field("idle", &state.idle.len())
            .field("waiting", &state.waiting)
            .field("turns", &self.turns.as_ref().map(|turns| turns.available_permits()))
            .finish()
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.end();
    }
}

/// An operation that waits for a connection of the pool.
pub(super) struct Waiting<'s>(&'s Spare);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).waiting -= 1;
    }
}

impl Used {
    /// Wraps a connection that has just left the pool.
    pub(super) const fn new(connection: PoolConnection<Postgres>) -> Self {
        Self { connection, uses: 0 }
    }

    /// Returns the connection to the pool after an operation. The turn ends when the pool has the
    /// connection.
    pub(super) fn return_to_pool(self, turn: Turn) {
        self.return_within(LONGEST_RETURN, turn);
    }

    /// Returns the connection to the pool, which tests it. Outside a runtime, closes it. The pool
    /// itself would wait for a dead connection without a limit.
    fn return_within(mut self, limit: Duration, turn: Turn) {
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move {
                drop(within(limit, self.connection.return_to_pool()).await);
                drop(turn);
            })),
            Err(_) => self.close(),
        }
    }

    /// Closes the connection.
    pub(super) fn close(self) {
        drop(self.connection.detach());
    }
}

fn return_to_pool(connections: Vec<Idle>) {
    for idle in connections {
        let is_idle = idle.since.elapsed() >= MAY_BE_DEAD;
        let limit = if is_idle { LONGEST_TEST } else { LONGEST_RETURN };
        idle.used.return_within(limit, None);
    }
}
