//! Logs, spans and metrics: what the crate reports, and the secrets that it never reports.

mod support;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::receiver::{HandlerErrorClass, ReceiverLayer};
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnLost};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::FmtSpan;

use support::{Fault, Handler, RemoteStore, post, send};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for Log {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        self.clone()
    }
}

/// `tracing` caches for the whole process whether a span has a subscriber. If a test without a
/// subscriber meets a span first, while another test installs its subscriber, that span may be
/// silent for a moment.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Returns everything that is logged while a store with faults serves a few requests.
fn logged() -> String {
    logged_during(async {
        let store = RemoteStore::new();
        let layer = IdempotencyLayer::new(store.clone()).on_lost(OnLost::Execute);
        let service = layer
            .with_completion_timeout(Duration::from_secs(1))
            .layer(Handler::new());
        send(&service, post("secret-key", "card of Alice")).await;
        send(&service, post("secret-key", "card of Alice")).await;
        send(&service, post("secret-key", "card of Bob")).await;
        store.fail("claim", [Fault::Before; 2]);
        send(&service, post("secret-key", "card of Alice")).await;
        store.fail("claim", [Fault::Misconfigured, Fault::Corrupt]);
        send(&service, post("secret-key", "card of Alice")).await;
        send(&service, post("secret-key", "card of Alice")).await;
        store.fail("complete", [Fault::Before; 100]);
        send(&service, post("secret-key-2", "card of Alice")).await;
    })
}

/// Returns everything that is logged while a future runs.
fn logged_during(run: impl Future<Output = ()>) -> String {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_span_events(FmtSpan::CLOSE)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(run);
    });
    let bytes = log.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn every_request_has_a_span_and_every_unusual_path_has_an_event() {
    let log = logged();
    for expected in [
        "outcome=\"executed\"",
        "outcome=\"replayed\"",
        "outcome=\"key-reused\"",
        "outcome=\"store-unavailable\"",
        "outcome=\"store-misconfigured\"",
        "outcome=\"record-unreadable\"",
        "outcome=\"outcome-unknown\"",
        "attempt=1",
        "fence=",
        "event=\"claim-repeated\"",
        "event=\"store-failed\"",
        "event=\"operation-repeated\"",
        "event=\"unrecorded\"",
    ] {
        assert!(log.contains(expected), "{expected} is not in:\n{log}");
    }
}

#[test]
fn faults_that_an_operator_must_correct_are_logged_as_errors_with_their_cause() {
    let log = logged();
    for (event, reason) in [
        ("store-misconfigured", "the table does not exist"),
        ("record-unreadable", "a record cannot be read"),
        ("store-failed", "the idempotency store did not reply"),
    ] {
        let line = log.lines().find(|line| line.contains(&format!("event=\"{event}\"")));
        let line = line.unwrap_or_else(|| panic!("no {event} in:\n{log}"));
        assert!(line.contains(reason), "{line}");
        assert_eq!(line.contains("ERROR"), event != "store-failed", "{line}");
    }
}

#[test]
fn no_key_and_no_body_is_ever_logged() {
    let log = logged();
    for secret in ["secret-key", "Alice", "Bob"] {
        assert!(!log.contains(secret), "{log}");
    }
}

enum Event {
    Placed(u64),
    Cancelled(u64),
}

fn id_of(event: &Event) -> u64 {
    match event {
        Event::Placed(id) | Event::Cancelled(id) => *id,
    }
}

/// The receiver acknowledged the cancellation of an order as a duplicate of its placement, and no
/// event reported the conflict.
#[test]
fn a_duplicate_of_another_type_is_reported() {
    type Events = ReceiverLayer<MemoryStore, Event>;
    type SetUp = fn(Events) -> Events;
    let set_ups: [(SetUp, bool); 3] = [
        (|layer| layer, true),
        (
            |layer| {
                layer.with_type(|event| match event {
                    Event::Placed(_) => "secret-placed",
                    Event::Cancelled(_) => "secret-cancelled",
                })
            },
            true,
        ),
        // The application treats both variants as one type.
        (|layer| layer.with_type(|_| "secret-event"), false),
    ];
    for (set_up, has_two_types) in set_ups {
        for (events, reports) in [
            ([Event::Placed(7), Event::Cancelled(7)], usize::from(has_two_types)),
            ([Event::Placed(7), Event::Placed(7)], 0),
            ([Event::Placed(7), Event::Cancelled(8)], 0),
        ] {
            let layer = set_up(ReceiverLayer::new(MemoryStore::new(), "billing").with_id(id_of));
            let log = logged_during(async {
                for event in events {
                    // Each consumer of a process has its own clone of the layer.
                    let handler = service_fn(|_: Event| async { Ok::<_, std::io::Error>(()) });
                    let _ = layer.clone().layer(handler).oneshot(event).await;
                }
            });
            let lines = log.lines().filter(|line| line.contains("event=\"type-mismatch\""));
            assert_eq!(lines.filter(|line| line.contains("WARN")).count(), reports, "{log}");
            assert!(!log.contains("secret"), "{log}");
        }
    }
}

