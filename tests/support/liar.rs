//! What stands between a store and its server and talks nonsense.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// What a client is told instead of the server's next reply.
#[derive(Clone, Debug)]
pub(crate) enum Nonsense {
    /// Nothing: the connection ends.
    Close,
    /// Half of the reply and nothing more.
    Half,
    /// These bytes, and then nothing more.
    Say(Bytes),
    /// These bytes, and then the connection ends.
    SayAndClose(Bytes),
}

/// Passes everything on, until it is told to lie.
#[derive(Clone)]
pub(crate) struct Liar {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    nonsense: Mutex<Option<Nonsense>>,
    /// Lies are over: connections that were lied to are cut, since they can be of no use any more.
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
                let questions = tokio::spawn(pass(from_client, to_server));
                let state = Arc::clone(&shared);
                tokio::spawn(async move {
                    answer(from_server, to_client, state).await;
                    questions.abort();
                });
            }
        });
        Self { address, state }
    }

    /// From now on, every connection's next reply is this.
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

async fn answer(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: Arc<State>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.unwrap_or(0);
        let mut over = std::pin::pin!(state.over.notified());
        over.as_mut().enable();
        let nonsense = state.nonsense.lock().unwrap().clone();
        let said: &[u8] = match &nonsense {
            None if read == 0 => return,
            None => &buffer[..read],
            Some(Nonsense::Close) => return,
            Some(Nonsense::Half) => &buffer[..read / 2],
            Some(Nonsense::Say(bytes) | Nonsense::SayAndClose(bytes)) => bytes,
        };
        if to.write_all(said).await.is_err() {
            return;
        }
        match nonsense {
            None => {}
            Some(Nonsense::Half | Nonsense::Say(_)) => return over.await,
            Some(_) => return,
        }
    }
}
