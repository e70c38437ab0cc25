//! The handler that the layer protects, and requests to it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tokio::sync::Notify;
use tower_idempotency::{Idempotency, Store};
use tower_service::Service;

pub(crate) type Guarded<St> = Idempotency<Handler, St>;
pub(crate) type Body = Full<Bytes>;

/// A handler that lets other tasks run while it runs, and counts its runs. Each run has another
/// response.
#[derive(Clone, Default)]
pub(crate) struct Handler(Arc<State>);

#[derive(Default)]
struct State {
    /// Every run waits for this, if there is one.
    gate: Option<Notify>,
    begun: AtomicUsize,
    running: AtomicUsize,
    failures: usize,
}

impl Handler {
    /// Makes a handler whose first runs fail.
    pub(crate) fn failing(failures: usize) -> Self {
        Self(Arc::new(State {
            failures,
            ..State::default()
        }))
    }

    /// Makes a handler whose run waits for [`open`](Self::open).
    pub(crate) fn gated() -> Self {
        Self(Arc::new(State {
            gate: Some(Notify::new()),
            ..State::default()
        }))
    }

    pub(crate) fn open(&self) {
        self.0.gate.iter().for_each(Notify::notify_one);
    }

    pub(crate) fn runs(&self) -> usize {
        self.0.begun.load(Ordering::SeqCst)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.0.running.load(Ordering::SeqCst) > 0
    }

    async fn handle(self) -> Result<Response<Body>, Infallible> {
        let run = self.0.begun.fetch_add(1, Ordering::SeqCst);
        let running = self.0.running.fetch_add(1, Ordering::SeqCst);
        assert_eq!(running, 0, "one execution at a time (I1)");
        match &self.0.gate {
            Some(gate) => gate.notified().await,
            None => shuttle::future::yield_now().await,
        }
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        let failed = run < self.0.failures;
        let status = if failed {
            StatusCode::BAD_GATEWAY
        } else {
            StatusCode::CREATED
        };
        let mut response = Response::new(Full::from(format!("run {run}")));
        *response.status_mut() = status;
        Ok(response)
    }
}

impl Service<Request<Body>> for Handler {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        Box::pin(self.clone().handle())
    }
}

/// Sends a request, and returns the status and the body of its response.
pub(crate) async fn send<St: Store>(mut service: Guarded<St>, body: &'static str) -> (StatusCode, Bytes) {
    let request = Request::post("/payments")
        .header("Idempotency-Key", "k")
        .body(Full::from(body))
        .unwrap();
    let (head, body) = service.call(request).await.unwrap().into_parts();
    (head.status, body.collect().await.unwrap().to_bytes())
}
