//! The waiters of this process, and the delivery of the server's messages to them.
//!
//! The scripts publish on a shard channel that has the name of the record's key. This process
//! subscribes to the channel while it has a waiter, on the connection of its operations (RESP3). An
//! unnecessary wake is harmless, so the watches wake their waiters in every case of doubt.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use redis::aio::ConnectionLike;
use redis::{PushInfo, PushKind, Value, cmd};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

use super::connection::Connection;
use super::failure;
use crate::clock::within;
use crate::error::Error;
use crate::sharded::lock;

/// The channels that have waiters.
#[derive(Default)]
pub(super) struct Watches(Mutex<HashMap<Vec<u8>, Channel>>);

#[derive(Default)]
struct Channel {
    change: Arc<Notify>,
    watches: usize,
    /// Whether the server has confirmed a subscription that still exists, as far as this process
    /// knows.
    is_subscribed: bool,
    /// The number of subscriptions that were lost. It keeps the confirmation of a lost subscription
    /// from confirming a new one.
    lost: u64,
}

impl Watches {
    /// Waits for a channel, and subscribes to it unless this process is subscribed already.
    pub(super) async fn watch(
        self: &Arc<Self>,
        channel: Vec<u8>,
        connection: &Connection,
        limit: Duration,
    ) -> Result<RedisWatch, Error> {
        let runtime = Handle::try_current().map_err(|_| failure::NO_RUNTIME)?;
        let (change, subscribed, lost) = self.enter(&channel);
        let registered = Registered {
            watches: Arc::clone(self),
            channel,
            connection: connection.clone(),
            runtime,
            limit,
        };
        if !subscribed {
            send("SSUBSCRIBE", &registered.channel, connection.clone(), limit).await?;
            self.confirm(&registered.channel, lost);
        }
        Ok(RedisWatch {
            change: Some(change),
            _registered: Some(registered),
        })
    }

    /// Handles a push message of the server.
    pub(super) fn pushed(&self, push: &PushInfo) {
        match (&push.kind, push.data.first()) {
            (PushKind::Disconnection, _) => lock(&self.0).values_mut().for_each(Channel::lose),
            (PushKind::SMessage, Some(Value::BulkString(channel))) => {
                if let Some(channel) = lock(&self.0).get(channel) {
                    channel.change.notify_waiters();
                }
            }
            // The reply to our own SUNSUBSCRIBE, which a new watch may have overtaken, or a notice
            // that the slot has moved to another node.
            (PushKind::SUnsubscribe, Some(Value::BulkString(channel))) => {
                if let Some(channel) = lock(&self.0).get_mut(channel) {
                    channel.lose();
                }
            }
            _ => {}
        }
    }

    /// Registers a waiter before anything is sent, so that every later message wakes it.
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

    /// Removes a waiter. Returns true if it was the last one.
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
    /// Records that the subscription is lost. Wakes all waiters, because messages may have been
    /// lost with it.
    fn lose(&mut self) {
        self.is_subscribed = false;
        self.lost += 1;
        self.change.notify_waiters();
    }
}

/// Sends a command. Every error is of kind `StoreUnavailable`, because a caller that gets no watch
/// polls instead.
async fn send(command: &'static str, channel: &[u8], mut connection: Connection, limit: Duration) -> Result<(), Error> {
    let mut command = cmd(command);
    command.arg(channel);
    let sent = within(limit, connection.req_packed_command(&command)).await;
    sent.map_err(|_| failure::TIMED_OUT)?
        .and_then(Value::extract_error)
        .map(drop)
        .map_err(Error::unavailable)
}

/// A registered waiter of a channel.
struct Registered {
    watches: Arc<Watches>,
    channel: Vec<u8>,
    connection: Connection,
    runtime: Handle,
    limit: Duration,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.watches.leave(&self.channel) {
            let (connection, limit) = (self.connection.clone(), self.limit);
            let channel = std::mem::take(&mut self.channel);
            // If this fails, the server keeps sending notifications that we ignore, which is
            // harmless.
            self.runtime
                .spawn(async move { drop(send("SUNSUBSCRIBE", &channel, connection, limit).await) });
        }
    }
}

pin_project! {
    /// A future that resolves when a record of a [`RedisStore`](super::RedisStore) may have
    /// changed, and when the connection breaks.
    ///
    /// With a store on a connection that cannot push (see there), it never resolves.
    pub struct RedisWatch {
        #[pin]
        change: Option<OwnedNotified>,
        _registered: Option<Registered>,
    }
}

impl RedisWatch {
    /// Returns a watch that never resolves, so that its caller polls.
    pub(super) const fn never() -> Self {
        Self {
            change: None,
            _registered: None,
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
