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
//! x
mod clock;
mod error;
mod http;
pub mod protocol;
mod server;
mod sharded;
pub mod store;
mod telemetry;

pub use self::clock::{Clock, Timestamp};
pub use self::error::{Error, ErrorKind};
pub use self::http::{Body, RebuildBody, Refusal, RefusalKind};
pub use self::protocol::{CanonicalJson, IdempotencyKey, InvalidKey, KeySyntax, Scope};
#[cfg(feature = "axum")]
pub use self::server::NotGuarded;
pub use self::server::{
    Attempt, DoNotKeep, Drain, Idempotency, IdempotencyLayer, Keep, Lease, OnError, OnLost, RecoverFn, Recovered,
    Recovery, ResponseFuture, RetainFor, Settings,
};
pub use self::store::{MemoryStore, Store};
