//! One-time calls over HTTP.

mod call;
mod layer;
mod service;

pub use layer::{LostCall, OnceLayer};
pub use service::{OnceClient, OnceFuture};
