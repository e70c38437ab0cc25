//! The checks over the whole history, when no fault is left.

use std::time::Duration;

use tower_idempotency::protocol::Status;

use super::faults::is_restart;
use super::{Client, World, is_final, is_success};
use crate::history::Event;
use crate::link::{Answer, Responded};
use crate::plan::{Fault, Mode, Operation, Planned, Try};
use crate::process::Process;

/// The longest time between the lookup of a record and the response.
const JUST_NOW: Duration = Duration::from_secs(3);

/// The codes of answers that say that the request had no effect.
const NOTHING_RAN: [&str; 8] = [
    "body-broken",
    "body-timeout",
    "key-reused",
    "mismatch",
    "not-run",
    "overloaded",
    "store-full",
    "store-unavailable",
];

/// The number of the effect that a response names.
fn receipt_in(body: &str) -> Option<usize> {
    let (_, rest) = body.split_once("receipt ")?;
    let number = rest.split_whitespace().next()?;
    number.parse().ok()
}

impl World {
    /// Whether all requests with the key have the same body.
    pub(super) fn has_one_body(&self, key: usize) -> bool {
        let operations = self.operations.iter().filter(|operation| operation.key == key);
        let mut others = operations.map(|operation| operation.is_other_body);
        let first = others.next();
        others.all(|is_other| Some(is_other) == first)
    }

    /// Checks the responses that have left their processes (I3, I5).
    pub(super) fn check_responses(&mut self) {
        let responded = std::mem::take(&mut self.shared().responded);
        for Responded {
            request,
            operation,
            answer,
        } in responded
        {
            let ran =
                |(_, event): &(Duration, Event)| matches!(event, Event::Began { request: of, .. } if *of == request);
            if NOTHING_RAN.contains(&answer.code) && self.shared().history.0.iter().any(ran) {
                let key = self.operations[operation].key;
                self.violate(format!(
                    "I3: a request under key {key} ran the handler, and its caller got {}, which says that nothing ran",
                    answer.code
                ));
            }
            if !is_success(&answer) {
                continue;
            }
            let key = self.operations[operation].key;
            let status = self.host.status(&self.keys[key]);
            let was_stored = self.expired_at[key].is_some_and(|at| self.shared().now < at + JUST_NOW);
            let is_stored = was_stored
                || match self.plan.mode {
                    // If the store fails, the caller gets the response, and the key stays claimed.
                    Mode::AtMostOnce | Mode::ReleaseFailures if self.store_failed_just_now() => status.is_some(),
                    _ => matches!(status, Some(Status::Completed(_))),
                };
            if !is_stored {
                self.violate(format!(
                    "I5: a response of key {key} was sent while its record was {status:?}"
                ));
            }
        }
    }

    /// Sends requests under a key until its outcome is known, when there are no faults any more.
    pub(super) fn ask_for_the_outcome(&mut self, key: usize) {
        let is_other_body = self.operations.iter().find(|operation| operation.key == key);
        let Some(is_other_body) = is_other_body.map(|operation| operation.is_other_body) else {
            return;
        };
        let mut last = self.ask(key, is_other_body);
        if last.as_ref().is_some_and(|answer| answer.status == 422) {
            last = self.ask(key, !is_other_body);
        }
        match last {
            Some(answer) if answer.status == 422 => {
                self.violate(format!("I4: key {key} matches neither of its two bodies"));
            }
            Some(answer) if is_final(&answer) => {
                let may_be_lost = matches!(self.plan.mode, Mode::AtMostOnce | Mode::ReleaseFailures);
                let is_rejected =
                    |(_, event): &(Duration, Event)| matches!(event, Event::Rejected { key: of, .. } if *of == key);
                let may_be_lost =
                    may_be_lost || self.plan.max_attempts < 1_000 || self.shared().history.0.iter().any(is_rejected);
                if answer.code == "outcome-unknown" && !may_be_lost {
                    self.violate(format!("I7: the outcome of key {key} stays unknown"));
                }
            }
            last => self.violate(format!("I7: key {key} has no outcome in the end: {last:?}")),
        }
    }

    /// Sends requests until one has a final response, and returns the last response.
    pub(super) fn ask(&mut self, key: usize, is_other_body: bool) -> Option<Answer> {
        let now = self.shared().now;
        let processes = self.plan.processes;
        let tries = (0..20).map(|number| Try {
            process: number % processes,
            runtime: number % self.plan.runtimes,
            patience: Duration::from_secs(60),
            pause: Duration::from_millis(500),
            stall: Duration::ZERO,
        });
        self.operations.push(Operation {
            at: now,
            key,
            is_other_body,
            tries: tries.collect(),
        });
        self.clients.push((Client::Idle(now), 0));
        let operation = self.operations.len() - 1;
        self.run_until(Duration::from_secs(300), |world| {
            world.clients[operation].0 == Client::Done
        });
        self.shared().history.last_answer(operation)
    }

