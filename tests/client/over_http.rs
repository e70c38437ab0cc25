//! The client layers over the real clients of hyper-util and reqwest, with real servers.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::channel::oneshot;
use futures::{StreamExt, stream};
use http::header::{CONTENT_TYPE, LOCATION, TE, TRAILER};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tower::{ServiceBuilder, ServiceExt};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_http::follow_redirect::policy::{Limited, Policy, PolicyExt, clone_body_fn};
use tower_idempotency::MemoryStore;
use tower_idempotency::client::{
    CallError, CallLayer, CallOutcome, CallReport, IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyPlacementError,
    OnceLayer, ProviderProfile, ReqwestService, RetryPolicy, SameOriginKey,
};

const PATIENCE: Duration = Duration::from_secs(20);

type ServerResponse = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A request as it arrived.
#[derive(Clone, Debug, PartialEq)]
struct Arrived {
    method: String,
    path: String,
    key: Option<String>,
    body: String,
}

/// A server on its own port. If its function returns an error, the server breaks the connection.
#[derive(Clone)]
struct Server {
    address: SocketAddr,
    arrived: Arc<Mutex<Vec<Arrived>>>,
}

impl Server {
    /// Starts a server. `respond` gets the path and the number of requests that have arrived.
    async fn start(respond: impl Fn(&str, usize) -> io::Result<ServerResponse> + Clone + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            arrived: Arc::default(),
        };
        let arrived = Arc::clone(&server.arrived);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (arrived, respond) = (Arc::clone(&arrived), respond.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    let (arrived, respond) = (Arc::clone(&arrived), respond.clone());
                    async move {
                        let request = read(request).await;
                        let path = request.path.clone();
                        let count = {
                            let mut arrived = arrived.lock().unwrap();
                            arrived.push(request);
                            arrived.len()
                        };
                        respond(&path, count)
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        server
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn arrived(&self) -> Vec<Arrived> {
        self.arrived.lock().unwrap().clone()
    }

    /// Checks that all arrived requests are one logical request with one key, and returns their
    /// paths.
    fn paths_of_one_request(&self) -> Vec<String> {
        let arrived = self.arrived();
        let first = &arrived[0];
        assert!(first.key.as_ref().is_some_and(|key| key.len() == 36), "{first:?}");
        for hop in &arrived {
            let same = (&hop.method, &hop.key, &hop.body) == (&first.method, &first.key, &first.body);
            assert!(same && hop.method == "POST" && hop.body == "amount=1", "{arrived:?}");
        }
        arrived.into_iter().map(|hop| hop.path).collect()
    }
}

async fn read(request: Request<Incoming>) -> Arrived {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let mut keys = head.headers.get_all("idempotency-key").iter();
    let key = keys.next().map(|key| key.to_str().unwrap().to_owned());
    assert!(keys.next().is_none(), "a request has at most one key");
    Arrived {
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        key,
        body: String::from_utf8(body.into()).unwrap(),
    }
}

fn text(status: StatusCode, text: &str) -> ServerResponse {
    let mut response = Response::new(Full::from(text.to_owned()).boxed_unsync());
    *response.status_mut() = status;
    response
}

fn redirect(status: StatusCode, place: &str) -> ServerResponse {
    let mut response = text(status, "");
    response.headers_mut().insert(LOCATION, place.parse().unwrap());
    response
}

/// Redirects `/0` to `/1` to `/2`, and from there to `elsewhere` if it is set.
async fn redirecting(elsewhere: Option<String>) -> Server {
    Server::start(move |path, _| {
        Ok(match (path, &elsewhere) {
            ("/0", _) => redirect(StatusCode::TEMPORARY_REDIRECT, "/1"),
            ("/1", _) => redirect(StatusCode::PERMANENT_REDIRECT, "/2"),
            ("/2", Some(place)) => redirect(StatusCode::TEMPORARY_REDIRECT, place),
            _ => text(StatusCode::CREATED, "charged"),
        })
    })
    .await
}

async fn accepting() -> Server {
    Server::start(|_, _| Ok(text(StatusCode::CREATED, "charged"))).await
}

fn keys() -> IdempotencyKeyLayer {
    IdempotencyKeyLayer::new(ProviderProfile::stripe())
}

/// Returns a layer that retries after short pauses.
fn calls(attempts: u32) -> CallLayer {
    let policy = RetryPolicy::new(ProviderProfile::stripe()).with_max_attempts(attempts);
    CallLayer::new(
        policy
            .with_initial_backoff(Duration::from_millis(1))
            .with_max_backoff(Duration::from_millis(10)),
    )
}

fn charge<B: From<&'static str>>(url: &str) -> Request<B> {
    Request::post(url).body(B::from("amount=1")).unwrap()
}

mod bodies;

mod redirects;

mod with_reqwest {
    use super::*;
    use reqwest::Body;
    use tower::{Layer, Service};

