//! Redirects after a charge. The layers never take the status or the error of a later request for
//! that of the charge, so no charge is made twice.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::util::BoxCloneService;
use tower::{Layer, Service};
use tower_idempotency::client::{ErrorClass, OnceError};

use super::*;

/// Starts a third party that charges, redirects the client to `place`, and then closes its port.
async fn charge_and_go_away(listener: TcpListener, status: u16, place: &str, charges: &AtomicUsize) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut text = Vec::new();
    while !text.windows(4).any(|at| at == b"\r\n\r\n") {
        let mut more = [0; 1024];
        let read = stream.read(&mut more).await.unwrap();
        text.extend_from_slice(&more[..read]);
    }
    assert!(text.starts_with(b"POST /charges"), "{}", String::from_utf8_lossy(&text));
    charges.fetch_add(1, Ordering::SeqCst);
    drop(listener);
    let response =
        format!("HTTP/1.1 {status} Elsewhere\r\nlocation: {place}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(response.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
}

/// Redirect targets: pages that exist, pages that do not, the target of the request itself, other
/// schemes, and invalid URLs.
const PLACES: [&str; 8] = [
    "/charges/1",
    "/charges",
    "ftp://127.0.0.1/charges",
    "mailto:charges",
    "foo:80",
    "http://[",
    "",
    "https://127.0.0.1:1/charges",
];

fn once() -> OnceLayer<MemoryStore> {
    OnceLayer::new(MemoryStore::new(), ProviderProfile::stripe())
}

fn keyed<B: From<&'static str>>(url: &str) -> Request<B> {
    let mut request = charge(url);
    request
        .headers_mut()
        .insert("idempotency-key", "order-7".parse().unwrap());
    request
}

fn pay(url: &str) -> Request<reqwest::Body> {
    keyed(url)
}

fn plain() -> reqwest::ClientBuilder {
    reqwest::Client::builder().no_proxy()
}

/// Every service over `reqwest`, built by this crate or by the application.
fn services() -> [ReqwestService; 2] {
    [
        ReqwestService::build(plain()).unwrap(),
        ReqwestService::from_client(plain().build().unwrap()),
    ]
}

/// A service of the application over `reqwest`. It does not report its redirects, so its error may
/// belong to a later hop.
fn unreported() -> BoxCloneService<Request<reqwest::Body>, Response<reqwest::Body>, reqwest::Error> {
    let client = plain().build().unwrap();
    BoxCloneService::new(tower::service_fn(move |request: Request<reqwest::Body>| {
        let client = client.clone();
        async move { client.execute(request.try_into()?).await.map(Response::from) }
    }))
}

#[tokio::test]
async fn a_charge_is_made_once_although_the_server_stops_after_its_redirect() {
    let reported = services().map(BoxCloneService::new);
    for http in reported.into_iter().chain([unreported()]) {
        for status in [301, 302, 303, 307, 308] {
            for place in PLACES {
                let charges = AtomicUsize::new(0);
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let url = format!("http://{}/charges", listener.local_addr().unwrap());
                let client = ServiceBuilder::new().layer(once()).service(http.clone());
                let serving = charge_and_go_away(listener, status, place, &charges);
                let (first, ()) = tokio::join!(client.clone().oneshot(pay(&url)), serving);
                // If the client did not follow a 307 or 308, the server did nothing, and the layer
                // relies on that.
                if matches!(&first, Ok(response) if [307, 308].contains(&response.status().as_u16())) {
                    continue;
                }
                if let Err(error) = &first {
                    assert!(error.may_have_happened(), "{status} {place}: {error:?}");
                }
                // If the key were free, the layer would claim it and send the request to a closed
                // port.
                let again = client.oneshot(pay(&url)).await;
                assert!(
                    matches!(again, Ok(_) | Err(OnceError::Unknown(None))),
                    "{status} {place}: {first:?}, then {again:?}"
                );
                assert_eq!(charges.load(Ordering::SeqCst), 1);
            }
        }
    }
}

