//! The layer costs nothing for a request that it does not cover, and a bounded number of
//! allocations and bytes for one that it covers.

use std::convert::Infallible;
use std::future::{Ready, pending, ready};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use allocation_counter::{AllocationInfo, measure};
use bytes::Bytes;
use futures::StreamExt;
use futures::executor::block_on;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use tower::layer::util::Identity;
use tower::{Layer, Service, service_fn};
use tower_idempotency::client::{IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin, ProviderProfile};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

type FullResponse = Response<Full<Bytes>>;

#[derive(Clone)]
struct Echo;

impl Service<Request<Full<Bytes>>> for Echo {
    type Response = FullResponse;
    type Error = Infallible;
    type Future = Ready<Result<FullResponse, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        ready(Ok(Response::new(request.into_body())))
    }
}

fn request(method: &str, key: Option<&str>, body: &Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri("/payments");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    request.body(Full::new(body.clone())).unwrap()
}

/// Measures the allocations of a service while it handles a request that was built before.
fn allocated<S>(service: &mut S, request: Request<Full<Bytes>>) -> (AllocationInfo, FullResponse)
where
    S: Service<Request<Full<Bytes>>, Response = FullResponse>,
    S::Error: std::fmt::Debug,
{
    let mut response = None;
    let mut request = Some(request);
    let info = measure(|| response = Some(block_on(service.call(request.take().unwrap())).unwrap()));
    (info, response.unwrap())
}

#[test]
fn a_request_that_is_not_covered_is_not_buffered_boxed_or_copied() {
    let body = Bytes::from(vec![7; 10_000]);
    let mut nothing = Identity::new().layer(Echo);
    let mut layer = IdempotencyLayer::new(MemoryStore::new()).layer(Echo);
    // The executor allocates once per thread.
    block_on(ready(()));
    for (method, key) in [("POST", None), ("GET", None), ("GET", Some("k"))] {
        let (bare, _) = allocated(&mut nothing, request(method, key, &body));
        let (ours, response) = allocated(&mut layer, request(method, key, &body));
        assert_eq!(
            (ours.count_total, ours.bytes_total),
            (bare.count_total, bare.bytes_total),
            "{method} {key:?}"
        );
        let returned = block_on(response.into_body().collect()).unwrap().to_bytes();
        assert_eq!(returned.as_ptr(), body.as_ptr());
    }
}

#[test]
fn a_large_response_is_copied_once_for_the_store_and_replayed_without_a_copy() {
    const OTHER: u64 = 32 << 10;
    let body = Bytes::from(vec![7; 512 << 10]);
    let mut layer = IdempotencyLayer::new(MemoryStore::new()).layer(Echo);
    let mut bodies = Vec::new();
    for n in 0..3 {
        let (info, response) = allocated(&mut layer, request("POST", Some("k"), &body));
        // The store makes a copy, because the response may be a slice of a larger buffer.
        let copied = if n == 0 { 512 << 10 } else { 0 };
        assert!(
            (copied..copied + OTHER).contains(&info.bytes_total),
            "{} bytes for request {n}",
            info.bytes_total
        );
        assert_eq!(response.headers().contains_key("idempotent-replayed"), n > 0);
        bodies.push(block_on(response.into_body().collect()).unwrap().to_bytes());
    }
    assert_eq!(bodies[0].as_ptr(), body.as_ptr());
    assert_eq!(bodies[1].as_ptr(), bodies[2].as_ptr());
    assert_eq!(bodies[2], body);
}

#[test]
fn first_runs_and_replays_take_few_allocations() {
    let body = Bytes::from(vec![7; 200]);
    let mut layer = IdempotencyLayer::new(MemoryStore::new()).layer(Echo);
    // The tables grow now and then, so the test takes the median.
    let median = |layer: &mut _, key: &dyn Fn(usize) -> String| {
        let mut counts: Vec<_> = (0..101)
            .map(|n| allocated(layer, request("POST", Some(&key(n)), &body)).0.count_total)
            .collect();
        counts.sort_unstable();
        counts[50]
    };
    let first = median(&mut layer, &|n| format!("key-{n}"));
    let replay = median(&mut layer, &|n| format!("key-{n}"));
    println!("allocations: {first} for a first run, {replay} for a replay");
    assert!(first <= 24, "{first} allocations for a first run");
    assert!(replay <= 12, "{replay} allocations for a replay");
}

#[test]
fn a_record_takes_as_much_memory_as_documented() {
    const RECORDS: u32 = 50_000;
    let body = Bytes::from_static(b"x");
    let mut layer = IdempotencyLayer::new(MemoryStore::new()).layer(Echo);
    let allocated_bytes = measure(|| {
        for n in 0..RECORDS {
            drop(block_on(layer.call(request("POST", Some(&format!("key-{n}")), &body))));
        }
    });
    let each = allocated_bytes.bytes_current / i64::from(RECORDS);
    println!("{each} bytes for a record with its small response");
    // The docs of `MemoryStore` state 0.5 to 0.7 KiB for a record with a response of a few bytes.
    // The size varies because the tables grow.
    assert!((400..800).contains(&each), "{each} bytes for a record");
}

/// The body of a request whose `part` has arrived in frames of this length, and whose rest does not
/// arrive.
fn half_arrived(part: &Bytes, frame: usize) -> UnsyncBoxBody<Bytes, Infallible> {
    let part = part.clone();
    let frames = (0..part.len()).step_by(frame);
    let frames = frames.map(move |at| Ok(Frame::data(Bytes::copy_from_slice(&part[at..at + frame]))));
    StreamBody::new(futures::stream::iter(frames).chain(futures::stream::pending())).boxed_unsync()
}

