//! The outcome of messages, counted from the ledgers.

use std::collections::{BTreeMap, BTreeSet};

/// The outcome of the sent messages.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The number of messages with one effect.
    pub once: usize,
    /// The number of messages without an effect that are dead letters.
    pub dead: usize,
    /// The messages with several effects.
    pub repeated: Vec<String>,
    /// The messages without an effect that are not dead letters either.
    pub lost: Vec<String>,
}

impl Outcome {
    pub fn of(sent: impl IntoIterator<Item = String>, effects: &BTreeMap<String, usize>, dead: &[String]) -> Self {
        let dead: BTreeSet<&String> = dead.iter().collect();
        let mut outcome = Self::default();
        for id in sent {
            match effects.get(&id) {
                Some(1) => outcome.once += 1,
                Some(_) => outcome.repeated.push(id),
                None if dead.contains(&id) => outcome.dead += 1,
                None => outcome.lost.push(id),
            }
        }
        outcome
    }

    /// Whether each message had at most one effect, and no message was lost.
    pub fn is_as_promised(&self) -> bool {
        self.repeated.is_empty() && self.lost.is_empty()
    }
}
