//! One key per logical request. [`KeyGenerator`] makes the key, [`IdempotencyKeyLayer`] adds it,
//! and a [`ProviderProfile`] describes the server that accepts it.

mod derive;
mod generator;
mod layer;
mod place;
mod profile;

pub use derive::{KeyDeriver, KeyOrigin};
pub use generator::{KeyGenerator, Outgoing};
pub use layer::{IdempotencyKeyLayer, IdempotencyKeyService, KeyFuture, KeyPlacementError};
#[cfg(feature = "retry")]
pub(super) use place::IsKeyed;
pub use place::{InBody, InHeader, KeyPlacement};
pub use profile::{ProviderProfile, ResponseMeaning, RetryAdvice};