    /// Waits until nothing is left of any request (I11).
    pub(super) fn drain(&mut self) {
        let end = self.shared().now + Duration::from_secs(60);
        while self.violations.is_empty() {
            let mut is_drained = true;
            for process in self.processes.iter_mut().flatten() {
                is_drained &= process.drain.running() == 0 && process.is_drained();
            }
            if is_drained {
                break;
            }
            if self.shared().now >= end {
                return self.violate("I11: the processes do not drain".to_owned());
            }
            self.step();
        }
        self.run_for(2 * self.plan.longest_lease());
        for number in 0..self.processes.len() {
            let tasks = self.processes[number].as_ref().map_or(0, Process::alive_tasks);
            if tasks > 0 && self.violations.is_empty() {
                self.violate(format!("I11: {tasks} tasks of process {number} are left"));
            }
        }
    }

    /// Checks that no attempt is lost, and no outcome unknown, without a fault that explains it.
    pub(super) fn check_losses(&mut self) {
        let stops = |planned: &Planned| {
            matches!(
                planned.fault,
                Fault::Crash { .. }
                    | Fault::Freeze { .. }
                    | Fault::Block { .. }
                    | Fault::EndRuntime { .. }
                    | Fault::Slow { .. }
                    | Fault::ClockJump { .. }
            )
        };
        // A renewal that hangs when the store returns ends after a sixth of the lease, and the shortest
        // lease is 1 s. After a longer outage, there may be no time for the next one.
        let is_short = |planned: &Planned| is_restart(planned) && planned.lasts < Duration::from_millis(400);
        // A late claim may reach the store after the release of that claim. The store then grants
        // the key to a request that no longer waits.
        let is_late = self.has_late_messages();
        // If the replies to a claim are lost for longer than its lease, each further attempt may
        // find nothing certain, until no attempt is left.
        let may_use_attempts_up =
            matches!(self.plan.mode, Mode::AtLeastOnce | Mode::Recover) && self.plan.max_attempts < 1_000;
        let runs_through = !self.faults.iter().any(stops);
        let is_calm = self.faults.iter().all(is_short);
        for key in 0..self.plan.keys {
            let (mut began, mut failed, mut rejected) = (0, 0, false);
            let (mut unknown, mut unrecorded, mut responded) = (false, false, false);
            for (_, event) in &self.shared().history.0 {
                match event {
                    Event::Began { key: of, .. } if *of == key => began += 1,
                    Event::Failed { key: of, .. } if *of == key => failed += 1,
                    Event::Rejected { key: of, .. } if *of == key => rejected = true,
                    Event::Responded { key: of, answer, .. } if *of == key => {
                        unknown |= (answer.status, answer.code) == (409, "outcome-unknown");
                        unrecorded |= (answer.status, answer.code) == (503, "outcome-unknown");
                        responded |= is_success(answer);
                    }
                    _ => {}
                }
            }
            if runs_through && !is_late && !may_use_attempts_up && began == 0 && unknown && !rejected {
                self.violate(format!("I7: the outcome of key {key} is unknown, and no handler ran"));
            }
            if is_calm && began > 1 + failed + self.expired[key].len() {
                self.violate(format!(
                    "I1: the handler of key {key} began {began} times and failed {failed} times"
                ));
            }
            if is_calm && (unrecorded || unknown && failed == 0) {
                self.violate(format!("I7: the outcome of key {key} was unknown without a reason"));
            }
            let stays_unknown = self
                .last_answer(key)
                .is_some_and(|answer| answer.code == "outcome-unknown");
            if runs_through && responded && stays_unknown && self.expired[key].is_empty() {
                self.violate(format!(
                    "I5: a caller got a response of key {key}, and its outcome stays unknown"
                ));
            }
        }
    }

    /// Returns the last response under a key.
    pub(super) fn last_answer(&self, key: usize) -> Option<Answer> {
        self.shared().history.0.iter().rev().find_map(|(_, event)| match event {
            Event::Responded { key: of, answer, .. } if *of == key => Some(answer.clone()),
            _ => None,
        })
    }

    /// Returns the effects of a key in each of its retentions.
    fn effects_by_retention(&self, key: usize) -> Vec<Vec<usize>> {
        let mut effects = vec![Vec::new(); 1 + self.expired[key].len()];
        for receipt in self.bank.receipts(key) {
            effects[self.retention_of(key, receipt)].push(receipt);
        }
        effects
    }

