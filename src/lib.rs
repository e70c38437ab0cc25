//! A Tower layer that makes any HTTP service idempotent: a request that carries an `Idempotency-Key` takes effect once, however
//! often it is sent and whatever breaks in between, and every repetition gets the first answer, byte for byte.
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
//! Outside of axum it is the same layer, without any feature:
//!
//! ```
//! use std::convert::Infallible;
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::{BodyExt, Full};
//! use tower::{service_fn, ServiceBuilder, ServiceExt};
//! use tower_idempotency::{IdempotencyLayer, MemoryStore};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Infallible> {
//! let service = ServiceBuilder::new()
//!     .layer(IdempotencyLayer::new(MemoryStore::new()))
//!     .service(service_fn(|_: Request<Full<Bytes>>| async {
//!         Ok::<_, Infallible>(Response::new(Full::from("paid")))
//!     }));
//!
//! let pay = || Request::post("/payments").header("idempotency-key", "k-1").body(Full::from("100")).unwrap();
//! let first = service.clone().oneshot(pay()).await?;
//! let again = service.clone().oneshot(pay()).await?;
//!
//! assert_eq!(again.headers()["idempotent-replayed"], "true");
//! assert_eq!(again.into_body().collect().await?.to_bytes(), first.into_body().collect().await?.to_bytes());
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//!
//! What can honestly be promised depends on what the handler touches:
//!
//! | the handler's effect is in | strongest promise | what it needs |
//! |---|---|---|
//! | the same PostgreSQL as the record | exactly-once effect | effect and completion in one transaction, by a store that offers it |
//! | a third party that dedups by a key that we pass on | exactly-once effect, even when run again | [`Lease::derive_key`] |
//! | a third party that can be asked "did it happen?" | exactly-once, if the question itself shuts the old attempt out (raises the fence); else at-least-once | [`with_recovery`](IdempotencyLayer::with_recovery) |
//! | anything else | at-most-once ([`OnLost::Refuse`], the default) or at-least-once ([`OnLost::Execute`]): choose; there is no third | |
//!
//! All of it holds as long as the store does not lose acknowledged writes and the record outlives the client's last retry.
//! [`MemoryStore`] forgets with its process.
//!
//! # Where to begin
//!
//! [`IdempotencyLayer`] is the layer and its own builder; its page has the table of defaults. [`Store`] is where records live,
//! with its contract; [`MemoryStore`] is the embedded default, [`BoxStore`] one that is chosen at run time. [`Lease`] is what a handler
//! may know. [`client`] makes calls to others; [`receiver`] handles messages and webhooks; `outbox` (feature `postgres`) sends messages
//! out of a transaction. [`protocol`] holds the record as pure functions, for stores of your own.
//!
//! The [guides](guide) answer questions about one subject each.
//!
//! # Features
//!
//! | feature | adds |
//! |---|---|
//! | `axum` | the layer in axum apps: [`RebuildBody`] for axum's body, full paths under nested routers, the extractors [`Lease`], [`AttemptNumber`] and [`IdempotencyKey`] |
//! | `conformance` | `store::conformance`: checks that a store of your own keeps the contract, for tests |
//! | `follow-redirect` | [`client::SameOriginKey`](client), which keeps a key from redirects to another origin |
//! | `metrics` | counters, gauges and histograms through the `metrics` facade |
//! | `once` | `client::once`, for calls of any kind that are to be made once |
//! | `postgres` | `PostgresStore`; `Lease::complete_in` for effect and answer in one transaction; `receiver::Inbox` and `outbox`; needs Rust 1.94 |
//! | `postgres-rustls` | `postgres`, with TLS by rustls and ring |
//! | `redis` | `RedisStore`, for Redis 7, Valkey and Cluster; needs Rust 1.88 |
//! | `redis-rustls` | `redis`, with TLS by rustls and ring |
//! | `reqwest` | `client::ReqwestService`, a `reqwest::Client` as a tower service |
//! | `retry` | `client::RetryPolicy` for `tower::retry`, and `client::CallLayer`, which reports the outcome of a call and can collect its response |
//! | `testing` | `testing::TestLease`, leases for unit tests of handlers; `receiver::testing`, which delivers messages to a handler again, in every way in which brokers do, and signs webhooks for tests |
//! | `tonic` | gRPC services: [`IdempotencyLayer::grpc`](crate::IdempotencyLayer), [`RebuildBody`] for the body of tonic 0.14, marks on a `tonic::Status`; needs Rust 1.87 |
//! | `webhooks` | `receiver::webhooks`, which verifies the signatures of webhooks; brings in `ring` |
//!
//! None is on by default; without `axum`, the layer does not compile in an axum app. Rust 1.85 where nothing else is said.
//!
//! # Telemetry
//!
//! Everything is reported under the target `tower_idempotency`; no key, body, header value or credential is ever a part of it.
//!
//! One tracing span `idempotency` (level `DEBUG`) per guarded request, with the fields `outcome`, `attempt` and
//! `fence`; and an event (field `event`, and `error`, `kind` and `cause` if there is an error) per unusual path. The
//! level is `ERROR` if the `kind` is `Configuration` or `CorruptRecord`, because an operator has to act. It is `INFO`
//! for `rescued`, `DEBUG` for the `tombstone` of a stream or of a response that must not be stored, and `WARN`
//! otherwise. The events are `abandoned`, `claim-repeated`, `completion-repeated`, `transaction-resolved-late` (feature
//! `postgres`), `error-unclassified`, `handler-failed`, `look-repeated`, `message-failed` and `message-unreadable`
//! (feature `postgres`), `overloaded`, `record-unreadable`, `outcome-recorded-late`, `relay-failed` (feature `postgres`),
//! `claim-released-late`, `renewal-failed`, `rescued`, `rolled-back` (feature `postgres`), `store-failed`,
//! `store-misconfigured`, `superseded`, `sweep-failed` (feature `postgres`), `tombstone`, `type-mismatch`, `unchecked`
//! (feature `redis`), `unprotected`, `unrecorded`, `webhook-rejected` (feature `webhooks`). Those of messages have the
//! fields `error`, `position` (of the row) and `failures` (attempts so far); the `error` of `message-failed` is the
//! text of your own. `webhook-rejected` has the fields `consumer` (the name of the `WebhookLayer`) and `reason`:
//! `body`, `id`, `missing-header`, `secret`, `signature` or `timestamp`. The response never shows the reason.
//!
//! With the feature `metrics`:
//!
//! | name | kind | labels | what |
//! |---|---|---|---|
//! | `idempotency_requests_total` | counter | `outcome` | requests by outcome: `executed`, `replayed`, `waited` (for an answer that is not kept), `unprotected`, or the [code](Refusal::code) of the refusal |
//! | `idempotency_messages_total` | counter | `outcome` | deliveries by outcome: `first`, `duplicate`, `in-flight`, `unknown`, `unprotected`, `handler-failed`, `panicked`, `mismatch`, `type-mismatch`, `missing-id`, `invalid-id`, `rejected`, `store-failed`, `unrecorded` |
//! | `idempotency_events_total` | counter | `event` | unusual paths, as above |
//! | `idempotency_webhooks_rejected_total` | counter | `reason` | webhooks that were rejected with 401, by reason, as above (feature `webhooks`) |
//! | `idempotency_wait_seconds` | histogram | | how long duplicates waited for the outstanding request |
//! | `idempotency_layer_seconds` | histogram | | time in the layer, without the handler and without waiting |
//! | `idempotency_in_flight` | gauge | | executions under way |
//! | `idempotency_store_records`, `_bytes`, `_in_flight`, `_waiters` | gauge | | the [figures](store::StoreStats) of a memory store, once a second |

