//! The layer around services of tower, axum and tonic: which requests run, which wait, and which
//! get a stored response.

mod bad_input;
mod boxed_store;
mod cancellation;
mod duplicates;
mod failures;
#[cfg(feature = "axum")]
mod on_axum;
#[cfg(feature = "tonic")]
mod on_tonic;
mod on_tower;
mod runtimes;
mod slow_clients;
#[path = "../support/mod.rs"]
mod support;