#[test]
fn a_message_that_was_not_handled_because_its_store_failed_is_reported() {
    let log = logged_during(async {
        let store = RemoteStore::new();
        store.fail("claim", [Fault::Before; 2]);
        let layer = ReceiverLayer::new(store, "billing").with_id(|id: &u64| *id);
        let handler = service_fn(|_: u64| async { Ok::<_, std::io::Error>(()) });
        assert!(layer.layer(handler).oneshot(7).await.is_err());
    });
    assert!(log.contains("event=\"store-failed\""), "{log}");
}

/// A response that a handler marked or that is a stream by its type is no surprise. One that is too
/// long to be stored is lost for its duplicates.
#[test]
fn a_tombstone_is_a_warning_only_if_a_response_is_lost() {
    for (media_type, level) in [("text/event-stream", "DEBUG"), ("text/plain", "WARN")] {
        let log = logged_during(async {
            let respond = move |_| {
                let mut response = support::text(http::StatusCode::OK, "too long");
                let media_type = http::HeaderValue::from_static(media_type);
                response.headers_mut().insert(http::header::CONTENT_TYPE, media_type);
                response
            };
            let layer = IdempotencyLayer::new(MemoryStore::new()).with_response_limit(1);
            send(&layer.layer(Handler::new().responding(respond)), post("k", "x")).await;
        });
        let line = log.lines().find(|line| line.contains("event=\"tombstone\""));
        let line = line.unwrap_or_else(|| panic!("no tombstone in:\n{log}"));
        assert!(line.contains(level), "{line}");
    }
}

#[test]
fn an_error_of_another_type_than_the_classifier_expects_is_reported() {
    let log = logged_during(async {
        let layer = ReceiverLayer::new(MemoryStore::new(), "billing")
            .with_id(|id: &u64| *id)
            .with_error_class(|_: &std::io::Error| HandlerErrorClass::Reject);
        let handler = service_fn(|_: u64| async { Err::<(), _>("no") });
        assert!(layer.layer(handler).oneshot(7).await.is_err());
    });
    assert!(log.contains("event=\"error-unclassified\""), "{log}");
}

#[cfg(feature = "metrics")]
#[test]
fn metrics_count_outcomes_events_and_the_store() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let snapshot = metrics::with_local_recorder(&recorder, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let service = IdempotencyLayer::new(MemoryStore::new()).layer(Handler::new());
            for body in ["x", "x", "y"] {
                send(&service, post("secret-key", body)).await;
            }
            send(&service, post("not a key", "x")).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            let receiver = ReceiverLayer::new(RemoteStore::new(), "billing").with_id(|id: &u64| *id);
            let receiver = receiver.layer(service_fn(|_: u64| async { Ok::<_, std::io::Error>(()) }));
            for _ in 0..2 {
                assert!(receiver.clone().oneshot(7).await.is_ok());
            }
            // The end of the runtime drops this execution.
            let handler = Handler::new().taking(Duration::from_secs(3_600));
            let endless = IdempotencyLayer::new(RemoteStore::new()).layer(handler);
            tokio::spawn(endless.oneshot(post("k", "x")));
            tokio::time::sleep(Duration::from_secs(1)).await;
        });
        drop(runtime);
        snapshotter.snapshot().into_vec()
    });
    let value = |name: &str, label: Option<&str>| {
        let found = snapshot.iter().find(|(key, ..)| {
            let mut labels = key.key().labels().map(metrics::Label::value);
            key.key().name() == name && label.is_none_or(|label| labels.any(|value| value == label))
        });
        let (.., value) = found.unwrap_or_else(|| panic!("no {name} {label:?}"));
        match value {
            DebugValue::Counter(count) => f64::from(u32::try_from(*count).unwrap()),
            DebugValue::Gauge(gauge) => gauge.into_inner(),
            DebugValue::Histogram(times) => f64::from(u32::try_from(times.len()).unwrap()),
        }
    };
    for outcome in ["executed", "replayed", "key-reused", "key-invalid"] {
        assert!(
            (value("idempotency_requests_total", Some(outcome)) - 1.0).abs() < 0.1,
            "{outcome}"
        );
    }
    for receipt in ["first", "duplicate"] {
        assert!((value("idempotency_messages_total", Some(receipt)) - 1.0).abs() < 0.1);
    }
    assert!((value("idempotency_layer_seconds", None) - 4.0).abs() < 0.1);
    assert!(value("idempotency_in_flight", None).abs() < 0.1);
    assert!((value("idempotency_store_records", None) - 1.0).abs() < 0.1);
    assert!(value("idempotency_store_bytes", None) > 1.0);
    assert!(!format!("{snapshot:?}").contains("secret-key"));
}

