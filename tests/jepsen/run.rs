//! One run: clients, faults, the time after all faults, and the checks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::Request;
use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body_util::{BodyExt, Full};
use tower_idempotency::protocol::Status;
use tower_idempotency::{BoxStore, IdempotencyLayer, Store};

use crate::app::{HttpClient, Process, Role, http_client, open};
use crate::bank::{Bank, Event, Mode, history_of};
use crate::checks::{Evidence, Seen};
use crate::faults::{Servers, Targets};
use crate::random::Random;
use crate::support::port::free_port;
use crate::support::proxy::Proxy;
use crate::support::settings;
use crate::tables::{Rows, wait_for_messages};

pub(crate) const PROCESSES: usize = 3;
const CLIENTS: usize = 36;
/// A run tests too little if the clients have begun fewer keys.
pub(crate) const FEWEST_KEYS: usize = 20;
/// Faults can stop all clients from beginning new keys. A run with too few keys goes on for at most
/// this much longer.
const EXTRA_TIME: Duration = Duration::from_secs(60);
/// The number of clients that use one key at about the same time.
const SHARING: usize = 3;

/// A store to test.
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) servers: Box<dyn Servers>,
    pub(crate) proxies: Vec<Proxy>,
    /// The URL for each process.
    pub(crate) urls: Vec<String>,
    /// The number of replicas that claims and outcomes wait for.
    pub(crate) replicas: usize,
    pub(crate) modes: &'static [Mode],
}

/// The result of a run.
pub(crate) struct Report {
    pub(crate) keys: usize,
    figures: String,
    pub(crate) violations: Vec<(Mode, String)>,
    /// The number of keys with more effects than bodies, at the bank that deduplicates.
    pub(crate) not_deduplicated: usize,
    /// The history of the first key that violates a guarantee.
    example: String,
}

impl Report {
    /// Counts the keys of a mode with a violation of this invariant.
    pub(crate) fn count(&self, mode: Mode, invariant: &str) -> usize {
        let found = self.violations.iter();
        found
            .filter(|(of, what)| *of == mode && what.starts_with(invariant))
            .count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<(String, &str), usize> = BTreeMap::new();
        for (mode, what) in &self.violations {
            *kinds.entry((mode.to_string(), &what[..2])).or_default() += 1;
        }
        writeln!(f, "{}; violations: {kinds:?}\n{}", self.figures, self.example)
    }
}

/// Waits for a condition for at most 60 s.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1_200 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("this does not happen within a minute: {what}");
}

/// The duration of the faults: `JEPSEN_SECONDS`, or 2 s, or 10 s if the tests are thorough.
fn seconds() -> Duration {
    let unset = if settings::is_thorough() { 10 } else { 2 };
    Duration::from_secs(settings::number("JEPSEN_SECONDS", 1).unwrap_or(unset))
}

fn seed() -> u64 {
    settings::number("JEPSEN_SEED", 0).unwrap_or_else(|| rand::random_range(0..1_000_000))
}

pub(crate) async fn run(subject: Subject) -> Report {
    let seed = seed();
    println!("{}: JEPSEN_SEED={seed}", subject.name);
    let (bank, address) = Bank::open().await;
    let ports: Vec<u16> = (0..PROCESSES).map(|_| free_port()).collect();
    let processes = (0..PROCESSES).map(|number| {
        Process::start(Role {
            number,
            port: ports[number],
            store: subject.urls[number].clone(),
            replicas: subject.replicas,
            bank: address,
            modes: subject.modes,
        })
    });
    let targets = Targets {
        bank: bank.clone(),
        servers: Arc::new(Mutex::new(subject.servers)),
        proxies: subject.proxies,
        processes: Arc::new(Mutex::new(processes.collect())),
    };
    let clients = Clients {
        bank: bank.clone(),
        http: http_client(),
        ports,
        modes: subject.modes,
    };
    clients.wait_for_processes().await;
    let until = bank.elapsed() + seconds();
    let keys = clients.work_under_faults(&targets, until, seed).await;
    let until = bank.elapsed() + Duration::from_secs(60);
    stream::iter(0..keys)
        .for_each_concurrent(CLIENTS, |key| clients.ask_for_the_outcome(key, until))
        .await;
    let drained = clients.wait_for_drains().await;
    let url = targets.servers.lock().unwrap().url();
    if subject.modes.contains(&Mode::Message) {
        wait_for_messages(&url, &bank).await;
    }
    let mut report = judge(subject.name, subject.modes, &bank, &url, keys).await;
    report.violations.extend(drained);
    println!("{report}");
    report
}

