//! Stacks of several layers. A redirect that a layer follows unseen never frees a key. Without a
//! redirect, the status of a charge counts.

use tower::limit::ConcurrencyLimitLayer;
use tower::retry::RetryLayer;
use tower::util::option_layer;

use super::*;

/// A client whose third party responds with these statuses one after the other and repeats the last
/// one. The status 0 stands for a refused connection.
fn responding(statuses: &'static [u16]) -> Http {
    let count = Arc::new(AtomicUsize::new(0));
    BoxCloneService::new(tower::service_fn(move |_: Request<Full<Bytes>>| {
        let at = count.fetch_add(1, Ordering::SeqCst).min(statuses.len() - 1);
        std::future::ready(match statuses[at] {
            0 => Err(io::ErrorKind::ConnectionRefused.into()),
            status => Ok(Response::builder().status(status).body(Full::default()).unwrap()),
        })
    }))
}

/// A client whose layers are visible in its type.
trait Client:
    Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = io::Error, Future: Send>
    + Clone
    + Send
    + 'static
{
}

impl<S> Client for S where
    S: Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = io::Error, Future: Send>
        + Clone
        + Send
        + 'static
{
}

/// Checks the rule of the layers without any redirect: a declined card is stored, and a status or
/// an error that denies the effect frees the key. `stack` puts layers around the client.
async fn statuses_count<S, E>(stack: impl Fn(OnceLayer<MemoryStore>, Http) -> S)
where
    S: Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = OnceError<Response<Full<Bytes>>, E>>
        + Clone,
    E: std::fmt::Debug,
{
    let pay = |client: &S| client.clone().oneshot(keyed("http://bank.example/charges"));
    for statuses in [&[402, 201], &[422, 201]] {
        let client = stack(once().with_errors(class), responding(statuses));
        for is_replay in [false, true] {
            let response = pay(&client).await.unwrap();
            assert_eq!(response.status(), statuses[0]);
            assert_eq!(response.headers().contains_key("idempotent-replayed"), is_replay);
        }
    }
    for statuses in [&[401, 201], &[404, 201], &[429, 201]] {
        let client = stack(once().with_errors(class), responding(statuses));
        for status in statuses {
            assert_eq!(pay(&client).await.unwrap().status(), *status);
        }
    }
    let client = stack(once().with_errors(class), responding(&[0, 201]));
    let error = pay(&client).await.unwrap_err();
    assert!(!error.may_have_happened(), "{error:?}");
    assert_eq!(pay(&client).await.unwrap().status(), 201);
}

fn once_sent() -> RetryPolicy {
    RetryPolicy::new(ProviderProfile::stripe())
        .with_max_attempts(1)
        .with_errors(class)
}

fn twice() -> RetryPolicy {
    once_sent()
        .with_max_attempts(2)
        .with_initial_backoff(Duration::ZERO)
        .with_max_backoff(Duration::ZERO)
}

fn both() -> policy::And<SameOriginKey, SameOriginKey> {
    same_origin().and::<_, Full<Bytes>, ()>(SameOriginKey::new(&ProviderProfile::draft()))
}

/// Two policies in one `FollowRedirect` counted as the missing policy of another `FollowRedirect`.
#[tokio::test]
async fn two_policies_in_one_follow_redirect_do_not_vouch_for_another_one() {
    for refusal in [None, Some(404), Some(429)] {
        for place in ["/charges", "http://other.example/"] {
            let charges = Arc::default();
            let client = ServiceBuilder::new()
                .layer(once().with_errors(class))
                .layer(FollowRedirectLayer::new())
                .layer(FollowRedirectLayer::with_policy(both()))
                .service(charging(place, refusal, &charges));
            is_charged_once(client, &charges).await;
        }
    }
}

