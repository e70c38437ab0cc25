//! Calls whose server streams its messages.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Code;
use tonic_types::StatusExt;
use tower::{Layer, ServiceExt};
use tower_idempotency::{IdempotencyLayer, MemoryStore, StoreResponse, StreamResponse};

use super::kit::{Client, Payments, WATCH, is_replay, serve, with_key};
use crate::support::{AnyBody, Handler, full, post, send};

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new()).grpc()
}

/// The client got no message before the stream had ended.
#[tokio::test]
async fn an_endless_stream_delivers_its_messages_as_they_come() {
    let (send, messages) = mpsc::unbounded_channel();
    let messages = Arc::new(std::sync::Mutex::new(Some(messages)));
    let payments = Payments::new().watching(move |_| {
        UnboundedReceiverStream::new(messages.lock().unwrap().take().expect("the handler runs once"))
    });
    let client = Client::of(serve(layer(), payments.clone()).await).await;
    send.send(Ok(Bytes::from_static(b"1"))).unwrap();
    let begun = timeout(Duration::from_secs(5), client.watch(with_key("k", ""))).await;
    let mut got = begun.expect("the stream begins").unwrap().into_inner();
    for expected in ["1", "2", "3"] {
        let message = timeout(Duration::from_secs(5), got.message())
            .await
            .expect("the message comes while the stream goes on");
        assert_eq!(message.unwrap().unwrap(), expected);
        // Messages 2 and 3; the stream stays open.
        send.send(Ok(Bytes::from((expected.parse::<u8>().unwrap() + 1).to_string())))
            .unwrap();
    }
    let duplicate = client.watch(with_key("k", "")).await.unwrap_err();
    assert_eq!(duplicate.code(), Code::FailedPrecondition);
    assert_eq!(
        duplicate.get_details_error_info().unwrap().reason,
        "RESPONSE_NOT_STORED"
    );
    assert_eq!(payments.runs(), 1);
}

#[tokio::test]
async fn a_short_stream_is_stored_completely() {
    let payments = Payments::new().watching(|_| stream::iter(["1", "2", "3"].map(|item| Ok(Bytes::from(item)))));
    let client = Client::of(serve(layer(), payments.clone()).await).await;
    for is_again in [false, true] {
        let response = client.watch(with_key("k", "")).await.unwrap();
        assert_eq!(is_replay(response.metadata()), is_again);
        let items: Vec<_> = response.into_inner().map(Result::unwrap).collect().await;
        assert_eq!(items, ["1", "2", "3"]);
    }
    assert_eq!(payments.runs(), 1);
}

/// Returns a gRPC response whose pieces come after their delays. Without a status, the body stalls
/// at its end.
fn pieces(pieces: &'static [(u64, &'static [u8])], status: Option<&'static str>) -> http::Response<AnyBody> {
    let data = stream::iter(pieces).then(|(delay, piece)| async move {
        sleep(Duration::from_millis(*delay)).await;
        Ok(Frame::data(Bytes::from_static(piece)))
    });
    let body = match status {
        Some(status) => {
            let trailers = http::HeaderMap::from_iter([("grpc-status".parse().unwrap(), status.parse().unwrap())]);
            StreamBody::new(data.chain(stream::iter([Ok(Frame::trailers(trailers))]))).boxed_unsync()
        }
        None => StreamBody::new(data.chain(stream::pending())).boxed_unsync(),
    };
    let mut response = http::Response::new(body);
    response
        .headers_mut()
        .insert("content-type", "application/grpc".parse().unwrap());
    response
}

/// Measures how long the head of the response takes, and whether a duplicate then gets the stored
/// response.
#[expect(clippy::disallowed_methods, reason = "the paused time of the test")]
async fn first_byte(
    layer: IdempotencyLayer<MemoryStore>,
    respond: impl Fn(usize) -> http::Response<AnyBody> + Send + Sync + 'static,
) -> (u128, bool) {
    let service = layer.layer(Handler::new().responding(respond));
    let start = Instant::now();
    let mut response = service.clone().oneshot(post("k", "")).await.unwrap();
    let frame = response.body_mut().frame().await.unwrap().unwrap();
    assert!(frame.is_data());
    let after = start.elapsed().as_millis();
    let again = service.oneshot(post("k", "")).await.unwrap();
    (after, again.headers().contains_key("idempotent-replayed"))
}

const MESSAGE: &[u8] = b"\0\0\0\0\x01x";

