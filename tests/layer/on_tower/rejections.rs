//! Services inside the layer that reject requests before the handler gets them.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use tower::buffer::{Buffer, BufferLayer};
use tower::limit::ConcurrencyLimitLayer;
use tower::load_shed::LoadShedLayer;
use tower::timeout::TimeoutLayer;
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, buffer, load_shed};
use tower_idempotency::{IdempotencyLayer, OnError, ServiceFailure};

use crate::support::{AnyBody, Got, Handler, RemoteStore, advance, got, post, send, text, yield_times};

const EVERY: [OnError; 3] = [OnError::Store, OnError::Release, OnError::Unknown];

fn classify(error: &BoxError) -> ServiceFailure {
    let not_run = error.is::<load_shed::error::Overloaded>()
        || error.is::<buffer::error::ServiceError>()
        || error.is::<buffer::error::Closed>();
    if not_run {
        ServiceFailure::NotRun
    } else {
        ServiceFailure::Failed
    }
}

fn layer(store: &RemoteStore, on_error: OnError) -> IdempotencyLayer<RemoteStore> {
    IdempotencyLayer::new(store.clone())
        .on_error(on_error)
        .with_errors(classify)
}

/// Sends a request whose service may fail.
fn try_send<S, E>(service: &S, key: &str) -> impl Future<Output = Result<Got, E>> + use<S, E>
where
    S: Service<Request<AnyBody>, Response = Response<AnyBody>, Error = E> + Clone,
{
    let responding = service.clone().oneshot(post(key, "x"));
    async move { Ok(got(responding.await?).await) }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_a_load_shedder_rejects_frees_its_key_under_every_setting() {
    for on_error in EVERY {
        let (store, handler) = (RemoteStore::new(), Handler::new().taking(Duration::from_secs(1)));
        let service = ServiceBuilder::new()
            .layer(layer(&store, on_error))
            .layer(LoadShedLayer::new())
            .layer(ConcurrencyLimitLayer::new(1))
            .service(handler.clone());
        let (one, two) = tokio::join!(try_send(&service, "one"), try_send(&service, "two"));
        let shed = if one.is_err() { "one" } else { "two" };
        let error = one.err().or(two.err()).expect("one request is shed");
        assert!(error.is::<load_shed::error::Overloaded>(), "{on_error:?}: {error}");
        assert_eq!(store.len(), 1, "{on_error:?}: only the request that ran has a record");
        let again = try_send(&service, shed).await.unwrap();
        assert_eq!((again.status(), again.is_replay()), (201, false), "{on_error:?}");
        assert_eq!(handler.runs(), 2);
    }
}

/// A service that is never ready.
#[derive(Clone)]
struct NeverReady;

impl Service<Request<AnyBody>> for NeverReady {
    type Response = Response<AnyBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Err("no connection".into()))
    }

    fn call(&mut self, _: Request<AnyBody>) -> Self::Future {
        unreachable!("the service is never ready")
    }
}

#[tokio::test]
async fn a_request_whose_buffered_service_is_not_ready_frees_its_key_under_every_setting() {
    for on_error in EVERY {
        let store = RemoteStore::new();
        let service = ServiceBuilder::new()
            .layer(layer(&store, on_error))
            .layer(BufferLayer::new(8))
            .service(NeverReady);
        let error = try_send(&service, "k").await.unwrap_err();
        assert!(error.is::<buffer::error::ServiceError>(), "{on_error:?}: {error}");
        assert_eq!((store.len(), store.calls("claim")), (0, 1), "{on_error:?}");
    }
}

