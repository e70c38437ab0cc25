//! The time to the first byte of a streamed response, with a key and without.
//!
//! `cargo bench --features axum --bench streams` takes about ten seconds. A server and a client,
//! each in a process of its own, use one loopback connection, which stays open. Requests with and
//! without a key take turns. The figures are medians over all requests.
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the machine's clock")]

use std::convert::Infallible;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderName, Request, header};
use axum::response::IntoResponse;
use axum::routing::post;
use axum::serve::{Listener, ListenerExt};
use futures::stream;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tower_idempotency::{DoNotStore, IdempotencyLayer, MemoryStore};

const REQUESTS: usize = 10_000;
/// Starts this program as the server.
const SERVE: &str = "--serve";

type Client = SendRequest<Empty<bytes::Bytes>>;

/// Streams two lines of JSON, the second line a moment after the first.
fn lines() -> Body {
    Body::from_stream(stream::unfold(0_u8, |line| async move {
        if line == 1 {
            tokio::task::yield_now().await;
        }
        (line < 2).then_some((Ok::<_, Infallible>("{\"line\":1}\n"), line + 1))
    }))
}

async fn known_stream() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/x-ndjson")], lines())
}

async fn not_stored() -> impl IntoResponse {
    (DoNotStore, [(header::CONTENT_TYPE, "text/plain")], lines())
}

/// Serves the two streams, and prints the address.
#[tokio::main]
async fn serve() {
    let app = Router::new()
        .route("/ndjson", post(known_stream))
        .route("/not-stored", post(not_stored))
        .layer(IdempotencyLayer::new(MemoryStore::new()));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    // Otherwise the second line waits for the acknowledgement of the first one, 40 ms each time.
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    println!("{}", listener.local_addr().expect("the listener has an address"));
    axum::serve(listener, app).await.expect("the server runs");
}

/// The process of the server. Dropping this value ends the process.
struct Server(Child);

impl Server {
    fn start() -> (Self, String) {
        let this = std::env::current_exe().expect("the path of this program is known");
        let mut server = Command::new(this)
            .arg(SERVE)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let mut address = String::new();
        let output = server.stdout.take().expect("the output is a pipe");
        BufReader::new(output)
            .read_line(&mut address)
            .expect("the server prints its address");
        (Self(server), address.trim().to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn main() {
    let has_argument = |name| std::env::args().any(|argument| argument == name);
    if has_argument(SERVE) {
        serve();
    // `cargo test --benches` starts this program, too.
    } else if has_argument("--bench") {
        measure();
    }
}

#[tokio::main(flavor = "current_thread")]
async fn measure() {
    let (_server, address) = Server::start();
    let stream = TcpStream::connect(address).await.expect("the server listens");
    stream.set_nodelay(true).expect("the connection is open");
    let connected = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut client, connection) = connected.expect("the server speaks HTTP");
    tokio::spawn(connection);

    println!("| response | without a key | with a key | ratio |");
    println!("|---|--:|--:|--:|");
    for (name, path) in [("a known stream", "/ndjson"), ("not stored", "/not-stored")] {
        let mut times = [Vec::new(), Vec::new()];
        for n in 0..REQUESTS {
            let with_key = n % 2;
            let key = (with_key == 1).then(|| format!("{path}-{n}"));
            let time = first_byte(&mut client, path, key).await;
            // The first requests warm the caches.
            if n > REQUESTS / 10 {
                times[with_key].push(time);
            }
        }
        let [without, with] = times.map(|mut times| {
            times.sort_unstable();
            times[times.len() / 2].as_secs_f64() * 1e6
        });
        println!("| {name} | {without:.1} µs | {with:.1} µs | {:.2} |", with / without);
    }
}

/// Sends a request, and returns the time to the first byte of its body.
async fn first_byte(client: &mut Client, path: &str, key: Option<String>) -> Duration {
    let mut request = Request::post(path).header(header::HOST, "localhost");
    if let Some(key) = key {
        request = request.header(HeaderName::from_static("idempotency-key"), key);
    }
    let request = request.body(Empty::new()).expect("the request is complete");
    client.ready().await.expect("the connection is open");
    let sent = Instant::now();
    let response = client.send_request(request).await.expect("the server replies");
    assert!(response.status().is_success(), "{}", response.status());
    let mut body = response.into_body();
    let first = body.frame().await.expect("the body has a frame");
    let time = sent.elapsed();
    assert!(first.is_ok_and(|frame| frame.is_data()), "the first frame has data");
    body.collect().await.expect("the body ends");
    time
}
