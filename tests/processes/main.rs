//! Processes over one store that are killed at random. `KILLS` sets how many each test kills.
//!
//! The processes are this binary, started again with a role in its environment.

mod callers;
mod cluster;
mod jobs;
mod postgres;
mod redis;
mod scenarios;
#[path = "../support/mod.rs"]
mod support;

#[test]
fn serve_if_told() {
    cluster::serve_if_told();
}

#[test]
fn call_if_told() {
    jobs::call_if_told();
}
