//! The layer as a tower service: readiness, backpressure, and everything that passes through it.

mod nested;
mod presets;
mod rejections;
mod settings;

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use tower::buffer::BufferLayer;
use tower::limit::ConcurrencyLimitLayer;
use tower::load_shed::LoadShedLayer;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::{
    BufferedBody, Idempotency, IdempotencyLayer, Lease, MemoryStore, OnError, Refusal, ResponseFuture, Scope,
};

use crate::support;
use crate::support::{AnyBody, Handler, Play, frames, full, got, post, request, send, text};

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new())
}

/// A service that panics if a clone is called that was not polled ready.
#[derive(Default)]
struct MustBeReady {
    ready: bool,
    calls: Arc<AtomicUsize>,
}

impl Clone for MustBeReady {
    fn clone(&self) -> Self {
        Self {
            ready: false,
            calls: Arc::clone(&self.calls),
        }
    }
}

impl Service<Request<AnyBody>> for MustBeReady {
    type Response = Response<AnyBody>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<AnyBody>) -> Self::Future {
        assert!(
            std::mem::take(&mut self.ready),
            "called without having been polled ready"
        );
        self.calls.fetch_add(1, Ordering::SeqCst);
        std::future::ready(Ok(text(StatusCode::OK, "done")))
    }
}

