//! A proxy that counts the statements and round trips of a PostgreSQL client.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// The counters of the proxy. Clones share the counters.
#[derive(Clone, Default)]
pub(crate) struct Counts {
    /// The number of executed statements.
    pub(crate) executions: Arc<AtomicU64>,
    /// The number of round trips, including the pings of the pool.
    pub(crate) exchanges: Arc<AtomicU64>,
}

/// Starts a proxy to a server, and returns the address of the proxy and its counters.
pub(crate) async fn counting(server: SocketAddr) -> std::io::Result<(SocketAddr, Counts)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let counts = Counts::default();
    let counted = counts.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(server).await else {
                return;
            };
            // Otherwise each message would wait for the acknowledgement of the previous one.
            for stream in [&client, &server] {
                drop(stream.set_nodelay(true));
            }
            let ((from_client, mut to_client), (mut from_server, to_server)) =
                (client.into_split(), server.into_split());
            let counts = counted.clone();
            tokio::spawn(async move { drop(pass(from_client, to_server, counts).await) });
            tokio::spawn(async move { drop(copy(&mut from_server, &mut to_client).await) });
        }
    });
    Ok((address, counts))
}

/// Forwards the messages of the client and counts them. A message is a byte for its kind, four
/// bytes for the length of the rest, and the rest. Only the first message has no byte for its kind
/// ("PostgreSQL Frontend/Backend Protocol", message formats). Without TLS there is one such
/// message.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, counts: Counts) -> std::io::Result<()> {
    let mut is_first = true;
    loop {
        let mut message = vec![0; if is_first { 4 } else { 5 }];
        from.read_exact(&mut message).await?;
        let (kind, length) = message.split_at(message.len() - 4);
        match kind {
            b"E" => counts.executions.fetch_add(1, Ordering::SeqCst),
            b"S" | b"Q" => counts.exchanges.fetch_add(1, Ordering::SeqCst),
            _ => 0,
        };
        is_first = false;
        let rest = length
            .iter()
            .fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
        let head = message.len();
        message.resize(head + rest.saturating_sub(4), 0);
        from.read_exact(&mut message[head..]).await?;
        to.write_all(&message).await?;
    }
}
