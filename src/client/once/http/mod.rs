//! One-time calls over HTTP.

mod call;
mod layer;
mod service;
mod settings;

pub use layer::OnceLayer;
pub use service::{OnceClient, OnceFuture};
pub use settings::LostCall;
