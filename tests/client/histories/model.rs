//! The model of the client. It walks through the log of a history and decides at each place which
//! entry must come next, as the documentation of the layers promises.

use std::collections::HashMap;
use std::time::Duration;

use tower_idempotency::client::CallOutcome;

use super::party::{Entry, Got, Hop};
use super::plan::{Call, Calls, Event, Foreign, Keys, Plan, Target, Transport};

/// The effect of a request, or of several requests, as far as the client may know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// The server did not take the request.
    NotTaken,
    /// The server refused the request. A refusal says nothing about earlier requests.
    Refused,
    /// The server processed the call, at this request or at an earlier one.
    Done,
    Unknown,
}

/// The result of a request, an attempt or a call for the layer around it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    effect: Effect,
    /// `None` for an error.
    status: Option<u16>,
    retry_after: Option<Duration>,
    /// The head arrived, and its body breaks off.
    is_broken: bool,
    /// A layer has read the body, so its loss is an error.
    is_body_lost: bool,
}

/// The evidence of several attempts of one call.
#[derive(Default)]
struct Sum {
    is_lost: bool,
    is_done: bool,
    last: Option<Seen>,
}

impl Sum {
    fn add(&mut self, mut seen: Seen) {
        if self.is_done && seen.effect != Effect::Done {
            seen.effect = Effect::Unknown;
        }
        match seen.effect {
            Effect::Unknown => self.is_lost = true,
            Effect::Done => (self.is_lost, self.is_done) = (false, true),
            Effect::NotTaken | Effect::Refused => {}
        }
        self.last = Some(seen);
    }

    fn total(&self) -> Seen {
        let last = self.last.expect("a call has an attempt");
        let effect = if self.is_lost { Effect::Unknown } else { last.effect };
        Seen { effect, ..last }
    }
}

/// The record of an operation under a `OnceLayer`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Record {
    #[default]
    Free,
    Stored(u16),
    NotStored,
    Lost,
}

fn seen(event: Event) -> Seen {
    let (status, retry_after, is_broken) = match event {
        Event::NotConnected | Event::ResetBefore | Event::ResetAfter | Event::TimedOut => (None, None, false),
        Event::Redirect { status, .. } => (Some(status), None, false),
        Event::Respond {
            status,
            retry_after,
            is_broken,
        } => (Some(status), retry_after.map(Duration::from_secs), is_broken),
    };
    let effect = match (event, status) {
        (Event::NotConnected, _) | (_, Some(425 | 429)) => Effect::NotTaken,
        (_, None | Some(408 | 500 | 503)) => Effect::Unknown,
        (_, Some(409)) if retry_after.is_some() => Effect::Unknown,
        (_, Some(307 | 308 | 401 | 404 | 413)) => Effect::Refused,
        (_, Some(_)) => Effect::Done,
    };
    Seen {
        effect,
        status,
        retry_after,
        is_broken,
        is_body_lost: false,
    }
}

/// Whether a request with this event may have an effect at the third party. The client does not
/// always know it.
fn may_have_effect(event: Event) -> bool {
    match event {
        Event::NotConnected | Event::ResetBefore => false,
        event => matches!(seen(event).effect, Effect::Done | Effect::Unknown),
    }
}

struct Walk<'a> {
    plan: &'a Plan,
    log: &'a [Entry],
    at: usize,
    /// The time at which the next request must start.
    due: Duration,
    call: Call,
    /// The key of each operation.
    keys: HashMap<usize, String>,
}

pub(super) fn check(plan: &Plan, log: &[Entry]) -> Result<(), String> {
    let mut walk = Walk {
        plan,
        log,
        at: 0,
        due: Duration::ZERO,
        call: plan.calls[0],
        keys: HashMap::new(),
    };
    let mut records: HashMap<usize, Record> = HashMap::new();
    for (at, call) in plan.calls.iter().enumerate() {
        walk.call = *call;
        walk.due += call.pause;
        if plan.keys == Keys::Random {
            walk.keys.clear();
        }
        walk.next("a call", |entry| matches!(entry, Entry::Call(found) if *found == at))?;
        let got = walk.operation(records.entry(call.operation).or_default());
        let got = got.map_err(|violation| format!("call {at}: {violation}"))?;
        walk.next(
            &format!("{got:?}"),
            |entry| matches!(entry, Entry::Got(found) if *found == got),
        )?;
    }
    match log.get(walk.at) {
        Some(entry) => Err(format!("unexpected: {entry:?}")),
        None => effects(plan, log),
    }
}

