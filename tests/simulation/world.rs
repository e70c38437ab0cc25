//! The simulation of one plan, step by step.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tower_idempotency::protocol::{Decision, Fence, Outcome, Resolution, ResolveResult, Status, StorageKey};

use crate::ablated::Rule;
use crate::bank::{Bank, BankReply};
use crate::entry::{COMPLETION_TIMEOUT, Incoming, STORE_TIMEOUT, found, storage_key};
use crate::history::Event;
use crate::host::{Ended, Host};
use crate::link::{Answer, Message, Sender, Shared, StoreReply, StoreRequest};
use crate::plan::{Fault, Mode, Operation, Plan, Planned, Try};
use crate::process::Process;
use crate::random::Random;
use crate::work::HANDLER;

mod faults;
mod verdict;

use faults::LONG_COMPLETION;

/// The state of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    /// The client sends its next request at this time.
    Idle(Duration),
    /// The client waits for a response until this time.
    Waiting {
        sent: Duration,
        until: Duration,
    },
    Done,
}

pub(crate) struct World {
    plan: Plan,
    operations: Vec<Operation>,
    shared: Arc<Mutex<Shared>>,
    host: Host,
    bank: Bank,
    keys: Vec<StorageKey>,
    processes: Vec<Option<Process>>,
    frozen: Vec<bool>,
    percent: Vec<u32>,
    /// The time for which each process has been frozen.
    behind: Vec<Duration>,
    clients: Vec<(Client, usize)>,
    active: Vec<bool>,
    /// For each key, the number of effects in all at each end of a retention. A key may have one
    /// effect between two of these.
    expired: Vec<Vec<usize>>,
    /// The time at which a record of each key last expired.
    expired_at: Vec<Option<Duration>>,
    /// The time since which the record of each key has been completed.
    completed_since: Vec<Option<Duration>>,
    random: Random,
    violations: Vec<String>,
    /// The faults of the plan.
    faults: Vec<Planned>,
}

/// The result of a simulation.
pub(crate) struct Simulated {
    pub(crate) violations: Vec<String>,
    pub(crate) history: String,
    pub(crate) counts: Counts,
}

/// The number of events of each kind, in one simulation or in many.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) histories: usize,
    operations: usize,
    faults: usize,
    messages: usize,
    handlers: usize,
    effects: usize,
    checks: usize,
    kills: usize,
    resolved: usize,
    freed: usize,
    expired: usize,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.histories += other.histories;
        self.operations += other.operations;
        self.faults += other.faults;
        self.messages += other.messages;
        self.handlers += other.handlers;
        self.effects += other.effects;
        self.checks += other.checks;
        self.kills += other.kills;
        self.resolved += other.resolved;
        self.freed += other.freed;
        self.expired += other.expired;
    }
}

impl World {
    pub(crate) fn new(plan: &Plan, rule: Rule) -> Self {
        let shared = Arc::new(Mutex::new(Shared::new(plan.seed, plan.processes)));
        // Under `ReleaseFailures`, a handler must know whether it had an effect.
        shared.lock().unwrap().loses_bank_messages = plan.mode != Mode::ReleaseFailures;
        let processes = (0..plan.processes).map(|number| Some(Process::start(plan, &shared, number)));
        Self {
            operations: plan.operations.clone(),
            host: Host::new(rule),
            bank: Bank::new(plan.mode),
            keys: (0..plan.keys).map(|key| storage_key(plan, &shared, key)).collect(),
            processes: processes.collect(),
            frozen: vec![false; plan.processes],
            percent: vec![100; plan.processes],
            behind: vec![Duration::ZERO; plan.processes],
            clients: plan
                .operations
                .iter()
                .map(|operation| (Client::Idle(operation.at), 0))
                .collect(),
            active: vec![false; plan.faults.len()],
            expired: vec![Vec::new(); plan.keys],
            expired_at: vec![None; plan.keys],
            completed_since: vec![None; plan.keys],
            random: Random::new(plan.seed, 4),
            violations: Vec::new(),
            faults: plan.faults.clone(),
            plan: plan.clone(),
            shared,
        }
    }

