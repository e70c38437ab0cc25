//! A proxy between a store and its server that replaces replies by nonsense.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// The bytes that a client gets instead of the next reply of the server.
#[derive(Clone, Debug)]
pub(crate) enum Nonsense {
    /// No bytes. The proxy closes the connection.
    Close,
    /// Half of the reply. The connection stays open.
    Half,
    /// These bytes. The connection stays open.
    Say(Bytes),
    /// These bytes. Then the proxy closes the connection.
    SayAndClose(Bytes),
}

/// A proxy that passes everything on until [`lie`](Self::lie) is called.
#[derive(Clone)]
pub(crate) struct Liar {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    nonsense: Mutex<Option<Nonsense>>,
    /// Wakes when the proxy becomes honest again. The proxy then cuts the connections that got
    /// nonsense, because they are of no use any more.
    over: Notify,
}

impl Liar {
    pub(crate) async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            nonsense: Mutex::new(None),
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
    pub(crate) fn lie(&self, nonsense: &Nonsense) {
        *self.state.nonsense.lock().unwrap() = Some(nonsense.clone());
    }

    pub(crate) fn be_honest(&self) {
        *self.state.nonsense.lock().unwrap() = None;
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
        let nonsense = state.nonsense.lock().unwrap().clone();
        let sent: &[u8] = match &nonsense {
            None if read == 0 => return,
            None => &buffer[..read],
            Some(Nonsense::Close) => return,
            Some(Nonsense::Half) => &buffer[..read / 2],
            Some(Nonsense::Say(bytes) | Nonsense::SayAndClose(bytes)) => bytes,
        };
        if to.write_all(sent).await.is_err() {
            return;
        }
        match nonsense {
            None => {}
            Some(Nonsense::Half | Nonsense::Say(_)) => return over.await,
            Some(_) => return,
        }
    }
}
