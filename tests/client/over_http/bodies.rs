//! Responses whose body breaks off, stalls, has a wrong length or never ends, from a server that
//! writes raw bytes.

use std::sync::atomic::{AtomicUsize, Ordering};

use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::BoxError;
use tower_http::map_response_body::MapResponseBodyLayer;
use tower_idempotency::BufferedBody;
use tower_idempotency::client::{CollectError, CollectingCallLayer, OnceError};

use super::*;

/// A response in raw bytes, and the action of the server after it.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Sends the response and closes the connection in an orderly way.
    Close(&'static str),
    /// Sends the response and resets the connection.
    Reset(&'static str),
    /// Sends the response, leaves the connection open and sends nothing more.
    Stall(&'static str),
    /// Sends the first string, and then repeats the second one until the client has left.
    Endless(&'static str, &'static str),
    /// Does the same as `Endless`, with a pause before each repetition.
    Trickle(&'static str, &'static str),
}
use Act::{Close, Endless, Reset, Stall, Trickle};

const WHOLE: Act = Close("HTTP/1.1 201 Created\r\ncontent-length: 7\r\n\r\ncharged");

/// Responses that end before they are complete.
const BROKEN: [Act; 5] = [
    Reset("HTTP/1.1 201 Created\r\ncontent-length: 100\r\n\r\nhalf"),
    // The declared length is wrong.
    Close("HTTP/1.1 201 Created\r\ncontent-length: 100\r\n\r\ncharged"),
    // The last chunk is missing, is shorter than declared, or has no length.
    Close("HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n7\r\ncharged\r\n"),
    Close("HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\nff\r\ncharged"),
    Close("HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n7\r\ncharged\r\nlong\r\n"),
];

/// Responses that do not end.
const STALLED: [Act; 3] = [
    Stall("HTTP/1.1 201 Created\r\ncontent-length: 100\r\n\r\nhalf"),
    Stall("HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n"),
    // Without a declared length, the end of the connection ends the body.
    Stall("HTTP/1.1 201 Created\r\n\r\nhalf"),
];

const LIMIT: usize = 1000;
const PAUSE: Duration = Duration::from_millis(100);

/// A server that performs one of these acts for each request and repeats the last one.
struct RawServer {
    url: String,
    keys: Arc<Mutex<Vec<String>>>,
    left: Arc<AtomicUsize>,
}

impl RawServer {
    async fn start(acts: &[Act]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            url: format!("http://{}/", listener.local_addr().unwrap()),
            keys: Arc::default(),
            left: Arc::default(),
        };
        let (keys, left, acts) = (Arc::clone(&server.keys), Arc::clone(&server.left), acts.to_vec());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (keys, left, acts) = (Arc::clone(&keys), Arc::clone(&left), acts.clone());
                tokio::spawn(async move {
                    let Some(key) = key_of_request(&mut stream).await else {
                        return;
                    };
                    let count = {
                        let mut keys = keys.lock().unwrap();
                        keys.push(key);
                        keys.len()
                    };
                    perform(acts[(count - 1).min(acts.len() - 1)], stream).await;
                    left.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        server
    }

    /// Returns the number of requests. Fails if they do not have the same key.
    fn requests(&self) -> usize {
        let keys = self.keys.lock().unwrap();
        assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
        keys.len()
    }

    /// Waits until the server has seen the end of every connection.
    async fn all_have_left(&self) {
        let all_left = async {
            while self.left.load(Ordering::SeqCst) < self.keys.lock().unwrap().len() {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, all_left).await.expect("a connection is left open");
    }
}

/// Reads a request and returns its key.
async fn key_of_request(stream: &mut TcpStream) -> Option<String> {
    let mut request = String::new();
    let is_whole = |request: &str| match request.split_once("\r\n\r\n") {
        Some((head, body)) => !head.contains("content-length: 8") || body.len() == 8,
        None => false,
    };
    while !is_whole(&request) {
        let mut bytes = [0; 1024];
        let read = stream.read(&mut bytes).await.ok().filter(|read| *read > 0)?;
        request.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
    }
    let key = request.lines().find_map(|line| line.strip_prefix("idempotency-key: "));
    Some(key.unwrap_or_default().to_owned())
}

async fn perform(act: Act, mut stream: TcpStream) {
    let (Close(bytes) | Reset(bytes) | Stall(bytes) | Endless(bytes, _) | Trickle(bytes, _)) = act;
    stream.write_all(bytes.as_bytes()).await.unwrap();
    match act {
        Close(_) => stream.shutdown().await.unwrap(),
        Reset(_) => {
            stream.set_zero_linger().unwrap();
            return;
        }
        Stall(_) => {}
        Endless(_, more) => while stream.write_all(more.as_bytes()).await.is_ok() {},
        Trickle(_, more) => {
            while stream.write_all(more.as_bytes()).await.is_ok() {
                tokio::time::sleep(PAUSE / 20).await;
            }
        }
    }
    // Wait until the client closes the connection.
    while stream.read(&mut [0; 1024]).await.is_ok_and(|read| read > 0) {}
}

#[derive(Clone, Copy, Debug)]
enum Http {
    Hyper,
    Reqwest,
}
const CLIENTS: [Http; 2] = [Http::Hyper, Http::Reqwest];

/// The contents of the error of a failed call: attempts, outcome, the status of the lost response,
/// and the text.
#[derive(Debug)]
struct Failed {
    attempts: u32,
    outcome: CallOutcome,
    status: Option<u16>,
    is_timeout: bool,
    text: String,
}

impl<E> From<CallError<CollectError<E>>> for Failed
where
    CallError<CollectError<E>>: std::error::Error,
{
    fn from(error: CallError<CollectError<E>>) -> Self {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        let (attempts, outcome) = (error.attempts(), error.outcome());
        let body = match error.into_source() {
            CollectError::Body(body) => Some(body),
            _ => None,
        };
        Self {
            attempts,
            outcome,
            status: body.as_ref().map(|body| body.status().as_u16()),
            is_timeout: body.is_some_and(|body| body.is_timeout()),
            text,
        }
    }
}

type Got = Result<Response<UnsyncBoxBody<Bytes, BoxError>>, Failed>;

fn collecting() -> CollectingCallLayer {
    let calls = calls(3).collect_responses();
    calls.with_response_limit(LIMIT).with_response_timeout(PATIENCE)
}

fn request<B: From<&'static str>>(method: &Method, url: &str, key: Option<&str>) -> Request<B> {
    let mut request = Request::builder().method(method).uri(url);
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let body = if *method == Method::POST { "amount=1" } else { "" };
    request.body(B::from(body)).unwrap()
}

async fn send_as(http: Http, calls: &CollectingCallLayer, method: Method, url: &str, key: Option<&str>) -> Got {
    match http {
        Http::Hyper => {
            let client = ServiceBuilder::new()
                .layer(calls)
                .layer(MapResponseBodyLayer::new(BufferedBody::new))
                .service(Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>());
            let got = client.oneshot(request(&method, url, key)).await?;
            Ok(got.map(|body| body.map_err(Into::into).boxed_unsync()))
        }
        Http::Reqwest => {
            let http = ReqwestService::build(reqwest::Client::builder().no_proxy()).unwrap();
            let client = ServiceBuilder::new().layer(calls).service(http);
            let got = client.oneshot(request::<reqwest::Body>(&method, url, key)).await?;
            // `reqwest` finds its own extension with the URL.
            let got = reqwest::Response::from(got);
            assert_eq!(got.url().as_str(), url);
            let got: Response<reqwest::Body> = got.into();
            Ok(got.map(|body| body.map_err(Into::into).boxed_unsync()))
        }
    }
}

/// Sends a charge with a key.
async fn send(http: Http, calls: &CollectingCallLayer, url: &str) -> Got {
    let sent = send_as(http, calls, Method::POST, url, Some("k"));
    timeout(PATIENCE, sent).await.expect("the call ends")
}

async fn text_of(response: Response<UnsyncBoxBody<Bytes, BoxError>>) -> Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

fn delivery<B>(response: &Response<B>) -> (u32, CallOutcome) {
    let delivery = response.extensions().get::<CallReport>().unwrap();
    (delivery.attempts(), delivery.outcome())
}

#[tokio::test]
async fn a_body_that_breaks_off_is_retried_under_the_same_key() {
    for (http, broken) in CLIENTS.into_iter().flat_map(|http| BROKEN.map(|act| (http, act))) {
        let server = RawServer::start(&[broken, broken, WHOLE]).await;
        let got = send(http, &collecting(), &server.url).await.unwrap();
        assert_eq!(got.status(), StatusCode::CREATED);
        assert_eq!(delivery(&got), (3, CallOutcome::Responded), "{http:?} {broken:?}");
        assert_eq!(text_of(got).await, "charged");
        assert_eq!(server.requests(), 3);
    }
}

#[tokio::test]
async fn a_body_that_stalls_is_retried_after_the_time_limit() {
    for (http, stalled) in CLIENTS.into_iter().flat_map(|http| STALLED.map(|act| (http, act))) {
        let server = RawServer::start(&[stalled, WHOLE]).await;
        let calls = collecting().with_response_timeout(PAUSE);
        let got = send(http, &calls, &server.url).await.unwrap();
        assert_eq!(delivery(&got), (2, CallOutcome::Responded), "{http:?} {stalled:?}");
        assert_eq!(text_of(got).await, "charged");
        // The layer closes the stalled connection and does not leak it.
        server.all_have_left().await;
    }
}

/// The head of the last response is known, so the error has its status, and the outcome follows
/// from it.
#[tokio::test]
async fn a_call_that_never_gets_a_whole_body_reports_the_status_and_the_cause() {
    const FAILURE: Act = Reset("HTTP/1.1 500 Oops\r\ncontent-length: 100\r\n\r\nhalf");
    const LIMITED: Act = Reset("HTTP/1.1 429 Slow down\r\ncontent-length: 100\r\n\r\nhalf");
    let lost = "; the server has processed it, but the response was lost: the body of the response with status 201";
    for http in CLIENTS {
        for (act, status, outcome, text) in [
            (BROKEN[0], 201, CallOutcome::Responded, lost),
            (STALLED[0], 201, CallOutcome::Responded, lost),
            (FAILURE, 500, CallOutcome::Unknown, "; outcome unknown: the body"),
            (LIMITED, 429, CallOutcome::NotTaken, "; no effect: the body"),
        ] {
            let server = RawServer::start(&[act]).await;
            let calls = collecting().with_response_timeout(PAUSE);
            let failed = send(http, &calls, &server.url).await.unwrap_err();
            assert_eq!(
                (failed.attempts, failed.status, failed.outcome),
                (3, Some(status), outcome),
                "{failed:?}"
            );
            assert_eq!(failed.is_timeout, matches!(act, Stall(_)), "{failed:?}");
            let start = format!("the HTTP call failed after 3 attempts{text}");
            assert!(failed.text.starts_with(&start), "{}", failed.text);
            assert!(!failed.text.contains("half"), "no part of the body: {}", failed.text);
            assert_eq!(server.requests(), 3);
        }
    }
}

#[tokio::test]
async fn a_request_that_must_not_be_repeated_is_sent_once_when_its_response_breaks_off() {
    for (http, broken) in CLIENTS.into_iter().flat_map(|http| BROKEN.map(|act| (http, act))) {
        let server = RawServer::start(&[broken, WHOLE]).await;
        let failed = send_as(http, &collecting(), Method::POST, &server.url, None).await;
        let failed = failed.unwrap_err();
        assert_eq!((failed.attempts, failed.outcome), (1, CallOutcome::Responded));
        assert_eq!(server.requests(), 1);
        let server = RawServer::start(&[broken, WHOLE]).await;
        let got = send_as(http, &collecting(), Method::GET, &server.url, None)
            .await
            .unwrap();
        assert_eq!(delivery(&got).0, 2, "GET is idempotent");
    }
}

/// The server is not at fault if a body is over the byte limit.
#[tokio::test]
async fn a_body_over_the_byte_limit_streams_on_and_is_not_retried() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    for http in CLIENTS {
        let server = RawServer::start(&[Endless(HEAD, "a\r\n0123456789\r\n")]).await;
        let got = send(http, &collecting(), &server.url).await.unwrap();
        assert_eq!(delivery(&got), (1, CallOutcome::Responded));
        let (mut body, mut read) = (got.into_body(), Vec::new());
        while read.len() < 50 * LIMIT {
            read.extend(body.frame().await.unwrap().unwrap().into_data().unwrap());
        }
        assert!(read.chunks_exact(10).all(|chunk| chunk == b"0123456789"));
        drop(body);
        server.all_have_left().await;
        assert_eq!(server.requests(), 1);

        // The declared length is over the limit, so the layer waits for no byte of the body.
        let declared = Stall("HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\nfront");
        let server = RawServer::start(&[declared]).await;
        let got = send(http, &collecting(), &server.url).await.unwrap();
        let mut body = got.into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "front");
        assert_eq!(server.requests(), 1);
    }
}

/// The layer cannot collect such a body. The caller sees that the body is incomplete.
#[tokio::test]
async fn a_declared_length_over_the_limit_that_is_wrong_is_an_error_of_the_stream() {
    const WRONG: Act = Close("HTTP/1.1 201 Created\r\ncontent-length: 18446744073709551\r\n\r\ncharged");
    for http in CLIENTS {
        let server = RawServer::start(&[WRONG, WHOLE]).await;
        let got = send(http, &collecting(), &server.url).await.unwrap();
        got.into_body().collect().await.unwrap_err();
        assert_eq!(server.requests(), 1);
    }
    let server = RawServer::start(&[WRONG, WHOLE]).await;
    let http = ReqwestService::build(reqwest::Client::builder().no_proxy()).unwrap();
    let client = ServiceBuilder::new().layer(once()).service(http);
    let send = || {
        client
            .clone()
            .oneshot(request::<reqwest::Body>(&Method::POST, &server.url, Some("k")))
    };
    send().await.unwrap().into_body().collect().await.unwrap_err();
    assert!(matches!(send().await, Err(OnceError::NotStored)));
    assert_eq!(server.requests(), 1);
}

/// Every byte comes in time, but the body never ends.
#[tokio::test]
async fn a_body_that_trickles_without_end_is_retried_after_the_time_limit() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    for http in CLIENTS {
        let server = RawServer::start(&[Trickle(HEAD, "1\r\nx\r\n"), WHOLE]).await;
        let calls = collecting().with_response_timeout(PAUSE);
        let got = send(http, &calls, &server.url).await.unwrap();
        assert_eq!(delivery(&got), (2, CallOutcome::Responded));
        assert_eq!(text_of(got).await, "charged");
        server.all_have_left().await;
    }
}

