//! Duplicates of a request in flight: one execution, equal responses, bounded waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{Layer, Service, ServiceExt};
use tower_idempotency::protocol::Resolution;
use tower_idempotency::{DoNotStore, Idempotency, IdempotencyLayer, MemoryStore, OnLost, Store};

use crate::support;
use crate::support::{AnyBody, Fault, Got, Handler, RemoteStore, Timer, full, post, send, text};

type Guarded<St> = Idempotency<Handler, St>;

/// Less time than any wait of the layer takes.
const AT_ONCE: Duration = Duration::from_millis(1);

fn start<St: Store>(service: &Guarded<St>, key: &'static str, body: &'static str) -> tokio::task::JoinHandle<Got> {
    let service = service.clone();
    tokio::spawn(async move { send(&service, post(key, body)).await })
}

async fn storm<St: Store>(service: &Guarded<St>, requests: usize) -> Vec<Got> {
    let requests: Vec<_> = (0..requests).map(|_| start(service, "k", "pay")).collect();
    futures::future::join_all(requests)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

fn assert_one_response(responses: &[Got]) {
    assert!(
        responses
            .iter()
            .all(|response| response.body == responses[0].body && response.status() == 201)
    );
    assert_eq!(responses.iter().filter(|response| !response.is_replay()).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_concurrent_duplicates_run_once_and_get_equal_responses() {
    let handler = Handler::new().taking(Duration::from_millis(300));
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    let responses = storm(&service, 10_000).await;
    assert_one_response(&responses);
    assert_eq!((responses.len(), handler.runs()), (10_000, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_of_a_thousand_groups_of_duplicates_runs_a_fast_handler_once() {
    for _ in 0..1_000 {
        let handler = Handler::new();
        let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
        assert_one_response(&storm(&service, 8).await);
        assert_eq!(handler.runs(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn duplicates_of_one_process_send_one_claim_to_a_shared_store() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(2));
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    assert_one_response(&storm(&service, 500).await);
    assert_eq!((store.calls("claim"), store.calls("peek"), handler.runs()), (1, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn duplicates_of_two_processes_run_once_and_each_process_has_one_watcher() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(2));
    let here = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let there = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let (mut responses, more) = tokio::join!(storm(&here, 100), storm(&there, 100));
    responses.extend(more);
    assert_one_response(&responses);
    assert_eq!((store.calls("claim"), handler.runs()), (2, 1));
    assert!(
        store.calls("peek") <= 6,
        "{} looks at the store for 100 waiters",
        store.calls("peek")
    );
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_gives_up_after_its_wait_does_not_affect_its_owner() {
    let handler = Handler::new().taking(Duration::from_secs(10));
    let layer = IdempotencyLayer::new(MemoryStore::new()).with_wait(Duration::from_secs(3));
    let service = layer.layer(handler.clone());
    let owner = start(&service, "k", "pay");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begin = Timer::start();
    let refused = send(&service, post("k", "pay")).await;
    assert_eq!((refused.status(), refused.code()), (409, "request-outstanding"));
    assert_eq!(refused.head.headers["retry-after"], "1");
    assert_eq!(begin.elapsed().as_secs(), 3);
    assert_eq!(owner.await.unwrap().status(), 201);
    assert!(send(&service, post("k", "pay")).await.is_replay());
    assert_eq!(handler.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_wait_of_zero_refuses_duplicates_at_once_in_every_process() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(10));
    let layer = IdempotencyLayer::new(store.clone()).with_wait(Duration::ZERO);
    let here = layer.layer(handler.clone());
    let there = IdempotencyLayer::new(store.clone())
        .with_wait(Duration::ZERO)
        .layer(handler);
    let owner = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begin = Timer::start();
    for service in [&here, &there] {
        assert_eq!(send(service, post("k", "pay")).await.code(), "request-outstanding");
    }
    assert_eq!(begin.elapsed().as_secs(), 0);
    assert_eq!(owner.await.unwrap().status(), 201);
}

/// A duplicate looks at the record only if its wait is longer than 500 ms.
#[tokio::test(start_paused = true)]
async fn a_short_wait_ends_without_a_look_at_a_store_that_hangs() {
    for millis in [0, 500] {
        let store = RemoteStore::new();
        store.fail("claim", [Fault::Hang]);
        let wait = Duration::from_millis(millis);
        let layer = IdempotencyLayer::new(store.clone()).with_wait(wait);
        let service = layer.layer(Handler::new());
        let leader = start(&service, "k", "pay");
        tokio::time::sleep(Duration::from_millis(1)).await;
        let begin = Timer::start();
        assert_eq!(send(&service, post("k", "pay")).await.code(), "request-outstanding");
        assert!(
            begin.elapsed() <= wait + Duration::from_millis(2),
            "{:?}",
            begin.elapsed()
        );
        assert_eq!(store.calls("peek"), 0);
        leader.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_mismatch_is_refused_without_a_wait_and_judged_by_the_decided_claim() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(10));
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let owner = start(&service, "k", "pay");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begin = Timer::start();
    assert_eq!(send(&service, post("k", "pay more")).await.status(), 422);
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    assert_eq!(owner.await.unwrap().status(), 201);

    // The request with the wrong body comes first, and the store is slow. It must not make the
    // right request a mismatch.
    store.set_yields(50);
    let wrong = start(&service, "k", "pay more");
    tokio::task::yield_now().await;
    let right = start(&service, "k", "pay");
    assert_eq!(wrong.await.unwrap().status(), 422);
    assert!(right.await.unwrap().is_replay());
    assert_eq!(handler.runs(), 1);
}

/// A request of this process waits for the owner. It looks at the record for the request with the
/// other body, and that look alone decides.
#[tokio::test(start_paused = true)]
async fn a_mismatch_is_refused_without_a_wait_while_the_owner_is_in_another_process() {
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(10));
    let [here, there] = [(); 2].map(|()| IdempotencyLayer::new(store.clone()).layer(handler.clone()));
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let waiter = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (begin, peeks) = (Timer::start(), store.calls("peek"));
    assert_eq!(send(&here, post("k", "pay more")).await.code(), "key-reused");
    assert!(begin.elapsed() < AT_ONCE, "{:?}", begin.elapsed());
    assert_eq!(store.calls("peek"), peeks + 1);
    assert_one_response(&[owner.await.unwrap(), waiter.await.unwrap()]);
}

/// The key of a request that lost its lease may belong to another request by now.
#[tokio::test(start_paused = true)]
async fn a_request_that_lost_its_key_makes_no_other_request_a_mismatch() {
    let store = RemoteStore::new();
    let layer = || IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(3));
    let here = layer().layer(Handler::new().taking(Duration::from_secs(20)));
    let lost = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.fail("renew", [Fault::Before; 1_000]);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (key, _) = store.only();
    let fence = store.peek(&key).await.unwrap().unwrap().fence;
    store.resolve(&key, fence, &Resolution::Absent).await.unwrap();
    let there = layer().layer(Handler::new());
    assert_eq!(send(&there, post("k", "pay more")).await.status(), 201);
    store.heal();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(send(&here, post("k", "pay more")).await.is_replay());
    assert_eq!(lost.await.unwrap().code(), "outcome-unknown");
}

/// The owner frees the key between the claim of the request and its look at the record. In the
/// second case, another owner does so once more.
#[tokio::test(start_paused = true)]
async fn a_request_that_may_not_wait_claims_a_key_that_became_free_once() {
    for (is_busy_again, status) in [(false, 201), (true, 409)] {
        let store = RemoteStore::new();
        // Each operation takes effect after 1 ms, and returns after 2 ms.
        store.set_timers(true);
        let layer = || IdempotencyLayer::new(store.clone()).with_wait(Duration::ZERO);
        let failing = |milliseconds| {
            let handler = Handler::new().taking(Duration::from_millis(milliseconds));
            layer().layer(handler.responding(|_| text(StatusCode::BAD_GATEWAY, "failed")))
        };
        let handler = Handler::new();
        let owner = start(&failing(10), "k", "pay");
        tokio::time::sleep(Duration::from_millis(11)).await;
        let request = start(&layer().layer(handler.clone()), "k", "pay");
        tokio::time::sleep(Duration::from_millis(3)).await;
        if is_busy_again {
            assert_eq!(send(&failing(0), post("k", "pay")).await.status(), 502);
        }
        assert_eq!(request.await.unwrap().status(), status);
        assert_eq!(handler.runs(), usize::from(!is_busy_again));
        assert_eq!(owner.await.unwrap().status(), 502);
    }
}

/// The memory of a waiting duplicate would otherwise be held until its owner has ended.
#[tokio::test(start_paused = true)]
async fn a_duplicate_drops_its_request_once_its_key_has_an_owner() {
    let store = RemoteStore::new();
    store.fail("claim", [Fault::SlowReply(1)]);
    let handler = Handler::new().taking(Duration::from_secs(10));
    let service = IdempotencyLayer::new(store).layer(handler);
    let owner = start(&service, "k", "pay");
    tokio::task::yield_now().await;
    let held = Arc::new(());
    let mut duplicate = post("k", "pay");
    duplicate.extensions_mut().insert(Arc::clone(&held));
    let duplicate = support::start(&service, duplicate);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(Arc::strong_count(&held), 2, "the duplicate may have to run");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(Arc::strong_count(&held), 1);
    assert_one_response(&[owner.await.unwrap(), duplicate.await.unwrap()]);
}

/// Each of a hundred duplicates would otherwise look at the record when its wait is over.
#[tokio::test(start_paused = true)]
async fn duplicates_whose_wait_is_over_do_not_look_at_a_record_that_their_leader_watches() {
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(store.clone());
    let owner = start(&layer.layer(Handler::new().taking(Duration::from_secs(10))), "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let layer = IdempotencyLayer::new(store.clone());
    let [leader, followers] = [60, 3].map(|wait| {
        let layer = layer.clone().with_wait(Duration::from_secs(wait));
        layer.layer(Handler::new())
    });
    let leader = start(&leader, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let responses = storm(&followers, 100).await;
    assert!(
        responses
            .iter()
            .all(|response| response.code() == "request-outstanding")
    );
    assert!(store.calls("peek") < 20, "{} looks in 3 s", store.calls("peek"));
    assert_one_response(&[owner.await.unwrap(), leader.await.unwrap()]);
}

#[tokio::test(start_paused = true)]
async fn waiters_get_a_response_that_is_not_stored_without_a_marker_and_the_next_request_runs() {
    let veto = |n: usize| -> Response<AnyBody> {
        let mut response = text(StatusCode::OK, format!("try later {n}"));
        response.extensions_mut().insert(DoNotStore);
        response
    };
    let failing = |n: usize| text(StatusCode::BAD_GATEWAY, format!("failed {n}"));
    for (respond, status) in [
        (Arc::new(veto) as Arc<dyn Fn(usize) -> _ + Send + Sync>, 200),
        (Arc::new(failing), 502),
    ] {
        let handler = Handler::new()
            .taking(Duration::from_secs(1))
            .responding(move |n| respond(n));
        let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
        let responses = storm(&service, 50).await;
        assert!(
            responses
                .iter()
                .all(|response| response.status() == status && !response.is_replay())
        );
        assert!(responses.iter().all(|response| response.body == responses[0].body));
        assert_eq!(handler.runs(), 1);
        assert_ne!(send(&service, post("k", "pay")).await.body, responses[0].body);
        assert_eq!(handler.runs(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn waiters_of_another_process_run_once_when_the_owner_frees_the_key() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(1))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let handler = Handler::new().taking(Duration::from_secs(1));
    let here = IdempotencyLayer::new(store.clone()).layer(failing.clone());
    let there = IdempotencyLayer::new(store).layer(handler.clone());
    let owner = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_one_response(&storm(&there, 20).await);
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!((failing.runs(), handler.runs()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_of_another_process_takes_over_from_a_lost_owner_where_lost_keys_run_again() {
    let store = RemoteStore::new();
    let handler = Handler::new();
    let layer = || IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
    let owner = start(
        &layer().layer(Handler::new().taking(Duration::from_secs(3_600))),
        "k",
        "pay",
    );
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.fail("renew", [Fault::Before; 1_000]);
    let timer = Timer::start();
    let layer = layer().with_wait(Duration::from_secs(60));
    let waiter = send(&layer.layer(handler.clone()), post("k", "pay")).await;
    assert_eq!((waiter.status(), waiter.is_replay(), handler.runs()), (201, false, 1));
    assert!(timer.elapsed() < Duration::from_secs(31), "{:?}", timer.elapsed());
    owner.abort();
}

#[tokio::test(start_paused = true)]
async fn a_follower_takes_the_place_of_a_waiter_that_left_and_runs_when_the_key_is_free() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(3))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let handler = Handler::new();
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let here = IdempotencyLayer::new(store).layer(handler.clone());
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let waiter = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let follower = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    waiter.abort();
    assert_eq!((follower.await.unwrap().status(), handler.runs()), (201, 1));
    assert_eq!(owner.await.unwrap().status(), 502);
}

/// A duplicate that followed another waiter dropped its request, so it could not run later. It got
/// 409 although the key was free.
#[tokio::test(start_paused = true)]
async fn the_last_of_many_waiters_runs_when_the_others_left_and_the_key_is_free() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(3))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let handler = Handler::new();
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let here = IdempotencyLayer::new(store).layer(handler.clone());
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut waiters = Vec::new();
    for _ in 0..4 {
        waiters.push(start(&here, "k", "pay"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let last = waiters.pop().unwrap();
    for waiter in waiters {
        waiter.abort();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!((last.await.unwrap().status(), handler.runs()), (201, 1));
    assert_eq!(owner.await.unwrap().status(), 502);
}

/// A waiter kept the capacity that its service had reserved, or called a service that was not
/// ready.
#[tokio::test(start_paused = true)]
async fn a_waiter_of_another_process_reserves_nothing_and_is_ready_before_it_claims_again() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(3))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let handler = Handler::new().taking(Duration::from_secs(1));
    // The service of the waiter panics if it is called before it is ready.
    let here = IdempotencyLayer::new(store).layer(GlobalConcurrencyLimitLayer::new(1).layer(handler.clone()));
    let owner = support::start(&there, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let waiter = support::start(&here, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(send(&here, post("other", "pay")).await.status(), 201);
    assert!(!owner.is_finished(), "the other request did not wait for the waiter");
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!((waiter.await.unwrap().status(), handler.runs()), (201, 2));
}

/// A request waited for the decision about an earlier claim. Meanwhile it held the permit that the
/// owner of that claim needed to become ready, so both were stuck until the wait of one of them was
/// over.
#[tokio::test(start_paused = true)]
async fn a_request_with_another_body_reserves_nothing_while_the_claim_of_a_waiter_is_undecided() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(1))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let handler = Handler::new();
    let here = IdempotencyLayer::new(store).layer(GlobalConcurrencyLimitLayer::new(1).layer(handler.clone()));
    let owner = support::start(&there, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let waiter = support::start(&here, post("k", "pay"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let timer = Timer::start();
    // The owner frees the key before this body is complete. By then the waiter waits for its
    // service to become ready.
    let slow = support::stalling("pay more", tokio::time::sleep(Duration::from_secs(3)));
    let other = support::start(&here, support::request("k", slow));
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!((waiter.await.unwrap().status(), handler.runs()), (201, 1));
    assert_eq!(other.await.unwrap().code(), "key-reused");
    assert!(timer.elapsed() < Duration::from_secs(4), "{:?}", timer.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_whose_service_fails_before_it_claims_again_gets_the_error_of_its_service() {
    #[derive(Clone)]
    struct FailsLater(Arc<AtomicUsize>);

    impl Service<Request<AnyBody>> for FailsLater {
        type Response = Response<AnyBody>;
        type Error = &'static str;
        type Future = std::future::Ready<Result<Response<AnyBody>, &'static str>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
            let is_first = self.0.fetch_add(1, Ordering::SeqCst) == 0;
            Poll::Ready(if is_first { Ok(()) } else { Err("closed") })
        }

        fn call(&mut self, _: Request<AnyBody>) -> Self::Future {
            std::future::ready(Ok(text(StatusCode::CREATED, "called")))
        }
    }

    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(1))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let here = IdempotencyLayer::new(store.clone()).layer(FailsLater(Arc::default()));
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let waiter = here.oneshot(post("k", "pay")).await;
    assert_eq!(waiter.unwrap_err(), "closed");
    assert_eq!((owner.await.unwrap().status(), store.len()), (502, 0));
}

/// Another process released the key, and another request took it. A waiter that had not looked at
/// the store since then decided by what it had seen before.
#[tokio::test(start_paused = true)]
async fn a_waiter_of_another_process_does_not_decide_by_an_outdated_look() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_millis(1_900))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let elsewhere = IdempotencyLayer::new(store.clone()).layer(Handler::new());
    let here = IdempotencyLayer::new(store).layer(Handler::new());
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    let waiter = start(&here, "k", "pay");
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!(send(&elsewhere, post("k", "pay more")).await.status(), 201);
    let timer = Timer::start();
    let other = send(&here, post("k", "pay more")).await;
    assert_eq!((other.status(), other.is_replay(), other.code()), (201, true, ""));
    assert!(timer.elapsed() < Duration::from_millis(50), "{:?}", timer.elapsed());
    assert_eq!(waiter.await.unwrap().code(), "key-reused");
}

#[tokio::test(start_paused = true)]
async fn waiters_for_owners_in_other_processes_are_bounded_in_total() {
    let store = RemoteStore::new();
    let slow = Handler::new().taking(Duration::from_secs(20));
    let there = IdempotencyLayer::new(store.clone()).layer(slow.clone());
    let layer = IdempotencyLayer::new(store.clone())
        .with_max_waiters_per_key(1)
        .with_max_waiters(3);
    let here = layer.layer(slow.clone());
    let owners: Vec<_> = (0..100)
        .map(|n| support::start(&there, post(&n.to_string(), "")))
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let duplicates: Vec<_> = (0..100)
        .map(|n| support::start(&here, post(&n.to_string(), "")))
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        duplicates.iter().filter(|duplicate| !duplicate.is_finished()).count(),
        3
    );
    let mut codes: Vec<_> = Vec::new();
    for duplicate in duplicates {
        codes.push(duplicate.await.unwrap().code());
    }
    assert_eq!(codes.iter().filter(|code| **code == "too-many-waiters").count(), 97);
    drop(owners);
    // A request that does not wait takes no place, and the earlier waiters have left theirs.
    let at_once = layer
        .clone()
        .with_wait(Duration::ZERO)
        .with_max_waiters_per_key(0)
        .with_max_waiters(0)
        .layer(slow.clone());
    let _owner = support::start(&there, post("k", ""));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(send(&at_once, post("k", "")).await.code(), "request-outstanding");
    assert_eq!(send(&here, post("k", "")).await.status(), 201);
}

/// The look that finds the outcome also shows to which body the key belongs.
#[tokio::test(start_paused = true)]
async fn a_mismatch_that_a_waiter_has_found_out_costs_no_other_look() {
    let store = RemoteStore::new();
    let layer = || IdempotencyLayer::new(store.clone()).layer(Handler::new().taking(Duration::from_millis(1_200)));
    let owner = start(&layer(), "k", "pay");
    tokio::time::sleep(Duration::from_millis(10)).await;
    let here = layer();
    let waiter = start(&here, "k", "pay");
    // The owner has ended, and the waiter has not looked since.
    tokio::time::sleep(Duration::from_millis(1_300)).await;
    let looks = store.calls("peek");
    let other = send(&here, post("k", "pay more")).await;
    assert_eq!((other.code(), store.calls("peek")), ("key-reused", looks + 1));
    assert!(waiter.await.unwrap().is_replay() && !owner.await.unwrap().is_replay());
}

/// Nothing ran under the claim, whose lease was over before the waiter saw it.
#[tokio::test(start_paused = true)]
async fn a_waiter_uses_its_own_claim_that_the_store_granted_late_although_its_lease_is_over() {
    let store = RemoteStore::new();
    let layer = || IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(2));
    let failing = Handler::new()
        .taking(Duration::from_secs(5))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let owner = start(&layer().layer(failing), "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.delay_claim(Duration::from_secs(6));
    let handler = Handler::new();
    let waiter = start(&layer().layer(handler.clone()), "k", "pay");
    // A look takes so long that it sees only the end of the late claim's lease.
    tokio::time::sleep(Duration::from_millis(4_500)).await;
    store.fail("peek", [Fault::Slow(4)]);
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!((waiter.await.unwrap().status(), handler.runs()), (201, 1));
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_another_process_ends_at_its_deadline() {
    // The deadline falls between two looks at the record.
    const WAIT: Duration = Duration::from_millis(1_700);
    for faults in [[None; 2], [None, Some(Fault::Before)]] {
        let store = RemoteStore::new();
        let layer = || IdempotencyLayer::new(store.clone());
        let owner = start(
            &layer().layer(Handler::new().taking(Duration::from_secs(60))),
            "k",
            "pay",
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
        store.fail("peek", faults.into_iter().flatten());
        let timer = Timer::start();
        let service = layer().with_wait(WAIT).layer(Handler::new());
        assert_eq!(send(&service, post("k", "pay")).await.code(), "request-outstanding");
        assert_eq!(timer.elapsed(), WAIT);
        owner.abort();
    }
}

/// A waiter for an owner used the deadline of its first wait, for the claim of another request,
/// also for its second wait, for the owner. That deadline was the timeout of the store.
#[tokio::test(start_paused = true)]
async fn a_duplicate_waits_no_longer_than_its_setting_allows() {
    let store = RemoteStore::new();
    store.set_timers(true);
    store.fail("claim", [Fault::Before, Fault::Before]);
    let layer = IdempotencyLayer::new(store)
        .with_wait(Duration::from_secs(1))
        .with_store_timeout(Duration::from_secs(20));
    let service = layer.layer(Handler::new().taking(Duration::from_secs(60)));
    let refused = start(&service, "k", "another body");
    tokio::task::yield_now().await;
    // One of these two requests runs, and the other one waits for it.
    let timer = Timer::start();
    let (one, two) = (start(&service, "k", "body"), start(&service, "k", "body"));
    let waited = futures::future::select(one, two).await.factor_first().0.unwrap();
    assert_eq!(
        (refused.await.unwrap().status(), waited.code()),
        (503, "request-outstanding")
    );
    assert!(
        timer.elapsed() < Duration::from_secs(2),
        "{:?} instead of 1 s",
        timer.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_does_not_prolong_a_wait() {
    for operation in ["peek", "claim"] {
        let store = RemoteStore::new();
        let owner = start(
            &IdempotencyLayer::new(store.clone()).layer(Handler::new().taking(Duration::from_secs(60))),
            "k",
            "pay",
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
        let here = IdempotencyLayer::new(store.clone())
            .with_wait(Duration::from_secs(1))
            .with_store_timeout(Duration::from_secs(20))
            .layer(Handler::new());
        store.fail(operation, [Fault::Hang; 100]);
        // The second of two bodies under one key waits for the decision about the first.
        let hanging = start(&here, "k", "pay");
        tokio::task::yield_now().await;
        let timer = Timer::start();
        let waited = send(&here, post("k", "pay more")).await;
        assert_eq!(waited.code(), "request-outstanding", "{operation}");
        assert!(
            timer.elapsed() < Duration::from_secs(2),
            "{operation}: {:?}",
            timer.elapsed()
        );
        if operation == "peek" {
            assert_eq!(hanging.await.unwrap().code(), "request-outstanding");
            assert!(timer.elapsed() < Duration::from_secs(2), "{:?}", timer.elapsed());
        }
        owner.abort();
    }
}

/// A claim after a wait could take two more timeouts of the store.
#[tokio::test(start_paused = true)]
async fn a_claim_that_follows_a_wait_ends_with_the_wait_and_nothing_runs() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(1))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let handler = Handler::new();
    let here = IdempotencyLayer::new(store.clone())
        .with_wait(Duration::from_secs(2))
        .with_store_timeout(Duration::from_secs(20))
        .dangerously_run_unprotected_when_the_store_fails()
        .layer(handler.clone());
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let timer = Timer::start();
    let waiter = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.fail("claim", [Fault::Hang; 10]);
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!(waiter.await.unwrap().code(), "request-outstanding");
    assert!(timer.elapsed() < Duration::from_secs(3), "{:?}", timer.elapsed());
    assert_eq!(handler.runs(), 0);
    store.heal();
    assert_eq!(send(&here, post("k", "pay")).await.status(), 201);
}

/// The store received the claim of a waiter only after the owner had released the key, and its
/// reply was lost. The waiter then waited for itself.
#[tokio::test(start_paused = true)]
async fn a_waiter_uses_its_own_claim_that_the_store_granted_late() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_millis(3_200))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let handler = Handler::new();
    let here = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The owner releases the key at 3.2 s, the store gets the claim at 3.3 s, and the waiter looks
    // at 3.6 s.
    store.delay_claim(Duration::from_millis(3_200));
    let timer = Timer::start();
    let waiter = send(&here, post("k", "pay")).await;
    assert_eq!((waiter.status(), waiter.is_replay(), handler.runs()), (201, false, 1));
    assert!(timer.elapsed() < Duration::from_secs(4), "{:?}", timer.elapsed());
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!(store.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_look_that_fails_or_hangs_once_does_not_end_a_wait() {
    let handler = Handler::new().taking(Duration::from_secs(3));
    let process = |store: &RemoteStore| IdempotencyLayer::new(store.clone()).layer(handler.clone());
    for (fault, runs) in [(Fault::Before, 1), (Fault::Hang, 2)] {
        let store = RemoteStore::new();
        let owner = start(&process(&store), "k", "pay");
        tokio::time::sleep(Duration::from_millis(100)).await;
        store.fail("peek", [fault]);
        let waiters = storm(&process(&store), 20).await;
        assert!(
            waiters
                .iter()
                .all(|waiter| waiter.status() == 201 && waiter.is_replay()),
            "{fault:?}"
        );
        assert_eq!((owner.await.unwrap().status(), handler.runs()), (201, runs));
    }
    let store = RemoteStore::new();
    let (there, here) = (process(&store), process(&store));
    let owner = start(&there, "other", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.fail("peek", [Fault::Before; 2]);
    assert_eq!(send(&here, post("other", "pay")).await.code(), "store-unavailable");
    assert_eq!(owner.await.unwrap().status(), 201);
}

/// The last look of the waiter failed. Its followers, who had time left, got its refusal.
#[tokio::test(start_paused = true)]
async fn a_waiter_whose_last_look_fails_does_not_refuse_its_followers() {
    let store = RemoteStore::new();
    let there = IdempotencyLayer::new(store.clone()).layer(Handler::new().taking(Duration::from_secs(6)));
    let here = IdempotencyLayer::new(store.clone())
        .with_wait(Duration::from_secs(4))
        .layer(Handler::new());
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let first = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(3_800)).await;
    let follower = start(&here, "k", "pay");
    store.fail("peek", [Fault::Before]);
    assert_eq!(first.await.unwrap().code(), "store-unavailable");
    assert!(follower.await.unwrap().is_replay());
    assert_eq!(owner.await.unwrap().status(), 201);
}

/// The store granted the claim of a waiter late, at a time when the layer sent no claims because
/// many were lost. The waiter looked at the store again and again and did not use its grant.
#[tokio::test(start_paused = true)]
async fn a_waiter_uses_its_late_grant_while_many_claims_are_lost() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_millis(3_200))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let there = IdempotencyLayer::new(store.clone()).layer(failing);
    let here = IdempotencyLayer::new(store.clone()).layer(Handler::new());
    let owner = start(&there, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.delay_claim(Duration::from_millis(3_200));
    let waiter = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(100)).await;
    store.fail("claim", vec![Fault::Before; 100_000]);
    let others = (0..1_024).map(|n| support::start(&here, post(&n.to_string(), "pay")));
    futures::future::join_all(others.collect::<Vec<_>>()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(send(&here, post("new", "pay")).await.code(), "store-unavailable");
    assert_eq!(owner.await.unwrap().status(), 502);
    store.heal();
    assert_eq!(waiter.await.unwrap().status(), 201);
}

/// Without a wait, the layer took each failed look for one that the deadline had cut short.
#[tokio::test(start_paused = true)]
async fn a_request_that_may_not_wait_gets_the_cause_of_the_store_failure() {
    for (fault, code) in [
        (Fault::Before, "store-unavailable"),
        (Fault::Misconfigured, "store-misconfigured"),
        (Fault::Corrupt, "record-unreadable"),
        (Fault::Hang, "request-outstanding"),
    ] {
        let store = RemoteStore::new();
        let layer = || IdempotencyLayer::new(store.clone()).with_wait(Duration::ZERO);
        let owner = start(
            &layer().layer(Handler::new().taking(Duration::from_secs(3))),
            "k",
            "pay",
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
        store.fail("peek", [fault; 2]);
        let refused = send(&layer().layer(Handler::new()), post("k", "pay")).await;
        assert_eq!(refused.code(), code, "{fault:?}");
        assert_eq!(owner.await.unwrap().status(), 201);
    }
}

#[tokio::test(start_paused = true)]
async fn waiters_are_bounded_per_key_and_in_total() {
    let handler = Handler::new().taking(Duration::from_secs(1));
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .with_max_waiters_per_key(2)
        .with_max_waiters(3);
    let service = layer.layer(handler.clone());
    let mut waiting = Vec::new();
    for key in ["one", "two"] {
        for _ in 0..4 {
            waiting.push(start(&service, key, "pay"));
            tokio::task::yield_now().await;
        }
    }
    let responses = futures::future::join_all(waiting).await;
    let codes: Vec<_> = responses
        .iter()
        .map(|response| response.as_ref().unwrap().code())
        .collect();
    let full = "too-many-waiters";
    assert_eq!(codes, ["", "", "", full, "", "", full, full]);
    assert_eq!(handler.runs(), 2);
    // The ended waiters no longer count against the limits.
    assert_one_response(&{
        let service = layer.layer(Handler::new().taking(Duration::from_secs(1)));
        let owner = start(&service, "three", "pay");
        tokio::task::yield_now().await;
        let waiter = start(&service, "three", "pay");
        vec![owner.await.unwrap(), waiter.await.unwrap()]
    });
}

#[tokio::test(start_paused = true)]
async fn waiters_share_the_leaders_refusal_when_the_store_fails() {
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Before, Fault::Before]);
    let handler = Handler::new();
    let service = IdempotencyLayer::new(store.clone()).layer(handler.clone());
    let responses = storm(&service, 20).await;
    assert!(responses.iter().all(|response| response.code() == "store-unavailable"));
    assert_eq!(handler.runs(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_always_busy_starves_no_request() {
    let handler = Handler::new()
        .taking(Duration::from_millis(100))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "no"));
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    let clients = (0..20).map(|_| {
        let service = service.clone();
        tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            for _ in 0..50 {
                let begin = Timer::start();
                send(&service, post("k", "pay")).await;
                longest = longest.max(begin.elapsed());
            }
            longest
        })
    });
    for longest in futures::future::join_all(clients).await {
        let longest = longest.unwrap();
        assert!(
            longest <= Duration::from_millis(200),
            "a request waited {longest:?} for 100 ms of work"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn keys_do_not_block_one_another() {
    let handler = Handler::new().taking(Duration::from_secs(5));
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler.clone());
    let begin = Timer::start();
    let requests = (0..200).map(|n| {
        let service = service.clone();
        async move { send(&service, support::request(&format!("key-{n}"), full("x"))).await }
    });
    futures::future::join_all(requests).await;
    assert_eq!((begin.elapsed().as_secs(), handler.runs()), (5, 200));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_frees_its_place() {
    let handler = Handler::new().taking(Duration::from_secs(10));
    let layer = IdempotencyLayer::new(MemoryStore::new())
        .with_max_waiters_per_key(1)
        .with_max_waiters(100);
    let service = layer.layer(handler);
    let owner = start(&service, "k", "pay");
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..3 {
        let waiter = start(&service, "k", "pay");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(send(&service, post("k", "pay")).await.code(), "too-many-waiters");
        waiter.abort();
        assert!(waiter.await.unwrap_err().is_cancelled());
    }
    assert_eq!(send(&service, post("k", "pay")).await.status(), 201);
    assert_eq!(owner.await.unwrap().status(), 201);
}

#[tokio::test(start_paused = true)]
async fn a_watcher_of_another_process_does_not_get_the_response_to_another_request() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(2))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let here = IdempotencyLayer::new(store.clone()).layer(failing);
    let quick = Handler::new().responding(|_| text(StatusCode::CREATED, "for the other body"));
    let there = IdempotencyLayer::new(store.clone()).layer(quick);
    let watching = IdempotencyLayer::new(store).layer(Handler::new());
    let owner = start(&here, "k", "pay");
    tokio::time::sleep(Duration::from_millis(1_900)).await;
    let watcher = start(&watching, "k", "pay");
    // The watcher has just looked and sleeps. Before it looks again, the owner releases the key,
    // and a request with another body takes it.
    assert_eq!(owner.await.unwrap().status(), 502);
    assert_eq!(send(&there, post("k", "pay more")).await.status(), 201);
    let watcher = watcher.await.unwrap();
    assert_eq!((watcher.status(), watcher.code()), (422, "key-reused"));
}

#[tokio::test(start_paused = true)]
async fn requests_that_wait_for_another_claim_are_bounded_in_number_and_time() {
    // The limits did not count these requests. Each became the leader after the one before, so 20
    // of them waited for 200 s.
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Hang; 10_000]);
    let s = IdempotencyLayer::new(store)
        .with_wait(Duration::ZERO)
        .with_max_waiters_per_key(1)
        .with_max_waiters(1)
        .layer(Handler::new());
    let timer = Timer::start();
    let all: Vec<_> = (0..20)
        .map(|n| support::start(&s, post("k", format!("body {n}"))))
        .collect();
    let mut codes = vec![];
    for one in all {
        codes.push(one.await.unwrap().code());
    }
    assert!(codes.contains(&"too-many-waiters"), "{codes:?}");
    assert!(timer.elapsed() < Duration::from_secs(15), "{:?}", timer.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_longest_retry_after_does_not_overflow() {
    // The layer rounded the longest duration up, and that overflowed.
    let handler = Handler::new().taking(Duration::from_secs(3600));
    let s = IdempotencyLayer::new(MemoryStore::new())
        .with_wait(Duration::ZERO)
        .with_retry_after(Duration::MAX)
        .layer(handler);
    let _a = support::start(&s, post("k", "x"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(send(&s, post("k", "x")).await.status(), 409);
}
