//! The third party that the handlers call, in the process of the test. No fault reaches it, so it
//! forgets nothing. It also records the history.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::post;

use crate::broker::{self, Broker};
use crate::checks::{Evidence, KeyHistory, Run, Seen};
use crate::support::Timer;

/// The guarantee that the application asks for, with a handler that fits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The bank offers nothing. The layer refuses requests after a lost attempt.
    Refuse,
    /// The bank deduplicates by the derived key, and lost attempts run again.
    Derived,
    /// The bank refuses lower fences and can be asked. A check decides about lost attempts.
    Recover,
    /// The effect is a row in the database, in one transaction with the response.
    Transaction,
    /// The same, and a message in the outbox, in the same transaction. Consumers handle the message
    /// in transactions of their own.
    Message,
}

impl Mode {
    pub(crate) const WITHOUT_TRANSACTIONS: [Self; 3] = [Self::Refuse, Self::Derived, Self::Recover];
    pub(crate) const WITHOUT_MESSAGES: [Self; 4] = [Self::Refuse, Self::Derived, Self::Recover, Self::Transaction];
    const ALL: [Self; 5] = [
        Self::Refuse,
        Self::Derived,
        Self::Recover,
        Self::Transaction,
        Self::Message,
    ];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.to_string() == name);
        found.ok_or_else(|| format!("no mode: {name}"))
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Fault(String),
    Sent { process: usize, is_other_body: bool },
    Left,
    Began { process: usize, attempt: u32, fence: u64 },
    Failed { fence: u64 },
    Charged { receipt: u64 },
    Refused { fence: u64 },
    Found { receipt: Option<u64> },
    Published { id: String, payload: String },
    Delivered { consumer: String, delivery: u64 },
    Acknowledged { delivery: u64 },
    Responded(Seen),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(what) => write!(f, "FAULT {what}"),
            Self::Sent { process, is_other_body } => {
                let body = if *is_other_body { "the other body" } else { "the body" };
                write!(f, "a client sends {body} to process {process}")
            }
            Self::Left => f.write_str("a client leaves, or its connection breaks"),
            Self::Began {
                process,
                attempt,
                fence,
            } => write!(
                f,
                "process {process} runs the handler: attempt {attempt}, fence {fence}"
            ),
            Self::Failed { fence } => write!(f, "the handler with fence {fence} fails without an effect"),
            Self::Charged { receipt } => write!(f, "EFFECT {receipt}"),
            Self::Refused { fence } => write!(f, "the bank refuses fence {fence}"),
            Self::Found { receipt: Some(receipt) } => write!(f, "a check finds effect {receipt}"),
            Self::Found { receipt: None } => f.write_str("a check finds no effect"),
            Self::Published { id, payload } => write!(f, "a relay publishes message {id}: {payload}"),
            Self::Delivered { consumer, delivery } => write!(f, "delivery {delivery} goes to the consumer {consumer}"),
            Self::Acknowledged { delivery } => write!(f, "delivery {delivery} is acknowledged"),
            Self::Responded(Seen { status, code, body, .. }) if code.is_empty() => {
                write!(f, "a client gets {status}: {body}")
            }
            Self::Responded(Seen { status, code, .. }) => write!(f, "a client gets {status} {code}"),
        }
    }
}

/// The key of an event, or `None` for a fault, which concerns all keys.
type Key = Option<usize>;

#[derive(Default)]
struct Books {
    history: Vec<(Duration, Key, Event)>,
    /// The key and the derived key of each effect.
    effects: Vec<(usize, String)>,
    lowest: HashMap<String, u64>,
}

#[derive(Clone)]
pub(crate) struct Bank {
    timer: Arc<Timer>,
    books: Arc<Mutex<Books>>,
    pub(crate) broker: Broker,
}

