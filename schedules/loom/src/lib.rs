//! The modules of the crate with the locks and atomics of loom, and models of their small parts.
//!
//! The models need parts that are private to the crate. So this file names the crate's modules, as
//! its own `lib.rs` does.
#![allow(unused, reason = "the models use a part of the crate")]

#[path = "../../../src/callback.rs"]
mod callback;
#[path = "../../../src/catch_panic.rs"]
mod catch_panic;
#[path = "../../../src/client/mod.rs"]
mod client;
#[path = "../../../src/clock.rs"]
mod clock;
#[path = "../../../src/detach.rs"]
mod detach;
#[path = "../../../src/engine/mod.rs"]
mod engine;
#[path = "../../../src/error.rs"]
mod error;
#[path = "../../../src/http/mod.rs"]
mod http;
#[path = "../../../src/protocol/mod.rs"]
mod protocol;
#[path = "../../../src/receiver/mod.rs"]
mod receiver;
#[path = "../../../src/server/mod.rs"]
mod server;
#[path = "../../../src/sharded.rs"]
mod sharded;
#[path = "../../../src/store/mod.rs"]
mod store;
#[path = "../../../src/sync.rs"]
mod sync;
#[path = "../../../src/telemetry.rs"]
mod telemetry;

/// The schedule of a lease once more, because it is private to the engine.
#[path = "../../../src/engine/schedule.rs"]
mod schedule;

pub mod models;
