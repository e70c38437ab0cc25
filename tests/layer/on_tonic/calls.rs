//! Calls from the client of tonic to the server of tonic.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use tokio::sync::Semaphore;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;
use tower::Layer;
use tower_idempotency::protocol::{Outcome, Resolution, ResolveResult, StoredResponse};
use tower_idempotency::{
    DoNotStore, IdempotencyLayer, MarkStatus, MemoryStore, OnError, Recovered, Store, StoreFor, StoreOutcomeOnly,
    StoreResponse, grpc_response,
};

use super::kit::{CHARGE, Client, Payments, is_replay, serve, until, with_key};
use crate::support::{Handler, full, post, send};

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new()).grpc()
}

#[tokio::test]
async fn a_duplicate_gets_the_first_message_and_the_first_metadata() {
    let payments = Payments::new().charging(|run, _| async move {
        let mut response = Response::new(Bytes::from(format!("charge {run}")));
        response.metadata_mut().insert("receipt", "r-1".parse().unwrap());
        response
            .metadata_mut()
            .insert_bin("proof-bin", tonic::metadata::MetadataValue::from_bytes(b"\0\xff"));
        Ok(response)
    });
    let client = Client::of(serve(layer(), payments.clone()).await).await;
    let first = client.charge(with_key("k", "100")).await.unwrap();
    assert!(!is_replay(first.metadata()));
    let again = client.charge(with_key("k", "100")).await.unwrap();
    assert!(is_replay(again.metadata()));
    assert_eq!(again.metadata().get("receipt").unwrap(), "r-1");
    assert_eq!(
        again.metadata().get_bin("proof-bin"),
        first.metadata().get_bin("proof-bin")
    );
    assert_eq!(again.into_inner(), first.into_inner());
    assert_eq!(payments.runs(), 1);
}

#[tokio::test]
async fn a_request_without_a_key_passes_unless_the_key_is_required() {
    let payments = Payments::new();
    let client =
        Client::of(serve(layer().add_grpc_method(CHARGE, IdempotencyLayer::require_key), payments).await).await;
    let refused = client.charge(tonic::Request::new(Bytes::new())).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(refused.get_details_error_info().unwrap().reason, "KEY_MISSING");
    client.watch(tonic::Request::new(Bytes::new())).await.unwrap();
}

#[tokio::test]
async fn another_request_under_the_same_key_is_refused_with_advice() {
    let payments = Payments::new();
    let client = Client::of(serve(layer(), payments.clone()).await).await;
    client.charge(with_key("k", "100")).await.unwrap();
    let refused = client.charge(with_key("k", "200")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("choose a new key"), "{}", refused.message());
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(
        (&info.reason[..], &info.domain[..]),
        ("KEY_REUSED", "tower-idempotency")
    );
    assert_eq!(payments.runs(), 1);
}