#[tokio::test]
async fn a_stream_passes_at_once() {
    const EVENTS: Act = Stall(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n",
    );
    for http in CLIENTS {
        let server = RawServer::start(&[EVENTS]).await;
        let mut body = send(http, &collecting(), &server.url).await.unwrap().into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "data: 1\n\n");
        assert_eq!(server.requests(), 1);
    }
}

#[tokio::test]
async fn a_response_without_a_body_is_complete() {
    for http in CLIENTS {
        for (method, head) in [
            (Method::HEAD, "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"),
            (Method::GET, "HTTP/1.1 304 Not Modified\r\ncontent-length: 100\r\n\r\n"),
            (Method::POST, "HTTP/1.1 204 No Content\r\n\r\n"),
            (Method::POST, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ] {
            let server = RawServer::start(&[Stall(head)]).await;
            let calls = collecting();
            let got = send_as(http, &calls, method, &server.url, Some("k"));
            let got = timeout(PATIENCE, got)
                .await
                .expect("the response ends with its head")
                .unwrap();
            assert_eq!(delivery(&got).0, 1);
            assert_eq!(text_of(got).await, "");
        }
    }
}

#[tokio::test]
async fn a_collected_response_keeps_its_head_and_trailers() {
    const TRAILED: Act = Close(
        "HTTP/1.1 201 Created\r\nx-id: 7\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n\
         4\r\nchar\r\n3\r\nged\r\n0\r\nx-sum: 9\r\n\r\n",
    );
    // A client reads no more than the declared length.
    const LONGER: Act = Close("HTTP/1.1 201 Created\r\ncontent-length: 7\r\n\r\nchargedtwice");
    for http in CLIENTS {
        let server = RawServer::start(&[TRAILED]).await;
        let got = send(http, &collecting(), &server.url).await.unwrap();
        assert_eq!(
            (got.status(), &got.headers()["x-id"]),
            (StatusCode::CREATED, &"7".parse().unwrap())
        );
        let body = got.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["x-sum"], "9");
        assert_eq!(body.to_bytes(), "charged");

        let server = RawServer::start(&[LONGER]).await;
        let got = send(http, &collecting(), &server.url).await.unwrap();
        assert_eq!((delivery(&got).0, text_of(got).await), (1, "charged".into()));
    }
}