    pub(crate) fn run(mut self) -> Simulated {
        while self.shared().now < Plan::ACTIVE + Duration::from_secs(4) && self.violations.is_empty() {
            self.step();
        }
        self.end_all_faults();
        self.shared().note(Event::Quiet);
        self.run_until(Duration::from_secs(90), |world| {
            world.clients.iter().all(|(client, _)| *client == Client::Done)
        });
        self.run_for(2 * self.plan.longest_lease());
        for key in 0..self.plan.keys {
            self.ask_for_the_outcome(key);
        }
        self.drain();
        self.check_effects();
        self.check_runs();
        self.check_losses();
        let history = self.shared().history.to_string();
        Simulated {
            history,
            counts: self.counts(),
            violations: self.violations,
        }
    }

    fn counts(&self) -> Counts {
        let shared = self.shared();
        let mut counts = Counts {
            histories: 1,
            operations: self.operations.len(),
            faults: self.faults.len(),
            messages: shared.sent(),
            effects: self.bank.effects.len(),
            ..Counts::default()
        };
        for (_, event) in &shared.history.0 {
            match event {
                Event::Began { .. } => counts.handlers += 1,
                Event::Recovered { .. } => counts.checks += 1,
                Event::Killed { .. } => counts.kills += 1,
                Event::Resolved { .. } => counts.resolved += 1,
                Event::Freed { .. } => counts.freed += 1,
                Event::Expired { .. } => counts.expired += 1,
                _ => {}
            }
        }
        counts
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap()
    }

    /// Ends the simulation. Only the first violation counts, because others follow from it.
    fn violate(&mut self, what: String) {
        if self.violations.is_empty() {
            self.violations.push(what);
        }
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.shared().now + time;
        while self.shared().now < end && self.violations.is_empty() {
            self.step();
        }
    }

    /// Runs until a condition holds, for at most this time.
    fn run_until(&mut self, time: Duration, holds: impl Fn(&Self) -> bool) -> bool {
        let end = self.shared().now + time;
        while self.violations.is_empty() && !holds(self) {
            if self.shared().now >= end {
                return false;
            }
            self.step();
        }
        true
    }

    /// Advances all clocks by one tick, and runs every part once.
    fn step(&mut self) {
        let is_busy = !self.shared().messages.is_empty();
        let tick = if is_busy {
            self.random.millis(1..6)
        } else {
            self.random.millis(4..25)
        };
        self.shared().now += tick;
        self.host.advance(tick);
        self.expire();
        self.begin_and_end_faults();
        self.act_for_clients();
        self.act_for_operators();
        self.deliver();
        self.run_store();
        self.note_completed();
        let mut order: Vec<usize> = (0..self.processes.len()).collect();
        self.random.shuffle(&mut order);
        for number in order {
            self.run_process(number, tick);
            self.shared().end_tick(number);
            if self.shared().processes[number].is_dead {
                self.kill(number);
            }
        }
        self.check_responses();
    }

    /// Notes the records that have expired.
    fn expire(&mut self) {
        for key in 0..self.plan.keys {
            if self.host.expires(&self.keys[key]) {
                self.expired[key].push(self.bank.effects.len());
                let mut shared = self.shared();
                let now = shared.now;
                shared.note(Event::Expired { key });
                drop(shared);
                self.expired_at[key] = Some(now);
            }
        }
    }

    /// The number of the retention in which an effect of a key happened.
    fn retention_of(&self, key: usize, receipt: usize) -> usize {
        self.expired[key].iter().filter(|effects| **effects < receipt).count()
    }

    /// The receipts of a key since its record last expired.
    fn charges(&self, key: usize) -> usize {
        let current = self.expired[key].len();
        let receipts = self.bank.receipts(key);
        receipts
            .filter(|receipt| self.retention_of(key, *receipt) == current)
            .count()
    }

