//! Retries of the client: which requests it sends again, when it stops, and what it reports about a
//! call. The servers are written by hand, except for one with the layer of this crate.

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
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::client::{
    CallError, CallLayer, CallOutcome, CallReport, CloneBody, CollectError, ErrorClass, IdempotencyKeyLayer,
    KeyPlacementError, ProviderProfile, ResponseMeaning, RetryAdvice, RetryPolicy,
};
use tower_idempotency::{BufferedBody, IdempotencyLayer, MemoryStore};

use crate::support;

/// How a server treats an attempt.
#[derive(Clone)]
enum Act {
    Respond(u16, &'static [(&'static str, &'static str)]),
    Break(io::ErrorKind),
}
use Act::{Break, Respond};

struct Called {
    ended: Result<CallReport, (u32, CallOutcome)>,
    status: Option<u16>,
    /// The time of each attempt since the first one.
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

/// Sends a request to a server that performs one of these acts for each attempt and repeats the
/// last one.
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
                Respond(status, headers) => {
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
        "the caller gets the number of attempts"
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
const OK: Act = Respond(200, &[]);

/// Checks for every status under every profile whether the client retries and what the status
/// means.
#[tokio::test(start_paused = true)]
async fn each_profile_judges_every_status_by_the_table() {
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
            // The policy follows the table.
            let called = post(
                profile.clone().with_header("idempotency-key".parse().unwrap()),
                &[Respond(code, &[]), OK],
            )
            .await;
            assert_eq!(called.attempts(), if repeated { 2 } else { 1 }, "{name} {code}");
        }
    }
}

#[test]
fn the_advice_of_a_server_overrides_the_status() {
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
        // The server would replay this response to every retry.
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
    let advised = ProviderProfile::stripe().with_repeat_marker(Some("x-again".parse().unwrap()));
    for (name, advice) in [("x-again", Repeat), ("stripe-should-retry", Final)] {
        assert_eq!(advised.advice(StatusCode::BAD_REQUEST, &headers(name, "true")), advice);
    }
    let custom = ProviderProfile::draft()
        .with_in_flight(|headers| headers.contains_key("x-busy"))
        .with_repeated([StatusCode::IM_A_TEAPOT]);
    assert_eq!(custom.advice(StatusCode::CONFLICT, &headers("x-busy", "1")), Repeat);
    assert_eq!(custom.advice(StatusCode::CONFLICT, &headers("retry-after", "1")), Final);
    assert_eq!(custom.advice(StatusCode::IM_A_TEAPOT, &http::HeaderMap::new()), Repeat);
    assert_eq!(custom.advice(StatusCode::BAD_GATEWAY, &http::HeaderMap::new()), Final);
}

/// The policy behaves like the clients of Stripe: the header field of the response takes precedence
/// over its status, and `Retry-After` sets the pause.
#[tokio::test(start_paused = true)]
async fn the_policy_obeys_stripe_should_retry() {
    const NO: (&str, &str) = ("stripe-should-retry", "false");
    const YES: (&str, &str) = ("stripe-should-retry", "true");
    const AFTER: (&str, &str) = ("retry-after", "7");
    for status in [400, 402, 409, 429, 500, 503] {
        let called = post(ProviderProfile::stripe(), &[Respond(status, &[NO, AFTER]), OK]).await;
        assert_eq!((called.attempts(), called.status), (1, Some(status)), "{status}");
        let called = post(ProviderProfile::stripe(), &[Respond(status, &[YES]), OK]).await;
        assert_eq!((called.attempts(), called.status), (2, Some(200)), "{status}");
        let called = post(ProviderProfile::stripe(), &[Respond(status, &[YES, AFTER]), OK]).await;
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
            &[Respond(status, &[YES]), OK],
        )
        .await;
        assert_eq!(called.attempts(), 1, "{status} without a key");
        // The field of another provider gives no advice.
        let called = post(ProviderProfile::draft(), &[Respond(400, &[YES]), OK]).await;
        assert_eq!(called.attempts(), 1);
    }
    let called = post(ProviderProfile::stripe(), &[Respond(500, &[YES])]).await;
    assert_eq!(called.attempts(), 5, "the policy bounds the attempts");
    // The server knows better than the replay marker whether another attempt helps.
    let replayed = Respond(500, &[YES, ("idempotent-replayed", "true")]);
    assert_eq!(post(ProviderProfile::stripe(), &[replayed, OK]).await.attempts(), 2);
    let replayed = Respond(500, &[("idempotent-replayed", "true")]);
    assert_eq!(post(ProviderProfile::stripe(), &[replayed, OK]).await.attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn without_a_key_only_idempotent_methods_are_retried() {
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
        for trouble in [LOST, Respond(503, &[])] {
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
    // A key in another header field than that of the profile does not count.
    let called = call(
        policy(ProviderProfile::paypal()),
        request(&Method::POST, true),
        &[LOST, OK],
    )
    .await;
    assert_eq!((called.attempts(), called.outcome()), (1, CallOutcome::Unknown));
}

/// Sends a body whose first response is lost. Returns the number of attempts.
async fn attempts_with<B: CloneBody>(body: B) -> usize {
    let request = request(&Method::POST, true).map(|_| body);
    call(policy(ProviderProfile::draft()), request, &[LOST, OK])
        .await
        .attempts()
}

#[tokio::test(start_paused = true)]
async fn a_body_in_memory_is_sent_again_in_each_type() {
    type Either = http_body_util::Either<String, BoxBody<Bytes, Infallible>>;
    let bytes = || Full::new(Bytes::from_static(b"amount=1"));
    assert_eq!(attempts_with(bytes()).await, 2);
    assert_eq!(attempts_with("amount=1".to_owned()).await, 2);
    assert_eq!(attempts_with(http_body_util::Empty::<Bytes>::new()).await, 2);
    assert_eq!(attempts_with(()).await, 2);
    assert_eq!(attempts_with(Either::Left("amount=1".to_owned())).await, 2);
    assert_eq!(attempts_with(Either::Right(bytes().boxed())).await, 1);
    assert_eq!(attempts_with(BufferedBody::new(bytes())).await, 2);
    assert_eq!(attempts_with(BufferedBody::new(bytes().boxed())).await, 1);
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
            // The timers of tokio are exact to a millisecond.
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
async fn the_client_waits_for_both_forms_of_retry_after() {
    const DATE: &[(&str, &str)] = &[
        ("date", "Fri, 31 Dec 1999 23:59:50 GMT"),
        ("retry-after", "Fri, 31 Dec 1999 23:59:57 GMT"),
    ];
    for asked in [&[("retry-after", "7")][..], DATE] {
        let called = post(ProviderProfile::draft(), &[Respond(503, asked), OK]).await;
        assert!((7.0..7.3).contains(&called.at[1].as_secs_f64()), "{:?}", called.at);
    }
    // In the draft, 409 means that the request is in flight.
    let called = post(ProviderProfile::draft(), &[Respond(409, &[("retry-after", "1")]), OK]).await;
    assert_eq!((called.attempts(), called.outcome()), (2, CallOutcome::Responded));
}

#[tokio::test(start_paused = true)]
async fn the_client_does_not_retry_beyond_the_horizon_or_near_the_end_of_the_retention() {
    let hour = [Respond(503, &[("retry-after", "3600")])];
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
    let longer = ProviderProfile::draft().with_retention(Duration::from_secs(9000));
    let patient = policy(longer).with_horizon(Duration::MAX).with_max_attempts(9);
    let called = call(patient, request(&Method::POST, true), &hour).await;
    assert_eq!(called.attempts(), 3, "the retention begins with the first attempt");
}

/// The bounds that the providers document. After nine tenths of the retention, the server may have
/// deleted its record of the key, so a retry could take effect again.
#[tokio::test(start_paused = true)]
async fn each_profile_stops_before_the_retention_of_its_provider_ends() {
    const HOURS: [&[(&str, &str)]; 4] = [
        &[("retry-after", "18000")],
        &[("retry-after", "21600")],
        &[("retry-after", "75600")],
        &[("retry-after", "79200")],
    ];
    const DAYS: [&[(&str, &str)]; 2] = [&[("retry-after", "540000")], &[("retry-after", "549000")]];
    for (profile, within, beyond) in [
        (ProviderProfile::draft(), HOURS[2], HOURS[3]),
        (ProviderProfile::stripe(), HOURS[2], HOURS[3]),
        (ProviderProfile::adyen(), DAYS[0], DAYS[1]),
        (ProviderProfile::paypal(), HOURS[0], HOURS[1]),
        (ProviderProfile::checkout(), HOURS[2], HOURS[3]),
        (ProviderProfile::repeatable_requests(), HOURS[2], HOURS[3]),
    ] {
        for (asked, attempts) in [(within, 2), (beyond, 1)] {
            let mut keyed = request(&Method::POST, false);
            keyed.headers_mut().insert("x-key", "k".parse().unwrap());
            let profile = profile.clone().with_header("x-key".parse().unwrap());
            let patient = policy(profile).with_horizon(Duration::MAX);
            let called = call(patient, keyed, &[Respond(503, asked), OK]).await;
            assert_eq!(called.attempts(), attempts, "{asked:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_replay_is_recognised_only_by_the_marker_of_its_provider() {
    let marked = |name: &'static str| ProviderProfile::draft().with_replay_marker(Some(name.parse().unwrap()));
    const DRAFT: Act = Respond(500, &[("idempotent-replayed", "true")]);
    const OTHER: Act = Respond(500, &[("x-replay", "true")]);
    for (profile, replay, other) in [
        (ProviderProfile::draft(), Some(DRAFT), OTHER),
        (ProviderProfile::stripe(), Some(DRAFT), OTHER),
        (ProviderProfile::adyen(), Some(DRAFT), OTHER),
        (ProviderProfile::paypal(), None, DRAFT),
        (ProviderProfile::checkout(), None, DRAFT),
        (ProviderProfile::repeatable_requests(), None, DRAFT),
        (ProviderProfile::draft().with_replay_marker(None), None, DRAFT),
        (marked("x-replay"), Some(OTHER), DRAFT),
    ] {
        for (act, is_replay) in replay.map(|act| (act, true)).into_iter().chain([(other, false)]) {
            let mut keyed = request(&Method::POST, false);
            keyed.headers_mut().insert("x-key", "k".parse().unwrap());
            let profile = profile.clone().with_header("x-key".parse().unwrap());
            let called = call(policy(profile).with_max_attempts(2), keyed, &[act]).await;
            assert_eq!(called.ended.unwrap().is_replay(), is_replay);
            // The server would replay the same response again.
            assert_eq!(called.at.len(), if is_replay { 1 } else { 2 });
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_budget_bounds_the_retries_of_all_requests_together() {
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

/// Without deposits, a busy client would soon not retry at all.
#[tokio::test(start_paused = true)]
async fn a_call_that_ends_well_adds_to_the_budget() {
    let budget = TpsBudget::new(Duration::from_secs(60), 0, 1.0);
    let policy = RetryPolicy::new(ProviderProfile::draft()).with_budget(budget);
    let attempts = |acts: &'static [Act]| {
        let policy = policy.clone().with_initial_backoff(Duration::ZERO).with_max_attempts(2);
        async move { call(policy, request(&Method::POST, true), acts).await.attempts() }
    };
    assert_eq!(attempts(&[LOST]).await, 1);
    for _ in 0..5 {
        assert_eq!(attempts(&[OK]).await, 1);
    }
    assert_eq!(attempts(&[LOST]).await, 2);
}

#[tokio::test(start_paused = true)]
async fn a_retry_has_the_version_of_the_first_request() {
    let versions = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&versions);
    let client = ServiceBuilder::new()
        .layer(CallLayer::new(policy(ProviderProfile::draft()).with_max_attempts(2)))
        .service(service_fn(move |request: Request<String>| {
            seen.lock().unwrap().push(request.version());
            ready(Err::<Response<()>, _>(io::Error::from(io::ErrorKind::ConnectionReset)))
        }));
    let mut request = request(&Method::POST, true);
    *request.version_mut() = http::Version::HTTP_2;
    assert!(client.oneshot(request).await.is_err());
    assert_eq!(*versions.lock().unwrap(), [http::Version::HTTP_2; 2]);
}

#[tokio::test(start_paused = true)]
async fn each_sequence_of_attempts_has_its_outcome() {
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
        (&[Respond(402, &[])], 1, Responded),
        (&[LOST, OK], 2, Responded),
        (&[LOST], 3, Unknown),
        (&[REFUSED], 3, NotTaken),
        (&[REFUSED, LOST, REFUSED], 3, Unknown),
        (&[Break(io::ErrorKind::InvalidInput)], 1, NotTaken),
        (&[Respond(429, &[])], 3, NotTaken),
        (&[Respond(503, &[]), Respond(429, &[])], 3, Unknown),
        (&[Respond(500, &[])], 3, Unknown),
        // The login expired between the attempts. The 401 does not show what the first attempt did.
        (&[LOST, Respond(401, &[])], 2, Unknown),
        (&[Respond(401, &[])], 1, Responded),
        (&[LOST, Respond(401, &[("idempotent-replayed", "true")])], 2, Responded),
        (&[Respond(500, &[("idempotent-replayed", "true")])], 1, Unknown),
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
        &[Respond(200, &[("idempotent-replayed", "true")])],
    )
    .await;
    assert!(called.ended.unwrap().is_replay());
    assert!(!post(ProviderProfile::draft(), &[OK]).await.ended.unwrap().is_replay());
}

#[tokio::test]
async fn a_client_that_is_not_ready_sends_nothing() {
    let calls = || CallLayer::new(policy(ProviderProfile::draft()));
    let error: CallError<io::Error> = {
        let client = ServiceBuilder::new().layer(calls()).service(NotReady);
        client.oneshot(request(&Method::POST, true)).await.unwrap_err()
    };
    assert_eq!((error.attempts(), error.outcome()), (0, CallOutcome::NotTaken));
    assert_eq!(error.into_source().kind(), io::ErrorKind::NotConnected);

    let collecting = ServiceBuilder::new()
        .layer(calls().collect_responses())
        .service(NotReady);
    let error = collecting.oneshot(request(&Method::POST, true)).await.unwrap_err();
    assert_eq!((error.attempts(), error.outcome()), (0, CallOutcome::NotTaken));
    assert!(matches!(error.into_source(), CollectError::Service(_)));

    let keyed = ServiceBuilder::new()
        .layer(IdempotencyKeyLayer::new(ProviderProfile::draft()))
        .service(NotReady);
    let error = keyed.oneshot(request(&Method::POST, false)).await.unwrap_err();
    assert!(matches!(error, KeyPlacementError::Service(_)), "{error:?}");
}

#[derive(Clone)]
struct NotReady;

impl tower::Service<Request<String>> for NotReady {
    type Response = Response<Full<Bytes>>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
    }

    fn call(&mut self, _: Request<String>) -> Self::Future {
        unreachable!("the client is never ready")
    }
}

/// The error had the text "the client failed" for every call, whatever the number of attempts was.
#[tokio::test(start_paused = true)]
async fn an_error_states_the_attempts_and_the_outcome_and_has_the_cause() {
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

/// The chain of errors ended at the text that the layer shows.
#[tokio::test(start_paused = true)]
async fn the_error_of_a_collected_response_leads_to_the_first_cause() {
    use std::error::Error;
    #[derive(Debug)]
    struct Reset;
    impl std::fmt::Display for Reset {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("reset by the server")
        }
    }
    impl Error for Reset {}
    #[derive(Debug)]
    struct Client(Reset);
    impl std::fmt::Display for Client {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the client failed")
        }
    }
    impl Error for Client {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }
    const LOST: &str = "the body of the response with status 200 broke off";
    for (has_head, expected) in [
        (true, [LOST, "reset by the server"]),
        (false, ["the client failed", "reset by the server"]),
    ] {
        let http = service_fn(move |_: Request<String>| {
            let frames = futures::stream::iter([Err::<http_body::Frame<Bytes>, _>(Reset)]);
            let body = BoxBody::new(http_body_util::StreamBody::new(frames));
            ready(if has_head {
                Ok(Response::new(body))
            } else {
                Err(Client(Reset))
            })
        });
        let calls = CallLayer::new(policy(ProviderProfile::draft()).with_max_attempts(1)).collect_responses();
        let client = ServiceBuilder::new().layer(calls).service(http);
        let error = client.oneshot(request(&Method::POST, true)).await.unwrap_err();
        let chain = std::iter::successors(error.source(), |error| (**error).source());
        assert_eq!(chain.map(ToString::to_string).collect::<Vec<_>>(), expected);
    }
}

/// The client does not check the length of a body. Clients built on hyper do check it.
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

/// The bodies of some middlewares return their first size hint to the end. The layer judged such a
/// body to be too short.
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

/// If the body of a replay was lost, the client requests it again. A complete replay would be
/// final.
#[tokio::test(start_paused = true)]
async fn a_lost_body_is_requested_again_even_against_the_advice_of_its_head() {
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

/// The server has the layer of this crate, and many of its responses are lost. Each call runs once,
/// and its caller gets a response.
#[tokio::test(start_paused = true)]
async fn every_call_to_the_server_layer_takes_effect_once() {
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
            let Ok(response) = server.oneshot(request).await;
            // The network loses two of three responses.
            if arrival % 3 == 0 {
                Ok(response)
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

/// A server that follows the public documentation of Stripe: 400 with `idempotency_error` when a
/// key comes with other parameters, 409 while the first request is in progress, 500 stored and
/// replayed, and `Idempotent-Replayed` on every replay.
mod stripe {
    use super::*;
    use std::collections::HashMap;

    type Entry = (String, Option<u16>);

    #[derive(Clone, Default)]
    struct Stripe {
        /// The parameters under each key, and the status of the response once it exists.
        entries: Arc<Mutex<HashMap<String, Entry>>>,
        charges: Arc<AtomicUsize>,
        /// The status of the next charge, and the number of requests that get 409 before the charge
        /// ends.
        next: Arc<Mutex<(u16, usize)>>,
    }

    impl Stripe {
        fn respond(&self, request: &Request<String>) -> Response<String> {
            let key = request.headers()["idempotency-key"].to_str().unwrap().to_owned();
            let build = |status: u16, replayed: bool, body: &str| {
                let mut response = Response::new(body.to_owned());
                *response.status_mut() = StatusCode::from_u16(status).unwrap();
                if replayed {
                    response
                        .headers_mut()
                        .insert("idempotent-replayed", "true".parse().unwrap());
                }
                response
            };
            let mut entries = self.entries.lock().unwrap();
            let mut next = self.next.lock().unwrap();
            match entries.get_mut(&key) {
                Some((parameters, _)) if parameters != request.body() => {
                    build(400, false, r#"{"error":{"type":"idempotency_error"}}"#)
                }
                Some((_, Some(status))) => build(*status, true, "charge"),
                Some((_, status)) => {
                    next.1 = next.1.saturating_sub(1);
                    if next.1 == 0 {
                        *status = Some(next.0);
                    }
                    build(409, false, r#"{"error":{"code":"idempotency_key_in_use"}}"#)
                }
                None => {
                    self.charges.fetch_add(1, Ordering::SeqCst);
                    let is_over = next.1 == 0;
                    entries.insert(key, (request.body().clone(), is_over.then_some(next.0)));
                    build(if is_over { next.0 } else { 409 }, false, "charge")
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
                let response = server.respond(&request);
                let is_lost = lost
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |lost| lost.checked_sub(1))
                    .is_ok();
                ready(if is_lost {
                    Err(io::Error::from(io::ErrorKind::TimedOut))
                } else {
                    Ok(response)
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
    async fn a_lost_response_is_requested_again_and_comes_as_a_replay() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (200, 0);
        let response = stripe.charge("k", "amount=1", 2).await.unwrap();
        assert_eq!(delivery(&response), (200, 3, true, CallOutcome::Responded));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
        // All responses are lost. The charge took effect, so the caller gets an unknown outcome.
        assert_eq!(
            stripe.charge("l", "amount=1", 99).await.unwrap_err(),
            (5, CallOutcome::Unknown)
        );
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_in_progress_is_retried_until_it_ends() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (200, 2);
        let response = stripe.charge("k", "amount=1", 0).await.unwrap();
        assert_eq!(delivery(&response), (200, 4, true, CallOutcome::Responded));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_replayed_500_is_final_and_of_unknown_outcome() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (500, 0);
        let response = stripe.charge("k", "amount=1", 0).await.unwrap();
        assert_eq!(delivery(&response), (500, 2, true, CallOutcome::Unknown));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_refusal_of_a_reused_key_is_final() {
        let stripe = Stripe::default();
        *stripe.next.lock().unwrap() = (200, 0);
        stripe.charge("k", "amount=1", 0).await.unwrap();
        let response = stripe.charge("k", "amount=2", 0).await.unwrap();
        assert_eq!(delivery(&response), (400, 1, false, CallOutcome::Responded));
        assert_eq!(stripe.charges.load(Ordering::SeqCst), 1);
    }
}