    fn built() -> ReqwestService {
        ReqwestService::build(reqwest::Client::builder().no_proxy()).unwrap()
    }

    /// Sends a charge with a new key.
    async fn send(http: ReqwestService, url: &str) -> Result<reqwest::Response, reqwest::Error> {
        let client = ServiceBuilder::new().layer(keys()).service(http);
        match client.oneshot(charge::<Body>(url)).await {
            Ok(response) => Ok(response.into()),
            Err(KeyPlacementError::Service(error)) => Err(error),
            Err(error) => panic!("{error}"),
        }
    }

    #[tokio::test]
    async fn debug_forms_name_their_types_and_hide_keys() {
        let with_key = || {
            let mut request = charge::<Body>("http://bank.example/");
            request
                .headers_mut()
                .insert("idempotency-key", "secret-key".parse().unwrap());
            request
        };
        let (generator, outgoing) = (KeyGenerator::uuid_v7(), Arc::new(Mutex::new(String::new())));
        let noted = Arc::clone(&outgoing);
        let by_function = KeyGenerator::from_fn(move |request| {
            *noted.lock().unwrap() = format!("{request:?}");
            Ok::<_, Infallible>("secret-key".to_owned())
        });
        let in_body = keys().with_body_key(|_: &mut Request<Body>, _| Ok::<_, Infallible>(()));
        let collecting = || calls(1).collect_responses();
        let once = || OnceLayer::new(MemoryStore::new(), ProviderProfile::stripe());
        let mut keyed = keys().with_generator(by_function.clone()).layer(built());
        drop(keyed.call(charge::<Body>("http://bank.example/")));
        let by_value = tower_idempotency::client::once(MemoryStore::new(), "secret-key");
        let origin = KeyGenerator::derived(KeyDeriver::new(b"secret-key of 32 bytes or longer").unwrap());
        for (shown, start) in [
            (format!("{generator:?}"), "KeyGenerator::uuid_v7()"),
            (format!("{by_function:?}"), "KeyGenerator::from_fn(..)"),
            (format!("{origin:?}"), "KeyGenerator::derived(..)"),
            (outgoing.lock().unwrap().clone(), "Outgoing { method: POST"),
            (
                format!("{:?}", keys()),
                "IdempotencyKeyLayer { profile: ProviderProfile",
            ),
            (format!("{:?}", in_body.layer(())), "IdempotencyKeyService { inner: ()"),
            (format!("{by_value:?}"), "Once { engine"),
            (format!("{:?}", once()), "OnceLayer { profile: ProviderProfile"),
            (format!("{:?}", once().layer(7_u8)), "OnceClient { inner: 7"),
            (format!("{:?}", built().call(with_key())), "ReqwestFuture"),
            (format!("{:?}", once().layer(built()).call(with_key())), "OnceFuture"),
            (
                format!("{:?}", calls(1).layer(built()).call(with_key())),
                "CallFuture { report",
            ),
            (
                format!("{:?}", collecting().layer(built()).call(with_key())),
                "CollectingCallFuture(CallFuture",
            ),
        ] {
            assert!(shown.starts_with(start) && !shown.contains("secret-key"), "{shown}");
        }
    }

    #[tokio::test]
    async fn redirects_within_an_origin_carry_key_and_body() {
        let server = redirecting(None).await;
        let response = send(built(), &server.url("/0")).await.unwrap();
        assert_eq!(
            (response.status(), response.url().as_str()),
            (StatusCode::CREATED, &*server.url("/2"))
        );
        assert_eq!(response.text().await.unwrap(), "charged");
        assert_eq!(server.paths_of_one_request(), ["/0", "/1", "/2"]);
    }

