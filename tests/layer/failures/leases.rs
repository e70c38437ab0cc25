//! Each owner renews its lease for as long as it lives, even if runtimes end, threads block or
//! renewals fail.

use std::convert::Infallible;
use std::future::{poll_fn, ready};
use std::sync::mpsc;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use http::{Request, StatusCode};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tower::{Layer, service_fn};
use tower_idempotency::protocol::{Resolution, Status};
use tower_idempotency::{Clock, IdempotencyLayer, Lease, OnError, OnLost, Recovered, Store};

use crate::support::{AnyBody, Fault, Got, Handler, RemoteStore, post, send, start, text};

const LEASE: Duration = Duration::from_secs(1);

fn layer(store: &RemoteStore) -> IdempotencyLayer<RemoteStore> {
    IdempotencyLayer::new(store.clone())
        .with_lease(LEASE)
        .on_lost(OnLost::Execute)
}

fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Sends a request with the same key in another process. The request would take over the key if the
/// lease had ended.
async fn elsewhere(store: &RemoteStore, handler: &Handler) -> Got {
    let there = layer(store).with_wait(Duration::ZERO).layer(handler.clone());
    send(&there, post("k", "pay")).await
}

/// The renewal task started through the pool for blocking work, which the application may have
/// filled.
#[test]
fn a_lease_is_renewed_while_the_blocking_pool_is_full() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (end, ended) = mpsc::channel::<()>();
    runtime.spawn_blocking(move || assert!(ended.recv().is_err()));
    runtime.block_on(async {
        let store = RemoteStore::new();
        let handler = Handler::new().taking(3 * LEASE);
        let first = start(&layer(&store).layer(handler.clone()), post("k", "pay"));
        tokio::time::sleep(2 * LEASE).await;
        assert_eq!(elsewhere(&store, &handler).await.code(), "request-outstanding");
        assert_eq!((first.await.unwrap().status(), handler.runs()), (201, 1));
    });
    drop(end);
}

/// One task renewed the leases of all runtimes. When its runtime was blocked or had ended, no task
/// renewed them.
#[test]
fn a_lease_is_renewed_on_its_own_runtime_even_after_the_first_runtime_has_stopped() {
    for is_dropped in [false, true] {
        let store = RemoteStore::new();
        let layer = layer(&store);
        let first = one_thread();
        first.block_on(send(&layer.layer(Handler::new()), post("first", "pay")));
        let first = (!is_dropped).then_some(first);
        one_thread().block_on(async {
            let handler = Handler::new().taking(3 * LEASE);
            let owner = start(&layer.layer(handler.clone()), post("k", "pay"));
            tokio::time::sleep(2 * LEASE).await;
            assert_eq!(elsewhere(&store, &handler).await.code(), "request-outstanding");
            assert_eq!((owner.await.unwrap().status(), handler.runs()), (201, 1));
        });
        drop(first);
    }
}

/// A handler blocks the runtime of the owner. The task of another runtime finds the renewal
/// overdue, even if that runtime has no owner any more.
#[test]
fn a_lease_whose_runtime_is_blocked_is_renewed_by_another_runtime() {
    for beside_takes in [4 * LEASE, Duration::ZERO] {
        let store = RemoteStore::new();
        let layer = layer(&store);
        let begun = watch::Sender::new(false);
        let blocked = begun.subscribe();
        let blocking = layer.layer(service_fn(move |_: Request<AnyBody>| {
            begun.send_replace(true);
            thread::sleep(4 * LEASE);
            ready(Ok::<_, Infallible>(text(StatusCode::CREATED, "blocked")))
        }));
        let beside = thread::spawn(move || {
            one_thread().block_on(async {
                let other = layer.layer(service_fn(move |_: Request<AnyBody>| {
                    let mut blocked = blocked.clone();
                    async move {
                        assert!(blocked.wait_for(|is_blocked| *is_blocked).await.is_ok());
                        tokio::time::sleep(beside_takes).await;
                        Ok::<_, Infallible>(text(StatusCode::CREATED, "beside"))
                    }
                }));
                let response = send(&other, post("beside", "pay")).await;
                tokio::time::sleep(4 * LEASE).await;
                response
            })
        });
        let owner = thread::spawn(move || one_thread().block_on(send(&blocking, post("k", "pay"))));
        thread::sleep(3 * LEASE);
        let handler = Handler::new();
        let duplicate = one_thread().block_on(elsewhere(&store, &handler));
        let ran = (duplicate.code(), handler.runs());
        assert_eq!(ran, ("request-outstanding", 0), "{beside_takes:?}");
        assert_eq!(owner.join().unwrap().body, "blocked");
        assert_eq!(beside.join().unwrap().status(), 201);
    }
}

