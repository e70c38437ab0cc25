//! Random handlers over PostgreSQL, from a seed. Each run of a handler makes several transactions,
//! which complete the key or not, and commit or not. A model decides from the rows and the record
//! which responses the callers may get.
//!
//! `HISTORIES=1000` sets the number of seeds, and `HISTORIES=17..18` their range.

mod model;
mod plan;

use std::collections::HashSet;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, Postgres, Transaction};
use tokio::task::JoinHandle;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{Claim, Decision, Outcome, Renewal, Status, StorageKey};
use tower_idempotency::{DoNotStore, ErrorKind, IdempotencyLayer, Lease, MemoryStore};
use tower_idempotency::{PostgresStore, Store, StoreOutcomeOnly};

use super::{HOUR, claim};
use crate::random::Random;
use crate::support::drop_after;
use crate::support::postgres::PostgresServer;
use crate::support::settings::{is_thorough, seeds};
use plan::{End, Ending, Form, Plan, Shape, Takeover};

/// A response, without the headers that the layer adds.
#[derive(Clone, PartialEq, Eq)]
struct Reply {
    status: u16,
    /// The part of the program that made the response; empty for the layer.
    author: String,
    body: Bytes,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, author, body } = self;
        if author.is_empty() {
            return write!(f, "{status} of the layer: {}", String::from_utf8_lossy(body));
        }
        write!(f, "{status} of {author}, {} bytes", body.len())
    }
}

#[derive(Debug)]
enum Got {
    /// The error of the service.
    Error,
    Reply {
        reply: Reply,
        is_replay: bool,
    },
}

/// The result of a completion for its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Completed,
    /// The handler dropped the future, so the completion may have taken effect.
    Dropped,
    Failed(ErrorKind),
    /// The handler did not complete the key.
    Nothing,
}

#[derive(Clone, Copy, Debug)]
struct Stepped {
    tried: Tried,
    commits: bool,
}

/// One run, as its handler saw it.
#[derive(Debug, Default)]
struct Ran {
    request: usize,
    steps: Vec<Stepped>,
    /// Whether the lease has ended while the handler ran.
    is_disturbed: bool,
    takeover: Option<Takeover>,
    /// Whether another run had not ended when this one began.
    overlaps: bool,
    is_over: bool,
}

#[derive(Debug, Default)]
struct History {
    runs: Vec<Ran>,
    /// The result of each request.
    got: Vec<Got>,
    /// The record after each group of requests.
    records: Vec<Option<Status>>,
    /// The committed rows.
    rows: HashSet<String>,
}

/// The service returned an error.
#[derive(Debug)]
struct Failed;

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed")
    }
}

impl std::error::Error for Failed {}

/// Makes the response of one part of a program. The body differs for each author.
fn reply(plan: &Plan, author: String, shape: Shape) -> Reply {
    let random = &mut Random::new(plan.seed, 4);
    let noise = (0..shape.length).map(|_| u8::try_from(random.below(256)).unwrap());
    Reply {
        status: shape.status,
        body: author.bytes().chain(noise).collect(),
        author,
    }
}

fn response(plan: &Plan, author: String, shape: Shape) -> Response {
    let Reply { status, author, body } = reply(plan, author, shape);
    let status = StatusCode::from_u16(status).unwrap();
    let mut response = (status, [("x-author", author)], body).into_response();
    match shape.form {
        Form::DoNotStore => drop(response.extensions_mut().insert(DoNotStore)),
        Form::OutcomeOnly => drop(response.extensions_mut().insert(StoreOutcomeOnly)),
        Form::Plain => {}
        Form::Stream => {
            let stream = "text/event-stream".parse().unwrap();
            drop(response.headers_mut().insert(CONTENT_TYPE, stream));
        }
    }
    response
}

fn made(run: usize, step: usize) -> String {
    format!("made-{run}.{step}")
}

fn other(run: usize) -> String {
    format!("other-{run}")
}

/// The response of another attempt, which took the key over during a run.
fn elsewhere(run: usize) -> String {
    format!("elsewhere-{run}")
}

/// A program that runs.
struct Program {
    plan: Plan,
    store: PostgresStore,
    pool: PgPool,
    key: Mutex<Option<StorageKey>>,
    history: Mutex<History>,
    later: Mutex<Vec<JoinHandle<()>>>,
}