#[tokio::test]
async fn a_request_whose_buffer_has_closed_frees_its_key_under_every_setting() {
    for on_error in EVERY {
        let store = RemoteStore::new();
        let (buffer, worker) = Buffer::pair(Handler::new(), 8);
        let mut service = layer(&store, on_error).layer(buffer);
        let running = service.ready().await.unwrap().call(post("k", "x"));
        let closing = async {
            yield_times(50).await;
            drop(worker);
        };
        let (result, ()) = tokio::join!(running, closing);
        let error = result.unwrap_err();
        assert!(error.is::<buffer::error::Closed>(), "{on_error:?}: {error}");
        assert_eq!((store.len(), store.calls("claim")), (0, 1), "{on_error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_timed_out_inside_the_layer_may_have_run_and_follows_the_setting() {
    for (on_error, wanted) in [
        (OnError::Store, (500, "handler-failed", 1)),
        (OnError::Release, (0, "", 2)),
        (OnError::Unknown, (409, "outcome-unknown", 1)),
    ] {
        let (store, handler) = (RemoteStore::new(), Handler::new().taking(Duration::from_secs(9)));
        let service = ServiceBuilder::new()
            .layer(layer(&store, on_error))
            .layer(TimeoutLayer::new(Duration::from_secs(1)))
            .service(handler.clone());
        let error = try_send(&service, "k").await.unwrap_err();
        assert!(error.is::<tower::timeout::error::Elapsed>(), "{on_error:?}: {error}");
        let seen = match try_send(&service, "k").await {
            Ok(again) if again.is_replay() => (again.status(), "handler-failed", handler.runs()),
            Ok(again) => (again.status(), again.code(), handler.runs()),
            Err(_) => (0, "", handler.runs()),
        };
        assert_eq!(seen, wanted, "{on_error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_concurrency_limit_inside_the_layer_delays_requests_and_rejects_none() {
    for on_error in EVERY {
        let (store, handler) = (RemoteStore::new(), Handler::new().taking(Duration::from_secs(1)));
        let service = ServiceBuilder::new()
            .layer(layer(&store, on_error))
            .layer(ConcurrencyLimitLayer::new(1))
            .service(handler);
        let keys = ["a", "b", "c"].map(|key| send(&service, post(key, "x")));
        let statuses = futures::future::join_all(keys).await;
        assert!(statuses.iter().all(|response| response.status() == 201));
    }
}

/// A service that fails each request after a second with its own error type.
#[derive(Clone, Default)]
struct Failing(Arc<AtomicUsize>);

#[derive(Debug, PartialEq)]
struct Failure;

impl Service<Request<AnyBody>> for Failing {
    type Response = Response<AnyBody>;
    type Error = Failure;
    type Future = BoxFuture<'static, Result<Self::Response, Failure>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<AnyBody>) -> Self::Future {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Err(Failure)
        })
    }
}

#[tokio::test(start_paused = true)]
async fn duplicates_of_a_request_that_did_not_run_get_not_run() {
    let store = RemoteStore::new();
    let service = layer(&store, OnError::Unknown)
        .with_errors(|_: &Failure| ServiceFailure::NotRun)
        .layer(Failing::default());
    let (first, duplicate) = tokio::join!(try_send(&service, "k"), try_send(&service, "k"));
    assert_eq!(first.err(), Some(Failure));
    let duplicate = duplicate.unwrap();
    assert_eq!((duplicate.status(), duplicate.code()), (503, "not-run"));
    assert_eq!(duplicate.head.headers["retry-after"], "1");
    assert_eq!(store.len(), 0);
}

/// The application provides the classifier, so a panic of the classifier does not show what the
/// handler did.
#[tokio::test(start_paused = true)]
async fn an_error_without_a_class_counts_as_a_failure_of_the_handler() {
    let store = RemoteStore::new();
    let other_type = layer(&store, OnError::Unknown);
    let panics = layer(&store, OnError::Unknown).with_errors(|_: &Failure| panic!("classifier"));
    let last_wins = layer(&store, OnError::Unknown)
        .with_errors(|_: &Failure| ServiceFailure::NotRun)
        .with_errors(|_: &Failure| ServiceFailure::Failed);
    for (key, layer) in [("type", other_type), ("panic", panics), ("last", last_wins)] {
        let service = layer.layer(Failing::default());
        assert_eq!(try_send(&service, key).await.err(), Some(Failure), "{key}");
        assert_eq!(
            try_send(&service, key).await.unwrap().code(),
            "outcome-unknown",
            "{key}"
        );
    }
}

/// A service that is ready until the test breaks it.
#[derive(Clone, Default)]
struct Breakable {
    broken: Arc<AtomicBool>,
    handler: Handler,
}

impl Service<Request<AnyBody>> for Breakable {
    type Response = Response<AnyBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.broken.load(Ordering::SeqCst) {
            false => Poll::Ready(Ok(())),
            true => Poll::Ready(Err("no connection".into())),
        }
    }

    fn call(&mut self, request: Request<AnyBody>) -> Self::Future {
        let running = self.handler.call(request);
        Box::pin(async { running.await.map_err(|never: Infallible| match never {}) })
    }
}

/// The waiter has released its readiness, so it polls the service again before it claims the key.
#[tokio::test(start_paused = true)]
async fn a_waiter_whose_service_is_no_longer_ready_claims_nothing() {
    for on_error in EVERY {
        let store = RemoteStore::new();
        // The owner in the other process returns a response that is not stored, so the key becomes
        // free.
        let owner = Handler::new()
            .taking(Duration::from_secs(3))
            .responding(|_| text(StatusCode::TOO_MANY_REQUESTS, "later"));
        let elsewhere = layer(&store, on_error).layer(owner);
        let inner = Breakable::default();
        let here = layer(&store, on_error).layer(inner.clone());
        let first = crate::support::start(&elsewhere, post("k", "x"));
        advance(Duration::from_millis(1)).await;
        let waiting = waits(try_send(&here, "k"));
        let duplicate = waits(try_send(&here, "k"));
        let breaks = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            inner.broken.store(true, Ordering::SeqCst);
        };
        let (waiting, duplicate, ()) = tokio::join!(waiting, duplicate, breaks);
        assert_eq!(first.await.unwrap().status(), 429);
        for ended in [waiting, duplicate] {
            assert_eq!(ended.unwrap_err().to_string(), "no connection", "{on_error:?}");
        }
        assert_eq!((store.len(), inner.handler.runs()), (0, 0), "{on_error:?}");
        inner.broken.store(false, Ordering::SeqCst);
        assert_eq!(try_send(&here, "k").await.unwrap().status(), 201, "{on_error:?}");
    }
}

async fn waits<F: Future>(future: F) -> F::Output {
    let ended = tokio::time::timeout(Duration::from_secs(20), future).await;
    ended.expect("the request waits no longer than the owner runs")
}