    fn run_process(&mut self, number: usize, tick: Duration) {
        if let Some(process) = &mut self.processes[number] {
            if self.frozen[number] {
                self.behind[number] += tick;
            } else {
                process.run_for(tick * self.percent[number] / 100, &mut self.random);
            }
        }
    }

    fn deliver(&mut self) {
        loop {
            let mut shared = self.shared();
            let now = shared.now;
            let Some(first) = shared.messages.first_entry().filter(|first| first.key().0 <= now) else {
                return;
            };
            let message = first.remove();
            drop(shared);
            self.deliver_one(message);
        }
    }

    fn deliver_one(&mut self, message: Message) {
        match message {
            Message::ToStore { from, request, place } => {
                // A server that is down resets connections.
                if !self.shared().store_is_down {
                    self.host.begin(from, request, place);
                }
            }
            Message::FromStore {
                to,
                key,
                number,
                reply,
                place,
            } => {
                let mut shared = self.shared();
                let is_alive = shared.is_alive(to);
                if is_alive && shared.processes[to.process].cut_replies {
                    shared.lose(place);
                    return;
                }
                drop(shared);
                if is_alive {
                    self.host.see(&key, number);
                }
                drop(place.send(reply));
            }
            Message::Wake { to, place } => {
                let mut shared = self.shared();
                if shared.is_alive(to) && shared.processes[to.process].cut_replies {
                    shared.lose(place);
                } else {
                    let _ = place.send(());
                }
            }
            Message::ToBank { from, request, place } => {
                let key = request.key();
                let before = self.charges(key);
                let reply = self.bank.handle(request);
                let effects = self.charges(key);
                let mut shared = self.shared();
                if reply == BankReply::Refused {
                    shared.note(Event::Refused { key });
                } else if effects > before {
                    shared.note(Event::Charged { key, effects });
                }
                let latency = shared.latency();
                shared.send(latency, Message::FromBank { to: from, reply, place });
                drop(shared);
                if effects > before && self.host.status(&self.keys[key]).is_none() {
                    self.violate(format!("I6: key {key} has an effect and no record"));
                }
            }
            Message::FromBank { to, reply, place } => {
                let mut shared = self.shared();
                let is_lost = shared.loses_bank_messages && shared.random.chance(6);
                if is_lost || shared.processes[to.process].cut_bank {
                    shared.lose(place);
                } else {
                    drop(place.send(Ok(reply)));
                }
            }
            Message::ToProcess { operation, number } => self.arrive(operation, number),
            Message::ToClient {
                operation,
                number,
                response,
            } => self.answer(operation, number, response),
        }
    }

    /// Goes on with the operations of the store, in random order. An operation of several steps may
    /// stand still between them.
    fn run_store(&mut self) {
        let mut left = self.host.running();
        while left > 0 {
            left -= 1;
            let at = self.random.below(self.host.running());
            if self.host.has_begun(at) && self.random.chance(self.plan.pause_percent) {
                continue;
            }
            if let Some(ended) = self.host.go_on(at) {
                self.reply(ended);
            }
            if self.host.running() == 0 {
                break;
            }
        }
        for (key, to, place) in self.host.woken() {
            self.shared().send_about(&key, to, Message::Wake { to, place });
        }
    }

    fn note_completed(&mut self) {
        let now = self.shared().now;
        for (key, since) in self.completed_since.iter_mut().enumerate() {
            let is_completed = matches!(self.host.status(&self.keys[key]), Some(Status::Completed(_)));
            *since = since.or(Some(now)).filter(|_| is_completed);
        }
    }

