//! What became of messages, by the ledgers.

use std::collections::{BTreeMap, BTreeSet};

/// What became of the messages that were sent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Took effect once.
    pub once: usize,
    /// Had no effect, and lie in the dead-letter place.
    pub dead: usize,
    /// Had several effects.
    pub repeated: Vec<String>,
    /// Had no effect, and lie nowhere.
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

    /// At most one effect each, and none lost.
    pub fn is_as_promised(&self) -> bool {
        self.repeated.is_empty() && self.lost.is_empty()
    }
}
