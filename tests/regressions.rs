//! Each test is a defect that was found once; its name is what holds now, its comment what went wrong.

mod support;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;
use support::{full, post, send, start, text, AnyBody, Fault, Handler, RemoteStore, Timer};
use tower::{service_fn, Layer, ServiceExt};
use tower_idempotency::protocol::{Resolution, Status};
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnError, OnLost, Store};

#[tokio::test(start_paused = true)]
async fn an_owner_that_lost_its_key_never_gets_the_answer_of_another_request() {
    // It was served what stood under the key, whoever had made it.
    let store = RemoteStore::new();
    let handler = Handler::new()
        .taking(Duration::from_secs(3600))
        .answering(|_| text(StatusCode::CREATED, "zombie"));
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
    let h2 = Handler::new().answering(|_| text(StatusCode::CREATED, "bobs secret"));
    let s2 = IdempotencyLayer::new(store).layer(h2);
    let mut b = post("k", "other");
    b.headers_mut().insert("authorization", "Bearer bob".parse().unwrap());
    assert_eq!(send(&s2, b).await.body, "bobs secret");
    let z = zombie.await.unwrap();
    assert_ne!(z.body, "bobs secret");
}

#[tokio::test(start_paused = true)]
async fn requests_that_wait_for_another_claim_are_bounded_in_number_and_time() {
    // They were not counted, and took the lead one after the other: 20 of them waited for 200 s.
    let store = RemoteStore::new();
    store.fail("claim", [Fault::Hang; 10_000]);
    let s = IdempotencyLayer::new(store)
        .with_wait(Duration::ZERO)
        .with_max_waiters_per_key(1)
        .with_max_waiters(1)
        .layer(Handler::new());
    let timer = Timer::start();
    let all: Vec<_> = (0..20).map(|n| start(&s, post("k", format!("body {n}")))).collect();
    let mut codes = vec![];
    for one in all {
        codes.push(one.await.unwrap().code());
    }
    assert!(codes.contains(&"too-many-waiters"), "{codes:?}");
    assert!(timer.elapsed() < Duration::from_secs(15), "{:?}", timer.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_longest_retry_after_is_no_overflow() {
    // Rounding up overflowed.
    let handler = Handler::new().taking(Duration::from_secs(3600));
    let s = IdempotencyLayer::new(MemoryStore::new())
        .with_wait(Duration::ZERO)
        .with_retry_after(Duration::MAX)
        .layer(handler);
    let _a = start(&s, post("k", "x"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(send(&s, post("k", "x")).await.status(), 409);
}

#[test]
fn renewal_starts_even_when_the_first_grant_was_outside_of_a_runtime() {
    // It was marked as running before it was known whether it could.
    let store = RemoteStore::new();
    store.set_yields(0);
    let layer = IdempotencyLayer::new(store.clone()).with_lease(Duration::from_secs(1));
    let s = layer.layer(Handler::new());
    futures::executor::block_on(async { send(&s, post("k0", "x")).await });
    let rt = tokio::runtime::Builder::new_current_thread()
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
async fn a_renewal_that_hangs_does_not_hold_up_the_others() {
    // They were awaited as a batch, and a short lease ran out behind a long one's time-out.
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
    // the first renewal of the long one (at ~600 s) hangs
    tokio::time::sleep(Duration::from_secs(3)).await;
    store.fail("renew", [Fault::Hang]);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let other = IdempotencyLayer::new(store.clone())
        .on_lost(OnLost::Execute)
        .with_wait(Duration::ZERO)
        .layer(handler.clone());
    let _o = start(&other, post("short", "x"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(handler.runs(), 2, "the short one ran twice");
}

#[tokio::test(start_paused = true)]
async fn two_layers_around_one_handler_do_not_wait_for_each_other() {
    // The inner one waited for the outer, which kept the inner one's 409.
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let s = layer.clone().layer(layer.clone().layer(handler.clone()));
    let a = send(&s, post("k", "x")).await;
    let b = send(&s, post("k", "x")).await;
    assert_eq!((a.status(), b.is_replay(), handler.runs()), (201, true, 1));
}

#[tokio::test]
async fn a_failure_that_is_kept_is_rendered_once() {
    // It was rendered to be stored and again to be sent.
    let n = Arc::new(AtomicUsize::new(0));
    let s = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Store)
        .with_refusals(move |r, _| {
            let mut x = Response::new(Bytes::from(format!("incident {}", n.fetch_add(1, Ordering::SeqCst))));
            *x.status_mut() = r.status();
            x
        })
        .layer(Handler::new().answering(|_| panic!("x")));
    let a = send(&s, post("k", "x")).await;
    let b = send(&s, post("k", "x")).await;
    assert_eq!(a.body, b.body);
}

#[tokio::test]
async fn more_header_lines_than_16_bits_count_come_again() {
    // Their number was stored in 16 bits.
    let s = IdempotencyLayer::new(MemoryStore::new()).layer(Handler::new().answering(|_| {
        let mut r = text(StatusCode::OK, "x");
        for _ in 0..70_000 {
            r.headers_mut().append("link", "a".parse().unwrap());
        }
        r
    }));
    let a = send(&s, post("k", "x")).await;
    assert_eq!(a.status(), 200);
    let b = send(&s, post("k", "x")).await;
    assert_eq!(b.status(), 200);
}

#[tokio::test]
async fn a_predicate_that_panics_comes_after_the_effect_and_nobody_runs_again() {
    // It unwound through the exchange: its caller got no answer, and the key was left to chance.
    let s = IdempotencyLayer::new(MemoryStore::new())
        .store_if(|_| panic!("predicate"))
        .layer(Handler::new());
    let one = {
        let s = s.clone();
        tokio::spawn(async move { send(&s, post("k", "x")).await.head.status }).await
    };
    let two = {
        let s = s.clone();
        tokio::spawn(async move { send(&s, post("k", "x")).await.code() }).await
    };
    assert_eq!(
        (one.unwrap(), two.unwrap()),
        (500.try_into().unwrap(), "response-not-stored")
    );
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_was_cut_off_is_not_run_again_unless_asked() {
    // The 408 of a time-out released the key, whatever was set for failures.
    use tower_http::timeout::TimeoutLayer;
    let effects = Arc::new(AtomicUsize::new(0));
    let e = effects.clone();
    let inner = service_fn(move |_r: Request<AnyBody>| {
        let e = e.clone();
        async move {
            e.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok::<_, std::convert::Infallible>(Response::new(full("ok")))
        }
    });
    let timed = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, Duration::from_secs(10)).layer(inner);
    let timed = timed.map_response(|r: Response<_>| r.map(|_| full("")));
    let s = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Unknown)
        .layer(timed);
    let a = send(&s, post("k", "x")).await;
    let b = send(&s, post("k", "x")).await;
    assert_eq!((a.status(), b.code()), (408, "outcome-unknown"));
    assert_eq!(effects.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_cannot_be_read_never_runs_unprotected() {
    // It was taken for a store that does not answer.
    let store = RemoteStore::new();
    let handler = Handler::new();
    let s = IdempotencyLayer::new(store.clone())
        .dangerously_run_unprotected_when_the_store_fails()
        .layer(handler.clone());
    send(&s, post("k", "x")).await;
    store.fail("claim", [Fault::Corrupt]);
    let b = send(&s, post("k", "x")).await;
    assert_eq!((b.status(), handler.runs()), (500, 1));
}

#[tokio::test]
async fn trailers_reach_the_wire_on_a_first_run_and_on_a_replay() {
    // A length was announced, and HTTP/1.1 has no place for trailers then.
    use http_body::Frame;
    use http_body_util::{BodyExt, StreamBody};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let inner = service_fn(|_r: Request<AnyBody>| async move {
        let mut t = http::HeaderMap::new();
        t.insert("x-sum", "42".parse().unwrap());
        let f: Vec<Result<Frame<Bytes>, support::Broken>> =
            vec![Ok(Frame::data(Bytes::from_static(b"paid"))), Ok(Frame::trailers(t))];
        let body: AnyBody = StreamBody::new(futures::stream::iter(f)).boxed_unsync();
        Ok::<_, std::convert::Infallible>(Response::builder().header("trailer", "x-sum").body(body).unwrap())
    });
    for guarded in [false, true] {
        let svc = IdempotencyLayer::new(MemoryStore::new()).layer(inner);
        let mut outs = vec![];
        for _ in 0..2 {
            let svc = svc.clone();
            let (mut c, srv) = tokio::io::duplex(65536);
            let hs = hyper::service::service_fn(move |r: Request<hyper::body::Incoming>| {
                let svc = svc.clone();
                async move {
                    svc.oneshot(r.map(|b| b.map_err(|_| support::Broken).boxed_unsync()))
                        .await
                }
            });
            tokio::spawn(async move {
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(srv), hs)
                    .await
            });
            let key = if guarded { "idempotency-key: k\r\n" } else { "" };
            c.write_all(
                format!(
                    "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: close\r\n{key}content-length: 0\r\n\r\n"
                )
                .as_bytes(),
            )
            .await
            .unwrap();
            let mut out = String::new();
            c.read_to_string(&mut out).await.unwrap();
            outs.push(out);
        }
        for o in outs {
            assert!(o.contains("x-sum: 42"), "guarded {guarded}: {o}");
        }
    }
}
