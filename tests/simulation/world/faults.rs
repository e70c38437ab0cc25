//! The faults of a plan: their beginnings, their ends, and which of them explain what.

use std::time::Duration;

use super::{Client, World};
use crate::history::Event;
use crate::link::Message;
use crate::plan::{Fault, Plan, Planned, Try};
use crate::process::Process;

/// The longest time for which a process tries to complete a record, if its clock runs at half the
/// speed.
pub(super) const LONG_COMPLETION: Duration = Duration::from_millis(5_000);

pub(super) fn is_restart(planned: &Planned) -> bool {
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

impl World {
    /// Whether a fault kept the process, or the runtime of a request, from running at its speed since
    /// this time.
    pub(super) fn is_disturbed(&self, Try { process, runtime, .. }: Try, since: Duration) -> bool {
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

    pub(super) fn begin_and_end_faults(&mut self) {
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

    pub(super) fn end_all_faults(&mut self) {
        self.shared().loses_bank_messages = false;
        for at in 0..self.plan.faults.len() {
            if std::mem::take(&mut self.active[at]) {
                self.turn(self.plan.faults[at], false);
            }
        }
        self.plan.faults.retain(|planned| planned.at < Plan::ACTIVE);
        let now = self.shared().now;
        for planned in &mut self.plan.faults {
            planned.lasts = planned.lasts.min(now.saturating_sub(planned.at));
        }
        self.active.resize(self.plan.faults.len(), false);
    }

    /// Begins or ends a fault. Faults of one kind may overlap.
    pub(super) fn turn(&mut self, planned: Planned, begins: bool) {
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
            _ => self.turn_messages(planned.fault, begins, &active),
        }
    }

    /// Begins or ends a fault of the store or of messages.
    fn turn_messages(&mut self, fault: Fault, begins: bool, active: &[Fault]) {
        let any = |is: &dyn Fn(&Fault) -> bool| active.iter().any(is);
        match fault {
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
                if let (true, Fault::Failover { loses_seen }) = (begins, fault) {
                    self.fail_over(loses_seen);
                }
            }
            Fault::StoreSlow => self.shared().store_is_slow = any(&|fault| *fault == Fault::StoreSlow),
            Fault::Duplicate => self.shared().duplicates = any(&|fault| *fault == Fault::Duplicate),
            Fault::ClockJump { millis } if begins => self.host.turn_clock(millis),
            _ => {}
        }
    }

    pub(super) fn fail_over(&mut self, loses_seen: bool) {
        for (storage_key, fence) in self.host.fail_over(loses_seen) {
            let key = self.keys.iter().position(|known| *known == storage_key);
            let (key, fence) = (key.expect("a key of the plan"), fence.as_u64());
            self.shared().note(Event::GrantLost { key, fence });
        }
    }

    pub(super) fn unfreeze(&mut self, number: usize, jumps: bool) {
        let behind = std::mem::take(&mut self.behind[number]);
        if let (true, Some(process)) = (jumps, &mut self.processes[number]) {
            process.jump(behind);
        }
    }

    /// Ends a process. Its messages stay on their way, so a client may still get a response that the
    /// process has sent.
    pub(super) fn kill(&mut self, number: usize) {
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
    pub(super) fn break_connection(&mut self, operation: usize, at: usize) {
        if !matches!(self.clients[operation], (Client::Waiting { .. }, current) if current == at) {
            return;
        }
        let is_sent = |message: &Message| matches!(*message, Message::ToClient { operation: of, number, .. } if (of, number) == (operation, at));
        let is_on_its_way = self.shared().messages.values().any(is_sent);
        if !(is_on_its_way && self.random.chance(50)) {
            self.reset(operation);
        }
    }

    pub(super) fn start(&mut self, number: usize) {
        if self.processes[number].is_none() {
            {
                let state = &mut self.shared().processes[number];
                state.is_dead = false;
                state.incarnation += 1;
            }
            self.processes[number] = Some(Process::start(&self.plan, &self.shared, number));
        }
    }

    /// Whether the plan has a fault that lets a claim reach the store late.
    pub(super) fn has_late_messages(&self) -> bool {
        let is_late = |planned: &Planned| matches!(planned.fault, Fault::StoreSlow | Fault::Duplicate);
        self.faults.iter().any(is_late)
    }

    /// Whether the plan has a fault that keeps a process from the store.
    pub(super) fn store_fails(&self) -> bool {
        self.faults.iter().any(keeps_from_the_store)
    }

    /// Whether such a fault was active until recently.
    pub(super) fn store_failed_just_now(&self) -> bool {
        let now = self.shared().now;
        let is_recent = |planned: &Planned| planned.at <= now && now <= planned.at + planned.lasts + LONG_COMPLETION;
        let mut faults = self.faults.iter();
        faults.any(|planned| keeps_from_the_store(planned) && is_recent(planned))
    }
}
