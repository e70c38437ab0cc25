//! Single flight: duplicates in one process, and in two processes that share a store.

use bytes::Bytes;
use futures::future::join_all;
use http::StatusCode;
use tower_idempotency::{IdempotencyLayer, MemoryStore};
use tower_layer::Layer;

use crate::check;
use crate::handler::{Guarded, Handler, send};

/// Sends requests with these bodies at the same time, one after the other to each of the services.
fn storm(services: &[Guarded<MemoryStore>], bodies: &[&'static str]) -> Vec<(StatusCode, Bytes)> {
    let services = services.iter().cycle().cloned();
    let tasks: Vec<_> = services
        .zip(bodies)
        .map(|(service, body)| tokio::spawn(send(service, body)))
        .collect();
    let responses = shuttle::future::block_on(join_all(tasks));
    responses.into_iter().map(Result::unwrap).collect()
}

/// Makes layers that share a store, as those of several processes do.
fn processes(count: usize, handler: &Handler) -> (MemoryStore, Vec<Guarded<MemoryStore>>) {
    let store = MemoryStore::new();
    let layer = |_| IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let services = (0..count).map(layer).collect();
    (store, services)
}

fn with_status(responses: &[(StatusCode, Bytes)], wanted: u16) -> Vec<&Bytes> {
    let wanted = responses.iter().filter(|(status, _)| *status == wanted);
    wanted.map(|(_, body)| body).collect()
}

fn assert_nothing_is_left(store: &MemoryStore) {
    let stats = store.stats();
    assert_eq!((stats.in_flight, stats.waiters), (0, 0), "nothing is left (I11)");
}

fn duplicates(process_count: usize) {
    let handler = Handler::default();
    let (store, services) = processes(process_count, &handler);
    let responses = storm(&services, &["pay", "pay", "pay"]);
    assert_eq!(with_status(&responses, 201), ["run 0", "run 0", "run 0"]);
    assert_eq!(handler.runs(), 1);
    assert_nothing_is_left(&store);
}

#[test]
fn duplicates_run_once_and_get_the_response() {
    check(|| duplicates(1));
}

#[test]
fn duplicates_in_two_processes_run_once_and_get_the_response() {
    check(|| duplicates(2));
}

fn duplicates_of_a_failure(process_count: usize) {
    let handler = Handler::failing(1);
    let (store, services) = processes(process_count, &handler);
    let mut responses = storm(&services, &["pay", "pay", "pay"]);
    assert!(
        !with_status(&responses, 502).is_empty(),
        "the failure reaches its caller"
    );
    responses.extend(storm(&services[..1], &["pay"]));
    let stored = with_status(&responses, 201);
    assert!(stored.iter().all(|body| *body == "run 1"), "{responses:?}");
    assert_eq!(with_status(&responses, 502).len() + stored.len(), 4);
    assert_eq!(handler.runs(), 2);
    assert_nothing_is_left(&store);
}

#[test]
fn duplicates_of_a_failure_get_it_or_the_response_of_one_more_run() {
    check(|| duplicates_of_a_failure(1));
}

#[test]
fn duplicates_of_a_failure_in_two_processes_get_it_or_the_response_of_one_more_run() {
    check(|| duplicates_of_a_failure(2));
}

/// Sends duplicates to a layer at which one duplicate may wait: first more than may wait, and then
/// as many.
fn one_waiter() {
    let (store, handler) = (MemoryStore::new(), Handler::failing(usize::MAX));
    let layer = IdempotencyLayer::new(store.clone())
        .with_max_waiters_per_key(1)
        .with_max_waiters(1);
    let services = [layer.layer(handler)];
    let responses = storm(&services, &["pay", "pay", "pay"]);
    let counts = [502, 409].map(|status| with_status(&responses, status).len());
    assert!(counts[0] >= 1 && counts[0] + counts[1] == 3, "{responses:?}");
    let responses = storm(&services, &["pay", "pay"]);
    assert_eq!(with_status(&responses, 502).len(), 2, "{responses:?}");
    assert_nothing_is_left(&store);
}

#[test]
fn a_waiter_that_leaves_makes_room_for_the_next() {
    check(one_waiter);
}

fn another_body(process_count: usize, failures: usize) {
    let handler = Handler::failing(failures);
    let (store, services) = processes(process_count, &handler);
    let responses = storm(&services, &["pay", "refund", "pay", "refund"]);
    let counts = [201, 422, 502].map(|status| with_status(&responses, status).len());
    assert_eq!(counts.iter().sum::<usize>(), 4, "{responses:?}");
    if failures == 0 {
        assert_eq!(counts, [2, 2, 0]);
        assert_eq!(handler.runs(), 1);
    }
    for body in [0, 1] {
        let of_body: Vec<_> = responses.iter().skip(body).step_by(2).cloned().collect();
        let mut stored = with_status(&of_body, 201);
        stored.dedup();
        assert!(stored.len() <= 1, "equal responses (I2): {responses:?}");
        let other: Vec<_> = responses.iter().skip(1 - body).step_by(2).cloned().collect();
        let crossed = stored.iter().any(|body| with_status(&other, 201).contains(body));
        assert!(!crossed, "no response of another request (I4): {responses:?}");
    }
    assert_nothing_is_left(&store);
}

#[test]
fn requests_with_another_body_are_refused() {
    check(|| another_body(1, 0));
}

#[test]
fn requests_with_another_body_in_two_processes_are_refused() {
    check(|| another_body(2, 0));
}

#[test]
fn requests_with_another_body_may_run_after_a_failure() {
    check(|| another_body(2, 1));
}

/// Sends requests to a process while the owner of their key runs in another one. The owner ends only
/// after the request with another body has its response.
fn early_refusal() {
    let handler = Handler::gated();
    let (store, services) = processes(2, &handler);
    let (owner, other) = (services[0].clone(), services[1].clone());
    shuttle::future::block_on(async {
        let owner = tokio::spawn(send(owner, "pay"));
        while handler.runs() == 0 {
            shuttle::future::yield_now().await;
        }
        let duplicate = tokio::spawn(send(other.clone(), "pay"));
        let refused = tokio::spawn(send(other, "refund"));
        assert_eq!(refused.await.unwrap().0, 422);
        handler.open();
        assert_eq!(owner.await.unwrap(), duplicate.await.unwrap());
    });
    assert_nothing_is_left(&store);
}

#[test]
fn a_request_with_another_body_is_refused_before_the_owner_in_another_process_ends() {
    check(early_refusal);
}
