//! Client layers: keys, retries, and calls to a third party that take effect once.

mod attempts;
mod histories;
mod keys;
mod once;
mod once_over_http;
mod over_http;
mod owners;
mod programs;
#[path = "../simulation/random.rs"]
mod random;
mod retries;
#[path = "../support/mod.rs"]
mod support;
