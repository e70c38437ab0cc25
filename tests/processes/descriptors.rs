//! A serving process that has no file descriptors left, because idle connections of clients have
//! taken them all.

use std::net::TcpStream;
use std::time::Duration;

use axum::http::StatusCode;
use futures::future::join_all;

use crate::cluster::{Got, HttpClient, Process, effects, http_client, send};
use crate::scenarios::ledger;
use crate::support::Timer;
use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;

/// More than a process needs for itself and for its store.
const DESCRIPTORS: usize = 64;
/// A claim takes at most 5 s, and the layer repeats it once.
const LONGEST_CLAIM: Duration = Duration::from_secs(11);
/// A renewal fails while there are no descriptors, so the lease has to be longer than that.
const LEASE: Duration = Duration::from_secs(60);

/// Makes clients that each keep one connection open.
async fn connected(process: &Process, clients: usize) -> Vec<HttpClient> {
    let clients: Vec<_> = (0..clients).map(|_| http_client()).collect();
    for (n, client) in clients.iter().enumerate() {
        let first = send(client, process.address, &format!("first-{n}"), &[]).await.unwrap();
        assert_eq!(first.status, StatusCode::CREATED);
    }
    clients
}

/// Waits until the process has had no descriptor left for a second.
async fn exhausted(process: &Process) {
    let mut full = 0;
    for _ in 0..200 {
        full = if process.descriptors() >= DESCRIPTORS {
            full + 1
        } else {
            0
        };
        if full == 20 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the process has {} descriptors open", process.descriptors());
}

/// Takes all descriptors of a process, lets the server of its store restart meanwhile, and gives
/// the descriptors back. `set_up` starts or kills the server. Returns how many of three requests
/// were refused.
async fn starve(store: &str, mut set_up: impl FnMut(bool)) -> usize {
    let ledger = ledger();
    // A name has to be looked up, which takes a descriptor, too.
    let store = store.replace("127.0.0.1", "localhost");
    let process = Process::with_descriptors(DESCRIPTORS, LEASE, &store, &ledger);
    let clients = connected(&process, 4).await;
    let slow = [("x-before", "3000".to_owned())];
    let owner = send(&clients[0], process.address, "slow", &slow);
    let starving = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let idle: Vec<_> = (0..2 * DESCRIPTORS)
            .map(|_| TcpStream::connect(process.address).unwrap())
            .collect();
        exhausted(&process).await;
        // The waiting connections of clients take the descriptors of the store's connections.
        set_up(false);
        exhausted(&process).await;
        set_up(true);
        let timer = Timer::start();
        let refused = clients[1..].iter().enumerate();
        let refused = refused.map(|(n, client)| async move {
            send(client, process.address, &format!("refused-{n}"), &[])
                .await
                .unwrap()
        });
        let refused = join_all(refused).await;
        assert!(timer.elapsed() < LONGEST_CLAIM, "{:?}", timer.elapsed());
        drop(idle);
        let is_refused = |got: &&Got| {
            let code = got.code();
            assert!(
                got.status == StatusCode::CREATED || code.as_deref() == Some("store-unavailable"),
                "{got:?}"
            );
            code.is_some()
        };
        refused.iter().filter(is_refused).count()
    };
    let (owner, refused) = futures::join!(owner, starving);
    // The handler ended while the store could not be reached, and ran once.
    assert_eq!(owner.unwrap().status, StatusCode::CREATED);

    let client = http_client();
    let timer = Timer::start();
    for key in ["refused-0", "refused-1", "refused-2", "new", "slow", "first-0"] {
        while send(&client, process.address, key, &[]).await.unwrap().status != StatusCode::CREATED {
            assert!(timer.elapsed() < Duration::from_secs(15), "{key} is stuck");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(effects(&ledger)[key], 1, "{key}");
    }
    println!("{refused} requests were refused; recovered after {:?}", timer.elapsed());
    assert!(send(&client, process.address, "slow", &slow).await.unwrap().is_replay());
    drop(std::fs::remove_file(ledger));
    refused
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_without_descriptors_refuses_and_recovers_over_redis() {
    let mut server = RedisServer::start();
    let url = server.url();
    let refused = starve(&url, |is_up| if is_up { server.restart() } else { server.kill() }).await;
    assert!(refused > 0, "the process had descriptors left");
}

/// The store may open a connection with the descriptor of one that broke, so requests may also run.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_without_descriptors_recovers_over_postgres() {
    let mut server = PostgresServer::start();
    let url = server.url();
    starve(&url, |is_up| if is_up { server.run() } else { server.kill() }).await;
}