#[tokio::test]
async fn a_duplicate_that_does_not_wait_gets_the_retry_delay() {
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let payments = Payments::new().charging(move |_, _| {
        let gate = Arc::clone(&gate);
        async move {
            drop(gate.acquire().await.unwrap());
            Ok(Response::new(Bytes::from_static(b"paid")))
        }
    });
    let client = Client::of(serve(layer().with_wait(Duration::ZERO), payments.clone()).await).await;
    let owner = {
        let client = client.clone();
        tokio::spawn(async move { client.charge(with_key("k", "100")).await })
    };
    until(|| payments.runs() == 1).await;
    let refused = client.charge(with_key("k", "100")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    let delay = refused.get_details_retry_info().unwrap().retry_delay;
    assert_eq!(delay, Some(Duration::from_secs(1)));
    opened.add_permits(1);
    assert_eq!(owner.await.unwrap().unwrap().into_inner(), "paid");
    assert!(is_replay(client.charge(with_key("k", "100")).await.unwrap().metadata()));
}

/// The layer replayed `UNAVAILABLE` for a day.
#[tokio::test]
async fn an_error_is_replayed_only_if_it_is_definite() {
    for (code, runs) in [
        (Code::InvalidArgument, 1),
        (Code::NotFound, 1),
        (Code::AlreadyExists, 1),
        (Code::FailedPrecondition, 1),
        (Code::OutOfRange, 1),
        (Code::Cancelled, 2),
        (Code::DeadlineExceeded, 2),
        (Code::PermissionDenied, 2),
        (Code::ResourceExhausted, 2),
        (Code::Aborted, 2),
        (Code::Unavailable, 2),
        (Code::Unauthenticated, 2),
        // The next deployment may have the method, or the client may retry in an encoding that the
        // server knows.
        (Code::Unimplemented, 2),
        (Code::Internal, 2),
        (Code::Unknown, 2),
        (Code::DataLoss, 2),
    ] {
        let payments = Payments::new()
            .charging(move |run, _| async move { Err(Status::new(code, format!("run {run}"))) })
            // The status follows a message, so it is in the trailers.
            .watching(move |run| {
                stream::iter([
                    Ok(Bytes::from_static(b"begun")),
                    Err(Status::new(code, format!("run {run}"))),
                ])
            });
        let client = Client::of(serve(layer(), payments.clone()).await).await;
        for run in [1, runs] {
            let error = client.charge(with_key("k", "100")).await.unwrap_err();
            assert_eq!((error.code(), error.message()), (code, &format!("run {run}")[..]));
        }
        let before = payments.runs();
        for run in [1, runs] {
            let mut messages = client.watch(with_key("w", "")).await.unwrap().into_inner();
            assert_eq!(messages.message().await.unwrap().unwrap(), "begun");
            let error = messages.message().await.unwrap_err();
            assert_eq!(
                (error.code(), error.message()),
                (code, &format!("run {}", before + run)[..])
            );
        }
        assert_eq!(payments.runs(), 2 * runs, "{code:?}");
    }
}

#[tokio::test]
async fn a_handler_can_mark_its_status_without_showing_the_mark_to_the_client() {
    let payments = Payments::new().charging(|run, request| async move {
        let status = Status::unavailable(format!("run {run}"));
        Err(match &request.get_ref()[..] {
            b"final" => status.with_mark(StoreResponse),
            b"again" => Status::not_found(format!("run {run}")).with_mark(DoNotStore),
            b"secret" => status.with_mark(StoreOutcomeOnly),
            _ => status.with_mark(StoreResponse).with_mark(StoreFor(Duration::ZERO)),
        })
    });
    let client = Client::of(serve(layer(), payments.clone()).await).await;
    let charge = |message: &'static str| {
        let client = client.clone();
        async move { client.charge(with_key(message, message)).await.unwrap_err() }
    };
    let plain = Status::unavailable("run 1");
    let first = charge("final").await;
    assert_eq!(
        (first.code(), first.message(), first.details()),
        (plain.code(), plain.message(), plain.details())
    );
    let mut names: Vec<_> = first.metadata().keys().map(|key| format!("{key:?}")).collect();
    names.retain(|name| !name.contains("date") && !name.contains("content-"));
    assert!(names.is_empty(), "{names:?}");
    assert_eq!(charge("final").await.message(), "run 1");
    assert_eq!(charge("again").await.message(), "run 2");
    assert_eq!(charge("again").await.message(), "run 3");
    assert_eq!(charge("secret").await.message(), "run 4");
    assert_eq!(charge("secret").await.code(), Code::FailedPrecondition);
    assert_eq!(charge("short").await.message(), "run 5");
    assert_eq!(charge("short").await.message(), "run 6");
}

#[tokio::test]
async fn a_call_goes_on_after_its_deadline_and_a_retry_with_another_deadline_gets_the_replay() {
    let gate = Arc::new(Semaphore::new(0));
    let (opened, finished) = (Arc::clone(&gate), Arc::new(AtomicUsize::new(0)));
    let done = Arc::clone(&finished);
    let payments = Payments::new().charging(move |run, _| {
        let (gate, done) = (Arc::clone(&gate), Arc::clone(&done));
        async move {
            drop(gate.acquire().await.unwrap());
            done.fetch_add(1, Ordering::SeqCst);
            Ok(Response::new(format!("charge {run}").into()))
        }
    });
    let client = Client::of(serve(layer(), payments.clone()).await).await;
    let mut hurried = with_key("k", "100");
    hurried.set_timeout(Duration::from_millis(50));
    let error = client.charge(hurried).await.unwrap_err();
    assert!(
        matches!(error.code(), Code::Cancelled | Code::DeadlineExceeded),
        "{error:?}"
    );
    opened.add_permits(1);
    until(|| finished.load(Ordering::SeqCst) == 1).await;
    let mut patient = with_key("k", "100");
    patient.set_timeout(Duration::from_secs(20));
    let again = client.charge(patient).await.unwrap();
    assert_eq!(
        (is_replay(again.metadata()), &again.get_ref()[..]),
        (true, &b"charge 1"[..])
    );
    assert_eq!(payments.runs(), 1);
}