/// Checks without the model that no call under a `OnceLayer` had two effects, and that a caller
/// that knows of no effect is right.
pub(super) fn effects(plan: &Plan, log: &[Entry]) -> Result<(), String> {
    let mut all: HashMap<usize, usize> = HashMap::new();
    let (mut operation, mut own) = (0, 0);
    for entry in log {
        match entry {
            Entry::Call(at) => (operation, own) = (plan.calls[*at].operation, 0),
            // The report of a `CallLayer` covers this call only.
            Entry::Round if plan.once.is_none() => own = 0,
            Entry::Hop(hop) if may_have_effect(hop.step.event) && !follows(plan, plan.calls[0].is_safe, hop) => {
                own += 1;
                *all.entry(operation).or_default() += 1;
            }
            Entry::Got(Got::NotTaken) if own > 0 => {
                return Err(format!("a call of operation {operation} is reported as not sent"));
            }
            _ => {}
        }
    }
    let is_once = plan
        .once
        .is_some_and(|once| !once.keys_are_honoured && !once.at_least_once);
    let repeats = plan.around.is_some() || plan.within.is_some();
    match all.iter().find(|(_, effects)| is_once && !repeats && **effects > 1) {
        Some((operation, effects)) => Err(format!("operation {operation} may have {effects} effects")),
        None => Ok(()),
    }
}

/// Returns whether the client follows the redirect of this request, if it is one.
fn follows(plan: &Plan, is_safe: bool, hop: &Hop) -> bool {
    let Event::Redirect { status, to } = hop.step.event else {
        return false;
    };
    // An unsafe request never leaves the origin, so only a redirect to the other host would.
    plan.redirects && (is_safe || (matches!(status, 307 | 308) && to != Target::Other))
}

fn is_repeated(foreign: Option<Foreign>, repeats: &mut u32, seen: Seen) -> Option<Duration> {
    let foreign = foreign?;
    let is_error = seen.status.is_none() || seen.is_body_lost;
    if (is_error || matches!(seen.status, Some(429 | 503))) && *repeats < foreign.repeats {
        *repeats += 1;
        return Some(foreign.pause);
    }
    None
}

