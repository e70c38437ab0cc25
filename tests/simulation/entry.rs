//! The entries of a process: requests over HTTP, messages of a broker, and one-time calls.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use tower::util::BoxCloneSyncService;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::client::{self, Failure, Once, OnceError, once};
use tower_idempotency::protocol::{Outcome, Resolution, StorageKey};
use tower_idempotency::receiver::{HandlerErrorClass, MessageLease, Receipt, ReceiveError, ReceiverLayer};
use tower_idempotency::{
    DoNotStore, Drain, IdempotencyLayer, Lease, LostAttempt, OnError, Recovered, Refusal, StoreOutcomeOnly,
};

use crate::history::Event;
use crate::link::{Answer, Link, Message, RemoteStore, Sender, Shared};
use crate::plan::{Kind, Mode, Plan};
use crate::work::{Attempt, BODY_PAUSE, Failed, Size, check, pay};

pub(crate) const STORE_TIMEOUT: Duration = Duration::from_millis(400);
pub(crate) const COMPLETION_TIMEOUT: Duration = Duration::from_millis(1_500);
const RESPONSE_LIMIT: usize = 1_000;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A request of a client.
pub(crate) struct Incoming {
    /// The number of the request among all requests.
    pub(crate) number: usize,
    pub(crate) key: usize,
    pub(crate) is_other_body: bool,
    pub(crate) stall: Duration,
}

/// The number of a request over HTTP.
#[derive(Clone)]
struct Number(usize);

/// A message of a broker.
#[derive(Clone)]
pub(crate) struct Delivery {
    request: usize,
    key: usize,
    payload: &'static str,
    lease: Option<MessageLease>,
}

#[derive(Clone)]
pub(crate) enum Entry {
    Http(BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>),
    Message(BoxCloneSyncService<Delivery, Receipt<String>, ReceiveError<Failed>>),
    Once(Arc<OneTimeCalls>),
}

impl Entry {
    pub(crate) fn new(plan: &Plan, link: &Link) -> (Self, Drain) {
        let (seed, mode) = (plan.seed, plan.mode);
        match plan.kind {
            Kind::Http => {
                let (layer, link) = (layer(plan, link), link.clone());
                let handler = service_fn(move |request| {
                    let link = link.clone();
                    async move { Ok::<_, Infallible>(handle(&link, seed, mode, request).await) }
                });
                let drain = layer.drain();
                (Self::Http(BoxCloneSyncService::new(layer.layer(handler))), drain)
            }
            Kind::Message => {
                let (layer, link) = (receiver(plan, link), link.clone());
                let handler = service_fn(move |delivery: Delivery| {
                    let link = link.clone();
                    async move { receive(&link, seed, mode, delivery).await }
                });
                let drain = layer.drain();
                (Self::Message(BoxCloneSyncService::new(layer.layer(handler))), drain)
            }
            Kind::Once => {
                let drain = Drain::default();
                let calls = OneTimeCalls {
                    plan: plan.clone(),
                    link: link.clone(),
                    drain: drain.clone(),
                };
                (Self::Once(Arc::new(calls)), drain)
            }
        }
    }

    pub(crate) async fn call(self, request: Incoming) -> Answer {
        let Incoming {
            number: request,
            key,
            is_other_body,
            stall,
        } = request;
        let payload = if is_other_body { "other" } else { "pay" };
        match self {
            Self::Http(service) => {
                let request = Request::post(format!("/pay/{key}"))
                    .header("idempotency-key", name_of(key))
                    .extension(Number(request))
                    .body(match stall {
                        Duration::ZERO => body(payload.to_owned()),
                        stall => body_in_parts(&payload[..2], stall, Ok(&payload[2..])),
                    })
                    .unwrap();
                match service.oneshot(request).await {
                    Ok(response) => answer(response).await,
                    Err(never) => match never {},
                }
            }
            Self::Message(service) => {
                let delivery = Delivery {
                    request,
                    key,
                    payload,
                    lease: None,
                };
                received(service.oneshot(delivery).await)
            }
            Self::Once(calls) => calls.call(request, key, payload).await,
        }
    }
}

pub(crate) fn name_of(key: usize) -> String {
    format!("key-{key}")
}