    #[tokio::test]
    async fn a_redirect_to_another_origin_is_returned_and_not_followed() {
        let other = accepting().await;
        let server = redirecting(Some(other.url("/there"))).await;
        let response = send(built(), &server.url("/0")).await.unwrap();
        assert_eq!(response.status(), StatusCode::TEMPORARY_REDIRECT);
        assert_eq!(response.headers()[LOCATION], other.url("/there").as_str());
        assert_eq!(server.paths_of_one_request().len(), 3);
        assert_eq!(other.arrived(), []);
    }

    #[tokio::test]
    async fn a_client_of_the_application_sends_its_key_to_the_target_of_a_redirect() {
        let other = accepting().await;
        let server = redirecting(Some(other.url("/there"))).await;
        let client = ReqwestService::from_client(reqwest::Client::builder().no_proxy().build().unwrap());
        assert_eq!(
            send(client, &server.url("/0")).await.unwrap().status(),
            StatusCode::CREATED
        );
        assert_eq!(other.paths_of_one_request(), ["/there"]);
        assert_eq!(other.arrived()[0].key, server.arrived()[0].key);
    }

    #[tokio::test]
    async fn at_most_ten_redirects_are_followed() {
        let rounds = Server::start(|_, _| Ok(redirect(StatusCode::TEMPORARY_REDIRECT, "/again"))).await;
        assert!(send(built(), &rounds.url("/")).await.unwrap_err().is_redirect());
        assert_eq!(rounds.paths_of_one_request().len(), 11);
    }

    #[tokio::test]
    async fn every_attempt_carries_one_key_over_connections_that_break() {
        let server = Server::start(|_, count| match count {
            1 => Err(io::ErrorKind::ConnectionReset.into()),
            2 => Ok(text(StatusCode::SERVICE_UNAVAILABLE, "")),
            _ => Ok(text(StatusCode::CREATED, "charged")),
        });
        let server = server.await;
        let client = ServiceBuilder::new().layer(keys()).layer(calls(5)).service(built());
        let response = client.clone().oneshot(charge::<Body>(&server.url("/"))).await.unwrap();
        let delivery = *response.extensions().get::<CallReport>().unwrap();
        assert_eq!((delivery.attempts(), delivery.outcome()), (3, CallOutcome::Responded));
        assert_eq!(server.paths_of_one_request().len(), 3);

        client.oneshot(charge::<Body>(&server.url("/"))).await.unwrap();
        let arrived = server.arrived();
        assert_ne!(arrived[3].key, arrived[0].key, "another call has another key");
    }

    #[tokio::test]
    async fn errors_of_reqwest_show_whether_a_request_was_sent() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        for (url, attempts) in [(format!("http://{free}/"), 3), ("/relative".to_owned(), 1)] {
            let client = ServiceBuilder::new().layer(keys()).layer(calls(3)).service(built());
            let error: KeyPlacementError<CallError<reqwest::Error>> =
                client.oneshot(charge::<Body>(&url)).await.unwrap_err();
            let KeyPlacementError::Service(error) = error else {
                panic!("{error}")
            };
            assert_eq!(
                (error.attempts(), error.outcome()),
                (attempts, CallOutcome::NotTaken),
                "{url}"
            );
        }
        let silent = Server::start(|_, _| Err(io::ErrorKind::ConnectionReset.into())).await;
        let client = ServiceBuilder::new().layer(keys()).layer(calls(2)).service(built());
        match client.oneshot(charge::<Body>(&silent.url("/"))).await {
            Err(KeyPlacementError::Service(error)) => {
                assert_eq!((error.attempts(), error.outcome()), (2, CallOutcome::Unknown));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(silent.arrived().len(), 2);
    }

    /// A retry policy of the application, which repeats a failed request once and reports nothing.
    #[derive(Clone)]
    struct Again(bool);

    impl tower::retry::Policy<Request<Body>, Response<Body>, reqwest::Error> for Again {
        type Future = std::future::Ready<()>;

        fn retry(
            &mut self,
            _: &mut Request<Body>,
            result: &mut Result<Response<Body>, reqwest::Error>,
        ) -> Option<Self::Future> {
            (result.is_err() && std::mem::take(&mut self.0)).then(|| std::future::ready(()))
        }

        fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
            let mut clone = Request::new(Body::from(request.body().as_bytes()?.to_vec()));
            clone.method_mut().clone_from(request.method());
            clone.uri_mut().clone_from(request.uri());
            clone.headers_mut().clone_from(request.headers());
            clone.extensions_mut().clone_from(request.extensions());
            Some(clone)
        }
    }

