//! A process of the application: this binary, started again with its role in the environment. It
//! serves one route for each mode, all over one store.

use std::io::Read;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::future::join_all;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use sqlx::PgPool;
use tower_idempotency::outbox::{Outbox, OutboxMessage};
use tower_idempotency::{
    BoxStore, DoNotStore, Drain, IdempotencyLayer, Lease, LostAttempt, OnError, PostgresStore, Recovered, RedisStore,
};

use crate::bank::Mode;
use crate::messages;

/// Short, so that the key of a killed or stopped process soon counts as lost.
pub(crate) const LEASE: Duration = Duration::from_secs(1);

pub(crate) type HttpClient = Client<HttpConnector, Full<Bytes>>;

pub(crate) fn http_client() -> HttpClient {
    Client::builder(TokioExecutor::new()).build_http()
}

/// The place of a process in a test.
#[derive(Clone, Debug)]
pub(crate) struct Role {
    pub(crate) number: usize,
    pub(crate) port: u16,
    /// The URL of the store. The nodes of a Cluster are separated by commas.
    pub(crate) store: String,
    pub(crate) replicas: usize,
    pub(crate) bank: SocketAddr,
    pub(crate) modes: &'static [Mode],
}

/// A running process. Dropping it kills the process.
pub(crate) struct Process {
    role: Role,
    child: Child,
}

impl Process {
    pub(crate) fn start(role: Role) -> Self {
        let modes: Vec<String> = role.modes.iter().map(Mode::to_string).collect();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "serve_if_started_as_process", "--nocapture"])
            .env("JEPSEN_PROCESS", role.number.to_string())
            .env("JEPSEN_PORT", role.port.to_string())
            .env("JEPSEN_STORE", &role.store)
            .env("JEPSEN_REPLICAS", role.replicas.to_string())
            .env("JEPSEN_BANK", role.bank.to_string())
            .env("JEPSEN_MODES", modes.join(","))
            // The process ends when this pipe is closed, even if the test was killed.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self {
            role,
            child: child.unwrap(),
        }
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    pub(crate) fn restart(&mut self) {
        self.kill();
        *self = Self::start(self.role.clone());
    }

    /// Sends SIGSTOP or SIGCONT.
    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status();
        assert!(sent.unwrap().success(), "a process of the application has ended");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Opens the store of a URL. Claims and outcomes wait for this number of replicas, if it is not
/// zero.
pub(crate) async fn open(url: &str, replicas: usize) -> Result<BoxStore, AnyError> {
    if url.starts_with("postgres") {
        return Ok(BoxStore::new(PostgresStore::connect(url).await?));
    }
    let mut builder = RedisStore::builder();
    if replicas > 0 {
        builder = builder.with_replication(replicas, Duration::from_millis(100));
    }
    if url.contains(',') {
        let client = redis::cluster::ClusterClient::new(url.split(',').collect::<Vec<_>>())?;
        let connection = client.get_async_connection().await?;
        return Ok(BoxStore::new(builder.use_cluster(connection).await?));
    }
    Ok(BoxStore::new(builder.connect(url).await?))
}

#[derive(Clone)]
struct App {
    bank: BankClient,
    mode: Mode,
    process: usize,
    database: Option<PgPool>,
    outbox: Option<Outbox>,
}

