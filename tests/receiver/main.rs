//! Messages and webhooks that are delivered at least once and handled once.

mod job_leases;
mod kit;
mod leases;
mod messages;
mod outages;
mod payloads;
mod postgres;
mod programs;
#[path = "../simulation/random.rs"]
#[expect(dead_code, reason = "the simulation uses all of it")]
mod random;
mod settings;
#[path = "../support/mod.rs"]
mod support;
mod testing;
mod webhooks;
