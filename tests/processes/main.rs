//! Processes over one store that are killed at random. `KILLS` sets the number of kills of each
//! test.
//!
//! The processes are this binary, started again with a role in its environment.

mod aborts;
mod callers;
mod cluster;
mod descriptors;
mod jobs;
mod postgres;
mod redis;
mod scenarios;
#[path = "../support/mod.rs"]
mod support;

#[test]
fn serve_if_started_as_server() {
    cluster::serve_if_started_as_server();
}

#[test]
fn time_out_if_started_without_timers() {
    aborts::time_out_if_started_without_timers();
}

#[test]
fn call_if_started_as_caller() {
    jobs::call_if_started_as_caller();
}