/// The body of a test that only a process of [`Process::start`] runs: it serves until it is killed.
pub(crate) fn serve_if_started_as_process() {
    let Ok(store) = std::env::var("JEPSEN_STORE") else {
        return;
    };
    std::thread::spawn(|| {
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        std::process::exit(0);
    });
    let number = |name: &str| std::env::var(name).unwrap().parse::<u16>().unwrap();
    let bank = BankClient {
        http: http_client(),
        address: std::env::var("JEPSEN_BANK").unwrap().parse().unwrap(),
    };
    let (process, port, replicas) = (
        number("JEPSEN_PROCESS"),
        number("JEPSEN_PORT"),
        number("JEPSEN_REPLICAS"),
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let opened = loop {
            // The store may be away when the process starts.
            match open(&store, replicas.into()).await {
                Ok(opened) => break opened,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        let is_postgres = store.starts_with("postgres");
        let database = is_postgres.then(|| PgPool::connect_lazy(&store).unwrap());
        let modes = std::env::var("JEPSEN_MODES").unwrap();
        let modes: Vec<Mode> = modes.split(',').map(|mode| mode.parse().unwrap()).collect();
        let outbox = match modes.contains(&Mode::Message) {
            true => Some(messages::start(&store, &bank).await),
            false => None,
        };
        let (mut router, mut drains) = (Router::new(), Vec::new());
        for mode in modes {
            let app = App {
                bank: bank.clone(),
                mode,
                process: process.into(),
                database: database.clone(),
                outbox: outbox.clone(),
            };
            let layer = layer(opened.clone(), mode, &bank);
            drains.push(layer.drain());
            router = router.route(&format!("/{mode}/{{key}}"), post(pay).layer(layer).with_state(app));
        }
        router = router.route("/drained", get(|| drained(drains)));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        axum::serve(listener, router).await.unwrap();
    });
}

/// Replies when no execution and no waiter is left.
async fn drained(drains: Vec<Drain>) {
    join_all(drains.iter().map(Drain::wait)).await;
}

fn layer(store: BoxStore, mode: Mode, bank: &BankClient) -> IdempotencyLayer<BoxStore> {
    let layer = IdempotencyLayer::new(store)
        .require_key()
        .with_lease(LEASE)
        .with_wait(Duration::from_secs(2))
        .with_completion_timeout(Duration::from_secs(3))
        .with_max_attempts(1_000);
    match mode {
        Mode::Refuse => layer.on_error(OnError::Unknown),
        Mode::Derived => layer.on_error(OnError::Unknown).at_least_once(),
        Mode::Recover => {
            let bank = bank.clone();
            let layer = layer.on_error(OnError::Unknown);
            layer.with_recovery(move |lost| recover(bank.clone(), lost))
        }
        // A handler that fails has rolled its transaction back.
        Mode::Transaction | Mode::Message => layer.at_least_once(),
    }
}

async fn recover(bank: BankClient, lost: LostAttempt) -> Recovered<http::Response<Bytes>> {
    let key = lost.head.uri.path().rsplit('/').next().unwrap().to_owned();
    let (id, fence) = (lost.derive_key("charge"), lost.fence.as_u64());
    let Some((_, receipt)) = bank.call(&format!("find/{key}/{id}/{fence}")).await else {
        return Recovered::Unknown;
    };
    if receipt.is_empty() {
        return Recovered::NotHappened;
    }
    let mut response = http::Response::new(Bytes::from(format!("receipt {receipt} was found")));
    *response.status_mut() = StatusCode::CREATED;
    Recovered::Happened(response)
}

/// Charges once, with pauses before and after it, and returns a response that no other run would
/// return.
async fn pay(State(app): State<App>, Path(key): Path<usize>, lease: Lease) -> Response {
    let (attempt, fence) = (lease.attempt().number(), lease.fence().as_u64());
    let began = format!("began/{key}/{}/{attempt}/{fence}", app.process);
    if app.bank.call(&began).await.is_none() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    pause().await;
    if rand::random_range(0..12) == 0 {
        drop(app.bank.call(&format!("failed/{key}/{fence}")).await);
        return (StatusCode::SERVICE_UNAVAILABLE, axum::Extension(DoNotStore)).into_response();
    }
    let run = format!("of attempt {attempt} with fence {fence} in process {}", app.process);
    if matches!(app.mode, Mode::Transaction | Mode::Message) {
        let paid = insert(&app, key, &lease, &run).await;
        return paid.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response());
    }
    let charge = format!("charge/{}/{key}/{}/{fence}", app.mode, lease.derive_key("charge"));
    let Some((StatusCode::OK, receipt)) = app.bank.call(&charge).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    pause().await;
    (StatusCode::CREATED, format!("receipt {receipt} {run}")).into_response()
}

/// Some executions take longer than a lease, so that the layer has to renew it.
pub(crate) async fn pause() {
    let millis = match rand::random_range(0..40) {
        0 => rand::random_range(1_200..2_200),
        _ => rand::random_range(0..30),
    };
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

/// Inserts a row, puts a message about it into the outbox if there is one, and completes the key, in
/// one transaction.
async fn insert(app: &App, key: usize, lease: &Lease, run: &str) -> Result<Response, AnyError> {
    let mut transaction = app.database.as_ref().unwrap().begin().await?;
    let message = OutboxMessage::new("payments", format!("{key} {run}"));
    let receipt: i64 = sqlx::query_scalar("INSERT INTO payments (key, message) VALUES ($1, $2) RETURNING receipt")
        .bind(i64::try_from(key)?)
        .bind(app.outbox.as_ref().map(|_| message.id()))
        .fetch_one(&mut *transaction)
        .await?;
    if let Some(outbox) = &app.outbox {
        outbox.put(&mut transaction, &message).await?;
    }
    let response = (StatusCode::CREATED, format!("receipt {receipt} {run}"));
    let response = lease.complete_in(&mut transaction, response).await?;
    transaction.commit().await?;
    Ok(response)
}

#[derive(Clone)]
pub(crate) struct BankClient {
    http: HttpClient,
    address: SocketAddr,
}

impl BankClient {
    async fn call(&self, path: &str) -> Option<(StatusCode, String)> {
        self.send(path, Bytes::new()).await
    }

    /// Returns the status and the text of the reply, or `None` if the bank does not reply.
    pub(crate) async fn send(&self, path: &str, body: Bytes) -> Option<(StatusCode, String)> {
        let request = Request::post(format!("http://{}/{path}", self.address));
        let response = self.http.request(request.body(body.into()).unwrap()).await.ok()?;
        let status = response.status();
        let body = response.into_body().collect().await.ok()?.to_bytes();
        Some((status, String::from_utf8_lossy(&body).into_owned()))
    }
}
