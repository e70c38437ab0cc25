//! The throughput of the layer over Redis and PostgreSQL, compared with the store alone and with
//! the bare server.
//!
//! `cargo bench --features axum,redis,postgres --bench stores` prints the table of
//! `benches/README.md` in about 5 minutes. With `-- --quick` it prints a rough table in one minute.
//! Words such as `-- redis replay 64` choose lines. `-- --shared-pool` measures the PostgreSQL
//! store on a pool of the application instead of its own pool. The benchmark starts a Redis
//! (`appendfsync everysec`) and a PostgreSQL (with its defaults), which share the machine with the
//! callers.
//!
//! Three sides do the same round trips. They take turns in short rounds, so that a slow moment of
//! the machine slows all of them. The figures are medians over the rounds:
//!
//! * *server*: one minimal script or statement for each claim and each completion. PostgreSQL runs
//!   them on a pool of the application. They check neither time nor owner, fingerprint or damage.
//! * *store*: the store itself, without request, HTTP and layer. The claims and responses are built
//!   before the clock starts.
//! * *layer*: an HTTP request with a body through the layer over that store. The caller reads the
//!   response.
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the machine's clock")]

#[path = "stores/counting.rs"]
mod counting;
#[path = "../tests/support/port.rs"]
mod port;
#[path = "../tests/support/postgres.rs"]
mod postgres;
#[path = "../tests/support/redis.rs"]
mod redis_server;
#[path = "stores/subjects.rs"]
mod subjects;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use counting::counting;
use futures::future::join_all;
use postgres::PostgresServer;
use redis_server::RedisServer;
use subjects::{EXECUTED, Kind, Layered, RawPostgres, RawRedis, Stored, Subject, pool, postgres_store, redis_store};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Barrier;

const CALLERS: [usize; 4] = [1, 16, 64, 256];

/// The number of stored keys of each caller. Every caller has its own keys, because simultaneous
/// replays of one key share one query to the store.
const KEYS_PER_CALLER: usize = 8;

/// The size of a record without a response, in bytes.
const CLAIMED: usize = 96;

/// The longest turn of one side.
const TURN: Duration = Duration::from_millis(100);

/// The largest number of requests in a turn. The requests are built before the turn, and each has
/// one and a half kilobytes. Ten thousand of them would have left the caches of the processor
/// before the layer handles them, but a real server has just read its request.
const REQUESTS_PER_TURN: usize = 1_500;

/// One line of the table.
struct Line {
    store: &'static str,
    kind: Kind,
    callers: usize,
}

/// One side's turn.
#[derive(Clone, Copy, Default)]
struct Turn {
    requests: f64,
    seconds: f64,
    cpu_seconds: f64,
}

/// A turn of each side.
type Round = [Turn; 3];

