//! A store that replies after its timeout for an hour, by tokio's paused clock. `THOROUGH` runs the
//! whole hour; otherwise the outage lasts five minutes, which is longer than all of the layer's
//! retries.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use tokio::runtime::Handle;
use tower::util::BoxCloneSyncService;
use tower::{Layer, service_fn};
use tower_idempotency::{Drain, IdempotencyLayer, OnLost};

use crate::support::late::LateStore;
use crate::support::settings::is_thorough;
use crate::support::{AnyBody, Timer, post, send, start, text};

const SECOND: Duration = Duration::from_secs(1);
/// The default lease.
const LEASE: Duration = Duration::from_secs(30);
/// More requests per second than the layer can leave claims to release: each of them waits for two
/// minutes, and the limit is 1,024.
const REQUESTS_PER_SECOND: usize = 12;

fn outage() -> Duration {
    SECOND * if is_thorough() { 3_600 } else { 300 }
}

/// A service that counts its runs by key. A key that begins with `slow` takes ten seconds.
#[derive(Clone, Default)]
struct Bank(Arc<Mutex<HashMap<String, usize>>>);

type Guarded = BoxCloneSyncService<Request<AnyBody>, Response<AnyBody>, Infallible>;

impl Bank {
    fn behind(&self, layer: &IdempotencyLayer<LateStore>) -> Guarded {
        let bank = self.clone();
        let pay = service_fn(move |request: Request<AnyBody>| {
            let key = request.headers()["idempotency-key"].to_str().unwrap().to_owned();
            let bank = bank.clone();
            async move {
                if key.starts_with("slow") {
                    tokio::time::sleep(10 * SECOND).await;
                }
                *bank.0.lock().unwrap().entry(key.clone()).or_default() += 1;
                Ok::<_, Infallible>(text(StatusCode::CREATED, key))
            }
        });
        BoxCloneSyncService::new(layer.layer(pay))
    }

    fn runs(&self, key: &str) -> usize {
        self.0.lock().unwrap().get(key).copied().unwrap_or(0)
    }
}

/// The largest numbers that were seen during the outage.
#[derive(Debug, Default)]
struct Most {
    answered_after: Duration,
    detached: usize,
    tasks: usize,
    open: usize,
}

impl Most {
    fn see(&mut self, drain: &Drain, store: &LateStore) {
        self.detached = self.detached.max(drain.running());
        self.tasks = self.tasks.max(Handle::current().metrics().num_alive_tasks());
        self.open = self.open.max(store.open());
    }
}

/// Sends requests for the whole outage: first requests, duplicates, and callers that leave. Returns
/// the keys, and the largest numbers.
async fn suffer(service: &Guarded, drain: &Drain, store: &LateStore) -> (Vec<String>, Most) {
    let (timer, mut keys, mut most) = (Timer::start(), Vec::new(), Most::default());
    let responses = Arc::new(Mutex::new(Vec::new()));
    while timer.elapsed() < outage() {
        for _ in 0..REQUESTS_PER_SECOND {
            let key = format!("key-{}", keys.len());
            for leaves in [false, keys.len() % 3 == 0] {
                let (service, key, responses) = (service.clone(), key.clone(), Arc::clone(&responses));
                let caller = tokio::spawn(async move {
                    let timer = Timer::start();
                    let got = send(&service, post(&key, "pay")).await;
                    responses.lock().unwrap().push((got.status(), timer.elapsed()));
                });
                if leaves {
                    tokio::spawn(async move {
                        tokio::time::sleep(SECOND).await;
                        caller.abort();
                    });
                }
            }
            keys.push(key);
        }
        tokio::time::sleep(SECOND).await;
        most.see(drain, store);
    }
    tokio::time::sleep(LEASE + 10 * SECOND).await;
    let responses = responses.lock().unwrap();
    assert!(responses.iter().all(|(status, _)| *status == 503), "a request ran");
    most.answered_after = responses.iter().map(|(_, time)| *time).max().unwrap();
    drop(responses);
    (keys, most)
}

/// Lets the outage pass while executions end and requests come in. Checks that callers, tasks and
/// operations stay bounded, that nothing is left afterwards, and that nothing ran twice. Returns
/// how many of the keys that came during the outage ran when they were sent again.
async fn outlast(on_lost: OnLost) -> (usize, usize) {
    let (store, bank) = (LateStore::default(), Bank::default());
    let layer = IdempotencyLayer::new(store.clone()).on_lost(on_lost);
    let (drain, service) = (layer.drain(), bank.behind(&layer));
    let before: Vec<_> = (0..2_000).map(|key| format!("slow-{key}")).collect();
    let running: Vec<_> = before.iter().map(|key| start(&service, post(key, "pay"))).collect();
    tokio::time::sleep(SECOND).await;
    store.set_late(true);
    let (keys, most) = suffer(&service, &drain, &store).await;
    println!(
        "{on_lost:?}: {} keys, {} operations, {most:?}",
        keys.len(),
        store.received()
    );
    assert!(most.answered_after <= 10 * SECOND + SECOND / 2, "{most:?}");
    assert!(most.detached <= 2_048 + 500, "{most:?}");
    assert!(most.tasks <= 12_000 && most.open <= 8_000, "{most:?}");
    store.set_late(false);

    drain.wait().await;
    tokio::time::sleep(LEASE).await;
    let tasks = Handle::current().metrics().num_alive_tasks();
    assert_eq!((drain.running(), store.open(), tasks), (0, 0, 0));
    // Their handlers ended while the store was late. See `with_completion_timeout`.
    let while_late = if on_lost == OnLost::Refuse { 201 } else { 503 };
    for (key, running) in before.iter().zip(running) {
        assert_eq!(running.await.unwrap().status(), while_late);
        let again = send(&service, post(key, "pay")).await;
        assert_eq!((again.is_replay(), bank.runs(key)), (true, 1), "{again:?}");
    }
    let mut ran = 0;
    for key in &keys {
        let timer = Timer::start();
        let got = send(&service, post(key, "pay")).await;
        assert!(timer.elapsed() < SECOND, "{key} is stuck");
        match got.status() {
            201 => ran += 1,
            _ => assert_eq!(got.code(), "outcome-unknown"),
        }
        assert_eq!(bank.runs(key), usize::from(got.status() == 201));
    }
    (ran, keys.len())
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_late_for_an_hour_leaves_nothing_behind() {
    let (ran, keys) = outlast(OnLost::Execute).await;
    assert_eq!(ran, keys);
}

/// The store granted claims, their replies came too late, and so did all replies about their
/// release. Nobody knows that nothing ran, so these keys are lost.
#[tokio::test(start_paused = true)]
async fn claims_that_a_late_store_grants_are_lost_when_the_time_for_their_release_is_over() {
    let (ran, keys) = outlast(OnLost::Refuse).await;
    println!("{ran} of {keys} keys ran");
    // At most 1,024 claims wait for their release at a time, each for two minutes.
    let minutes = usize::try_from(outage().as_secs() / 60).unwrap();
    assert!(keys - ran <= 1_024 * (minutes / 2 + 2), "{ran} of {keys}");
}
