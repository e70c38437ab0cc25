//! The server side: the layer, its service, and the flow of a guarded request.
//!
//! [`IdempotencyLayer`] holds the settings. [`Idempotency`] decides by the head of a request
//! whether to pass the request on, refuse it or guard it. A guarded request goes through these
//! steps:
//!
//! 1. The layer reads the body and computes the fingerprint (`buffering`).
//! 2. The request takes the entry of its key in the table of this process, or follows the request
//!    that has the entry (`singleflight`).
//! 3. The request with the entry claims the key in the store, and acts on the store's decision
//!    (`exchange`). If the owner is in another process, the request waits for it (`elsewhere`).
//! 4. The owner of the key runs the handler (`execution`), and records the outcome before its
//!    caller gets the response (`ending`).
//!
//! The owner runs the handler within the future that its caller polls. If the caller drops the
//! future, the rest of it continues in a spawned task. So only an abandoned request costs a task.

mod buffering;
mod derived_keys;
mod detached;
mod elsewhere;
mod ending;
mod errors;
mod exchange;
mod execution;
mod future;
#[cfg(feature = "tonic")]
mod grpc;
mod guard;
mod layer;
mod lease;
mod marks;
mod nested;
mod policy;
mod service;
mod settings;
mod singleflight;
#[cfg(feature = "postgres")]
mod transaction;
#[cfg(feature = "postgres")]
mod transaction_context;

pub use errors::ServiceFailure;
pub use future::ResponseFuture;
pub use layer::IdempotencyLayer;
#[cfg(feature = "axum")]
pub use lease::LeaseRejection;
pub use lease::{AttemptNumber, Lease};
pub use marks::{DoNotStore, StoreFor, StoreOutcomeOnly, StoreResponse, StreamResponse};
pub use policy::LostAttempt;
pub use service::Idempotency;
pub use settings::Settings;