#[tokio::test]
async fn the_layer_calls_the_service_that_was_polled_ready() {
    let inner = MustBeReady::default();
    let calls = Arc::clone(&inner.calls);
    let mut service = layer().layer(inner);
    for key in ["a", "b", "a"] {
        let response = service.ready().await.unwrap().call(post(key, "x")).await.unwrap();
        assert_eq!(response.status(), 200);
    }
    let no_key = Request::post("/").body(full("x")).unwrap();
    assert_eq!(service.ready().await.unwrap().call(no_key).await.unwrap().status(), 200);
    assert_eq!(calls.load(Ordering::SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn the_layer_works_around_a_concurrency_limit_a_buffer_and_load_shedding() {
    let handler = Handler::new().taking(Duration::from_millis(100));
    let limited = ServiceBuilder::new()
        .layer(layer())
        .layer(ConcurrencyLimitLayer::new(2))
        .service(handler.clone());
    let responses = futures::future::join_all((0..20).map(|n| {
        let service = limited.clone();
        async move { send(&service, post(&format!("key {n}").replace(' ', "-"), "x")).await }
    }));
    assert!(responses.await.iter().all(|response| response.status() == 201));
    assert_eq!(handler.runs(), 20);

    let buffered = ServiceBuilder::new()
        .layer(layer())
        .layer(BufferLayer::new(8))
        .service(handler.clone());
    assert_eq!(send(&buffered, post("k", "x")).await.status(), 201);
    assert!(send(&buffered, post("k", "x")).await.is_replay());

    let shedding = ServiceBuilder::new()
        .layer(layer())
        .layer(LoadShedLayer::new())
        .layer(ConcurrencyLimitLayer::new(1))
        .service(handler.clone());
    let (one, two) = (shedding.clone(), shedding.clone());
    let (one, two) = tokio::join!(one.oneshot(post("one", "x")), two.oneshot(post("two", "x")));
    let overloaded = [one, two]
        .into_iter()
        .find_map(Result::err)
        .expect("one request is shed");
    assert!(
        overloaded.is::<tower::load_shed::error::Overloaded>(),
        "the inner error passes through"
    );
}

#[tokio::test(start_paused = true)]
async fn waiting_duplicates_and_replays_hold_no_permit_of_the_inner_service() {
    let handler = Handler::new().taking(Duration::from_secs(5));
    let service = ServiceBuilder::new()
        .layer(layer())
        .layer(ConcurrencyLimitLayer::new(2))
        .service(handler.clone());
    let slow: Vec<_> = (0..2)
        .map(|_| {
            let service = service.clone();
            tokio::spawn(async move { send(&service, post("slow", "x")).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(10)).await;
    // One permit runs "slow". Its duplicate has given the other permit back.
    let other = tokio::time::timeout(Duration::from_secs(6), send(&service, post("other", "x"))).await;
    assert_eq!(other.expect("the duplicate holds no permit").status(), 201);
    for response in slow {
        assert_eq!(response.await.unwrap().status(), 201);
    }
}

/// A service that is not ready until the test opens it.
#[derive(Clone, Default)]
struct Gated(Arc<AtomicUsize>);

impl Service<Request<AnyBody>> for Gated {
    type Response = Response<AnyBody>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        match self.0.load(Ordering::SeqCst) {
            0 => Poll::Pending,
            _ => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, _: Request<AnyBody>) -> Self::Future {
        std::future::ready(Ok(text(StatusCode::OK, "open")))
    }
}

#[tokio::test]
async fn backpressure_is_passed_on() {
    let gate = Gated::default();
    let mut service = layer().layer(gate.clone());
    assert!(futures::poll!(std::pin::pin!(service.ready())).is_pending());
    gate.0.store(1, Ordering::SeqCst);
    assert!(futures::poll!(std::pin::pin!(service.ready())).is_ready());
}

#[tokio::test]
async fn extensions_version_and_trailers_pass_through_and_trailers_are_replayed() {
    #[derive(Clone, Debug, PartialEq)]
    struct Mark(&'static str);

    let seen = Arc::new(Mutex::new(Vec::new()));
    let witness = Arc::clone(&seen);
    let inner = service_fn(move |request: Request<AnyBody>| {
        let witness = Arc::clone(&witness);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap();
            let trailers = body.trailers().cloned();
            witness.lock().unwrap().push((head, body.to_bytes(), trailers));
            let trailers = HeaderMap::from_iter([("x-checksum".parse().unwrap(), "1".parse().unwrap())]);
            let mut response = Response::new(frames(vec![Play::Data("a"), Play::Data("b"), Play::Trailers(trailers)]));
            *response.version_mut() = Version::HTTP_2;
            response.extensions_mut().insert(Mark("response"));
            Ok::<_, Infallible>(response)
        }
    });
    let service = layer().layer(inner);
    let trailers = HeaderMap::from_iter([("x-sent".parse().unwrap(), "1".parse().unwrap())]);
    let mut sent = request(
        "k",
        frames(vec![Play::Data("x"), Play::Data("y"), Play::Trailers(trailers)]),
    );
    *sent.version_mut() = Version::HTTP_2;
    sent.extensions_mut().insert(Mark("request"));

    let first = send(&service, sent).await;
    assert_eq!(first.head.version, Version::HTTP_2);
    assert_eq!(first.head.extensions.get::<Mark>(), Some(&Mark("response")));
    assert_eq!(first.trailers.as_ref().unwrap()["x-checksum"], "1");

    let (head, body, trailers) = seen.lock().unwrap().pop().unwrap();
    assert_eq!((head.version, &body[..]), (Version::HTTP_2, &b"xy"[..]));
    assert_eq!(head.extensions.get::<Mark>(), Some(&Mark("request")));
    assert!(head.extensions.get::<Lease>().is_some());
    assert_eq!(trailers.unwrap()["x-sent"], "1");

    let again = send(&service, request("k", full("xy"))).await;
    assert_eq!((&again.body[..], again.is_replay()), (&b"ab"[..], true));
    assert_eq!(again.trailers.unwrap()["x-checksum"], "1");
}

#[tokio::test]
async fn the_inner_error_type_passes_through_and_frees_the_key() {
    #[derive(Debug, PartialEq)]
    struct Refused(u32);

    let calls = Arc::new(AtomicUsize::new(0));
    let inner = service_fn(move |_: Request<AnyBody>| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        async move {
            match call {
                0 => Err(Refused(7)),
                _ => Ok(text(StatusCode::OK, "second")),
            }
        }
    });
    let service = layer().layer(inner);
    assert_eq!(service.clone().oneshot(post("k", "x")).await.unwrap_err(), Refused(7));
    assert_eq!(send(&service, post("k", "x")).await.body, "second");
}

#[tokio::test]
async fn the_layer_wraps_bodies_of_any_type() {
    let inner = service_fn(|request: Request<BufferedBody<Full<Bytes>>>| async {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Ok::<_, Infallible>(Response::new(Full::new(body)))
    });
    let service = ServiceBuilder::new()
        .layer(tower_http::map_request_body::MapRequestBodyLayer::new(
            BufferedBody::new,
        ))
        .layer(layer())
        .service(inner);
    let send = |body: &'static str| {
        let request = Request::post("/")
            .header("idempotency-key", "k")
            .body(Full::from(body))
            .unwrap();
        service.clone().oneshot(request)
    };
    let first = send("x").await.unwrap().into_body().collect().await.unwrap().to_bytes();
    let again = send("x").await.unwrap();
    assert!(again.headers().contains_key("idempotent-replayed"));
    assert_eq!(again.into_body().collect().await.unwrap().to_bytes(), first);
}

#[tokio::test]
async fn a_refusal_is_an_extension_of_its_response() {
    let service = layer().require_key().layer(Handler::new());
    let response = service
        .oneshot(Request::post("/").body(full("")).unwrap())
        .await
        .unwrap();
    assert_eq!(response.extensions().get::<Refusal>().unwrap().code(), "key-missing");
    assert_eq!(got(response).await.status(), 400);
}

#[test]
fn public_types_are_send_and_shared_ones_are_sync() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    send::<IdempotencyLayer<MemoryStore>>();
    sync::<IdempotencyLayer<MemoryStore>>();
    send::<Idempotency<Handler, MemoryStore>>();
    send::<ResponseFuture<std::future::Ready<()>, AnyBody, Infallible>>();
    send::<Lease>();
    sync::<Lease>();
    sync::<MemoryStore>();
    send::<tower_idempotency::Drain>();
    sync::<tower_idempotency::Error>();
}

#[test]
fn debug_forms_name_their_types() {
    let layer = layer();
    let future = layer.layer(Handler::new()).call(post("secret-key", "x"));
    let shown = format!("{layer:?} {:?} {future:?}", layer.layer(7_u8));
    for part in ["IdempotencyLayer {", "Idempotency { inner: 7", "ResponseFuture"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(!shown.contains("secret-key"), "{shown}");
}

fn with(headers: &[(&'static str, &'static str)], uri: &str) -> Request<AnyBody> {
    let mut request = Request::post(uri).header("idempotency-key", "k");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(full("{}")).unwrap()
}

/// One deployment serves many tenants, and identifies them by their host names or their API keys.
#[tokio::test]
async fn a_caller_with_another_host_or_credential_gets_422() {
    for (name, alice, mallory) in [
        ("host", "alice.shop.example", "mallory.shop.example"),
        ("authorization", "Bearer alice", "Bearer mallory"),
        ("x-api-key", "alice", "mallory"),
    ] {
        let handler = Handler::new();
        let service = layer().layer(handler.clone());
        send(&service, with(&[(name, alice)], "/orders")).await;
        for other in [with(&[(name, mallory)], "/orders"), with(&[], "/orders")] {
            let refused = send(&service, other).await;
            assert_eq!((refused.status(), refused.code()), (422, "key-reused"), "{name}");
            assert!(
                std::str::from_utf8(&refused.body)
                    .unwrap()
                    .contains("or to other credentials")
            );
        }
        assert!(send(&service, with(&[(name, alice)], "/orders")).await.is_replay());
        assert_eq!(handler.runs(), 1);
    }
}

#[tokio::test]
async fn a_host_is_the_same_in_http_2_and_http_1_and_ip_addresses_are_not_compared() {
    let service = layer().layer(Handler::new());
    send(&service, with(&[("host", "shop.example")], "/orders")).await;
    for same in [
        with(&[], "https://shop.example/orders"),
        with(&[("host", "Shop.Example:443")], "/orders"),
        with(&[("host", "shop.example")], "https://shop.example:443/orders"),
    ] {
        assert!(send(&service, same).await.is_replay());
    }
    // A client that balances its load over IP addresses retries on another node.
    let service = layer().layer(Handler::new());
    send(&service, with(&[("host", "10.0.0.1:3000")], "/orders")).await;
    for node in [
        with(&[("host", "10.0.0.2:3000")], "/orders"),
        with(&[], "http://[2001:db8::2]:3000/orders"),
        with(&[], "/orders"),
    ] {
        assert!(send(&service, node).await.is_replay());
    }
}

#[tokio::test]
async fn a_scope_replaces_the_comparison_of_credentials_and_host() {
    let service = layer().with_scope(|_| Scope::from("alice")).layer(Handler::new());
    let old = [("authorization", "old"), ("x-api-key", "old"), ("host", "a.example")];
    send(&service, with(&old, "/orders")).await;
    let new = [("authorization", "new"), ("x-api-key", "new"), ("host", "b.example")];
    assert!(send(&service, with(&new, "/orders")).await.is_replay());
    // The layer still compares a header field that the application has added.
    let chosen = layer()
        .with_scope(|_| Scope::from("alice"))
        .add_fingerprint_header("x-api-key".parse().unwrap())
        .layer(Handler::new());
    send(&chosen, with(&old, "/orders")).await;
    assert_eq!(send(&chosen, with(&new, "/orders")).await.status(), 422);
}

#[tokio::test]
async fn a_service_with_several_names_can_exclude_the_host_from_the_fingerprint() {
    let service = layer().without_authority_in_fingerprint().layer(Handler::new());
    send(&service, with(&[("host", "a.example"), ("x-api-key", "1")], "/orders")).await;
    let elsewhere = with(&[("host", "b.example"), ("x-api-key", "1")], "/orders");
    assert!(send(&service, elsewhere).await.is_replay());
    let mallory = with(&[("host", "a.example"), ("x-api-key", "2")], "/orders");
    assert_eq!(send(&service, mallory).await.status(), 422);
}

#[tokio::test]
async fn a_sensitive_header_stays_sensitive_when_it_is_replayed() {
    let handler = Handler::new().responding(|_| {
        let mut secret = HeaderValue::from_static("secret-1");
        secret.set_sensitive(true);
        let trailers = HeaderMap::from_iter([("x-signature".parse().unwrap(), secret.clone())]);
        let mut response = Response::new(frames(vec![Play::Data("made"), Play::Trailers(trailers)]));
        response.headers_mut().insert("x-api-secret", secret);
        response.headers_mut().insert("x-open", HeaderValue::from_static("1"));
        response
    });
    let service = layer().layer(handler);
    for _ in 0..2 {
        let got = send(&service, post("k", "")).await;
        assert!(
            got.head.headers["x-api-secret"].is_sensitive(),
            "{:?}",
            got.head.headers
        );
        assert!(!got.head.headers["x-open"].is_sensitive());
        assert!(got.trailers.unwrap()["x-signature"].is_sensitive());
    }
}

#[tokio::test(start_paused = true)]
async fn two_layers_around_one_handler_do_not_wait_for_each_other() {
    // The inner layer waited for the outer one, which then stored the 409 of the inner layer.
    let handler = Handler::new();
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let s = layer.clone().layer(layer.clone().layer(handler.clone()));
    let a = send(&s, post("k", "x")).await;
    let b = send(&s, post("k", "x")).await;
    assert_eq!((a.status(), b.is_replay(), handler.runs()), (201, true, 1));
}

#[tokio::test]
async fn a_stored_failure_is_rendered_once() {
    // The application rendered the refusal twice, once for the store and once for the caller, so
    // the two differed.
    let n = Arc::new(AtomicUsize::new(0));
    let s = IdempotencyLayer::new(MemoryStore::new())
        .on_error(OnError::Store)
        .with_refusals(move |r, _| {
            let mut x = Response::new(Bytes::from(format!("incident {}", n.fetch_add(1, Ordering::SeqCst))));
            *x.status_mut() = r.status();
            x
        })
        .layer(Handler::new().responding(|_| panic!("x")));
    let a = send(&s, post("k", "x")).await;
    let b = send(&s, post("k", "x")).await;
    assert_eq!(a.body, b.body);
}

#[tokio::test]
async fn more_than_65_535_header_lines_are_replayed() {
    // The record stored the number of header lines in 16 bits.
    let s = IdempotencyLayer::new(MemoryStore::new()).layer(Handler::new().responding(|_| {
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
async fn trailers_reach_the_wire_on_a_first_run_and_on_a_replay() {
    // The server declared a length, so HTTP/1.1 had no place for the trailers.
    use http_body::Frame;
    use http_body_util::{BodyExt, StreamBody};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let inner = service_fn(|_r: Request<AnyBody>| async move {
        let mut t = HeaderMap::new();
        t.insert("x-sum", "42".parse().unwrap());
        let f: Vec<Result<Frame<Bytes>, support::Broken>> =
            vec![Ok(Frame::data(Bytes::from_static(b"paid"))), Ok(Frame::trailers(t))];
        let body: AnyBody = StreamBody::new(futures::stream::iter(f)).boxed_unsync();
        Ok::<_, Infallible>(Response::builder().header("trailer", "x-sum").body(body).unwrap())
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