#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "tests say what went wrong by panicking"
    )
)]

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
mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;

pub use self::clock::{Clock, Timestamp};
pub use self::engine::{Drain, OnError, OnLost, Recovered};
pub use self::error::{Error, ErrorKind};
#[cfg(feature = "tonic")]
pub use self::http::{grpc_response, MarkStatus};
pub use self::http::{BufferedBody, RebuildBody, Refusal, RefusalKind};
pub use self::protocol::{CanonicalJson, IdempotencyKey, InvalidKey, KeyError, KeySyntax, Scope};
#[cfg(feature = "axum")]
pub use self::server::LeaseRejection;
pub use self::server::{
    AttemptNumber, DoNotStore, Idempotency, IdempotencyLayer, Lease, LostAttempt, ResponseFuture, ServiceFailure,
    Settings, StoreFor, StoreOutcomeOnly, StoreResponse, StreamResponse,
};
#[cfg(feature = "postgres")]
pub use self::store::PostgresStore;
#[cfg(feature = "redis")]
pub use self::store::RedisStore;
pub use self::store::{BoxStore, MemoryStore, Store};

/// The code blocks of the README, as tests.
#[cfg(all(doctest, feature = "axum", feature = "conformance", feature = "postgres"))]
#[doc = include_str!("../README.md")]
struct Readme;