/// The request of the later hop fails before it reaches the policy that is hidden in a box.
#[tokio::test]
async fn a_policy_within_a_box_does_not_vouch_for_a_follow_redirect_around_it() {
    for refusal in [None, Some(404), Some(429)] {
        for place in ["/charges", "http://other.example/"] {
            let charges = Arc::default();
            let inner = FollowRedirect::with_policy(charging(place, refusal, &charges), same_origin());
            let client = ServiceBuilder::new()
                .layer(once().with_errors(class))
                .layer(FollowRedirectLayer::with_policy(Limited::new(5)).preserve_extensions(false))
                .service(BoxCloneService::new(inner));
            is_charged_once(client, &charges).await;
        }
    }
}

/// The type of a buffer shows the future of its service but not the service itself.
#[tokio::test]
async fn a_buffer_does_not_hide_a_follow_redirect() {
    for place in ["/charges", "http://other.example/"] {
        let charges = Arc::default();
        let client = ServiceBuilder::new()
            .layer(once().with_errors(|_: &tower::BoxError| ErrorClass::NotSent))
            .buffer(8)
            .layer(FollowRedirectLayer::new())
            .service(charging(place, None, &charges));
        is_charged_once(client, &charges).await;
    }
}

/// Another policy overrules the policy, and a layer has dropped the extensions, so the policy has
/// no report.
#[tokio::test]
async fn an_overruled_policy_without_the_extensions_does_not_free_the_key() {
    for refusal in [None, Some(404), Some(429)] {
        let charges = Arc::default();
        let overruled = PolicyExt::or::<_, Full<Bytes>, ()>(same_origin(), policy::Action::Follow);
        let client = ServiceBuilder::new()
            .layer(once().with_errors(class))
            .map_request(|mut request: Request<Full<Bytes>>| {
                request.extensions_mut().clear();
                request
            })
            .layer(FollowRedirectLayer::with_policy(overruled))
            .service(charging("/charges", refusal, &charges));
        is_charged_once(client, &charges).await;
    }
}

/// The retry stops at the redirect and sees the charge settled. The `FollowRedirect` in the box
/// then follows the redirect, drops the extensions, and ends at the same URI. Only the judgement of
/// the retry shows the redirect.
#[tokio::test]
async fn a_refusal_after_a_retry_has_seen_the_charge_settled_does_not_free_the_key() {
    for refusal in [None, Some(404), Some(429)] {
        let charges = Arc::default();
        let redirects = FollowRedirectLayer::with_policy(same_origin());
        let http = || charging("/charges", refusal, &charges);
        let retried = ServiceBuilder::new()
            .layer(FollowRedirectLayer::new().preserve_extensions(false))
            .layer(RetryLayer::new(once_sent()))
            .layer(redirects.clone());
        let around = ServiceBuilder::new().layer(once().with_errors(class));
        is_charged_once(around.service(BoxCloneService::new(retried.service(http()))), &charges).await;
        charges.store(0, Ordering::SeqCst);
        let called = ServiceBuilder::new()
            .layer(FollowRedirectLayer::new().preserve_extensions(false))
            .map_err(CallError::into_source)
            .layer(CallLayer::new(once_sent()))
            .layer(redirects);
        let around = ServiceBuilder::new().layer(once().with_errors(class));
        is_charged_once(around.service(BoxCloneService::new(called.service(http()))), &charges).await;
    }
}

/// A retry shares the report of the layer around the redirects. It wrongly looked for the target of
/// an inner policy.
#[tokio::test]
async fn a_policy_combined_by_or_does_not_hide_the_statuses_from_a_retry_behind_it() {
    statuses_count(|once, http| {
        let policy = PolicyExt::or::<_, Full<Bytes>, ()>(same_origin(), policy::Action::Stop);
        ServiceBuilder::new()
            .layer(once)
            .layer(FollowRedirectLayer::with_policy(policy))
            .layer(RetryLayer::new(once_sent()))
            .service(http)
    })
    .await;
    statuses_count(|once, http| {
        ServiceBuilder::new()
            .layer(once)
            .layer(FollowRedirectLayer::with_policy(Box::new(same_origin())))
            .layer(RetryLayer::new(once_sent()))
            .service(http)
    })
    .await;
}

