//! Stacks of several layers. A redirect that a layer follows unseen never frees a key, and without a redirect the
//! status of a charge counts.

use tower::limit::ConcurrencyLimitLayer;
use tower::util::option_layer;

use super::*;

/// A client whose third party gives these statuses one after the other, and repeats the last one. A 0 is a refused
/// connection.
fn saying(statuses: &'static [u16]) -> Http {
    let count = Arc::new(AtomicUsize::new(0));
    BoxCloneService::new(tower::service_fn(move |_: Request<Full<Bytes>>| {
        let at = count.fetch_add(1, Ordering::SeqCst).min(statuses.len() - 1);
        std::future::ready(match statuses[at] {
            0 => Err(io::ErrorKind::ConnectionRefused.into()),
            status => Ok(Response::builder().status(status).body(Full::default()).unwrap()),
        })
    }))
}

/// A client whose type shows its layers.
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

/// The rule of the layers without any redirect: a declined card is stored, and a status or an error that denies the
/// effect frees the key. `stack` puts layers around the client.
async fn statuses_count<S, E>(stack: impl Fn(OnceLayer<MemoryStore>, Http) -> S)
where
    S: Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = OnceError<Response<Full<Bytes>>, E>>
        + Clone,
    E: std::fmt::Debug,
{
    let pay = |client: &S| client.clone().oneshot(keyed("http://bank.example/charges"));
    for statuses in [&[402, 201], &[422, 201]] {
        let client = stack(once().with_errors(class), saying(statuses));
        for is_replay in [false, true] {
            let response = pay(&client).await.unwrap();
            assert_eq!(response.status(), statuses[0]);
            assert_eq!(response.headers().contains_key("idempotent-replayed"), is_replay);
        }
    }
    for statuses in [&[401, 201], &[404, 201], &[429, 201]] {
        let client = stack(once().with_errors(class), saying(statuses));
        for status in statuses {
            assert_eq!(pay(&client).await.unwrap().status(), *status);
        }
    }
    let client = stack(once().with_errors(class), saying(&[0, 201]));
    let error = pay(&client).await.unwrap_err();
    assert!(!error.may_have_happened(), "{error:?}");
    assert_eq!(pay(&client).await.unwrap().status(), 201);
}

fn once_sent() -> RetryPolicy {
    RetryPolicy::new(Profile::stripe())
        .with_max_attempts(1)
        .with_errors(class)
}

fn both() -> policy::And<KeyAtHome, KeyAtHome> {
    home().and::<_, Full<Bytes>, ()>(KeyAtHome::new(&Profile::draft()))
}

/// Two policies in one `FollowRedirect` stood in for the missing one of another `FollowRedirect`.
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

/// The request of the later hop fails before it reaches the policy that a box hides.
#[tokio::test]
async fn a_policy_within_a_box_does_not_vouch_for_a_follow_redirect_around_it() {
    for refusal in [None, Some(404), Some(429)] {
        for place in ["/charges", "http://other.example/"] {
            let charges = Arc::default();
            let inner = FollowRedirect::with_policy(charging(place, refusal, &charges), home());
            let client = ServiceBuilder::new()
                .layer(once().with_errors(class))
                .layer(FollowRedirectLayer::with_policy(Limited::new(5)).preserve_extensions(false))
                .service(BoxCloneService::new(inner));
            is_charged_once(client, &charges).await;
        }
    }
}

/// The type of a buffer shows the future of its service, and not the service.
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

