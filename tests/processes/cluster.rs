//! Several processes that serve the layer over one store, clients that retry, and the ledger that
//! counts effects.
//!
//! Each process is this test binary, started again with its role in the environment: see
//! [`serve_if_started_as_server`].
#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(unreachable_pub, reason = "every test binary includes this module as its own")]

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tower_idempotency::{BoxStore, IdempotencyLayer, Lease, OnLost};

/// The work of the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `OnLost::Execute`, effects in the ledger.
    Execute,
    /// Like `Execute`, in processes whose pool for blocking work is full. Some executions take
    /// longer than a lease.
    FullPool,
    /// `OnLost::Refuse`, effects in the ledger.
    Refuse,
    /// `OnLost::Execute`, effects in the same transaction as their response.
    Transaction,
}

/// A process that serves `POST /`.
pub struct Process {
    child: Child,
    pub address: SocketAddr,
}

impl Process {
    pub fn start(store: &str, mode: Mode, ledger: &Path) -> Self {
        Self::with_lease(LEASE, store, mode, ledger)
    }

    pub fn with_lease(lease: Duration, store: &str, mode: Mode, ledger: &Path) -> Self {
        let program = Command::new(std::env::current_exe().unwrap());
        Self::run(program, lease, store, mode, ledger)
    }