/// The type of an optional layer contains the type of the service twice.
#[tokio::test]
async fn an_optional_layer_does_not_count_a_follow_redirect_twice() {
    for limit in [None, Some(ConcurrencyLimitLayer::new(2))] {
        statuses_count(|once, http| {
            ServiceBuilder::new()
                .layer(once)
                .option_layer(limit.clone())
                .layer(FollowRedirectLayer::with_policy(same_origin()))
                .service(http)
        })
        .await;
    }
    for redirects in [None, Some(FollowRedirectLayer::with_policy(same_origin()))] {
        statuses_count(|once, http| {
            ServiceBuilder::new()
                .layer(once)
                .layer(option_layer(redirects.clone()))
                .service(http)
        })
        .await;
    }
}

/// The policy reports to the innermost layer only, so the outer layers did not know its target.
#[tokio::test]
async fn a_layer_in_between_does_not_hide_the_policy_from_the_outer_layer() {
    let redirects = || FollowRedirectLayer::with_policy(same_origin());
    statuses_count(|once, http| {
        let calls = CallLayer::new(once_sent());
        let client = ServiceBuilder::new().map_err(CallError::into_source).layer(calls);
        let client = client.layer(redirects()).service(http);
        ServiceBuilder::new().layer(once).service(client)
    })
    .await;
    statuses_count(|once, http| {
        let calls = CallLayer::new(once_sent());
        let client = ServiceBuilder::new().map_err(CallError::into_source).layer(calls);
        let client = client.layer(redirects()).service(http);
        ServiceBuilder::new().layer(once).service(BoxCloneService::new(client))
    })
    .await;
}

/// A layer between the two policies rewrites the target.
#[tokio::test]
async fn a_layer_between_two_policies_sees_the_target_of_the_inner_one() {
    fn node(http: Http) -> impl Client {
        ServiceBuilder::new()
            .map_request(|mut request: Request<Full<Bytes>>| {
                *request.uri_mut() = "http://node.example/".parse().unwrap();
                request
            })
            .layer(FollowRedirectLayer::with_policy(same_origin()))
            .service(http)
    }
    let redirects = || FollowRedirectLayer::with_policy(same_origin());
    statuses_count(|once, http| {
        let calls = CallLayer::new(once_sent());
        let client = ServiceBuilder::new().map_err(CallError::into_source).layer(calls);
        let client = client.service(node(http));
        ServiceBuilder::new().layer(once).layer(redirects()).service(client)
    })
    .await;
    statuses_count(|once, http| {
        let retries = RetryLayer::new(once_sent());
        let client = ServiceBuilder::new().layer(once).layer(redirects()).layer(retries);
        client.service(node(http))
    })
    .await;
}

#[tokio::test]
async fn a_once_layer_does_not_hide_the_policy_from_a_call_around_it() {
    for (status, expected) in [(402, CallOutcome::Responded), (429, CallOutcome::NotTaken)] {
        let client = ServiceBuilder::new()
            .layer(CallLayer::new(once_sent()))
            .layer(once())
            .layer(FollowRedirectLayer::with_policy(same_origin()))
            .service(match status {
                402 => responding(&[402]),
                _ => responding(&[429]),
            });
        let response = client.oneshot(keyed("http://bank.example/charges")).await.unwrap();
        let outcome = response.extensions().get::<CallReport>().unwrap().outcome();
        assert_eq!((response.status().as_u16(), outcome), (status, expected));
    }
}