#[tokio::test(start_paused = true)]
async fn a_response_is_held_back_for_at_most_a_tenth_of_a_second_after_its_first_message() {
    assert_eq!(
        first_byte(layer(), |_| pieces(&[(0, MESSAGE)], Some("0"))).await,
        (0, true)
    );
    // The second message and the trailers come in time.
    assert_eq!(
        first_byte(layer(), |_| pieces(&[(0, MESSAGE), (90, MESSAGE)], Some("0"))).await,
        (90, true)
    );
    assert_eq!(
        first_byte(layer(), |_| pieces(&[(0, MESSAGE), (120, MESSAGE)], Some("0"))).await,
        (100, false)
    );
    assert_eq!(
        first_byte(layer(), |_| pieces(&[(0, MESSAGE)], None)).await,
        (100, false)
    );
    // Many messages, each soon after the previous one.
    assert_eq!(
        first_byte(layer(), |_| pieces(&[(40, MESSAGE); 9], None)).await,
        (140, false)
    );
    // The first message comes in two pieces, so it is complete only after the second piece.
    let slow = |_: usize| pieces(&[(0, b"\0\0\0"), (500, b"\0\x01x")], Some("0"));
    assert_eq!(first_byte(layer(), slow).await, (500, true));
    // Before the first message, the response timeout applies.
    assert_eq!(
        first_byte(layer(), |_| pieces(&[(9_000, MESSAGE)], Some("0"))).await,
        (9_000, true)
    );
    assert_eq!(
        first_byte(layer(), |_| pieces(&[(11_000, MESSAGE)], Some("0"))).await,
        (11_000, false)
    );
    let short = layer().with_response_timeout(Duration::from_millis(10));
    assert_eq!(first_byte(short, |_| pieces(&[(0, MESSAGE)], None)).await, (10, false));
}

#[tokio::test(start_paused = true)]
async fn a_method_or_a_mark_streams_from_the_first_byte() {
    let streaming = layer().add_grpc_method("/payments", |watch| watch.with_stream_types(["application/grpc"]));
    assert_eq!(
        first_byte(streaming, |_| pieces(&[(0, MESSAGE)], None)).await,
        (0, false)
    );
    let marked = |_: usize| {
        let mut response = pieces(&[(0, MESSAGE)], None);
        response.extensions_mut().insert(StreamResponse);
        response
    };
    assert_eq!(first_byte(layer(), marked).await, (0, false));
}

/// The caller of an endless stream waited for the response timeout although the verdict needed no
/// trailers.
#[tokio::test(start_paused = true)]
async fn a_predicate_or_a_mark_to_store_does_not_hold_a_stream_back_longer() {
    let marked = |_: usize| {
        let mut response = pieces(&[(0, MESSAGE)], None);
        response.extensions_mut().insert(StoreResponse);
        response
    };
    let streaming = |layer: IdempotencyLayer<MemoryStore>| {
        layer.add_grpc_method("/payments", |watch| watch.with_stream_types(["application/grpc"]))
    };
    let predicate = || layer().store_if(|_| true);
    let endless = |_: usize| pieces(&[(0, MESSAGE)], None);
    assert_eq!(first_byte(predicate(), endless).await, (100, false));
    assert_eq!(first_byte(layer(), marked).await, (100, false));
    assert_eq!(first_byte(streaming(predicate()), endless).await, (0, false));
    assert_eq!(first_byte(streaming(layer()), marked).await, (0, false));
}

/// The server sends an error in place of a stream.
#[tokio::test]
async fn a_definite_error_of_a_streaming_method_is_replayed() {
    let streaming = layer().add_grpc_method(WATCH, |watch| watch.with_stream_types(["application/grpc"]));
    let handler = Handler::new().responding(|_| tonic::Status::not_found("no account").into_http());
    let service = streaming.layer(handler.clone());
    let request = || {
        let request = http::Request::post(WATCH).header("idempotency-key", "k");
        request.body(full("")).unwrap()
    };
    for is_again in [false, true] {
        let got = send(&service, request()).await;
        assert_eq!(
            (got.is_replay(), &got.head.headers["grpc-status"]),
            (is_again, &"5".parse().unwrap())
        );
    }
    assert_eq!(handler.runs(), 1);
}

/// The layer never returned from the first poll of the body.
#[tokio::test(start_paused = true)]
async fn an_endless_stream_that_is_always_ready_begins() {
    let endless = |_: usize| {
        let messages = stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(b"\0\0\0\0\0"))));
        let response = http::Response::builder().header("content-type", "application/grpc");
        response.body(StreamBody::new(messages).boxed_unsync()).unwrap()
    };
    let service = layer()
        .with_response_limit(1 << 16)
        .layer(Handler::new().responding(endless));
    let mut response = service.oneshot(post("k", "")).await.unwrap();
    assert!(response.body_mut().frame().await.unwrap().unwrap().is_data());
}

/// The layer held such a stream back until its end.
#[tokio::test]
async fn an_http_stream_with_a_status_field_is_a_stream() {
    let handler = Handler::new().responding(|_| {
        let response = http::Response::builder()
            .header("content-type", "application/x-ndjson")
            .header("grpc-status", "0");
        response.body(full("{}\n")).unwrap()
    });
    let service = IdempotencyLayer::new(MemoryStore::new()).layer(handler);
    assert_eq!(send(&service, post("k", "")).await.status(), 200);
    assert_eq!(send(&service, post("k", "")).await.code(), "response-not-stored");
}
