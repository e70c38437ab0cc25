//! gRPC: every response has status 200, whatever the result.

use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tower_idempotency::grpc_response;

use super::*;

/// A response of one message, as a tonic service sends it.
fn message() -> Response {
    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
    let frames = [
        Frame::data(Bytes::from_static(b"\0\0\0\0\x04paid")),
        Frame::trailers(trailers),
    ];
    let body = StreamBody::new(futures::stream::iter(frames.map(Ok::<_, std::convert::Infallible>)));
    let mut response = Response::new(Body::new(body));
    response
        .headers_mut()
        .insert("content-type", "application/grpc".parse().unwrap());
    response
}

fn no_account() -> Response {
    tonic::Status::not_found("no account").into_http()
}

async fn pay(State(app): State<App>, lease: Lease, request: Bytes) -> Response {
    app.runs.fetch_add(1, Ordering::SeqCst);
    let mut transaction = app.pool.begin().await.unwrap();
    insert(&mut transaction).await;
    let recorded = match &request[..] {
        b"refused" => no_account(),
        _ => grpc_response(b"paid").map(Body::from),
    };
    drop(lease.complete_response_in(&mut transaction, recorded).await.unwrap());
    if &request[..] == b"commit" {
        transaction.commit().await.unwrap();
        return message();
    }
    transaction.rollback().await.unwrap();
    match &request[..] {
        b"refused" => no_account(),
        b"conflict" => tonic::Status::aborted("another payment came first").into_http(),
        _ => message(),
    }
}

/// Returns the status of the call, its message, and whether it is a replay.
async fn call(router: &Router, request: &'static str) -> (String, Bytes, bool) {
    let sent = Request::post("/payments").header("idempotency-key", request);
    let response = router
        .clone()
        .oneshot(sent.body(Body::from(request)).unwrap())
        .await
        .unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap();
    let fields = body.trailers().cloned().unwrap_or(head.headers.clone());
    let status = fields["grpc-status"].to_str().unwrap().to_owned();
    (
        status,
        body.to_bytes(),
        head.headers.contains_key("idempotent-replayed"),
    )
}

/// The layer replaced the handler's own status by `INTERNAL`, because its 200 looked like a
/// success.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_after_a_rollback_reaches_the_caller_unless_it_is_ok() {
    let bench = Bench::new(Ending::Commit).await;
    let layer = bench.layer().grpc();
    let router = Router::new()
        .route("/payments", post(pay))
        .layer(layer)
        .with_state(bench.app.clone());
    for _ in 0..2 {
        assert_eq!(call(&router, "conflict").await.0, "10");
        assert_eq!(call(&router, "lie").await.0, "13");
    }
    assert_eq!((bench.payments().await, bench.runs()), (0, 4));
}

/// The error was stored although the effect that it reports was rolled back.
#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_error_that_was_rolled_back_is_not_stored() {
    let bench = Bench::new(Ending::Commit).await;
    let layer = bench.layer().grpc();
    let router = Router::new()
        .route("/payments", post(pay))
        .layer(layer)
        .with_state(bench.app.clone());
    for _ in 0..2 {
        let (status, _, is_replay) = call(&router, "refused").await;
        assert_eq!((&status[..], is_replay), ("13", false));
    }
    assert_eq!((bench.payments().await, bench.runs()), (0, 2));
}

/// The layer took every response of a method of streams for a stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_method_of_streams_completes_with_a_message() {
    let bench = Bench::new(Ending::Commit).await;
    let layer = bench.layer().grpc().with_stream_types(["application/grpc"]);
    let router = Router::new()
        .route("/payments", post(pay))
        .layer(layer)
        .with_state(bench.app.clone());
    for _ in 0..2 {
        let (status, message, _) = call(&router, "commit").await;
        assert_eq!((&status[..], &message[..]), ("0", &b"\0\0\0\0\x04paid"[..]));
    }
    assert_eq!((bench.payments().await, bench.runs()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_committed_message_is_replayed_with_its_status() {
    let bench = Bench::new(Ending::Commit).await;
    let layer = bench.layer().grpc();
    let router = Router::new()
        .route("/payments", post(pay))
        .layer(layer)
        .with_state(bench.app.clone());
    let paid = Bytes::from_static(b"\0\0\0\0\x04paid");
    assert_eq!(call(&router, "commit").await, ("0".to_owned(), paid.clone(), false));
    assert_eq!(call(&router, "commit").await, ("0".to_owned(), paid, true));
    assert_eq!((bench.payments().await, bench.runs()), (1, 1));
}