/// The layer compared the mark of a later attempt with the target of the first one.
#[tokio::test]
async fn each_attempt_has_its_own_target() {
    /// Sends each attempt to another node. The first node is overloaded, and the second one
    /// declines the card.
    fn nodes(statuses: &'static [u16]) -> impl Client {
        let count = Arc::new(AtomicUsize::new(0));
        ServiceBuilder::new()
            .map_request(move |mut request: Request<Full<Bytes>>| {
                let node = count.fetch_add(1, Ordering::SeqCst) + 1;
                *request.uri_mut() = format!("http://node{node}.example/charges").parse().unwrap();
                request
            })
            .layer(FollowRedirectLayer::with_policy(same_origin()))
            .service(responding(statuses))
    }
    async fn is_declined_once<S, E>(client: S)
    where
        S: Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = OnceError<Response<Full<Bytes>>, E>>
            + Clone,
        E: std::fmt::Debug,
    {
        for _ in 0..2 {
            let response = client.clone().oneshot(keyed("http://bank.example/charges")).await;
            assert_eq!(response.unwrap().status(), 402);
        }
    }
    let calls = ServiceBuilder::new().layer(once()).layer(CallLayer::new(twice()));
    is_declined_once(calls.service(nodes(&[429, 402, 201]))).await;
    let calls = ServiceBuilder::new()
        .layer(once().assume_keys_honoured())
        .layer(CallLayer::new(twice()));
    is_declined_once(calls.service(nodes(&[503, 402, 201]))).await;
    let retries = ServiceBuilder::new().layer(once()).layer(RetryLayer::new(twice()));
    is_declined_once(retries.service(nodes(&[429, 402, 201]))).await;
    // A retry around calls.
    let calls = ServiceBuilder::new()
        .layer(once())
        .layer(RetryLayer::new(twice()))
        .map_err(CallError::into_source)
        .layer(CallLayer::new(once_sent()));
    is_declined_once(calls.service(nodes(&[429, 402, 201]))).await;
    let calls = ServiceBuilder::new()
        .layer(once().assume_keys_honoured())
        .layer(RetryLayer::new(twice()))
        .map_err(CallError::into_source)
        .layer(CallLayer::new(once_sent()));
    is_declined_once(calls.service(nodes(&[503, 402, 201]))).await;
    let call = ServiceBuilder::new()
        .layer(CallLayer::new(twice()))
        .service(nodes(&[429, 402, 201]));
    let response = call.oneshot(keyed("http://bank.example/charges")).await.unwrap();
    let delivery = response.extensions().get::<CallReport>().unwrap();
    assert_eq!((delivery.attempts(), delivery.outcome()), (2, CallOutcome::Responded));
}

/// Calls `$check` with each stack of two retries: a retry around calls, calls around calls, and a
/// retry around a retry. `$once` is the layer around both. The policies are those of the outer and
/// of the inner retry.
macro_rules! with_nested {
    ($check:expr, $once:expr, $outer:expr, $inner:expr, $http:expr) => {
        $check(
            ServiceBuilder::new()
                .layer($once)
                .layer(RetryLayer::new($outer))
                .map_err(CallError::into_source)
                .layer(CallLayer::new($inner))
                .service($http),
        )
        .await;
        $check(
            ServiceBuilder::new()
                .layer($once)
                .layer(CallLayer::new($outer))
                .map_err(CallError::into_source)
                .layer(CallLayer::new($inner))
                .service($http),
        )
        .await;
        $check(
            ServiceBuilder::new()
                .layer($once)
                .layer(RetryLayer::new($outer))
                .layer(RetryLayer::new($inner))
                .service($http),
        )
        .await;
    };
}

/// Both layers begin the same attempt. The second beginning counted the attempt as lost.
#[tokio::test]
async fn a_retry_around_another_one_does_not_count_its_attempt_as_lost() {
    statuses_count(|once, http| {
        let calls = ServiceBuilder::new().layer(once).layer(RetryLayer::new(once_sent()));
        calls
            .map_err(CallError::into_source)
            .layer(CallLayer::new(once_sent()))
            .service(http)
    })
    .await;
    statuses_count(|once, http| {
        let calls = ServiceBuilder::new().layer(once).layer(CallLayer::new(once_sent()));
        calls
            .map_err(CallError::into_source)
            .layer(CallLayer::new(once_sent()))
            .service(http)
    })
    .await;
    statuses_count(|once, http| {
        let calls = ServiceBuilder::new().layer(once).layer(CallLayer::new(once_sent()));
        let redirects = FollowRedirectLayer::with_policy(same_origin());
        calls.layer(redirects).layer(RetryLayer::new(once_sent())).service(http)
    })
    .await;
}

