//! The third party that the client examples call: a server on a free port, and the accidents that
//! happen to the requests.
#![allow(dead_code, reason = "each example uses some of the accidents only")]

pub(crate) mod bank;

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::Notify;
use tower::ServiceExt;

/// The fate of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Accident {
    /// The request takes effect, and the connection breaks before the response.
    ResponseLost,
    /// The request takes effect, and no response comes.
    ResponseStuck,
    /// No accident happens.
    None,
    /// The server refuses the request with 503, and the request has no effect.
    Overload,
    /// The request has no effect, and no response comes.
    RequestStuck,
    /// The request takes effect, and the response comes late.
    Slow(Duration),
}

/// A third party that runs in this process. Clones share the server and its list of accidents.
#[derive(Clone)]
pub(crate) struct ThirdParty {
    address: SocketAddr,
    app: Router,
    accidents: Arc<Mutex<VecDeque<Accident>>>,
    stuck: Arc<Notify>,
}

impl ThirdParty {
    pub(crate) async fn serve(app: Router) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let party = Self {
            address: listener.local_addr()?,
            app,
            accidents: Arc::default(),
            stuck: Arc::default(),
        };
        let serving = party.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().connect(stream));
            }
        });
        Ok(party)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Adds accidents for the next requests, one for each request, in this order.
    pub(crate) fn expect(&self, accidents: impl IntoIterator<Item = Accident>) {
        let mut coming = self.accidents.lock().unwrap_or_else(PoisonError::into_inner);
        coming.extend(accidents);
    }

    /// Runs a process until one of its requests is stuck, and then kills it.
    ///
    /// # Errors
    ///
    /// Fails if the process cannot be started or killed, or if it ends by itself.
    pub(crate) async fn crash(&self, process: &mut Command) -> io::Result<()> {
        let mut process = process.kill_on_drop(true).spawn()?;
        tokio::select! {
            () = self.stuck.notified() => process.kill().await,
            ended = process.wait() => {
                let problem = format!("the process ended with {} before its request was stuck", ended?);
                Err(io::Error::other(problem))
            }
        }
    }

    async fn connect(self, stream: TcpStream) {
        let service = service_fn(|request| self.respond(request));
        // The accidents break connections on purpose, so the error is ignored.
        drop(
            http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await,
        );
    }

    /// Responds to a request, after its accident. An error breaks the connection.
    async fn respond(&self, request: Request<Incoming>) -> io::Result<Response> {
        let accident = self
            .accidents
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        match accident {
            Some(Accident::Overload) => return Ok(StatusCode::SERVICE_UNAVAILABLE.into_response()),
            Some(Accident::RequestStuck) => self.hang().await,
            _ => {}
        }
        let Ok(response) = self.app.clone().oneshot(request).await;
        match accident {
            Some(Accident::ResponseLost) => return Err(io::ErrorKind::ConnectionReset.into()),
            Some(Accident::ResponseStuck) => self.hang().await,
            Some(Accident::Slow(time)) => tokio::time::sleep(time).await,
            _ => {}
        }
        Ok(response)
    }

    async fn hang(&self) {
        self.stuck.notify_one();
        pending::<()>().await;
    }
}

/// A temporary folder. Dropping this value removes the folder.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("tower-idempotency-{name}-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