/// Polls a future once. Returns it with the result.
fn poll<F: Future>(call: F) -> (Pin<Box<F>>, Poll<F::Output>) {
    let mut call = Box::pin(call);
    let polled = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    (call, polled)
}

/// Returns the bytes per request that 10,000 requests hold after their first poll. `call` makes and
/// polls the request with a number, and returns what stays in memory.
fn held_by_each<T>(call: impl Fn(usize) -> T) -> i64 {
    const REQUESTS: usize = 10_000;
    let mut held = Vec::with_capacity(REQUESTS);
    let info = measure(|| held.extend((0..REQUESTS).map(&call)));
    info.bytes_current / i64::try_from(held.len()).unwrap()
}

/// The guide for operators states these numbers.
#[test]
fn slow_clients_take_as_much_memory_as_documented() {
    const KIB: i64 = 1 << 10;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    let body = Bytes::from(vec![7; 16 << 10]);

    let reading = IdempotencyLayer::new(MemoryStore::new()).layer(service_fn(
        |request: Request<UnsyncBoxBody<Bytes, Infallible>>| {
            ready(Ok::<_, Infallible>(Response::new(request.into_body())))
        },
    ));
    for (arrived, frame) in [(16 << 10, 16 << 10), (256, 1)] {
        let part = body.slice(..arrived);
        let each = held_by_each(|n| {
            let request = request("POST", Some(&format!("key-{n}")), &Bytes::new());
            let (call, polled) = poll(reading.clone().call(request.map(|_| half_arrived(&part, frame))));
            assert!(polled.is_pending());
            call
        });
        println!("{each} bytes for a request of which {arrived} bytes arrived, {frame} at a time");
        let arrived = i64::try_from(arrived).unwrap();
        assert!((arrived..2 * arrived + 3 * KIB).contains(&each), "{each} bytes");
    }

    let waiting = IdempotencyLayer::new(MemoryStore::new()).layer(service_fn(|_: Request<Full<Bytes>>| {
        pending::<Result<FullResponse, Infallible>>()
    }));
    let each = held_by_each(|_| {
        let copy = Bytes::copy_from_slice(&body);
        let (call, polled) = poll(waiting.clone().call(request("POST", Some("k"), &copy)));
        assert!(polled.is_pending());
        call
    });
    println!("{each} bytes for a duplicate that waits");
    assert!((0..3 * KIB).contains(&each), "{each} bytes");

    let large = Bytes::from(vec![7; 1 << 20]);
    let replaying = IdempotencyLayer::new(MemoryStore::new()).layer(Echo);
    let each = held_by_each(|_| {
        let (_, polled) = poll(replaying.clone().call(request("POST", Some("k"), &large)));
        polled
    });
    println!("{each} bytes for a replay of 1 MiB that nobody reads");
    assert!((0..KIB).contains(&each), "{each} bytes");
}

/// A client that sets the `Host` field, as the client of hyper-util does.
#[derive(Clone)]
struct SetsHost;

impl Service<Request<Full<Bytes>>> for SetsHost {
    type Response = FullResponse;
    type Error = Infallible;
    type Future = Ready<Result<FullResponse, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Full<Bytes>>) -> Self::Future {
        let host = http::HeaderValue::from_static("bank.example");
        request.headers_mut().insert(http::header::HOST, host);
        Echo.call(request)
    }
}

#[test]
fn a_key_takes_at_most_two_allocations_and_a_request_without_one_takes_none() {
    let body = Bytes::from(vec![7; 200]);
    let outgoing = |method: &str, key: Option<&str>| {
        let mut request = request(method, key, &body);
        request.extensions_mut().insert(KeyOrigin::new("order-1", "charge"));
        request
    };
    let keys = KeyDeriver::new(&[7; 32]).unwrap();
    let function = KeyGenerator::from_fn(|_| Ok::<_, Infallible>("order-1".repeat(5)));
    block_on(ready(()));
    for (name, generator, profile, most) in [
        (
            "random, version 4",
            KeyGenerator::uuid_v4(),
            ProviderProfile::stripe(),
            1,
        ),
        (
            "random, version 7",
            KeyGenerator::uuid_v7(),
            ProviderProfile::stripe(),
            1,
        ),
        ("derived", KeyGenerator::derived(keys), ProviderProfile::stripe(), 1),
        ("in quotes", KeyGenerator::uuid_v4(), ProviderProfile::draft(), 2),
        ("by a function", function, ProviderProfile::stripe(), 2),
    ] {
        let mut client = IdempotencyKeyLayer::new(profile)
            .with_generator(generator)
            .layer(SetsHost);
        // The random number generator allocates once per thread.
        drop(allocated(&mut client, outgoing("POST", None)));
        let more = |client: &mut _, method, key| {
            let (bare, _) = allocated(&mut SetsHost, outgoing(method, key));
            let (ours, _) = allocated(client, outgoing(method, key));
            ours.count_total - bare.count_total
        };
        let added = more(&mut client, "POST", None);
        assert!((1..=most).contains(&added), "{name}: {added} allocations");
        assert_eq!(more(&mut client, "GET", None), 0, "{name}: not covered");
        assert_eq!(more(&mut client, "POST", Some("mine")), 0, "{name}: set by the caller");
    }
}