impl Program {
    /// Handles a request.
    async fn run(&self, request: usize, lease: Lease) -> Result<Response, Failed> {
        *self.key.lock().unwrap() = Some(*lease.storage_key());
        let run = self.begin(request);
        let planned = self.plan.run(run);
        let mut responses = Vec::new();
        for (number, step) in planned.steps.iter().enumerate() {
            let mut transaction = self.pool.begin().await.unwrap();
            let insert = sqlx::query("INSERT INTO payments (note) VALUES ($1)");
            let insert = insert.bind(format!("{} {}", self.plan.seed, made(run, number)));
            insert.execute(&mut *transaction).await.unwrap();
            if let Some(takeover) = planned.takeover.filter(|takeover| takeover.step == number) {
                self.take_over(run, takeover, &lease).await;
            }
            let (tried, response) = self.complete(run, number, &lease, &mut transaction).await;
            responses.push(response);
            let commits = matches!(step.ending, Ending::Commit | Ending::CommitLater(_));
            // After an error, the handler must roll back.
            let commits = commits && !matches!(tried, Tried::Failed(_));
            self.history.lock().unwrap().runs[run]
                .steps
                .push(Stepped { tried, commits });
            let ending = match step.ending {
                // After a dropped completion, the transaction must end before the handler does.
                Ending::CommitLater(_) if tried == Tried::Dropped => Ending::Commit,
                ending => ending,
            };
            self.end(transaction, ending, commits).await;
        }
        self.history.lock().unwrap().runs[run].is_over = true;
        match planned.end {
            End::Fail => Err(Failed),
            End::Made(step) => Ok(responses.remove(step).unwrap()),
            End::Other(shape) => Ok(response(&self.plan, other(run), shape)),
            // Unlike `panic!`, this prints nothing.
            End::Panic => resume_unwind(Box::new("the handler panics")),
        }
    }

    fn begin(&self, request: usize) -> usize {
        let runs = &mut self.history.lock().unwrap().runs;
        let overlaps = runs.iter().any(|run| !run.is_over);
        runs.push(Ran {
            request,
            overlaps,
            ..Ran::default()
        });
        runs.len() - 1
    }

    /// Ends the lease, and claims the key for another attempt. This fails if the key is completed,
    /// or if a request in the other process claims the key first.
    async fn take_over(&self, run: usize, takeover: Takeover, lease: &Lease) {
        let key = *lease.storage_key();
        let ended = self.store.renew(&key, lease.owner(), Duration::ZERO).await.unwrap();
        if ended == Renewal::Superseded {
            return;
        }
        self.history.lock().unwrap().runs[run].is_disturbed = true;
        let fingerprint = self.store.peek(&key).await.unwrap().unwrap().fingerprint;
        let claim = Claim {
            fingerprint,
            ..claim(key)
        };
        let Decision::Execute(grant) = self.store.claim(&claim).await.unwrap() else {
            return;
        };
        self.history.lock().unwrap().runs[run].takeover = Some(takeover);
        if takeover.completes {
            let outcome = self.elsewhere(run);
            self.store.complete(&key, grant.owner, &outcome, HOUR).await.unwrap();
        } else {
            self.store.release(&key, grant.owner).await.unwrap();
        }
    }

    /// The outcome of the other attempt.
    fn elsewhere(&self, run: usize) -> Outcome {
        let Reply { status, author, body } = reply(&self.plan, elsewhere(run), ELSEWHERE);
        let response = http::Response::builder().status(status).header("x-author", author);
        IdempotencyLayer::new(MemoryStore::new()).outcome_of(response.body(body).unwrap())
    }

    /// Completes the key in a transaction, if the plan says so. Returns the response, too.
    async fn complete(
        &self,
        run: usize,
        step: usize,
        lease: &Lease,
        transaction: &mut Transaction<'static, Postgres>,
    ) -> (Tried, Option<Response>) {
        let Some(completion) = &self.plan.run(run).steps[step].completion else {
            return (Tried::Nothing, None);
        };
        let response = || response(&self.plan, made(run, step), completion.shape);
        let completing = lease.complete_in(transaction, response());
        let completed = match completion.polls {
            Some(polls) => drop_after(polls, completing).await,
            None => Some(completing.await),
        };
        match completed {
            Some(Ok(response)) => (Tried::Completed, Some(response)),
            Some(Err(error)) => (Tried::Failed(error.kind()), Some(response())),
            None => (Tried::Dropped, Some(response())),
        }
    }

