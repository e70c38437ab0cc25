//! Random histories of calls over HTTP, from a seed. A model reads the log of each history and
//! decides which requests the client had to send, when, with which key, and what the caller got.
//!
//! `HISTORIES=1000` sets the number of seeds, and `HISTORIES=17..18` their range.

mod model;
mod party;
mod plan;
mod stack;
mod tcp;

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use tower::ServiceExt;
use tower_idempotency::client::{ErrorClass, KeyOrigin, KeyPlacementError};

use crate::support::Timer;
use crate::support::settings::{self, is_thorough};
use party::{Entry, Got, Log, Trouble};
use plan::{Calls, Event, Foreign, Keys, Plan, Step, Transport};
use stack::Client;

pub(crate) fn seeds(few: u64, many: u64) -> Range<u64> {
    settings::seeds("HISTORIES").unwrap_or(0..if is_thorough() { many } else { few })
}

pub(crate) fn paused() -> tokio::runtime::Runtime {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().start_paused(true).build().unwrap()
}

fn request(plan: &Plan, at: usize, home: &str) -> Request<Full<Bytes>> {
    let call = &plan.calls[at];
    let name = format!("operation-{}", call.operation);
    let mut request = Request::builder().method(call.method()).uri(format!("{home}/{name}"));
    if plan.keys == Keys::Caller {
        request = request.header("idempotency-key", format!("\"{name}\""));
    }
    request
        .extension(KeyOrigin::new(name.as_str(), "charge"))
        .body(Full::from(plan::BODY))
        .unwrap()
}

/// Makes the calls of the plan one after the other.
async fn play<E>(plan: &Plan, log: &Log, home: &str, transport: Client<E>, classify: Option<fn(&E) -> ErrorClass>)
where
    E: std::fmt::Debug + Send + Sync + 'static,
{
    let client = stack::client(plan, log, transport, classify);
    for (at, call) in plan.calls.iter().enumerate() {
        if plan.transport == Transport::Scripted {
            tokio::time::sleep(call.pause).await;
        }
        log.push(Entry::Call(at));
        let got = match client.clone().oneshot(request(plan, at, home)).await {
            Ok(response) => {
                let got = Got::Response {
                    status: response.status().as_u16(),
                    is_replay: response.headers().contains_key("idempotent-replayed"),
                };
                drop(response.into_body().collect().await);
                got
            }
            Err(KeyPlacementError::Service(got)) => got,
            Err(error) => panic!("every key of this test is accepted: {error:?}"),
        };
        log.push(Entry::Got(got));
    }
}

fn check(plan: &Plan, log: &Log) {
    report(plan, log, model::check(plan, &log.entries()));
}

fn report(plan: &Plan, log: &Log, checked: Result<(), String>) {
    let Err(violation) = checked else { return };
    let entries = log.entries();
    let entries: Vec<String> = entries.iter().map(|entry| format!("  {entry:?}")).collect();
    panic!(
        "{violation}\n{plan}{}\nRepeat this history with HISTORIES={}..{}.",
        entries.join("\n"),
        plan.seed,
        plan.seed + 1
    );
}

/// Plays a history under paused time.
fn simulate(plan: &Plan) -> Log {
    paused().block_on(async {
        let log = Log::new(Timer::start());
        let transport = party::scripted(plan, &log);
        play(plan, &log, plan::HOME, transport, Some(Trouble::class)).await;
        log
    })
}

#[test]
fn every_history_of_calls_follows_the_model() {
    for seed in seeds(600, 30_000) {
        let plan = Plan::of(seed, Transport::Scripted);
        check(&plan, &simulate(&plan));
    }
}

/// The application drops calls by a timeout, and calls again through a retry layer. The model does not know
/// the time of each step here, so the test checks only the effects and what the callers may get.
#[test]
fn no_dropped_call_is_forgotten() {
    for seed in seeds(600, 30_000) {
        let plan = Plan::with_timeout(seed);
        let log = simulate(&plan);
        report(&plan, &log, model::effects(&plan, &log.entries()));
    }
}

/// The guide warns of a foreign retry layer around a client that reports nothing. It hides the lost
/// request from the layers.
#[test]
fn a_lost_request_before_a_hidden_repeat_is_not_seen() {
    let takes = Duration::ZERO;
    let steps = [Event::ResetAfter, Event::NotConnected].map(|event| Step { event, takes });
    let hidden = Foreign {
        repeats: 1,
        pause: takes,
    };
    for (redirects, expected) in [(false, Got::NotTaken), (true, Got::Unknown)] {
        let mut plan = Plan::of(0, Transport::Scripted);
        (plan.once, plan.around, plan.within) = (None, None, Some(hidden));
        (plan.redirects, plan.steps) = (redirects, steps.to_vec());
        plan.calls_layer = Some(Calls::once());
        plan.calls.truncate(1);
        let got = simulate(&plan).entries().pop();
        assert!(matches!(&got, Some(Entry::Got(got)) if *got == expected), "{got:?}");
    }
}

/// `ReqwestService` reports each request that it sends, so the layers also see the repeats of a
/// foreign retry layer without a redirect policy. The bytes go over the loopback interface, so time
/// is not paused, and no history waits.
#[test]
fn every_history_of_calls_over_reqwest_follows_the_model() {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().unwrap();
    runtime.block_on(async {
        let current = Arc::new(Mutex::new(None));
        let hosts = tcp::Hosts::start(&current).await;
        for seed in seeds(150, 5_000) {
            let plan = Plan::of(seed, Transport::Reqwest);
            let log = Log::new(Timer::start());
            *current.lock().unwrap() = Some(tcp::Script::new(&plan, &log, &hosts));
            play(&plan, &log, &hosts.home, hosts.transport(), None).await;
            check(&plan, &log);
        }
    });
}
