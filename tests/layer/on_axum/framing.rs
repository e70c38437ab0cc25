//! Framing fields that a handler sets, as a client sees them over a real connection.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::response::Response;
use axum::routing::post;
use futures::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tower_idempotency::{DoNotStore, StreamResponse};

use super::{layer, serve};

const LINE: &str = "{\"paid\":true}";

type Fields = Vec<(&'static str, &'static str)>;

/// The body of a response.
#[derive(Clone, Copy)]
enum Shape {
    /// All bytes at once.
    Whole,
    /// Two frames, the second a moment later.
    Frames,
    /// The first frame, and then an error.
    Short,
}

/// Starts a server whose handler sets these fields on a response of this shape and then applies the
/// change.
async fn server(fields: Fields, shape: Shape, change: fn(&mut Response)) -> (String, Arc<AtomicUsize>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&runs);
    let handler = move || async move {
        count.fetch_add(1, Ordering::SeqCst);
        let mut response = Response::new(match shape {
            Shape::Whole => Body::from(LINE),
            Shape::Frames => Body::from_stream(two_frames().map(Ok::<_, Infallible>)),
            Shape::Short => {
                let broken = stream::once(async { Err(std::io::Error::other("the upstream is gone")) });
                Body::from_stream(two_frames().take(1).map(Ok).chain(broken))
            }
        });
        for (name, value) in fields {
            response.headers_mut().append(name, HeaderValue::from_static(value));
        }
        change(&mut response);
        response
    };
    let app = Router::new().route("/", post(handler)).layer(layer());
    (format!("http://{}/", serve(app).await), runs)
}

fn mark_as_stream(response: &mut Response) {
    response.extensions_mut().insert(StreamResponse);
}

fn forbid_to_store(response: &mut Response) {
    response.extensions_mut().insert(DoNotStore);
}

fn two_frames() -> stream::BoxStream<'static, Bytes> {
    let second = stream::once(async {
        tokio::task::yield_now().await;
        Bytes::from_static(&LINE.as_bytes()[6..])
    });
    let first = stream::iter([Bytes::from_static(&LINE.as_bytes()[..6])]);
    first.chain(second).boxed()
}

