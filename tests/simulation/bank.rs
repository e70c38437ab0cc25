//! The third party that a handler calls. Nothing can make it forget an effect.

use std::collections::HashMap;

use crate::plan::Mode;

#[derive(Clone, Debug)]
pub(crate) enum BankRequest {
    /// Charges once more, unless the bank deduplicates by the id or refuses the fence.
    Charge { key: usize, id: String, fence: u64 },
    /// Refuses lower fences from now on, and returns the receipt of the charge, if there is one.
    Find { key: usize, id: String, fence: u64 },
}

impl BankRequest {
    pub(crate) fn key(&self) -> usize {
        match self {
            Self::Charge { key, .. } | Self::Find { key, .. } => *key,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BankReply {
    /// The number of the effect.
    Receipt(usize),
    /// There was no effect, and there will be none of an older fence.
    Nothing,
    /// The fence is too low. The request has no effect.
    Refused,
}

/// The effect of a charge.
#[derive(Clone, Debug)]
pub(crate) struct Effect {
    pub(crate) key: usize,
    id: String,
}

#[derive(Debug)]
pub(crate) struct Bank {
    mode: Mode,
    pub(crate) effects: Vec<Effect>,
    lowest: HashMap<String, u64>,
}

impl Bank {
    pub(crate) fn new(mode: Mode) -> Self {
        Self {
            mode,
            effects: Vec::new(),
            lowest: HashMap::new(),
        }
    }

    pub(crate) fn handle(&mut self, request: BankRequest) -> BankReply {
        match request {
            BankRequest::Charge { key, id, fence } => {
                if fence < self.lowest.get(&id).copied().unwrap_or(0) {
                    return BankReply::Refused;
                }
                match self.find(&id) {
                    Some(receipt) if self.mode == Mode::AtLeastOnce => BankReply::Receipt(receipt),
                    _ => {
                        self.effects.push(Effect { key, id });
                        BankReply::Receipt(self.effects.len())
                    }
                }
            }
            BankRequest::Find { id, fence, .. } => {
                let lowest = self.lowest.entry(id.clone()).or_default();
                *lowest = fence.max(*lowest);
                self.find(&id).map_or(BankReply::Nothing, BankReply::Receipt)
            }
        }
    }

    /// Returns the receipts of all charges under a key of a client.
    pub(crate) fn receipts(&self, key: usize) -> impl DoubleEndedIterator<Item = usize> {
        let effects = self.effects.iter().enumerate();
        effects
            .filter(move |(_, effect)| effect.key == key)
            .map(|(at, _)| at + 1)
    }

    fn find(&self, id: &str) -> Option<usize> {
        self.effects.iter().position(|effect| effect.id == id).map(|at| at + 1)
    }
}