    /// Starts a process that may have this many files and connections open.
    pub fn with_descriptors(descriptors: usize, lease: Duration, store: &str, ledger: &Path) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -n {descriptors}; exec \"$0\" \"$@\"")]);
        shell.arg(std::env::current_exe().unwrap());
        Self::run(shell, lease, store, Mode::Refuse, ledger)
    }

    fn run(mut program: Command, lease: Duration, store: &str, mode: Mode, ledger: &Path) -> Self {
        let mut child = program
            .args([
                "--exact",
                "serve_if_started_as_server",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("SERVE_STORE", store)
            .env("SERVE_MODE", format!("{mode:?}"))
            .env("SERVE_LEDGER", ledger)
            .env("SERVE_LEASE", lease.as_secs().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines.find_map(|line| line.ok()?.split_once("listening on ")?.1.parse().ok());
        let address = address.expect("the process exited before it listened");
        // No test reads the later output, but the process must not find its output closed.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// Returns the number of files and connections that the process has open.
    pub fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(folder).unwrap().count()
    }

    /// Waits until the process has ended by itself, and returns its status.
    pub fn ended(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Sends SIGKILL. The process has no chance to clean up.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGSTOP or SIGCONT.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[derive(Clone)]
struct App {
    ledger: Arc<Mutex<File>>,
    mode: Mode,
    #[cfg(feature = "postgres")]
    pool: Option<sqlx::PgPool>,
}

/// The body of a test that only a process of [`Process::start`] runs: it serves until it is killed.
pub fn serve_if_started_as_server() {
    let Ok(url) = std::env::var("SERVE_STORE") else { return };
    let mode = match std::env::var("SERVE_MODE").unwrap().as_str() {
        "Execute" => Mode::Execute,
        "FullPool" => Mode::FullPool,
        "Refuse" => Mode::Refuse,
        _ => Mode::Transaction,
    };
    let ledger = PathBuf::from(std::env::var_os("SERVE_LEDGER").unwrap());
    let lease = std::env::var("SERVE_LEASE").unwrap().parse().unwrap();
    let ledger = OpenOptions::new().append(true).create(true).open(ledger).unwrap();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all();
    if mode == Mode::FullPool {
        runtime.max_blocking_threads(1);
    }
    runtime.build().unwrap().block_on(async {
        if mode == Mode::FullPool {
            tokio::task::spawn_blocking(|| {
                loop {
                    std::thread::park();
                }
            });
        }
        let (url, store) = open(&url).await;
        let app = App {
            ledger: Arc::new(Mutex::new(ledger)),
            mode,
            #[cfg(feature = "postgres")]
            pool: match mode {
                Mode::Transaction => Some(sqlx::PgPool::connect(&url).await.unwrap()),
                _ => None,
            },
        };
        let on_lost = match mode {
            Mode::Refuse => OnLost::Refuse,
            Mode::Execute | Mode::FullPool | Mode::Transaction => OnLost::Execute,
        };
        let layer = IdempotencyLayer::new(store)
            .on_lost(on_lost)
            .with_lease(Duration::from_secs(lease))
            .with_max_attempts(1_000);
        let router = Router::new().route("/", post(effect)).layer(layer).with_state(app);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("listening on {}", listener.local_addr().unwrap());
        axum::serve(listener, router).await.unwrap();
    });
}

/// Opens the store of a URL, and returns the URL without its fragment. The fragment `one` asks for
/// a pool of one connection.
async fn open(url: &str) -> (String, BoxStore) {
    #[cfg(feature = "postgres")]
    if let Some((url, "one")) = url.split_once('#') {
        let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1);
        let builder = tower_idempotency::PostgresStore::builder();
        let store = builder.with_pool(pool.connect(url).await.unwrap()).unwrap();
        store.migrate().await.unwrap();
        return (url.to_owned(), BoxStore::new(store));
    }
    (url.to_owned(), BoxStore::from_url(url).await.unwrap())
}

/// Short, so that the key of a killed or stopped process soon counts as lost.
pub const LEASE: Duration = Duration::from_secs(1);

/// Causes an effect, with a pause before and after it, and returns a response that no other run
/// would return.
async fn effect(State(app): State<App>, lease: Lease, headers: HeaderMap) -> Response {
    let pause = |name: &str| {
        let millis = headers.get(name).and_then(|value| value.to_str().ok()?.parse().ok());
        tokio::time::sleep(Duration::from_millis(
            millis.unwrap_or_else(|| rand::random_range(0..10)),
        ))
    };
    pause("x-before").await;
    let key = lease.key().as_str().to_owned();
    let line = format!("{key} {} {}", lease.attempt().number(), lease.fence().as_u64());
    let response = (
        StatusCode::CREATED,
        [("x-attempt", lease.attempt().number().to_string())],
        format!("{line} {:x}", rand::random::<u64>()),
    );
    #[cfg(feature = "postgres")]
    if let Some(pool) = &app.pool {
        return match pay(pool, &key, &lease, response).await {
            Ok(response) => response,
            Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        };
    }
    let write = move || {
        let mut ledger = app.ledger.lock().unwrap();
        ledger.write_all(format!("{line}\n").as_bytes()).unwrap();
        ledger.sync_data().unwrap();
    };
    if headers.contains_key("x-panic") {
        write();
        panic_and_abort();
    }
    if app.mode == Mode::FullPool {
        write();
        let is_slow = rand::random_range(0..3) == 0;
        tokio::time::sleep(LEASE.mul_f32(if is_slow { rand::random_range(1.5..2.5) } else { 0.0 })).await;
    } else {
        tokio::task::spawn_blocking(write).await.unwrap();
    }
    pause("x-after").await;
    response.into_response()
}

/// Panics as a program with `panic = "abort"` does: after the panic hook, the process ends without
/// any destructor or `catch_unwind`.
fn panic_and_abort() {
    std::panic::set_hook(Box::new(|_| std::process::abort()));
    panic!("the test wants this handler to panic");
}

#[cfg(feature = "postgres")]
async fn pay(
    pool: &sqlx::PgPool,
    key: &str,
    lease: &Lease,
    response: impl IntoResponse,
) -> Result<Response, Box<dyn std::error::Error>> {
    let mut transaction = pool.begin().await?;
    let insert = sqlx::query("INSERT INTO payments (note) VALUES ($1)").bind(key);
    insert.execute(&mut *transaction).await?;
    let response = lease.complete_in(&mut transaction, response).await?;
    transaction.commit().await?;
    Ok(response)
}

/// Counts the effects of each key in the ledger. A line that a kill cut short counts too.
pub fn effects(ledger: &Path) -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(ledger).unwrap_or_default();
    let mut effects = BTreeMap::new();
    for line in text.lines() {
        let key = line.split(' ').next().unwrap_or_default();
        *effects.entry(key.to_owned()).or_default() += 1;
    }
    effects
}

pub type HttpClient = Client<HttpConnector, Full<Bytes>>;

pub fn http_client() -> HttpClient {
    Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(64)
        .build_http()
}

/// A response.
#[derive(Clone, Debug)]
pub struct Got {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Got {
    /// The `code` of a problem response.
    pub fn code(&self) -> Option<String> {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        Some(problem["code"].as_str()?.to_owned())
    }

    pub fn is_replay(&self) -> bool {
        self.headers.contains_key("idempotent-replayed")
    }

    pub fn attempt(&self) -> usize {
        self.headers["x-attempt"].to_str().unwrap().parse().unwrap()
    }
}

/// Sends one request. Returns `None` if the connection broke, or if no response came within 40 s.
pub async fn send(
    client: &HttpClient,
    address: SocketAddr,
    key: &str,
    headers: &[(&'static str, String)],
) -> Option<Got> {
    let mut request = Request::post(format!("http://{address}/")).header("idempotency-key", key);
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let request = request.body(Full::from("pay 100")).unwrap();
    let exchange = async {
        let (head, body) = client.request(request).await.ok()?.into_parts();
        let body = body.collect().await.ok()?.to_bytes();
        Some(Got {
            status: head.status,
            headers: head.headers,
            body,
        })
    };
    tokio::time::timeout(Duration::from_secs(40), exchange).await.ok()?
}

/// The end of a key for a client that retries.
#[derive(Clone, Debug)]
pub enum End {
    Responded(Got),
    Unknown,
}

/// The observations of the clients.
#[derive(Debug, Default)]
pub struct Seen {
    pub ends: Mutex<HashMap<String, Vec<End>>>,
    /// Keys of requests whose connection broke.
    pub broken: Mutex<HashMap<String, usize>>,
    pub refused: Mutex<BTreeMap<String, usize>>,
    pub failed: AtomicUsize,
}

impl Seen {
    /// Sends to a random process until the response is a success or the outcome is unknown.
    pub async fn settle(&self, client: &HttpClient, addresses: impl Fn() -> Vec<SocketAddr>, key: &str) {
        for _ in 0..400 {
            let addresses = addresses();
            let address = addresses[rand::random_range(0..addresses.len())];
            match send(client, address, key, &[]).await {
                None => *self.broken.lock().unwrap().entry(key.to_owned()).or_default() += 1,
                Some(got) if got.status == StatusCode::CREATED => return self.end(key, End::Responded(got)),
                Some(got) if got.code().as_deref() == Some("outcome-unknown") => return self.end(key, End::Unknown),
                Some(got) if got.status == StatusCode::INTERNAL_SERVER_ERROR => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                }
                Some(got) => {
                    let code = got.code().unwrap_or_else(|| got.status.to_string());
                    *self.refused.lock().unwrap().entry(code).or_default() += 1;
                }
            }
            tokio::time::sleep(Duration::from_millis(rand::random_range(10..50))).await;
        }
        panic!("{key} is stuck: {:?}", self.refused.lock().unwrap());
    }

    fn end(&self, key: &str, end: End) {
        self.ends.lock().unwrap().entry(key.to_owned()).or_default().push(end);
    }
}