    fn reply(&mut self, ended: Ended) {
        let Ended {
            number: written,
            from,
            request,
            reply,
            place,
            audited,
        } = ended;
        let key = request.key();
        let number = self.keys.iter().position(|known| *known == key);
        let number = number.expect("a key of the plan");
        match audited {
            Ok(Some(grant)) => self.shared().note(Event::Granted {
                key: number,
                process: from.process,
                incarnation: from.incarnation,
                attempt: grant.attempt,
                fence: grant.owner.fence.as_u64(),
            }),
            Ok(None) => {}
            Err(what) => self.violate(format!("{what} (key {number})")),
        }
        if matches!(reply, Ok(StoreReply::Claim(Decision::Wait { .. }))) && self.waits_for_itself(number, from) {
            self.violate(format!(
                "I7: process {} waits for its own grant of key {number}",
                from.process
            ));
        }
        if let (StoreRequest::Resolve(.., Resolution::Absent), Ok(StoreReply::Resolve(ResolveResult::Resolved))) =
            (&request, &reply)
        {
            self.shared().note(Event::Freed { key: number });
        }
        if matches!(reply, Ok(StoreReply::Resolve(ResolveResult::Conflict(_)))) {
            self.shared().note(Event::NotResolved { key: number });
        }
        let rejects = |request: &StoreRequest| {
            matches!(
                request,
                StoreRequest::Resolve(.., Resolution::Completed(Outcome::Rejected, _))
            )
        };
        if matches!(reply, Ok(StoreReply::Resolve(ResolveResult::Resolved))) && rejects(&request) {
            let by = "an operator";
            self.shared().note(Event::Rejected { key: number, by });
        }
        if self.host.status(&key).is_none() && self.charges(number) > 0 {
            self.violate(format!(
                "I6: key {number} has an effect, and its record is gone after {request:?}"
            ));
        }
        if let Some(place) = place {
            let message = Message::FromStore {
                to: from,
                key,
                number: written,
                reply,
                place,
            };
            self.shared().send_about(&key, from, message);
        }
    }

    /// Whether the process already owns the key, because the reply to its claim was lost. The process
    /// then repeats that claim, and must get the same decision. A process with several requests
    /// under the key is not judged, because each request may make a claim of its own.
    fn waits_for_itself(&self, key: usize, from: Sender) -> bool {
        let (mut sent, mut granted, mut began) = (0, None, Vec::new());
        for (_, event) in &self.shared().history.0 {
            match *event {
                Event::Sent { key: of, process, .. } if (of, process) == (key, from.process) => sent += 1,
                Event::Began { key: of, fence, .. } if of == key => began.push(fence),
                Event::Granted {
                    key: of,
                    process,
                    incarnation,
                    fence,
                    ..
                } if of == key => {
                    granted = Some(fence).filter(|_| (process, incarnation) == (from.process, from.incarnation));
                }
                Event::GrantLost { key: of, .. } if of == key => granted = None,
                _ => {}
            }
        }
        self.plan.mode != Mode::Recover
            && !self.has_late_messages()
            && sent == 1
            && granted.is_some_and(|fence| !began.contains(&fence))
    }

    fn act_for_clients(&mut self) {
        for operation in 0..self.clients.len() {
            let now = self.shared().now;
            let (client, number) = self.clients[operation];
            let Operation {
                key,
                tries,
                is_other_body,
                ..
            } = &self.operations[operation];
            let (key, is_other_body, current) = (*key, *is_other_body, tries[number]);
            let Try {
                process,
                patience,
                pause,
                ..
            } = current;
            match client {
                Client::Idle(at) if at <= now => {
                    self.clients[operation].0 = Client::Waiting {
                        sent: now,
                        until: now + patience,
                    };
                    let mut shared = self.shared();
                    shared.note(Event::Sent {
                        operation,
                        key,
                        process,
                        is_other_body,
                    });
                    let latency = shared.latency();
                    shared.send(latency, Message::ToProcess { operation, number });
                }
                Client::Waiting { until, sent } if until <= now => {
                    if patience >= Duration::from_secs(60) && !self.is_disturbed(current, sent) {
                        self.violate(format!("I7: client {operation} has no response after {patience:?}"));
                    }
                    self.shared().note(Event::Left { operation });
                    if let Some(process) = &mut self.processes[process] {
                        process.leave(operation, number);
                    }
                    self.go_on_later(operation, now + pause);
                }
                _ => {}
            }
        }
    }