const SERVER: usize = 0;
const STORE: usize = 1;
const LAYER: usize = 2;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo test --benches` starts this program, too.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let effort = Duration::from_millis(if arguments.iter().any(|argument| argument == "--quick") {
        1_800
    } else {
        15_000
    });
    println!(
        "| store | request | callers | server, 1/s | store, 1/s | layer, 1/s | layer : store | target | layer : server | CPU of \
         each, µs | round trips |"
    );
    println!("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let (one, many) = CALLERS.split_at(1);
    // A single caller has a current-thread runtime. A runtime of several threads would move it
    // between threads at random.
    over_redis(&runtime(Builder::new_current_thread()), effort, one);
    over_redis(&runtime(Builder::new_multi_thread()), effort, many);
    over_postgres(&runtime(Builder::new_current_thread()), effort, one);
    over_postgres(&runtime(Builder::new_multi_thread()), effort, many);
    println!(
        "\nCPU: processor time of the client's process per request. Round trips: of the store and of the layer, per \
         request, counted at the server."
    );
}

fn runtime(mut builder: Builder) -> Runtime {
    builder.enable_all().build().expect("a runtime starts")
}

fn over_redis(runtime: &Runtime, effort: Duration, callers: &[usize]) {
    let server = RedisServer::with(&["--appendfsync", "everysec"]);
    let store = runtime.block_on(redis_store(&server.url()));
    let layered = Layered::over(store.clone());
    runtime.block_on(layered.run(Kind::First, layered.job(0)));
    let record = server.command::<String>("RANDOMKEY");
    let completed = server.command::<usize>(&format!("STRLEN {record}"));
    let raw = runtime.block_on(RawRedis::connect(&server.url(), CLAIMED, completed));
    let raw = raw.expect("the new server accepts connections");
    // Four bytes before the head have its length.
    let stored = Stored::over(store, completed - CLAIMED - 4);
    for kind in [Kind::Replay, Kind::First] {
        let calls = || server.calls("evalsha") + server.calls("eval");
        let trips = [
            per_request(runtime, &stored, kind, calls),
            per_request(runtime, &layered, kind, calls),
        ];
        for &callers in callers {
            server.command::<()>("FLUSHALL");
            let line = Line {
                store: "Redis",
                kind,
                callers,
            };
            line.measure(runtime, effort, (&raw, &stored, &layered), trips);
        }
    }
}

fn over_postgres(runtime: &Runtime, effort: Duration, callers: &[usize]) {
    let server = PostgresServer::start();
    let url = server.url();
    let (store, admin) = runtime.block_on(async {
        let admin = pool(&url).await.expect("the new server accepts connections");
        (postgres_store(&url).await, admin)
    });
    let layered = Layered::over(store.clone());
    runtime.block_on(layered.run(Kind::First, layered.job(0)));
    let size = "SELECT octet_length(head) + octet_length(body) FROM idempotency_records";
    let size = runtime.block_on(sqlx::query_scalar::<_, i32>(size).fetch_one(&admin));
    let size = size.ok().and_then(|bytes| usize::try_from(bytes).ok());
    let size = size.expect("the layer stored a response");
    let raw = runtime.block_on(RawPostgres::connect(&url, CLAIMED, CLAIMED + size));
    let raw = raw.expect("the new server accepts connections");
    let stored = Stored::over(store, size);
    let address = ([127, 0, 0, 1], server.port()).into();
    let (proxy, counts) = runtime.block_on(counting(address)).expect("a port is free");
    let store = runtime.block_on(postgres_store(&server.url_by(proxy.port())));
    let (counted_store, counted_layer) = (Stored::over(store.clone(), size), Layered::over(store));
    for kind in [Kind::Replay, Kind::First] {
        let calls = || counts.executions.load(Ordering::SeqCst);
        let trips = [
            per_request(runtime, &counted_store, kind, calls),
            per_request(runtime, &counted_layer, kind, calls),
        ];
        let exchanges = per_request(runtime, &counted_layer, kind, || {
            counts.exchanges.load(Ordering::SeqCst)
        });
        eprintln!("    {exchanges:.2} round trips per request, including the pool's tests of returned connections");
        for &callers in callers {
            let truncate = format!("TRUNCATE idempotency_records, {}", RawPostgres::TABLE);
            let emptied = sqlx::raw_sql(sqlx::AssertSqlSafe(truncate));
            runtime.block_on(emptied.execute(&admin)).expect("both tables exist");
            let line = Line {
                store: "PostgreSQL",
                kind,
                callers,
            };
            line.measure(runtime, effort, (&raw, &stored, &layered), trips);
        }
    }
}

/// Returns how much a counter grows for each request of a single caller.
fn per_request<S: Subject>(runtime: &Runtime, subject: &S, kind: Kind, count: impl Fn() -> u64) -> f64 {
    const REQUESTS: usize = 200;
    let send = |kind, keys: &[u64]| {
        let jobs: Vec<S::Job> = keys.iter().map(|key| subject.job(*key)).collect();
        runtime.block_on(async {
            for job in jobs {
                subject.run(kind, job).await;
            }
        });
    };
    let stored = new_keys(REQUESTS);
    // These requests also load the scripts into the server and prepare the statements.
    send(Kind::First, &stored);
    let before = count();
    match kind {
        Kind::First => send(kind, &new_keys(REQUESTS)),
        Kind::Replay => send(kind, &stored),
    }
    (count() - before) as f64 / REQUESTS as f64
}

/// Returns the numbers of new keys.
fn new_keys(count: usize) -> Vec<u64> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let count = count as u64;
    let first = NEXT.fetch_add(count, Ordering::Relaxed);
    (first..first + count).collect()
}

impl Line {
    /// Whether the command line chooses this line: the line has every word of the command line.
    fn is_wanted(&self) -> bool {
        let own = format!("{} {:?} {}", self.store, self.kind, self.callers).to_lowercase();
        let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
        words.all(|word| own.split(' ').any(|own| own == word))
    }

    fn measure<R: Subject, S: Subject, L: Subject>(
        &self,
        runtime: &Runtime,
        effort: Duration,
        (raw, store, layer): (&R, &S, &L),
        trips: [f64; 2],
    ) {
        if !self.is_wanted() {
            return;
        }
        let mut raw = Side::new(runtime, raw, self);
        let mut store = Side::new(runtime, store, self);
        let mut layer = Side::new(runtime, layer, self);
        // Warm up all sides, and find the number of requests for a turn.
        for _ in 0..2 {
            raw.warm_up(TURN);
            store.warm_up(TURN);
            layer.warm_up(TURN);
        }
        let started = Instant::now();
        let mut rounds = Vec::new();
        while started.elapsed() < effort {
            let mut round = [Turn::default(); 3];
            // Each side is equally often the first and the last.
            for place in 0..round.len() {
                let side = (place + rounds.len()) % round.len();
                round[side] = match side {
                    SERVER => raw.turn(),
                    STORE => store.turn(),
                    _ => layer.turn(),
                };
            }
            rounds.push(round);
        }
        self.print(&rounds, trips);
    }

    fn print(&self, rounds: &[Round], [store_trips, layer_trips]: [f64; 2]) {
        let speed = |side: usize| median(rounds, |round| round[side].speed());
        let to_store = |round: &Round| round[LAYER].speed() / round[STORE].speed();
        let to_server = |round: &Round| round[LAYER].speed() / round[SERVER].speed();
        // The system counts in steps of 10 ms, so only the sum over all turns is meaningful.
        let cpu = |side: usize| {
            let turns = rounds.iter().map(|round| round[side]);
            let (seconds, requests) = turns.fold((0.0, 0.0), |(seconds, requests), turn| {
                (seconds + turn.cpu_seconds, requests + turn.requests)
            });
            seconds / requests * 1e6
        };
        let kind = match self.kind {
            Kind::First => "first run",
            Kind::Replay => "replay",
        };
        println!(
            "| {} | {kind} | {} | {:.0} | {:.0} | {:.0} | {:.2} | ≥ 0.85 | {:.2} | {:.1}, {:.1}, {:.1} | {store_trips:.2}, \
             {layer_trips:.2} |",
            self.store,
            self.callers,
            speed(SERVER),
            speed(STORE),
            speed(LAYER),
            median(rounds, to_store),
            median(rounds, to_server),
            cpu(SERVER),
            cpu(STORE),
            cpu(LAYER),
        );
        let (low, high) = quartiles(rounds, to_store);
        let to_server = quartiles(rounds, to_server);
        eprintln!(
            "    {} rounds, quartiles of the ratio to the store {low:.2} and {high:.2}, to the server {:.2} and {:.2}",
            rounds.len(),
            to_server.0,
            to_server.1
        );
    }
}

/// One side of a line, with its stored keys.
struct Side<'a, S> {
    runtime: &'a Runtime,
    subject: &'a S,
    kind: Kind,
    /// The stored keys of each caller, see [`KEYS_PER_CALLER`].
    stored: Vec<Vec<u64>>,
    requests_per_caller: usize,
}

impl<'a, S: Subject> Side<'a, S> {
    fn new(runtime: &'a Runtime, subject: &'a S, line: &Line) -> Self {
        let mut side = Self {
            runtime,
            subject,
            kind: Kind::First,
            stored: vec![Vec::new(); line.callers],
            requests_per_caller: KEYS_PER_CALLER,
        };
        if line.kind == Kind::Replay {
            let stored: Vec<Vec<u64>> = (0..line.callers).map(|_| new_keys(KEYS_PER_CALLER)).collect();
            side.send(&stored);
            side.stored = stored;
            side.kind = line.kind;
        }
        side
    }

    fn warm_up(&mut self, turn: Duration) {
        let nanos = Duration::from_secs_f64(self.turn().seconds).as_nanos().max(1);
        let requests = self.requests_per_caller as u128 * turn.as_nanos() / nanos;
        let requests = usize::try_from(requests).unwrap_or(usize::MAX);
        // With fewer requests, the last request of the slowest caller would dominate the time.
        self.requests_per_caller = requests.min(REQUESTS_PER_TURN / self.stored.len()).max(4);
    }

    fn turn(&mut self) -> Turn {
        let wanted = self.requests_per_caller;
        let keys = self.stored.iter().map(|stored| match self.kind {
            Kind::First => new_keys(wanted),
            Kind::Replay => stored.iter().copied().cycle().take(wanted).collect(),
        });
        self.send(&keys.collect::<Vec<_>>())
    }

    /// Starts all callers. Each caller sends its requests one after the other.
    fn send(&self, keys: &[Vec<u64>]) -> Turn {
        let requests = keys.iter().map(Vec::len).sum::<usize>() as f64;
        let executed = EXECUTED.load(Ordering::Relaxed);
        let (seconds, cpu_seconds) = self.runtime.block_on(async {
            let ready = Arc::new(Barrier::new(keys.len() + 1));
            let callers = keys.iter().map(|keys| {
                let (subject, kind, ready, keys) = (self.subject.clone(), self.kind, Arc::clone(&ready), keys.clone());
                tokio::spawn(async move {
                    // Build the requests in the task that sends them. Otherwise one thread would
                    // free memory that another thread allocated.
                    let jobs: Vec<S::Job> = keys.into_iter().map(|key| subject.job(key)).collect();
                    ready.wait().await;
                    for job in jobs {
                        subject.run(kind, job).await;
                    }
                })
            });
            let callers: Vec<_> = callers.collect();
            ready.wait().await;
            let (started, cpu) = (Instant::now(), cpu_seconds());
            for caller in join_all(callers).await {
                caller.expect("every request gets the right response");
            }
            (started.elapsed().as_secs_f64(), cpu_seconds() - cpu)
        });
        let turn = Turn {
            requests,
            seconds,
            cpu_seconds,
        };
        let executed = EXECUTED.load(Ordering::Relaxed) - executed;
        assert!(self.kind == Kind::First || executed == 0, "a replay ran the handler");
        turn
    }
}

impl Turn {
    fn speed(self) -> f64 {
        self.requests / self.seconds
    }
}

/// Returns the processor time of this process: fields 14 and 15 of `/proc/self/stat`, see proc(5).
/// The name in field 2 is in parentheses and may contain spaces.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat
        .rsplit_once(')')
        .map_or("", |(_, fields)| fields)
        .split_whitespace();
    let ticks = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    ticks.sum::<f64>() / TICKS_PER_SECOND
}

fn sorted(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> Vec<f64> {
    let mut figures: Vec<f64> = rounds.iter().map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures
}

fn median(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> f64 {
    sorted(rounds, figure)[rounds.len() / 2]
}

fn quartiles(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> (f64, f64) {
    let sorted = sorted(rounds, figure);
    (sorted[sorted.len() / 4], sorted[sorted.len() * 3 / 4])
}