/// Without `collect_responses`, the layer judges the head alone.
#[tokio::test]
async fn without_collecting_a_body_that_breaks_off_reaches_the_caller() {
    let server = RawServer::start(&[BROKEN[0], WHOLE]).await;
    let http = ReqwestService::build(reqwest::Client::builder().no_proxy()).unwrap();
    let client = ServiceBuilder::new().layer(calls(3)).service(http);
    let request = request::<reqwest::Body>(&Method::POST, &server.url, Some("k"));
    let got = client.oneshot(request).await.unwrap();
    assert_eq!(delivery(&got), (1, CallOutcome::Responded));
    got.into_body().collect().await.unwrap_err();
    assert_eq!(server.requests(), 1);
}

/// Returns the results of `N` equal calls through a [`OnceLayer`], one after the other, with or
/// without a `CallLayer` inside.
async fn repeated<const N: usize>(
    layer: OnceLayer<MemoryStore>,
    url: &str,
    calls: Option<CollectingCallLayer>,
) -> [Result<Bytes, &'static str>; N] {
    fn name<T: std::fmt::Debug, E: std::fmt::Debug>(error: &OnceError<T, E>) -> &'static str {
        let (name, may_have_happened) = match error {
            OnceError::Failed(_) => ("failed", false),
            OnceError::NotStored => ("not stored", true),
            OnceError::Unknown(_) => ("unknown", true),
            other => panic!("{other:?}"),
        };
        assert_eq!(error.may_have_happened(), may_have_happened);
        name
    }
    let http = ReqwestService::build(reqwest::Client::builder().no_proxy()).unwrap();
    let mut results = Vec::new();
    for _ in 0..N {
        let request = request::<reqwest::Body>(&Method::POST, url, Some("k"));
        let http = http.clone();
        let got = match calls.clone() {
            Some(calls) => {
                let client = ServiceBuilder::new().layer(layer.clone()).layer(calls).service(http);
                client.oneshot(request).await.map_err(|error| name(&error))
            }
            None => {
                let client = ServiceBuilder::new().layer(layer.clone()).service(http);
                client.oneshot(request).await.map_err(|error| name(&error))
            }
        };
        results.push(match got {
            Ok(response) => Ok(response.into_body().collect().await.unwrap().to_bytes()),
            Err(name) => Err(name),
        });
    }
    results.try_into().unwrap()
}

