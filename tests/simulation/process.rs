//! A process of the application: a runtime of its own, the layer, and a handler that calls the bank.

use std::convert::Infallible;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tower::util::BoxCloneSyncService;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::{Resolution, StorageKey};
use tower_idempotency::{
    DoNotStore, Drain, IdempotencyLayer, Lease, LostAttempt, OnError, Recovered, Refusal, StoreOutcomeOnly,
};

use crate::bank::{BankReply, BankRequest};
use crate::history::Event;
use crate::link::{Answer, Link, RemoteStore, Sender, Shared};
use crate::plan::{Mode, Plan};
use crate::random::Random;

pub(crate) const STORE_TIMEOUT: Duration = Duration::from_millis(400);
pub(crate) const COMPLETION_TIMEOUT: Duration = Duration::from_millis(1_500);
/// The longest time of a handler, with its call to the bank.
pub(crate) const HANDLER: Duration = Duration::from_millis(1_500 + 1_500 + 500);
const RESPONSE_LIMIT: usize = 1_000;

type Service = BoxCloneSyncService<Request<Full<Bytes>>, Response<Full<Bytes>>, Infallible>;

pub(crate) struct Process {
    runtime: Runtime,
    link: Link,
    service: Service,
    pub(crate) drain: Drain,
    /// The start of the process, by its own clock.
    epoch: Instant,
    /// The time since the start, by its own clock.
    local: Duration,
    /// The requests that run: the operation, the number of its try, and the task.
    requests: Vec<(usize, usize, AbortHandle)>,
}

impl Process {
    pub(crate) fn start(plan: &Plan, shared: &Arc<Mutex<Shared>>, number: usize) -> Self {
        let sender = Sender {
            process: number,
            incarnation: shared.lock().unwrap().processes[number].incarnation,
        };
        let link = Link {
            shared: Arc::clone(shared),
            sender,
        };
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        #[expect(
            clippy::disallowed_methods,
            reason = "the clock of the process, which the simulation turns"
        )]
        let epoch = runtime.block_on(async { Instant::now() });
        let layer = layer(plan, &link);
        let (handler_link, seed, mode) = (link.clone(), plan.seed, plan.mode);
        let handler = service_fn(move |request: Request<Full<Bytes>>| {
            let link = handler_link.clone();
            async move { Ok::<_, Infallible>(handle(link, seed, mode, request).await) }
        });
        Self {
            runtime,
            drain: layer.drain(),
            service: BoxCloneSyncService::new(layer.layer(handler)),
            link,
            epoch,
            local: Duration::ZERO,
            requests: Vec::new(),
        }
    }

    /// Runs everything that the process does in this time of its own clock.
    pub(crate) fn run_for(&mut self, time: Duration) {
        self.local += time;
        let until = self.epoch + self.local;
        self.runtime.block_on(async { tokio::time::sleep_until(until).await });
    }

    /// Lets the clock of the process jump. All timers in between are due at once.
    pub(crate) fn jump(&mut self, time: Duration) {
        self.local += time;
        self.runtime.block_on(async { tokio::time::advance(time).await });
    }

    /// Takes a request.
    pub(crate) fn take(&mut self, operation: usize, number: usize, key: usize, is_other_body: bool) {
        let body = if is_other_body { "other" } else { "pay" };
        let request = Request::post(format!("/pay/{key}"))
            .header("idempotency-key", name_of(key))
            .body(Full::from(body))
            .unwrap();
        let (service, link) = (self.service.clone(), self.link.clone());
        let task = self.runtime.spawn(async move {
            let response = match service.oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            };
            link.respond(operation, number, answer(response).await);
        });
        self.requests.push((operation, number, task.abort_handle()));
    }

    /// Drops the request of a client that left.
    pub(crate) fn leave(&mut self, operation: usize, number: usize) {
        self.requests.retain(|(of, at, task)| {
            let is_it = (*of, *at) == (operation, number);
            if is_it {
                task.abort();
            }
            !is_it
        });
    }

    pub(crate) fn alive_tasks(&self) -> usize {
        self.runtime.metrics().num_alive_tasks()
    }

    /// Whether nothing is left to wait for.
    pub(crate) fn is_drained(&mut self) -> bool {
        let drain = self.drain.clone();
        let waiting = async { tokio::time::timeout(Duration::ZERO, drain.wait()).await.is_ok() };
        self.runtime.block_on(waiting)
    }

    /// Ends the process at once.
    pub(crate) fn kill(self) {
        self.runtime.shutdown_background();
    }
}

pub(crate) fn name_of(key: usize) -> String {
    format!("key-{key}")
}

/// Makes the layer by which operators name records and make responses. It sends no messages.
fn layer_of_operators(plan: &Plan, shared: &Arc<Mutex<Shared>>) -> IdempotencyLayer<RemoteStore> {
    let (process, incarnation) = (0, 0);
    let link = Link {
        shared: Arc::clone(shared),
        sender: Sender { process, incarnation },
    };
    layer(plan, &link)
}

/// Returns the name of the record of a key.
pub(crate) fn storage_key(plan: &Plan, shared: &Arc<Mutex<Shared>>, key: usize) -> StorageKey {
    let layer = layer_of_operators(plan, shared);
    layer.storage_key(None, &name_of(key)).unwrap()
}

