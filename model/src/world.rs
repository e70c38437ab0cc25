//! A state of the exploration.

use crate::configuration::{Budget, Configuration};
use crate::rules::{Operation, Outcome, Owner, Record, Reply, TICK, Time};

/// Everything that exists at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// The time by the store's clock.
    pub now: Time,
    pub record: Option<Record>,
    /// The record on the failover target, as long as a failover may happen.
    pub replica: Option<Record>,
    pub is_damaged: bool,
    /// The messages in flight, sorted. They arrive in any order.
    pub network: Vec<Message>,
    pub processes: Vec<Process>,
    pub third_party: ThirdParty,
    /// The events that may still happen.
    pub left: Budget,
    /// Each response that a caller has seen, with the fingerprint of that caller's request. Sorted.
    pub seen: Vec<(u8, u8)>,
    /// The highest fence that was granted: ever, or for the current record if the clock may be
    /// turned back.
    pub last_fence: Time,
    /// The property that the last step broke.
    pub broken: Option<&'static str>,
}

/// The place of the effects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ThirdParty {
    pub effects: u8,
    /// The response of the first effect.
    pub response: Option<u8>,
    /// The lowest fence that may have an effect.
    pub fence: Time,
}

/// A process with one request. Its number is also its nonce, and the response of its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    pub phase: Phase,
    pub has_effect: bool,
    /// Whether the caller hung up.
    pub has_hung_up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Idle,
    Claiming,
    /// Another owner has a lease. The process claims again when the record changes.
    Waiting,
    /// The process owns the key and asks the third party first.
    Checking(Owner),
    Running(Owner),
    Completing(Owner, Outcome),
    Releasing(Owner),
    Ended,
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    /// `read` is the record that a claim has read, if it is not atomic.
    Request {
        from: u8,
        operation: Operation,
        read: Option<Option<Record>>,
    },
    Reply {
        to: u8,
        operation: Operation,
        reply: Reply,
    },
}

/// The number of the operator, in the place of a process.
pub(crate) const OPERATOR: u8 = u8::MAX;

/// The response that an operator finds.
pub(crate) const FOUND: u8 = 9;

impl World {
    pub(crate) fn new(configuration: &Configuration) -> Self {
        let process = Process {
            phase: Phase::Idle,
            has_effect: false,
            has_hung_up: false,
        };
        Self {
            now: 4 * TICK,
            record: None,
            replica: None,
            is_damaged: false,
            network: Vec::new(),
            processes: vec![process; configuration.fingerprints.len()],
            third_party: ThirdParty::default(),
            left: configuration.budget,
            seen: Vec::new(),
            last_fence: 0,
            broken: None,
        }
    }

    pub(crate) fn process(&mut self, number: u8) -> &mut Process {
        &mut self.processes[usize::from(number)]
    }

    pub(crate) fn send(&mut self, from: u8, operation: Operation) {
        self.put(Message::Request {
            from,
            operation,
            read: None,
        });
    }

    pub(crate) fn put(&mut self, message: Message) {
        self.network.push(message);
        self.network.sort_unstable();
    }

    pub(crate) fn take(&mut self, message: Message) {
        if let Some(at) = self.network.iter().position(|other| *other == message) {
            self.network.remove(at);
        }
    }

    pub(crate) fn is_leased(&self) -> bool {
        self.record.is_some_and(|record| record.is_leased(self.now))
    }

    /// Makes the effect of a handler that returns `response`.
    pub(crate) fn make_effect(&mut self, response: u8) {
        self.third_party.effects += 1;
        self.third_party.response.get_or_insert(response);
    }
}

impl Message {
    pub(crate) fn operation(&self) -> Operation {
        match *self {
            Self::Request { operation, .. } | Self::Reply { operation, .. } => operation,
        }
    }

    /// Returns the process that waits for this message or its reply.
    pub(crate) fn process(&self) -> u8 {
        match *self {
            Self::Request { from, .. } => from,
            Self::Reply { to, .. } => to,
        }
    }

    pub(crate) fn is_claim_of(&self, process: u8) -> bool {
        self.process() == process && matches!(self.operation(), Operation::Claim(_))
    }
}

impl Phase {
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Ended | Self::Crashed)
    }
}