/// Charges at the first request, redirects to `place`, and refuses every later request.
async fn charging_and_refusing(status: u16, place: &'static str, refusal: u16) -> Server {
    Server::start(move |_, count| {
        Ok(match count {
            1 => redirect(StatusCode::from_u16(status).unwrap(), place),
            _ => {
                let mut response = text(StatusCode::from_u16(refusal).unwrap(), "");
                response.headers_mut().insert("retry-after", "0".parse().unwrap());
                response
            }
        })
    })
    .await
}

fn posts(server: &Server) -> usize {
    let arrived = server.arrived();
    arrived.iter().filter(|request| request.method == "POST").count()
}

#[tokio::test]
async fn a_status_of_a_later_hop_does_not_free_the_key() {
    for http in services() {
        for status in [301, 302, 303] {
            for refusal in [400, 401, 404, 409, 425, 429, 499, 501, 503] {
                // The second place is the target of the request itself, so no URL shows that
                // another request was sent.
                for place in ["/charges/1", "/charges"] {
                    let server = charging_and_refusing(status, place, refusal).await;
                    let client = ServiceBuilder::new().layer(once()).service(http.clone());
                    for _ in 0..3 {
                        let paid = client.clone().oneshot(pay(&server.url("/charges"))).await;
                        if let Err(error) = paid {
                            assert!(error.may_have_happened(), "{status} {refusal} {place}: {error:?}");
                        }
                    }
                    assert_eq!(posts(&server), 1, "{status} {refusal} {place}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_charge_that_was_redirected_is_not_reported_as_not_taken() {
    for http in services() {
        for place in PLACES {
            let charges = AtomicUsize::new(0);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/charges", listener.local_addr().unwrap());
            let client = ServiceBuilder::new()
                .layer(keys())
                .layer(calls(1))
                .service(http.clone());
            let serving = charge_and_go_away(listener, 303, place, &charges);
            let (paid, ()) = tokio::join!(client.oneshot(charge::<reqwest::Body>(&url)), serving);
            let outcome = match paid {
                Ok(response) => response.extensions().get::<CallReport>().unwrap().outcome(),
                Err(KeyPlacementError::Service(error)) => error.outcome(),
                Err(error) => panic!("{error}"),
            };
            assert_ne!(outcome, CallOutcome::NotTaken, "{place}");
        }
        for refusal in [404, 429, 503] {
            let server = charging_and_refusing(303, "/charges", refusal).await;
            let client = ServiceBuilder::new()
                .layer(keys())
                .layer(calls(1))
                .service(http.clone());
            let response = client
                .oneshot(charge::<reqwest::Body>(&server.url("/charges")))
                .await
                .unwrap();
            let outcome = response.extensions().get::<CallReport>().unwrap().outcome();
            let is_303 = response.status() == StatusCode::SEE_OTHER;
            assert_eq!(outcome == CallOutcome::Responded, is_303, "{refusal}: {outcome:?}");
            assert_ne!(outcome, CallOutcome::NotTaken, "{refusal}");
        }
    }
}

/// The outer layer sees the 429, but not that a later hop sent it.
#[tokio::test]
async fn a_call_around_a_once_layer_is_not_reported_as_not_taken() {
    let server = charging_and_refusing(303, "/charges", 429).await;
    let client = ServiceBuilder::new()
        .layer(calls(1))
        .layer(once())
        .service(ReqwestService::from_client(plain().build().unwrap()));
    let response = client.oneshot(pay(&server.url("/charges"))).await.unwrap();
    let outcome = response.extensions().get::<CallReport>().unwrap().outcome();
    assert_eq!((response.status().as_u16(), outcome), (429, CallOutcome::Unknown));
}

#[tokio::test]
async fn a_redirect_that_is_not_followed_is_the_response_and_is_stored() {
    for status in [301, 302, 303] {
        let server = charging_and_refusing(status, "/charges/1", 404).await;
        let client = ServiceBuilder::new()
            .layer(once())
            .service(ReqwestService::build(plain()).unwrap());
        for _ in 0..2 {
            let response = client.clone().oneshot(pay(&server.url("/charges"))).await.unwrap();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()[LOCATION], "/charges/1");
        }
        assert_eq!(server.arrived().len(), 1);
    }
}

#[tokio::test]
async fn a_get_request_still_follows_redirects() {
    for status in [301, 302, 303, 307, 308] {
        let server = Server::start(move |path, _| {
            Ok(match path {
                "/0" => redirect(StatusCode::from_u16(status).unwrap(), "/1"),
                _ => text(StatusCode::OK, "page"),
            })
        });
        let server = server.await;
        let client = ReqwestService::build(plain()).unwrap();
        let request = Request::get(server.url("/0")).body(reqwest::Body::default()).unwrap();
        assert_eq!(client.oneshot(request).await.unwrap().status(), StatusCode::OK);
        assert_eq!(server.arrived().len(), 2);
    }
}

#[tokio::test]
async fn a_loop_ends_with_an_error_and_leaves_the_outcome_unknown() {
    for http in services() {
        let rounds = Server::start(|_, _| Ok(redirect(StatusCode::TEMPORARY_REDIRECT, "/charges"))).await;
        let client = ServiceBuilder::new().layer(once()).service(http);
        let error = client.clone().oneshot(pay(&rounds.url("/charges"))).await.unwrap_err();
        assert!(
            matches!(&error, OnceError::Unknown(Some(error)) if error.is_redirect()),
            "{error:?}"
        );
        let hops = rounds.arrived().len();
        let error = client.oneshot(pay(&rounds.url("/charges"))).await.unwrap_err();
        assert!(matches!(error, OnceError::Unknown(None)), "{error:?}");
        assert_eq!(rounds.arrived().len(), hops);
    }
}

#[tokio::test]
async fn a_status_of_the_request_itself_frees_the_key_where_the_client_shows_its_redirects() {
    let without = plain().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    for http in [
        ReqwestService::build(plain()).unwrap(),
        ReqwestService::from_client_without_redirects(without),
    ] {
        let server = Server::start(|_, count| {
            Ok(match count {
                1 => text(StatusCode::TOO_MANY_REQUESTS, ""),
                _ => text(StatusCode::CREATED, "charged"),
            })
        });
        let server = server.await;
        let client = ServiceBuilder::new().layer(once()).service(http);
        let mut statuses = Vec::new();
        for _ in 0..2 {
            let paid = client.clone().oneshot(pay(&server.url("/charges"))).await.unwrap();
            statuses.push(paid.status().as_u16());
        }
        assert_eq!(statuses, [429, 201]);
    }
}

#[tokio::test]
async fn an_error_before_the_request_is_sent_frees_the_key() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let refused = format!("http://{free}/charges");
    for (http, is_ours) in services().into_iter().zip([true, false]) {
        for url in [&*refused, "/relative", "ftp://127.0.0.1/"] {
            let layered = ServiceBuilder::new().layer(once()).layer(keys()).service(http.clone());
            let called = ServiceBuilder::new()
                .layer(once())
                .layer(keys())
                .layer(calls(2))
                .service(http.clone());
            let failed = [
                matches!(layered.oneshot(pay(url)).await, Err(OnceError::Failed(_))),
                matches!(called.oneshot(pay(url)).await, Err(OnceError::Failed(_))),
            ];
            // With any other client, the layer cannot know whether the refused connection belongs
            // to the request itself or to a later hop.
            let is_known = is_ours || url != refused;
            assert_eq!(failed, [is_known; 2], "{url}, ours: {is_ours}");
        }
    }
}

#[tokio::test]
async fn a_call_that_the_client_itself_retries_is_not_sent_again_by_a_once_layer() {
    let again = || {
        let again = reqwest::retry::for_host("127.0.0.1").classify_fn(|attempt| match attempt.status() {
            Some(status) if status.is_success() => attempt.success(),
            _ => attempt.retryable(),
        });
        plain().retry(again)
    };
    let server = Server::start(|_, _| Ok(text(StatusCode::SERVICE_UNAVAILABLE, ""))).await;
    let client = ServiceBuilder::new()
        .layer(once())
        .service(ReqwestService::build(again()).unwrap());
    client.oneshot(pay(&server.url("/charges"))).await.unwrap();
    assert_eq!(server.arrived().len(), 1);
    // `from_client` takes a client with its own retries. The refusal of the last attempt does not
    // show what the first one did.
    let server = Server::start(|_, count| match count {
        1 => Err(io::ErrorKind::ConnectionReset.into()),
        _ => Ok(text(StatusCode::TOO_MANY_REQUESTS, "")),
    });
    let server = server.await;
    let client = ServiceBuilder::new()
        .layer(once())
        .service(ReqwestService::from_client(again().build().unwrap()));
    drop(client.clone().oneshot(pay(&server.url("/charges"))).await);
    let arrived = server.arrived().len();
    let error = client.oneshot(pay(&server.url("/charges"))).await.unwrap_err();
    assert!(matches!(error, OnceError::Unknown(None)), "{error:?}");
    assert_eq!(server.arrived().len(), arrived);
}

mod by_tower_http {
    mod stacks;

    use super::*;
    use tower_http::follow_redirect::{FollowRedirect, policy};

    type Http = BoxCloneService<Request<Full<Bytes>>, Response<Full<Bytes>>, io::Error>;

    /// A client whose third party charges and redirects. The next request fails or is refused.
    fn charging(place: &'static str, refusal: Option<u16>, charges: &Arc<AtomicUsize>) -> Http {
        let charges = Arc::clone(charges);
        BoxCloneService::new(tower::service_fn(move |request: Request<Full<Bytes>>| {
            let is_charge = request.method() == "POST";
            let first = !is_charge || charges.fetch_add(1, Ordering::SeqCst) == 0;
            let response = match (is_charge, refusal) {
                (true, _) if first => Response::builder().status(303).header(LOCATION, place),
                (true, _) => Response::builder().status(201),
                (false, Some(status)) => Response::builder().status(status),
                (false, None) => return std::future::ready(Err(io::ErrorKind::ConnectionRefused.into())),
            };
            std::future::ready(Ok(response.body(Full::default()).unwrap()))
        }))
    }

    /// How the application classifies errors: a refused connection means that nothing was sent, and
    /// every other error is final.
    fn class(error: &io::Error) -> ErrorClass {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => ErrorClass::NotSent,
            _ => ErrorClass::Final,
        }
    }

    async fn is_charged_once<S, E>(client: S, charges: &AtomicUsize)
    where
        S: Service<Request<Full<Bytes>>, Error = OnceError<Response<Full<Bytes>>, E>> + Clone,
        E: std::fmt::Debug,
    {
        for _ in 0..3 {
            if let Err(error) = client.clone().oneshot(keyed("http://bank.example/charges")).await {
                assert!(error.may_have_happened(), "{error:?}");
            }
        }
        assert_eq!(charges.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn the_classification_of_an_error_of_a_later_hop_does_not_count() {
        for refusal in [None, Some(404), Some(409), Some(429), Some(503)] {
            for place in ["/charges/1", "/charges", "http://other.example/"] {
                let store = MemoryStore::new();
                let once = || OnceLayer::new(store.clone(), ProviderProfile::stripe()).with_errors(class);
                // The test runs with the policy of this crate and without it.
                let policy = Limited::new(5).and::<_, Full<Bytes>, ()>(SameOriginKey::new(&ProviderProfile::stripe()));
                let charges = Arc::default();
                let client = ServiceBuilder::new()
                    .layer(once().with_namespace("ours"))
                    .layer(FollowRedirectLayer::with_policy(policy))
                    .service(charging(place, refusal, &charges));
                is_charged_once(client, &charges).await;
                let charges = Arc::default();
                let client = ServiceBuilder::new()
                    .layer(once().with_namespace("theirs"))
                    .layer(FollowRedirectLayer::new())
                    .service(charging(place, refusal, &charges));
                is_charged_once(client, &charges).await;
            }
        }
    }

    #[tokio::test]
    async fn a_same_origin_policy_that_is_overruled_still_reports_the_redirect() {
        for refusal in [None, Some(404), Some(429)] {
            let (store, charges) = (MemoryStore::new(), Arc::default());
            let same_origin = SameOriginKey::new(&ProviderProfile::stripe());
            let policy = PolicyExt::or::<_, Full<Bytes>, ()>(same_origin, policy::Action::Follow);
            let redirects = FollowRedirect::with_policy(charging("/charges", refusal, &charges), policy);
            let client = ServiceBuilder::new()
                .layer(OnceLayer::new(store.clone(), ProviderProfile::stripe()).with_errors(class))
                // The box hides the type of the service.
                .service(BoxCloneService::new(redirects));
            is_charged_once(client, &charges).await;
        }
    }

    #[tokio::test]
    async fn a_status_that_has_passed_redirects_within_a_box_does_not_free_the_key() {
        for place in ["/charges/1", "/charges"] {
            let (store, charges) = (MemoryStore::new(), Arc::default());
            let redirects: FollowRedirect<_> = FollowRedirect::new(charging(place, Some(429), &charges));
            let client = ServiceBuilder::new()
                .layer(OnceLayer::new(store.clone(), ProviderProfile::stripe()))
                .service(BoxCloneService::new(redirects));
            is_charged_once(client, &charges).await;
        }
    }

    #[tokio::test]
    async fn a_call_with_a_later_hop_never_counts_as_not_taken() {
        for refusal in [None, Some(404), Some(429)] {
            let charges = Arc::default();
            let policy = RetryPolicy::new(ProviderProfile::stripe())
                .with_max_attempts(1)
                .with_errors(class);
            let client = ServiceBuilder::new()
                .layer(keys())
                .layer(CallLayer::new(policy))
                .layer(FollowRedirectLayer::new())
                .service(charging("/charges", refusal, &charges));
            let outcome = match client
                .oneshot(charge::<Full<Bytes>>("http://bank.example/charges"))
                .await
            {
                Ok(response) => response.extensions().get::<CallReport>().unwrap().outcome(),
                Err(KeyPlacementError::Service(error)) => error.outcome(),
                Err(error) => panic!("{error}"),
            };
            assert_eq!(outcome, CallOutcome::Unknown, "{refusal:?}");
        }
    }

    /// A retry inside the redirects begins a new attempt with each hop. The new attempt removed the
    /// report of the redirect before it.
    #[tokio::test]
    async fn a_retry_within_the_redirects_does_not_hide_them() {
        for refusal in [None, Some(404), Some(429)] {
            let once_more = || {
                RetryPolicy::new(ProviderProfile::stripe())
                    .with_max_attempts(1)
                    .with_errors(class)
            };
            let same_origin = || {
                let (same_origin, follow) = (SameOriginKey::new(&ProviderProfile::stripe()), policy::Action::Follow);
                PolicyExt::or::<_, Full<Bytes>, ()>(same_origin, follow)
            };
            let charges = Arc::default();
            let retried = tower::retry::Retry::new(once_more(), charging("/charges", refusal, &charges));
            let client = ServiceBuilder::new()
                .layer(once().with_errors(class))
                .service(FollowRedirect::with_policy(retried, same_origin()));
            is_charged_once(client, &charges).await;
            let charges = Arc::default();
            let client = ServiceBuilder::new()
                .layer(once())
                .layer(FollowRedirectLayer::with_policy(same_origin()))
                .layer(CallLayer::new(once_more()))
                .service(charging("/charges", refusal, &charges));
            is_charged_once(client, &charges).await;
        }
    }

    /// For example, the page behind a 303 is gone. Its 410 is not the result of the charge.
    #[tokio::test]
    async fn the_status_of_a_later_hop_is_not_stored_as_that_of_the_charge() {
        let overruled = || PolicyExt::or::<_, Full<Bytes>, ()>(same_origin(), policy::Action::Follow);
        let once_more = || RetryPolicy::new(ProviderProfile::stripe()).with_max_attempts(1);
        for refusal in [402, 410, 412, 422] {
            let http = || charging("/charges", Some(refusal), &Arc::default());
            // Without a policy of this crate, only the other URI shows the redirect.
            let elsewhere = charging("/charges/1", Some(refusal), &Arc::default());
            let calls = CallLayer::new(once_more()).layer(http());
            let clients: [Http; 4] = [
                BoxCloneService::new(FollowRedirect::<_>::new(elsewhere)),
                BoxCloneService::new(FollowRedirect::with_policy(http(), overruled())),
                BoxCloneService::new(FollowRedirect::with_policy(
                    tower::retry::Retry::new(once_more(), http()),
                    overruled(),
                )),
                BoxCloneService::new(FollowRedirect::with_policy(
                    calls.map_err(CallError::into_source),
                    overruled(),
                )),
            ];
            for (at, client) in clients.into_iter().enumerate() {
                let client = ServiceBuilder::new().layer(once()).service(client);
                let send = || client.clone().oneshot(keyed("http://bank.example/charges"));
                assert_eq!(send().await.unwrap().status(), refusal);
                let later = send().await;
                assert!(
                    matches!(later, Err(OnceError::Unknown(None))),
                    "{at} {refusal}: {later:?}"
                );
            }
        }
    }

    fn same_origin() -> SameOriginKey {
        SameOriginKey::new(&ProviderProfile::stripe())
    }

    /// The inner policy sees each hop of the outer layer as a first request.
    #[tokio::test]
    async fn a_second_follow_redirect_further_out_does_not_free_the_key() {
        for refusal in [None, Some(404), Some(409), Some(429)] {
            for place in ["/charges/1", "/charges", "http://other.example/"] {
                let (boxed, plain) = (Arc::default(), Arc::default());
                // Across origins, the outer layer drops the extensions. The inner policy has seen
                // the first redirect.
                let inner = FollowRedirect::with_policy(charging(place, refusal, &boxed), same_origin());
                let outer: FollowRedirect<_> = FollowRedirect::new(BoxCloneService::new(inner));
                let client = ServiceBuilder::new()
                    .layer(once().with_errors(class))
                    .service(BoxCloneService::new(outer));
                is_charged_once(client, &boxed).await;
                let client = ServiceBuilder::new()
                    .layer(once().with_errors(class))
                    .layer(FollowRedirectLayer::new())
                    .layer(FollowRedirectLayer::with_policy(same_origin()))
                    .service(charging(place, refusal, &plain));
                is_charged_once(client, &plain).await;
            }
        }
    }

    /// The later hop of the outer layer fails before it reaches the inner policy.
    #[tokio::test]
    async fn an_error_between_two_follow_redirects_does_not_free_the_key() {
        let charges = Arc::default();
        let client = ServiceBuilder::new()
            .layer(once().with_errors(class))
            .layer(FollowRedirectLayer::new())
            .map_err(|error: tower::BoxError| *error.downcast::<io::Error>().unwrap())
            .filter(|request: Request<Full<Bytes>>| match request.method().as_str() {
                "POST" => Ok(request),
                _ => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
            })
            .layer(FollowRedirectLayer::with_policy(same_origin()))
            .service(charging("/charges", None, &charges));
        is_charged_once(client, &charges).await;
    }

    /// Two policies, for two profiles or in two layers, see the same request.
    #[tokio::test]
    async fn policies_that_see_the_same_request_do_not_report_a_redirect() {
        let refusing = |count: &Arc<AtomicUsize>| {
            let count = Arc::clone(count);
            BoxCloneService::new(tower::service_fn(move |_: Request<Full<Bytes>>| {
                let status = [429, 201][count.fetch_add(1, Ordering::SeqCst).min(1)];
                let response = Response::builder().status(status);
                std::future::ready(Ok::<_, io::Error>(response.body(Full::<Bytes>::default()).unwrap()))
            }))
        };
        async fn is_sent_again<S, E>(client: S)
        where
            S: Service<Request<Full<Bytes>>, Response = Response<Full<Bytes>>, Error = E> + Clone,
            E: std::fmt::Debug,
        {
            for status in [429, 201] {
                let response = client.clone().oneshot(keyed("http://bank.example/charges")).await;
                assert_eq!(response.unwrap().status(), status);
            }
        }
        let both = same_origin().and::<_, Full<Bytes>, ()>(SameOriginKey::new(&ProviderProfile::draft()));
        let count = Arc::default();
        let client = ServiceBuilder::new()
            .layer(once())
            .layer(FollowRedirectLayer::with_policy(both))
            .service(refusing(&count));
        is_sent_again(client).await;
        let count = Arc::default();
        let client = ServiceBuilder::new()
            .layer(once())
            .layer(FollowRedirectLayer::with_policy(same_origin()))
            .layer(FollowRedirectLayer::with_policy(same_origin()))
            .service(refusing(&count));
        is_sent_again(client).await;
    }

    /// The redirect dropped the extensions of the request. The retries inside it then could not see
    /// that they are within a `OnceLayer`.
    #[tokio::test]
    async fn a_charge_that_was_redirected_without_its_extensions_is_not_repeated() {
        for keeps in [true, false] {
            let charges = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&charges);
            let http = tower::service_fn(move |request: Request<Full<Bytes>>| {
                std::future::ready(if request.uri().path() == "/charges" {
                    let response = Response::builder().status(307).header(LOCATION, "/v2/charges");
                    Ok(response.body(Full::<Bytes>::default()).unwrap())
                } else {
                    counted.fetch_add(1, Ordering::SeqCst);
                    Err(io::Error::other("connection reset"))
                })
            });
            let policy =
                same_origin().and::<_, Full<Bytes>, ()>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
            let client = ServiceBuilder::new()
                .layer(once())
                .layer(FollowRedirectLayer::with_policy(policy).preserve_extensions(keeps))
                .layer(calls(5))
                .service(http);
            let error = client.oneshot(keyed("http://bank.example/charges")).await.unwrap_err();
            assert!(error.may_have_happened(), "{error:?}");
            assert_eq!(charges.load(Ordering::SeqCst), 1, "keeps extensions: {keeps}");
        }
    }

    /// The target of the redirect is at another origin. It charges, and its responses are lost.
    fn redirecting_to_another_origin(charges: &Arc<AtomicUsize>) -> Http {
        let counted = Arc::clone(charges);
        BoxCloneService::new(tower::service_fn(move |request: Request<Full<Bytes>>| {
            let response = match request.uri().host() {
                Some("bank.example") => Response::builder()
                    .status(308)
                    .header(LOCATION, "http://api.bank.example/charges"),
                _ => {
                    assert!(!request.headers().contains_key("idempotency-key"));
                    counted.fetch_add(1, Ordering::SeqCst);
                    return std::future::ready(Err(io::Error::other("connection reset")));
                }
            };
            std::future::ready(Ok(response.body(Full::<Bytes>::default()).unwrap()))
        }))
    }

    #[tokio::test]
    async fn a_charge_that_has_lost_its_key_is_not_repeated() {
        let charges = Arc::default();
        let same_origin = SameOriginKey::new(&ProviderProfile::stripe());
        let overruled = PolicyExt::or::<_, Full<Bytes>, ()>(same_origin, policy::Action::Follow)
            .and::<_, Full<Bytes>, ()>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
        let client = ServiceBuilder::new()
            .layer(keys())
            .layer(calls(5))
            .layer(FollowRedirectLayer::with_policy(overruled))
            .service(redirecting_to_another_origin(&charges));
        let Err(KeyPlacementError::Service(error)) = client.oneshot(charge("http://bank.example/charges")).await else {
            panic!("the response is lost, so the call must fail");
        };
        assert_eq!((error.attempts(), error.outcome()), (1, CallOutcome::Unknown));
        assert_eq!(charges.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_charge_is_not_redirected_to_another_origin() {
        let charges = Arc::default();
        let http = redirecting_to_another_origin(&charges);
        let policy = Limited::new(5)
            .and::<_, Full<Bytes>, ()>(SameOriginKey::new(&ProviderProfile::stripe()))
            .and::<_, Full<Bytes>, ()>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
        let client = ServiceBuilder::new()
            .layer(keys())
            .layer(calls(5))
            .layer(FollowRedirectLayer::with_policy(policy))
            .service(http);
        let response = client
            .oneshot(charge::<Full<Bytes>>("http://bank.example/charges"))
            .await
            .unwrap();
        assert_eq!(response.status(), 308);
        assert_eq!(charges.load(Ordering::SeqCst), 0);
    }
}
