//! 10,000 clients that are slow at once, each on a connection of its own. The connections are in
//! memory, because a test may not open as many sockets on every machine.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Handle;
use tower::{Layer, ServiceExt};
use tower_idempotency::{Idempotency, IdempotencyLayer, MemoryStore};

use crate::support::{AnyBody, Broken, Handler, Timer, post, send, text};

const CLIENTS: usize = 10_000;
const SECOND: Duration = Duration::from_secs(1);
/// The memory store sweeps in a task.
const TASKS_OF_STORE: usize = 1;
const BODY: &str = "pay 100 ";

type Guarded = Idempotency<Handler, MemoryStore>;

/// Connects a client to a server with this service. The connection holds 64 bytes in each direction.
fn connect(service: &Guarded) -> DuplexStream {
    let (client, server) = duplex(64);
    let service = service.clone();
    let serve = hyper::service::service_fn(move |request: Request<Incoming>| {
        let request = request.map(|body| body.map_err(|_| Broken).boxed_unsync());
        service.clone().oneshot(request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(server), serve);
    tokio::spawn(async move { drop(connection.await) });
    client
}

fn head(key: &str, length: usize) -> String {
    format!("POST /payments HTTP/1.1\r\nhost: bank\r\nidempotency-key: {key}\r\ncontent-length: {length}\r\n\r\n")
}

/// Returns the same request as the slow clients send. A fast client sends it all at once.
fn of_bank(key: &str, body: &'static str) -> Request<AnyBody> {
    let mut request = post(key, body);
    request
        .headers_mut()
        .insert("host", http::HeaderValue::from_static("bank"));
    request
}

/// Sends a request whose body comes one byte per second, and returns the status of its response.
/// The client of an `endless` request declares one byte more than it sends.
async fn send_slowly(mut client: DuplexStream, key: String, is_endless: bool) -> u16 {
    let head = head(&key, BODY.len() + usize::from(is_endless));
    client.write_all(head.as_bytes()).await.unwrap();
    for byte in BODY.as_bytes() {
        tokio::time::sleep(SECOND).await;
        client.write_all(&[*byte]).await.unwrap();
    }
    status(&mut client).await
}

/// Reads the status of a response.
async fn status(client: &mut DuplexStream) -> u16 {
    let mut line = [0; "HTTP/1.1 201".len()];
    client.read_exact(&mut line).await.unwrap();
    std::str::from_utf8(&line[9..]).unwrap().parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_clients_that_send_slowly_hold_no_key_and_delay_nobody() {
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let service = layer.layer(handler.clone());
    let timer = Timer::start();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| tokio::spawn(send_slowly(connect(&service), format!("key-{n}"), n % 2 == 1)))
        .collect();
    tokio::time::sleep(4 * SECOND + SECOND / 2).await;
    // Half of each body has arrived. A fast client gets its response at once, also with the key of a
    // slow client.
    for key in ["other", "key-0"] {
        let served = Timer::start();
        assert_eq!(send(&service, of_bank(key, BODY)).await.status(), 201);
        assert!(served.elapsed() < SECOND / 10, "{:?}", served.elapsed());
    }
    assert_eq!(handler.runs(), 2);
    for (n, client) in clients.into_iter().enumerate() {
        let expected = if n % 2 == 0 { 201 } else { 408 };
        assert_eq!(client.await.unwrap(), expected, "client {n}");
    }
    // The default time for a body is 30 s.
    assert!(timer.elapsed() < 31 * SECOND, "{:?}", timer.elapsed());
    assert_eq!(handler.runs(), 1 + CLIENTS / 2);
    layer.drain().wait().await;
    tokio::time::sleep(SECOND).await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), TASKS_OF_STORE);
    // A request that was too slow has not used its key up.
    assert_eq!(send(&service, of_bank("key-1", BODY)).await.status(), 201);
}

/// Slow readers hold neither their keys nor the places of waiters or detached executions.
#[tokio::test(start_paused = true)]
async fn ten_thousand_clients_that_read_slowly_hold_no_key_and_delay_nobody() {
    const LENGTH: usize = 64 << 10;
    let response = Bytes::from(vec![b'x'; LENGTH]);
    let handler = Handler::new().responding(move |_| text(StatusCode::CREATED, response.clone()));
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .with_max_detached(1)
        .with_max_waiters(1);
    let (drain, service) = (layer.drain(), layer.layer(handler.clone()));
    let mut clients = Vec::new();
    for n in 0..CLIENTS {
        let mut client = connect(&service);
        let key = format!("key-{}", n % 100);
        client.write_all(head(&key, 0).as_bytes()).await.unwrap();
        assert_eq!(status(&mut client).await, 201);
        clients.push(client);
    }
    assert_eq!((handler.runs(), drain.running()), (100, 0));
    let served = Timer::start();
    assert_eq!(send(&service, post("other", "")).await.status(), 201);
    assert!(served.elapsed() < SECOND / 10, "{:?}", served.elapsed());
    assert!(
        tokio::time::timeout(SECOND, drain.wait()).await.is_ok(),
        "a drain waits for readers"
    );
    // A reader gets the whole response, however late.
    tokio::time::sleep(3_600 * SECOND).await;
    let mut last = clients.pop().unwrap();
    let mut read = Vec::new();
    while read.len() < LENGTH {
        assert_ne!(last.read_buf(&mut read).await.unwrap(), 0, "the response broke off");
    }
    drop((clients, last));
    tokio::time::sleep(SECOND).await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), TASKS_OF_STORE);
}
