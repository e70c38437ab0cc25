//! Processes that were built with `panic = "abort"`. A panic ends such a process as `abort` in a
//! panic hook does, so the handlers here abort in a hook, and no second build is necessary.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use axum::http::StatusCode;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

use crate::cluster::{LEASE, Mode, Process, effects, http_client, send};
use crate::scenarios::ledger;
use crate::support::postgres::PostgresServer;
use crate::support::redis::RedisServer;
use crate::support::{AnyBody, Handler, Play, Timer, frames, request};

const SIGABRT: i32 = 6;

/// The handler of the first process takes effect and panics. Its caller and a duplicate lose their
/// connections, and no process runs the key again.
async fn loses_the_attempt(store: &str) {
    let ledger = ledger();
    let mut first = Process::start(store, Mode::Refuse, &ledger);
    let client = http_client();
    let panics = [("x-panic", "yes".to_owned()), ("x-before", "200".to_owned())];
    let (owner, duplicate) = futures::join!(
        send(&client, first.address, "k", &panics),
        send(&client, first.address, "k", &panics),
    );
    assert!(owner.is_none() && duplicate.is_none(), "{owner:?} {duplicate:?}");
    assert_eq!(first.ended().signal(), Some(SIGABRT));

    let second = Process::start(store, Mode::Refuse, &ledger);
    let timer = Timer::start();
    let (lost, other) = futures::join!(
        send(&client, second.address, "k", &[]),
        send(&client, second.address, "other", &[]),
    );
    assert!(
        timer.elapsed() < LEASE + Duration::from_secs(3),
        "{:?}",
        timer.elapsed()
    );
    let lost = lost.unwrap();
    assert_eq!(
        (lost.status, lost.code().as_deref()),
        (StatusCode::CONFLICT, Some("outcome-unknown"))
    );
    assert_eq!(other.unwrap().status, StatusCode::CREATED);
    assert_eq!(effects(&ledger)["k"], 1);
    drop(std::fs::remove_file(ledger));
}

/// Each retry runs the handler again, and ends one more process.
async fn runs_again(store: &str) {
    let ledger = ledger();
    let client = http_client();
    for attempt in 1..=2 {
        let mut process = Process::start(store, Mode::Execute, &ledger);
        let panics = [("x-panic", "yes".to_owned())];
        assert!(send(&client, process.address, "k", &panics).await.is_none());
        assert_eq!(process.ended().signal(), Some(SIGABRT));
        assert_eq!(effects(&ledger)["k"], attempt);
    }
    let last = Process::start(store, Mode::Execute, &ledger);
    let got = send(&client, last.address, "k", &[]).await.unwrap();
    assert_eq!((got.status, got.attempt()), (StatusCode::CREATED, 3));
    assert_eq!(effects(&ledger)["k"], 3);
    drop(std::fs::remove_file(ledger));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_that_aborts_loses_its_attempt_over_redis() {
    loses_the_attempt(&RedisServer::start().url()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_that_aborts_loses_its_attempt_over_postgres() {
    loses_the_attempt(&PostgresServer::start().url()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_that_aborts_is_run_again_where_lost_keys_are_executed() {
    runs_again(&RedisServer::start().url()).await;
    runs_again(&PostgresServer::start().url()).await;
}

/// The body of a test that only a process of the next test runs.
pub(crate) fn time_out_if_started_without_timers() {
    if std::env::var_os("WITHOUT_TIMERS").is_none() {
        return;
    }
    std::panic::set_hook(Box::new(|_| std::process::abort()));
    let service = IdempotencyLayer::new(MemoryStore::new())
        .with_body_timeout(Duration::from_millis(10))
        .layer(service_fn(|request| Handler::new().oneshot(request)));
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    if std::env::var("WITHOUT_TIMERS").unwrap() == "no" {
        runtime.enable_time();
    }
    let stalls = service.oneshot(request("k", frames(vec![Play::Stall])));
    let response: http::Response<AnyBody> = runtime.build().unwrap().block_on(stalls).unwrap();
    assert_eq!(response.status(), 408);
}

/// A runtime without timers panics when the layer makes a timer. The layer catches that panic, but
/// with `panic = "abort"` it ends the process.
#[test]
fn a_runtime_without_timers_ends_a_process_that_aborts_at_panics() {
    for (without, signal) in [("yes", Some(SIGABRT)), ("no", None)] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "time_out_if_started_without_timers"])
            .env("WITHOUT_TIMERS", without)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert_eq!((status.signal(), status.success()), (signal, signal.is_none()));
    }
}