/// The outer retry took the refusal of a later hop for a refusal of the charge.
#[tokio::test]
async fn a_retry_around_another_one_inherits_its_unknown_outcome() {
    for refusal in [None, Some(404), Some(429), Some(503)] {
        let overruled = || PolicyExt::or::<_, Full<Bytes>, ()>(same_origin(), policy::Action::Follow);
        let redirects = |charges: &Arc<AtomicUsize>| {
            FollowRedirect::with_policy(charging("/charges/1", refusal, charges), overruled())
        };
        for inner in [once_sent, twice] {
            let charges = Arc::new(AtomicUsize::new(0));
            let once = || once().with_errors(class);
            with_nested!(
                |client| {
                    charges.store(0, Ordering::SeqCst);
                    is_charged_once(client, &charges)
                },
                once(),
                twice(),
                inner(),
                redirects(&charges)
            );
        }
    }
}

#[tokio::test]
async fn a_retry_around_another_one_inherits_the_unknown_outcome_of_reqwest() {
    let http = || ReqwestService::from_client(plain().build().unwrap());
    with_nested!(
        |client| async move {
            let server = charging_and_refusing(303, "/charges/1", 429).await;
            drop(ServiceExt::oneshot(client, pay(&server.url("/charges"))).await);
            assert_eq!(posts(&server), 1);
        },
        once(),
        twice(),
        once_sent(),
        http()
    );
}

/// A retry of another crate. It repeats every request once.
#[derive(Clone)]
struct Foreign(bool);

impl<E> tower::retry::Policy<Request<Full<Bytes>>, Response<Full<Bytes>>, E> for Foreign {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<Full<Bytes>>,
        _: &mut Result<Response<Full<Bytes>>, E>,
    ) -> Option<Self::Future> {
        std::mem::take(&mut self.0).then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<Full<Bytes>>) -> Option<Request<Full<Bytes>>> {
        Some(request.clone())
    }
}

/// A foreign retry stands between two retries of this crate. It loses the first attempt, and the
/// third party does not take the second one.
#[tokio::test]
async fn an_attempt_that_a_foreign_retry_repeated_stays_lost() {
    let count = Arc::new(AtomicUsize::new(0));
    let sent = Arc::clone(&count);
    let http = tower::service_fn(move |_: Request<Full<Bytes>>| {
        let status = [503, 429, 201][sent.fetch_add(1, Ordering::SeqCst).min(2)];
        std::future::ready(Ok::<_, io::Error>(
            Response::builder().status(status).body(Full::default()).unwrap(),
        ))
    });
    let client = ServiceBuilder::new()
        .layer(once())
        .layer(RetryLayer::new(twice()))
        .layer(RetryLayer::new(Foreign(true)))
        .layer(RetryLayer::new(twice()))
        .service(http);
    let response = client.oneshot(keyed("http://bank.example/charges")).await.unwrap();
    assert_eq!((response.status().as_u16(), count.load(Ordering::SeqCst)), (429, 2));
}

/// A timeout drops the first attempt, and a foreign retry repeats it. The third party has taken the
/// charge, and refuses every later connection.
#[tokio::test(start_paused = true)]
async fn a_call_that_a_timeout_dropped_stays_lost_after_a_refused_connection() {
    /// Returns a client of a third party that takes the first charge without a response and refuses
    /// every later connection. `$calls` is the layer within the retry.
    macro_rules! client_with {
        ($charges:expr, $calls:expr) => {{
            let charges = Arc::clone($charges);
            let http = tower::service_fn(move |_: Request<Full<Bytes>>| {
                let is_first = charges.swap(1, Ordering::SeqCst) == 0;
                async move {
                    if is_first {
                        std::future::pending::<()>().await;
                    }
                    Err::<Response<Full<Bytes>>, io::Error>(io::ErrorKind::ConnectionRefused.into())
                }
            });
            let calls = ServiceBuilder::new()
                .layer(once())
                .layer(RetryLayer::new(Foreign(true)));
            calls.timeout(Duration::from_secs(1)).layer($calls).service(http)
        }};
    }
    async fn is_unknown<S, E>(client: S)
    where
        S: Service<Request<Full<Bytes>>, Error = OnceError<Response<Full<Bytes>>, E>> + Clone,
        E: std::fmt::Debug,
    {
        for _ in 0..2 {
            let called = client.clone().oneshot(keyed("http://bank.example/charges")).await;
            assert!(matches!(called.err(), Some(OnceError::Unknown(_))));
        }
    }
    let charges = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    is_unknown(client_with!(&charges[0], CallLayer::new(once_sent()))).await;
    is_unknown(client_with!(
        &charges[1],
        CallLayer::new(once_sent()).collect_responses()
    ))
    .await;
    assert!(charges.iter().all(|charges| charges.load(Ordering::SeqCst) == 1));
}