/// The first response shows that the call was made, so nothing is sent again, and no part of a body
/// is ever replayed.
#[tokio::test]
async fn a_call_made_once_is_never_recorded_with_a_truncated_response() {
    for broken in BROKEN {
        let layers: [fn() -> OnceLayer<MemoryStore>; 2] = [once, || once().at_least_once()];
        for layer in layers {
            let server = RawServer::start(&[broken, WHOLE]).await;
            let got = repeated(layer(), &server.url, None).await;
            assert_eq!(got, [Err("not stored"), Err("not stored")]);
            assert_eq!(server.requests(), 1, "{broken:?}");
            let server = RawServer::start(&[broken, WHOLE]).await;
            let got = repeated(layer(), &server.url, Some(collecting())).await;
            assert_eq!(got, [Err("unknown"), Err("not stored")]);
            assert_eq!(server.requests(), 1, "{broken:?} behind a CallLayer");
        }
        // The head of the lost response shows that the server did not take the request.
        const LIMITED: Act = Reset("HTTP/1.1 429 Slow down\r\ncontent-length: 100\r\n\r\nhalf");
        let server = RawServer::start(&[LIMITED, WHOLE]).await;
        let got = repeated(once(), &server.url, Some(collecting())).await;
        assert_eq!(
            (got, server.requests()),
            ([Ok("charged".into()), Ok("charged".into())], 2)
        );
        // The third party replays its response under the key, so the inner layer sends the request
        // again.
        let server = RawServer::start(&[broken, WHOLE]).await;
        let got = repeated(once().assume_keys_honoured(), &server.url, Some(collecting())).await;
        assert_eq!(got, [Ok("charged".into()), Ok("charged".into())]);
        assert_eq!(server.requests(), 2, "{broken:?} under honoured keys");
    }
}

