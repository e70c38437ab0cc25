//! The layers of a plan.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::retry::budget::TpsBudget;
use tower::retry::{Policy, RetryLayer};
use tower::util::BoxCloneService;
use tower::{Layer, Service, ServiceExt};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_http::follow_redirect::policy::{PolicyExt, clone_body_fn};
use tower_idempotency::client::{
    CallError, CallLayer, CallOutcome, CallReport, ErrorClass, IdempotencyKeyLayer, KeyDeriver, KeyGenerator,
    KeyPlacementError, OnceError, OnceLayer, ProviderProfile, RetryPolicy, SameOriginKey,
};

use super::party::{Entry, Got, Log};
use super::plan::{Calls, Foreign, Keys, Once, Plan, Transport};
use crate::support::{AnyBody, RemoteStore};

type Sent = Request<Full<Bytes>>;
pub(super) type Client<E> = BoxCloneService<Sent, Response<AnyBody>, E>;

/// The error of a `CallLayer`, without the error of its client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    attempts: u32,
    outcome: CallOutcome,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

impl std::error::Error for Failed {}

impl<E> From<CallError<E>> for Failed {
    fn from(error: CallError<E>) -> Self {
        Self {
            attempts: error.attempts(),
            outcome: error.outcome(),
        }
    }
}

#[derive(Clone)]
struct Repeat(Foreign);

impl<E> Policy<Sent, Response<AnyBody>, E> for Repeat {
    type Future = tokio::time::Sleep;

    fn retry(&mut self, _: &mut Sent, result: &mut Result<Response<AnyBody>, E>) -> Option<Self::Future> {
        let is_repeated = match result {
            Ok(response) => matches!(response.status().as_u16(), 429 | 503),
            Err(_) => true,
        };
        if !is_repeated || self.0.repeats == 0 {
            return None;
        }
        self.0.repeats -= 1;
        Some(tokio::time::sleep(self.0.pause))
    }

    fn clone_request(&mut self, request: &Sent) -> Option<Sent> {
        Some(request.clone())
    }
}

fn boxed<S, E>(service: S) -> Client<E>
where
    S: Service<Sent, Response = Response<AnyBody>, Error = E, Future: Send> + Clone + Send + 'static,
{
    BoxCloneService::new(service)
}

fn repeated<E: Send + 'static>(foreign: Option<Foreign>, client: Client<E>) -> Client<E> {
    match foreign {
        Some(foreign) => boxed(RetryLayer::new(Repeat(foreign)).layer(client)),
        None => client,
    }
}

/// Drops each call that takes longer than the timeout.
fn limited(timeout: Option<Duration>, client: Client<Failed>) -> Client<Failed> {
    let Some(timeout) = timeout else { return client };
    let limited = tower::timeout::Timeout::new(client, timeout);
    boxed(limited.map_err(|error| match error.downcast::<Failed>() {
        Ok(failed) => *failed,
        Err(_) => Failed {
            attempts: 0,
            outcome: CallOutcome::Unknown,
        },
    }))
}

fn logged<E: 'static>(log: &Log, entry: Entry, client: Client<E>) -> Client<E> {
    let log = log.clone();
    boxed(client.map_request(move |request| {
        log.push(entry.clone());
        request
    }))
}

fn redirected<E: Send + 'static>(client: Client<E>) -> Client<E> {
    let policy = SameOriginKey::new(&ProviderProfile::draft())
        .and::<_, Full<Bytes>, E>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
    boxed(FollowRedirectLayer::with_policy(policy).layer(client))
}

fn called<E: std::fmt::Debug + Send + Sync + 'static>(
    calls: Calls,
    log: &Log,
    client: Client<E>,
    classify: Option<fn(&E) -> ErrorClass>,
) -> Client<Failed> {
    let mut policy = RetryPolicy::new(ProviderProfile::draft().with_retention(calls.known.div_f64(0.9)))
        .with_horizon(calls.horizon)
        .with_max_attempts(calls.max_attempts)
        .with_initial_backoff(Duration::ZERO)
        .with_budget(TpsBudget::new(Duration::from_secs(10), 1000, 1.0));
    if let Some(classify) = classify {
        policy = policy.with_errors(classify);
    }
    let layer = CallLayer::new(policy);
    let client = if calls.collects {
        boxed(layer.collect_responses().layer(client).map_err(Failed::from))
    } else {
        boxed(layer.layer(client).map_err(Failed::from))
    };
    let log = log.clone();
    boxed(client.map_result(move |result: Result<Response<AnyBody>, Failed>| {
        let (attempts, outcome) = match &result {
            Ok(response) => {
                let report = response.extensions().get::<CallReport>().unwrap();
                (report.attempts(), report.outcome())
            }
            Err(failed) => (failed.attempts, failed.outcome),
        };
        log.push(Entry::Said { attempts, outcome });
        result
    }))
}

fn once<E: std::fmt::Debug + Send + Sync + 'static>(
    once: Once,
    client: Client<E>,
    classify: Option<fn(&E) -> ErrorClass>,
) -> Client<Got> {
    let mut layer = OnceLayer::new(RemoteStore::new(), ProviderProfile::draft());
    if once.at_least_once {
        layer = layer.at_least_once();
    }
    if once.keys_are_honoured {
        layer = layer.assume_keys_honoured();
    }
    if let Some(classify) = classify {
        layer = layer.with_errors(classify);
    }
    boxed(layer.layer(client).map_err(|error| match error {
        OnceError::Failed(_) => Got::NotTaken,
        OnceError::NotStored => Got::Responded,
        OnceError::Unknown(_) => Got::Unknown,
        // The store works, and no two calls of an operation differ.
        _ => Got::Unexpected,
    }))
}

/// Puts the layers of the plan around a transport. `classify` is the application's classification
/// of the errors of the transport.
pub(super) fn client<E: std::fmt::Debug + Send + Sync + 'static>(
    plan: &Plan,
    log: &Log,
    transport: Client<E>,
    classify: Option<fn(&E) -> ErrorClass>,
) -> Client<KeyPlacementError<Got>> {
    let client = if plan.redirects && plan.transport == Transport::Scripted {
        redirected(transport)
    } else {
        transport
    };
    let client = logged(log, Entry::Attempt, repeated(plan.within, client));
    let client = match (plan.calls_layer, plan.once) {
        (Some(calls), layer) => {
            let client = logged(log, Entry::Round, called(calls, log, client, classify));
            let client = repeated(plan.around, limited(plan.timeout, client));
            match layer {
                Some(layer) => once(layer, client, None),
                None => boxed(client.map_err(|failed| match failed.outcome {
                    CallOutcome::NotTaken => Got::NotTaken,
                    CallOutcome::Responded => Got::Responded,
                    _ => Got::Unknown,
                })),
            }
        }
        (None, Some(layer)) => once(layer, client, classify),
        (None, None) => unreachable!("every plan has a layer of this crate"),
    };
    let keys = IdempotencyKeyLayer::new(ProviderProfile::draft());
    boxed(match plan.keys {
        Keys::Derived => keys
            .with_generator(KeyGenerator::derived(KeyDeriver::new(&[7; 32]).unwrap()))
            .layer(client),
        Keys::Caller | Keys::Random => keys.layer(client),
    })
}
