//! Notifications of changed records: one listening connection for all waiters of this process.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use sqlx::postgres::{PgListener, PgPool};
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, watch};
use tokio::time::Sleep;

use super::error::failed;
use super::session::end_open_transaction;
use super::spare::{Spare, Turn};
use crate::clock::within;
use crate::error::Error;
use crate::protocol::StorageKey;
use crate::sharded::lock;

/// The waiters of this process.
pub(super) struct Watchers {
    channel: String,
    /// Whether waiters poll instead of listening, because a pooler would take the connection away,
    /// or because the pool has no second connection.
    polls: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<StorageKey, Waiting>,
    /// Whether the listener listens. `None` or a closed channel if no listener runs.
    listening: Option<watch::Receiver<bool>>,
}

struct Waiting {
    changed: Arc<Notify>,
    count: usize,
}

impl Watchers {
    pub(super) fn new(channel: &str, polls: bool) -> Arc<Self> {
        Arc::new(Self {
            channel: channel.to_owned(),
            polls,
            state: Mutex::default(),
        })
    }

    /// Waits until the listener listens, and registers a watch; `None` if waiters poll. They also
    /// poll if the listener takes too long to start, because it runs in the runtime of one waiter,
    /// which may be blocked.
    pub(super) async fn register(
        self: &Arc<Self>,
        pool: &PgPool,
        spare: &Arc<Spare>,
        key: &StorageKey,
    ) -> Result<Option<PostgresWatch>, Error> {
        const LONGEST: Duration = Duration::from_secs(1);
        if self.polls {
            return Ok(None);
        }
        let mut listening = self.listener(pool, spare);
        let lost = || Error::unavailable("the listening connection was lost");
        match within(LONGEST, listening.wait_for(|listening| *listening)).await {
            Ok(listens) => drop(listens.map_err(|_| lost())?),
            Err(_) => return Ok(None),
        }
        let watch = self.enter(key);
        // The listener may have ended before it could wake this watch.
        listening.has_changed().map_err(|_| lost())?;
        Ok(Some(watch))
    }

    fn enter(self: &Arc<Self>, key: &StorageKey) -> PostgresWatch {
        let mut state = lock(&self.state);
        let waiting = state.waiting.entry(*key).or_insert_with(|| Waiting {
            changed: Arc::default(),
            count: 0,
        });
        waiting.count += 1;
        PostgresWatch {
            waits: Waits::Notified {
                // This receives notifications from now on, even before it is polled.
                changed: Arc::clone(&waiting.changed).notified_owned(),
                _registered: Registered {
                    watchers: Arc::downgrade(self),
                    key: *key,
                },
            },
        }
    }

    /// Returns the state of the listener, and starts a listener if none runs.
    fn listener(self: &Arc<Self>, pool: &PgPool, spare: &Arc<Spare>) -> watch::Receiver<bool> {
        let mut state = lock(&self.state);
        if let Some(listening) = state
            .listening
            .as_ref()
            .filter(|listening| listening.has_changed().is_ok())
        {
            return listening.clone();
        }
        let (sender, receiver) = watch::channel(false);
        state.listening = Some(receiver.clone());
        drop(state);
        let connecting = connected(pool.clone(), Arc::clone(spare), self.channel.clone());
        tokio::spawn(listen(Arc::downgrade(self), connecting, sender));
        receiver
    }

    fn wake(&self, key: &StorageKey) {
        if let Some(waiting) = lock(&self.state).waiting.get(key) {
            waiting.changed.notify_waiters();
        }
    }

    /// Wakes all waiters, because notifications may have been missed.
    fn wake_all(&self) {
        for waiting in lock(&self.state).waiting.values() {
            waiting.changed.notify_waiters();
        }
    }

    /// Returns the number of keys that have waiters.
    pub(super) fn len(&self) -> usize {
        lock(&self.state).waiting.len()
    }
}