struct Seen {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

async fn seen(url: &str) -> Seen {
    whole(url).await.unwrap()
}

/// Sends the request on a new connection. Returns nothing if the response breaks off.
async fn whole(url: &str) -> Option<Seen> {
    let client: Client<HttpConnector, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::post(url).header("idempotency-key", "k").body(Full::default());
    let (head, body) = client.request(request.unwrap()).await.ok()?.into_parts();
    Some(Seen {
        status: head.status,
        headers: head.headers,
        body: body.collect().await.ok()?.to_bytes(),
    })
}

/// A handler copied `Transfer-Encoding` from its upstream. Its first caller got a closed
/// connection.
#[tokio::test]
async fn a_handler_cannot_contradict_the_framing_of_its_stored_response() {
    let cases: [Fields; 9] = [
        vec![("transfer-encoding", "chunked")],
        vec![("transfer-encoding", "gzip, chunked")],
        vec![("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
        vec![("transfer-encoding", "nonsense")],
        vec![("transfer-encoding", "chunked"), ("content-length", "5")],
        vec![("content-length", "5")],
        vec![("content-length", "500")],
        vec![("content-length", "13"), ("content-length", "14")],
        vec![("content-length", "nonsense")],
    ];
    for fields in cases {
        for shape in [Shape::Whole, Shape::Frames] {
            let (url, runs) = server(fields.clone(), shape, |_| {}).await;
            for is_replay in [false, true] {
                let seen = seen(&url).await;
                assert_eq!(seen.body, LINE, "{fields:?}");
                let lengths: Vec<_> = seen.headers.get_all("content-length").iter().collect();
                assert_eq!(lengths, ["13"], "{fields:?}");
                assert!(!seen.headers.contains_key("transfer-encoding"), "{fields:?}");
                assert_eq!(
                    seen.headers.contains_key("idempotent-replayed"),
                    is_replay,
                    "{fields:?}"
                );
            }
            assert_eq!(runs.load(Ordering::SeqCst), 1, "{fields:?}");
        }
    }
}

#[tokio::test]
async fn hostile_connection_options_remove_no_field_that_the_response_needs() {
    let fields = vec![
        (
            "connection",
            "close, content-type, location, content-length, transfer-encoding",
        ),
        ("connection", "idempotent-replayed, x-hop, , ;,"),
        ("x-hop", "1"),
        ("location", "/1"),
        ("content-type", "application/json"),
    ];
    let (url, _) = server(fields, Shape::Frames, |_| {}).await;
    for is_replay in [false, true] {
        let seen = seen(&url).await;
        assert_eq!(seen.body, LINE);
        assert_eq!(seen.headers["location"], "/1");
        assert_eq!(seen.headers["content-type"], "application/json");
        assert_eq!(seen.headers.contains_key("idempotent-replayed"), is_replay);
    }
}

/// The layer does not know the length of a stream, so the length that the handler declares counts.
/// A transfer coding of the handler never counts.
#[tokio::test]
async fn a_stream_is_framed_by_the_server() {
    let changes: [fn(&mut Response); 2] = [mark_as_stream, forbid_to_store];
    for change in changes {
        for fields in [
            vec![],
            vec![("transfer-encoding", "chunked")],
            vec![("transfer-encoding", "nonsense")],
            vec![("content-length", "13")],
            vec![("content-length", "13"), ("transfer-encoding", "chunked")],
            // The transfer coding takes precedence over a length (RFC 9112 section 6.3).
            vec![("content-length", "5"), ("transfer-encoding", "chunked")],
            // With such a length, hyper closed the connection without a byte.
            vec![("content-length", "nonsense")],
            vec![("content-length", "13, 13")],
            vec![("content-length", "+13")],
            vec![("content-length", "")],
            vec![("content-length", "99999999999999999999999")],
            vec![("content-length", "13"), ("content-length", "14")],
            vec![("content-length", "13"), ("content-length", "13")],
        ] {
            for shape in [Shape::Whole, Shape::Frames] {
                let (url, _) = server(fields.clone(), shape, change).await;
                let seen = seen(&url).await;
                assert_eq!(seen.body, LINE, "{fields:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_length_that_contradicts_a_body_of_known_size_does_not_count_in_a_stream() {
    for change in [mark_as_stream, forbid_to_store] {
        for length in ["5", "500", "nonsense"] {
            let (url, _) = server(vec![("content-length", length)], Shape::Whole, change).await;
            assert_eq!(seen(&url).await.body, LINE, "{length}");
        }
    }
}

/// If the declared length is wrong or the body breaks off, the caller sees a broken response and
/// never a shorter one that looks complete. The tombstone stays.
#[tokio::test]
async fn a_stream_that_ends_too_early_is_broken_for_its_caller_and_its_request_never_runs_again() {
    for (fields, shape) in [
        (vec![("content-length", "500")], Shape::Frames),
        (vec![("content-length", "13")], Shape::Short),
        (vec![], Shape::Short),
    ] {
        let (url, runs) = server(fields.clone(), shape, mark_as_stream).await;
        assert!(whole(&url).await.is_none(), "{fields:?}");
        let again = seen(&url).await;
        assert_eq!(again.status, StatusCode::CONFLICT, "{fields:?}");
        assert!(String::from_utf8_lossy(&again.body).contains("response-not-stored"));
        assert_eq!(runs.load(Ordering::SeqCst), 1, "{fields:?}");
    }
}

/// If a response to be stored breaks off, the caller gets a server error and never a response that
/// looks complete.
#[tokio::test]
async fn a_response_to_be_stored_that_ends_too_early_is_refused_as_broken() {
    for fields in [vec![("content-length", "13")], vec![]] {
        let (url, runs) = server(fields, Shape::Short, |_| {}).await;
        for (status, code) in [(500, "response-broken"), (409, "response-not-stored")] {
            let seen = seen(&url).await;
            assert_eq!(seen.status, status);
            assert!(String::from_utf8_lossy(&seen.body).contains(code));
        }
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test]
async fn a_mark_can_be_a_part_of_a_response_tuple() {
    use axum::response::IntoResponse;
    use tower_idempotency::{StoreFor, StoreResponse};

    async fn closed() -> Result<&'static str, (StatusCode, DoNotStore, &'static str)> {
        Err((StatusCode::CONFLICT, DoNotStore, "closed"))
    }
    async fn declined() -> impl IntoResponse {
        (
            StatusCode::BAD_GATEWAY,
            StoreResponse,
            StoreFor(std::time::Duration::from_secs(60)),
            "declined",
        )
    }
    let app = Router::new()
        .route("/closed", post(closed))
        .route("/declined", post(declined));
    let app = app.layer(layer());
    for (path, is_replay) in [("/closed", false), ("/declined", true)] {
        for is_second in [false, true] {
            let got = super::pay(&app, path, &[("idempotency-key", path)], "").await;
            assert_eq!(got.is_replay(), is_replay && is_second, "{path}");
        }
    }
}
