//! What a client sends again, when it stops, and what it says about a call: against servers written by hand, and our own.

use std::convert::Infallible;
use std::future::ready;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use tokio::time::Instant;
use tower::retry::budget::TpsBudget;
use tower::{service_fn, ServiceBuilder, ServiceExt};
use tower_idempotency::client::{
    CallError, CallLayer, CallOutcome, CallReport, CloneBody, CollectError, ErrorClass, IdempotencyKeyLayer,
    KeyPlacementError, ProviderProfile, ResponseMeaning, RetryAdvice, RetryPolicy,
};
use tower_idempotency::{IdempotencyLayer, MemoryStore};

use crate::support;

/// What a server does with an attempt.
#[derive(Clone)]
enum Act {
    Answer(u16, &'static [(&'static str, &'static str)]),
    Break(io::ErrorKind),
}
use Act::{Answer, Break};

struct Called {
    ended: Result<CallReport, (u32, CallOutcome)>,
    status: Option<u16>,
    /// When each attempt came, since the first.
    at: Vec<Duration>,
}

impl Called {
    fn attempts(&self) -> usize {
        self.at.len()
    }

    fn outcome(&self) -> CallOutcome {
        match &self.ended {
            Ok(delivery) => delivery.outcome(),
            Err((_, outcome)) => *outcome,
        }
    }
}

fn request(method: &Method, keyed: bool) -> Request<String> {
    let mut request = Request::builder()
        .method(method)
        .uri("/charges")
        .body("amount=1".to_owned())
        .unwrap();
    if keyed {
        request.headers_mut().insert("idempotency-key", "k".parse().unwrap());
    }
    request
}

/// Sends a request to a server that acts as given, attempt by attempt; the last act is repeated.
async fn call<B: CloneBody>(policy: RetryPolicy, request: Request<B>, acts: &[Act]) -> Called {
    let at = Arc::new(Mutex::new(Vec::new()));
    let (times, acts) = (Arc::clone(&at), acts.to_vec());
    #[expect(clippy::disallowed_methods, reason = "the paused time of the test")]
    let client = ServiceBuilder::new()
        .layer(CallLayer::new(policy))
        .service(service_fn(move |_: Request<B>| {
            let mut times = times.lock().unwrap();
            times.push(Instant::now());
            let act = acts[(times.len() - 1).min(acts.len() - 1)].clone();
            ready(match act {
                Answer(status, headers) => {
                    let mut response = Response::builder().status(status);
                    for (name, value) in headers {
                        response = response.header(*name, *value);
                    }
                    Ok(response.body(()).unwrap())
                }
                Break(kind) => Err(io::Error::from(kind)),
            })
        }));
    let result = client.oneshot(request).await;
    let at = at.lock().unwrap();
    let at: Vec<Duration> = at.iter().map(|time| *time - at[0]).collect();
    let status = result.as_ref().ok().map(|response| response.status().as_u16());
    let ended = match result {
        Ok(response) => Ok(*response.extensions().get::<CallReport>().unwrap()),
        Err(error) => Err((error.attempts(), error.outcome())),
    };
    let counted = ended
        .as_ref()
        .map_or_else(|(attempts, _)| *attempts, CallReport::attempts);
    assert_eq!(
        usize::try_from(counted),
        Ok(at.len()),
        "the caller is told the attempts"
    );
    Called { ended, status, at }
}

fn policy(profile: ProviderProfile) -> RetryPolicy {
    let budget = TpsBudget::new(Duration::from_secs(10), 1000, 1.0);
    RetryPolicy::new(profile).with_budget(budget)
}

async fn post(profile: ProviderProfile, acts: &[Act]) -> Called {
    call(policy(profile), request(&Method::POST, true), acts).await
}

const LOST: Act = Break(io::ErrorKind::ConnectionReset);
const OK: Act = Answer(200, &[]);

/// Every status under every profile: sent again or not, and what it says about the effect.
#[tokio::test(start_paused = true)]
async fn the_table_of_statuses_and_profiles() {
    let profiles: [(&str, ProviderProfile); 6] = [
        ("draft", ProviderProfile::draft()),
        ("stripe", ProviderProfile::stripe()),
        ("adyen", ProviderProfile::adyen()),
        ("paypal", ProviderProfile::paypal()),
        ("checkout", ProviderProfile::checkout()),
        ("repeatable requests", ProviderProfile::repeatable_requests()),
    ];
    for (name, profile) in profiles {
        for code in 100..600_u16 {
            let status = StatusCode::from_u16(code).unwrap();
            let none = http::HeaderMap::new();
            let repeated = match code {
                408 | 425 | 429 | 500 | 502 | 503 | 504 => true,
                409 => name == "stripe",
                _ => false,
            };
            let advice = if repeated {
                RetryAdvice::Repeat
            } else {
                RetryAdvice::Final
            };
            assert_eq!(profile.advice(status, &none), advice, "{name} {code}");
            let meaning = match code {
                425 | 429 => ResponseMeaning::NotTaken,
                409 if name == "stripe" => ResponseMeaning::Unknown,
                501 => ResponseMeaning::Responded { settles: false },
                ..=199 | 408 | 500.. => ResponseMeaning::Unknown,
                307 | 308 => ResponseMeaning::Responded { settles: false },
                200..=399 | 402 | 409 | 410 | 412 | 422 => ResponseMeaning::Responded { settles: true },
                _ => ResponseMeaning::Responded { settles: false },
            };
            assert_eq!(profile.meaning(status, &none), meaning, "{name} {code}");
            // And the policy does as the table says.
            let called = post(
                profile.clone().with_header("idempotency-key".parse().unwrap()),
                &[Answer(code, &[]), OK],
            )
            .await;
            assert_eq!(called.attempts(), if repeated { 2 } else { 1 }, "{name} {code}");
        }
    }
}

#[test]
fn what_a_server_says_wins_over_the_status() {
    let headers = |name: &'static str, value: &str| {
        let mut headers = http::HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    };
    use RetryAdvice::{Final, Repeat};
    for (profile, status, name, value, advice) in [
        (ProviderProfile::stripe(), 500, "stripe-should-retry", "false", Final),
        (ProviderProfile::stripe(), 409, "stripe-should-retry", "false", Final),
        (ProviderProfile::stripe(), 402, "stripe-should-retry", "true", Repeat),
        (ProviderProfile::stripe(), 500, "stripe-should-retry", "perhaps", Repeat),
        // The server would replay the response again and again.
        (ProviderProfile::stripe(), 500, "idempotent-replayed", "true", Final),
        (ProviderProfile::draft(), 503, "idempotent-replayed", "?1", Final),
        (ProviderProfile::adyen(), 422, "transient-error", "true", Repeat),
        (ProviderProfile::adyen(), 500, "transient-error", "false", Final),
        (ProviderProfile::adyen(), 422, "stripe-should-retry", "true", Final),
        // A 409 is repeated only when it is marked as in flight.
        (ProviderProfile::draft(), 409, "retry-after", "1", Repeat),
        (ProviderProfile::draft(), 409, "x-other", "1", Final),
    ] {
        let status = StatusCode::from_u16(status).unwrap();
        assert_eq!(
            profile.advice(status, &headers(name, value)),
            advice,
            "{status} {name}: {value}"
        );
    }
    let custom = ProviderProfile::draft()
        .with_in_flight(|headers| headers.contains_key("x-busy"))
        .with_repeated([StatusCode::IM_A_TEAPOT]);
    assert_eq!(custom.advice(StatusCode::CONFLICT, &headers("x-busy", "1")), Repeat);
    assert_eq!(custom.advice(StatusCode::CONFLICT, &headers("retry-after", "1")), Final);
    assert_eq!(custom.advice(StatusCode::IM_A_TEAPOT, &http::HeaderMap::new()), Repeat);
    assert_eq!(custom.advice(StatusCode::BAD_GATEWAY, &http::HeaderMap::new()), Final);
}

