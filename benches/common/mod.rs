//! The subject of the benchmarks: one axum app in several variants, and its requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use http::StatusCode;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, LOCATION, USER_AGENT};
use http_body_util::BodyExt;
use moka::sync::Cache;
use sha2::{Digest, Sha256};
use tower::layer::layer_fn;
use tower::layer::util::Identity;
use tower::{Service, ServiceExt};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

const LIMIT: usize = 2 << 20;
const LARGE: usize = 512 << 10;

/// The number of executions of the handler in this process. Replays do not count.
static EXECUTED: AtomicU64 = AtomicU64::new(0);

/// The layer around the handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// No layer.
    Bare,
    /// tower's `Identity`. It shows what axum's router costs with any layer.
    Identity,
    /// A service that forwards the call.
    Forward,
    /// A middleware that a user could write instead of this crate.
    HandWritten,
    /// This crate.
    Layer,
}

impl Variant {
    pub(crate) const ALL: [Self; 5] = [
        Self::Bare,
        Self::Identity,
        Self::Forward,
        Self::HandWritten,
        Self::Layer,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Identity => "identity",
            Self::Forward => "no-op",
            Self::HandWritten => "hand-written",
            Self::Layer => "layer",
        }
    }
}

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The request has no key.
    NoKey,
    /// The request has a new key.
    First,
    /// The request has a key whose response is stored.
    Replay,
}

/// The state of an app and its requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) name: &'static str,
    /// The size of a request's body, in bytes.
    pub(crate) body: usize,
    /// Whether the response has 512 KiB instead of some 100 bytes.
    pub(crate) large_response: bool,
    /// The number of keys in the store before the first measurement.
    pub(crate) stored_keys: u64,
    pub(crate) kinds: &'static [Kind],
}

/// Replays come before first runs, because first runs add keys.
pub(crate) const SETTINGS: [Setting; 6] = [
    Setting {
        name: "200 B",
        body: 200,
        large_response: false,
        stored_keys: 1,
        kinds: &[Kind::NoKey, Kind::Replay, Kind::First],
    },
    Setting {
        name: "4 KiB",
        body: 4 << 10,
        large_response: false,
        stored_keys: 1,
        kinds: &[Kind::Replay, Kind::First],
    },
    Setting {
        name: "1 MiB",
        body: 1 << 20,
        large_response: false,
        stored_keys: 1,
        kinds: &[Kind::Replay, Kind::First],
    },
    Setting {
        name: "200 B, response of 512 KiB",
        body: 200,
        large_response: true,
        stored_keys: 1,
        kinds: &[Kind::Replay],
    },
    Setting {
        name: "200 B, 1,000 stored keys",
        body: 200,
        large_response: false,
        stored_keys: 1_000,
        kinds: &[Kind::Replay, Kind::First],
    },
    Setting {
        name: "200 B, 1,000,000 stored keys",
        body: 200,
        large_response: false,
        stored_keys: 1_000_000,
        kinds: &[Kind::Replay, Kind::First],
    },
];

/// One app under measurement.
pub(crate) struct Bench {
    app: Router,
    variant: Variant,
    stored_keys: u64,
    next: u64,
    body: Bytes,
}

impl Bench {
    /// Creates an app whose store has as many keys as the setting requires.
    pub(crate) async fn new(setting: &Setting, variant: Variant) -> Self {
        let mut bench = Self {
            // `axum::serve` does this, too. It makes a `Route` of everything once, and not again
            // for each request.
            app: app(setting, variant).with_state(()),
            variant,
            stored_keys: 0,
            next: 0,
            body: noise(setting.body),
        };
        if bench.stores_responses() {
            while bench.stored_keys < setting.stored_keys {
                let step = (setting.stored_keys - bench.stored_keys).min(1_000);
                let requests = bench.requests(Kind::First, step);
                bench.send(Kind::First, requests).await;
                bench.stored_keys += step;
            }
        }
        bench.stored_keys = setting.stored_keys;
        bench.next = setting.stored_keys;
        bench.check_replays(setting).await;
        bench
    }

    /// Builds requests for [`Self::send`].
    pub(crate) fn requests(&mut self, kind: Kind, count: u64) -> Vec<Request> {
        (0..count)
            .map(|_| {
                let n = self.next;
                self.next += 1;
                match kind {
                    Kind::NoKey => self.request(None),
                    Kind::First => self.request(Some(n)),
                    Kind::Replay => self.request(Some(mixed(n) % self.stored_keys)),
                }
            })
            .collect()
    }

    /// Sends the requests one after the other and reads the responses, like the traffic of a server
    /// on one thread.
    pub(crate) async fn send(&self, kind: Kind, requests: Vec<Request>) {
        let count = u64::try_from(requests.len()).unwrap_or(u64::MAX);
        let before = EXECUTED.load(Ordering::Relaxed);
        let mut read = 0;
        for request in requests {
            read += self.response(request).await.len();
        }
        let executed = EXECUTED.load(Ordering::Relaxed) - before;
        let replayed = self.stores_responses() && kind == Kind::Replay;
        assert_eq!(executed, if replayed { 0 } else { count });
        assert!(read > 0);
        // Let the tasks of the runtime run.
        tokio::task::yield_now().await;
    }