    /// The first request charges, and its connection breaks. The repeated request finds no server.
    /// That a request was not sent this time shows nothing about the one before it.
    #[tokio::test]
    async fn an_attempt_that_another_retry_layer_repeats_is_not_reported_as_not_sent() {
        let charging = || async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/", listener.local_addr().unwrap());
            let serving = async move {
                let (stream, _) = listener.accept().await.unwrap();
                drop(listener);
                let charge = service_fn(|request| async move {
                    read(request).await;
                    Err::<ServerResponse, _>(io::Error::from(io::ErrorKind::ConnectionReset))
                });
                drop(
                    http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), charge)
                        .await,
                );
            };
            (url, serving)
        };
        let again = || tower::retry::RetryLayer::new(Again(true));
        let (url, serving) = charging().await;
        let client = ServiceBuilder::new()
            .layer(keys())
            .layer(calls(1))
            .layer(again())
            .service(built());
        let (failed, ()) = tokio::join!(client.oneshot(charge::<Body>(&url)), serving);
        let Err(KeyPlacementError::Service(error)) = failed else {
            panic!("the call succeeded")
        };
        assert_eq!(error.outcome(), CallOutcome::Unknown);

        let (url, serving) = charging().await;
        let once = OnceLayer::new(MemoryStore::new(), ProviderProfile::stripe());
        let client = ServiceBuilder::new()
            .layer(keys())
            .layer(once)
            .layer(again())
            .service(built());
        let (failed, ()) = tokio::join!(client.oneshot(charge::<Body>(&url)), serving);
        let Err(KeyPlacementError::Service(error)) = failed else {
            panic!("the call succeeded")
        };
        assert!(error.may_have_happened(), "{error:?}");
    }

    #[tokio::test]
    async fn a_response_streams_with_its_trailers() {
        let (sender, receiver) = oneshot::channel();
        let rest = Arc::new(Mutex::new(Some(receiver)));
        let server = Server::start(move |_, _| {
            let receiver = rest.lock().unwrap().take().unwrap();
            let last = stream::once(async move {
                receiver.await.unwrap();
                let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "9".parse().unwrap())]);
                [Frame::data(Bytes::from("second")), Frame::trailers(trailers)]
            });
            let first = stream::iter([Frame::data(Bytes::from("first"))]);
            let frames = first.chain(last.flat_map(stream::iter)).map(Ok::<_, Infallible>);
            let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
            response.headers_mut().insert(TRAILER, "x-sum".parse().unwrap());
            Ok(response)
        });
        let server = server.await;
        let client = ServiceBuilder::new().layer(keys()).layer(calls(5)).service(built());
        let mut request = charge::<Body>(&server.url("/"));
        // A client that does not ask for trailers may not get them (RFC 9110 section 6.5.1).
        request.headers_mut().insert(TE, "trailers".parse().unwrap());
        let mut body = client.oneshot(request).await.unwrap().into_body();
        let frame = timeout(PATIENCE, body.frame())
            .await
            .expect("the first frame comes before the response ends");
        assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), "first");
        sender.send(()).unwrap();
        let rest = body.collect().await.unwrap();
        assert_eq!(rest.trailers().unwrap()["x-sum"], "9");
        assert_eq!(rest.to_bytes(), "second");
    }

    #[tokio::test]
    async fn a_streaming_body_is_sent_once() {
        let server = Server::start(|_, _| Ok(text(StatusCode::SERVICE_UNAVAILABLE, ""))).await;
        let frames = ["amount", "=1"].map(|part| Ok::<_, Infallible>(Frame::data(Bytes::from(part))));
        let body = Body::wrap(StreamBody::new(stream::iter(frames)));
        let client = ServiceBuilder::new().layer(keys()).layer(calls(5)).service(built());
        let request = Request::post(server.url("/")).body(body).unwrap();
        let response = client.oneshot(request).await.unwrap();
        assert_eq!(response.extensions().get::<CallReport>().unwrap().attempts(), 1);
        assert_eq!(server.paths_of_one_request(), ["/"]);
    }

    #[tokio::test]
    async fn a_call_is_made_once_and_its_response_is_replayed() {
        let server = Server::start(|_, _| {
            let mut response = text(StatusCode::CREATED, "charged");
            response
                .headers_mut()
                .insert(CONTENT_TYPE, "text/plain".parse().unwrap());
            Ok(response)
        });
        let server = server.await;
        let once = OnceLayer::new(MemoryStore::new(), ProviderProfile::stripe());
        let client = ServiceBuilder::new().layer(once).service(built());
        let pay = || {
            let mut request = charge::<Body>(&server.url("/"));
            request
                .headers_mut()
                .insert("idempotency-key", "order-1".parse().unwrap());
            client.clone().oneshot(request)
        };
        let first = reqwest::Response::from(pay().await.unwrap());
        let again = reqwest::Response::from(pay().await.unwrap());
        assert_eq!(again.headers()["idempotent-replayed"], "true");
        assert_eq!(first.headers()[CONTENT_TYPE], again.headers()[CONTENT_TYPE]);
        assert_eq!(
            (first.status(), again.status()),
            (StatusCode::CREATED, StatusCode::CREATED)
        );
        assert_eq!(first.text().await.unwrap(), "charged");
        assert_eq!(again.text().await.unwrap(), "charged");
        assert_eq!(server.arrived().len(), 1);
    }
}