/// Makes the link of an operator's layer, which sends no messages.
fn link_of_operators(shared: &Arc<Mutex<Shared>>) -> Link {
    let (process, incarnation) = (0, 0);
    Link {
        shared: Arc::clone(shared),
        sender: Sender { process, incarnation },
    }
}

/// Returns the name of the record of a key.
pub(crate) fn storage_key(plan: &Plan, shared: &Arc<Mutex<Shared>>, key: usize) -> StorageKey {
    let link = link_of_operators(shared);
    match plan.kind {
        Kind::Http => layer(plan, &link).storage_key(None, &name_of(key)).unwrap(),
        Kind::Message => receiver(plan, &link).storage_key(name_of(key)).unwrap(),
        Kind::Once => storage_key_of_call(plan, key),
    }
}

/// Makes the resolution of an operator who has found a receipt at the bank.
pub(crate) fn found(plan: &Plan, shared: &Arc<Mutex<Shared>>, receipt: usize) -> Resolution {
    let outcome = match plan.kind {
        Kind::Http => {
            let layer = layer(plan, &link_of_operators(shared));
            layer.outcome_of(created(Bytes::from(format!("an operator found receipt {receipt}\n"))))
        }
        Kind::Message | Kind::Once => Outcome::Tombstone,
    };
    Resolution::Completed(outcome, plan.retention)
}

fn created<B>(body: B) -> Response<B> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::CREATED;
    response
}

fn body(text: String) -> Body {
    let body = Full::from(text);
    body.map_err(|never| match never {}).boxed_unsync()
}

/// A body of two parts.
fn body_in_parts(first: &str, pause: Duration, second: io::Result<&str>) -> Body {
    let second = second.map(|part| Bytes::from(part.to_owned()));
    let parts = [(Duration::ZERO, Ok(Bytes::from(first.to_owned()))), (pause, second)];
    let frames = stream::iter(parts).then(|(pause, part)| async move {
        tokio::time::sleep(pause).await;
        part.map(Frame::data)
    });
    StreamBody::new(frames).boxed_unsync()
}

/// A response with a code instead of a body.
fn refused(status: u16, code: &'static str) -> Answer {
    Answer {
        status,
        code,
        is_replay: false,
        head: Vec::new(),
        body: String::new(),
    }
}

// Requests over HTTP.

fn layer(plan: &Plan, link: &Link) -> IdempotencyLayer<RemoteStore> {
    let (lease, wait) = plan.settings(link.sender.incarnation);
    let layer = IdempotencyLayer::new(RemoteStore(link.clone()))
        .require_key()
        .with_lease(lease)
        .with_retention(plan.retention)
        .with_wait(wait)
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
    let (key, id) = (key_of(lost.head.uri.path()), lost.derive_key("charge"));
    match check(&link, key, id, lost.fence.as_u64()).await {
        Recovered::Happened(text) => Recovered::Happened(created(Bytes::from(text))),
        Recovered::NotHappened => Recovered::NotHappened,
        Recovered::Unknown => Recovered::Unknown,
    }
}

fn key_of(path: &str) -> usize {
    path.rsplit('/').next().unwrap().parse().unwrap()
}

async fn handle(link: &Link, seed: u64, mode: Mode, request: Request<Body>) -> Response<Body> {
    let lease = request.extensions().get::<Lease>().unwrap();
    let fence = lease.fence().as_u64();
    let Number(number) = *request.extensions().get().unwrap();
    let attempt = Attempt {
        key: key_of(request.uri().path()),
        request: number,
        number: lease.attempt().number(),
        fence,
        id: lease.derive_key("charge"),
    };
    let (text, size) = match pay(link, seed, mode, attempt).await {
        Ok(paid) => paid,
        Err(failed) => {
            let mut response = Response::new(body("failed".to_owned()));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            if failed == Failed::WithoutEffect {
                response.extensions_mut().insert(DoNotStore);
            }
            return response;
        }
    };
    let created = |body| {
        let mut response = created(body);
        let headers = response.headers_mut();
        for value in ["first", "second"] {
            headers.append("x-part", format!("{value} of {fence}").parse().unwrap());
        }
        response
    };
    match size {
        Size::Usual => created(body(text)),
        Size::Slow => created(body_in_parts("", BODY_PAUSE, Ok(&text))),
        Size::Broken => {
            let reset = io::Error::from(io::ErrorKind::ConnectionReset);
            created(body_in_parts(&text, Duration::ZERO, Err(reset)))
        }
        Size::NotStored => {
            let mut response = created(body(text));
            response.extensions_mut().insert(StoreOutcomeOnly);
            response
        }
        Size::TooLong => created(body(text + &".".repeat(RESPONSE_LIMIT))),
    }
}

