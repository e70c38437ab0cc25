//! One key per logical request. [`KeyMaker`] makes it, [`IdempotencyKeyLayer`] adds it, and a [`Profile`] describes the server
//! that accepts it.

mod derive;
mod layer;
mod maker;
mod place;
mod profile;

pub use derive::{KeyDeriver, KeyOrigin};
pub use layer::{IdempotencyKeyLayer, KeyFuture, Keyed, KeyedError};
pub use maker::{KeyMaker, Outgoing};
#[cfg(feature = "retry")]
pub(super) use place::IsKeyed;
pub use place::{InBody, InHeader, PlaceKey};
pub use profile::{Advice, Meaning, Profile};
