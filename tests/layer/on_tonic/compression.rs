//! Requests and responses whose messages are compressed.

use std::time::Duration;

use bytes::Bytes;
use tonic::codec::CompressionEncoding::{Deflate, Gzip, Zstd};
use tonic::{Code, Response};
use tonic_types::StatusExt;
use tower::Layer;
use tower_idempotency::{IdempotencyLayer, MemoryStore};

use super::kit::{Client, Payments, is_replay, serve, until, with_key};
use crate::support::{AnyBody, Handler, full, send, start};

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new()).grpc()
}

#[tokio::test]
async fn a_retry_may_use_another_compression_and_read_other_encodings() {
    let payments = Payments::new().charging(|run, request| async move {
        Ok(Response::new(
            format!("{run}: {}", "paid ".repeat(request.get_ref().len())).into(),
        ))
    });
    let plain = Client::of(serve(layer(), payments.clone()).await).await;
    let first = plain
        .clone()
        .sending(Gzip)
        .reading(Gzip)
        .charge(with_key("k", "100 and more"))
        .await
        .unwrap();
    assert_eq!(first.metadata().get("grpc-encoding").unwrap(), "gzip");
    for (client, encoding) in [
        (plain.clone(), None),
        (plain.clone().reading(Gzip), Some("gzip")),
        (plain.clone().sending(Deflate).reading(Deflate), None),
        (plain.clone().sending(Zstd), None),
        (plain.clone().sending(Zstd).reading(Zstd).reading(Gzip), Some("gzip")),
    ] {
        let again = client.charge(with_key("k", "100 and more")).await.unwrap();
        assert!(is_replay(again.metadata()));
        let sent = again.metadata().get("grpc-encoding").map(|name| name.to_str().unwrap());
        assert_eq!(sent, encoding);
        assert_eq!(again.get_ref(), first.get_ref());
    }
    let other = plain
        .sending(Gzip)
        .charge(with_key("k", "200 and more"))
        .await
        .unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument);
    assert_eq!(payments.runs(), 1);
}

fn request(body: &'static [u8], headers: &[(&'static str, &'static str)]) -> http::Request<AnyBody> {
    let mut request = http::Request::post("/test.Payments/Charge").header("idempotency-key", "k");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(full(Bytes::from_static(body))).unwrap()
}

#[tokio::test]
async fn a_response_in_an_encoding_that_the_retry_cannot_read_is_refused_and_nothing_runs_again() {
    let handler = Handler::new().responding(|_| {
        let response = http::Response::builder()
            .header("grpc-encoding", "snappy")
            .header("grpc-status", "0");
        response.body(full(Bytes::from_static(b"\x01\0\0\0\x04paid"))).unwrap()
    });
    let service = layer().layer(handler.clone());
    let reading = [("grpc-accept-encoding", "identity,snappy")];
    let first = send(&service, request(b"\0\0\0\0\x01x", &reading)).await;
    let refused = send(&service, request(b"\0\0\0\0\x01x", &[("grpc-accept-encoding", "gzip")])).await;
    assert_eq!((refused.status(), refused.code()), (200, "encoding-not-accepted"));
    let status = tonic::Status::from_header_map(&refused.head.headers).unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(status.get_details_error_info().unwrap().reason, "ENCODING_NOT_ACCEPTED");
    let again = send(&service, request(b"\0\0\0\0\x01x", &reading)).await;
    assert_eq!((again.is_replay(), again.body), (true, first.body));
    assert_eq!(handler.runs(), 1);
}

/// A client that cannot read a response that is not stored gets a refusal. The refusal must not
/// advise the client to look up a result, because no result exists.
#[tokio::test(start_paused = true)]
async fn a_waiter_that_cannot_read_a_response_that_is_not_stored_retries() {
    let handler = Handler::new().taking(Duration::from_secs(1)).responding(|_| {
        let response = http::Response::builder()
            .header("grpc-encoding", "snappy")
            .header("grpc-status", "14");
        response.body(full(Bytes::from_static(b"\x01\0\0\0\x04paid"))).unwrap()
    });
    let service = layer().layer(handler.clone());
    let owner = start(&service, request(b"", &[("grpc-accept-encoding", "snappy")]));
    until(|| handler.runs() == 1).await;
    let waiter = send(&service, request(b"", &[("grpc-accept-encoding", "gzip")])).await;
    assert_eq!(waiter.code(), "request-outstanding");
    assert_eq!(owner.await.unwrap().head.headers["grpc-status"], "14");
    assert_eq!(handler.runs(), 1);
}

#[tokio::test]
async fn a_request_that_cannot_be_decompressed_is_compared_by_its_bytes_and_encoding() {
    for (body, other) in [
        (&b"\x01\0\0\0\x01x"[..], &b"\x01\0\0\0\x01y"[..]),
        (b"\0\0\0\0\x09x", b"\0\0\0\0\x09y"),
        (b"\x07", b"\x08"),
    ] {
        let handler = Handler::new().responding(|_| {
            http::Response::builder()
                .header("grpc-status", "0")
                .body(full(Bytes::new()))
                .unwrap()
        });
        let service = layer().layer(handler.clone());
        let encoded = |name| [("grpc-encoding", name)];
        send(&service, request(body, &encoded("snappy"))).await;
        assert!(send(&service, request(body, &encoded("snappy"))).await.is_replay());
        assert_eq!(
            send(&service, request(other, &encoded("snappy"))).await.code(),
            "key-reused"
        );
        assert_eq!(
            send(&service, request(body, &encoded("gzip"))).await.code(),
            "key-reused"
        );
        assert_eq!(handler.runs(), 1);
    }
}
