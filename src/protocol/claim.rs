//! The questions that are put to a store, and its answers.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;

use super::{Fingerprint, StorageKey};
use crate::clock::Timestamp;

/// 128 random bits by which a claim and its owner are recognised. Chosen *before* the claim, so that a claim whose reply was
/// lost can be repeated.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce([u8; 16]);

impl Nonce {
    /// A new nonce from the thread's cryptographic generator.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        rand::rng().fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The nonce of the given bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Returns another nonce, with the first byte inverted. A record that a resolution completed has this nonce in
    /// place of its owner's, so that it belongs to nobody. Unlike a reserved value, it differs from every nonce that a
    /// claim may choose for this attempt.
    pub(super) const fn disowned(self) -> Self {
        let Self(mut bytes) = self;
        bytes[0] = !bytes[0];
        Self(bytes)
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nonce(..)")
    }
}

/// A number that grows with every attempt under a key: `max(last + 1, store time in µs)`.
///
/// Pass it to a third party that can refuse requests with an older fence. While the record exists, its fence grows even
/// if the store's clock is set back. The release of a first attempt and the end of the retention delete the record and
/// its fence. After that, a memory store still gives a higher fence, because it remembers the highest fence that it has
/// given. A store on a server takes the server's time as the next fence, which is higher unless the server's clock was
/// set back in the meantime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence(u64);

impl Fence {
    /// The fence of the given number.
    #[must_use]
    pub const fn new(fence: u64) -> Self {
        Self(fence)
    }

    /// The number.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Returns the fence of the attempt that follows the attempt with this fence, and begins at `now`.
    pub(crate) fn next(self, now: Timestamp) -> Self {
        Self(now.as_micros().max(self.0.saturating_add(1)))
    }
}

/// Who holds a key: nonce *and* fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Chosen by the claimant.
    pub nonce: Nonce,
    /// Given by the store.
    pub fence: Fence,
}

/// What happens to a key whose owner vanished: its lease ran out and nobody knows how far it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "stores must handle every case")]
pub enum IfLost {
    /// The next claim runs: at-least-once.
    Execute,
    /// The next claim is told to ask first what became of the effect.
    Recover,
    /// Nobody runs again; the outcome is unknown until it is completed late or resolved: at-most-once.
    #[default]
    Refuse,
}

/// Asks a store for a key.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "stores read every field; a new one changes their contract"
)]
pub struct Claim {
    /// The record's name.
    pub key: StorageKey,
    /// What was asked.
    pub fingerprint: Fingerprint,
    /// Names this claim; a repetition carries the same.
    pub nonce: Nonce,
    /// How long the owner may go without renewal.
    pub lease: Duration,
    /// How long the record lives past the end of the lease, should the owner vanish.
    pub retention: Duration,
    /// What to do with a vanished owner's key.
    pub if_lost: IfLost,
    /// How many attempts a key gets in all before its outcome is unknown; at least 1.
    pub max_attempts: u32,
}

/// The right to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "stores make it")]
pub struct Grant {
    /// The owner that the key now has.
    pub owner: Owner,
    /// 1 for the first attempt under the key.
    pub attempt: u32,
    /// The lease to renew; `None` from a store whose owners live as long as it does.
    pub lease: Option<Duration>,
}

/// The answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "this is the protocol: whoever claims must handle every case"
)]
pub enum Decision {
    /// Run.
    Execute(Grant),
    /// The key was used for another request.
    Mismatch,
    /// It was done, and its answer was not kept.
    NotStored,
    /// An earlier attempt was lost: ask what became of it, then run if nothing did.
    Recover(Grant),
    /// It was done: this is the answer.
    Replay(StoredResponse),
    /// An earlier attempt was lost and nobody may run again.
    Unknown,
    /// Somebody is at it.
    Wait {
        /// The time left of the owner's lease.
        left: Duration,
    },
}

/// A finished answer, as a store sees it: two byte strings.
#[derive(Clone, Default, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "stores make it")]
pub struct StoredResponse {
    /// Status, headers and trailers, or whatever the layer needs beside the body.
    pub head: Bytes,
    /// The body.
    pub body: Bytes,
}