/// As Stripe's own clients do: the header field of the response wins over its status, and `Retry-After` sets the pause.
#[tokio::test(start_paused = true)]
async fn the_policy_obeys_stripe_should_retry() {
    const NO: (&str, &str) = ("stripe-should-retry", "false");
    const YES: (&str, &str) = ("stripe-should-retry", "true");
    const AFTER: (&str, &str) = ("retry-after", "7");
    for status in [400, 402, 409, 429, 500, 503] {
        let called = post(ProviderProfile::stripe(), &[Answer(status, &[NO, AFTER]), OK]).await;
        assert_eq!((called.attempts(), called.status), (1, Some(status)), "{status}");
        let called = post(ProviderProfile::stripe(), &[Answer(status, &[YES]), OK]).await;
        assert_eq!((called.attempts(), called.status), (2, Some(200)), "{status}");
        let called = post(ProviderProfile::stripe(), &[Answer(status, &[YES, AFTER]), OK]).await;
        assert!(
            (7.0..7.3).contains(&called.at[1].as_secs_f64()),
            "{status} {:?}",
            called.at
        );
        // The field does not make a request safe to repeat.
        let without_key = request(&Method::POST, false);
        let called = call(
            policy(ProviderProfile::stripe()),
            without_key,
            &[Answer(status, &[YES]), OK],
        )
        .await;
        assert_eq!(called.attempts(), 1, "{status} without a key");
        // Another provider's field is no advice.
        let called = post(ProviderProfile::draft(), &[Answer(400, &[YES]), OK]).await;
        assert_eq!(called.attempts(), 1);
    }
    let called = post(ProviderProfile::stripe(), &[Answer(500, &[YES])]).await;
    assert_eq!(called.attempts(), 5, "the number of attempts bounds it");
    // The server knows better than the replay marker whether another attempt helps.
    let replayed = Answer(500, &[YES, ("idempotent-replayed", "true")]);
    assert_eq!(post(ProviderProfile::stripe(), &[replayed, OK]).await.attempts(), 2);
    let replayed = Answer(500, &[("idempotent-replayed", "true")]);
    assert_eq!(post(ProviderProfile::stripe(), &[replayed, OK]).await.attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn without_a_key_only_what_is_idempotent_by_its_method_is_repeated() {
    for (method, repeated) in [
        (Method::GET, true),
        (Method::HEAD, true),
        (Method::OPTIONS, true),
        (Method::TRACE, true),
        (Method::PUT, true),
        (Method::DELETE, true),
        (Method::POST, false),
        (Method::PATCH, false),
        (Method::CONNECT, false),
    ] {
        for trouble in [LOST, Answer(503, &[])] {
            let called = call(
                policy(ProviderProfile::draft()),
                request(&method, false),
                &[trouble, OK],
            )
            .await;
            assert_eq!(called.attempts(), if repeated { 2 } else { 1 }, "{method}");
            let called = call(policy(ProviderProfile::draft()), request(&method, true), &[LOST, OK]).await;
            assert_eq!(called.attempts(), 2, "{method} with a key");
        }
    }
    // A key in another field than the profile's is none.
    let called = call(
        policy(ProviderProfile::paypal()),
        request(&Method::POST, true),
        &[LOST, OK],
    )
    .await;
    assert_eq!((called.attempts(), called.outcome()), (1, CallOutcome::Unknown));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_cannot_be_cloned_is_sent_once() {
    let body: BoxBody<Bytes, Infallible> = Full::new(Bytes::from_static(b"amount=1")).boxed();
    let request = request(&Method::POST, true).map(|_| body);
    let called = call(policy(ProviderProfile::draft()), request, &[LOST, OK]).await;
    assert_eq!((called.attempts(), called.outcome()), (1, CallOutcome::Unknown));
}

#[tokio::test(start_paused = true)]
async fn attempts_are_bounded_and_pauses_are_within_their_doubling_bounds() {
    let backoff = |policy: RetryPolicy| {
        policy
            .with_initial_backoff(Duration::from_secs(1))
            .with_max_backoff(Duration::from_secs(4))
    };
    let (mut shortest, mut longest) = (Duration::MAX, Duration::ZERO);
    for _ in 0..200 {
        let policy = backoff(policy(ProviderProfile::draft())).with_max_attempts(5);
        let called = call(policy, request(&Method::POST, true), &[LOST]).await;
        assert_eq!((called.attempts(), called.outcome()), (5, CallOutcome::Unknown));
        for (pause, bound) in called.at.windows(2).map(|pair| pair[1] - pair[0]).zip([1, 2, 4, 4]) {
            // Tokio's timers are exact to a millisecond.
            assert!(pause <= Duration::from_millis(bound * 1000 + 1), "{pause:?}");
            (shortest, longest) = (shortest.min(pause), longest.max(pause));
        }
    }
    assert!(
        shortest < Duration::from_millis(200) && longest > Duration::from_secs(3),
        "full jitter: {shortest:?}, {longest:?}"
    );
    let called = call(
        policy(ProviderProfile::draft()).with_max_attempts(0),
        request(&Method::POST, true),
        &[LOST],
    )
    .await;
    assert_eq!(called.attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_waited_for_in_both_forms() {
    const DATE: &[(&str, &str)] = &[
        ("date", "Fri, 31 Dec 1999 23:59:50 GMT"),
        ("retry-after", "Fri, 31 Dec 1999 23:59:57 GMT"),
    ];
    for asked in [&[("retry-after", "7")][..], DATE] {
        let called = post(ProviderProfile::draft(), &[Answer(503, asked), OK]).await;
        assert!((7.0..7.3).contains(&called.at[1].as_secs_f64()), "{:?}", called.at);
    }
    // 409 in flight, as the draft has it.
    let called = post(ProviderProfile::draft(), &[Answer(409, &[("retry-after", "1")]), OK]).await;
    assert_eq!((called.attempts(), called.outcome()), (2, CallOutcome::Responded));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_repeated_beyond_the_horizon_or_near_the_end_of_the_retention() {
    let hour = [Answer(503, &[("retry-after", "3600")])];
    let called = post(ProviderProfile::draft(), &hour).await;
    assert_eq!(
        (called.attempts(), called.status),
        (1, Some(503)),
        "the default horizon is a minute"
    );
    let patient = policy(ProviderProfile::draft())
        .with_horizon(Duration::from_secs(3 * 3600))
        .with_max_attempts(9);
    assert_eq!(
        call(patient.clone(), request(&Method::POST, true), &hour)
            .await
            .attempts(),
        3
    );
    let short = ProviderProfile::draft().with_retention(Duration::from_secs(4000));
    let patient = policy(short).with_horizon(Duration::MAX);
    assert_eq!(
        call(patient, request(&Method::POST, true), &hour).await.attempts(),
        1,
        "3600 s are nine tenths of 4000 s"
    );
}

#[tokio::test(start_paused = true)]
async fn a_budget_bounds_what_all_requests_repeat_together() {
    let policy =
        RetryPolicy::new(ProviderProfile::draft()).with_budget(TpsBudget::new(Duration::from_secs(10), 1, 0.0));
    let mut attempts = 0;
    for _ in 0..50 {
        attempts += call(
            policy
                .clone()
                .with_initial_backoff(Duration::ZERO)
                .with_max_backoff(Duration::ZERO),
            request(&Method::POST, true),
            &[LOST],
        )
        .await
        .attempts();
    }
    assert!(
        (51..=80).contains(&attempts),
        "50 requests, and about one more a second: {attempts}"
    );
}

#[tokio::test(start_paused = true)]
async fn unknown_is_an_outcome_of_its_own() {
    use CallOutcome::{NotTaken, Responded, Unknown};
    const REFUSED: Act = Break(io::ErrorKind::ConnectionRefused);
    let classified = || {
        policy(ProviderProfile::draft())
            .with_max_attempts(3)
            .with_errors(|error: &io::Error| match error.kind() {
                io::ErrorKind::ConnectionRefused => ErrorClass::NotSent,
                io::ErrorKind::InvalidInput => ErrorClass::Final,
                _ => ErrorClass::Lost,
            })
    };
    for (acts, attempts, outcome) in [
        (&[OK][..], 1, Responded),
        (&[Answer(402, &[])], 1, Responded),
        (&[LOST, OK], 2, Responded),
        (&[LOST], 3, Unknown),
        (&[REFUSED], 3, NotTaken),
        (&[REFUSED, LOST, REFUSED], 3, Unknown),
        (&[Break(io::ErrorKind::InvalidInput)], 1, NotTaken),
        (&[Answer(429, &[])], 3, NotTaken),
        (&[Answer(503, &[]), Answer(429, &[])], 3, Unknown),
        (&[Answer(500, &[])], 3, Unknown),
        // The login expired between the attempts: of the first, it says nothing.
        (&[LOST, Answer(401, &[])], 2, Unknown),
        (&[Answer(401, &[])], 1, Responded),
        (&[LOST, Answer(401, &[("idempotent-replayed", "true")])], 2, Responded),
        (&[Answer(500, &[("idempotent-replayed", "true")])], 1, Unknown),
    ] {
        let called = call(classified(), request(&Method::POST, true), acts).await;
        assert_eq!(
            (called.attempts(), called.outcome()),
            (attempts, outcome),
            "{:?}",
            called.status
        );
    }
    let called = post(
        ProviderProfile::draft(),
        &[Answer(200, &[("idempotent-replayed", "true")])],
    )
    .await;
    assert!(called.ended.unwrap().is_replay());
    assert!(!post(ProviderProfile::draft(), &[OK]).await.ended.unwrap().is_replay());
}

#[tokio::test]
async fn a_client_that_is_not_ready_sends_nothing() {
    let error: CallError<io::Error> = {
        let client = ServiceBuilder::new()
            .layer(CallLayer::new(policy(ProviderProfile::draft())))
            .service(NotReady);
        client.oneshot(request(&Method::POST, true)).await.unwrap_err()
    };
    assert_eq!((error.attempts(), error.outcome()), (0, CallOutcome::NotTaken));
    assert_eq!(error.into_source().kind(), io::ErrorKind::NotConnected);
}

#[derive(Clone)]
struct NotReady;

impl tower::Service<Request<String>> for NotReady {
    type Response = Response<()>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Response<()>>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
    }

    fn call(&mut self, _: Request<String>) -> Self::Future {
        unreachable!("it was not ready")
    }
}

/// The error said "the client failed" for every call, however often it was sent.
#[tokio::test(start_paused = true)]
async fn an_error_says_what_happened_and_has_the_cause() {
    use std::error::Error;
    let failed = |attempts: u32, kind: io::ErrorKind| async move {
        let policy = policy(ProviderProfile::draft())
            .with_max_attempts(attempts)
            .with_errors(|error: &io::Error| match error.kind() {
                io::ErrorKind::ConnectionRefused => ErrorClass::NotSent,
                _ => ErrorClass::Lost,
            });
        let client = ServiceBuilder::new()
            .layer(IdempotencyKeyLayer::new(ProviderProfile::draft()))
            .layer(CallLayer::new(policy))
            .service(service_fn(move |_: Request<String>| {
                ready(Err::<Response<()>, _>(io::Error::from(kind)))
            }));
        client.oneshot(request(&Method::POST, true)).await.unwrap_err()
    };
    for (attempts, kind, text) in [
        (
            5,
            io::ErrorKind::ConnectionReset,
            "the HTTP call failed after 5 attempts; outcome unknown",
        ),
        (
            1,
            io::ErrorKind::TimedOut,
            "the HTTP call failed after 1 attempt; outcome unknown",
        ),
        (
            2,
            io::ErrorKind::ConnectionRefused,
            "the HTTP call failed after 2 attempts; no effect",
        ),
    ] {
        let error = failed(attempts, kind).await;
        assert_eq!(error.to_string(), text);
        let cause = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
        assert_eq!(cause.kind(), kind, "the next error in the chain is the cause");
        let KeyPlacementError::Service(error) = error else {
            panic!("{error}")
        };
        assert_eq!(error.to_string(), text);
        assert!(error.source().unwrap().is::<io::Error>());
    }
    let client = ServiceBuilder::new()
        .layer(CallLayer::new(policy(ProviderProfile::draft())))
        .service(NotReady);
    let error = client.oneshot(request(&Method::POST, true)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the HTTP call failed before its first attempt; no effect"
    );
}

/// A client that does not check the length of a body, as hyper does.
#[tokio::test(start_paused = true)]
async fn a_body_that_ends_before_its_declared_length_is_lost() {
    let arrivals = Arc::new(AtomicUsize::new(0));
    let arrived = Arc::clone(&arrivals);
    let http = service_fn(move |request: Request<String>| {
        let is_short = arrived.fetch_add(1, Ordering::SeqCst) == 0 && request.method() != Method::HEAD;
        let response = Response::builder().header("content-length", "7");
        let text = if is_short { "half" } else { "charged" };
        ready(Ok::<_, io::Error>(response.body(Full::<Bytes>::from(text)).unwrap()))
    });
    let calls = CallLayer::new(policy(ProviderProfile::draft())).collect_responses();
    let client = ServiceBuilder::new().layer(calls).service(http);
    let send = |keyed| client.clone().oneshot(request(&Method::POST, keyed));
    let response = send(true).await.unwrap();
    assert_eq!(response.extensions().get::<CallReport>().unwrap().attempts(), 2);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "charged");

    arrivals.store(0, Ordering::SeqCst);
    let error = send(false).await.unwrap_err();
    assert_eq!((error.attempts(), error.outcome()), (1, CallOutcome::Responded));
    match error.into_source() {
        CollectError::Body(error) => {
            let text = "the body of the response with status 200 ended after 4 bytes, before its declared length";
            assert_eq!((error.status(), error.to_string()), (StatusCode::OK, text.to_owned()));
        }
        error => panic!("{error}"),
    }
}

/// The bodies of some middlewares return their first size hint to the end. Such a body looked as if it ended too early.
#[tokio::test(start_paused = true)]
async fn a_body_whose_size_hint_never_falls_is_not_lost() {
    let http = service_fn(|_: Request<String>| {
        ready(Ok::<_, io::Error>(Response::new(support::fixed_hint(&["char", "ged"]))))
    });
    let calls = CallLayer::new(policy(ProviderProfile::draft())).collect_responses();
    let client = ServiceBuilder::new().layer(calls).service(http);
    let response = client.oneshot(request(&Method::POST, true)).await.unwrap();
    assert_eq!(response.extensions().get::<CallReport>().unwrap().attempts(), 1);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "charged");
}

/// A replayed response whose body was lost is requested again, although a complete one would be final.
#[tokio::test(start_paused = true)]
async fn a_lost_body_is_requested_again_whatever_its_head_advises() {
    for (status, name, value) in [
        (200, "idempotent-replayed", "true"),
        (500, "idempotent-replayed", "true"),
        (402, "stripe-should-retry", "false"),
    ] {
        let arrivals = Arc::new(AtomicUsize::new(0));
        let arrived = Arc::clone(&arrivals);
        let http = service_fn(move |_: Request<String>| {
            let declared = if arrived.fetch_add(1, Ordering::SeqCst) == 0 {
                8
            } else {
                7
            };
            let response = Response::builder().status(status).header(name, value);
            let response = response.header("content-length", declared);
            ready(Ok::<_, io::Error>(
                response.body(Full::<Bytes>::from("charged")).unwrap(),
            ))
        });
        let calls = CallLayer::new(policy(ProviderProfile::stripe())).collect_responses();
        let client = ServiceBuilder::new().layer(calls).service(http);
        let response = client.oneshot(request(&Method::POST, true)).await.unwrap();
        assert_eq!(
            (response.status().as_u16(), arrivals.load(Ordering::SeqCst)),
            (status, 2)
        );
    }
}

/// Our own layer on the other side, its answers lost again and again: one execution, and the caller learns that it is a replay.
#[tokio::test(start_paused = true)]
async fn against_our_own_layer_every_call_takes_effect_once() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let server = ServiceBuilder::new()
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .service(service_fn(move |_: Request<Full<Bytes>>| {
            let run = counted.fetch_add(1, Ordering::SeqCst) + 1;
            ready(Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!(
                "charge {run}"
            ))))))
        }));
    let arrivals = Arc::new(AtomicUsize::new(0));
    let network = service_fn(move |request: Request<Full<Bytes>>| {
        let (arrival, server) = (arrivals.fetch_add(1, Ordering::SeqCst), server.clone());
        async move {
            if arrival % 5 == 0 {
                return Err(io::Error::from(io::ErrorKind::ConnectionReset));
            }
            let Ok(answer) = server.oneshot(request).await;
            // Of what arrives, two answers in three are lost.
            if arrival % 3 == 0 {
                Ok(answer)
            } else {
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
    });
    let client = ServiceBuilder::new()
        .layer(IdempotencyKeyLayer::new(ProviderProfile::draft()))
        .layer(CallLayer::new(policy(ProviderProfile::draft()).with_max_attempts(20)))
        .service(network);
    for call in 1..=50 {
        let request = Request::post("/charges")
            .body(Full::new(Bytes::from_static(b"amount=1")))
            .unwrap();
        let response = client.clone().oneshot(request).await.unwrap();
        let delivery = *response.extensions().get::<CallReport>().unwrap();
        assert_eq!(delivery.outcome(), CallOutcome::Responded);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, format!("charge {call}"));
        assert_eq!(
            runs.load(Ordering::SeqCst),
            call,
            "after {} attempts",
            delivery.attempts()
        );
    }
}