fn layer(plan: &Plan, link: &Link) -> IdempotencyLayer<RemoteStore> {
    let layer = IdempotencyLayer::new(RemoteStore(link.clone()))
        .require_key()
        .with_lease(plan.lease)
        .with_retention(plan.retention)
        .with_wait(plan.wait)
        .with_store_timeout(STORE_TIMEOUT)
        .with_completion_timeout(COMPLETION_TIMEOUT)
        .with_response_limit(RESPONSE_LIMIT)
        .on_error(OnError::Unknown);
    match plan.mode {
        Mode::AtMostOnce => layer,
        Mode::ReleaseFailures => layer.on_error(OnError::Release),
        Mode::AtLeastOnce => layer.at_least_once().with_max_attempts(plan.max_attempts),
        Mode::Recover => {
            let link = link.clone();
            layer
                .with_recovery(move |lost| recover(link.clone(), lost))
                .with_max_attempts(plan.max_attempts)
        }
    }
}

async fn recover(link: Link, lost: LostAttempt) -> Recovered<Response<Bytes>> {
    let key = key_of(lost.head.uri.path());
    let (id, fence) = (lost.derive_key("charge"), lost.fence.as_u64());
    let asking = tokio::time::timeout(
        Duration::from_millis(300),
        link.bank(BankRequest::Find { key, id, fence }),
    );
    let (found, name) = match asking.await {
        Ok(Ok(BankReply::Receipt(receipt))) => {
            let mut response = Response::new(Bytes::from(format!("found receipt {receipt}\n")));
            *response.status_mut() = StatusCode::CREATED;
            (Recovered::Happened(response), "an effect")
        }
        Ok(Ok(_)) => (Recovered::NotHappened, "no effect"),
        Ok(Err(_)) | Err(_) => (Recovered::Unknown, "nothing certain"),
    };
    link.note(Event::Recovered { key, found: name });
    found
}

/// Makes the resolution of an operator who has found a receipt at the bank.
pub(crate) fn found(plan: &Plan, shared: &Arc<Mutex<Shared>>, receipt: usize) -> Resolution {
    let layer = layer_of_operators(plan, shared);
    let mut response = Response::new(Bytes::from(format!("an operator found receipt {receipt}\n")));
    *response.status_mut() = StatusCode::CREATED;
    Resolution::Completed(layer.outcome_of(response), plan.retention)
}

fn key_of(path: &str) -> usize {
    path.rsplit('/').next().unwrap().parse().unwrap()
}

async fn handle(link: Link, seed: u64, mode: Mode, request: Request<Full<Bytes>>) -> Response<Full<Bytes>> {
    let lease = request.extensions().get::<Lease>().unwrap().clone();
    let key = key_of(request.uri().path());
    let (attempt, fence) = (lease.attempt().number(), lease.fence().as_u64());
    let Sender { process, incarnation } = link.sender;
    link.note(Event::Began {
        key,
        process,
        attempt,
        fence,
    });
    let mut random = Random::new(seed, fence ^ 0x5eed);
    let failed = |had_no_effect| {
        link.note(Event::Failed {
            key,
            attempt,
            had_no_effect,
        });
        text(StatusCode::INTERNAL_SERVER_ERROR, "failed".to_owned())
    };
    let releases = mode == Mode::ReleaseFailures;
    tokio::time::sleep(random.millis(0..1_500)).await;
    match random.below(20) {
        0 => return failed(releases),
        1 | 2 => {
            // The handler knows that it had no effect.
            let mut response = failed(true);
            response.extensions_mut().insert(DoNotStore);
            return response;
        }
        3 => {
            drop(failed(releases));
            // Panics without the message of the panic hook.
            resume_unwind(Box::new("the handler panics"));
        }
        _ => {}
    }
    let charge = BankRequest::Charge {
        key,
        id: lease.derive_key("charge"),
        fence,
    };
    let limit = match mode {
        Mode::ReleaseFailures => Duration::from_secs(3_600),
        _ => Duration::from_millis(500),
    };
    let Ok(Ok(BankReply::Receipt(receipt))) = tokio::time::timeout(limit, link.bank(charge)).await else {
        return failed(false);
    };
    tokio::time::sleep(random.millis(0..1_500)).await;
    if !releases && random.chance(10) {
        return failed(false);
    }
    if !releases && random.chance(4) {
        drop(failed(false));
        resume_unwind(Box::new("the handler panics after its effect"));
    }
    let body = format!("receipt {receipt} of attempt {attempt} in process {process}.{incarnation}\n");
    match random.below(20) {
        0 => {
            let mut response = text(StatusCode::CREATED, body);
            response.extensions_mut().insert(StoreOutcomeOnly);
            response
        }
        1 => text(StatusCode::CREATED, body + &".".repeat(RESPONSE_LIMIT)),
        _ => text(StatusCode::CREATED, body),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response
}

async fn answer(response: Response<Full<Bytes>>) -> Answer {
    let code = response.extensions().get::<Refusal>().map_or("", Refusal::code);
    let is_replay = response.headers().contains_key("idempotent-replayed");
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let body = match code {
        "" => String::from_utf8_lossy(&body).trim_end_matches('.').to_owned(),
        _ => String::new(),
    };
    Answer {
        status,
        code,
        is_replay,
        body,
    }
}