impl Bank {
    /// Opens the bank on a port, and returns its address.
    pub(crate) async fn open() -> (Self, SocketAddr) {
        let bank = Self {
            timer: Arc::new(Timer::start()),
            books: Arc::default(),
            broker: Broker::default(),
        };
        let router = Router::new()
            .route("/began/{key}/{process}/{attempt}/{fence}", post(began))
            .route("/failed/{key}/{fence}", post(failed))
            .route("/charge/{mode}/{key}/{id}/{fence}", post(charge))
            .route("/find/{key}/{id}/{fence}", post(find))
            .merge(broker::router())
            .with_state(bank.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        (bank, address)
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap()
    }

    pub(crate) fn note(&self, key: Key, event: Event) {
        self.books().history.push((self.timer.elapsed(), key, event));
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.timer.elapsed()
    }

    pub(crate) fn count(&self, is_counted: impl Fn(&Event) -> bool) -> usize {
        let books = self.books();
        books.history.iter().filter(|(_, _, event)| is_counted(event)).count()
    }

    /// Returns the events of each key in their order.
    pub(crate) fn by_key(&self, keys: usize) -> Vec<Vec<Event>> {
        let mut events = vec![Vec::new(); keys];
        for (_, key, event) in &self.books().history {
            if let Some(key) = key {
                events[*key].push(event.clone());
            }
        }
        events
    }

    /// Returns the history of a key as a text, with the faults.
    pub(crate) fn text(&self, key: usize) -> String {
        let books = self.books();
        let its = books
            .history
            .iter()
            .filter(|(_, of, _)| *of == Some(key))
            .map(|(at, ..)| *at);
        let (Some(first), Some(last)) = (its.clone().min(), its.max()) else {
            return String::new();
        };
        let near = Duration::from_secs(3);
        let shown = books.history.iter().filter(|(at, of, _)| match of {
            Some(of) => *of == key,
            None => *at + near >= first && *at <= last + near,
        });
        let lines = shown.map(|(at, _, event)| format!("{:>8.3} s  {event}\n", at.as_secs_f64()));
        lines.collect()
    }
}

/// Collects the facts about a key for the checks.
pub(crate) fn history_of(mode: Mode, events: &[Event], rows: &[u64], evidence: Evidence) -> KeyHistory {
    let mut history = KeyHistory {
        runs_again: mode != Mode::Refuse,
        sent: Vec::new(),
        runs: Vec::new(),
        effects: rows.to_vec(),
        seen: Vec::new(),
        evidence,
    };
    for event in events {
        match event {
            Event::Sent { is_other_body, .. } => history.sent.push(*is_other_body),
            Event::Began { attempt, fence, .. } => history.runs.push(Run {
                attempt: *attempt,
                fence: *fence,
                had_no_effect: false,
            }),
            Event::Failed { fence } => {
                let failed = history.runs.iter_mut().find(|run| run.fence == *fence);
                failed.expect("a run that began").had_no_effect = true;
            }
            Event::Charged { receipt } => history.effects.push(*receipt),
            Event::Responded(seen) => history.seen.push(seen.clone()),
            _ => {}
        }
    }
    history
}

async fn began(State(bank): State<Bank>, Path((key, process, attempt, fence)): Path<(usize, usize, u32, u64)>) {
    let event = Event::Began {
        process,
        attempt,
        fence,
    };
    bank.note(Some(key), event);
}

async fn failed(State(bank): State<Bank>, Path((key, fence)): Path<(usize, u64)>) {
    bank.note(Some(key), Event::Failed { fence });
}

impl Books {
    /// Returns the number of the effect under a derived key.
    fn receipt(&self, id: &str) -> Option<u64> {
        let at = self.effects.iter().position(|(_, of)| of == id)?;
        Some(u64::try_from(at).unwrap() + 1)
    }
}

/// Charges once more, unless the bank deduplicates by the derived key or refuses the fence.
async fn charge(
    State(bank): State<Bank>,
    Path((mode, key, id, fence)): Path<(String, usize, String, u64)>,
) -> (StatusCode, String) {
    let mut books = bank.books();
    let event = match books.receipt(&id) {
        _ if fence < books.lowest.get(&id).copied().unwrap_or(0) => Event::Refused { fence },
        Some(receipt) if mode.parse() == Ok(Mode::Derived) => return (StatusCode::OK, receipt.to_string()),
        _ => {
            books.effects.push((key, id));
            let receipt = u64::try_from(books.effects.len()).unwrap();
            Event::Charged { receipt }
        }
    };
    books.history.push((bank.timer.elapsed(), Some(key), event.clone()));
    match event {
        Event::Charged { receipt } => (StatusCode::OK, receipt.to_string()),
        _ => (StatusCode::CONFLICT, String::new()),
    }
}

/// Refuses lower fences from now on, and returns the receipt of the charge, if there is one.
async fn find(State(bank): State<Bank>, Path((key, id, fence)): Path<(usize, String, u64)>) -> String {
    let mut books = bank.books();
    let lowest = books.lowest.entry(id.clone()).or_default();
    *lowest = fence.max(*lowest);
    let receipt = books.receipt(&id);
    books
        .history
        .push((bank.timer.elapsed(), Some(key), Event::Found { receipt }));
    receipt.map(|receipt| receipt.to_string()).unwrap_or_default()
}
