//! Ports for the servers that tests start.
#![allow(unreachable_pub, reason = "every test binary includes this module as its own")]

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::TcpListener;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The first port. Nodes of a Redis Cluster also use the port that is 10,000 higher.
const FIRST: u16 = 10_000;
const PORTS: u64 = 10_000;

/// Returns a port on which no process listens, and another one in each call.
///
/// Linux takes the ports of outgoing connections from a range that begins at 32768. All ports that
/// this function returns are lower, so no connection can take the port before the server listens, or
/// while the server is stopped.
pub fn free_port() -> u16 {
    // Processes begin at different ports, because several may look for one at the same time.
    static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(RandomState::new().hash_one(0) % PORTS));
    loop {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) % PORTS;
        let port = FIRST + u16::try_from(offset).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