/// A gateway that responds before it has read the upload and then resets the connection breaks off
/// its own response. The layer gave up such a call, so its key was unknown for the retention.
#[tokio::test]
async fn a_refusal_whose_body_breaks_off_frees_the_key() {
    const REFUSALS: [Act; 4] = [
        Reset("HTTP/1.1 401 Unauthorized\r\ncontent-length: 100\r\n\r\nhalf"),
        Reset("HTTP/1.1 403 Forbidden\r\ncontent-length: 100\r\n\r\nhalf"),
        Reset("HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n"),
        Reset("HTTP/1.1 413 Content Too Large\r\ncontent-length: 100\r\n\r\nhalf"),
    ];
    for refusal in REFUSALS {
        let server = RawServer::start(&[refusal, WHOLE]).await;
        let got = repeated(once(), &server.url, Some(collecting())).await;
        assert_eq!(got, [Err("failed"), Ok("charged".into())], "{refusal:?}");
        assert_eq!(server.requests(), 2);
        // Under honoured keys, the inner layer repeats the request.
        let server = RawServer::start(&[refusal, refusal, refusal, WHOLE]).await;
        let got = repeated(once().assume_keys_honoured(), &server.url, Some(collecting())).await;
        assert_eq!(got, [Err("failed"), Ok("charged".into())], "{refusal:?}");
        for http in CLIENTS {
            let server = RawServer::start(&[refusal]).await;
            let failed = send(http, &collecting(), &server.url).await.unwrap_err();
            assert_eq!(failed.outcome, CallOutcome::NotTaken);
            let start = "the HTTP call failed after 3 attempts; no effect: the body";
            assert!(failed.text.starts_with(start), "{}", failed.text);
        }
    }
}

