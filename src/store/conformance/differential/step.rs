//! The steps of a random history.

use rand::rngs::StdRng;
use rand::RngExt;

use super::chance;
use crate::protocol::IfLost;

/// An operation on one of the keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) key: usize,
    pub(super) action: Action,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    Claim(Asked),
    Complete { by: By, ending: Ending },
    Release { by: By },
    Renew { by: By, give_up: bool },
    Resolve { by: By, found: Found },
}

/// What a claim asks for. Claimants are numbered, so that their claims are repeated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) claimant: usize,
    pub(super) other_request: bool,
    pub(super) if_lost: IfLost,
    pub(super) max_attempts: u32,
    /// By `claim_now`, where the store answers to it.
    pub(super) now: bool,
}

/// Who acts: mostly the owner.
#[derive(Clone, Copy, Debug)]
pub(super) enum By {
    /// An owner of a record that is gone.
    Ghost(usize),
    Nobody,
    OtherFence,
    OtherNonce,
    Owner,
    Predecessor(usize),
}

/// The outcome of a completion.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    StoredResponse(u8),
    Rejected,
    Tombstone,
}

/// What a resolution says.
#[derive(Clone, Copy, Debug)]
pub(super) enum Found {
    Absent,
    Completed,
    Tombstone,
}

/// How many claimants a key has; fewer than attempts, so that one may come again as somebody else's successor.
pub(super) const CLAIMANTS: usize = 3;

impl Step {
    pub(super) fn random(random: &mut StdRng, keys: usize) -> Self {
        // Most happens to one key: histories are to be deep.
        let key = if chance(random, 5) {
            random.random_range(0..keys)
        } else {
            0
        };
        let by = By::random(random);
        let action = match random.random_range(0..20) {
            0..9 => Action::Claim(Asked::random(random)),
            9..14 => Action::Renew {
                by,
                give_up: !chance(random, 4),
            },
            14..16 => Action::Complete {
                by,
                ending: Ending::random(random),
            },
            16..18 => Action::Release { by },
            _ => Action::Resolve {
                by,
                found: Found::random(random),
            },
        };
        Self { key, action }
    }
}

impl Asked {
    fn random(random: &mut StdRng) -> Self {
        Self {
            claimant: random.random_range(0..CLAIMANTS),
            other_request: chance(random, 8),
            if_lost: match random.random_range(0..8) {
                0..2 => IfLost::Refuse,
                2..5 => IfLost::Recover,
                _ => IfLost::Execute,
            },
            max_attempts: random.random_range(1..=4),
            now: chance(random, 2),
        }
    }
}

impl By {
    fn random(random: &mut StdRng) -> Self {
        let which = random.random_range(0..8);
        match random.random_range(0..12) {
            0 => Self::Ghost(which),
            1 => Self::Nobody,
            2 => Self::OtherFence,
            3 => Self::OtherNonce,
            4 => Self::Predecessor(which),
            _ => Self::Owner,
        }
    }
}

impl Ending {
    fn random(random: &mut StdRng) -> Self {
        if chance(random, 4) {
            return Self::Tombstone;
        }
        match random.random() {
            0..64 => Self::Rejected,
            answer => Self::StoredResponse(answer),
        }
    }
}

impl Found {
    fn random(random: &mut StdRng) -> Self {
        match random.random_range(0..4) {
            0 => Self::Tombstone,
            1 => Self::Completed,
            _ => Self::Absent,
        }
    }
}
