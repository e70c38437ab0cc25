//! Truncated requests and responses never count as complete shorter ones.

use std::convert::Infallible;

use axum::body::Bytes;
use h2::Reason;
use h2::client::SendRequest;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_http::map_request_body::MapRequestBodyLayer;
use tower_idempotency::{BufferedBody, IdempotencyLayer, MemoryStore};

use super::Runs;

type Incoming = BufferedBody<hyper::body::Incoming>;

/// Connects to an HTTP/2 server whose handler returns the body of the request. Returns the client
/// and the run counter.
async fn client() -> (SendRequest<Bytes>, Runs) {
    let runs = Runs::default();
    let counted = runs.clone();
    let handler = service_fn(move |request: Request<Incoming>| {
        let runs = counted.clone();
        async move {
            runs.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let body = request.into_body().collect().await.unwrap().to_bytes();
            Ok::<_, Infallible>(Response::new(Full::new(body)))
        }
    });
    let service = ServiceBuilder::new()
        .layer(MapRequestBodyLayer::new(BufferedBody::new))
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .service(handler);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let service = TowerToHyperService::new(service);
        drop(server.serve_connection(TokioIo::new(stream), service).await);
    });
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    (client, runs)
}

fn payment(length: Option<usize>) -> Request<()> {
    let mut request = Request::post("http://localhost/").header("idempotency-key", "k");
    if let Some(length) = length {
        request = request.header("content-length", length);
    }
    request.body(()).unwrap()
}

/// Envoy resets a stream with `NO_ERROR` when its own client leaves, and hyper then ends the body
/// without an error. The handler ran with the first half. The retry with the whole body got 422 for
/// a day.
#[tokio::test]
async fn a_request_that_is_reset_without_an_error_runs_nothing() {
    for length in [None, Some(8)] {
        let (client, runs) = client().await;
        let mut client = client.ready().await.unwrap();
        let (response, mut body) = client.send_request(payment(length), false).unwrap();
        body.send_data(Bytes::from_static(b"half"), false).unwrap();
        // The test tries two timings: the server has read the first half and granted new capacity,
        // or the server sees the half and the reset at once.
        if length.is_none() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        body.send_reset(Reason::NO_ERROR);
        drop(response);
        let mut client = client.ready().await.unwrap();
        let (response, mut body) = client.send_request(payment(length), false).unwrap();
        body.send_data(Bytes::from_static(b"half+end"), true).unwrap();
        let (head, mut body) = response.await.unwrap().into_parts();
        let body = body.data().await.unwrap().unwrap();
        assert_eq!(
            (head.status, &body[..]),
            (StatusCode::OK, &b"half+end"[..]),
            "{length:?}"
        );
        assert_eq!(runs.count(), 1, "{length:?}");
    }
}

/// Starts an HTTP/2 server that declares eight bytes, sends four and resets the stream without an
/// error. Returns its URL.
async fn resetting_upstream() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let head = Response::builder().header("content-length", 8).body(()).unwrap();
            let mut body = respond.send_response(head, false).unwrap();
            body.send_data(Bytes::from_static(b"half"), false).unwrap();
            tokio::spawn(async move {
                // By then, the client has received the first half.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                body.send_reset(Reason::NO_ERROR);
            });
        }
    });
    format!("http://{address}/")
}

/// hyper ends the body of such a response without an error. A reverse proxy stored the first half
/// with a matching length, so each caller got half of a document that looked complete.
#[tokio::test]
async fn a_response_of_an_upstream_that_is_reset_without_an_error_is_broken() {
    let upstream = resetting_upstream().await;
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http::<Full<Bytes>>();
    let runs = Runs::default();
    let counted = runs.clone();
    let proxy = service_fn(move |_: Request<Full<Bytes>>| {
        counted.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let request = Request::post(&upstream).body(Full::default()).unwrap();
        let response = client.request(request);
        async move { response.await.map(|response| response.map(BufferedBody::new)) }
    });
    let service = ServiceBuilder::new()
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .service(proxy);
    for (status, code) in [(500, "response-broken"), (409, "response-not-stored")] {
        let request = payment(None).map(|()| Full::from("pay"));
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), status);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&body).contains(code), "{body:?}");
    }
    assert_eq!(runs.count(), 1);
}
