//! The steps of a random history.

use rand::RngExt;
use rand::rngs::StdRng;

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
    Claim(ClaimParameters),
    Complete { by: Actor, ending: Ending },
    Release { by: Actor },
    Renew { by: Actor, give_up: bool },
    Resolve { by: Actor, found: Found },
}

/// The parameters of a claim. Claimants are numbered, so that their claims are repeated.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClaimParameters {
    pub(super) claimant: usize,
    pub(super) other_request: bool,
    pub(super) if_lost: IfLost,
    pub(super) max_attempts: u32,
    /// Whether to use `claim_now`, if the store implements it.
    pub(super) now: bool,
}

/// The caller of an operation. It is the owner most of the time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Actor {
    /// An owner of a record that was removed.
    PreviousOwner(usize),
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

/// The result that a resolution reports.
#[derive(Clone, Copy, Debug)]
pub(super) enum Found {
    Absent,
    Completed,
    Rejected,
    Tombstone,
}

/// The number of claimants of a key. It is smaller than the number of attempts, so that a claimant
/// can own a key again after another claimant.
pub(super) const CLAIMANTS: usize = 3;

impl Step {
    pub(super) fn random(random: &mut StdRng, keys: usize) -> Self {
        // Most operations use one key, so that its history is deep.
        let key = if chance(random, 5) {
            random.random_range(0..keys)
        } else {
            0
        };
        let by = Actor::random(random);
        let action = match random.random_range(0..20) {
            0..9 => Action::Claim(ClaimParameters::random(random)),
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

impl ClaimParameters {
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

impl Actor {
    fn random(random: &mut StdRng) -> Self {
        let which = random.random_range(0..8);
        match random.random_range(0..12) {
            0 => Self::PreviousOwner(which),
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
            head => Self::StoredResponse(head),
        }
    }
}

impl Found {
    fn random(random: &mut StdRng) -> Self {
        match random.random_range(0..5) {
            0 => Self::Tombstone,
            1 => Self::Completed,
            2 => Self::Rejected,
            _ => Self::Absent,
        }
    }
}
