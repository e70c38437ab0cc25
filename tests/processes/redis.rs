//! Several processes over one Redis: shared keys, kills, zombies.

use crate::cluster::Mode;
use crate::scenarios;
use crate::support::redis::RedisServer;

#[tokio::test(flavor = "multi_thread")]
async fn two_and_four_processes_execute_each_key_once() {
    for processes in [2, 4] {
        let server = RedisServer::start();
        scenarios::shared_keys(&server.url(), processes).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_never_make_an_effect_twice_where_lost_keys_are_refused() {
    let server = RedisServer::start();
    scenarios::kills(&server.url(), Mode::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_are_taken_over_where_lost_keys_are_executed() {
    let server = RedisServer::start();
    scenarios::kills(&server.url(), Mode::Execute).await;
}

/// Without its renewals, another process would take over an execution that takes longer than its
/// lease.
#[tokio::test(flavor = "multi_thread")]
async fn kills_never_repeat_a_live_execution_where_the_blocking_pools_are_full() {
    let server = RedisServer::start();
    scenarios::kills(&server.url(), Mode::FullPool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_changes_nothing_and_its_callers_get_the_winners_bytes() {
    let server = RedisServer::start();
    scenarios::zombies(&server.url()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_outcome_is_healed_by_a_late_completion() {
    let server = RedisServer::start();
    scenarios::late_completions(&server.url()).await;
}
