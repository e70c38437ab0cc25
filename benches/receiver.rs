//! The time that the receiver adds to a message, compared with the time that the layer adds to an
//! HTTP request with the same body. Both use the memory store.
//!
//! `cargo bench --bench receiver` takes half a minute, and three seconds with `-- --quick`. There
//! is one process and one current-thread runtime. The four subjects take turns in short rounds, so
//! that a slow moment of the machine slows all of them. The figures are medians over the rounds.
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the machine's clock")]

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::hint::black_box;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, Service};
use tower_idempotency::receiver::{MessageId, Receipt, Receiver, ReceiverLayer};
use tower_idempotency::{Idempotency, IdempotencyLayer, MemoryStore};

#[derive(Clone)]
struct Bare;

impl Service<Request<Full<Bytes>>> for Bare {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        black_box(request);
        ready(Ok(Response::new(Full::from("done"))))
    }
}

struct Message {
    id: String,
    payload: Bytes,
}

impl Service<Message> for Bare {
    type Response = &'static str;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, message: Message) -> Self::Future {
        black_box((message.id, message.payload));
        ready(Ok("done"))
    }
}

/// The four subjects: a service of HTTP requests and a service of messages, each bare and guarded.
struct Subjects {
    body: Bytes,
    http: Idempotency<Bare, MemoryStore>,
    messages: Receiver<Bare, MemoryStore, Message>,
    count: u64,
}

const SUBJECTS: usize = 4;
const BATCH: u64 = 200;

impl Subjects {
    fn new(body: usize) -> Self {
        let layer = ReceiverLayer::new(MemoryStore::new(), "bench")
            .with_id(|message: &Message| MessageId::from(message.id.as_str()))
            .with_payload(|message: &Message| &message.payload);
        Self {
            body: vec![b'x'; body].into(),
            http: IdempotencyLayer::new(MemoryStore::new()).layer(Bare),
            messages: layer.layer(Bare),
            count: 0,
        }
    }

    fn request(&self, number: u64) -> Request<Full<Bytes>> {
        let request = Request::post("/messages").header("idempotency-key", format!("message-{number:016}"));
        request.body(Full::new(self.body.clone())).expect("a request")
    }

    fn message(&self, number: u64) -> Message {
        Message {
            id: format!("message-{number:016}"),
            payload: self.body.clone(),
        }
    }

    /// Sends a batch to one of the subjects and returns the nanoseconds per input. The inputs are
    /// duplicates of earlier ones, or new.
    async fn batch(&mut self, subject: usize, duplicates: bool) -> f64 {
        let first = if duplicates { 0 } else { self.count };
        let inputs = first..first + BATCH;
        let nanos = match subject {
            0 => {
                let requests: Vec<_> = inputs.map(|number| self.request(number)).collect();
                let started = Instant::now();
                for request in requests {
                    drop(black_box(Service::call(&mut Bare, request).await));
                }
                started.elapsed()
            }
            1 => {
                let requests: Vec<_> = inputs.map(|number| self.request(number)).collect();
                let started = Instant::now();
                for request in requests {
                    drop(black_box(self.http.call(request).await));
                }
                started.elapsed()
            }
            2 => {
                let messages: Vec<_> = inputs.map(|number| self.message(number)).collect();
                let started = Instant::now();
                for message in messages {
                    let _ = black_box(Service::call(&mut Bare, message).await);
                }
                started.elapsed()
            }
            _ => {
                let messages: Vec<_> = inputs.map(|number| self.message(number)).collect();
                let started = Instant::now();
                for message in messages {
                    let receipt = self.messages.call(message).await.expect("a receipt");
                    assert_eq!(receipt == Receipt::Duplicate, duplicates);
                }
                started.elapsed()
            }
        };
        #[expect(clippy::cast_precision_loss, reason = "a batch is short")]
        let each = nanos.as_nanos() as f64 / BATCH as f64;
        each
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

async fn measure(body: usize, duplicates: bool, time: Duration) {
    let mut subjects = Subjects::new(body);
    for subject in 0..SUBJECTS {
        subjects.batch(subject, false).await;
    }
    subjects.count = BATCH;
    let mut figures = [const { Vec::new() }; SUBJECTS];
    let started = Instant::now();
    while started.elapsed() < time {
        let first = figures[0].len();
        for turn in 0..SUBJECTS {
            let subject = (first + turn) % SUBJECTS;
            let each = subjects.batch(subject, duplicates).await;
            figures[subject].push(each);
        }
        subjects.count += BATCH;
        // A memory store accepts 100,000 records by default.
        if !duplicates && subjects.count > 80_000 {
            subjects = Subjects::new(body);
        }
    }
    let [bare_http, http, bare_message, message] = figures.map(median);
    let (added_http, added) = (http - bare_http, message - bare_message);
    let kind = if duplicates { "duplicate" } else { "first" };
    println!(
        "| {kind}, {body} B | {:.2} | {:.2} | {:.2} |",
        added_http / 1_000.0,
        added / 1_000.0,
        added / added_http
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo test --benches` starts this program, too.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let time = Duration::from_millis(if quick { 400 } else { 4_000 });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime without threads starts");
    println!("Time added, in µs:\n");
    println!("| | layer, to a request | receiver, to a message | ratio (target: at most 1.2) |");
    println!("|---|--:|--:|--:|");
    for body in [200, 4_096, 65_536] {
        for duplicates in [false, true] {
            runtime.block_on(measure(body, duplicates, time));
        }
    }
}
