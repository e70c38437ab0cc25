//! Real servers under faults, in the manner of Jepsen. Processes of an application serve the layer
//! over Redis or PostgreSQL. Clients retry. Servers, processes and their network fail at random
//! times. At the end all faults are over, and the checks of `support/checks.rs` read the history of
//! each key. Some tests also have an outbox and inboxes with a broker between them, and check the
//! messages of each key.
//!
//! `JEPSEN_SECONDS` sets the duration of the faults, and `JEPSEN_SEED` their order. Some tests are
//! ignored by default, because they start many servers. The processes are this binary, started
//! again with a role in its environment.

use bank::Mode;
use postgres_servers::{Postgres, Standby};
use redis_servers::{Cluster, Redis};
use run::{FEWEST_KEYS, PROCESSES, Report, Subject, run};
use support::proxy::Proxy;

mod app;
mod bank;
mod broker;
#[path = "../support/checks.rs"]
mod checks;
mod faults;
mod messages;
mod postgres_servers;
#[path = "../simulation/random.rs"]
mod random;
mod redis_servers;
mod run;
#[path = "../support/mod.rs"]
mod support;
mod tables;

#[test]
fn serve_if_started_as_process() {
    app::serve_if_started_as_process();
}

async fn over_redis(name: &'static str, has_replica: bool, replicas: usize) -> Report {
    let (redis, proxies) = Redis::start(PROCESSES, has_replica).await;
    run(Subject {
        name,
        urls: urls("redis://", "/", &proxies),
        servers: Box::new(redis),
        proxies,
        replicas,
        modes: &Mode::WITHOUT_TRANSACTIONS,
    })
    .await
}

async fn over_cluster(name: &'static str, replicas: usize) -> Report {
    let (cluster, proxies) = Cluster::start().await;
    run(Subject {
        name,
        urls: vec![cluster.proxied_url(); PROCESSES],
        servers: Box::new(cluster),
        proxies,
        replicas,
        modes: &Mode::WITHOUT_TRANSACTIONS,
    })
    .await
}

async fn over_postgres(name: &'static str, standby: Standby) -> Report {
    with_modes(name, standby, &Mode::WITHOUT_MESSAGES).await
}

async fn messages_over_postgres(name: &'static str, standby: Standby) -> Report {
    with_modes(name, standby, &[Mode::Message]).await
}

async fn with_modes(name: &'static str, standby: Standby, modes: &'static [Mode]) -> Report {
    let (postgres, proxies) = Postgres::start(PROCESSES, standby).await;
    run(Subject {
        name,
        urls: urls("postgres://app@", "/postgres", &proxies),
        servers: Box::new(postgres),
        proxies,
        replicas: 0,
        modes,
    })
    .await
}

fn urls(scheme: &str, path: &str, proxies: &[Proxy]) -> Vec<String> {
    let url = |proxy: &Proxy| format!("{scheme}{}{path}", proxy.address);
    proxies.iter().map(url).collect()
}

fn assert_sound(report: &Report) {
    assert!(
        report.keys >= FEWEST_KEYS,
        "hardly any request was sent, so nothing was tested: {report}"
    );
    assert!(report.violations.is_empty(), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_alone_violates_no_guarantee() {
    assert_sound(&over_redis("Redis", false, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn redis_with_failovers_and_wait_violates_no_guarantee() {
    assert_sound(&over_redis("Redis, replica, WAIT", true, 1).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_with_failovers_repeats_effects_without_wait() {
    assert_loses(&over_redis("Redis, replica", true, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn a_cluster_with_failovers_and_wait_violates_no_guarantee() {
    assert_sound(&over_cluster("Redis Cluster, WAIT", 1).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn a_cluster_with_failovers_repeats_effects_without_wait() {
    assert_loses(&over_cluster("Redis Cluster", 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_alone_violates_no_guarantee() {
    assert_sound(&over_postgres("PostgreSQL", Standby::Absent).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn postgres_with_a_synchronous_standby_violates_no_guarantee() {
    assert_sound(&over_postgres("PostgreSQL, synchronous standby", Standby::Synchronous).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn postgres_with_an_asynchronous_standby_repeats_effects() {
    assert_loses(&over_postgres("PostgreSQL, asynchronous standby", Standby::Asynchronous).await);
}

/// PostgreSQL hides a write that waits for a standby, but not after a restart. Then a client can see
/// a response that the standby lacks.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn postgres_shows_writes_that_its_synchronous_standby_lacks_after_a_restart() {
    const ROUNDS: usize = 5;
    for _ in 0..ROUNDS {
        let standby = Standby::SynchronousRestarted;
        let report = over_postgres("PostgreSQL, synchronous standby, restarts", standby).await;
        for mode in [Mode::Refuse, Mode::Derived, Mode::Recover] {
            assert_eq!(report.count(mode, "I3"), 0, "an effect was repeated: {report}");
        }
        let changed = |mode| report.count(mode, "I2") > 0;
        if [Mode::Derived, Mode::Recover, Mode::Transaction]
            .into_iter()
            .any(changed)
        {
            return;
        }
    }
    panic!("no response changed in {ROUNDS} rounds, so the loss was not found");
}

#[tokio::test(flavor = "multi_thread")]
async fn outbox_and_inbox_lose_and_repeat_no_message() {
    assert_sound(&messages_over_postgres("PostgreSQL, messages", Standby::Absent).await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn outbox_and_inbox_lose_and_repeat_no_message_with_a_synchronous_standby() {
    let name = "PostgreSQL, messages, synchronous standby";
    assert_sound(&messages_over_postgres(name, Standby::Synchronous).await);
}

/// The broker still has a message whose transaction is lost, or has no message any more that a
/// consumer has to handle again.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "./test jepsen and ./test all run it"]
async fn outbox_and_inbox_lose_messages_with_an_asynchronous_standby() {
    let name = "PostgreSQL, messages, asynchronous standby";
    let report = messages_over_postgres(name, Standby::Asynchronous).await;
    assert!(
        report.count(Mode::Message, "I3: a message") > 0,
        "no message lost its effect, so the loss was not found: {report}"
    );
}

/// A store that loses records makes their keys new, so effects are repeated. A third party that
/// deduplicates by the derived key still has one effect, unless a client sends another body, which
/// has another derived key.
fn assert_loses(report: &Report) {
    assert!(
        report.count(Mode::Refuse, "I3") > 0,
        "no effect was repeated, so the loss was not found: {report}"
    );
    assert_eq!(report.not_deduplicated, 0, "{report}");
}
