//! Processes that call a third party and are killed, and the third party, which counts its effects.
//!
//! A caller is this test binary, started again with its role in the environment: see
//! [`call_if_started_as_caller`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures::stream::{StreamExt, iter};
use tower::{ServiceBuilder, ServiceExt};
use tower_idempotency::BoxStore;
use tower_idempotency::Recovered;
use tower_idempotency::client::{
    Attempt, CallLayer, CallOutcome, CallReport, Done, Failure, IdempotencyKeyLayer, KeyDeriver, KeyGenerator,
    KeyOrigin, Once, OnceError, ProviderProfile, ReqwestService, RetryPolicy, once,
};

use crate::support::proxy::{Direction, Fate, Proxy};
use crate::support::settings;

/// The features of the third party, and the way to call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Row {
    AtLeastOnce,
    AtMostOnce,
    Check,
    Drafts,
    Ids,
    Keys,
}

const ROWS: [Row; 6] = [
    Row::AtLeastOnce,
    Row::AtMostOnce,
    Row::Check,
    Row::Drafts,
    Row::Ids,
    Row::Keys,
];

const JOBS: usize = 60;

/// The observations after all jobs.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Effects at the third party, for each job.
    pub(crate) effects: Vec<usize>,
    /// Checks that found their job done.
    pub(crate) found: usize,
    /// Requests beyond one for each job. Checks count, confirmations do not.
    pub(crate) repeated: usize,
    /// Jobs whose outcome was unknown to a caller.
    pub(crate) unknown: usize,
    /// Jobs that a caller reported as done although they had no effect.
    pub(crate) done_without_effect: usize,
}

/// The third party.
#[derive(Clone, Default)]
struct Party {
    books: Arc<Mutex<Books>>,
    /// Whether the party responds to every request, without a pause.
    reliable: bool,
}

#[derive(Default)]
struct Books {
    /// Effects for each job.
    effects: HashMap<String, usize>,
    arrived: usize,
    found: usize,
    /// The keys and ids that the party has seen.
    taken: HashSet<String>,
    /// The job of each draft, by the number of the draft.
    drafts: Vec<String>,
    confirmed: HashSet<usize>,
    /// The lowest fence that the party accepts, for each job.
    fences: HashMap<String, u64>,
}