/// Listens while there are waiters, and a little longer. Ends when the connection is lost. Then it
/// wakes all waiters, and the next waiter starts another listener.
async fn listen(
    watchers: Weak<Watchers>,
    connecting: impl Future<Output = Result<(PgListener, Turn), Error>>,
    listening: watch::Sender<bool>,
) {
    const LINGER: Duration = Duration::from_secs(10);
    if let Ok((mut listener, _turn)) = connecting.await {
        listening.send_replace(true);
        loop {
            let received = tokio::time::timeout(LINGER, listener.try_recv()).await;
            let Some(watchers) = watchers.upgrade() else { return };
            match received {
                Ok(Ok(Some(notification))) => match key_of(notification.payload()) {
                    Some(key) => watchers.wake(&key),
                    None => watchers.wake_all(),
                },
                Ok(Ok(None) | Err(_)) => break,
                Err(_) if watchers.len() == 0 => break,
                Err(_) => {}
            }
        }
    }
    drop(listening);
    if let Some(watchers) = watchers.upgrade() {
        watchers.wake_all();
    }
}

/// Connects the listener, and takes its turn. The turn ends with the listener, whose connection
/// returns to the pool a little later.
async fn connected(pool: PgPool, spare: Arc<Spare>, channel: String) -> Result<(PgListener, Turn), Error> {
    let turn = spare.turn().await;
    let waiting = spare.wait();
    let listener = PgListener::connect_with(&pool).await;
    drop(waiting);
    let mut listener = listener.map_err(failed)?;
    // After a loss, `listen` wakes all waiters, and the next waiter starts a new listener.
    listener.eager_reconnect(false);
    // In an open transaction, LISTEN would take effect only at the commit.
    end_open_transaction(&mut listener).await.map_err(failed)?;
    listener.listen(&channel).await.map_err(failed)?;
    Ok((listener, turn))
}

fn key_of(payload: &str) -> Option<StorageKey> {
    let mut bytes = [0; 32];
    if payload.len() != 64 || !payload.is_ascii() {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&payload[at..at + 2], 16).ok()?;
    }
    Some(StorageKey::from_bytes(bytes))
}

pin_project! {
    /// A future that resolves when a record of a [`PostgresStore`](super::PostgresStore) has
    /// changed, or may have changed while the listening connection was lost. Behind a transaction
    /// pooler, or with a pool of one connection, no connection listens, and this resolves after 250
    /// ms.
    ///
    /// It may miss the end of an attempt whose row was locked when the watch began, for example by
    /// a transaction that completes the record. The layers look at the record every second or more
    /// often, so they wait at most that long.
    #[derive(Debug)]
    pub struct PostgresWatch {
        #[pin]
        waits: Waits,
    }
}

pin_project! {
    #[project = WaitsProjected]
    #[derive(Debug)]
    enum Waits {
        Notified {
            #[pin]
            changed: OwnedNotified,
            _registered: Registered,
        },
        Pause {
            // Boxed, because every waiter would otherwise be larger by its size.
            pause: Pin<Box<Sleep>>,
        },
    }
}

impl PostgresWatch {
    /// Returns a watch that resolves after a pause, so that its caller looks at the record.
    pub(super) fn pause() -> Self {
        const POLL: Duration = Duration::from_millis(250);
        Self {
            waits: Waits::Pause {
                pause: Box::pin(tokio::time::sleep(POLL)),
            },
        }
    }
}

impl Future for PostgresWatch {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.project().waits.project() {
            WaitsProjected::Notified { changed, .. } => changed.poll(cx),
            WaitsProjected::Pause { pause } => pause.as_mut().poll(cx),
        }
    }
}

/// A registered waiter.
struct Registered {
    watchers: Weak<Watchers>,
    key: StorageKey,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let Some(watchers) = self.watchers.upgrade() else {
            return;
        };
        let mut state = lock(&watchers.state);
        if let Some(waiting) = state.waiting.get_mut(&self.key) {
            waiting.count -= 1;
            if waiting.count == 0 {
                state.waiting.remove(&self.key);
            }
        }
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registered")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_a_key_or_nothing() {
        assert_eq!(key_of(&"0f".repeat(32)), Some(StorageKey::from_bytes([15; 32])));
        for payload in ["", "0f", &"0g".repeat(32), &"é".repeat(32)] {
            assert_eq!(key_of(payload), None);
        }
    }
}