    const fn stores_responses(&self) -> bool {
        matches!(self.variant, Variant::HandWritten | Variant::Layer)
    }

    async fn response(&self, request: Request) -> Bytes {
        let Ok(response) = self.app.clone().oneshot(request).await;
        assert_eq!(response.status(), StatusCode::CREATED);
        let body = response.into_body().collect().await;
        body.expect("the handler's bodies do not break").to_bytes()
    }

    /// Checks that replays are equal, and that large replays share their bytes in memory.
    async fn check_replays(&mut self, setting: &Setting) {
        if !self.stores_responses() {
            return;
        }
        let key = mixed(self.next) % self.stored_keys;
        let one = self.response(self.request(Some(key))).await;
        let two = self.response(self.request(Some(key))).await;
        assert_eq!(one, two);
        if setting.large_response {
            assert_eq!(one.as_ptr(), two.as_ptr(), "a replay copied the body");
        }
    }

    fn request(&self, key: Option<u64>) -> Request {
        let mut request = http::Request::post("/payments")
            .header(HOST, "api.example.com")
            .header(USER_AGENT, "payments-client/1.4.2")
            .header(ACCEPT, "application/json")
            .header(AUTHORIZATION, "Bearer 3f1c9a7e5b2d48f0a6c4e8d2b0f1a3c5")
            .header(CONTENT_TYPE, "application/json")
            .header(CONTENT_LENGTH, self.body.len());
        if let Some(key) = key {
            request = request.header("idempotency-key", uuid(key));
        }
        let request = request.body(Body::from(self.body.clone()));
        request.expect("every part of the request is valid")
    }
}

fn app(setting: &Setting, variant: Variant) -> Router {
    let large = setting.large_response.then(|| noise(LARGE));
    let app = Router::new().route("/payments", post(move |body: Bytes| pay(body, large.clone())));
    // The store has room for a million first runs beyond the stored keys.
    let room = setting.stored_keys + 1_000_000;
    match variant {
        Variant::Bare => app,
        Variant::Identity => app.layer(Identity::new()),
        Variant::Forward => app.layer(layer_fn(Forward)),
        Variant::HandWritten => app.layer(from_fn_with_state(Responses::new(room), hand_written)),
        Variant::Layer => {
            let store = MemoryStore::builder()
                .with_record_budget(room)
                .with_byte_budget(1 << 30);
            app.layer(IdempotencyLayer::new(store.build()))
        }
    }
}

/// A typical handler: reads the body and returns a little JSON.
async fn pay(body: Bytes, large: Option<Bytes>) -> impl IntoResponse {
    let id = EXECUTED.fetch_add(1, Ordering::Relaxed);
    let payment = large.unwrap_or_else(|| {
        let amount = body.len();
        format!("{{\"id\":\"payment-{id}\",\"amount\":{amount},\"currency\":\"EUR\",\"status\":\"succeeded\"}}").into()
    });
    let headers = [(CONTENT_TYPE, "application/json"), (LOCATION, "/payments/4711")];
    (StatusCode::CREATED, headers, payment)
}

/// A middleware that a user could write instead of this crate. It has no lock and no lease, and
/// promises nothing after a crash, a hang-up or a panic.
async fn hand_written(State(responses): State<Responses>, request: Request, next: Next) -> Response {
    let Some(key) = request.headers().get("idempotency-key") else {
        return next.run(request).await;
    };
    let Ok(key) = key.to_str().map(str::to_owned) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let (head, body) = request.into_parts();
    let Ok(body) = to_bytes(body, LIMIT).await else {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    };
    let hash: [u8; 32] = Sha256::digest(&body).into();
    if let Some(stored) = responses.0.get(&key) {
        if stored.hash != hash {
            return StatusCode::UNPROCESSABLE_ENTITY.into_response();
        }
        return (stored.status, stored.headers.clone(), stored.body.clone()).into_response();
    }
    let response = next.run(Request::from_parts(head, Body::from(body))).await;
    let (head, body) = response.into_parts();
    let Ok(body) = to_bytes(body, LIMIT).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let stored = StoredResponse {
        hash,
        status: head.status,
        headers: head.headers.clone(),
        body: body.clone(),
    };
    responses.0.insert(key, Arc::new(stored));
    Response::from_parts(head, Body::from(body))
}

#[derive(Clone)]
struct Responses(Cache<String, Arc<StoredResponse>>);

struct StoredResponse {
    hash: [u8; 32],
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Responses {
    fn new(capacity: u64) -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self(Cache::builder().max_capacity(capacity).time_to_live(DAY).build())
    }
}

#[derive(Clone)]
struct Forward<S>(S);

impl<S: Service<Request>> Service<Request> for Forward<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> S::Future {
        self.0.call(request)
    }
}

/// Returns pseudo-random bytes. They are the same in every run.
pub(crate) fn noise(len: usize) -> Bytes {
    (0_u64..).flat_map(|n| mixed(n).to_le_bytes()).take(len).collect()
}

fn uuid(n: u64) -> String {
    let (a, b) = (mixed(n), mixed(!n));
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        (a >> 16) & 0xffff,
        a & 0xfff,
        b >> 52,
        b & 0xffff_ffff_ffff
    )
}

/// The generator `SplitMix64`.
const fn mixed(n: u64) -> u64 {
    let n = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}