/// A layer between the two retries sends the charge elsewhere after a 429, so it bypasses the inner
/// retry.
#[tokio::test]
async fn a_response_that_the_inner_retry_has_not_seen_is_not_retried() {
    let elsewhere = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&elsewhere);
    let first = ServiceBuilder::new()
        .layer(RetryLayer::new(once_sent()))
        .service(responding(&[429]));
    let either = tower::service_fn(move |request: Request<Full<Bytes>>| {
        let (first, counted) = (first.clone(), Arc::clone(&counted));
        async move {
            let refused = first.oneshot(request).await?;
            assert_eq!(refused.status(), 429);
            counted.fetch_add(1, Ordering::SeqCst);
            Ok::<_, io::Error>(Response::builder().status(503).body(Full::default()).unwrap())
        }
    });
    let client = ServiceBuilder::new()
        .layer(once())
        .layer(RetryLayer::new(twice()))
        .service(either);
    is_charged_once(client, &elsewhere).await;
}

/// The report of the outer layer did not include the lost key.
#[tokio::test]
async fn a_call_around_another_one_sees_that_the_charge_has_lost_its_key() {
    let overruled = PolicyExt::or::<_, Full<Bytes>, ()>(same_origin(), policy::Action::Follow)
        .and::<_, Full<Bytes>, ()>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
    let every_error = || twice().with_errors(|_: &io::Error| ErrorClass::Lost);
    let charges = Arc::new(AtomicUsize::new(0));
    let redirects = || FollowRedirect::with_policy(redirecting_to_another_origin(&charges), overruled.clone());
    with_nested!(
        |client| async {
            charges.store(0, Ordering::SeqCst);
            drop(ServiceExt::oneshot(client, keyed("http://bank.example/charges")).await);
            assert_eq!(charges.load(Ordering::SeqCst), 1);
        },
        CallLayer::new(every_error()),
        every_error(),
        every_error(),
        redirects()
    );
}

/// A timeout between the two layers drops the inner one, which reported the lost key only at its
/// end.
#[tokio::test(start_paused = true)]
async fn an_outer_layer_sees_the_loss_of_the_key_before_the_call_has_ended() {
    let charges = Arc::new(AtomicUsize::new(0));
    let http = redirecting_to_another_origin(&charges);
    let hanging = tower::service_fn(move |request: Request<Full<Bytes>>| {
        let http = http.clone();
        async move {
            match http.oneshot(request).await {
                Ok(response) => Ok(response),
                Err(_) => std::future::pending::<Result<_, io::Error>>().await,
            }
        }
    });
    let overruled = PolicyExt::or::<_, Full<Bytes>, ()>(same_origin(), policy::Action::Follow)
        .and::<_, Full<Bytes>, ()>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
    let lost = |_: &tower::BoxError| ErrorClass::Lost;
    let client = ServiceBuilder::new()
        .layer(CallLayer::new(twice().with_errors(lost)))
        .timeout(Duration::from_secs(1))
        .layer(CallLayer::new(once_sent()))
        .layer(FollowRedirectLayer::with_policy(overruled))
        .service(hanging);
    let error = client.oneshot(keyed("http://bank.example/charges")).await.unwrap_err();
    assert_eq!((error.attempts(), error.outcome()), (1, CallOutcome::Unknown));
    assert_eq!(charges.load(Ordering::SeqCst), 1);
}