async fn answer(response: Response<Body>) -> Answer {
    let code = response.extensions().get::<Refusal>().map_or("", Refusal::code);
    let is_replay = response.headers().contains_key("idempotent-replayed");
    let status = response.status().as_u16();
    let lines = response
        .headers()
        .iter()
        .filter(|(name, _)| *name != "idempotent-replayed");
    let mut lines: Vec<_> = lines.collect();
    // Lines of one name keep their order.
    lines.sort_by_key(|(name, _)| name.as_str());
    let head = lines.iter().map(|(name, value)| format!("{name}: {value:?}")).collect();
    let Ok(body) = response.into_body().collect().await else {
        return refused(502, "broken");
    };
    let body = body.to_bytes();
    let body = match code {
        "" => String::from_utf8(body.to_vec())
            .unwrap()
            .trim_end_matches('.')
            .to_owned(),
        _ => String::new(),
    };
    Answer {
        status,
        code,
        is_replay,
        head,
        body,
    }
}

// Messages of a broker.

fn receiver(plan: &Plan, link: &Link) -> ReceiverLayer<RemoteStore, Delivery> {
    let (lease, wait) = plan.settings(link.sender.incarnation);
    let layer = ReceiverLayer::new(RemoteStore(link.clone()), "payments")
        .with_id(|delivery: &Delivery| name_of(delivery.key))
        .with_payload(|delivery| delivery.payload.as_bytes())
        .pass_lease(|delivery, lease| delivery.lease = Some(lease))
        .with_lease(lease)
        .with_retention(plan.retention)
        .with_wait(wait)
        .with_store_timeout(STORE_TIMEOUT)
        .with_completion_timeout(COMPLETION_TIMEOUT)
        .with_error_class(|failed| match failed {
            Failed::AsSet => HandlerErrorClass::Redeliver,
            Failed::WithoutEffect => HandlerErrorClass::Reject,
        })
        .on_error(OnError::Unknown);
    match plan.mode {
        Mode::AtMostOnce => layer,
        Mode::ReleaseFailures => layer.on_error(OnError::Release),
        Mode::AtLeastOnce => layer.at_least_once().with_max_attempts(plan.max_attempts),
        Mode::Recover => {
            let link = link.clone();
            layer
                .with_recovery(move |delivery, lease| {
                    let (link, key, id) = (link.clone(), delivery.key, lease.id("charge"));
                    async move {
                        match check(&link, key, id, lease.fence().as_u64()).await {
                            Recovered::Happened(_) => Recovered::Happened(()),
                            Recovered::NotHappened => Recovered::NotHappened,
                            Recovered::Unknown => Recovered::Unknown,
                        }
                    }
                })
                .with_max_attempts(plan.max_attempts)
        }
    }
}

async fn receive(link: &Link, seed: u64, mode: Mode, delivery: Delivery) -> Result<String, Failed> {
    let (key, lease) = (delivery.key, delivery.lease.unwrap());
    let attempt = Attempt {
        key,
        request: delivery.request,
        number: lease.attempt(),
        fence: lease.fence().as_u64(),
        id: lease.id("charge"),
    };
    let paid = pay(link, seed, mode, attempt).await;
    if paid == Err(Failed::WithoutEffect) {
        link.note(Event::Rejected { key, by: "the handler" });
    }
    paid.map(|(body, _)| body)
}

/// A message has no response. A duplicate reports only that the message was handled.
fn received(received: Result<Receipt<String>, ReceiveError<Failed>>) -> Answer {
    match received {
        Ok(Receipt::First(body)) => Answer {
            status: 201,
            code: "",
            is_replay: false,
            head: Vec::new(),
            body,
        },
        Ok(Receipt::Duplicate) => refused(208, "handled-before"),
        Ok(Receipt::InFlight { .. }) => refused(409, "request-outstanding"),
        Ok(Receipt::Unknown) => refused(409, "outcome-unknown"),
        Err(ReceiveError::Mismatch) => refused(422, "mismatch"),
        Err(ReceiveError::Handler(_) | ReceiveError::Panicked | ReceiveError::Rejected(_)) => refused(500, "failed"),
        Err(ReceiveError::Unrecorded(_)) => refused(503, "outcome-unknown"),
        Err(ReceiveError::Store(_)) => refused(503, "store-unavailable"),
        Err(error) => panic!("{error:?}"),
    }
}