/// The time of a handler that panicked, of a wait whose caller left, and of a run without protection
/// counted as time of the layer.
#[cfg(feature = "metrics")]
#[test]
fn the_time_in_the_layer_excludes_handlers_and_waits_that_end_early() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    const SECOND: Duration = Duration::from_secs(1);
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let store = RemoteStore::new();
            let layer = IdempotencyLayer::new(store.clone());
            let panicking = Handler::new()
                .taking(3 * SECOND)
                .responding(|_| panic!("the test wants this handler to panic"));
            let service = layer.clone().layer(panicking);
            let owner = support::start(&service, post("k", "x"));
            tokio::time::sleep(SECOND).await;
            let waiter = support::start(&service, post("k", "x"));
            tokio::time::sleep(SECOND).await;
            waiter.abort();
            assert_eq!(owner.await.unwrap().status(), 500);
            store.fail("claim", [Fault::Before; 2]);
            let unprotected = layer.dangerously_run_unprotected_when_the_store_fails();
            let slow = Handler::new().taking(3 * SECOND);
            assert_eq!(send(&unprotected.layer(slow), post("k", "x")).await.status(), 201);
        });
    });
    let snapshot = snapshotter.snapshot().into_vec();
    let of_layer = |name: &str| name == "idempotency_layer_seconds";
    let found = snapshot.iter().find(|(key, ..)| of_layer(key.key().name()));
    let Some((.., DebugValue::Histogram(times))) = found else {
        panic!("no times of the layer");
    };
    assert_eq!(times.len(), 3);
    assert!(times.iter().all(|time| time.into_inner() < 0.5), "{times:?}");
}

/// Sends webhooks that are rejected for four reasons. Returns the bodies of the responses.
#[cfg(all(feature = "webhooks", feature = "testing"))]
async fn send_rejected_webhooks() -> Vec<bytes::Bytes> {
    use bytes::Bytes;
    use http::{Request, Response, StatusCode};
    use http_body_util::{BodyExt, Full};
    use tower::{ServiceExt, service_fn};
    use tower_idempotency::receiver::testing::WebhookSigner;
    use tower_idempotency::receiver::webhooks::{StripeWebhooks, WebhookLayer};

    let handler = service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, std::convert::Infallible>(Response::new(Full::default()))
    });
    let service = WebhookLayer::new("billing", StripeWebhooks::new(["hush"]).unwrap()).layer(handler);
    let request = || Request::post("/").body(r#"{"id":"evt_secret"}"#).unwrap();
    let unsigned = request().map(Bytes::from);
    let forged = WebhookSigner::stripe("other").sign(request());
    let old = WebhookSigner::stripe("hush").at(std::time::UNIX_EPOCH).sign(request());
    let nameless = WebhookSigner::stripe("hush").sign(Request::post("/").body("{}").unwrap());
    let mut bodies = Vec::new();
    for request in [unsigned, forged, old, nameless] {
        let response = service.clone().oneshot(request.map(Full::new)).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        bodies.push(response.into_body().collect().await.unwrap().to_bytes());
    }
    bodies
}

#[cfg(all(feature = "webhooks", feature = "testing"))]
#[test]
fn the_reason_of_a_rejected_webhook_is_logged_but_not_in_the_response() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let bodies = runtime.block_on(send_rejected_webhooks());
        assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:?}");
    });
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for reason in ["missing-header", "signature", "timestamp", "id"] {
        let line = log.lines().find(|line| line.contains(&format!("reason=\"{reason}\"")));
        let line = line.unwrap_or_else(|| panic!("no {reason} in:\n{log}"));
        for part in [
            "WARN",
            "tower_idempotency",
            "event=\"webhook-rejected\"",
            "consumer=\"billing\"",
        ] {
            assert!(line.contains(part), "{line}");
        }
    }
    for secret in ["hush", "evt_secret", "v1="] {
        assert!(!log.contains(secret), "{log}");
    }
}

#[cfg(all(feature = "metrics", feature = "webhooks", feature = "testing"))]
#[test]
fn the_reason_of_a_rejected_webhook_is_a_metric_label() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let snapshot = metrics::with_local_recorder(&recorder, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(send_rejected_webhooks());
        snapshotter.snapshot().into_vec()
    });
    let count = |name: &str, label: &str| {
        let found = snapshot.iter().find(|(key, ..)| {
            let mut labels = key.key().labels().map(metrics::Label::value);
            key.key().name() == name && labels.any(|value| value == label)
        });
        match found.map(|(.., value)| value) {
            Some(DebugValue::Counter(count)) => *count,
            other => panic!("{name} {label}: {other:?}"),
        }
    };
    for reason in ["missing-header", "signature", "timestamp", "id"] {
        assert_eq!(count("idempotency_webhooks_rejected_total", reason), 1, "{reason}");
    }
    assert_eq!(count("idempotency_requests_total", "webhook-invalid"), 4);
    assert_eq!(count("idempotency_events_total", "webhook-rejected"), 4);
}