/// A policy that is overruled and has no report because a layer has dropped the extensions of the request.
#[tokio::test]
async fn an_overruled_policy_without_the_extensions_does_not_free_the_key() {
    for refusal in [None, Some(404), Some(429)] {
        let charges = Arc::default();
        let overruled = PolicyExt::or::<_, Full<Bytes>, ()>(home(), policy::Action::Follow);
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

/// The type of an optional layer contains the type of the service twice.
#[tokio::test]
async fn an_optional_layer_does_not_count_a_follow_redirect_twice() {
    for limit in [None, Some(ConcurrencyLimitLayer::new(2))] {
        statuses_count(|once, http| {
            ServiceBuilder::new()
                .layer(once)
                .option_layer(limit.clone())
                .layer(FollowRedirectLayer::with_policy(home()))
                .service(http)
        })
        .await;
    }
    for redirects in [None, Some(FollowRedirectLayer::with_policy(home()))] {
        statuses_count(|once, http| {
            ServiceBuilder::new()
                .layer(once)
                .layer(option_layer(redirects.clone()))
                .service(http)
        })
        .await;
    }
}

/// The policy reports to the innermost layer only, so the layers further out did not know its target.
#[tokio::test]
async fn a_layer_between_does_not_hide_the_policy_from_the_layer_around_it() {
    let redirects = || FollowRedirectLayer::with_policy(home());
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
async fn a_layer_between_two_policies_knows_the_target_of_the_inner_one() {
    fn node(http: Http) -> impl Client {
        ServiceBuilder::new()
            .map_request(|mut request: Request<Full<Bytes>>| {
                *request.uri_mut() = "http://node.example/".parse().unwrap();
                request
            })
            .layer(FollowRedirectLayer::with_policy(home()))
            .service(http)
    }
    let redirects = || FollowRedirectLayer::with_policy(home());
    statuses_count(|once, http| {
        let calls = CallLayer::new(once_sent());
        let client = ServiceBuilder::new().map_err(CallError::into_source).layer(calls);
        let client = client.service(node(http));
        ServiceBuilder::new().layer(once).layer(redirects()).service(client)
    })
    .await;
    statuses_count(|once, http| {
        let retries = tower::retry::RetryLayer::new(once_sent());
        let client = ServiceBuilder::new().layer(once).layer(redirects()).layer(retries);
        client.service(node(http))
    })
    .await;
}

#[tokio::test]
async fn a_once_layer_does_not_hide_the_policy_from_a_call_around_it() {
    for (status, expected) in [(402, CallOutcome::Answered), (429, CallOutcome::NotTaken)] {
        let client = ServiceBuilder::new()
            .layer(CallLayer::new(once_sent()))
            .layer(once())
            .layer(FollowRedirectLayer::with_policy(home()))
            .service(match status {
                402 => saying(&[402]),
                _ => saying(&[429]),
            });
        let response = client.oneshot(keyed("http://bank.example/charges")).await.unwrap();
        let outcome = response.extensions().get::<Delivery>().unwrap().outcome();
        assert_eq!((response.status().as_u16(), outcome), (status, expected));
    }
}

/// The mark of a later attempt was compared with the target of the first one.
#[tokio::test]
async fn each_attempt_has_its_own_target() {
    /// Sends each attempt to another node. The first node is overloaded, and the second one declines the card.
    fn nodes(statuses: &'static [u16]) -> impl Client {
        let count = Arc::new(AtomicUsize::new(0));
        ServiceBuilder::new()
            .map_request(move |mut request: Request<Full<Bytes>>| {
                let node = count.fetch_add(1, Ordering::SeqCst) + 1;
                *request.uri_mut() = format!("http://node{node}.example/charges").parse().unwrap();
                request
            })
            .layer(FollowRedirectLayer::with_policy(home()))
            .service(saying(statuses))
    }
    let twice = || {
        RetryPolicy::new(Profile::stripe())
            .with_max_attempts(2)
            .with_backoff(Duration::ZERO, Duration::ZERO)
            .with_errors(class)
    };
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
    let retries = ServiceBuilder::new()
        .layer(once())
        .layer(tower::retry::RetryLayer::new(twice()));
    is_declined_once(retries.service(nodes(&[429, 402, 201]))).await;
    // A retry around calls.
    let calls = ServiceBuilder::new()
        .layer(once())
        .layer(tower::retry::RetryLayer::new(twice()))
        .map_err(CallError::into_source)
        .layer(CallLayer::new(once_sent()));
    is_declined_once(calls.service(nodes(&[429, 402, 201]))).await;
    let call = ServiceBuilder::new()
        .layer(CallLayer::new(twice()))
        .service(nodes(&[429, 402, 201]));
    let response = call.oneshot(keyed("http://bank.example/charges")).await.unwrap();
    let delivery = response.extensions().get::<Delivery>().unwrap();
    assert_eq!((delivery.attempts(), delivery.outcome()), (2, CallOutcome::Answered));
}