/// A handler keeps its runtime so busy that the timers never fire. The renewal task sleeps, and the
/// runtime polls only the owner.
#[test]
fn an_owner_renews_its_lease_itself_when_the_renewal_is_overdue() {
    let store = RemoteStore::new();
    store.set_yields(0);
    let busy = layer(&store).layer(service_fn(|_: Request<AnyBody>| async {
        let mut polls = 0;
        poll_fn(|cx| {
            polls += 1;
            thread::sleep(LEASE / 10);
            cx.waker().wake_by_ref();
            if polls < 30 { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        Ok::<_, Infallible>(text(StatusCode::CREATED, "busy"))
    }));
    let owner =
        thread::spawn(move || one_thread().block_on(async move { start(&busy, post("k", "pay")).await.unwrap() }));
    thread::sleep(2 * LEASE);
    let handler = Handler::new();
    let duplicate = one_thread().block_on(elsewhere(&store, &handler));
    assert_eq!((duplicate.code(), handler.runs()), ("request-outstanding", 0));
    assert_eq!(owner.join().unwrap().body, "busy");
}

/// The owner noticed that its renewal was overdue. Its own renewal hung for so long that the next
/// one came after the end of the lease.
#[test]
fn a_lease_outlives_an_overdue_renewal_that_hangs() {
    const LEASE: Duration = Duration::from_secs(6);
    let store = RemoteStore::new();
    let layer = layer(&store).with_lease(LEASE);
    let blocking = layer.layer(service_fn(|_: Request<AnyBody>| async {
        thread::sleep(LEASE * 4 / 3);
        Ok::<_, Infallible>(text(StatusCode::CREATED, "blocked"))
    }));
    let other = layer.layer(Handler::new().taking(LEASE * 4 / 3));
    let beside = thread::spawn(move || one_thread().block_on(send(&other, post("beside", "pay"))));
    let owner = thread::spawn(move || one_thread().block_on(send(&blocking, post("k", "pay"))));
    // The first renewal of each lease hangs. The other runtime sends its own after a third of the
    // lease, and the blocked runtime after half of the lease.
    store.fail("renew", [Fault::Hang; 2]);
    let clock = Clock::system();
    let end = clock.now().saturating_add(LEASE * 5 / 4);
    thread::sleep(LEASE * 3 / 4);
    let (handler, runtime) = (Handler::new(), one_thread());
    // On a busy machine, a number of requests would go on after the end of the handler.
    while clock.now() < end {
        let duplicate = runtime.block_on(elsewhere(&store, &handler));
        assert_eq!((duplicate.code(), handler.runs()), ("request-outstanding", 0));
        thread::sleep(LEASE / 200);
    }
    assert_eq!(owner.join().unwrap().body, "blocked");
    assert_eq!(beside.join().unwrap().status(), 201);
}

/// Renewals that fail or hang are repeated while the lease lasts. Until then, no duplicate runs.
#[tokio::test(start_paused = true)]
async fn a_lease_outlives_a_renewal_that_fails_and_one_that_hangs() {
    for fault in [Fault::Before, Fault::Hang] {
        let store = RemoteStore::new();
        let handler = Handler::new().taking(3 * LEASE);
        store.fail("renew", [fault]);
        let first = start(&layer(&store).layer(handler.clone()), post("k", "pay"));
        for _ in 0..20 {
            tokio::time::sleep(LEASE / 10).await;
            let duplicate = elsewhere(&store, &handler).await;
            assert_eq!(duplicate.code(), "request-outstanding", "{fault:?}");
        }
        assert_eq!((first.await.unwrap().status(), handler.runs()), (201, 1));
    }
}

/// A renewal was in flight when the handler failed. The lease ended at the store before the release
/// arrived, so callers got an unknown outcome.
#[tokio::test(start_paused = true)]
async fn a_renewal_in_flight_does_not_make_a_released_key_unknown() {
    let store = RemoteStore::new();
    let failing = Handler::new()
        .taking(Duration::from_secs(11))
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    let layer = IdempotencyLayer::new(store.clone()).on_error(OnError::Release);
    let owner = start(&layer.layer(failing), post("k", "pay"));
    // The renewal begins at 10 s and ends at 13 s. The first release hangs from 11 s to 16 s.
    store.fail("renew", [Fault::Slow(3)]);
    store.fail("release", [Fault::Hang]);
    tokio::time::sleep(Duration::from_secs(14)).await;
    let elsewhere = IdempotencyLayer::new(store.clone()).with_wait(Duration::ZERO);
    let elsewhere = elsewhere.layer(Handler::new());
    assert_eq!(send(&elsewhere, post("k", "pay")).await.status(), 201);
    // The first caller gets the response that the key holds by then.
    assert_eq!(owner.await.unwrap().status(), 201);
}

/// A renewal was in flight when the handler failed. It reached the store last and extended the
/// lease again.
#[tokio::test(start_paused = true)]
async fn a_renewal_in_flight_does_not_extend_a_lease_that_its_owner_ends() {
    for (on_error, is_second, renewal) in [
        (OnError::Unknown, false, Fault::Slow(3)),
        (OnError::Unknown, false, Fault::SlowAfter(3)),
        (OnError::Release, true, Fault::Slow(3)),
        (OnError::Release, true, Fault::SlowAfter(3)),
    ] {
        let store = RemoteStore::new();
        let layer = || {
            IdempotencyLayer::new(store.clone())
                .on_error(on_error)
                .on_lost(OnLost::Execute)
        };
        if is_second {
            // If another attempt has held the key, a release leaves its record in the store.
            let handler = Handler::new().taking(Duration::from_secs(3_600));
            drop(start(&layer().layer(handler), post("k", "pay")));
            tokio::time::sleep(Duration::from_secs(1)).await;
            store.fail("renew", [Fault::Before; 1_000]);
            tokio::time::sleep(Duration::from_secs(40)).await;
        }
        let failing = Handler::new()
            .taking(Duration::from_secs(11))
            .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
        let owner = start(&layer().layer(failing), post("k", "pay"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        store.heal();
        tokio::time::sleep(Duration::from_secs(3)).await;
        // The renewal begins at 10 s, and the handler ends at 11 s.
        store.fail("renew", [renewal]);
        assert_eq!(owner.await.unwrap().status(), 502);
        tokio::time::sleep(Duration::from_secs(4)).await;
        let handler = Handler::new();
        assert_eq!(
            elsewhere(&store, &handler).await.status(),
            201,
            "{on_error:?} {renewal:?}"
        );
        assert_eq!(handler.runs(), 1);
    }
}

/// The store starts the lease when it grants the key, not when its reply arrives. The grant is the
/// first one of its key, or follows a lost attempt, with or without a check of that attempt.
#[tokio::test(start_paused = true)]
async fn a_lease_whose_grant_arrives_late_is_renewed_in_time() {
    const LEASE: Duration = Duration::from_secs(12);
    for (is_lost, is_checked) in [(false, false), (true, false), (true, true)] {
        let store = RemoteStore::new();
        if is_lost {
            let lost = Handler::new().responding(|_| text(StatusCode::BAD_GATEWAY, "lost"));
            let losing = layer(&store).on_error(OnError::Unknown).layer(lost);
            assert_eq!(send(&losing, post("k", "pay")).await.status(), 502);
        }
        let mut layer = layer(&store).with_lease(LEASE).with_store_timeout(LEASE);
        if is_checked {
            layer = layer.with_recovery(|_| async { Recovered::NotHappened });
        }
        let handler = Handler::new().taking(2 * LEASE);
        store.fail("claim", [Fault::SlowReply(9)]);
        let owner = start(&layer.layer(handler.clone()), post("k", "pay"));
        // A third of the lease after the reply would be at 13 s.
        tokio::time::sleep(LEASE + Duration::from_millis(500)).await;
        let duplicate = elsewhere(&store, &handler).await;
        assert_eq!(duplicate.code(), "request-outstanding", "{is_lost} {is_checked}");
        assert_eq!((owner.await.unwrap().status(), handler.runs()), (201, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_handler_whose_key_was_taken_over_learns_it_from_the_next_renewal() {
    let store = RemoteStore::new();
    let (looks, held) = mpsc::channel();
    let handler = service_fn(move |request: Request<AnyBody>| {
        let looks = looks.clone();
        async move {
            let lease = request.extensions().get::<Lease>().unwrap();
            for _ in 0..2 {
                tokio::time::sleep(2 * LEASE).await;
                looks.send(lease.is_held()).unwrap();
            }
            Ok::<_, Infallible>(text(StatusCode::CREATED, "too late"))
        }
    });
    store.fail("renew", [Fault::Before; 1_000]);
    let _owner = start(&layer(&store).layer(handler), post("k", "pay"));
    tokio::time::sleep(2 * LEASE + LEASE / 2).await;
    let _new_owner = start(&layer(&store).layer(Handler::new().taking(4 * LEASE)), post("k", "pay"));
    tokio::time::sleep(LEASE / 10).await;
    store.heal();
    tokio::time::sleep(2 * LEASE).await;
    assert_eq!(held.try_iter().collect::<Vec<_>>(), [true, false]);
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_lost_its_key_never_gets_the_response_to_another_request() {
    // The layer served the response under the key to this owner, even if another request had
    // produced it.
    let store = RemoteStore::new();
    let handler = Handler::new()
        .taking(Duration::from_secs(3600))
        .responding(|_| text(StatusCode::CREATED, "zombie"));
    let layer = IdempotencyLayer::new(store.clone()).with_store_timeout(Duration::from_secs(1));
    let mut a = post("k", "pay");
    a.headers_mut().insert("authorization", "Bearer alice".parse().unwrap());
    let zombie = start(&layer.layer(handler), a);
    tokio::time::sleep(Duration::from_secs(1)).await;
    store.fail("renew", [Fault::Before; 10_000]);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let (key, _) = store.only();
    let snap = store.peek(&key).await.unwrap().unwrap();
    assert_eq!(snap.status, Status::Lost);
    store.resolve(&key, snap.fence, &Resolution::Absent).await.unwrap();
    let h2 = Handler::new().responding(|_| text(StatusCode::CREATED, "bobs secret"));
    let s2 = IdempotencyLayer::new(store).layer(h2);
    let mut b = post("k", "other");
    b.headers_mut().insert("authorization", "Bearer bob".parse().unwrap());
    assert_eq!(send(&s2, b).await.body, "bobs secret");
    let z = zombie.await.unwrap();
    assert_ne!(z.body, "bobs secret");
}

#[test]
fn renewal_starts_even_when_the_first_grant_was_outside_of_a_runtime() {
    // The layer marked the renewal task as running before it knew whether the task could start.
    let store = RemoteStore::new();
    store.set_yields(0);
    let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(1));
    let s = layer.layer(Handler::new());
    futures::executor::block_on(async { send(&s, post("k0", "x")).await });
    let rt = Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    rt.block_on(async {
        let s = layer.layer(Handler::new().taking(Duration::from_secs(5)));
        send(&s, post("k1", "x")).await;
    });
    assert!(store.calls("renew") > 0);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_hangs_does_not_delay_the_others() {
    // The task awaited all renewals together, so a short lease ended while the renewal of a long
    // one hung until its timeout.
    let store = RemoteStore::new();
    let handler = Handler::new().taking(Duration::from_secs(1200));
    let layer = IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
    let long = layer
        .clone()
        .with_lease(Duration::from_secs(1800))
        .layer(handler.clone());
    let short = layer.clone().with_lease(Duration::from_secs(30)).layer(handler.clone());
    let _l = start(&long, post("long", "x"));
    tokio::time::sleep(Duration::from_secs(595)).await;
    let _s = start(&short, post("short", "x"));
    // The first renewal of the long lease, after about 600 s, hangs.
    tokio::time::sleep(Duration::from_secs(3)).await;
    store.fail("renew", [Fault::Hang]);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let other = IdempotencyLayer::new(store.clone())
        .on_lost(OnLost::Execute)
        .with_wait(Duration::ZERO)
        .layer(handler.clone());
    let _o = start(&other, post("short", "x"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(handler.runs(), 2, "each request runs once");
}

/// The store refuses to renew a lease that was lost, but the owner can still complete the record.
#[tokio::test(start_paused = true)]
async fn a_response_is_stored_although_its_lease_is_not_held_if_no_other_attempt_has_the_key() {
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(store.clone()).with_lease(LEASE);
    let there = IdempotencyLayer::new(store.clone()).layer(Handler::new());
    store.fail("renew", [Fault::Before; 10_000]);
    let owner = start(
        &layer.layer(service_fn(|request: Request<AnyBody>| async move {
            tokio::time::sleep(5 * LEASE).await;
            let is_held = request.extensions().get::<Lease>().unwrap().is_held();
            Ok::<_, Infallible>(text(StatusCode::CREATED, is_held.to_string()))
        })),
        post("k", "pay"),
    );
    tokio::time::sleep(2 * LEASE).await;
    assert_eq!(send(&there, post("k", "pay")).await.code(), "outcome-unknown");
    store.heal();
    assert_eq!(owner.await.unwrap().body, "false");
    let again = send(&there, post("k", "pay")).await;
    assert_eq!((again.is_replay(), &again.body[..]), (true, &b"false"[..]));
}

/// The caller got 409 `outcome-unknown` in place of the failure.
#[tokio::test(start_paused = true)]
async fn a_failure_passes_through_although_its_lease_is_lost_if_no_other_attempt_has_the_key() {
    let store = RemoteStore::new();
    let layer = IdempotencyLayer::new(store.clone()).with_lease(LEASE);
    let failing = Handler::new()
        .taking(5 * LEASE)
        .responding(|_| text(StatusCode::BAD_GATEWAY, "failed"));
    store.fail("renew", [Fault::Before; 10_000]);
    let owner = start(&layer.on_error(OnError::Unknown).layer(failing), post("k", "pay"));
    tokio::time::sleep(2 * LEASE).await;
    let there = IdempotencyLayer::new(store.clone()).layer(Handler::new());
    assert_eq!(send(&there, post("k", "pay")).await.code(), "outcome-unknown");
    store.heal();
    let failed = owner.await.unwrap();
    assert_eq!((failed.status(), &failed.body[..]), (502, &b"failed"[..]));
    assert_eq!(send(&there, post("k", "pay")).await.code(), "outcome-unknown");
}
