//! The model of a program: the responses that its callers may get, and the record and the rows that
//! it may leave.

use axum::http::StatusCode;
use bytes::Bytes;
use tower_idempotency::ErrorKind;
use tower_idempotency::protocol::{Outcome, Status};

use super::plan::{Completion, End, Ending, Form, Plan, Shape};
use super::{ELSEWHERE, Got, History, Ran, Reply, Stepped, Tried, elsewhere, made, other, reply};

pub(super) fn check(plan: &Plan, history: &History) -> Result<(), String> {
    let model = Model { plan, history };
    model.check_rows()?;
    model.check_runs()?;
    model.check_record()?;
    model.check_groups()?;
    model.check_replies()?;
    model.check_callers()
}

/// The part of a program that made a response.
#[derive(Clone, Copy, Debug)]
enum Author {
    /// Another attempt, which took the key over during this run.
    Elsewhere(usize),
    /// A transaction: the numbers of its run and its step.
    Made(usize, usize),
    /// The handler, beside the transactions of this run.
    Other(usize),
}

struct Model<'a> {
    plan: &'a Plan,
    history: &'a History,
}

/// Fails with a text, unless the condition is true.
fn ensure(condition: bool, violation: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(violation()) }
}

fn reports_effect(status: u16) -> bool {
    let status = StatusCode::from_u16(status).unwrap();
    status.is_success() || status.is_redirection()
}

/// Whether the layer sent a completion to the store. It refuses some responses before.
fn has_begun(step: &Stepped) -> bool {
    !matches!(step.tried, Tried::Nothing | Tried::Failed(ErrorKind::Configuration))
}

