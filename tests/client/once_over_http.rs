//! HTTP calls that take effect once: how each response changes the state of the key, and which
//! result the caller gets.

use std::convert::Infallible;
use std::future::ready;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use http::StatusCode;
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::ErrorKind;
use tower_idempotency::MemoryStore;
use tower_idempotency::Recovered;
use tower_idempotency::client::{Attempt, ErrorClass, KeyDeriver, OnceError, OnceLayer, ProviderProfile};

use crate::support;
use crate::support::{Fault, RemoteStore};

type FullResponse = Response<Full<Bytes>>;
type Ended = Result<FullResponse, OnceError<FullResponse, io::Error>>;

/// A third party that counts the requests that arrive and responds as the test asks.
#[derive(Clone, Default)]
struct Party {
    arrived: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<http::HeaderMap>>>,
}

impl Party {
    fn arrived(&self) -> usize {
        self.arrived.load(Ordering::SeqCst)
    }

    /// Sends a request through the layer. The party responds with `act`.
    async fn send(
        &self,
        layer: &OnceLayer<RemoteStore>,
        request: Request<Full<Bytes>>,
        act: impl Fn(usize) -> io::Result<FullResponse> + Clone + Send + Sync + 'static,
    ) -> Ended {
        let party = self.clone();
        let http = service_fn(move |request: Request<Full<Bytes>>| {
            party.heads.lock().unwrap().push(request.headers().clone());
            let arrival = party.arrived.fetch_add(1, Ordering::SeqCst) + 1;
            let act = act.clone();
            async move {
                tokio::task::yield_now().await;
                act(arrival)
            }
        });
        ServiceBuilder::new().layer(layer).service(http).oneshot(request).await
    }
}

fn respond(status: u16) -> io::Result<FullResponse> {
    let response = Response::builder()
        .status(status)
        .header("x-id", "17")
        .header("set-cookie", "a=b");
    Ok(response.body(Full::from("created")).unwrap())
}

fn request(body: &'static str) -> Request<Full<Bytes>> {
    let request = Request::post("https://bank.example/orders").header("idempotency-key", "k");
    request
        .header("authorization", "Bearer today")
        .body(Full::from(body))
        .unwrap()
}

async fn body(response: FullResponse) -> Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

fn layer() -> (RemoteStore, OnceLayer<RemoteStore>) {
    let store = RemoteStore::new();
    (store.clone(), OnceLayer::new(store, ProviderProfile::draft()))
}

#[tokio::test(start_paused = true)]
async fn a_request_is_sent_once_and_its_response_is_replayed_byte_for_byte() {
    let ((_, layer), party) = (layer(), Party::default());
    let first = party.send(&layer, request("3 shirts"), |_| respond(201)).await.unwrap();
    assert_eq!(first.extensions().get::<Attempt>().unwrap().number(), 1);
    let mut later = request("3 shirts");
    later
        .headers_mut()
        .insert("authorization", "Bearer tomorrow".parse().unwrap());
    let again = party.send(&layer, later, |_| respond(500)).await.unwrap();
    assert_eq!(
        (first.status(), again.status(), party.arrived()),
        (again.status(), first.status(), 1)
    );
    assert_eq!(again.headers()["idempotent-replayed"], "true");
    assert!(again.headers()["x-id"] == "17" && !again.headers().contains_key("set-cookie"));
    assert_eq!(body(first).await, body(again).await);
    let other = party.send(&layer, request("4 shirts"), |_| respond(201)).await;
    assert!(matches!(other, Err(OnceError::Mismatch)));
}

