//! Calls that are made once, with stored responses: [`OnceLayer`] for HTTP, and `once` for calls of
//! any other kind (feature `once`).

mod failure;
#[cfg(feature = "once")]
mod form;
mod http;
mod setters;
#[cfg(feature = "once")]
mod step_path;
#[cfg(feature = "once")]
mod steps;
#[cfg(feature = "once")]
mod values;

pub use self::http::{LostCall, OnceClient, OnceFuture, OnceLayer};
#[cfg(feature = "once")]
pub use failure::Failure;
pub use failure::OnceError;
#[cfg(feature = "once")]
pub use steps::Steps;
#[cfg(feature = "once")]
pub use values::{Done, Once, once};
