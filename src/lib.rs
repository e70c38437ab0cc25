//! A Tower layer that makes any HTTP service idempotent.
//!
//! A request that carries an `Idempotency-Key` takes effect once, however often it is sent and whatever fails in between. Every retry
//! gets the first response, byte for byte.
//!
//! ```
//! # #[cfg(feature = "axum")]
//! # fn app() -> axum::Router {
//! use axum::{routing::post, Router};
//! use tower_idempotency::{IdempotencyLayer, MemoryStore};
//!
//! Router::new()
//!     .route("/payments", post(|| async { "paid" }))
//!     .layer(IdempotencyLayer::new(MemoryStore::new()))
//! # }
//! ```
//!
//! The same layer works in tonic, in a service of hyper alone, and around any tower service over `http`. How strong its guarantee can be
//! depends on the place of the handler's effect: see [guarantees](guide::guarantees).
//!
//! # Where to begin
//!
//! * The [quick start](guide::quick_start) has code for payments, orders, e-mails, webhooks, messages and calls to others.
//! * Each of the [guides](guide) begins with a task of yours. [Troubleshooting](guide::troubleshooting) explains each refusal and error text.
//! * [`IdempotencyLayer`] is the layer and its own builder. Its page has the table of settings and defaults.
//! * [`Lease`] is what a handler may know about its attempt.
//! * [`Store`] is the place of the records. [`MemoryStore`] is the embedded default, and [`BoxStore`] is chosen at run time.
//! * [`client`] calls others, [`receiver`] handles messages and webhooks, and `outbox` (feature `postgres`) sends messages that belong to
//!   a transaction.
//! * [`protocol`] has the record as pure functions, for stores of your own.
//!
//! # Features
//!
//! None is on by default. Rust 1.85 is enough unless the table says otherwise.
//!
//! | feature | adds |
//! |---|---|
//! | `axum` | the layer in axum apps, which do not compile without it: [`RebuildBody`] for the body of axum, full paths under nested routers, the extractors [`Lease`], [`AttemptNumber`] and [`IdempotencyKey`] |
//! | `conformance` | `store::conformance`, which checks that a store of your own obeys the contract, for tests |
//! | `follow-redirect` | [`client::SameOriginKey`](client), a redirect policy for `tower-http` that sends a key to no other origin |
//! | `metrics` | counters, gauges and histograms through the `metrics` facade |
//! | `once` | `client::once`, for calls of any kind that are made once |
//! | `postgres` | `PostgresStore`; `Lease::complete_in` for effect and response in one transaction; `receiver::Inbox` and `outbox`; needs Rust 1.94 |
//! | `postgres-rustls` | `postgres`, with TLS by rustls and ring |
//! | `redis` | `RedisStore`, for Redis 7, Valkey and Cluster; needs Rust 1.88 |
//! | `redis-rustls` | `redis`, with TLS by rustls and ring |
//! | `reqwest` | `client::ReqwestService`, a `reqwest::Client` as a tower service |
//! | `retry` | `client::RetryPolicy` for `tower::retry`, and `client::CallLayer`, which reports the outcome of a call and can collect its response |
//! | `testing` | `testing::TestLease`, leases for unit tests of handlers; `receiver::testing`, which delivers messages again in every way in which brokers do, and signs webhooks for tests |
//! | `tonic` | gRPC services: [`IdempotencyLayer::grpc`](crate::IdempotencyLayer), [`RebuildBody`] for the body of tonic 0.14, marks on a `tonic::Status`; needs Rust 1.87 |
//! | `webhooks` | `receiver::webhooks`, which verifies the signatures of webhooks; depends on `ring` |
//!
//! # Telemetry
//!
//! The crate reports a tracing span, events and metrics. [Operations](guide::operations#see-each-request) lists all of them. No key, body,
//! header value or credential is part of them.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "tests say what went wrong by panicking"
    )
)]

mod callback;
mod catch_panic;
pub mod client;
mod clock;
mod detach;
mod engine;
mod error;
pub mod guide;
mod http;
#[cfg(feature = "postgres")]
pub mod outbox;
pub mod protocol;
pub mod receiver;
mod server;
mod sharded;
pub mod store;
mod sync;
mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;

pub use self::clock::{Clock, Timestamp};
pub use self::engine::{Drain, OnError, OnLost, Recovered};
pub use self::error::{Error, ErrorKind};
pub use self::http::{BufferedBody, RebuildBody, Refusal, RefusalKind};
#[cfg(feature = "tonic")]
pub use self::http::{MarkStatus, grpc_response};
#[doc(inline)]
pub use self::protocol::{CanonicalJson, IdempotencyKey, InvalidKey, KeyError, KeySyntax, Scope};
#[cfg(feature = "axum")]
pub use self::server::LeaseRejection;
pub use self::server::{
    AttemptNumber, DoNotStore, Idempotency, IdempotencyLayer, Lease, LostAttempt, ResponseFuture, ServiceFailure,
    Settings, StoreFor, StoreOutcomeOnly, StoreResponse, StreamResponse,
};
#[cfg(feature = "postgres")]
#[doc(inline)]
pub use self::store::PostgresStore;
#[cfg(feature = "redis")]
#[doc(inline)]
pub use self::store::RedisStore;
#[doc(inline)]
pub use self::store::{BoxStore, MemoryStore, Store};

/// The code blocks of the README, as tests.
#[cfg(all(doctest, feature = "axum"))]
#[doc = include_str!("../README.md")]
struct Readme;
