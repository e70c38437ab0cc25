//! The history of a simulation, for the checks and for people.

use std::fmt;
use std::time::Duration;

use crate::link::Answer;
use crate::plan::Planned;

#[derive(Clone, Debug)]
pub(crate) enum Event {
    FaultBegins(Planned),
    FaultEnds(Planned),
    Sent {
        operation: usize,
        key: usize,
        process: usize,
        is_other_body: bool,
    },
    Left {
        operation: usize,
    },
    Reset {
        operation: usize,
    },
    Began {
        key: usize,
        process: usize,
        /// The number of the request that runs the handler.
        request: usize,
        attempt: u32,
        fence: u64,
    },
    Failed {
        key: usize,
        attempt: u32,
        had_no_effect: bool,
    },
    Resolved {
        key: usize,
        receipt: usize,
    },
    /// The store refused the request of an operator.
    NotResolved {
        key: usize,
    },
    /// An operator found that there was no effect, and that there will be none.
    Freed {
        key: usize,
    },
    /// The handler of a message, or an operator, rejected the key for good.
    Rejected {
        key: usize,
        by: &'static str,
    },
    Killed {
        process: usize,
    },
    /// The retention of the record is over.
    Expired {
        key: usize,
    },
    Charged {
        key: usize,
        effects: usize,
    },
    Refused {
        key: usize,
    },
    Recovered {
        key: usize,
        found: &'static str,
    },
    Responded {
        operation: usize,
        key: usize,
        answer: Answer,
    },
    Granted {
        key: usize,
        process: usize,
        incarnation: usize,
        attempt: u32,
        fence: u64,
    },
    /// A failover lost a grant that no process had seen.
    GrantLost {
        key: usize,
        fence: u64,
    },
    Quiet,
}

fn effect(had_none: bool) -> &'static str {
    match had_none {
        true => "without an effect",
        false => "and may have had an effect",
    }
}

fn body(is_other: bool) -> &'static str {
    match is_other {
        true => "ANOTHER BODY",
        false => "a request",
    }
}

impl Event {
    fn fmt_client(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sent {
                operation,
                key,
                process,
                is_other_body,
            } => {
                let body = body(*is_other_body);
                write!(
                    f,
                    "client {operation} sends {body} under key {key} to process {process}"
                )
            }
            Self::Left { operation } => write!(f, "client {operation} leaves"),
            Self::Reset { operation } => write!(f, "client {operation} sees a broken connection"),
            Self::Responded { operation, key, answer } => {
                let replay = if answer.is_replay { ", replayed" } else { "" };
                write!(
                    f,
                    "client {operation} gets {} {}{}{replay} for key {key}",
                    answer.status,
                    answer.code,
                    answer.body.trim_end()
                )
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FaultBegins(planned) => write!(f, "FAULT begins: {planned}"),
            Self::FaultEnds(planned) => write!(f, "FAULT ends: {:?}", planned.fault),
            Self::Sent { .. } | Self::Left { .. } | Self::Reset { .. } | Self::Responded { .. } => self.fmt_client(f),
            Self::Began {
                key,
                process,
                attempt,
                fence,
                ..
            } => {
                write!(
                    f,
                    "process {process} runs the handler of key {key}: attempt {attempt}, fence {fence}"
                )
            }
            Self::Failed {
                key,
                attempt,
                had_no_effect,
            } => {
                let effect = effect(*had_no_effect);
                write!(f, "the handler of key {key} fails in attempt {attempt} {effect}")
            }
            Self::Resolved { key, receipt } => {
                write!(f, "an operator asks to resolve key {key} with receipt {receipt}")
            }
            Self::NotResolved { key } => {
                write!(
                    f,
                    "the store refuses the operator: key {key} is completed, or has a live or another owner"
                )
            }
            Self::Freed { key } => write!(f, "an operator frees key {key}"),
            Self::Rejected { key, by } => write!(f, "{by} rejects key {key} for good"),
            Self::Killed { process } => write!(f, "process {process} is killed"),
            Self::Expired { key } => write!(f, "the record of key {key} expires"),
            Self::Charged { key, effects } => write!(f, "EFFECT {effects} of key {key}"),
            Self::Refused { key } => write!(f, "the bank refuses a fence of key {key}"),
            Self::Recovered { key, found } => write!(f, "the check of key {key} finds: {found}"),
            Self::Granted {
                key,
                process,
                incarnation,
                attempt,
                fence,
            } => {
                write!(
                    f,
                    "the store grants key {key} to process {process} (restarts: {incarnation}): attempt {attempt}, fence {fence}"
                )
            }
            Self::GrantLost { key, fence } => write!(f, "the store loses its unseen grant of key {key}, fence {fence}"),
            Self::Quiet => f.write_str("from here on, there are no faults"),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct History(pub(crate) Vec<(Duration, Event)>);

impl History {
    /// Returns the last response to an operation.
    pub(crate) fn last_answer(&self, operation: usize) -> Option<Answer> {
        self.0.iter().rev().find_map(|(_, event)| match event {
            Event::Responded {
                operation: of, answer, ..
            } if *of == operation => Some(answer.clone()),
            _ => None,
        })
    }

    pub(crate) fn note(&mut self, at: Duration, event: Event) {
        self.0.push((at, event));
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, event) in &self.0 {
            writeln!(f, "{:>8.3} s  {event}", at.as_secs_f64())?;
        }
        Ok(())
    }
}
