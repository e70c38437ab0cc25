//! The server side: the layer, its service, and the flow of a guarded request.
//!
//! [`IdempotencyLayer`] holds what is set; [`Idempotency`] decides by the head of a request whether to pass it on, refuse it or
//! guard it. A guarded request goes through an exchange: its body is read, its fingerprint taken, and it asks for the seat of
//! its key among the requests of this process. The one that gets the seat claims the key in the store and does what the
//! store decides; the others wait for it.
//!
//! The one that is granted the key runs the handler within the very future that the caller polls. If the caller drops it, the
//! rest of it moves to a task of its own: only an abandoned request pays for one.

mod buffering;
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
