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
    /// Since when the record of each key has been completed.
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
            let Operation { key, tries, .. } = &self.operations[operation];
            let (key, current) = (*key, tries[number]);
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
                (Status::Lost | Status::Unknown, None) if action.rejects => {
                    self.shared().note(Event::Rejected {
                        key: action.key,
                        by: "an operator",
                    });
                    (
                        seen.fence,
                        Resolution::Completed(Outcome::Rejected, self.plan.retention),
                    )
                }
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

    /// Whether a fault kept the process, or the runtime of a request, from running at its speed since
    /// this time.
    fn is_disturbed(&self, Try { process, runtime, .. }: Try, since: Duration) -> bool {
        let now = self.shared().now;
        self.plan.faults.iter().any(|planned| {
            let hits = match planned.fault {
                Fault::Freeze { process: hit, .. } => hit == process,
                Fault::Block {
                    process: hit,
                    runtime: blocked,
                } => (hit, blocked) == (process, runtime),
                Fault::Slow { process: hit, percent } => hit == process && percent < 100,
                _ => false,
            };
            hits && planned.at <= now && planned.at + planned.lasts >= since
        })
    }

    /// Whether a request since this time could ask the store, and had the time for it.
    fn reaches_the_store(&self, of_request: Try, sent: Duration) -> bool {
        let now = self.shared().now;
        let is_cut = self.faults.iter().any(|planned| {
            let hits = match planned.fault {
                Fault::CutStore { process, .. } => process == of_request.process,
                Fault::StoreDown | Fault::Failover { .. } | Fault::StoreSlow => true,
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
        let request = Incoming {
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
        let of_answer = self.operations[operation].tries[number];
        // The next request runs the handler or its check again.
        let runs_again = matches!(self.plan.mode, Mode::Recover | Mode::AtLeastOnce);
        let may_change = runs_again && answer.code == "outcome-unknown";
        let is_final = is_final(&answer) && !may_change;
        let was_completed = self.completed_since[key].is_some_and(|since| since + LAST_LOOK + STORE_LATENCY <= now);
        if answer.code == "request-outstanding" && was_completed && self.reaches_the_store(of_answer, sent) {
            self.violate(format!(
                "I7: client {operation} got no response of key {key}, although the store had one"
            ));
        }
        self.shared().note(Event::Responded { operation, key, answer });
        let longest = of_answer.stall + self.longest_response(key, of_answer.process, sent);
        if now - sent > longest && !self.is_disturbed(of_answer, sent) {
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

    fn begin_and_end_faults(&mut self) {
        let now = self.shared().now;
        for at in 0..self.plan.faults.len() {
            let planned = self.plan.faults[at];
            let is_active = planned.at <= now && now < planned.at + planned.lasts;
            if is_active != self.active[at] && (is_active || self.active[at]) {
                self.active[at] = is_active;
                self.turn(planned, is_active);
            }
        }
    }

    fn end_all_faults(&mut self) {
        self.shared().loses_bank_messages = false;
        for at in 0..self.plan.faults.len() {
            if std::mem::take(&mut self.active[at]) {
                self.turn(self.plan.faults[at], false);
            }
        }
        self.plan.faults.retain(|planned| planned.at < Plan::ACTIVE);
        self.active.resize(self.plan.faults.len(), false);
    }

    /// Begins or ends a fault. Faults of one kind may overlap.
    fn turn(&mut self, planned: Planned, begins: bool) {
        self.shared().note(match begins {
            true => Event::FaultBegins(planned),
            false => Event::FaultEnds(planned),
        });
        let active = self
            .faults
            .iter()
            .zip(&self.active)
            .filter(|(_, is_active)| **is_active);
        let active: Vec<Fault> = active.map(|(planned, _)| planned.fault).collect();
        let any = |is: &dyn Fn(&Fault) -> bool| active.iter().any(is);
        match planned.fault {
            Fault::Crash { process, messages } if begins => {
                let mut shared = self.shared();
                shared.processes[process].dies_after = usize::try_from(messages).ok();
                shared.processes[process].is_dead |= messages == 0;
            }
            Fault::Crash { process, .. } => {
                let is_over = !any(&|fault| matches!(fault, Fault::Crash { process: hit, .. } if *hit == process));
                if is_over {
                    self.shared().processes[process].dies_after = None;
                    self.start(process);
                }
            }
            Fault::Freeze { process, jumps } => {
                self.frozen[process] =
                    any(&|fault| matches!(fault, Fault::Freeze { process: hit, .. } if *hit == process));
                if !self.frozen[process] {
                    self.unfreeze(process, jumps);
                }
            }
            Fault::Block { process, runtime } => {
                let is_blocked = any(&|fault| *fault == planned.fault);
                if let Some(process) = &mut self.processes[process] {
                    process.block(runtime, is_blocked);
                }
            }
            Fault::EndRuntime { process, runtime } => {
                let is_ended = any(&|fault| *fault == planned.fault);
                let Some(hit) = &mut self.processes[process] else {
                    return;
                };
                if is_ended {
                    for (operation, number) in hit.end_runtime(runtime) {
                        self.break_connection(operation, number);
                    }
                } else {
                    hit.start_runtime(runtime);
                }
            }
            Fault::Slow { process, .. } => {
                let mut percents = active.iter().filter_map(|fault| match fault {
                    Fault::Slow { process: hit, percent } if *hit == process => Some(*percent),
                    _ => None,
                });
                self.percent[process] = percents.next_back().unwrap_or(100);
            }
            Fault::CutStore { process, .. } => {
                let is_cut = |is: &dyn Fn(bool, bool) -> bool| {
                    any(&|fault| {
                        matches!(*fault, Fault::CutStore { process: hit, requests, replies }
                            if hit == process && is(requests, replies))
                    })
                };
                let (cut_requests, cut_replies) = (is_cut(&|requests, _| requests), is_cut(&|_, replies| replies));
                let state = &mut self.shared().processes[process];
                (state.cut_requests, state.cut_replies) = (cut_requests, cut_replies);
            }
            Fault::CutBank { process } => {
                let is_cut = any(&|fault| matches!(fault, Fault::CutBank { process: hit } if *hit == process));
                self.shared().processes[process].cut_bank = is_cut;
            }
            Fault::StoreDown | Fault::Failover { .. } => {
                let is_down = any(&|fault| matches!(fault, Fault::StoreDown | Fault::Failover { .. }));
                self.shared().store_is_down = is_down;
                self.shared().reset_store_connections();
                self.host.restart();
                if let (true, Fault::Failover { loses_seen }) = (begins, planned.fault) {
                    self.fail_over(loses_seen);
                }
            }
            Fault::StoreSlow => self.shared().store_is_slow = any(&|fault| *fault == Fault::StoreSlow),
            Fault::Duplicate => self.shared().duplicates = any(&|fault| *fault == Fault::Duplicate),
            Fault::ClockJump { millis } if begins => self.host.turn_clock(millis),
            Fault::ClockJump { .. } => {}
        }
    }

    fn fail_over(&mut self, loses_seen: bool) {
        for (storage_key, fence) in self.host.fail_over(loses_seen) {
            let key = self.keys.iter().position(|known| *known == storage_key);
            let (key, fence) = (key.expect("a key of the plan"), fence.as_u64());
            self.shared().note(Event::GrantLost { key, fence });
        }
    }

    fn unfreeze(&mut self, number: usize, jumps: bool) {
        let behind = std::mem::take(&mut self.behind[number]);
        if let (true, Some(process)) = (jumps, &mut self.processes[number]) {
            process.jump(behind);
        }
    }

    /// Ends a process. Its messages stay on their way, so a client may still get a response that the
    /// process has sent.
    fn kill(&mut self, number: usize) {
        let Some(process) = self.processes[number].take() else {
            return;
        };
        {
            let mut shared = self.shared();
            shared.processes[number].is_dead = true;
            shared.note(Event::Killed { process: number });
        }
        process.kill();
        self.behind[number] = Duration::ZERO;
        for operation in 0..self.clients.len() {
            let at = self.clients[operation].1;
            if self.operations[operation].tries[at].process == number {
                self.break_connection(operation, at);
            }
        }
    }

    /// Breaks the connection of a client that waits. A response that is on its way may still arrive.
    fn break_connection(&mut self, operation: usize, at: usize) {
        if !matches!(self.clients[operation], (Client::Waiting { .. }, current) if current == at) {
            return;
        }
        let is_sent = |message: &Message| matches!(*message, Message::ToClient { operation: of, number, .. } if (of, number) == (operation, at));
        let is_on_its_way = self.shared().messages.values().any(is_sent);
        if !(is_on_its_way && self.random.chance(50)) {
            self.reset(operation);
        }
    }

    fn start(&mut self, number: usize) {
        if self.processes[number].is_none() {
            {
                let state = &mut self.shared().processes[number];
                state.is_dead = false;
                state.incarnation += 1;
            }
            self.processes[number] = Some(Process::start(&self.plan, &self.shared, number));
        }
    }

    /// Checks the responses that have left their processes (I5).
    fn check_responses(&mut self) {
        let responded = std::mem::take(&mut self.shared().responded);
        for (operation, answer) in responded {
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
    fn ask_for_the_outcome(&mut self, key: usize) {
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
    fn ask(&mut self, key: usize, is_other_body: bool) -> Option<Answer> {
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
        let last = self.shared().history.last_answer(operation);
        last
    }

    /// Waits until nothing is left of any request (I11).
    fn drain(&mut self) {
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
    fn check_losses(&mut self) {
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
        let is_short = |planned: &Planned| is_restart(planned) && planned.lasts < Duration::from_millis(700);
        // A late claim may reach the store after the release of that claim. The store then grants
        // the key to a request that no longer waits.
        let is_late = self.has_late_messages();
        // If the replies to a claim are lost for longer than its lease, each further attempt may
        // find nothing certain, until no attempt is left.
        let may_use_attempts_up = self.plan.mode == Mode::Recover && self.plan.max_attempts < 1_000;
        let runs_through = !self.faults.iter().any(stops);
        let is_calm = self.faults.iter().all(is_short);
        for key in 0..self.plan.keys {
            let (mut began, mut failed, mut unknown, mut unrecorded, mut responded) = (0, 0, false, false, false);
            for (_, event) in &self.shared().history.0 {
                match event {
                    Event::Began { key: of, .. } if *of == key => began += 1,
                    Event::Failed { key: of, .. } if *of == key => failed += 1,
                    Event::Responded { key: of, answer, .. } if *of == key => {
                        unknown |= (answer.status, answer.code) == (409, "outcome-unknown");
                        unrecorded |= (answer.status, answer.code) == (503, "outcome-unknown");
                        responded |= is_success(answer);
                    }
                    _ => {}
                }
            }
            if runs_through && !is_late && !may_use_attempts_up && began == 0 && unknown {
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

    /// Whether the plan has a fault that lets a claim reach the store late.
    fn has_late_messages(&self) -> bool {
        let is_late = |planned: &Planned| matches!(planned.fault, Fault::StoreSlow | Fault::Duplicate);
        self.faults.iter().any(is_late)
    }

    /// Whether the plan has a fault that keeps a process from the store.
    fn store_fails(&self) -> bool {
        self.faults.iter().any(keeps_from_the_store)
    }

    /// Whether such a fault may have kept a process from completing a record until now.
    fn store_failed_just_now(&self) -> bool {
        let now = self.shared().now;
        let is_recent = |planned: &Planned| planned.at <= now && now <= planned.at + planned.lasts + LONG_COMPLETION;
        let mut faults = self.faults.iter();
        faults.any(|planned| keeps_from_the_store(planned) && is_recent(planned))
    }

    /// Returns the last response under a key.
    fn last_answer(&self, key: usize) -> Option<Answer> {
        self.shared().history.0.iter().rev().find_map(|(_, event)| match event {
            Event::Responded { key: of, answer, .. } if *of == key => Some(answer.clone()),
            _ => None,
        })
    }

    /// Checks the effects and the responses of the whole history (I2 to I4).
    fn check_effects(&mut self) {
        for key in 0..self.plan.keys {
            let retentions = 1 + self.expired[key].len();
            let mut effects = vec![Vec::new(); retentions];
            for receipt in self.bank.receipts(key) {
                effects[self.retention_of(key, receipt)].push(receipt);
            }
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
                        // An answer without a receipt names no retention.
                        let tells_of_an_effect = answer.status == 208 || answer.code == "response-not-stored";
                        if tells_of_an_effect && retentions == 1 {
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
                    self.violate(format!("I4: key {key} gave one response to two requests"));
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
    fn check_runs(&mut self) {
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

/// The number of the effect that a response names.
fn receipt_in(body: &str) -> Option<usize> {
    let (_, rest) = body.split_once("receipt ")?;
    let number = rest.split_whitespace().next()?;
    number.parse().ok()
}

/// The longest time for which a process tries to complete a record, if its clock runs at half the
/// speed.
const LONG_COMPLETION: Duration = Duration::from_millis(4_000);

fn is_restart(planned: &Planned) -> bool {
    matches!(planned.fault, Fault::StoreDown | Fault::Failover { .. })
}

fn keeps_from_the_store(planned: &Planned) -> bool {
    let is_other = matches!(
        planned.fault,
        Fault::StoreSlow
            | Fault::CutStore { .. }
            | Fault::Freeze { .. }
            | Fault::Block { .. }
            | Fault::EndRuntime { .. }
            | Fault::Slow { .. }
    );
    is_other || is_restart(planned)
}

/// The time that a waiter takes for its last look, if its time is over.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// The longest time of a message to the store and back, without a fault.
const STORE_LATENCY: Duration = Duration::from_millis(100);

/// The longest time between the lookup of a record and the response.
const JUST_NOW: Duration = Duration::from_secs(3);

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