    /// Resolves keys. An honest operator asks the bank and then records the truth. The store accepts
    /// this unless the key is in flight. A mistaken operator records something false, and the store
    /// must refuse it. No operator can reach a store that is down.
    fn act_for_operators(&mut self) {
        let now = self.shared().now;
        while self.plan.resolutions.last().is_some_and(|action| action.at <= now) {
            let Some(action) = self.plan.resolutions.pop() else {
                break;
            };
            let Some(seen) = self.host.look(&self.keys[action.key]) else {
                continue;
            };
            if self.shared().store_is_down {
                continue;
            }
            let receipt = self.bank.receipts(action.key).next_back();
            let receipt = receipt.filter(|receipt| {
                !action.is_mistaken && self.retention_of(action.key, *receipt) == self.expired[action.key].len()
            });
            let (fence, resolution) = match (&seen.status, receipt) {
                (Status::Lost | Status::Unknown | Status::InFlight { .. }, Some(receipt)) => {
                    self.shared().note(Event::Resolved {
                        key: action.key,
                        receipt,
                    });
                    (seen.fence, found(&self.plan, &self.shared, receipt))
                }
                (Status::Lost | Status::Unknown, None) if action.rejects => (
                    seen.fence,
                    Resolution::Completed(Outcome::Rejected, self.plan.retention),
                ),
                (Status::Lost | Status::Unknown, None) if self.will_have_no_effect(action.key) => {
                    (seen.fence, Resolution::Absent)
                }
                (Status::Completed(_), _) => (seen.fence, Resolution::Absent),
                _ => (Fence::new(seen.fence.as_u64() - 1), Resolution::Absent),
            };
            let from = Sender {
                process: 0,
                incarnation: usize::MAX,
            };
            self.host.begin(
                from,
                StoreRequest::Resolve(self.keys[action.key], fence, resolution),
                None,
            );
        }
    }

    /// Whether a key has no effect, and no process is left that could still have one. If the store's
    /// clock jumped back, a freed key may get lower fences than before. A bank that remembers fences
    /// would refuse these.
    fn will_have_no_effect(&self, key: usize) -> bool {
        let shared = self.shared();
        let is_gone = |process: usize, incarnation: usize| {
            let state = &shared.processes[process];
            state.is_dead || state.incarnation > incarnation
        };
        let all_gone = shared.history.0.iter().all(|(_, event)| match event {
            Event::Granted {
                key: of,
                process,
                incarnation,
                ..
            } if *of == key => is_gone(*process, *incarnation),
            _ => true,
        });
        let is_asked = |message: &Message| matches!(message, Message::ToBank { request, .. } if request.key() == key);
        let goes_back = |planned: &Planned| matches!(planned.fault, Fault::ClockJump { millis } if millis < 0);
        let is_remembered = self.plan.mode == Mode::Recover && self.faults.iter().any(goes_back);
        let has_message = shared.messages.values().any(is_asked);
        drop(shared);
        all_gone && !has_message && !is_remembered && self.charges(key) == 0
    }

    /// Whether a request that was sent at this time could look at the record before its wait ended.
    fn reaches_the_store(&self, of_request: Try, sent: Duration) -> bool {
        let now = self.shared().now;
        let is_cut = self.faults.iter().any(|planned| {
            let hits = match planned.fault {
                Fault::CutStore { process, .. } => process == of_request.process,
                // After a jump of its clock, the store may give the key of a running owner away. That
                // owner does not know it before its next renewal.
                Fault::StoreDown | Fault::Failover { .. } | Fault::StoreSlow | Fault::ClockJump { .. } => true,
                _ => false,
            };
            hits && planned.at <= now && sent <= planned.at + planned.lasts + LONG_COMPLETION
        });
        let wait = self.plan.wait.min(self.plan.changed.1);
        !is_cut && !self.is_disturbed(of_request, sent) && wait > LAST_LOOK
    }