impl Model<'_> {
    fn runs(&self) -> impl Iterator<Item = (usize, &Ran)> {
        self.history.runs.iter().enumerate()
    }

    fn steps(&self) -> impl Iterator<Item = (usize, usize, &Stepped)> {
        self.runs()
            .flat_map(|(run, ran)| ran.steps.iter().enumerate().map(move |(step, done)| (run, step, done)))
    }

    fn completion(&self, run: usize, step: usize) -> Option<&Completion> {
        self.plan.run(run).steps[step].completion.as_ref()
    }

    fn has_row(&self, run: usize, step: usize) -> bool {
        self.history.rows.contains(&made(run, step))
    }

    /// Whether the lease of any run ended while its handler ran.
    fn is_disturbed(&self) -> bool {
        self.history.runs.iter().any(|run| run.is_disturbed)
    }

    /// Returns the outcome of the key.
    fn outcome(&self) -> Option<&Outcome> {
        match self.history.records.last()? {
            Some(Status::Completed(outcome)) => Some(outcome),
            _ => None,
        }
    }

    fn stored_body(&self) -> Option<&Bytes> {
        match self.outcome()? {
            Outcome::Stored(stored) => Some(&stored.body),
            _ => None,
        }
    }

    fn is_tombstone(&self) -> bool {
        self.outcome() == Some(&Outcome::Tombstone)
    }

    fn authors(&self) -> impl Iterator<Item = Author> {
        let of_runs = self
            .runs()
            .flat_map(|(run, _)| [Author::Elsewhere(run), Author::Other(run)]);
        of_runs.chain(self.steps().map(|(run, step, _)| Author::Made(run, step)))
    }

    /// Returns the response of an author, and its form.
    fn reply(&self, author: Author) -> Option<(Reply, Form)> {
        let (name, shape): (String, Shape) = match author {
            Author::Elsewhere(run) => (elsewhere(run), ELSEWHERE),
            Author::Made(run, step) => (made(run, step), self.completion(run, step)?.shape),
            Author::Other(run) => match self.plan.run(run).end {
                End::Other(shape) => (other(run), shape),
                _ => return None,
            },
        };
        Some((reply(self.plan, name, shape), shape.form))
    }

    /// Returns the author whose name a response has.
    fn author_of(&self, reply: &Reply) -> Option<(Author, Reply, Form)> {
        self.authors().find_map(|author| {
            let (made, form) = self.reply(author)?;
            (made.author == reply.author).then_some((author, made, form))
        })
    }

    /// Whether the record has the outcome of this transaction, and the transaction is committed.
    fn is_recorded(&self, run: usize, step: usize) -> bool {
        let done = &self.history.runs[run].steps[step];
        let may_count = matches!(done.tried, Tried::Completed | Tried::Dropped) && self.has_row(run, step);
        may_count
            && self
                .reply(Author::Made(run, step))
                .is_some_and(|(made, form)| match form {
                    Form::OutcomeOnly => self.is_tombstone(),
                    _ => self.stored_body() == Some(&made.body),
                })
    }

    /// Whether the handler returned the response that it had committed.
    fn returns_recorded(&self, run: usize) -> bool {
        let End::Made(step) = self.plan.run(run).end else {
            return false;
        };
        let steps = &self.history.runs[run].steps;
        // A later completion that was dropped may be the one in the record, as far as the layer knows.
        let is_last = !steps[step + 1..].iter().any(|later| later.tried == Tried::Dropped);
        is_last && steps[step].tried == Tried::Completed && self.is_recorded(run, step)
    }

    /// Whether the layer answered before this transaction was committed. Another request had found the
    /// lease over and refused to run, so the outcome counted as unknown, and the layer did not wait
    /// for the transaction. The docs ask handlers to end their transactions before they return.
    fn is_late(&self, run: usize, step: usize) -> bool {
        let ran = &self.history.runs[run];
        let commits_later = matches!(self.plan.run(run).steps[step].ending, Ending::CommitLater(_));
        let is_unknown = self.history.records.last() == Some(&Some(Status::Unknown));
        commits_later && is_unknown && ran.is_disturbed && ran.takeover.is_none()
    }

    fn has_recorded(&self, run: usize) -> bool {
        (0..self.history.runs[run].steps.len()).any(|step| self.is_recorded(run, step))
    }

    /// Whether a response that the handler made beside its transactions may count: no transaction
    /// of the run completed the key, no other attempt took it over, and the response neither
    /// contradicts a rollback nor may report a failed completion.
    fn may_count(&self, run: usize, status: u16) -> bool {
        let ran = &self.history.runs[run];
        let begun: Vec<&Stepped> = ran.steps.iter().filter(|step| has_begun(step)).collect();
        let last_failed = begun.last().is_some_and(|step| step.tried != Tried::Completed);
        let contradicts = !begun.is_empty() && (last_failed || reports_effect(status));
        ran.takeover.is_none() && !self.has_recorded(run) && !contradicts
    }

    /// Whether the record may have a response of this author, and a caller may get it.
    fn may_store(&self, author: Author, status: u16) -> bool {
        match author {
            Author::Elsewhere(run) => self.history.runs[run].takeover.is_some_and(|other| other.completes),
            Author::Made(run, step) if has_begun(&self.history.runs[run].steps[step]) => self.is_recorded(run, step),
            Author::Made(run, _) | Author::Other(run) => self.may_count(run, status),
        }
    }

    /// Whether another attempt took the key over during the run of this author, and released it. The
    /// layer cannot tell this from a release of its own.
    fn was_released(&self, author: Author) -> bool {
        let (Author::Elsewhere(run) | Author::Made(run, _) | Author::Other(run)) = author;
        self.history.runs[run].takeover.is_some_and(|other| !other.completes)
    }

    /// A transaction has its row if and only if it was committed. If it also completed the key, the
    /// record has its response.
    fn check_rows(&self) -> Result<(), String> {
        for (run, step, done) in self.steps() {
            let (name, has_row) = (made(run, step), self.has_row(run, step));
            if done.tried != Tried::Dropped || !done.commits {
                ensure(has_row == done.commits, || {
                    format!("the row of {name}: {has_row}, although its commit: {}", done.commits)
                })?;
            }
            if done.tried == Tried::Completed && has_row {
                ensure(self.is_recorded(run, step) || self.is_late(run, step), || {
                    format!("{name} is committed, and the record does not have its outcome")
                })?;
            }
        }
        let completed = self.steps().filter(|(run, step, done)| {
            let (run, step) = (*run, *step);
            done.tried == Tried::Completed && self.has_row(run, step)
        });
        ensure(completed.count() <= 1, || {
            "several transactions completed the key".to_owned()
        })
    }

    fn check_runs(&self) -> Result<(), String> {
        let last = self.history.runs.len() - 1;
        for (run, ran) in self.runs() {
            ensure(!ran.overlaps || self.is_disturbed(), || {
                format!("run {run} began while another one ran")
            })?;
            let has_completed = self.has_committed(run) || ran.takeover.is_some_and(|other| other.completes);
            ensure(run == last || !has_completed, || {
                format!("the handler ran again after run {run} had completed the key")
            })?;
        }
        Ok(())
    }

    /// Whether a transaction of this run has certainly completed the key.
    fn has_committed(&self, run: usize) -> bool {
        let steps = self.history.runs[run].steps.iter().enumerate();
        let mut completed = steps.filter(|(_, done)| done.tried == Tried::Completed);
        completed.any(|(step, _)| self.has_row(run, step))
    }

    /// The record has the outcome of an author that may have one.
    fn check_record(&self) -> Result<(), String> {
        let stored = match self.outcome() {
            None => return Ok(()),
            Some(Outcome::Tombstone) => {
                let mut authors = self.authors();
                let may_count = authors.any(|author| {
                    let reply = self.reply(author).filter(|(_, form)| *form != Form::Plain);
                    reply.is_some_and(|(reply, _)| self.may_store(author, reply.status))
                });
                return ensure(may_count, || "the record is completed by no response".to_owned());
            }
            Some(Outcome::Stored(stored)) => stored,
            Some(outcome) => return Err(format!("the record has the outcome {outcome:?}")),
        };
        let author = self.authors().find_map(|author| {
            let (reply, _) = self.reply(author)?;
            (reply.body == stored.body).then_some((author, reply))
        });
        match author {
            Some((author, reply)) => ensure(self.may_store(author, reply.status), || {
                format!("the record has the response {author:?}, which must not be stored")
            }),
            None => ensure(self.plan.stores_failures() || self.plan.is_for_webhooks, || {
                format!("the record has the response {:?} of the layer", stored.body)
            }),
        }
    }

    /// After a group of requests, the key is completed or free. Once it is completed, it stays so,
    /// and all later requests get its outcome.
    fn check_groups(&self) -> Result<(), String> {
        let mut got = self.history.got.iter();
        let mut before = None;
        for (group, record) in self.history.records.iter().enumerate() {
            let requests = self.plan.groups[group].len();
            for got in got.by_ref().take(requests) {
                // Under the settings for webhooks, no request waits for another one.
                let is_refused = requests > 1 && self.plan.is_for_webhooks && is_outstanding(got);
                ensure(is_refused || self.follows(before, got), || {
                    format!("a request of group {group} got {got:?} after {before:?}")
                })?;
            }
            if let Some(completed) = before {
                ensure(record.as_ref() == Some(completed), || {
                    format!("the record was {completed:?}, and is {record:?} after group {group}")
                })?;
            }
            let is_completed = matches!(record, Some(Status::Completed(_)));
            let is_free = record.is_none() || self.plan.gives_up() || self.is_disturbed();
            ensure(is_completed || is_free, || {
                format!("the key is {record:?} after group {group}")
            })?;
            before = record.as_ref().filter(|_| is_completed);
        }
        Ok(())
    }

    /// Whether a request that was sent when the record had this status may get this result.
    fn follows(&self, before: Option<&Status>, got: &Got) -> bool {
        match (before, got) {
            (None, _) => true,
            (Some(_), Got::Error) => false,
            (Some(_), Got::Reply { reply, is_replay }) => match self.stored_body() {
                Some(body) => *is_replay && reply.body == *body,
                None => self.is_of_tombstone(reply),
            },
        }
    }

    /// Whether the layer made this response for a duplicate of a tombstone.
    fn is_of_tombstone(&self, reply: &Reply) -> bool {
        let is_refusal = reply.status == 409 && contains(reply, "response-not-stored");
        let is_acknowledgement = self.plan.is_for_webhooks && reply.status == 200 && reply.body.is_empty();
        reply.author.is_empty() && (is_refusal || is_acknowledgement)
    }

    fn check_replies(&self) -> Result<(), String> {
        for (request, got) in self.history.got.iter().enumerate() {
            let Got::Reply { reply, is_replay } = got else { continue };
            let is_stored = self.stored_body() == Some(&reply.body);
            let may_get = match self.author_of(reply) {
                Some((author, made, form)) => {
                    let is_success = (200..300).contains(&reply.status);
                    let must_be_stored = *is_replay || (is_success && form == Form::Plain);
                    let may_have = self.may_store(author, reply.status) || (!is_stored && self.was_released(author));
                    made == *reply && may_have && (is_stored || !must_be_stored)
                }
                None => {
                    let is_tombstone = self.is_tombstone() && self.is_of_tombstone(reply);
                    reply.author.is_empty() && (is_stored || is_tombstone || !is_replay) && self.may_refuse(reply)
                }
            };
            ensure(may_get, || format!("request {request} must not get {got:?}"))?;
        }
        Ok(())
    }

    /// Whether the layer may make this response.
    fn may_refuse(&self, reply: &Reply) -> bool {
        let may_be_unknown = self.is_disturbed() || self.plan.gives_up();
        let claims_done = contains(reply, "response-not-stored") || reports_effect(reply.status);
        (!claims_done || self.is_of_tombstone(reply) && self.is_tombstone())
            && (!contains(reply, "outcome-unknown") || may_be_unknown)
    }

    /// The caller of the run that completed the key gets the outcome.
    fn check_callers(&self) -> Result<(), String> {
        for (run, ran) in self.runs() {
            let got = &self.history.got[ran.request];
            let is_elsewhere = ran.takeover.is_some_and(|other| other.completes);
            let is_right = match got {
                Got::Error => {
                    let may_fail = self.may_count(run, 500) || self.was_released(Author::Other(run));
                    matches!(self.plan.run(run).end, End::Fail) && may_fail
                }
                Got::Reply { reply, .. } if is_elsewhere || self.has_recorded(run) => match self.stored_body() {
                    Some(body) => reply.body == *body,
                    // The model of the replies has checked the response of an author.
                    None => !reply.author.is_empty() || self.is_of_tombstone(reply) && !self.returns_recorded(run),
                },
                Got::Reply { .. } => true,
            };
            ensure(is_right, || format!("the caller of run {run} must not get {got:?}"))?;
        }
        let mut errors = self.history.got.iter().enumerate();
        let alone = errors.find(|(request, got)| {
            matches!(got, Got::Error) && !self.history.runs.iter().any(|run| run.request == *request)
        });
        ensure(alone.is_none(), || format!("{alone:?} got an error without a run"))
    }
}

fn is_outstanding(got: &Got) -> bool {
    matches!(got, Got::Reply { reply, .. } if contains(reply, "request-outstanding"))
}

fn contains(reply: &Reply, code: &str) -> bool {
    reply.author.is_empty() && String::from_utf8_lossy(&reply.body).contains(code)
}