/// A proxy may send an unregistered status after it has passed the request on. A refusal of a
/// repeated request therefore does not show what the first one did.
#[tokio::test]
async fn a_refusal_after_an_unclear_response_frees_no_key() {
    const UNCLEAR: Act = Reset("HTTP/1.1 499 Closed\r\ncontent-length: 100\r\n\r\nhalf");
    const REFUSAL: Act = Close("HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\nno");
    for later in [REFUSAL, UNCLEAR] {
        let server = RawServer::start(&[UNCLEAR, later]).await;
        let got = repeated(once().assume_keys_honoured(), &server.url, Some(collecting())).await;
        let first = if matches!(later, Close(_)) {
            Ok("no".into())
        } else {
            Err("unknown")
        };
        assert_eq!(got, [first, Err("unknown")]);
        let server = RawServer::start(&[UNCLEAR]).await;
        let failed = send(Http::Hyper, &collecting(), &server.url).await.unwrap_err();
        assert_eq!(failed.outcome, CallOutcome::Unknown);
    }
}

/// The layer recorded such a call as made without a response, so later calls never asked the third
/// party for its response.
#[tokio::test]
async fn a_body_that_stays_broken_under_honoured_keys_is_requested_again() {
    let honoured = || once().assume_keys_honoured();
    for broken in BROKEN {
        let acts = [broken, broken, broken, WHOLE];
        let server = RawServer::start(&acts).await;
        let got = repeated(honoured().at_least_once(), &server.url, Some(collecting())).await;
        let expected = [Err("unknown"), Ok("charged".into()), Ok("charged".into())];
        assert_eq!((got, server.requests()), (expected, 4), "{broken:?}");
        let server = RawServer::start(&acts).await;
        let got = repeated(honoured(), &server.url, Some(collecting())).await;
        let expected = [Err("unknown"), Err("unknown")];
        assert_eq!((got, server.requests()), (expected, 3), "{broken:?}");
        // The outcome is the same without a `CallLayer`.
        let server = RawServer::start(&[broken, WHOLE]).await;
        let got = repeated(honoured().at_least_once(), &server.url, None).await;
        let expected = [Err("not stored"), Ok("charged".into())];
        assert_eq!((got, server.requests()), (expected, 2), "{broken:?}");
    }
}

/// The layer recorded the call as made, although a 422 may only mean that the lost attempt arrived
/// before.
#[tokio::test]
async fn an_unclear_response_stays_unclear_when_its_body_breaks_off() {
    const LOST: Act = Reset("");
    const REFUSED: &str = "HTTP/1.1 422 Unprocessable Content\r\ncontent-length: 2\r\n\r\n";
    let again = || once().at_least_once().without_sending_key();
    for doubtful in [
        Close("HTTP/1.1 422 Unprocessable Content\r\ncontent-length: 2\r\n\r\nno"),
        Reset(REFUSED),
        Close(REFUSED),
        Reset("HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\n"),
    ] {
        let server = RawServer::start(&[LOST, doubtful, WHOLE]).await;
        let got = repeated(again(), &server.url, Some(collecting())).await;
        let expected = [Err("unknown"), Err("unknown"), Ok("charged".into())];
        assert_eq!((got, server.requests()), (expected, 3), "{doubtful:?}");
    }
    // A success shows that the call took effect.
    let server = RawServer::start(&[LOST, BROKEN[0], WHOLE]).await;
    let got = repeated(again(), &server.url, Some(collecting())).await;
    let expected = [Err("unknown"), Err("unknown"), Err("not stored")];
    assert_eq!((got, server.requests()), (expected, 2));
}

