//! An event becomes an order at the third party.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use reqwest::Body;
use tower::util::BoxCloneSyncService;
use tower::{service_fn, Layer, Service, ServiceBuilder, ServiceExt};
use tower_idempotency::client::{
    once, Attempt, CallError, CallLayer, CallOutcome, CallReport, Failure, IdempotencyKeyLayer, KeyGenerator,
    KeyPlacementError, OnceError, Outgoing, ProviderProfile, ReqwestService, RetryPolicy,
};
use tower_idempotency::receiver::{HandlerErrorClass, Receipt, ReceiveError, Receiver, ReceiverLayer};
use tower_idempotency::BoxStore;

use crate::{Error, Event};

/// What the third party offers, and so what can be promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// It heeds no key: an event whose call was lost goes into the dead-letter place, where somebody asks the third party.
    AtMostOnce,
    /// It heeds the key that it is sent: a call that was lost is made again, with the same key.
    ExactlyOnce,
}

/// How events are handled.
#[derive(Clone, Debug)]
pub struct Mediation {
    /// Where the third party takes orders.
    pub url: String,
    /// What it offers.
    pub promise: Promise,
    /// How long a process may go without a sign of life before others take its messages over.
    pub lease: Duration,
    /// How many attempts may be lost before an event is not tried again.
    pub max_attempts: u32,
}

/// Why there is no order.
#[derive(Debug)]
pub enum MediationError {
    /// It can be tried again: nothing was ordered, or the third party will know the key.
    Again(Error),
    /// The third party will not have it.
    Refused(StatusCode),
    /// Nobody knows whether it was ordered, and trying again would not tell.
    Unknown,
}

/// A service of events, which gives what the third party answered.
pub type Mediator = Receiver<BoxCloneSyncService<Event, String, MediationError>, BoxStore, Event>;

/// What came of a delivery.
pub type Received = Result<Receipt<String>, ReceiveError<MediationError>>;

/// Only an error that can go away is worth another delivery.
fn class_of(error: &MediationError) -> HandlerErrorClass {
    match error {
        MediationError::Again(_) => HandlerErrorClass::Redeliver,
        MediationError::Refused(_) | MediationError::Unknown => HandlerErrorClass::Reject,
    }
}

impl Mediation {
    /// A service that makes one order of each event, recorded in `store`.
    ///
    /// # Errors
    ///
    /// When no client can be built.
    pub fn over(self, store: BoxStore) -> Result<Mediator, Error> {
        let receiver = ReceiverLayer::new(store.clone(), "mediator")
            .with_id(|event: &Event| event.id.clone())
            .with_payload(|event| &event.payload)
            .pass_lease(|event: &mut Event, lease| event.lease = Some(lease))
            .with_error_class(class_of)
            .with_lease(self.lease)
            .with_max_attempts(self.max_attempts)
            // An event may be handled again: the call within it is made as often as is promised.
            .at_least_once();
        let http = ReqwestService::build(reqwest::Client::builder().timeout(Duration::from_secs(10)))?;
        let client = client(http, self.promise);
        let handler = service_fn(move |event| {
            let (mediation, client, store) = (self.clone(), client.clone(), store.clone());
            async move { mediation.order(event, client, store).await }
        });
        Ok(receiver.layer(BoxCloneSyncService::new(handler)))
    }

    /// Makes an order of an event, unless that was done: then gives what the third party answered.
    async fn order(self, event: Event, client: Client, store: BoxStore) -> Result<String, MediationError> {
        const NO_LEASE: &str = "the receiver gave no lease";
        let Mediation {
            url,
            promise,
            lease,
            max_attempts,
        } = self;
        let event_lease = event.lease.ok_or_else(|| MediationError::Again(NO_LEASE.into()))?;
        let call = once(store, event_lease.id("order"))
            .with_lease(lease)
            .with_max_attempts(max_attempts);
        let call = match promise {
            Promise::AtMostOnce => call,
            Promise::ExactlyOnce => call.at_least_once(),
        };
        let done = call.run(move |attempt| send(client, url, event.payload, attempt)).await;
        match done {
            Ok(answer) => Ok(answer.into_value()),
            Err(OnceError::Failed(error)) => Err(error),
            Err(OnceError::Unknown(Some(error))) if promise == Promise::ExactlyOnce => Err(error),
            // It was made, and this is its answer: another event with this key would say so, too.
            Err(OnceError::Unrecorded { given, .. }) if promise == Promise::ExactlyOnce => Ok(*given),
            Err(error) if !error.may_have_happened() => Err(MediationError::Again(error.to_string().into())),
            Err(OnceError::InFlight { .. }) => Err(MediationError::Again("the call is made elsewhere".into())),
            Err(_) => Err(MediationError::Unknown),
        }
    }
}

