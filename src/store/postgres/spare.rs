//! The connections that a store keeps between two operations.
//!
//! sqlx tests every connection that comes back to its pool, which takes a round trip and a task. So a store keeps the
//! connections of its own pool, and the next operation takes the one that was used last. A connection goes back to the
//! pool after [some operations](MOST_USES), so that the pool can test it and end it after its lifetime.
//!
//! The pool does not know that a kept connection is free. So nothing is kept while somebody waits for the pool. Each
//! operation first takes a [`Turn`], and the store has as many turns as its pool has connections.

use std::mem::take;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::Postgres;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock::{within, Stopwatch};
use crate::sharded::lock;

/// The idle time after which a connection is tested before it is used.
pub(super) const MAY_BE_DEAD: Duration = Duration::from_secs(1);

/// The time limit of the test of an idle connection, because a dead peer may never answer. An operation that finds all
/// kept connections dead waits for these tests.
pub(super) const LONGEST_TEST: Duration = Duration::from_secs(1);

/// The time limit of the test after an operation. Longer, because the server has just answered, so it is more likely slow
/// than dead.
const LONGEST_RETURN: Duration = Duration::from_secs(5);

/// The number of operations after which a connection goes back to the pool.
const MOST_USES: u32 = 64;

/// The spare connections of a store.
pub(crate) struct Spare {
    state: Mutex<State>,
    /// As many turns as the pool has connections; `None` for a pool of the application.
    turns: Option<Arc<Semaphore>>,
}

/// The right to use a connection, or to wait for the pool. Operations get their turns in the order in which they ask.
pub(super) type Turn = Option<OwnedSemaphorePermit>;

#[derive(Default)]
struct State {
    /// The connection that was used last is the last one.
    kept: Vec<Kept>,
    /// The number of those who wait for a connection of the pool.
    waiting: usize,
    keeps: bool,
}

struct Kept {
    used: Used,
    since: Stopwatch,
}

/// A connection of the pool, and the number of operations that have used it since it left the pool.
pub(super) struct Used {
    pub(super) connection: PoolConnection<Postgres>,
    uses: u32,
}

impl Spare {
    /// Makes the spare connections of a store whose own pool has so many connections.
    pub(super) fn of_own_pool(connections: u32) -> Arc<Self> {
        let turns = usize::try_from(connections).unwrap_or(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            state: Mutex::new(State {
                keeps: true,
                ..State::default()
            }),
            turns: Some(Arc::new(Semaphore::new(turns.min(Semaphore::MAX_PERMITS)))),
        })
    }

    /// Returns a turn if nobody is before the caller.
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

    /// Takes the connection that was used last. If it has been idle for too long, all others have been, too, and all go
    /// back to the pool.
    pub(super) fn take(&self) -> Option<Used> {
        let mut state = lock(&self.state);
        let last = state.kept.pop()?;
        if last.since.elapsed() < MAY_BE_DEAD {
            return Some(last.used);
        }
        state.kept.push(last);
        let idle = take(&mut state.kept);
        drop(state);
        put_back(idle);
        None
    }

    /// Keeps a connection on which an operation has succeeded, or gives it back to the pool.
    pub(super) fn keep(&self, mut used: Used, turn: Turn) {
        used.uses += 1;
        let mut state = lock(&self.state);
        if state.keeps && state.waiting == 0 && used.uses < MOST_USES {
            state.kept.push(Kept {
                used,
                since: Stopwatch::start(),
            });
        } else {
            drop(state);
            used.put_back(turn);
        }
    }

    /// Notes that somebody waits for a connection of the pool, and gives all spare ones back to it.
    pub(super) fn wait(&self) -> Waiting<'_> {
        let mut state = lock(&self.state);
        state.waiting += 1;
        let kept = take(&mut state.kept);
        drop(state);
        put_back(kept);
        Waiting(self)
    }

    /// Gives all connections back to the pool, and keeps none from now on.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        state.keeps = false;
        let kept = take(&mut state.kept);
        drop(state);
        put_back(kept);
    }
}

/// The connections of a store that keeps none, because the application uses its pool, too.
impl Default for Spare {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            turns: None,
        }
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.end();
    }
}

/// Somebody who waits for a connection of the pool.
pub(super) struct Waiting<'s>(&'s Spare);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).waiting -= 1;
    }
}

impl Used {
    /// A connection that has just left the pool.
    pub(super) const fn new(connection: PoolConnection<Postgres>) -> Self {
        Self { connection, uses: 0 }
    }

    /// Gives the connection back to the pool after an operation. The turn ends when the pool has the connection.
    pub(super) fn put_back(self, turn: Turn) {
        self.put_back_within(LONGEST_RETURN, turn);
    }

    /// Gives the connection back to the pool, which tests it. Outside of a runtime, closes it. The pool itself would wait
    /// for a dead connection without a bound.
    fn put_back_within(mut self, limit: Duration, turn: Turn) {
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

fn put_back(kept: Vec<Kept>) {
    for kept in kept {
        let is_idle = kept.since.elapsed() >= MAY_BE_DEAD;
        let limit = if is_idle { LONGEST_TEST } else { LONGEST_RETURN };
        kept.used.put_back_within(limit, None);
    }
}
