//! Each store against its contract, and against clients, poolers and servers that fail. Each test
//! starts its own servers.

mod cancellation;
mod clock;
mod contract;
mod full_pool;
mod garbage;
mod memory;
mod outbox;
mod postgres;
#[path = "../simulation/random.rs"]
#[expect(dead_code, reason = "the simulation uses all of it")]
mod random;
mod redis;
mod rules;
mod shared_by_runtimes;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod transaction;
