//! The steps of processes, store, network, clock and operator.

use stateright::{Model, Property};

use crate::configuration::{Configuration, Effect, LEASE, MAX_ATTEMPTS};
use crate::properties;
use crate::rules::{Claim, Operation, Outcome, Record, Reply, Rule, TICK, step};
use crate::world::{FOUND, Message, OPERATOR, Phase, World};

/// A step. A number is that of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Sends a claim: the first, or another one after a wait.
    Claim(u8),
    /// Sends the request again, because its reply is missing.
    Repeat(u8),
    Check(u8),
    Effect(u8),
    Finish(u8),
    Fail(u8),
    Renew(u8),
    HangUp(u8),
    Crash(u8),
    Deliver(Message),
    /// Delivers a message and leaves a copy of it in the network.
    Duplicate(Message),
    Lose(Message),
    /// The primary makes the write, and no replica acknowledges it.
    Unacknowledged(Message),
    Resolve(Option<Outcome>),
    Tick,
    TurnBack,
    FailOver,
    Damage,
}

impl Model for Configuration {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.broken.is_some() {
            return;
        }
        for number in (0..).take(world.processes.len()) {
            self.actions_of(number, world, actions);
        }
        let left = world.left;
        for (at, message) in world.network.iter().enumerate() {
            if at > 0 && world.network[at - 1] == *message {
                continue;
            }
            let is_write = matches!(message, Message::Request { from, .. } if *from != OPERATOR);
            let duplicates = left.duplicated_messages > 0 && matches!(message, Message::Request { .. });
            actions.push(Action::Deliver(*message));
            actions.extend(duplicates.then_some(Action::Duplicate(*message)));
            actions.extend((left.lost_messages > 0).then_some(Action::Lose(*message)));
            actions.extend((left.unacknowledged > 0 && is_write).then_some(Action::Unacknowledged(*message)));
        }
        if left.resolutions > 0 {
            self.resolutions(world, actions);
        }
        actions.extend((left.turns > 0).then_some(Action::TurnBack));
        actions.extend((left.failovers > 0).then_some(Action::FailOver));
        actions.extend((left.damages > 0 && world.record.is_some()).then_some(Action::Damage));
        // Beyond the budget, time only passes if everything waits for the end of a lease.
        if left.ticks > 0 || actions.is_empty() && world.is_leased() {
            actions.push(Action::Tick);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Deliver(message) => self.deliver(&mut next, message),
            Action::Duplicate(message) => {
                next.left.duplicated_messages -= 1;
                next.put(message);
                self.deliver(&mut next, message);
            }
            Action::Lose(message) => {
                next.left.lost_messages -= 1;
                next.take(message);
            }
            Action::Unacknowledged(message) => self.unacknowledged(&mut next, message),
            Action::Resolve(found) => {
                next.left.resolutions -= 1;
                let fence = world.record?.owner.fence;
                let found = found.map(|outcome| (outcome, self.retention()));
                next.send(OPERATOR, Operation::Resolve(fence, found));
            }
            Action::Tick => {
                next.now += TICK;
                next.left.ticks = next.left.ticks.saturating_sub(1);
            }
            Action::TurnBack => {
                next.now -= 2 * TICK;
                next.left.turns -= 1;
            }
            Action::FailOver => {
                next.left.failovers -= 1;
                next.record = next.replica.take();
            }
            Action::Damage => {
                next.left.damages -= 1;
                next.is_damaged = true;
            }
            Action::Claim(number)
            | Action::Repeat(number)
            | Action::Check(number)
            | Action::Effect(number)
            | Action::Finish(number)
            | Action::Fail(number)
            | Action::Renew(number)
            | Action::HangUp(number)
            | Action::Crash(number) => self.act(&mut next, number, action),
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

impl Configuration {
    fn actions_of(&self, number: u8, world: &World, actions: &mut Vec<Action>) {
        let process = world.processes[usize::from(number)];
        let is_pending = world
            .network
            .iter()
            .any(|message| message.process() == number && !matches!(message.operation(), Operation::Renew(..)));
        match process.phase {
            Phase::Idle => actions.push(Action::Claim(number)),
            // A watch of the record wakes the process, or the end of the lease does.
            Phase::Waiting if !world.is_leased() && !self.is_without(Rule::WaiterClaimsAgain) => {
                actions.push(Action::Claim(number));
            }
            Phase::Claiming | Phase::Completing(..) | Phase::Releasing(_) if !is_pending => {
                actions.push(Action::Repeat(number));
            }
            Phase::Checking(_) => actions.push(Action::Check(number)),
            Phase::Running(_) => {
                let is_done = process.has_effect || self.effect == Effect::InTransaction;
                actions.push(if is_done {
                    Action::Finish(number)
                } else {
                    Action::Effect(number)
                });
                let may_fail = !process.has_effect && world.left.failures > 0;
                actions.extend(may_fail.then_some(Action::Fail(number)));
                actions.extend((world.left.renewals > 0).then_some(Action::Renew(number)));
            }
            _ => {}
        }
        let is_alive = !process.phase.is_over() && process.phase != Phase::Idle;
        let may_hang_up = is_alive && !process.has_hung_up && world.left.hang_ups > 0;
        actions.extend(may_hang_up.then_some(Action::HangUp(number)));
        actions.extend((is_alive && world.left.crashes > 0).then_some(Action::Crash(number)));
    }

    /// An operator acts on a lost or unknown attempt. It reports an effect only if there was one,
    /// and no effect only if its owner is gone and no other process might still have one.
    fn resolutions(&self, world: &World, actions: &mut Vec<Action>) {
        let lost = world
            .record
            .filter(|record| !record.is_completed() && !world.is_leased());
        let Some(record) = lost else { return };
        actions.push(Action::Resolve(Some(Outcome::Rejected)));
        if world.third_party.effects > 0 {
            actions.push(Action::Resolve(Some(Outcome::Stored(FOUND))));
        }
        let is_harmless = |(number, phase): (usize, Phase)| {
            let owns = usize::try_from(record.owner.nonce).is_ok_and(|owner| owner == number);
            phase.is_over() || !owns && matches!(phase, Phase::Idle | Phase::Waiting)
        };
        let mut phases = world.processes.iter().map(|process| process.phase).enumerate();
        if world.third_party.effects == 0 && phases.all(is_harmless) {
            actions.push(Action::Resolve(None));
        }
    }

    fn claim(&self, number: u8) -> Operation {
        Operation::Claim(Claim {
            fingerprint: self.fingerprints[usize::from(number)],
            nonce: number.cast_signed(),
            lease: LEASE,
            retention: self.retention(),
            if_lost: self.if_lost,
            max_attempts: MAX_ATTEMPTS,
        })
    }

    /// Sends the request that belongs to a phase.
    fn go(&self, world: &mut World, number: u8, phase: Phase) {
        world.process(number).phase = phase;
        match phase {
            Phase::Claiming => world.send(number, self.claim(number)),
            Phase::Completing(owner, outcome) => {
                world.send(number, Operation::Complete(owner, outcome, self.retention()));
            }
            Phase::Releasing(owner) => world.send(number, Operation::Release(owner)),
            _ => {}
        }
    }

    fn act(&self, world: &mut World, number: u8, action: Action) {
        let phase = world.process(number).phase;
        match (action, phase) {
            (Action::Claim(_), _) => self.go(world, number, Phase::Claiming),
            (Action::Repeat(_), phase) => self.go(world, number, phase),
            (Action::Check(_), Phase::Checking(owner)) => {
                if !self.is_without(Rule::CheckRaisesFence) {
                    world.third_party.fence = world.third_party.fence.max(owner.fence);
                }
                let found = world.third_party.response;
                let happened = found.map(|response| Phase::Completing(owner, Outcome::Stored(response)));
                self.go(world, number, happened.unwrap_or(Phase::Running(owner)));
            }
            (Action::Effect(_), Phase::Running(owner)) => {
                if self.effect == Effect::Fenced && owner.fence < world.third_party.fence {
                    self.go(world, number, Phase::Releasing(owner));
                } else {
                    world.make_effect(number);
                    world.process(number).has_effect = true;
                }
            }
            (Action::Finish(_), Phase::Running(owner)) => {
                if self.is_without(Rule::StoredBeforeSeen) {
                    self.see(world, number, number);
                }
                self.go(world, number, Phase::Completing(owner, Outcome::Stored(number)));
            }
            (Action::Fail(_), Phase::Running(owner)) => {
                world.left.failures -= 1;
                self.go(world, number, Phase::Releasing(owner));
            }
            (Action::Renew(_), Phase::Running(owner)) => {
                world.left.renewals -= 1;
                world.send(number, Operation::Renew(owner, LEASE));
            }
            (Action::HangUp(_), phase) => {
                world.left.hang_ups -= 1;
                world.process(number).has_hung_up = true;
                match phase {
                    Phase::Running(owner) if self.is_without(Rule::HangUpChangesNothing) => {
                        self.go(world, number, Phase::Releasing(owner));
                    }
                    Phase::Claiming if self.is_without(Rule::ClaimOfTheGoneEnds) => {
                        world.process(number).phase = Phase::Ended;
                    }
                    Phase::Waiting => world.process(number).phase = Phase::Ended,
                    _ => {}
                }
            }
            (Action::Crash(_), _) => {
                world.left.crashes -= 1;
                world.process(number).phase = Phase::Crashed;
            }
            _ => unreachable!("{action:?} in {phase:?}"),
        }
    }

    fn see(&self, world: &mut World, number: u8, response: u8) {
        let seen = (self.fingerprints[usize::from(number)], response);
        if !world.process(number).has_hung_up && !world.seen.contains(&seen) {
            world.seen.push(seen);
            world.seen.sort_unstable();
        }
    }

    fn deliver(&self, world: &mut World, message: Message) {
        world.take(message);
        match message {
            Message::Request { from, operation, read } => {
                let reads_first = matches!(operation, Operation::Claim(_)) && self.is_without(Rule::ClaimIsAtomic);
                if reads_first && read.is_none() {
                    let read = Some(world.record);
                    return world.put(Message::Request { from, operation, read });
                }
                let reply = self.apply(world, from, operation, read);
                if from != OPERATOR {
                    world.put(Message::Reply {
                        to: from,
                        operation,
                        reply,
                    });
                }
                let is_left_behind =
                    matches!(operation, Operation::Claim(_)) && self.is_without(Rule::ClaimIsReplicated);
                if world.left.failovers > 0 && !is_left_behind {
                    world.replica = world.record;
                }
            }
            Message::Reply { to, operation, reply } => self.receive(world, to, operation, reply),
        }
    }

    /// The primary makes a write that the replica does not have. So the store reports no success.
    fn unacknowledged(&self, world: &mut World, message: Message) {
        world.left.unacknowledged -= 1;
        world.take(message);
        if let Message::Request { from, operation, read } = message {
            self.apply(world, from, operation, read);
        }
    }

    /// Applies an operation at the store.
    fn apply(&self, world: &mut World, from: u8, operation: Operation, read: Option<Option<Record>>) -> Reply {
        if world.is_damaged {
            if !self.is_without(Rule::UnreadableIsNotAbsent) {
                let is_claim = matches!(operation, Operation::Claim(_));
                return if is_claim {
                    Reply::Unknown
                } else {
                    Reply::Superseded(None)
                };
            }
            world.is_damaged = false;
            world.record = None;
        }
        let is_skewed = from == 1 && self.is_without(Rule::OneClock);
        let now = if is_skewed { world.now + LEASE } else { world.now };
        let record = read.unwrap_or(world.record);
        // A clock that only goes forward has moved between two grants, so a fence is greater than all
        // fences before it, also those of deleted records. A store whose clock is turned back
        // compares only with the record that it has.
        let floor = if self.budget.turns == 0 { world.last_fence } else { 0 };
        let (reply, after) = step(record, operation, now, floor, self.without);
        let phase = world.processes.get(usize::from(from)).map(|process| process.phase);
        world.broken = properties::broken_by(world, phase, operation, reply, after);
        match (self.effect, operation) {
            (Effect::InTransaction, Operation::Complete(_, Outcome::Stored(response), _)) if after != record => {
                world.make_effect(response);
            }
            _ => {}
        }
        world.last_fence = match (reply, after) {
            (Reply::Execute(grant) | Reply::Recover(grant), _) => world.last_fence.max(grant.owner.fence),
            (_, None) if self.budget.turns > 0 => 0,
            _ => world.last_fence,
        };
        world.record = after;
        reply
    }

    /// A process receives the reply to one of its requests. It ignores a reply for which it does
    /// not wait.
    fn receive(&self, world: &mut World, number: u8, operation: Operation, reply: Reply) {
        let process = *world.process(number);
        match (process.phase, operation) {
            (Phase::Claiming, Operation::Claim(_)) => {
                if !self.is_without(Rule::ClaimOfTheGoneEnds) {
                    world.network.retain(|message| !message.is_claim_of(number));
                }
                let next = match reply {
                    Reply::Execute(grant) | Reply::Recover(grant) if process.has_hung_up => {
                        Phase::Releasing(grant.owner)
                    }
                    Reply::Execute(grant) => Phase::Running(grant.owner),
                    Reply::Recover(grant) if self.effect == Effect::Fenced => Phase::Checking(grant.owner),
                    Reply::Recover(grant) => Phase::Running(grant.owner),
                    Reply::Wait(_) if !process.has_hung_up => Phase::Waiting,
                    _ => Phase::Ended,
                };
                if let Reply::Replay(response) = reply {
                    self.see(world, number, response);
                }
                self.go(world, number, next);
            }
            (Phase::Completing(owner, Outcome::Stored(own)), Operation::Complete(by, ..)) if owner == by => {
                let response = match reply {
                    Reply::Completed => Some(own),
                    _ if self.is_without(Rule::SupersededDiscards) => Some(own),
                    Reply::Superseded(Some(Outcome::Stored(stands))) => Some(stands),
                    _ => None,
                };
                if let Some(response) = response {
                    self.see(world, number, response);
                }
                world.process(number).phase = Phase::Ended;
            }
            (Phase::Releasing(owner), Operation::Release(by)) if owner == by => {
                world.process(number).phase = Phase::Ended;
            }
            _ => {}
        }
    }
}
