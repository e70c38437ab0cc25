//! One key per logical request: who takes it ([`Profile`]), who makes it ([`KeyMaker`]), who adds it ([`IdempotencyKeyLayer`]).

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