    /// Checks the effects and the responses of the whole history (I2 to I4).
    pub(super) fn check_effects(&mut self) {
        for key in 0..self.plan.keys {
            let effects = self.effects_by_retention(key);
            let retentions = effects.len();
            if effects.iter().any(|receipts| receipts.len() > 1) {
                self.violate(format!("I3: key {key} has too many effects: {effects:?}"));
            }
            let mut bodies: Vec<Vec<(Vec<String>, String)>> = vec![Vec::new(); retentions];
            let mut variants = vec![Vec::new(); retentions];
            let (mut is_mismatch, mut asked, mut responses_of_others) = (false, Vec::new(), Vec::new());
            for (_, event) in &self.shared().history.0 {
                match event {
                    Event::Responded {
                        operation,
                        key: of,
                        answer,
                    } if *of == key => {
                        is_mismatch |= answer.status == 422;
                        if answer.status == 208 && effects.iter().all(Vec::is_empty) {
                            responses_of_others.push(answer.code.to_owned());
                        }
                        // This response has no receipt, so its retention is known only if there is one.
                        let reports_an_effect = answer.status == 208 || answer.code == "response-not-stored";
                        if reports_an_effect && retentions == 1 {
                            variants[0].push(self.operations[*operation].is_other_body);
                        }
                        if answer.status == 201 {
                            let receipt = receipt_in(&answer.body);
                            let Some(receipt) = receipt.filter(|known| self.bank.receipts(key).any(|of| of == *known))
                            else {
                                responses_of_others.push(answer.body.clone());
                                continue;
                            };
                            let retention = self.retention_of(key, receipt);
                            bodies[retention].push((answer.head.clone(), answer.body.clone()));
                            variants[retention].push(self.operations[*operation].is_other_body);
                        }
                    }
                    Event::Sent { operation, key: of, .. } if *of == key => {
                        asked.push(self.operations[*operation].is_other_body);
                    }
                    _ => {}
                }
            }
            // If the store is unreachable, a caller under `OnLost::Refuse` gets a response that is
            // not stored. An operator may later record another response.
            let may_refuse = matches!(self.plan.mode, Mode::AtMostOnce | Mode::ReleaseFailures);
            if may_refuse && self.store_fails() {
                for bodies in &mut bodies {
                    bodies.retain(|(_, body)| !body.starts_with("an operator"));
                }
            }
            for bodies in &mut bodies {
                bodies.dedup();
                if bodies.len() > 1 {
                    self.violate(format!("I2: key {key} has several responses: {bodies:?}"));
                }
            }
            for variants in &mut variants {
                variants.dedup();
                if variants.len() > 1 {
                    self.violate(format!("I4: key {key} gave one response to two bodies"));
                }
            }
            if !responses_of_others.is_empty() {
                self.violate(format!(
                    "I3: key {key} got responses without an effect of its own: {responses_of_others:?}"
                ));
            }
            if is_mismatch && asked.iter().all(|is_other| *is_other == asked[0]) {
                self.violate(format!("I4: key {key} had one body, and a mismatch was reported"));
            }
        }
    }

    /// Checks the runs of the handlers (I1).
    pub(super) fn check_runs(&mut self) {
        for key in 0..self.plan.keys {
            let (mut began, mut failed, mut freed) = (0, 0, 0);
            let (mut granted, mut ungranted) = (Vec::new(), Vec::new());
            for (_, event) in &self.shared().history.0 {
                match event {
                    Event::Granted { key: of, fence, .. } if *of == key => granted.push(*fence),
                    Event::GrantLost { key: of, fence } if *of == key => {
                        match granted.iter().position(|known| known == fence) {
                            Some(at) => drop(granted.swap_remove(at)),
                            None => ungranted.push(*fence),
                        }
                    }
                    Event::Began { key: of, fence, .. } if *of == key => {
                        began += 1;
                        // Each grant allows one run of the handler.
                        match granted.iter().position(|known| known == fence) {
                            Some(at) => drop(granted.swap_remove(at)),
                            None => ungranted.push(*fence),
                        }
                    }
                    Event::Failed {
                        key: of,
                        had_no_effect: true,
                        ..
                    } if *of == key => failed += 1,
                    Event::Freed { key: of } if *of == key => freed += 1,
                    _ => {}
                }
            }
            if !ungranted.is_empty() {
                self.violate(format!(
                    "I1: the handler of key {key} ran without a grant: {ungranted:?}"
                ));
            }
            let allowed = match self.plan.mode {
                Mode::AtMostOnce | Mode::ReleaseFailures => 1 + failed + freed + self.expired[key].len(),
                Mode::AtLeastOnce | Mode::Recover => usize::MAX,
            };
            if began > allowed {
                self.violate(format!(
                    "I1: the handler of key {key} began {began} times and failed {failed} times"
                ));
            }
        }
    }
}