/// Sends an order: repeatedly, where it has a key.
async fn send(client: Client, url: String, order: Bytes, attempt: Attempt) -> Result<String, Failure<MediationError>> {
    let request = Request::post(url).extension(attempt).body(Body::from(order));
    let request = request.map_err(|error| Failure::NotDone(MediationError::Again(error.into())))?;
    let response = client.oneshot(request).await.map_err(|failed| match failed.outcome {
        CallOutcome::NotTaken => Failure::NotDone(MediationError::Again(failed.error)),
        _ => Failure::Unknown(MediationError::Again(failed.error)),
    })?;
    let status = response.status();
    let outcome = response
        .extensions()
        .get()
        .map_or(CallOutcome::Unknown, CallReport::outcome);
    match outcome {
        CallOutcome::Responded if status.is_success() => {
            let body = reqwest::Response::from(response).text().await;
            body.map_err(|error| Failure::Unknown(MediationError::Again(error.into())))
        }
        CallOutcome::Responded => Err(Failure::NotDone(MediationError::Refused(status))),
        CallOutcome::NotTaken => Err(Failure::NotDone(MediationError::Again(status.to_string().into()))),
        _ => Err(Failure::Unknown(MediationError::Again(status.to_string().into()))),
    }
}

type Client = BoxCloneSyncService<Request<Body>, Response<Body>, Failed>;

/// A call without an answer.
struct Failed {
    error: Error,
    outcome: CallOutcome,
}

impl From<CallError<reqwest::Error>> for Failed {
    fn from(error: CallError<reqwest::Error>) -> Self {
        Self {
            outcome: error.outcome(),
            error: error.into(),
        }
    }
}

impl From<KeyPlacementError<CallError<reqwest::Error>>> for Failed {
    fn from(error: KeyPlacementError<CallError<reqwest::Error>>) -> Self {
        match error {
            KeyPlacementError::Service(error) => error.into(),
            error => Self {
                outcome: CallOutcome::NotTaken,
                error: error.into(),
            },
        }
    }
}

/// Gives a call its key, the same in all attempts by all processes, and repeats it; where no key is heeded, neither.
fn client(http: ReqwestService, promise: Promise) -> Client {
    let profile = ProviderProfile::draft();
    let policy = RetryPolicy::new(profile.clone()).with_max_attempts(3);
    let policy = policy
        .with_initial_backoff(Duration::from_millis(50))
        .with_max_backoff(Duration::from_secs(2));
    let calls = ServiceBuilder::new().layer(CallLayer::new(policy)).service(http);
    match promise {
        Promise::AtMostOnce => boxed(calls),
        Promise::ExactlyOnce => {
            let keys = KeyGenerator::from_fn(|request: Outgoing<'_>| {
                let attempt = request
                    .extensions
                    .get::<Attempt>()
                    .ok_or("no attempt to make a key of")?;
                Ok::<_, &str>(attempt.id("order"))
            });
            let keyed = IdempotencyKeyLayer::new(profile).with_maker(keys).layer(calls);
            boxed(keyed)
        }
    }
}

fn boxed<S>(service: S) -> Client
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + Sync + 'static,
    S::Error: Into<Failed> + 'static,
    S::Future: Send,
{
    BoxCloneSyncService::new(service.map_err(Into::into))
}

impl fmt::Display for MediationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Again(error) => write!(f, "no order yet: {error}"),
            Self::Refused(status) => write!(f, "the third party refused the order with {status}"),
            Self::Unknown => f.write_str("whether the order was made is not known"),
        }
    }
}

impl std::error::Error for MediationError {}