/// Written after what Stripe publishes: 400 with `idempotency_error` when a key comes with other parameters, 409 while the first
/// request is in progress, 500 kept and replayed, `Idempotent-Replayed` on every replay.
mod stripe {
    use super::*;
    use std::collections::HashMap;

    type Kept = (String, Option<u16>);

    #[derive(Clone, Default)]
    struct Stripe {
        /// The parameters under each key, and the status of the answer, once there is one.
        kept: Arc<Mutex<HashMap<String, Kept>>>,
        charges: Arc<AtomicUsize>,
        /// The answer of the next charge, and how many requests are answered 409 before it ends.
        next: Arc<Mutex<(u16, usize)>>,
    }

    impl Stripe {
        fn answer(&self, request: &Request<String>) -> Response<String> {
            let key = request.headers()["idempotency-key"].to_str().unwrap().to_owned();
            let answer = |status: u16, replayed: bool, body: &str| {
                let mut response = Response::new(body.to_owned());
                *response.status_mut() = StatusCode::from_u16(status).unwrap();
                if replayed {
                    response
                        .headers_mut()
                        .insert("idempotent-replayed", "true".parse().unwrap());
                }
                response
            };
            let mut kept = self.kept.lock().unwrap();
            let mut next = self.next.lock().unwrap();
            match kept.get_mut(&key) {
                Some((parameters, _)) if parameters != request.body() => {
                    answer(400, false, r#"{"error":{"type":"idempotency_error"}}"#)
                }
                Some((_, Some(status))) => answer(*status, true, "charge"),
                Some((_, status)) => {
                    next.1 = next.1.saturating_sub(1);
                    if next.1 == 0 {
                        *status = Some(next.0);
                    }
                    answer(409, false, r#"{"error":{"code":"idempotency_key_in_use"}}"#)
                }
                None => {
                    self.charges.fetch_add(1, Ordering::SeqCst);
                    let is_over = next.1 == 0;
                    kept.insert(key, (request.body().clone(), is_over.then_some(next.0)));
                    answer(if is_over { next.0 } else { 409 }, false, "charge")
                }
            }
        }

        async fn charge(
            &self,
            key: &str,
            parameters: &str,
            lost: usize,
        ) -> Result<Response<String>, (u32, CallOutcome)> {
            let (server, lost) = (self.clone(), Arc::new(AtomicUsize::new(lost)));
            let network = service_fn(move |request: Request<String>| {
                let answer = server.answer(&request);
                let is_lost = lost
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |lost| lost.checked_sub(1))
                    .is_ok();
                ready(if is_lost {
                    Err(io::Error::from(io::ErrorKind::TimedOut))
                } else {
                    Ok(answer)
                })
            });
            let client = ServiceBuilder::new()
                .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()))
                .layer(CallLayer::new(policy(ProviderProfile::stripe())))
                .service(network);
            let request = Request::post("/v1/charges")
                .header("idempotency-key", key)
                .body(parameters.to_owned())
                .unwrap();
            client.oneshot(request).await.map_err(|error| match error {
                KeyPlacementError::Service(error) => (error.attempts(), error.outcome()),
                error => panic!("{error}"),
            })
        }
    }

    fn delivery(response: &Response<String>) -> (u16, u32, bool, CallOutcome) {
        let delivery = response.extensions().get::<CallReport>().unwrap();
        (
            response.status().as_u16(),
            delivery.attempts(),
            delivery.is_replay(),
            delivery.outcome(),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_answer_is_asked_for_again_and_comes_as_a_replay() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (200, 0);
        let answer = stripe.charge("k", "amount=1", 2).await.unwrap();
        assert_eq!(delivery(&answer), (200, 3, true, CallOutcome::Responded));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
        // All answers lost: it did happen, and the caller is not told otherwise.
        assert_eq!(
            stripe.charge("l", "amount=1", 99).await.unwrap_err(),
            (5, CallOutcome::Unknown)
        );
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_409_in_progress_is_waited_for() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (200, 2);
        let answer = stripe.charge("k", "amount=1", 0).await.unwrap();
        assert_eq!(delivery(&answer), (200, 4, true, CallOutcome::Responded));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_500_that_is_replayed_is_final_and_unknown() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (500, 0);
        let answer = stripe.charge("k", "amount=1", 0).await.unwrap();
        assert_eq!(delivery(&answer), (500, 2, true, CallOutcome::Unknown));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_used_again_for_something_else_is_final() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (200, 0);
        stripe.charge("k", "amount=1", 0).await.unwrap();
        let answer = stripe.charge("k", "amount=2", 0).await.unwrap();
        assert_eq!(delivery(&answer), (400, 1, false, CallOutcome::Responded));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
    }
}