#[tokio::test(start_paused = true)]
async fn concurrent_calls_send_one_request() {
    let ((_, layer), party) = (layer(), Party::default());
    let all = join_all((0..50).map(|_| party.send(&layer, request("x"), |_| respond(200)))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(party.arrived(), 1);
}

/// Whether the same call is sent again after a response follows from the meaning of its status.
#[tokio::test(start_paused = true)]
async fn the_meaning_of_a_response_decides_whether_the_call_is_sent_again() {
    for (status, stored, sent) in [
        (200, true, 1),
        (302, true, 1),
        (303, true, 1),
        (307, false, 2),
        (308, false, 2),
        (402, true, 1),
        (409, true, 1),
        (422, true, 1),
        (400, false, 2),
        (401, false, 2),
        (404, false, 2),
        (413, false, 2),
        (425, false, 2),
        (429, false, 2),
        (500, false, 1),
        (503, false, 1),
        (504, false, 1),
        (408, false, 1),
    ] {
        let ((_, layer), party) = (layer(), Party::default());
        let first = party
            .send(&layer, request("x"), move |_| respond(status))
            .await
            .unwrap();
        assert_eq!(first.status(), status, "the caller gets the response unchanged");
        let later = party.send(&layer, request("x"), |_| respond(200)).await;
        assert_eq!(party.arrived(), sent, "{status}");
        match later {
            Ok(later) => assert_eq!(later.headers().contains_key("idempotent-replayed"), stored, "{status}"),
            Err(error) => assert!(
                sent == 1 && matches!(error, OnceError::Unknown(None)),
                "{status}: {error:?}"
            ),
        }
    }
}

/// A gateway cannot have sent a replay, so a replay of a refusal is stored. A replayed failure still
/// shows nothing about the effect.
#[tokio::test(start_paused = true)]
async fn a_replay_of_a_refusal_is_stored_and_a_replay_of_a_failure_is_not() {
    for (status, stored, sent) in [
        (307, true, 1),
        (401, true, 1),
        (404, true, 1),
        (499, true, 1),
        (501, true, 1),
        (425, false, 2),
        (429, false, 2),
        (408, false, 1),
        (500, false, 1),
    ] {
        let ((_, layer), party) = (layer(), Party::default());
        let send = || {
            party.send(&layer, request("x"), move |_| {
                let mut response = respond(status)?;
                let marker = "true".parse().unwrap();
                response.headers_mut().insert("idempotent-replayed", marker);
                Ok(response)
            })
        };
        assert_eq!(send().await.unwrap().status(), status);
        let later = send().await;
        assert_eq!(party.arrived(), sent, "{status}");
        assert_eq!(later.is_ok(), stored || sent == 2, "{status}: {later:?}");
    }
}

/// A call that waited for its key held the readiness of the client, so no call of another key could
/// begin.
#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_its_key_does_not_hold_the_client() {
    let (_, layer) = layer();
    let slow = service_fn(|_: Request<Full<Bytes>>| async {
        tokio::time::sleep(Duration::from_secs(20)).await;
        respond(200)
    });
    // Another process makes the call.
    let _elsewhere = tokio::spawn(layer.layer(slow).oneshot(request("x")));
    support::advance(Duration::from_secs(1)).await;
    let here = service_fn(|_: Request<Full<Bytes>>| ready(respond(200)));
    let here = layer.layer(tower::limit::GlobalConcurrencyLimitLayer::new(1).layer(here));
    let _waiting = tokio::spawn(here.clone().oneshot(request("x")));
    support::advance(Duration::from_secs(1)).await;
    let mut other = request("y");
    other.headers_mut().insert("idempotency-key", "other".parse().unwrap());
    let other = tokio::time::timeout(Duration::from_secs(5), here.oneshot(other)).await;
    assert!(other.is_ok(), "the waiting call holds the client");
}

/// The client was ready before the wait, and is broken afterwards. Nothing was sent.
#[tokio::test(start_paused = true)]
async fn a_client_that_is_broken_after_a_wait_leaves_the_key_free() {
    let ((_, layer), party) = (layer(), Party::default());
    let owner = service_fn(|_: Request<Full<Bytes>>| async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        respond(401)
    });
    let owner = tokio::spawn(layer.layer(owner).oneshot(request("x")));
    support::advance(Duration::from_secs(1)).await;
    let breaking = Breaking {
        client: service_fn(|_: Request<Full<Bytes>>| ready(respond(200))),
        polls: Arc::default(),
    };
    let ended = layer.layer(breaking).oneshot(request("x")).await;
    assert!(
        matches!(ended, Err(OnceError::InFlight { left }) if left.is_zero()),
        "{ended:?}"
    );
    assert!(owner.await.unwrap().is_ok());
    assert!(party.send(&layer, request("x"), |_| respond(201)).await.is_ok());
    assert_eq!(party.arrived(), 1);
}

/// A client that is ready once, and then broken.
#[derive(Clone)]
struct Breaking<S> {
    client: S,
    polls: Arc<AtomicUsize>,
}

impl<S: Service<Request<Full<Bytes>>, Error = io::Error>> Service<Request<Full<Bytes>>> for Breaking<S> {
    type Response = S::Response;
    type Error = io::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let is_first = self.polls.fetch_add(1, Ordering::SeqCst) == 0;
        Poll::Ready(is_first.then_some(()).ok_or_else(|| io::Error::other("broken")))
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> S::Future {
        self.client.call(request)
    }
}

/// The third party charges and then responds with any status. The key becomes free only after the
/// few statuses that mean that the server did nothing.
#[tokio::test(start_paused = true)]
async fn a_status_that_does_not_deny_the_effect_does_not_free_the_key() {
    const FREE: [u16; 23] = [
        307, 308, 400, 401, 403, 404, 405, 406, 407, 411, 413, 414, 415, 416, 417, 421, 423, 425, 426, 428, 429, 431,
        451,
    ];
    for status in 100..=999 {
        let ((_, layer), party) = (layer(), Party::default());
        for _ in 0..3 {
            let ended = party.send(&layer, request("x"), move |_| respond(status)).await;
            if let Err(error) = ended {
                assert!(error.may_have_happened(), "{status}: {error:?}");
            }
        }
        let expected = if FREE.contains(&status) { 3 } else { 1 };
        assert_eq!(party.arrived(), expected, "{status}");
    }
}