    async fn end(&self, transaction: Transaction<'static, Postgres>, ending: Ending, commits: bool) {
        match ending {
            Ending::Commit if commits => transaction.commit().await.unwrap(),
            Ending::CommitLater(delay) if commits => {
                let later = tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    transaction.commit().await.unwrap();
                });
                self.later.lock().unwrap().push(later);
            }
            Ending::Drop => drop(transaction),
            Ending::Rollback | Ending::Commit | Ending::CommitLater(_) => transaction.rollback().await.unwrap(),
        }
    }

    /// Sends a request to the layer of one process.
    async fn send(self: &Arc<Self>, layer: &IdempotencyLayer<PostgresStore>, number: usize) -> Got {
        let program = Arc::clone(self);
        let service = layer.layer(service_fn(move |mut request: Request<Body>| {
            let program = Arc::clone(&program);
            let lease = request.extensions_mut().remove::<Lease>().unwrap();
            async move { program.run(number, lease).await }
        }));
        let request = Request::post("/payments").header("idempotency-key", format!("program-{}", self.plan.seed));
        let Ok(response) = service.oneshot(request.body(Body::from("100")).unwrap()).await else {
            return Got::Error;
        };
        let (head, body) = response.into_parts();
        let author = head.headers.get("x-author");
        Got::Reply {
            reply: Reply {
                status: head.status.as_u16(),
                author: author
                    .map(|author| author.to_str().unwrap().to_owned())
                    .unwrap_or_default(),
                body: to_bytes(body, 1 << 20).await.unwrap(),
            },
            is_replay: head.headers.contains_key("idempotent-replayed"),
        }
    }

    /// Sends all requests, and waits until everything that the handlers started has ended.
    async fn play(self: Arc<Self>, stores: [PostgresStore; 2]) -> Arc<Self> {
        let layers = stores.map(|store| self.plan.layer(store));
        let mut number = 0;
        for group in &self.plan.groups {
            let sends = group.iter().zip(number..);
            let sends = sends.map(|(process, number)| self.send(&layers[*process], number));
            let got = join_all(sends).await;
            number += group.len();
            let key = *self.key.lock().unwrap();
            let record = self.store.peek(&key.expect("no handler ran")).await.unwrap();
            let mut history = self.history.lock().unwrap();
            history.got.extend(got);
            history.records.push(record.map(|record| record.status));
        }
        let later = std::mem::take(&mut *self.later.lock().unwrap());
        for task in later {
            task.await.unwrap();
        }
        let rows = sqlx::query_scalar::<_, String>("SELECT split_part(note, ' ', 2) FROM payments WHERE note LIKE $1");
        let rows = rows.bind(format!("{} %", self.plan.seed)).fetch_all(&self.pool).await;
        self.history.lock().unwrap().rows = rows.unwrap().into_iter().collect();
        self
    }

    /// Describes the program, and how to repeat it.
    fn report(&self) -> String {
        let (plan, history) = (&self.plan, self.history.lock().unwrap());
        let runs: Vec<String> = history.runs.iter().map(|run| format!("  {run:?}\n")).collect();
        let got: Vec<String> = history.got.iter().map(|got| format!("  {got:?}\n")).collect();
        let History { records, rows, .. } = &*history;
        format!(
            "{plan}{}{}  records: {records:?}\n  rows: {rows:?}\nRepeat this program with \
             HISTORIES={}..{} cargo test --all-features --test stores -- {TEST}",
            runs.concat(),
            got.concat(),
            plan.seed,
            plan.seed + 1,
        )
    }
}

const TEST: &str = "transaction::programs";

const ELSEWHERE: Shape = Shape {
    status: 201,
    form: Form::Plain,
    length: 10,
};

/// The time for one program. A program takes less than a second.
const LONG: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn every_program_of_transactions_follows_the_model() {
    let server = PostgresServer::start();
    let url = server.url();
    let connect = || async { PostgresStore::connect(&url).await.unwrap() };
    let stores = [connect().await, connect().await];
    let pool = PgPoolOptions::new().max_connections(40).connect(&url).await.unwrap();
    let create = sqlx::query("CREATE TABLE payments (id bigserial PRIMARY KEY, note text NOT NULL)");
    create.execute(&pool).await.unwrap();
    let seeds = seeds("HISTORIES").unwrap_or(0..if is_thorough() { 2_000 } else { 150 });
    let programs = seeds.map(|seed| {
        let program = Arc::new(Program {
            plan: Plan::of(seed),
            store: stores[0].clone(),
            pool: pool.clone(),
            key: Mutex::default(),
            history: Mutex::default(),
            later: Mutex::default(),
        });
        let playing = tokio::time::timeout(LONG, Arc::clone(&program).play(stores.clone()));
        let playing = tokio::spawn(playing);
        async move {
            let violation = match playing.await.unwrap() {
                Ok(_) => model::check(&program.plan, &program.history.lock().unwrap()).err(),
                Err(_) => Some("the program hangs".to_owned()),
            };
            violation.map(|violation| format!("{violation}\n{}", program.report()))
        }
    });
    let violations = futures::stream::iter(programs)
        .buffered(16)
        .filter_map(std::future::ready);
    let violations: Vec<String> = violations.collect().await;
    assert!(
        violations.is_empty(),
        "{} programs fail\n{}",
        violations.len(),
        violations.join("\n\n")
    );
}