// One-time calls.

pub(crate) struct OneTimeCalls {
    plan: Plan,
    link: Link,
    drain: Drain,
}

impl OneTimeCalls {
    fn once(&self, key: usize, payload: &str) -> Once<RemoteStore> {
        let (lease, wait) = self.plan.settings(self.link.sender.incarnation);
        once(RemoteStore(self.link.clone()), name_of(key))
            .with_input(payload)
            .with_drain(&self.drain)
            .with_lease(lease)
            .with_retention(self.plan.retention)
            .with_wait(wait)
            .with_store_timeout(STORE_TIMEOUT)
            .with_completion_timeout(COMPLETION_TIMEOUT)
            .with_max_attempts(self.plan.max_attempts)
    }

    async fn call(&self, request: usize, key: usize, payload: &str) -> Answer {
        let (seed, mode, once) = (self.plan.seed, self.plan.mode, self.once(key, payload));
        let link = self.link.clone();
        let call = move |attempt| async move { pay_once(&link, seed, mode, (request, key), &attempt).await };
        let link = self.link.clone();
        let made = match mode {
            Mode::AtMostOnce | Mode::ReleaseFailures => once.run(call).await,
            Mode::AtLeastOnce => once.at_least_once().run(call).await,
            Mode::Recover => {
                let find = move |attempt: client::Attempt| async move {
                    check(&link, key, attempt.id("charge"), attempt.fence().as_u64()).await
                };
                once.run_or_recover(find, call).await
            }
        };
        match made {
            Ok(done) => Answer {
                status: 201,
                code: "",
                is_replay: done.is_replay(),
                head: Vec::new(),
                body: done.into_value(),
            },
            Err(OnceError::InFlight { .. }) => refused(409, "request-outstanding"),
            Err(OnceError::Mismatch) => refused(422, "mismatch"),
            Err(OnceError::NotStored) => refused(409, "response-not-stored"),
            Err(OnceError::NotRun(_)) => refused(503, "store-unavailable"),
            Err(OnceError::Unknown(None)) => refused(409, "outcome-unknown"),
            Err(OnceError::Unknown(Some(_)) | OnceError::Failed(_)) => refused(500, "failed"),
            Err(OnceError::Unrecorded { .. }) => refused(503, "outcome-unknown"),
            Err(error) => panic!("{error:?}"),
        }
    }
}

async fn pay_once(
    link: &Link,
    seed: u64,
    mode: Mode,
    (request, key): (usize, usize),
    attempt: &client::Attempt,
) -> Result<String, Failure<Failed>> {
    let paying = Attempt {
        key,
        request,
        number: attempt.number(),
        fence: attempt.fence().as_u64(),
        id: attempt.id("charge"),
    };
    match pay(link, seed, mode, paying).await {
        Ok((body, _)) => Ok(body),
        Err(Failed::WithoutEffect) => Err(Failure::NotDone(Failed::WithoutEffect)),
        Err(Failed::AsSet) if mode == Mode::ReleaseFailures => Err(Failure::NotDone(Failed::AsSet)),
        Err(Failed::AsSet) => Err(Failure::Unknown(Failed::AsSet)),
    }
}

/// Returns the name of the record of a one-time call: the key of the first message that the call
/// sends to its store.
fn storage_key_of_call(plan: &Plan, key: usize) -> StorageKey {
    let shared = Arc::new(Mutex::new(Shared::new(plan.seed, 1)));
    let calls = OneTimeCalls {
        plan: plan.clone(),
        link: link_of_operators(&shared),
        drain: Drain::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut call = pin!(calls.call(0, key, "pay"));
        poll_fn(|cx| {
            assert!(call.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
    });
    let shared = shared.lock().unwrap();
    match shared.messages.values().next() {
        Some(Message::ToStore { request, .. }) => request.key(),
        _ => panic!("a one-time call claims its key first"),
    }
}