    fn go_on_later(&mut self, operation: usize, at: Duration) {
        let number = self.clients[operation].1 + 1;
        self.clients[operation] = match number < self.operations[operation].tries.len() {
            true => (Client::Idle(at), number),
            false => (Client::Done, number - 1),
        };
    }

    fn arrive(&mut self, operation: usize, number: usize) {
        let is_current = matches!(self.clients[operation], (Client::Waiting { .. }, at) if at == number);
        let key = self.operations[operation].key;
        // A client that has left before its request arrived has closed the connection.
        if !is_current {
            return;
        }
        let Try {
            process,
            runtime,
            stall,
            ..
        } = self.operations[operation].tries[number];
        self.shared().requests += 1;
        let request = Incoming {
            number: self.shared().requests,
            key,
            is_other_body: self.operations[operation].is_other_body,
            stall,
        };
        let process = self.processes[process].as_mut();
        let is_taken = process.is_some_and(|process| process.take(operation, number, runtime, request));
        if !is_taken {
            self.reset(operation);
        }
    }

    fn reset(&mut self, operation: usize) {
        let now = self.shared().now;
        let number = self.clients[operation].1;
        let pause = self.operations[operation].tries[number].pause;
        self.shared().note(Event::Reset { operation });
        self.go_on_later(operation, now + pause);
    }

    fn answer(&mut self, operation: usize, number: usize, answer: Answer) {
        let (Client::Waiting { sent, .. }, current) = self.clients[operation] else {
            return;
        };
        if current != number {
            return;
        }
        let now = self.shared().now;
        let key = self.operations[operation].key;
        let request = self.operations[operation].tries[number];
        // The next request runs the handler or its check again.
        let runs_again = matches!(self.plan.mode, Mode::Recover | Mode::AtLeastOnce);
        let may_change = runs_again && answer.code == "outcome-unknown";
        let is_final = is_final(&answer) && !may_change;
        let was_completed = self.completed_since[key].is_some_and(|since| since + LAST_LOOK + STORE_LATENCY <= now);
        let was_completed = was_completed && self.has_one_body(key);
        if answer.code == "request-outstanding" && was_completed && self.reaches_the_store(request, sent) {
            self.violate(format!(
                "I7: client {operation} got no response of key {key}, although the store had one"
            ));
        }
        self.shared().note(Event::Responded { operation, key, answer });
        let longest = request.stall + self.longest_response(key, request.process, sent);
        if now - sent > longest && !self.is_disturbed(request, sent) {
            self.violate(format!(
                "I7: client {operation} waited for {:?}, and not {longest:?} at most",
                now - sent
            ));
        }
        if is_final {
            self.clients[operation].0 = Client::Done;
        } else {
            let pause = self.operations[operation].tries[number].pause;
            self.go_on_later(operation, now + pause);
        }
    }

    /// The time in which a request must have a response, if its process runs. A request takes longer
    /// if the process has run the handler or the check of its key meanwhile.
    fn longest_response(&self, key: usize, process: usize, sent: Duration) -> Duration {
        let ran = self.shared().history.0.iter().any(|(at, event)| match event {
            Event::Began {
                key: of, process: runs, ..
            } => (*of, *runs) == (key, process) && *at >= sent,
            Event::Recovered { key: of, .. } => *of == key && *at >= sent,
            _ => false,
        });
        let run = match ran {
            true => HANDLER + COMPLETION_TIMEOUT,
            false => LAST_LOOK,
        };
        self.plan.longest_wait() + 4 * STORE_TIMEOUT + run
    }
}

/// The time that a waiter takes for its last look, if its time is over.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// The longest time of a message to the store and back, without a fault.
const STORE_LATENCY: Duration = Duration::from_millis(100);

/// Whether the response says that the payment was made.
fn is_success(answer: &Answer) -> bool {
    matches!(answer.status, 201 | 208)
}

/// Whether a client sends no further request after this response.
fn is_final(answer: &Answer) -> bool {
    is_success(answer)
        || answer.status == 422
        || matches!(
            (answer.status, answer.code),
            (409, "outcome-unknown" | "response-not-stored")
        )
}
