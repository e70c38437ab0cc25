//! The third party under paused time, and the log of a history.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::util::BoxCloneService;
use tower_idempotency::client::{CallOutcome, ErrorClass};

use super::plan::{Event, HOME, OTHER, Plan, Step, Target};
use super::stack::Client;
use crate::support::{AnyBody, Play, Timer, frames};

/// A request that reached the transport.
#[derive(Clone, Debug)]
pub(super) struct Hop {
    pub(super) step: Step,
    pub(super) at: Duration,
    /// `None` if the connection was not made, or broke before the request was sent.
    pub(super) head: Option<Head>,
}

#[derive(Clone, Debug)]
pub(super) struct Head {
    /// The scheme and the authority of its target.
    pub(super) origin: String,
    pub(super) key: Option<String>,
}

/// The result of a call for its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Got {
    Response {
        status: u16,
        is_replay: bool,
    },
    /// The call had no effect.
    NotTaken,
    /// The call was made, and its response is lost.
    Responded,
    Unknown,
    /// An error that no history should cause.
    Unexpected,
}

#[derive(Clone, Debug)]
pub(super) enum Entry {
    Call(usize),
    /// A call enters the `CallLayer`.
    Round,
    /// The `CallLayer`, or the `OnceLayer` without one, sends an attempt.
    Attempt,
    Hop(Hop),
    /// The report of the `CallLayer`.
    Said {
        attempts: u32,
        outcome: CallOutcome,
    },
    Got(Got),
}

#[derive(Clone)]
pub(super) struct Log(Arc<(Timer, Mutex<Vec<Entry>>)>);

impl Log {
    pub(super) fn new(timer: Timer) -> Self {
        Self(Arc::new((timer, Mutex::default())))
    }

    pub(super) fn push(&self, entry: Entry) {
        self.0.1.lock().unwrap().push(entry);
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        self.0.1.lock().unwrap().clone()
    }

    /// Returns the step of the plan for the next request. Requests beyond the plan succeed.
    pub(super) fn next(&self, plan: &Plan) -> Step {
        const SUCCESS: Step = Step {
            event: Event::Respond {
                status: 201,
                retry_after: None,
                is_broken: false,
            },
            takes: Duration::ZERO,
        };
        let entries = self.0.1.lock().unwrap();
        let hops = entries.iter().filter(|entry| matches!(entry, Entry::Hop(_))).count();
        plan.steps.get(hops).copied().unwrap_or(SUCCESS)
    }

    pub(super) fn hop(&self, step: Step, head: Option<Head>) {
        let at = self.0.0.elapsed();
        self.push(Entry::Hop(Hop { step, at, head }));
    }
}

/// An error of the scripted transport.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trouble {
    NotSent,
    Lost,
}

impl Trouble {
    pub(super) fn class(&self) -> ErrorClass {
        match self {
            Self::NotSent => ErrorClass::NotSent,
            Self::Lost => ErrorClass::Lost,
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl std::error::Error for Trouble {}

pub(super) fn location(to: Target, home: &str, other: &str) -> String {
    match to {
        Target::Home => format!("{home}/moved"),
        Target::Other => format!("{other}/moved"),
        Target::Relative => "/elsewhere".to_owned(),
    }
}

fn act(event: Event) -> Result<Response<AnyBody>, Trouble> {
    let (status, retry_after, is_broken, to) = match event {
        Event::NotConnected => return Err(Trouble::NotSent),
        Event::ResetBefore | Event::ResetAfter | Event::TimedOut => return Err(Trouble::Lost),
        Event::Respond {
            status,
            retry_after,
            is_broken,
        } => (status, retry_after, is_broken, None),
        Event::Redirect { status, to } => (status, None, false, Some(to)),
    };
    let mut response = Response::builder().status(status);
    if let Some(seconds) = retry_after {
        response = response.header("retry-after", seconds);
    }
    if let Some(to) = to {
        response = response.header("location", location(to, HOME, OTHER));
    }
    let end = is_broken.then_some(Play::Break);
    let body = [Play::Data("ok")].into_iter().chain(end).collect();
    Ok(response.body(frames(body)).unwrap())
}

/// A client that acts as the plan says.
pub(super) fn scripted(plan: &Plan, log: &Log) -> Client<Trouble> {
    let (plan, log) = (plan.clone(), log.clone());
    BoxCloneService::new(tower::service_fn(move |request: Request<Full<Bytes>>| {
        let (plan, log) = (plan.clone(), log.clone());
        async move {
            let (uri, key) = (request.uri(), request.headers().get("idempotency-key"));
            let origin = format!("{}://{}", uri.scheme_str().unwrap(), uri.authority().unwrap());
            let key = key.map(|key| key.to_str().unwrap().to_owned());
            let step = log.next(&plan);
            log.hop(step, Some(Head { origin, key }));
            tokio::time::sleep(step.takes).await;
            act(step.event)
        }
    }))
}