impl Party {
    async fn start(&self) -> SocketAddr {
        let router = Router::new()
            .route("/create/{job}", post(create))
            .route("/draft/{job}", post(draft))
            .route("/confirm/{draft}", post(confirm))
            .route("/find/{job}", post(find))
            .with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    /// Responds to a request. Now and then, the response breaks off after the effect.
    async fn respond(self, act: impl FnOnce(&mut Books) -> Response) -> Response {
        if self.reliable {
            return act(&mut self.books.lock().unwrap());
        }
        let pause = || tokio::time::sleep(Duration::from_millis(rand::random_range(0..15)));
        pause().await;
        let response = act(&mut self.books.lock().unwrap());
        pause().await;
        if rand::random_range(0..8) == 0 {
            let broken = iter([Err::<bytes::Bytes, _>(std::io::Error::other("lost"))]);
            return axum::body::Body::from_stream(broken).into_response();
        }
        response
    }
}

/// Creates something, unless the party has seen the key or the id, or the fence is too old.
async fn create(State(party): State<Party>, Path(job): Path<String>, headers: HeaderMap) -> Response {
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let (name, fence) = (header("idempotency-key").or(header("x-id")), header("x-fence"));
    let act = move |books: &mut Books| {
        books.arrived += 1;
        let least = books.fences.get(&job).copied().unwrap_or(0);
        if fence.is_some_and(|fence| fence.parse::<u64>().unwrap() < least) {
            return StatusCode::PRECONDITION_FAILED.into_response();
        }
        if name.is_none_or(|name| books.taken.insert(name)) {
            *books.effects.entry(job).or_default() += 1;
        }
        "created".into_response()
    };
    party.respond(act).await
}

async fn draft(State(party): State<Party>, Path(job): Path<String>) -> Response {
    let act = move |books: &mut Books| {
        books.arrived += 1;
        books.drafts.push(job);
        (books.drafts.len() - 1).to_string().into_response()
    };
    party.respond(act).await
}

async fn confirm(State(party): State<Party>, Path(draft): Path<usize>) -> Response {
    let act = move |books: &mut Books| {
        if books.confirmed.insert(draft) {
            let job = books.drafts[draft].clone();
            *books.effects.entry(job).or_default() += 1;
        }
        "confirmed".into_response()
    };
    party.respond(act).await
}

/// Looks a job up, after it has raised the fence.
async fn find(State(party): State<Party>, Path(job): Path<String>, headers: HeaderMap) -> Response {
    let fence: u64 = headers["x-fence"].to_str().unwrap().parse().unwrap();
    let act = move |books: &mut Books| {
        books.arrived += 1;
        let least = books.fences.entry(job.clone()).or_default();
        *least = fence.max(*least);
        if books.effects.contains_key(&job) {
            books.found += 1;
            StatusCode::OK.into_response()
        } else {
            StatusCode::NOT_FOUND.into_response()
        }
    };
    party.respond(act).await
}

/// A process that does all jobs, several at a time.
struct Caller(Child);

impl Caller {
    fn start(store: &str, party: SocketAddr, row: Row, log: &std::path::Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "call_if_started_as_caller",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("CALL_STORE", store)
            .env("CALL_PARTY", party.to_string())
            .env("CALL_ROW", format!("{row:?}"))
            .env("CALL_OUTCOMES", log)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    /// Sends SIGKILL. The process has no chance to clean up.
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Waits until the process has done all jobs.
    async fn end(&mut self) {
        for _ in 0..1200 {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert!(status.success(), "a caller failed: {status}");
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("a caller is stuck");
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Two callers do the same jobs and are killed again and again. The last two processes may finish.
pub(crate) async fn kills(store: &str, row: Row) -> Seen {
    let unset = if settings::is_thorough() { 20 } else { 5 };
    let kills = settings::number("KILLS", 1).map_or(unset, |kills| usize::try_from(kills).unwrap());
    let party = Party::default();
    let address = party.start().await;
    let log = std::env::temp_dir().join(format!("callers-{}-{row:?}-{}", std::process::id(), address.port()));
    // Connecting creates the table, if the store has one.
    drop(BoxStore::from_url(store).await.unwrap());
    let mut callers = [0, 1].map(|_| Caller::start(store, address, row, &log));
    for kill in 0..kills {
        tokio::time::sleep(Duration::from_millis(rand::random_range(30..200))).await;
        let caller = &mut callers[kill % 2];
        caller.kill();
        *caller = Caller::start(store, address, row, &log);
    }
    for caller in &mut callers {
        caller.end().await;
    }
    let seen = seen(&party, &std::fs::read_to_string(&log).unwrap());
    std::fs::remove_file(&log).unwrap();
    eprintln!(
        "{row:?}: {kills} kills, {} requests repeated, {} unknown",
        seen.repeated, seen.unknown
    );
    seen
}

fn seen(party: &Party, log: &str) -> Seen {
    let books = party.books.lock().unwrap();
    let effects = (0..JOBS).map(|job| books.effects.get(&job.to_string()).copied().unwrap_or(0));
    let effects: Vec<usize> = effects.collect();
    let mut outcomes: BTreeMap<usize, HashSet<&str>> = BTreeMap::new();
    for line in log.lines() {
        let (job, outcome) = line.split_once(' ').unwrap();
        outcomes.entry(job.parse().unwrap()).or_default().insert(outcome);
    }
    assert_eq!(outcomes.len(), JOBS, "every job has an outcome");
    let done = |job: &usize| outcomes[job].contains("done");
    Seen {
        found: books.found,
        repeated: books.arrived.saturating_sub(JOBS),
        unknown: outcomes
            .values()
            .filter(|outcomes| outcomes.contains("unknown"))
            .count(),
        done_without_effect: (0..JOBS).filter(|job| done(job) && effects[*job] == 0).count(),
        effects,
    }
}

/// The observations after all jobs in which a connection was cut.
#[derive(Debug, Default)]
pub(crate) struct Cut {
    /// The number of jobs, and so of cuts.
    pub(crate) jobs: usize,
    /// The number of jobs for each number of effects at the third party.
    pub(crate) effects: BTreeMap<usize, usize>,
    /// Callers to whom the outcome was unknown.
    pub(crate) unknown: usize,
    /// Jobs that a caller reported as done although they had no effect.
    pub(crate) done_without_effect: usize,
}

/// Two callers do each job at the same time, in one process. Each job cuts the connection to the
/// third party one byte later than the job before: first in the bytes that the callers send, then
/// in the bytes that they receive.
pub(crate) async fn cuts(row: Row) -> Cut {
    /// Each share has a party and a proxy of its own.
    const SHARES: usize = 8;
    let shares = (0..SHARES).map(|share| tokio::spawn(cut_share(row, share, SHARES)));
    let mut all = Cut::default();
    for cut in futures::future::join_all(shares).await {
        let cut = cut.unwrap();
        all.jobs += cut.jobs;
        all.unknown += cut.unknown;
        all.done_without_effect += cut.done_without_effect;
        for (effects, jobs) in cut.effects {
            *all.effects.entry(effects).or_default() += jobs;
        }
    }
    eprintln!("{row:?}: {all:?}");
    all
}

async fn cut_share(row: Row, first: usize, step: usize) -> Cut {
    let party = Party {
        reliable: true,
        ..Party::default()
    };
    let proxy = Proxy::to(party.start().await).await;
    let http = reqwest::Client::builder().pool_max_idle_per_host(0).build();
    let jobs = Jobs {
        store: BoxStore::from_url("memory:").await.unwrap(),
        http: http.unwrap(),
        party: proxy.address.to_string(),
    };
    let mut seen = Cut::default();
    for direction in [Direction::ToServer, Direction::ToClient] {
        for bytes in (first..).step_by(step) {
            let job = seen.jobs;
            proxy.set(Fate::CutAfter(direction, bytes));
            let both = async { tokio::join!(jobs.settle(row, job), jobs.settle(row, job)) };
            let ((_, one), (_, other)) = tokio::select! {
                settled = both => settled,
                never = proxy.heal_for_new_connections() => match never {},
            };
            let effects = party.books.lock().unwrap().effects.get(&job.to_string()).copied();
            let effects = effects.unwrap_or(0);
            seen.jobs += 1;
            seen.unknown += [one, other].iter().filter(|outcome| **outcome == "unknown").count();
            seen.done_without_effect += usize::from([one, other].contains(&"done") && effects == 0);
            *seen.effects.entry(effects).or_default() += 1;
            if !proxy.was_cut() {
                break;
            }
        }
    }
    seen
}

/// The body of a test that only a process of [`Caller::start`] runs: it does the jobs.
pub(crate) fn call_if_started_as_caller() {
    let Ok(url) = std::env::var("CALL_STORE") else { return };
    let variable = |name: &str| std::env::var(name).unwrap();
    let row = ROWS
        .into_iter()
        .find(|row| format!("{row:?}") == variable("CALL_ROW"))
        .unwrap();
    let mut log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(variable("CALL_OUTCOMES"))
        .unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let jobs = Jobs {
            store: BoxStore::from_url(&url).await.unwrap(),
            http: reqwest::Client::new(),
            party: variable("CALL_PARTY"),
        };
        let outcomes = iter(0..JOBS).map(|job| jobs.settle(row, job)).buffer_unordered(8);
        let mut outcomes = Box::pin(outcomes);
        while let Some((job, outcome)) = outcomes.next().await {
            std::io::Write::write_all(&mut log, format!("{job} {outcome}\n").as_bytes()).unwrap();
        }
    });
}

fn fence(attempt: &Attempt) -> [(&'static str, String); 1] {
    [("x-fence", attempt.fence().as_u64().to_string())]
}

type Ended = Result<String, OnceError<String, reqwest::Error>>;

#[derive(Clone)]
struct Jobs {
    store: BoxStore,
    http: reqwest::Client,
    party: String,
}

impl Jobs {
    /// Repeats a job until its outcome is known, or certain to stay unknown.
    async fn settle(&self, row: Row, job: usize) -> (usize, &'static str) {
        loop {
            let ended = match row {
                Row::AtLeastOnce => self.create(job, self.once(job).at_least_once()).await,
                Row::AtMostOnce => self.create(job, self.once(job)).await,
                Row::Check => self.check(job).await,
                Row::Drafts => self.drafts(job).await,
                Row::Ids => self.create_with_id(job).await,
                Row::Keys => match self.charge(job).await {
                    CallOutcome::Responded => return (job, "done"),
                    _ => Err(OnceError::Unknown(None)),
                },
            };
            match ended {
                Ok(_) => return (job, "done"),
                Err(OnceError::Unknown(_)) if row == Row::AtMostOnce => return (job, "unknown"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn once(&self, job: usize) -> Once<BoxStore> {
        let once = once(self.store.clone(), job.to_string());
        once.with_lease(Duration::from_millis(700)).with_max_attempts(10_000)
    }

    /// Row 1: keys, derived from the name of the job, and no store.
    async fn charge(&self, job: usize) -> CallOutcome {
        let keys = KeyDeriver::new(&[7; 32]).unwrap();
        let policy = RetryPolicy::new(ProviderProfile::stripe())
            .with_initial_backoff(Duration::from_millis(5))
            .with_max_backoff(Duration::from_millis(50));
        let client = ServiceBuilder::new()
            .layer(IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(KeyGenerator::derived(keys)))
            .layer(CallLayer::new(policy))
            .service(ReqwestService::from_client(self.http.clone()));
        let request = http::Request::post(format!("http://{}/create/{job}", self.party));
        let origin = KeyOrigin::new(job.to_string(), "charge");
        let request = request.extension(origin).body(reqwest::Body::from("amount=1")).unwrap();
        match client.oneshot(request).await {
            Ok(response) => {
                let outcome = response.extensions().get::<CallReport>().unwrap().outcome();
                // The head has arrived, but the body may still be lost.
                let body = http_body_util::BodyExt::collect(response.into_body()).await;
                body.map_or(CallOutcome::Unknown, |_| outcome)
            }
            Err(_) => CallOutcome::Unknown,
        }
    }

    /// Row 5: the third party offers nothing.
    async fn create(&self, job: usize, once: Once<BoxStore>) -> Ended {
        let (jobs, path) = (self.clone(), format!("create/{job}"));
        let done = once.run(move |_| async move { jobs.post(&path, &[]).await });
        done.await.map(Done::into_value)
    }

    /// Row 2: an id that is the same in every attempt.
    async fn create_with_id(&self, job: usize) -> Ended {
        let (jobs, path) = (self.clone(), format!("create/{job}"));
        let call = move |attempt: Attempt| async move { jobs.post(&path, &[("x-id", attempt.id("order"))]).await };
        let done = self.once(job).at_least_once().run(call).await;
        done.map(Done::into_value)
    }

    /// Row 3: a draft, then its confirmation.
    async fn drafts(&self, job: usize) -> Ended {
        let mut steps = self.once(job).at_least_once().steps();
        let (jobs, path) = (self.clone(), format!("draft/{job}"));
        let draft = steps
            .step("draft")
            .run(move |_| async move { jobs.post(&path, &[]).await });
        let path = format!("confirm/{}", draft.await?.value());
        let jobs = self.clone();
        let done = steps
            .step("confirm")
            .run(move |_| async move { jobs.post(&path, &[]).await });
        done.await.map(Done::into_value)
    }

    /// Row 4: a check first, which raises the fence.
    async fn check(&self, job: usize) -> Ended {
        let (asking, creating) = (self.clone(), self.clone());
        let (find, create) = (format!("find/{job}"), format!("create/{job}"));
        let check = move |attempt: Attempt| async move {
            match asking.post(&find, &fence(&attempt)).await {
                Ok(_) => Recovered::Happened("found".to_owned()),
                Err(Failure::NotDone(_)) => Recovered::NotHappened,
                Err(Failure::Unknown(_)) => Recovered::Unknown,
            }
        };
        let call = move |attempt: Attempt| async move { creating.post(&create, &fence(&attempt)).await };
        let done = self.once(job).run_or_recover(check, call).await;
        done.map(Done::into_value)
    }

    /// A 404 and a 412 show that nothing was done. Any other failure leaves the outcome open.
    async fn post(&self, path: &str, headers: &[(&'static str, String)]) -> Result<String, Failure<reqwest::Error>> {
        let mut request = self.http.post(format!("http://{}/{path}", self.party));
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let response = request.send().await?;
        let status = response.status();
        match response.error_for_status() {
            Ok(response) => Ok(response.text().await?),
            Err(error) if status == 404 || status == 412 => Err(Failure::NotDone(error)),
            Err(error) => Err(Failure::Unknown(error)),
        }
    }
}