/// Each attempt ends at both layers. The outer layer counted both ends.
#[tokio::test]
async fn an_attempt_through_two_layers_counts_once() {
    fn delivery<B>(response: &Response<B>) -> (u32, CallOutcome) {
        let delivery = response.extensions().get::<CallReport>().unwrap();
        (delivery.attempts(), delivery.outcome())
    }
    for (statuses, expected) in [
        (&[402][..], (1, CallOutcome::Responded)),
        (&[401], (1, CallOutcome::Responded)),
        (&[429, 402], (2, CallOutcome::Responded)),
        (&[429, 429], (2, CallOutcome::NotTaken)),
        (&[503, 429], (2, CallOutcome::Unknown)),
        (&[0, 429], (2, CallOutcome::NotTaken)),
    ] {
        let calls = || ServiceBuilder::new().layer(CallLayer::new(twice()));
        let http = || responding(statuses);
        let inner = CallLayer::new(once_sent());
        let call = calls()
            .map_err(CallError::into_source)
            .layer(inner.clone())
            .service(http());
        let response = call.oneshot(keyed("http://bank.example/charges")).await.unwrap();
        assert_eq!(delivery(&response), expected, "a call around a call: {statuses:?}");
        let call = calls().layer(RetryLayer::new(once_sent())).service(http());
        let response = call.oneshot(keyed("http://bank.example/charges")).await.unwrap();
        assert_eq!(delivery(&response), expected, "a call around a retry: {statuses:?}");
        let retries = ServiceBuilder::new().layer(RetryLayer::new(once_sent()));
        let retries = retries.map_err(CallError::into_source).layer(inner).service(http());
        let call = calls().service(retries);
        let response = call.oneshot(keyed("http://bank.example/charges")).await.unwrap();
        assert_eq!(delivery(&response), expected, "three layers: {statuses:?}");
    }
}

/// The inner layer judges the 307. The `FollowRedirect` then sends the charge on, unseen because it
/// drops the extensions. The charge takes effect and its response is lost. The judged 307 freed the
/// key.
#[tokio::test]
async fn a_judged_redirect_does_not_free_the_key_of_a_charge_that_was_sent_on_and_lost() {
    let charges = Arc::new(AtomicUsize::new(0));
    let http = || -> Http {
        let charges = Arc::clone(&charges);
        BoxCloneService::new(tower::service_fn(move |request: Request<Full<Bytes>>| {
            let result = if request.uri().path() == "/charges" {
                let moved = Response::builder().status(307).header(LOCATION, "/moved");
                Ok(moved.body(Full::default()).unwrap())
            } else {
                charges.fetch_add(1, Ordering::SeqCst);
                Err(io::Error::from(io::ErrorKind::BrokenPipe))
            };
            std::future::ready(result)
        }))
    };
    let lost = |error: &io::Error| match error.kind() {
        io::ErrorKind::BrokenPipe => ErrorClass::Lost,
        _ => ErrorClass::Final,
    };
    let dropping = || {
        let policy = clone_body_fn(|body: &Full<Bytes>| Some(body.clone()));
        FollowRedirectLayer::with_policy(policy).preserve_extensions(false)
    };
    let retried = ServiceBuilder::new()
        .layer(dropping())
        .layer(RetryLayer::new(once_sent()));
    let around = ServiceBuilder::new().layer(once().with_errors(lost));
    is_charged_once(around.service(BoxCloneService::new(retried.service(http()))), &charges).await;
    charges.store(0, Ordering::SeqCst);
    let called = ServiceBuilder::new()
        .layer(dropping())
        .map_err(CallError::into_source)
        .layer(CallLayer::new(once_sent()));
    let around = ServiceBuilder::new().layer(once().with_errors(lost));
    is_charged_once(around.service(BoxCloneService::new(called.service(http()))), &charges).await;
}
