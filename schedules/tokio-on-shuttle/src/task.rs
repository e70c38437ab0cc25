//! Tasks of shuttle.

pub use shuttle::future::{JoinHandle, spawn, yield_now};