/// With these header fields, a server can make a false claim.
#[tokio::test(start_paused = true)]
async fn a_server_that_asks_for_a_retry_or_claims_a_replay_gets_no_second_request() {
    for (name, value) in [
        ("idempotent-replayed", "true"),
        ("stripe-should-retry", "true"),
        ("retry-after", "0"),
    ] {
        for status in [200, 402, 409, 500, 503, 599, 999] {
            let (store, party) = (RemoteStore::new(), Party::default());
            let layer = OnceLayer::new(store, ProviderProfile::stripe());
            for _ in 0..3 {
                let ended = party.send(&layer, request("x"), move |_| {
                    let mut response = respond(status)?;
                    response.headers_mut().insert(name, value.parse().unwrap());
                    Ok(response)
                });
                drop(ended.await);
            }
            assert_eq!(party.arrived(), 1, "{name} {status}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_with_an_error_may_have_taken_effect_unless_it_was_not_sent() {
    let lost = |_| Err(io::Error::from(io::ErrorKind::ConnectionReset));
    let refused = |_| Err(io::Error::from(io::ErrorKind::ConnectionRefused));
    let ((_, plain), party) = (layer(), Party::default());
    let classified = plain.clone().with_errors(|error: &io::Error| match error.kind() {
        io::ErrorKind::ConnectionRefused => ErrorClass::NotSent,
        _ => ErrorClass::Lost,
    });
    assert!(matches!(
        party.send(&classified, request("x"), refused).await,
        Err(OnceError::Failed(_))
    ));
    assert!(matches!(
        party.send(&classified, request("x"), lost).await,
        Err(OnceError::Unknown(Some(_)))
    ));
    assert!(matches!(
        party.send(&classified, request("x"), |_| respond(200)).await,
        Err(OnceError::Unknown(None))
    ));
    assert_eq!(party.arrived(), 2);
    // Under `at_least_once`, a refused connection does not show what the attempt before did.
    let again = classified.at_least_once().with_namespace("again");
    assert!(matches!(
        party.send(&again, request("x"), lost).await,
        Err(OnceError::Unknown(Some(_)))
    ));
    assert!(matches!(
        party.send(&again, request("x"), refused).await,
        Err(OnceError::Unknown(Some(_)))
    ));
    assert_eq!(
        party
            .send(&again, request("x"), |_| respond(200))
            .await
            .unwrap()
            .status(),
        200
    );
}

/// The check has ruled out an effect of the lost attempt, so the refused connection is the whole
/// truth about the call.
#[tokio::test(start_paused = true)]
async fn a_call_that_was_not_sent_after_a_check_without_effect_has_failed() {
    let ((_, layer), party) = (layer(), Party::default());
    let layer = layer
        .with_errors(|error: &io::Error| match error.kind() {
            io::ErrorKind::ConnectionRefused => ErrorClass::NotSent,
            _ => ErrorClass::Lost,
        })
        .with_recovery(|_| ready(Recovered::NotHappened));
    let fail = |kind: io::ErrorKind| move |_| Err(io::Error::from(kind));
    let lost = party
        .send(&layer, request("x"), fail(io::ErrorKind::ConnectionReset))
        .await;
    assert!(matches!(lost, Err(OnceError::Unknown(Some(_)))));
    let refused = party
        .send(&layer, request("x"), fail(io::ErrorKind::ConnectionRefused))
        .await;
    assert!(matches!(refused, Err(OnceError::Failed(_))));
    let sent = party.send(&layer, request("x"), |_| respond(200)).await;
    assert_eq!((sent.unwrap().status().as_u16(), party.arrived()), (200, 3));
}

/// Under `at_least_once`, a refused connection says everything about a call without a lost attempt.
#[tokio::test(start_paused = true)]
async fn a_first_attempt_that_was_not_sent_has_failed_under_at_least_once() {
    let ((_, layer), party) = (layer(), Party::default());
    let layer = layer.with_errors(|_: &io::Error| ErrorClass::NotSent).at_least_once();
    let refused = |_| Err(io::Error::from(io::ErrorKind::ConnectionRefused));
    for _ in 0..2 {
        let failed = party.send(&layer, request("x"), refused).await;
        assert!(matches!(failed, Err(OnceError::Failed(_))));
    }
}

/// Without a key, a third party cannot recognise a retry. But the check has found no effect, so the
/// refusal is about this request.
#[tokio::test(start_paused = true)]
async fn a_refusal_after_a_check_without_effect_is_stored_without_a_sent_key() {
    let ((_, layer), party) = (layer(), Party::default());
    let layer = layer
        .without_sending_key()
        .with_recovery(|_| ready(Recovered::NotHappened));
    let lost = |_| Err(io::Error::from(io::ErrorKind::ConnectionReset));
    assert!(party.send(&layer, request("x"), lost).await.is_err());
    for _ in 0..2 {
        let refused = party.send(&layer, request("x"), |_| respond(422)).await.unwrap();
        assert_eq!(refused.status(), 422);
    }
    assert_eq!(party.arrived(), 2);
}

/// Once a key has expired, the caller may use it for another call. The third party must not take
/// that call for the first one.
#[tokio::test(start_paused = true)]
async fn two_calls_with_one_key_derive_different_ids() {
    let ((_, layer), party) = (layer(), Party::default());
    let layer = layer.with_retention(Duration::ZERO).on_attempt(|head, attempt| {
        head.headers.insert("x-charge", attempt.id("charge").parse().unwrap());
    });
    for body in ["pay", "pay", "pay more"] {
        party.send(&layer, request(body), |_| respond(201)).await.unwrap();
    }
    let heads = party.heads.lock().unwrap();
    assert_eq!(heads[0]["x-charge"], heads[1]["x-charge"]);
    assert_ne!(heads[0]["x-charge"], heads[2]["x-charge"]);
}

/// Layers further in may send the fence or the id of the attempt.
#[tokio::test(start_paused = true)]
async fn a_service_further_in_finds_the_attempt_in_the_request() {
    let (_, layer) = layer();
    let http = service_fn(|request: Request<Full<Bytes>>| {
        let attempt = request.extensions().get::<Attempt>().unwrap();
        ready(Ok::<_, io::Error>(Response::new(Full::<Bytes>::from(
            attempt.id("charge"),
        ))))
    });
    let response = layer.layer(http).oneshot(request("x")).await.unwrap();
    let id = response.extensions().get::<Attempt>().unwrap().id("charge");
    assert_eq!(body(response).await, id);
}

#[tokio::test(start_paused = true)]
async fn a_lost_call_is_checked_and_the_response_that_is_found_is_stored() {
    let lost = |_| Err(io::Error::from(io::ErrorKind::TimedOut));
    for (found, status) in [(true, 200), (false, 201)] {
        let ((_, layer), party) = (layer(), Party::default());
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let layer = layer.with_recovery(move |lost| {
            counted.fetch_add(1, Ordering::SeqCst);
            assert_eq!(
                (&*lost.key, lost.attempt.number(), lost.head.uri.path()),
                ("k", 2, "/orders")
            );
            let shown = format!("{lost:?}");
            assert!(
                shown.starts_with("LostCall { attempt") && !shown.contains("Bearer"),
                "{shown}"
            );
            ready(if found {
                Recovered::Happened(Response::new(Bytes::from("found")))
            } else {
                Recovered::NotHappened
            })
        });
        party.send(&layer, request("x"), lost).await.unwrap_err();
        let got = party.send(&layer, request("x"), |_| respond(201)).await.unwrap();
        assert_eq!(got.status(), status);
        assert_eq!(party.arrived(), if found { 1 } else { 2 });
        let again = party.send(&layer, request("x"), |_| respond(500)).await.unwrap();
        assert_eq!((again.status().as_u16(), asked.load(Ordering::SeqCst)), (status, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_can_carry_the_fence_and_an_id_instead_of_the_key() {
    let ((_, layer), party) = (layer(), Party::default());
    let layer = layer.at_least_once().without_sending_key().on_attempt(|head, attempt| {
        head.headers.insert("x-fence", attempt.fence().as_u64().into());
        head.headers.insert("x-order-id", attempt.id("order").parse().unwrap());
    });
    for status in [500, 200] {
        party
            .send(&layer, request("x"), move |_| respond(status))
            .await
            .unwrap();
    }
    let heads = party.heads.lock().unwrap();
    let fence = |at: usize| heads[at]["x-fence"].to_str().unwrap().parse::<u64>().unwrap();
    assert!(fence(0) < fence(1) && heads[0]["x-order-id"] == heads[1]["x-order-id"]);
    assert!(heads.iter().all(|head| !head.contains_key("idempotency-key")));
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_valid_key_or_over_the_limit_is_not_sent() {
    let ((_, plain), party) = (layer(), Party::default());
    let bare = || Request::post("/").body(Full::from("x")).unwrap();
    let two = || {
        let mut request = request("x");
        request.headers_mut().append("idempotency-key", "l".parse().unwrap());
        request
    };
    let bad = || {
        let mut request = bare();
        request.headers_mut().insert("idempotency-key", "a b".parse().unwrap());
        request
    };
    for (layer, request) in [
        (plain.clone(), bare()),
        (plain.clone(), two()),
        (plain.clone(), bad()),
        (plain.clone().with_key(|_| None), request("x")),
        (plain.clone().with_key(|_| Some(String::new())), request("x")),
        (plain.clone().with_scope(|_| None), request("x")),
        (plain.clone().with_body_limit(3).with_response_limit(3), request("four")),
    ] {
        let ended = party.send(&layer, request, |_| respond(200)).await;
        assert!(
            matches!(&ended, Err(OnceError::NotRun(error)) if error.kind() == ErrorKind::Configuration),
            "{ended:?}"
        );
    }
    assert_eq!(party.arrived(), 0);
    let named = plain.with_key(|head| Some(head.uri.path().to_owned()));
    assert!(party.send(&named, bare(), |_| respond(200)).await.is_ok());
    // A request that the layer does not cover passes untouched.
    let read = Request::get("/").body(Full::default()).unwrap();
    assert!(party.send(&named, read, |_| respond(200)).await.is_ok());
    assert_eq!(party.arrived(), 2);
}

/// If the layer does not cover an unsafe request, it never reports the error as `Failed`, because a
/// redirect may have come first.
#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_covered_counts_as_failed_only_if_it_is_safe() {
    let ((_, layer), party) = (layer(), Party::default());
    let layer = layer.with_errors(|_: &io::Error| ErrorClass::NotSent);
    for (method, is_failed) in [("GET", true), ("HEAD", true), ("PUT", false), ("DELETE", false)] {
        let request = Request::builder()
            .method(method)
            .uri("/")
            .body(Full::default())
            .unwrap();
        let error = party
            .send(&layer, request, |_| Err(io::ErrorKind::NotConnected.into()))
            .await;
        assert_eq!(matches!(error, Err(OnceError::Failed(_))), is_failed, "{method}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_over_the_limit_or_a_stream_is_returned_and_not_requested_again() {
    // The stream would be short enough.
    for (is_stream, limit) in [(false, 4), (true, 100)] {
        let ((_, layer), party) = (layer(), Party::default());
        let layer = layer.with_body_limit(100).with_response_limit(limit);
        let call = party.send(&layer, request("x"), move |_| {
            let mut response = respond(200)?;
            if is_stream {
                response
                    .headers_mut()
                    .insert("content-type", "text/event-stream".parse().unwrap());
            }
            Ok(response)
        });
        assert_eq!(body(call.await.unwrap()).await, "created");
        assert!(matches!(
            party.send(&layer, request("x"), |_| respond(200)).await,
            Err(OnceError::NotStored)
        ));
        assert_eq!(party.arrived(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_breaks_off_does_not_count_as_failed() {
    let (_, layer) = layer();
    let http = service_fn(|_: Request<Full<Bytes>>| {
        let frames = [
            Ok(http_body::Frame::data(Bytes::from("half"))),
            Err(io::Error::other("reset")),
        ];
        let body = http_body_util::StreamBody::new(futures::stream::iter(frames));
        ready(Ok::<_, io::Error>(Response::new(UnsyncBoxBody::new(body))))
    });
    let client = ServiceBuilder::new().layer(layer).service(http);
    for _ in 0..2 {
        assert!(matches!(
            client.clone().oneshot(request("x")).await,
            Err(OnceError::NotStored)
        ));
    }
}

#[test]
fn every_error_states_whether_the_call_was_made_and_has_its_cause() {
    use std::error::Error;
    type Failed = OnceError<(), io::Error>;
    let reset = || io::Error::from(io::ErrorKind::ConnectionReset);
    let left = Duration::from_secs(12);
    let cause = || KeyDeriver::new(b"short").unwrap_err();
    let errors: [(Failed, &str, bool); 11] = [
        (OnceError::Failed(reset()), "failed; no effect", true),
        (
            OnceError::InFlight { left },
            "another caller is making the same call; its lease ends in 12s",
            false,
        ),
        (
            OnceError::InFlight { left: Duration::ZERO },
            "was not made: its key was in use, and is free now",
            false,
        ),
        (
            OnceError::Mismatch,
            "was not made: its key was used with another input",
            false,
        ),
        (OnceError::NotStored, "was made, but its response was not stored", false),
        (
            OnceError::StepChanged { position: 2 },
            "was not continued: its steps differ",
            false,
        ),
        (
            OnceError::Unknown(Some(reset())),
            "may have taken effect; outcome unknown",
            true,
        ),
        (
            OnceError::Unknown(None),
            "may have taken effect; outcome unknown",
            false,
        ),
        (
            OnceError::Unreadable("a type".into()),
            "was made, but its stored response cannot be read",
            true,
        ),
        (OnceError::NotRun(cause()), "was not made", true),
        (
            OnceError::Unrecorded {
                output: Box::new(()),
                error: cause(),
            },
            "was made, but its response could not be recorded",
            true,
        ),
    ];
    for (error, text, has_cause) in errors {
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(error.source().is_some(), has_cause, "{error}");
    }
}

/// A client other than hyper may not check the length. The layer stored the first part of the
/// response.
#[tokio::test(start_paused = true)]
async fn a_response_that_ends_before_its_declared_length_is_not_stored() {
    let ((_, layer), party) = (layer(), Party::default());
    for _ in 0..2 {
        let call = party.send(&layer, request("x"), |_| {
            let mut response = respond(201)?;
            response.headers_mut().insert("content-length", "8".parse().unwrap());
            Ok(response)
        });
        assert!(matches!(call.await, Err(OnceError::NotStored)));
    }
    assert_eq!(party.arrived(), 1);
}

/// The layer read a stalled response without end. It also read endless empty frames without end,
/// and blocked its thread.
#[tokio::test(start_paused = true)]
async fn a_response_that_never_ends_is_returned_and_not_requested_again() {
    let bodies: [fn() -> support::AnyBody; 2] = [
        || support::stalling("front", std::future::pending()),
        support::empty_frames,
    ];
    for body in bodies {
        let (_, layer) = layer();
        let drain = layer.drain();
        let http = service_fn(move |_: Request<Full<Bytes>>| ready(Ok::<_, io::Error>(Response::new(body()))));
        let client = ServiceBuilder::new().layer(layer).service(http);
        let call = tokio::spawn(client.clone().oneshot(request("x")));
        support::advance(Duration::from_secs(9)).await;
        assert!(!call.is_finished());
        support::advance(Duration::from_secs(1)).await;
        assert!(call.is_finished());
        assert_eq!(call.await.unwrap().unwrap().status(), 200);
        assert!(matches!(client.oneshot(request("x")).await, Err(OnceError::NotStored)));
        drain.wait().await;
    }
}

/// hyper ends the body of a truncated request without an error. A handler that forwarded such a
/// body made the call with the first half.
#[tokio::test(start_paused = true)]
async fn a_request_that_ends_before_its_declared_length_is_not_sent() {
    let (store, layer) = layer();
    let http = service_fn(|_: Request<support::AnyBody>| ready(respond(200)));
    let client = ServiceBuilder::new().layer(layer).service(http);
    let result = client.oneshot(request("x").map(|_| support::short("half", 4))).await;
    let Err(OnceError::NotRun(error)) = result else {
        panic!("{result:?}");
    };
    assert!(error.to_string().contains("before the length"), "{error}");
    assert_eq!(store.calls("claim"), 0);
}

/// The bodies of some middlewares return their first size hint to the end. The layer judged such a
/// body to be too short.
#[tokio::test(start_paused = true)]
async fn bodies_whose_size_hint_never_falls_are_complete() {
    let (_, layer) = layer();
    let http = service_fn(|request: Request<support::AnyBody>| async {
        assert_eq!(request.into_body().collect().await.unwrap().to_bytes(), "amount=1");
        Ok::<_, io::Error>(Response::new(support::fixed_hint(&["char", "ged"])))
    });
    let client = ServiceBuilder::new().layer(layer).service(http);
    for _ in 0..2 {
        let request = request("x").map(|_| support::fixed_hint(&["amount", "=1"]));
        let response = client.clone().oneshot(request).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "charged");
    }
}

/// A response to HEAD may declare the length that the body of a GET response would have.
#[tokio::test(start_paused = true)]
async fn a_response_without_a_body_is_complete_with_any_declared_length() {
    for (method, status, is_whole) in [
        (Method::HEAD, 200, true),
        (Method::POST, 204, true),
        (Method::POST, 304, true),
        (Method::POST, 200, false),
    ] {
        let (_, layer) = layer();
        let http = service_fn(move |_: Request<Full<Bytes>>| {
            let response = Response::builder().status(status);
            ready(Ok::<_, io::Error>(response.body(support::short("", 8)).unwrap()))
        });
        let layer = layer.with_methods([Method::HEAD, Method::POST]);
        let client = ServiceBuilder::new().layer(layer).service(http);
        for is_replay in [false, true] {
            let mut request = request("x");
            *request.method_mut() = method.clone();
            let got = client.clone().oneshot(request).await;
            let replay = got.map(|response| response.headers().contains_key("idempotent-replayed"));
            let expected = is_whole.then_some(is_replay);
            assert_eq!(replay.ok(), expected, "{method} {status}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_body_never_ends_is_not_sent() {
    let bodies: [fn() -> support::AnyBody; 2] = [
        || support::stalling("front", std::future::pending()),
        support::empty_frames,
    ];
    for body in bodies {
        let (store, layer) = layer();
        let http = service_fn(|_: Request<support::AnyBody>| ready(respond(200)));
        let client = ServiceBuilder::new().layer(layer).service(http);
        let call = tokio::spawn(client.oneshot(request("x").map(|_| body())));
        support::advance(Duration::from_secs(29)).await;
        assert!(!call.is_finished());
        support::advance(Duration::from_secs(1)).await;
        assert!(call.is_finished());
        assert!(matches!(call.await.unwrap(), Err(OnceError::NotRun(_))));
        assert_eq!(store.calls("claim"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_failure_before_the_call_differs_from_one_after_it() {
    let ((store, layer), party) = (layer(), Party::default());
    store.fail("claim", [Fault::Before; 2]);
    let before = party.send(&layer, request("x"), |_| respond(200)).await.unwrap_err();
    assert!(matches!(&before, OnceError::NotRun(error) if error.kind() == ErrorKind::StoreUnavailable));
    assert!(!before.may_have_happened() && party.arrived() == 0);
    tokio::time::sleep(Duration::from_secs(20)).await;
    store.fail("complete", [Fault::Before; 100]);
    let after = party.send(&layer, request("x"), |_| respond(200)).await.unwrap_err();
    assert!(
        matches!(&after, OnceError::Unrecorded { output, .. } if output.status() == 200),
        "{after:?}"
    );
    assert!(after.may_have_happened() && party.arrived() == 1);
}

/// The first caller was promised that the call is not made again.
#[tokio::test(start_paused = true)]
async fn a_call_that_may_be_made_again_is_not_reported_as_made_for_good() {
    let (store, layer) = layer();
    let (layer, party) = (layer.at_least_once(), Party::default());
    let send = || {
        party.send(&layer, request("x"), |arrival| {
            let mut response = respond(200)?;
            if arrival == 1 {
                response.headers_mut().insert("content-length", "8".parse().unwrap());
            }
            Ok(response)
        })
    };
    store.fail("complete", [Fault::Before; 1_000]);
    let first = send().await.unwrap_err();
    tokio::time::sleep(Duration::from_secs(600)).await;
    store.heal();
    assert_eq!(send().await.unwrap().status(), 200);
    assert_eq!(party.arrived(), 2);
    assert!(matches!(first, OnceError::Unknown(None)), "{first:?}");
}

/// Retries inside the layer. A third party without idempotency gets one request, unless it provably
/// did not take the first one.
#[cfg(feature = "retry")]
mod with_retries {
    use super::*;
    use tower::retry::RetryLayer;
    use tower::util::BoxCloneService;
    use tower::{Layer, Service};
    use tower_idempotency::client::{CallLayer, IdempotencyKeyLayer, RetryPolicy};

    /// How the third party treats a request.
    #[derive(Clone, Copy, Debug)]
    enum Act {
        Respond(u16),
        Lost,
        Refused,
    }
    use Act::{Lost, Refused, Respond};

    /// The result for the caller of the layer.
    #[derive(Debug, PartialEq)]
    enum Known {
        Status(u16),
        Failed,
        Unknown,
    }

    type Client = BoxCloneService<Request<Full<Bytes>>, Known, Known>;

    fn status(response: &FullResponse) -> Known {
        Known::Status(response.status().as_u16())
    }

    fn failure<E>(error: &OnceError<FullResponse, E>) -> Known {
        if let OnceError::Failed(_) = error {
            return Known::Failed;
        }
        assert!(error.may_have_happened());
        Known::Unknown
    }

    async fn send(client: Client, request: Request<Full<Bytes>>) -> Known {
        client.oneshot(request).await.unwrap_or_else(|error| error)
    }

    /// Builds the layers in the documented order with each of the two retry layers, with or without
    /// a layer for keys. The third party performs these acts and repeats the last one.
    fn clients(
        layer: &OnceLayer<RemoteStore>,
        has_keys: bool,
        acts: &'static [Act],
        arrived: &Arc<AtomicUsize>,
    ) -> [Client; 2] {
        let policy = RetryPolicy::new(ProviderProfile::draft()).with_errors(|error: &io::Error| match error.kind() {
            io::ErrorKind::ConnectionRefused => ErrorClass::NotSent,
            _ => ErrorClass::Lost,
        });
        let counted = Arc::clone(arrived);
        let http = service_fn(move |_: Request<Full<Bytes>>| {
            let count = counted.fetch_add(1, Ordering::SeqCst);
            ready(match acts[count.min(acts.len() - 1)] {
                Respond(status) => respond(status),
                Lost => Err(io::ErrorKind::ConnectionReset.into()),
                Refused => Err(io::ErrorKind::ConnectionRefused.into()),
            })
        });
        let calls = ServiceBuilder::new()
            .layer(CallLayer::new(policy.clone()))
            .service(http.clone());
        let retries = ServiceBuilder::new().layer(RetryLayer::new(policy)).service(http);
        if has_keys {
            let keys = IdempotencyKeyLayer::new(ProviderProfile::draft());
            [once(layer, keys.layer(calls)), once(layer, keys.layer(retries))]
        } else {
            [once(layer, calls), once(layer, retries)]
        }
    }

    fn once<S, E>(layer: &OnceLayer<RemoteStore>, service: S) -> Client
    where
        S: Service<Request<Full<Bytes>>, Response = FullResponse, Error = E> + Clone + Send + Sync + 'static,
        S::Future: Send,
        E: Send + 'static,
    {
        let client = ServiceBuilder::new()
            .map_response(|response| status(&response))
            .map_err(|error| failure(&error))
            .layer(layer)
            .service(service);
        BoxCloneService::new(client)
    }

    /// Checks the number of requests that a call sends, the result for its caller, and whether the
    /// next call is sent.
    async fn check(
        configure: impl Fn(OnceLayer<RemoteStore>) -> OnceLayer<RemoteStore>,
        has_keys: bool,
        table: &[(&'static [Act], usize, Known, bool)],
    ) {
        for (acts, requests, expected, is_free) in table {
            for way in 0..2 {
                let arrived = Arc::new(AtomicUsize::new(0));
                let layer = configure(layer().1);
                let [mut client, other] = clients(&layer, has_keys, acts, &arrived);
                if way == 1 {
                    client = other;
                }
                let got = send(client.clone(), request("x")).await;
                assert_eq!(
                    (arrived.load(Ordering::SeqCst), &got),
                    (*requests, expected),
                    "{acts:?} {way}"
                );
                send(client, request("x")).await;
                let is_sent = arrived.load(Ordering::SeqCst) > *requests;
                assert_eq!(is_sent, *is_free, "{acts:?} {way}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_repeated_only_if_it_was_provably_not_taken() {
        let configurations: [fn(OnceLayer<RemoteStore>) -> OnceLayer<RemoteStore>; 2] =
            [|layer| layer, OnceLayer::without_sending_key];
        // The request itself may have no key, because a request that was not taken can always be
        // sent again.
        for (configure, has_keys) in configurations
            .into_iter()
            .flat_map(|layer| [(layer, true), (layer, false)])
        {
            check(
                configure,
                has_keys,
                &[
                    (&[Lost], 1, Known::Unknown, false),
                    (&[Respond(500)], 1, Known::Status(500), false),
                    (&[Respond(503)], 1, Known::Status(503), false),
                    (&[Respond(408)], 1, Known::Status(408), false),
                    (&[Refused, Respond(201)], 2, Known::Status(201), false),
                    (&[Respond(429), Respond(201)], 2, Known::Status(201), false),
                    (&[Refused, Lost], 2, Known::Unknown, false),
                    (&[Respond(429), Respond(503)], 2, Known::Status(503), false),
                    (&[Refused], 5, Known::Failed, true),
                    (&[Respond(429)], 5, Known::Status(429), true),
                    (&[Respond(401)], 1, Known::Status(401), true),
                ],
            )
            .await;
        }
    }

    /// The refusal of a later attempt does not show what the lost attempt before it did.
    #[tokio::test(start_paused = true)]
    async fn a_lost_request_is_repeated_if_the_third_party_honours_keys() {
        check(
            OnceLayer::assume_keys_honoured,
            true,
            &[
                (&[Lost, Respond(201)], 2, Known::Status(201), false),
                (&[Respond(503), Respond(201)], 2, Known::Status(201), false),
                (&[Lost, Respond(422)], 2, Known::Status(422), false),
                (&[Lost, Respond(401)], 2, Known::Status(401), false),
                (&[Lost, Respond(429)], 5, Known::Status(429), false),
                (&[Lost, Refused], 5, Known::Unknown, false),
                (&[Refused], 5, Known::Failed, true),
            ],
        )
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_idempotent_method_is_not_repeated_without_honoured_keys() {
        let arrived = Arc::new(AtomicUsize::new(0));
        let layer = layer().1.with_methods([Method::PUT]);
        for client in clients(&layer, true, &[Lost], &arrived) {
            let mut put = request("x");
            *put.method_mut() = Method::PUT;
            assert_eq!(send(client, put).await, Known::Unknown);
        }
        assert_eq!(arrived.load(Ordering::SeqCst), 1);
    }
}

fn to(host: &str) -> Request<Full<Bytes>> {
    Request::post(format!("https://{host}/pay"))
        .header("idempotency-key", "k")
        .body(Full::from("100"))
        .unwrap()
}

#[tokio::test]
async fn a_call_to_another_host_never_gets_the_response_of_the_first() {
    let http = service_fn(|request: Request<Full<Bytes>>| async move {
        let host = request.uri().host().unwrap().to_owned();
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(host)))
    });
    let client = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft()).layer(http);
    client.clone().oneshot(to("a.example")).await.unwrap();
    let other = client.oneshot(to("b.example")).await;
    assert!(
        !matches!(&other, Ok(response) if response.headers().contains_key("idempotent-replayed")),
        "the call to b.example was not made, and the caller got the response of a.example: {other:?}"
    );
}

/// The client adds the host from the field only after the layer.
#[tokio::test]
async fn a_call_with_another_host_field_is_another_call() {
    let call = |host: &str| {
        let request = Request::post("/pay").header("idempotency-key", "k");
        request.header("host", host).body(Full::from("100")).unwrap()
    };
    let http =
        service_fn(|_: Request<Full<Bytes>>| ready(Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("paid")))));
    let client = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft()).layer(http);
    client.clone().oneshot(call("a.example")).await.unwrap();
    let other = client.oneshot(call("b.example")).await;
    assert!(matches!(other, Err(OnceError::Mismatch)), "{other:?}");
}

#[tokio::test]
async fn a_target_is_the_same_with_its_default_port() {
    let targets = [
        ("http://bank.example/pay", "http://bank.example:80/pay"),
        ("https://bank.example/pay", "https://bank.example:443/pay"),
    ];
    for (short, long) in targets {
        let client = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft())
            .layer(service_fn(|_: Request<Full<Bytes>>| ready(respond(201))));
        let send = |target: &str| {
            let mut request = to("bank.example");
            *request.uri_mut() = target.parse().unwrap();
            client.clone().oneshot(request)
        };
        send(short).await.unwrap();
        assert_eq!(send(long).await.unwrap().headers()["idempotent-replayed"], "true");
        for other in ["http://bank.example:443/pay", "https://bank.example:80/pay"] {
            assert!(matches!(send(other).await, Err(OnceError::Mismatch)), "{other}");
        }
    }
}

#[tokio::test]
async fn a_refusal_after_a_lost_attempt_is_not_stored_without_a_sent_key() {
    let calls = Arc::new(AtomicUsize::new(0));
    let http = service_fn(move |_: Request<Full<Bytes>>| {
        // The first attempt placed the order, and its response was lost. The next attempt finds the
        // order.
        let first = calls.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            if first {
                return Err("reset");
            }
            let mut response = Response::new(Full::<Bytes>::from("already exists"));
            *response.status_mut() = StatusCode::CONFLICT;
            Ok(response)
        }
    });
    let client = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft())
        .without_sending_key()
        .at_least_once()
        .layer(http);
    assert!(matches!(
        client.clone().oneshot(to("a.example")).await,
        Err(OnceError::Unknown(_))
    ));
    let second = client.oneshot(to("a.example")).await;
    assert!(
        matches!(second, Err(OnceError::Unknown(_))),
        "a failure was recorded for a call that took effect: {second:?}"
    );
}