impl StoredResponse {
    /// The bytes of head and body together.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// Copies head and body into one allocation of exactly their length.
    ///
    /// The bytes of an answer may be slices of far larger buffers, such as those of a cache, a file or a connection. A
    /// store that holds answers in this process and counts their bytes must copy them. Otherwise it holds more memory
    /// than it counts.
    #[must_use]
    pub fn to_exact(&self) -> Self {
        let mut whole = Vec::with_capacity(self.len());
        whole.extend_from_slice(&self.head);
        whole.extend_from_slice(&self.body);
        let mut head = Bytes::from(whole);
        let body = head.split_off(self.head.len());
        Self { head, body }
    }

    /// Whether head and body are empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for StoredResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoredResponse({} + {} bytes)", self.head.len(), self.body.len())
    }
}

/// How a key ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores must handle every case")]
pub enum Outcome {
    /// With an answer that every repetition gets.
    Stored(StoredResponse),
    /// With a final rejection. A record that is completed with this outcome becomes [unknown](Status::Unknown), even for a
    /// claim that would run a lost attempt again. It stays so until an operator resolves the key or the retention is over.
    /// Receivers record it for a message that its handler rejects.
    Rejected,
    /// With an answer that is not kept: nobody runs again, and nobody gets it.
    Tombstone,
}

impl Outcome {
    /// Returns the same outcome, with an answer that uses no memory beyond its own bytes.
    pub(crate) fn to_exact(&self) -> Self {
        match self {
            Self::Stored(answer) => Self::Stored(answer.to_exact()),
            Self::Rejected => Self::Rejected,
            Self::Tombstone => Self::Tombstone,
        }
    }
}

/// The answer to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum Renewal {
    /// The lease has a new deadline.
    Renewed,
    /// Somebody else holds the key, or nobody.
    Superseded,
}

/// The answer to a completion.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum Completion {
    /// The outcome is recorded.
    Completed,
    /// Somebody else holds the key; with the outcome that stands, if there is one.
    Superseded(Option<Outcome>),
}

/// The answer to a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum Release {
    /// The key is free, or was; or its lease is over, where an earlier attempt left its evidence.
    Released,
    /// Somebody else holds the key, or it is completed.
    Superseded,
}

/// What an operator or a hook found out about a lost attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores must handle every case")]
pub enum Resolution {
    /// It had no effect: the next request runs.
    Absent,
    /// It took effect, with this outcome, to be kept this long.
    Completed(Outcome, Duration),
}

/// The answer to a resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum ResolveResult {
    /// The record has moved on (this is its fence; `None`: it is absent), or its owner is alive, or it is completed.
    Conflict(Option<Fence>),
    /// Done.
    Resolved,
}

/// A record as [`peek`](crate::Store::peek) shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "stores make it")]
pub struct Snapshot {
    /// What was asked under the key.
    pub fingerprint: Fingerprint,
    /// The nonce of the current or last attempt. If a resolution completed the record, a nonce that differs from it.
    pub nonce: Nonce,
    /// The fence of the current or last attempt.
    pub fence: Fence,
    /// The number of the current or last attempt.
    pub attempt: u32,
    /// How far it is.
    pub status: Status,
}

/// How far a record is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "this is the protocol: whoever peeks must handle every case"
)]
pub enum Status {
    /// It ended.
    Completed(Outcome),
    /// Somebody is at it.
    InFlight {
        /// The time left of the owner's lease.
        left: Duration,
    },
    /// The owner's lease ran out; the next claim decides.
    Lost,
    /// The owner's lease ran out, or the owner [rejected](Outcome::Rejected) the request. No attempt may run.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonces_differ_and_hide() {
        assert_ne!(Nonce::random(), Nonce::random());
        assert_eq!(format!("{:?}", Nonce::random()), "Nonce(..)");
    }

    #[test]
    fn an_answer_shows_its_lengths_only() {
        let answer = StoredResponse {
            head: Bytes::from_static(b"head"),
            body: Bytes::from_static(b"card 4242"),
        };
        assert_eq!(format!("{answer:?}"), "StoredResponse(4 + 9 bytes)");
        assert!(!answer.is_empty());
    }
}
