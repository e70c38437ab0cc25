//! The time that `IdempotencyKeyLayer` adds to a request of a client.
//!
//! `cargo bench --bench client` prints the table of `benches/README.md` in about 15 seconds. With
//! `-- --quick` it prints a rough table in 2 seconds. There is one process and no network: the
//! client returns the response at once. The variants take turns in short rounds, so that a slow
//! moment of the machine slows all of them. The figures are medians over the rounds.
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the machine's clock")]

use std::convert::Infallible;
use std::future::{Ready, poll_fn, ready};
use std::hint::black_box;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::executor::block_on;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, Service};
use tower_idempotency::client::{IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin, ProviderProfile};

/// The requests of a round. They are few enough for the caches of the processor, because a real
/// client sends a request that it has just built.
const BATCH: u32 = 32;

type Ours = Request<Full<Bytes>>;

/// The client: takes a request and returns an empty response.
#[derive(Clone)]
struct Client;

impl Service<Ours> for Client {
    type Response = Response<()>;
    type Error = Infallible;
    type Future = Ready<Result<Response<()>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Ours) -> Self::Future {
        black_box(&request);
        drop(request);
        ready(Ok(Response::new(())))
    }
}

/// A layer that does nothing.
#[derive(Clone)]
struct Forward<S>(S);

impl<S: Service<Ours>> Service<Ours> for Forward<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Ours) -> S::Future {
        self.0.call(request)
    }
}

/// A client that derives a key and drops it. It shows the time of HMAC-SHA-256 alone.
struct Deriving(KeyDeriver);

impl Service<Ours> for Deriving {
    type Response = Response<()>;
    type Error = Infallible;
    type Future = Ready<Result<Response<()>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Ours) -> Self::Future {
        let origin = request
            .extensions()
            .get::<KeyOrigin>()
            .expect("every request has an origin");
        black_box(self.0.derive(origin));
        Client.call(request)
    }
}

/// One client under measurement.
struct Subject {
    name: &'static str,
    send: Box<dyn FnMut(Vec<Ours>) -> Duration>,
    /// Nanoseconds per request, one figure per round.
    rounds: Vec<f64>,
}

impl Subject {
    fn new<S>(name: &'static str, mut client: S) -> Self
    where
        S: Service<Ours, Response = Response<()>> + 'static,
        S::Error: std::fmt::Debug,
    {
        let send = move |requests: Vec<Ours>| {
            let started = Instant::now();
            block_on(send_all(&mut client, requests));
            started.elapsed()
        };
        Self {
            name,
            send: Box::new(send),
            rounds: Vec::new(),
        }
    }
}

async fn send_all<S>(client: &mut S, requests: Vec<Ours>)
where
    S: Service<Ours, Response = Response<()>>,
    S::Error: std::fmt::Debug,
{
    for request in requests {
        poll_fn(|cx| client.poll_ready(cx)).await.expect("it is always ready");
        drop(black_box(
            client.call(request).await.expect("every request has a response"),
        ));
    }
}

fn subjects() -> Vec<Subject> {
    let keyed = |generator| {
        let layer = IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(generator);
        layer.layer(Client)
    };
    let keys = KeyDeriver::new(&[7; 32]).expect("the secret is long enough");
    vec![
        Subject::new("bare client", Client),
        Subject::new("layer that does nothing", Forward(Client)),
        Subject::new(
            "not covered",
            IdempotencyKeyLayer::new(ProviderProfile::stripe())
                .with_methods([])
                .layer(Client),
        ),
        Subject::new("random key, version 4", keyed(KeyGenerator::uuid_v4())),
        Subject::new("random key, version 7", keyed(KeyGenerator::uuid_v7())),
        Subject::new("`KeyDeriver::derive`, without the layer", Deriving(keys.clone())),
        Subject::new("derived key", keyed(KeyGenerator::derived(keys))),
    ]
}

fn request(n: u32) -> Ours {
    let mut request = Request::post("https://bank.example/v1/charges")
        .header(HOST, "bank.example")
        .header(USER_AGENT, "payments-client/1.4.2")
        .header(ACCEPT, "application/json")
        .header(AUTHORIZATION, "Bearer 3f1c9a7e5b2d48f0a6c4e8d2b0f1a3c5")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::from("{\"amount\":4200}"))
        .expect("every part of the request is valid");
    let origin = KeyOrigin::new(format!("order-{n}"), "charge");
    request.extensions_mut().insert(origin);
    request
}

/// Runs every subject once. Each round begins with the next subject.
fn round(subjects: &mut [Subject], first: usize) {
    for turn in 0..subjects.len() {
        let at = (first + turn) % subjects.len();
        let requests = (0..BATCH).map(request).collect();
        let time = (subjects[at].send)(requests);
        subjects[at].rounds.push(time.as_secs_f64() * 1e9 / f64::from(BATCH));
    }
}

/// Returns the median over the rounds.
fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo test --benches` starts this program, too.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    let effort = Duration::from_secs(if is_quick { 2 } else { 15 });
    let mut subjects = subjects();
    // Warm the caches of the processor and of the allocator.
    for first in 0..20 {
        round(&mut subjects, first);
    }
    for subject in &mut subjects {
        subject.rounds.clear();
    }
    let started = Instant::now();
    let mut rounds = 0;
    while started.elapsed() < effort {
        round(&mut subjects, rounds);
        rounds += 1;
    }
    print(&subjects);
    eprintln!("    {rounds} rounds of {BATCH} requests");
}

fn print(subjects: &[Subject]) {
    println!("| client | a request takes, ns | added to the bare client, ns |");
    println!("|---|--:|--:|");
    let bare = &subjects[0].rounds;
    for Subject { name, rounds, .. } in subjects {
        let added = median(rounds.iter().zip(bare).map(|(ours, bare)| ours - bare));
        let all = median(rounds.iter().copied());
        println!("| {name} | {all:.0} | {added:.0} |");
    }
}
