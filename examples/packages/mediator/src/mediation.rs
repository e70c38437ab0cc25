//! The handler: makes an order at the third party for each event.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use reqwest::Body;
use tower::util::BoxCloneSyncService;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::BoxStore;
use tower_idempotency::client::{
    Attempt, CallError, CallLayer, CallOutcome, CallReport, Failure, IdempotencyKeyLayer, KeyGenerator,
    KeyPlacementError, OnceError, Outgoing, ProviderProfile, ReqwestService, RetryPolicy, once,
};
use tower_idempotency::receiver::{HandlerErrorClass, Receipt, ReceiveError, Receiver, ReceiverLayer};

use crate::{Error, Event};

/// The guarantee, which depends on whether the third party supports keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// The third party ignores keys. An event whose call was lost becomes a dead letter, and an
    /// operator asks the third party about it.
    AtMostOnce,
    /// The third party deduplicates by key. The mediator repeats a lost call with the same key.
    ExactlyOnce,
}

/// The settings of the mediator.
#[derive(Clone, Debug)]
pub struct Mediation {
    /// The URL at which the third party takes orders.
    pub url: String,
    /// The guarantee that the third party makes possible.
    pub promise: Promise,
    /// The lease: how long after the last renewal other processes may take over a message.
    pub lease: Duration,
    /// The number of lost attempts after which the mediator tries an event no more.
    pub max_attempts: u32,
}

/// The reason why there is no order.
#[derive(Debug)]
pub enum MediationError {
    /// The call can be repeated, because it made no order or the third party recognizes the key.
    Again(Error),
    /// The third party refused the order with this status.
    Refused(StatusCode),
    /// Nobody knows whether the call made an order, and another call would not show it.
    Unknown,
}

/// A service of events that returns the response of the third party.
pub type Mediator = Receiver<BoxCloneSyncService<Event, String, MediationError>, BoxStore, Event>;

/// The result of a delivery.
pub type Received = Result<Receipt<String>, ReceiveError<MediationError>>;

/// Returns the class of an error. Another delivery helps only if the error can go away.
fn class_of(error: &MediationError) -> HandlerErrorClass {
    match error {
        MediationError::Again(_) => HandlerErrorClass::Redeliver,
        MediationError::Refused(_) | MediationError::Unknown => HandlerErrorClass::Reject,
    }
}

impl Mediation {
    /// Creates a service that makes one order for each event, and records it in `store`.
    ///
    /// # Errors
    ///
    /// Fails if the HTTP client cannot be built.
    pub fn over(self, store: BoxStore) -> Result<Mediator, Error> {
        let receiver = ReceiverLayer::new(store.clone(), "mediator")
            .with_id(|event: &Event| event.id.clone())
            .with_payload(|event| &event.payload)
            .pass_lease(|event: &mut Event, lease| event.lease = Some(lease))
            .with_error_class(class_of)
            .with_lease(self.lease)
            .with_max_attempts(self.max_attempts)
            // The handler may run again for the same event, because `once` in it guards the call.
            .at_least_once();
        let http = ReqwestService::build(reqwest::Client::builder().timeout(Duration::from_secs(10)))?;
        let client = client(http, self.promise);
        let handler = service_fn(move |event| {
            let (mediation, client, store) = (self.clone(), client.clone(), store.clone());
            async move { mediation.order(event, client, store).await }
        });
        Ok(receiver.layer(BoxCloneSyncService::new(handler)))
    }

    /// Makes an order for an event. If the order was made earlier, returns the recorded response of
    /// the third party.
    async fn order(self, event: Event, client: Client, store: BoxStore) -> Result<String, MediationError> {
        const NO_LEASE: &str = "the event has no lease; configure the receiver with `pass_lease`";
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
            Ok(order) => Ok(order.into_value()),
            Err(OnceError::Failed(error)) => Err(error),
            Err(OnceError::Unknown(Some(error))) if promise == Promise::ExactlyOnce => Err(error),
            // The call was made, and this is its response, although the store did not record it. A
            // repeated call with this key would return the same response.
            Err(OnceError::Unrecorded { output, .. }) if promise == Promise::ExactlyOnce => Ok(*output),
            Err(error) if !error.may_have_happened() => Err(MediationError::Again(error.to_string().into())),
            Err(OnceError::InFlight { .. }) => Err(MediationError::Again("another process makes the call".into())),
            Err(_) => Err(MediationError::Unknown),
        }
    }
}

/// Sends an order. The client repeats the request only if it has a key.
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

/// A call without a response.
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

/// Returns a client for the third party. If the third party supports keys, the client adds a key,
/// which is the same in all attempts of all processes, and repeats the request. Otherwise it does
/// neither.
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
                    .ok_or("the request has no `Attempt`, so there is no key")?;
                Ok::<_, &str>(attempt.id("order"))
            });
            let keyed = IdempotencyKeyLayer::new(profile).with_generator(keys).layer(calls);
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
            Self::Unknown => f.write_str("nobody knows whether the order was made; ask the third party"),
        }
    }
}

impl std::error::Error for MediationError {}