mod with_hyper {
    use super::*;

    fn http() -> Client<HttpConnector, Full<Bytes>> {
        Client::builder(TokioExecutor::new()).build_http()
    }

    async fn body(response: Response<Incoming>) -> Bytes {
        response.into_body().collect().await.unwrap().to_bytes()
    }

    #[tokio::test]
    async fn every_call_has_a_key_of_its_own_and_its_body_arrives() {
        let server = accepting().await;
        let client = ServiceBuilder::new().layer(keys()).service(http());
        for _ in 0..20 {
            let response = client.clone().oneshot(charge(&server.url("/"))).await.unwrap();
            assert_eq!(
                (response.status(), body(response).await),
                (StatusCode::CREATED, "charged".into())
            );
        }
        let arrived = server.arrived();
        let keys: std::collections::HashSet<_> = arrived.iter().map(|request| request.key.as_ref().unwrap()).collect();
        assert_eq!(keys.len(), 20);
        assert!(arrived.iter().all(|request| request.body == "amount=1"));
    }

    #[tokio::test]
    async fn every_attempt_carries_one_key_over_connections_that_break() {
        let server = Server::start(|_, count| match count {
            1 | 2 => Err(io::ErrorKind::ConnectionReset.into()),
            _ => Ok(text(StatusCode::CREATED, "charged")),
        });
        let server = server.await;
        let client = ServiceBuilder::new().layer(keys()).layer(calls(5)).service(http());
        let response = client.oneshot(charge(&server.url("/"))).await.unwrap();
        let delivery = *response.extensions().get::<CallReport>().unwrap();
        assert_eq!((delivery.attempts(), delivery.outcome()), (3, CallOutcome::Responded));
        assert_eq!(server.paths_of_one_request().len(), 3);
    }

    /// Follows redirects by this policy until the last response, and returns its status.
    async fn follow<P>(policy: P, url: &str) -> StatusCode
    where
        P: Policy<Full<Bytes>, hyper_util::client::legacy::Error> + Clone,
    {
        let redirects = FollowRedirectLayer::with_policy(policy);
        let client = ServiceBuilder::new().layer(keys()).layer(redirects).service(http());
        client.oneshot(charge(url)).await.unwrap().status()
    }

    #[tokio::test]
    async fn a_charge_leaves_its_origin_only_without_the_policy() {
        let limited = || {
            let body = clone_body_fn(|body: &Full<Bytes>| Some(body.clone()));
            Limited::new(9).and::<_, Full<Bytes>, ()>(body)
        };
        for has_policy in [true, false] {
            let other = accepting().await;
            let server = redirecting(Some(other.url("/there"))).await;
            let status = if has_policy {
                let policy = limited().and::<_, Full<Bytes>, ()>(SameOriginKey::new(&ProviderProfile::stripe()));
                follow(policy, &server.url("/0")).await
            } else {
                follow(limited(), &server.url("/0")).await
            };
            assert_eq!(server.paths_of_one_request(), ["/0", "/1", "/2"]);
            let there = other.arrived();
            if has_policy {
                assert_eq!((status, &*there), (StatusCode::TEMPORARY_REDIRECT, &[][..]));
            } else {
                assert_eq!((status, &*there[0].body), (StatusCode::CREATED, "amount=1"));
                assert_eq!(there[0].key, server.arrived()[0].key);
            }
        }
    }
}
