//! A proxy between a store and its server that replaces replies by garbage.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// The bytes that a client gets instead of the next reply of the server.
#[derive(Clone, Debug)]
pub(crate) enum Garbage {
    /// No bytes. The proxy closes the connection.
    Close,
    /// Half of the reply. The connection stays open.
    Half,
    /// These bytes. The connection stays open.
    Bytes(Bytes),
    /// These bytes. Then the proxy closes the connection.
    BytesThenClose(Bytes),
}

/// A proxy that passes everything on until [`garble`](Self::garble) is called.
#[derive(Clone)]
pub(crate) struct GarblingProxy {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    garbage: Mutex<Option<Garbage>>,
    /// Wakes when the proxy passes replies on again. It then cuts the connections that got
    /// garbage, because they are of no use any more.
    over: Notify,
}

impl GarblingProxy {
    pub(crate) async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            garbage: Mutex::new(None),
            over: Notify::new(),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(server).await else {
                    continue;
                };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                let requests = tokio::spawn(pass(from_client, to_server));
                let state = Arc::clone(&shared);
                tokio::spawn(async move {
                    reply(from_server, to_client, state).await;
                    requests.abort();
                });
            }
        });
        Self { address, state }
    }

    /// From now on, replaces the next reply on every connection.
    pub(crate) fn garble(&self, garbage: &Garbage) {
        *self.state.garbage.lock().unwrap() = Some(garbage.clone());
    }

    pub(crate) fn pass_on(&self) {
        *self.state.garbage.lock().unwrap() = None;
        self.state.over.notify_waiters();
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    drop(tokio::io::copy(&mut from, &mut to).await);
}

async fn reply(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: Arc<State>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.unwrap_or(0);
        let mut over = std::pin::pin!(state.over.notified());
        over.as_mut().enable();
        let garbage = state.garbage.lock().unwrap().clone();
        let sent: &[u8] = match &garbage {
            None if read == 0 => return,
            None => &buffer[..read],
            Some(Garbage::Close) => return,
            Some(Garbage::Half) => &buffer[..read / 2],
            Some(Garbage::Bytes(bytes) | Garbage::BytesThenClose(bytes)) => bytes,
        };
        if to.write_all(sent).await.is_err() {
            return;
        }
        match garbage {
            None => {}
            Some(Garbage::Half | Garbage::Bytes(_)) => return over.await,
            Some(_) => return,
        }
    }
}