impl Walk<'_> {
    fn next(&mut self, expected: &str, is_expected: impl Fn(&Entry) -> bool) -> Result<(), String> {
        let entry = self.log.get(self.at);
        if !entry.is_some_and(is_expected) {
            return Err(format!("entry {}: expected {expected}, found {entry:?}", self.at));
        }
        self.at += 1;
        Ok(())
    }

    /// Returns the result of a call for its caller.
    fn operation(&mut self, record: &mut Record) -> Result<Got, String> {
        let Some(once) = self.plan.once else {
            let seen = self.rounds(false)?;
            return Ok(match (seen.status, said(seen)) {
                (Some(status), _) if !seen.is_body_lost => Got::Response {
                    status,
                    is_replay: false,
                },
                (_, CallOutcome::NotTaken) => Got::NotTaken,
                (_, CallOutcome::Responded) => Got::Responded,
                (_, _) => Got::Unknown,
            });
        };
        match *record {
            Record::Stored(status) => {
                return Ok(Got::Response {
                    status,
                    is_replay: true,
                });
            }
            Record::NotStored => return Ok(Got::Responded),
            Record::Lost if !once.at_least_once => return Ok(Got::Unknown),
            Record::Lost | Record::Free => {}
        }
        let was_lost = *record == Record::Lost;
        let seen = self.rounds(!once.keys_are_honoured)?;
        let is_error = seen.status.is_none() || seen.is_body_lost;
        let loses_body = seen.is_body_lost || (seen.is_broken && seen.effect == Effect::Done);
        *record = match seen.effect {
            Effect::NotTaken | Effect::Refused => Record::Free,
            Effect::Done if loses_body && once.keys_are_honoured => Record::Lost,
            Effect::Done if loses_body => Record::NotStored,
            Effect::Done => Record::Stored(seen.status.expect("only a response shows an effect")),
            Effect::Unknown => Record::Lost,
        };
        let is_free = *record == Record::Free;
        // A lost attempt stays lost until a response settles its effect.
        if is_free && was_lost {
            *record = Record::Lost;
        }
        Ok(match seen.status {
            _ if is_error && is_free && !was_lost => Got::NotTaken,
            _ if is_error => Got::Unknown,
            _ if loses_body => Got::Responded,
            Some(status) => Got::Response {
                status,
                is_replay: false,
            },
            None => Got::Unknown,
        })
    }

    /// Walks through the calls that a foreign retry layer around the `CallLayer` makes.
    fn rounds(&mut self, only_unsent: bool) -> Result<Seen, String> {
        let Some(calls) = self.plan.calls_layer else {
            return self.attempt(false);
        };
        let (mut sum, mut repeats) = (Sum::default(), 0);
        loop {
            self.next("a call of the `CallLayer`", |entry| matches!(entry, Entry::Round))?;
            let (seen, attempts) = self.round(calls, only_unsent)?;
            let wanted = said(seen);
            self.next(&format!("{wanted:?} after {attempts} attempts"), |entry| {
                matches!(entry, Entry::Said { attempts: found, outcome } if *found == attempts && *outcome == wanted)
            })?;
            sum.add(seen);
            match is_repeated(self.plan.around, &mut repeats, seen) {
                Some(pause) => self.due += pause,
                // Without a `OnceLayer`, nothing knows of the calls before.
                None if self.plan.once.is_none() => return Ok(seen),
                None => return Ok(sum.total()),
            }
        }
    }

    /// Walks through the attempts of one call of the `CallLayer`.
    fn round(&mut self, calls: Calls, only_unsent: bool) -> Result<(Seen, u32), String> {
        let end = self.due + calls.horizon.min(calls.known);
        let (mut sum, mut attempts) = (Sum::default(), 0);
        loop {
            let seen = self.attempt(calls.collects)?;
            sum.add(seen);
            attempts += 1;
            let total = sum.total();
            let is_advised = seen.is_body_lost
                || match seen.status {
                    None => true,
                    Some(409) => seen.retry_after.is_some(),
                    Some(status) => matches!(status, 408 | 425 | 429 | 500 | 503),
                };
            let is_forbidden = only_unsent && total.effect != Effect::NotTaken;
            let next = self.due + seen.retry_after.unwrap_or_default();
            if !is_advised || is_forbidden || attempts == calls.max_attempts || next >= end {
                return Ok((total, attempts));
            }
            self.due = next;
        }
    }

    /// Walks through the requests of one attempt: redirects, and the repeats of a foreign retry
    /// layer.
    fn attempt(&mut self, collects: bool) -> Result<Seen, String> {
        self.next("an attempt", |entry| matches!(entry, Entry::Attempt))?;
        let (mut requests, mut repeats) = (0, 0);
        loop {
            let (mut has_left, mut is_away) = (false, false);
            let last = loop {
                let hop = self.hop(has_left, is_away)?;
                requests += 1;
                match hop.step.event {
                    Event::Redirect { to, .. } if follows(self.plan, self.call.is_safe, &hop) => {
                        is_away = match to {
                            Target::Home => false,
                            Target::Other => true,
                            Target::Relative => is_away,
                        };
                        has_left |= is_away;
                    }
                    event => break seen(event),
                }
            };
            if let Some(pause) = is_repeated(self.plan.within, &mut repeats, last) {
                self.due += pause;
                continue;
            }
            // A redirect policy cannot tell a repeat from a redirect, and `ReqwestService` can.
            let is_seen_as_redirect = repeats > 0 && self.plan.transport == Transport::Scripted;
            let effect = match last.status {
                _ if requests == 1 => last.effect,
                Some(_) if requests == repeats + 1 && !is_seen_as_redirect && last.effect == Effect::Done => {
                    Effect::Done
                }
                // Only a success and a redirect from the request's page show the effect.
                Some(200..=306) => Effect::Done,
                _ => Effect::Unknown,
            };
            return Ok(Seen {
                effect,
                is_body_lost: collects && last.is_broken,
                ..last
            });
        }
    }

    /// Walks over one request: its target, its key and its time.
    fn hop(&mut self, has_left: bool, is_away: bool) -> Result<Hop, String> {
        let Some(Entry::Hop(hop)) = self.log.get(self.at) else {
            return Err(format!(
                "entry {}: expected a request, found {:?}",
                self.at,
                self.log.get(self.at)
            ));
        };
        let found = |what: &str| Err(format!("entry {}: {what}: {hop:?}", self.at));
        if let Some(head) = &hop.head {
            if head.origin.contains("other") != is_away && self.plan.transport == Transport::Scripted {
                return found("the request went to the wrong host");
            }
            match &head.key {
                None if !has_left => return found("the request has no key"),
                Some(_) if has_left => return found("the key left its origin"),
                None => {}
                Some(key) => {
                    let known = self.keys.entry(self.call.operation).or_insert_with(|| key.clone());
                    if known != key {
                        return found("the key of the operation changed");
                    }
                    let mut others = self
                        .keys
                        .iter()
                        .filter(|(operation, _)| **operation != self.call.operation);
                    if others.any(|(_, other)| other == key) {
                        return found("two operations share a key");
                    }
                }
            }
        }
        if self.plan.transport == Transport::Scripted {
            if hop.at.abs_diff(self.due) > Duration::from_millis(30) {
                return found(&format!("the request was due at {:?}", self.due));
            }
            self.due = hop.at + hop.step.takes;
        }
        self.at += 1;
        Ok(hop.clone())
    }
}

/// Returns the report of a `CallLayer`.
fn said(seen: Seen) -> CallOutcome {
    let is_error = seen.status.is_none() || seen.is_body_lost;
    match seen.effect {
        Effect::NotTaken => CallOutcome::NotTaken,
        Effect::Refused if is_error => CallOutcome::NotTaken,
        Effect::Done | Effect::Refused => CallOutcome::Responded,
        Effect::Unknown => CallOutcome::Unknown,
    }
}