/// A later call sent the request once more, although the call was made.
#[tokio::test]
async fn a_response_that_settles_the_effect_ends_the_call_when_its_body_breaks_off() {
    const LOST: Act = Reset("");
    const REFUSED: Act = Reset("HTTP/1.1 422 Unprocessable Content\r\ncontent-length: 2\r\n\r\n");
    let again = || once().at_least_once();
    // The third party sees the key, so the response also settles the lost attempt.
    for response in [REFUSED, BROKEN[0]] {
        let server = RawServer::start(&[LOST, response, WHOLE]).await;
        let got = repeated(again(), &server.url, Some(collecting())).await;
        let expected = [Err("unknown"), Err("unknown"), Err("not stored")];
        assert_eq!((got, server.requests()), (expected, 2), "{response:?}");
        // No attempt was lost.
        let server = RawServer::start(&[response, WHOLE]).await;
        let got = repeated(again().without_sending_key(), &server.url, Some(collecting())).await;
        let expected = [Err("unknown"), Err("not stored")];
        assert_eq!((got, server.requests()), (expected, 1), "{response:?}");
    }
}

fn once() -> OnceLayer<MemoryStore> {
    OnceLayer::new(MemoryStore::new(), ProviderProfile::stripe()).with_response_timeout(PATIENCE)
}

#[tokio::test]
async fn a_call_made_once_streams_a_body_that_stalls_and_does_not_store_it() {
    for stalled in STALLED {
        let server = RawServer::start(&[stalled, WHOLE]).await;
        let http = ReqwestService::build(reqwest::Client::builder().no_proxy()).unwrap();
        let layer = once().with_response_timeout(PAUSE);
        let client = ServiceBuilder::new().layer(layer).service(http);
        let send = || {
            client
                .clone()
                .oneshot(request::<reqwest::Body>(&Method::POST, &server.url, Some("k")))
        };
        let got = timeout(PATIENCE, send()).await.expect("the response streams").unwrap();
        assert_eq!(got.status(), StatusCode::CREATED);
        assert!(matches!(send().await, Err(OnceError::NotStored)), "{stalled:?}");
        drop(got);
        server.all_have_left().await;
        assert_eq!(server.requests(), 1);
    }
}

/// HTTP/2 resets the stream of one response and keeps the connection.
#[tokio::test]
async fn a_body_that_breaks_off_over_http2_is_retried() {
    for declared in [None, Some("100"), Some("3")] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let arrivals = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&arrivals);
        let service = service_fn(move |_: Request<Incoming>| {
            let is_broken = counted.fetch_add(1, Ordering::SeqCst) == 0;
            async move {
                let end = (is_broken && declared.is_none()).then(|| Err(io::Error::other("broken")));
                let frames = [Ok(Frame::data(Bytes::from("charged")))].into_iter().chain(end);
                let mut response = Response::new(StreamBody::new(stream::iter(frames)));
                if let (true, Some(declared)) = (is_broken, declared) {
                    let declared = declared.parse().unwrap();
                    response.headers_mut().insert(http::header::CONTENT_LENGTH, declared);
                }
                Ok::<_, Infallible>(response)
            }
        });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service.clone()));
            }
        });
        let http = Client::builder(TokioExecutor::new())
            .http2_only(true)
            .build_http::<Full<Bytes>>();
        let client = ServiceBuilder::new()
            .layer(collecting())
            .layer(MapResponseBodyLayer::new(BufferedBody::new))
            .service(http);
        let got = timeout(PATIENCE, client.oneshot(request(&Method::POST, &url, Some("k"))));
        let got = got.await.expect("the call ends").unwrap();
        assert_eq!(delivery(&got), (2, CallOutcome::Responded), "{declared:?}");
        assert_eq!(got.into_body().collect().await.unwrap().to_bytes(), "charged");
        assert_eq!(arrivals.load(Ordering::SeqCst), 2);
    }
}