#[derive(Clone)]
struct Clients {
    bank: Bank,
    http: HttpClient,
    ports: Vec<u16>,
    modes: &'static [Mode],
}

impl Clients {
    async fn wait_for_processes(&self) {
        for port in &self.ports {
            let address = ("127.0.0.1", *port);
            for _ in 0..600 {
                if tokio::net::TcpStream::connect(address).await.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// Sends requests while faults happen, until the clock of the bank reaches that time and the
    /// clients have begun enough keys. Returns the number of keys.
    async fn work_under_faults(&self, targets: &Targets, until: Duration, seed: u64) -> usize {
        let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let clients = (0..CLIENTS).map(|_| {
            let (clients, next, done) = (self.clone(), Arc::clone(&next), Arc::clone(&done));
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    clients.settle(number / SHARING).await;
                }
            })
        });
        let clients: Vec<_> = clients.collect();
        let disturbing = [0, 1].map(|purpose| {
            let (targets, random) = (targets.clone(), Random::new(seed, purpose));
            let (bank, next) = (self.bank.clone(), Arc::clone(&next));
            let goes_on = move || {
                let has_few_keys = next.load(Ordering::Relaxed) < FEWEST_KEYS * SHARING;
                bank.elapsed() < until + if has_few_keys { EXTRA_TIME } else { Duration::ZERO }
            };
            tokio::task::spawn_blocking(move || match purpose {
                0 => targets.disturb_servers(goes_on, random),
                _ => targets.disturb_processes(goes_on, random),
            })
        });
        for disturbing in disturbing {
            disturbing.await.unwrap();
        }
        done.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.unwrap();
        }
        next.load(Ordering::Relaxed).div_ceil(SHARING)
    }

    /// Repeats a request until the response is final, and sometimes once more. A client gives up
    /// after 200 tries.
    async fn settle(&self, key: usize) {
        let is_other_body = rand::random_range(0..25) == 0;
        for _ in 0..200 {
            let patience = match rand::random_range(0..4) {
                0 => Duration::from_millis(rand::random_range(2..200)),
                1 => Duration::from_secs(10),
                _ => Duration::from_millis(1_500),
            };
            let seen = self.ask(key, is_other_body, patience).await;
            if seen.is_some_and(|seen| seen.is_final()) && rand::random_range(0..3) > 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(rand::random_range(5..80))).await;
        }
    }

    /// Asks for a key when no more faults happen, until the clock of the bank reaches that time.
    async fn ask_for_the_outcome(&self, key: usize, until: Duration) {
        while self.bank.elapsed() < until {
            let seen = self.ask(key, false, Duration::from_secs(30)).await;
            if seen.is_some_and(|seen| seen.is_final()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    /// Sends one request to one of the processes. Returns `None` if the connection broke or the
    /// client left.
    async fn ask(&self, key: usize, is_other_body: bool, patience: Duration) -> Option<Seen> {
        let process = rand::random_range(0..self.ports.len());
        let mode = self.modes[key % self.modes.len()];
        let request = Request::post(format!("http://127.0.0.1:{}/{mode}/{key}", self.ports[process]))
            .header("idempotency-key", name_of(key))
            .body(Full::from(if is_other_body { "other" } else { "pay" }))
            .unwrap();
        self.bank.note(Some(key), Event::Sent { process, is_other_body });
        let exchange = async {
            let (head, body) = self.http.request(request).await.ok()?.into_parts();
            let body: Bytes = body.collect().await.ok()?.to_bytes();
            let is_problem = head
                .headers
                .get("content-type")
                .is_some_and(|kind| kind == "application/problem+json");
            let problem = is_problem.then(|| serde_json::from_slice::<serde_json::Value>(&body).unwrap());
            Some(Seen {
                status: head.status.as_u16(),
                code: problem.map_or(String::new(), |problem| problem["code"].as_str().unwrap().to_owned()),
                body: String::from_utf8_lossy(&body).into_owned(),
                is_other_body,
            })
        };
        let seen = tokio::time::timeout(patience, exchange).await.ok().flatten();
        self.bank
            .note(Some(key), seen.clone().map_or(Event::Left, Event::Responded));
        seen
    }

    /// Checks that nothing is left of any request in the processes (I11).
    async fn wait_for_drains(&self) -> Vec<(Mode, String)> {
        let mut left = Vec::new();
        for port in &self.ports {
            let request = Request::get(format!("http://127.0.0.1:{port}/drained"));
            let reply = self.http.request(request.body(Full::default()).unwrap());
            let reply = tokio::time::timeout(Duration::from_secs(60), reply).await;
            if !reply.is_ok_and(|reply| reply.is_ok()) {
                left.push((self.modes[0], "I11: a process does not drain".to_owned()));
            }
        }
        left
    }
}

fn name_of(key: usize) -> String {
    format!("key-{key}")
}

/// Reads the records and the rows, and checks the history of each key.
async fn judge(name: &str, modes: &[Mode], bank: &Bank, url: &str, keys: usize) -> Report {
    let store = open(url, 0).await.unwrap();
    let rows = Rows::read(url, modes, keys).await;
    let layer = IdempotencyLayer::new(store.clone());
    let (mut violations, mut example) = (Vec::new(), String::new());
    let (mut effects, mut not_deduplicated) = (0, 0);
    for (key, (events, rows)) in bank.by_key(keys).iter().zip(rows).enumerate() {
        let evidence = evidence(&store, &layer, key).await;
        let mode = modes[key % modes.len()];
        let history = history_of(mode, events, &rows.receipts, evidence);
        effects += history.effects.len();
        let is_repeated = history.effects.len() > if history.has_one_body() { 1 } else { 2 };
        not_deduplicated += usize::from(mode == Mode::Derived && is_repeated);
        let mut found = history.violations();
        found.extend(rows.messages(events).violations());
        if example.is_empty() && !found.is_empty() {
            example = format!("key {key} ({mode}):\n{}{}", bank.text(key), found.join("\n"));
        }
        violations.extend(found.into_iter().map(|what| (mode, what)));
    }
    Report {
        keys,
        figures: figures(name, bank, keys, effects),
        violations,
        not_deduplicated,
        example,
    }
}

async fn evidence(store: &BoxStore, layer: &IdempotencyLayer<BoxStore>, key: usize) -> Evidence {
    let key = layer.storage_key(None, &name_of(key)).unwrap();
    match store.peek(&key).await.unwrap().map(|seen| seen.status) {
        None => Evidence::Absent,
        Some(Status::Completed(_)) => Evidence::Completed,
        Some(_) => Evidence::Open,
    }
}

fn figures(name: &str, bank: &Bank, keys: usize, effects: usize) -> String {
    let made = bank.count(|event| matches!(event, Event::Responded(seen) if seen.status == 201));
    let unknown = bank.count(|event| matches!(event, Event::Responded(seen) if seen.code == "outcome-unknown"));
    format!(
        "{name}: {:.0} s, {} faults, {keys} keys, {} requests, {} runs ({} took over), {effects} effects, {made} responses, \
         {unknown} unknown, {} other refusals, {} broken or left, {} publications, {} deliveries",
        bank.elapsed().as_secs_f64(),
        bank.count(|event| matches!(event, Event::Fault(what) if what.ends_with("begins"))),
        bank.count(|event| matches!(event, Event::Sent { .. })),
        bank.count(|event| matches!(event, Event::Began { .. })),
        bank.count(|event| matches!(event, Event::Began { attempt: 2.., .. })),
        bank.count(|event| matches!(event, Event::Responded(_))) - made - unknown,
        bank.count(|event| matches!(event, Event::Left)),
        bank.count(|event| matches!(event, Event::Published { .. })),
        bank.count(|event| matches!(event, Event::Delivered { .. })),
    )
}
