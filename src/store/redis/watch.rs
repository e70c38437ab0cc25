//! Who waits for which key, and how the server's messages reach them.
//!
//! The scripts publish on a shard channel named as the record's key. This process subscribes to it for as long as somebody
//! waits, on the connection that it has anyway (RESP3). Waking too often is harmless, and every doubt is settled that way.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use redis::aio::ConnectionLike;
use redis::{cmd, PushInfo, PushKind, Value};
use tokio::runtime::Handle;
use tokio::sync::futures::OwnedNotified;
use tokio::sync::Notify;

use super::connection::Connection;
use super::failure;
use crate::clock::within;
use crate::error::Error;
use crate::sharded::lock;

/// The channels that somebody waits for.
#[derive(Default)]
pub(super) struct Watches(Mutex<HashMap<Vec<u8>, Channel>>);

#[derive(Default)]
struct Channel {
    change: Arc<Notify>,
    watches: usize,
    /// The server has confirmed a subscription that still stands, as far as we know.
    is_subscribed: bool,
    /// Counts the subscriptions that were lost, so that a confirmation of a lost one is not taken for a new one.
    lost: u64,
}

impl Watches {
    /// Waits for a channel; subscribes to it, unless this process has.
    pub(super) async fn watch(
        self: &Arc<Self>,
        channel: Vec<u8>,
        connection: &Connection,
        limit: Duration,
    ) -> Result<RedisWatch, Error> {
        let runtime = Handle::try_current().map_err(|_| failure::NO_RUNTIME)?;
        let (change, subscribed, lost) = self.enter(&channel);
        let seat = Seat {
            watches: Arc::clone(self),
            channel,
            connection: connection.clone(),
            runtime,
            limit,
        };
        if !subscribed {
            send("SSUBSCRIBE", &seat.channel, connection.clone(), limit).await?;
            self.confirm(&seat.channel, lost);
        }
        Ok(RedisWatch {
            change: Some(change),
            _seat: Some(seat),
        })
    }

    /// What the server pushes.
    pub(super) fn pushed(&self, push: &PushInfo) {
        match (&push.kind, push.data.first()) {
            (PushKind::Disconnection, _) => lock(&self.0).values_mut().for_each(Channel::lose),
            (PushKind::SMessage, Some(Value::BulkString(channel))) => {
                if let Some(channel) = lock(&self.0).get(channel) {
                    channel.change.notify_waiters();
                }
            }
            // The answer to our own wish, which a new watch may have overtaken; or the slot moved to another node.
            (PushKind::SUnsubscribe, Some(Value::BulkString(channel))) => {
                if let Some(channel) = lock(&self.0).get_mut(channel) {
                    channel.lose();
                }
            }
            _ => {}
        }
    }

    /// Takes a seat before anything is sent, so that whatever happens from now on wakes it.
    fn enter(&self, channel: &[u8]) -> (OwnedNotified, bool, u64) {
        let mut channels = lock(&self.0);
        let channel = channels.entry(channel.to_vec()).or_default();
        channel.watches += 1;
        let change = Arc::clone(&channel.change).notified_owned();
        (change, channel.is_subscribed, channel.lost)
    }

    fn confirm(&self, channel: &[u8], lost: u64) {
        if let Some(channel) = lock(&self.0).get_mut(channel) {
            channel.is_subscribed = channel.lost == lost;
        }
    }

    /// Gives a seat back; whether it was the last.
    fn leave(&self, channel: &[u8]) -> bool {
        let mut channels = lock(&self.0);
        let Some(entry) = channels.get_mut(channel) else {
            return false;
        };
        entry.watches -= 1;
        let is_last = entry.watches == 0;
        if is_last {
            channels.remove(channel);
        }
        is_last
    }
}

impl fmt::Debug for Watches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watches({} keys)", lock(&self.0).len())
    }
}

impl Channel {
    /// The subscription is gone, and with it what was published since: everybody looks again.
    fn lose(&mut self) {
        self.is_subscribed = false;
        self.lost += 1;
        self.change.notify_waiters();
    }
}

/// Every error here is of kind `StoreUnavailable`, because a caller that gets no watch polls instead.
async fn send(command: &'static str, channel: &[u8], mut connection: Connection, limit: Duration) -> Result<(), Error> {
    let mut command = cmd(command);
    command.arg(channel);
    let sent = within(limit, connection.req_packed_command(&command)).await;
    sent.map_err(|_| failure::LATE)?
        .and_then(Value::extract_error)
        .map(drop)
        .map_err(Error::unavailable)
}

/// A place among those who wait for a channel.
struct Seat {
    watches: Arc<Watches>,
    channel: Vec<u8>,
    connection: Connection,
    runtime: Handle,
    limit: Duration,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.watches.leave(&self.channel) {
            let (connection, limit) = (self.connection.clone(), self.limit);
            let channel = std::mem::take(&mut self.channel);
            // Should it fail, the server says what nobody hears until the connection ends.
            self.runtime
                .spawn(async move { drop(send("SUNSUBSCRIBE", &channel, connection, limit).await) });
        }
    }
}

pin_project! {
    /// Resolves when a record of a [`RedisStore`](super::RedisStore) may have changed, and when the connection breaks.
    ///
    /// From a store on a connection that cannot push (see there), it never resolves.
    pub struct RedisWatch {
        #[pin]
        change: Option<OwnedNotified>,
        _seat: Option<Seat>,
    }
}

impl RedisWatch {
    /// A watch that never resolves: the caller polls.
    pub(super) const fn never() -> Self {
        Self {
            change: None,
            _seat: None,
        }
    }
}

impl Future for RedisWatch {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.project().change.as_pin_mut() {
            Some(change) => change.poll(cx),
            None => Poll::Pending,
        }
    }
}

impl fmt::Debug for RedisWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisWatch").finish_non_exhaustive()
    }
}
