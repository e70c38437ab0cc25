//! The bounds of an exploration.

use crate::rules::{IfLost, Rule, TICK, Time};

/// The largest number of attempts.
pub(crate) const MAX_ATTEMPTS: u8 = 2;
pub(crate) const LEASE: Time = TICK;

/// The place of the handler's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Somewhere that neither deduplicates nor can be asked.
    Anywhere,
    /// At a third party that can be asked, and that refuses an attempt with a lower fence than the
    /// one that asked last.
    Fenced,
    /// In the database that holds the record, in one transaction with the completion.
    InTransaction,
}

/// How often each event may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Ticks of the store's clock. Further ticks happen only if everything waits for the end of a
    /// lease.
    pub ticks: u8,
    /// Steps of the store's clock backwards, by two ticks.
    pub turns: u8,
    pub lost_messages: u8,
    pub duplicated_messages: u8,
    pub crashes: u8,
    /// Handlers that fail before their effect.
    pub failures: u8,
    /// Callers that hang up.
    pub hang_ups: u8,
    pub renewals: u8,
    pub resolutions: u8,
    pub failovers: u8,
    /// Writes that the primary makes, and that no replica acknowledges.
    pub unacknowledged: u8,
    /// Records that become unreadable.
    pub damages: u8,
}

/// A protocol and the bounds of its exploration.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// The fingerprint of each process's request.
    pub fingerprints: Vec<u8>,
    pub if_lost: IfLost,
    pub effect: Effect,
    pub budget: Budget,
    /// The rule that is left out.
    pub without: Option<Rule>,
}

impl Configuration {
    pub(crate) fn is_without(&self, rule: Rule) -> bool {
        self.without == Some(rule)
    }

    /// Whether the protocol promises at most one effect.
    pub(crate) fn promises_one_effect(&self) -> bool {
        self.if_lost == IfLost::Refuse || self.effect != Effect::Anywhere
    }

    /// The retention. It outlasts every exploration, because it must outlast the last retry.
    pub(crate) fn retention(&self) -> Time {
        if self.is_without(Rule::RetentionIsLong) {
            TICK
        } else {
            99 * TICK
        }
    }
}