#[tokio::test]
async fn settings_of_a_method_override_a_selector_and_do_not_affect_other_methods() {
    let payments = Payments::new();
    let strict = layer().require_key().settings();
    let layer = layer()
        .with_settings_for(move |_| Some(strict.clone()))
        .add_grpc_method("test.Payments/Charge", |charge| charge.with_retention(Duration::ZERO));
    let client = Client::of(serve(layer, payments.clone()).await).await;
    for _ in 0..2 {
        assert!(!is_replay(
            client.charge(with_key("k", "100")).await.unwrap().metadata()
        ));
    }
    client.charge(tonic::Request::new(Bytes::new())).await.unwrap();
    let refused = client.watch(tonic::Request::new(Bytes::new())).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

/// The layer did not require a key, because the selected settings had lost their methods.
#[tokio::test]
async fn selected_settings_have_their_methods_but_the_methods_of_the_layer_override_them() {
    let chosen = layer()
        .add_grpc_method(CHARGE, IdempotencyLayer::require_key)
        .settings();
    let all_chosen = IdempotencyLayer::new(MemoryStore::new()).with_settings_for(move |_| Some(chosen.clone()));
    let without_key = || tonic::Request::new(Bytes::new());
    let client = Client::of(serve(all_chosen.clone(), Payments::new()).await).await;
    let refused = client.charge(without_key()).await.unwrap_err();
    assert_eq!(refused.get_details_error_info().unwrap().reason, "KEY_MISSING");
    client.watch(without_key()).await.unwrap();

    let own_method = all_chosen.add_grpc_method(CHARGE, IdempotencyLayer::grpc);
    let client = Client::of(serve(own_method, Payments::new()).await).await;
    client.charge(without_key()).await.unwrap();
}

/// The settings of a method are based on those of the layer to which they are added, here the
/// settings for HTTP.
#[tokio::test]
async fn a_method_of_an_http_layer_frees_its_key_only_under_grpc_settings() {
    let http_layer = || IdempotencyLayer::new(MemoryStore::new());
    for (layer, runs) in [
        (http_layer().add_grpc_method(CHARGE, IdempotencyLayer::require_key), 1),
        (
            http_layer().add_grpc_method(CHARGE, |charge| charge.grpc().require_key()),
            2,
        ),
    ] {
        let payments = Payments::new().charging(|_, _| async { Err(Status::unavailable("later")) });
        let client = Client::of(serve(layer, payments.clone()).await).await;
        for _ in 0..2 {
            client.charge(with_key("k", "100")).await.unwrap_err();
        }
        assert_eq!(payments.runs(), runs);
    }
}

/// A response that the application returned as bytes had no trailers, so clients took it for
/// broken.
#[tokio::test]
async fn an_outcome_that_the_application_found_is_replayed_as_a_complete_response() {
    let lost = || Payments::new().charging(|_, _| async { Err(Status::internal("half-way")) });
    let layer = layer().on_error(OnError::Unknown);
    let client = Client::of(serve(layer.clone(), lost()).await).await;
    for (key, response) in [
        ("paid", grpc_response(b"receipt")),
        ("refused", Status::not_found("no account").into_http()),
    ] {
        client.charge(with_key(key, "100")).await.unwrap_err();
        let storage_key = layer.storage_key(None, key).unwrap();
        let fence = layer.store().peek(&storage_key).await.unwrap().unwrap().fence;
        let found = Resolution::Completed(layer.outcome_of(response), Duration::from_secs(60));
        let resolved = layer.store().resolve(&storage_key, fence, &found).await.unwrap();
        assert_eq!(resolved, ResolveResult::Resolved);
    }
    let paid = client.charge(with_key("paid", "100")).await.unwrap();
    assert_eq!(
        (is_replay(paid.metadata()), &paid.get_ref()[..]),
        (true, &b"receipt"[..])
    );
    let refused = client.charge(with_key("refused", "100")).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::NotFound, "no account"));

    let asking = layer.with_recovery(|_| async { Recovered::Happened(grpc_response(b"booked")) });
    let client = Client::of(serve(asking, lost()).await).await;
    client.charge(with_key("asked", "100")).await.unwrap_err();
    for _ in 0..2 {
        let found = client.charge(with_key("asked", "100")).await.unwrap();
        assert_eq!(
            (is_replay(found.metadata()), &found.get_ref()[..]),
            (true, &b"booked"[..])
        );
    }
}

/// A server for gRPC and HTTP resolves keys through its layer, whose own settings are those for
/// HTTP. gRPC clients took the resolved response for broken.
#[tokio::test]
async fn an_outcome_has_the_form_of_its_own_protocol_under_all_settings() {
    let http_layer = || IdempotencyLayer::new(MemoryStore::new());
    let without_a_status = |body: &'static [u8]| {
        let response = http::Response::builder().header("content-type", "application/grpc");
        response.body(Bytes::from_static(body)).unwrap()
    };
    for layer in [http_layer(), layer()] {
        for (response, in_head, in_trailers) in [
            (grpc_response(b"receipt"), None, Some("0")),
            (without_a_status(b"\0\0\0\0\x01x"), None, Some("0")),
            // There is no message, so the status is in the head.
            (without_a_status(b""), Some("0"), None),
            (Status::not_found("no account").into_http(), Some("5"), None),
            // The HTTP case.
            (
                http::Response::builder().status(404).body(Bytes::new()).unwrap(),
                None,
                None,
            ),
            (
                http::Response::builder()
                    .header("content-type", "application/json")
                    .body("{}".into())
                    .unwrap(),
                None,
                None,
            ),
        ] {
            let Outcome::Stored(stored) = layer.outcome_of(response) else {
                panic!("the outcome has no response")
            };
            let status = |fields: Option<&http::HeaderMap>| {
                fields
                    .and_then(|fields| fields.get("grpc-status"))
                    .map(|status| status.to_str().unwrap().to_owned())
            };
            let replayed = replay_of(&layer, stored).await;
            assert_eq!(status(Some(&replayed.head.headers)).as_deref(), in_head);
            assert_eq!(status(replayed.trailers.as_ref()).as_deref(), in_trailers);
        }
    }
}

/// gRPC clients reject a response without a content type.
#[tokio::test]
async fn a_found_response_without_a_content_type_gets_one_only_under_grpc_settings() {
    let http_layer = IdempotencyLayer::new(MemoryStore::new());
    for (layer, content_type) in [(layer(), Some("application/grpc")), (http_layer, None)] {
        for body in [&b""[..], b"\0\0\0\0\x01x"] {
            let Outcome::Stored(stored) = layer.outcome_of(http::Response::new(body.into())) else {
                panic!("the outcome has no response")
            };
            let replayed = replay_of(&layer, stored).await;
            let found = replayed.head.headers.get("content-type");
            assert_eq!(found.map(|found| found.to_str().unwrap()), content_type);
        }
    }
}

/// The layer panicked when it added the missing fields.
#[test]
fn a_found_response_with_the_most_header_fields_is_stored() {
    for body in [&b""[..], b"\0\0\0\0\x01x"] {
        let mut response = http::Response::new(body.into());
        let headers = response.headers_mut();
        for n in 0.. {
            let name = http::HeaderName::try_from(format!("x-{n}")).unwrap();
            if headers.try_insert(name, http::HeaderValue::from_static("1")).is_err() {
                break;
            }
        }
        assert!(matches!(layer().outcome_of(response), Outcome::Stored(_)));
    }
}

/// The layer moved the fields into trailers, which few HTTP clients read.
#[tokio::test]
async fn the_status_fields_stay_in_the_head_of_an_http_response() {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let fields = ["grpc-status", "grpc-message", "grpc-status-details-bin"];
    for content_type in [Some("application/json"), Some("application/grpc-web"), None] {
        let mut response = http::Response::new(Bytes::from_static(b"{}"));
        let headers = response.headers_mut();
        headers.extend(content_type.map(|value| (http::header::CONTENT_TYPE, value.parse().unwrap())));
        for field in fields {
            headers.insert(field, "0".parse().unwrap());
        }
        let Outcome::Stored(stored) = layer.outcome_of(response) else {
            panic!("the outcome has no response")
        };
        let replayed = replay_of(&layer, stored).await;
        assert!(replayed.trailers.is_none(), "{content_type:?}");
        for field in fields {
            assert_eq!(replayed.head.headers[field], "0", "{content_type:?}");
        }
    }
}

/// Resolves a key with this outcome and returns the response to the next request with that key.
async fn replay_of(layer: &IdempotencyLayer<MemoryStore>, stored: StoredResponse) -> crate::support::Got {
    let handler = Handler::new().responding(|_| http::Response::builder().status(500).body(full("")).unwrap());
    static KEYS: AtomicUsize = AtomicUsize::new(0);
    let key = format!("resolved-{}", KEYS.fetch_add(1, Ordering::Relaxed));
    let service = layer.clone().on_error(OnError::Unknown).layer(handler);
    send(&service, post(&key, "")).await;
    let storage_key = layer.storage_key(None, &key).unwrap();
    let fence = layer.store().peek(&storage_key).await.unwrap().unwrap().fence;
    let found = Resolution::Completed(Outcome::Stored(stored), Duration::from_secs(60));
    layer.store().resolve(&storage_key, fence, &found).await.unwrap();
    let replayed = send(&service, post(&key, "")).await;
    assert!(replayed.is_replay());
    replayed
}
