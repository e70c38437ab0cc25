//! The operations of a store, and its replies.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;

use super::{Fingerprint, StorageKey};
use crate::clock::Timestamp;

/// 128 random bits that identify a claim and its owner. The claimant chooses them *before* the
/// claim, so that it can repeat a claim whose reply was lost.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce([u8; 16]);

impl Nonce {
    /// Returns a new nonce from the thread's cryptographic generator.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        rand::rng().fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// Returns the nonce of the given bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Returns another nonce, with the first byte inverted. If a resolution completes a record, the
    /// record gets this nonce in place of its owner's, so that nobody owns it. A reserved value
    /// would not do, because a claim could choose that value. The inverted nonce always differs
    /// from that of the attempt.
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
/// Pass it to a third party that can reject requests with an older fence. While the record exists,
/// its fence grows even if the store's clock is set back (I9). The release of a first attempt and
/// the end of the retention delete the record and its fence. After that, a memory store still gives
/// a higher fence, because it remembers the highest fence that it has given. A store on a server
/// uses the server's time as the next fence, which is higher unless the server's clock was set back
/// in the meantime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence(u64);

impl Fence {
    /// Returns the fence with the given number.
    #[must_use]
    pub const fn new(fence: u64) -> Self {
        Self(fence)
    }

    /// Returns the number.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Returns the fence of an attempt that starts at `now`, after the attempt with this fence.
    pub(crate) fn next(self, now: Timestamp) -> Self {
        Self(now.as_micros().max(self.0.saturating_add(1)))
    }
}

/// The owner of a key: nonce *and* fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The nonce that the claimant chose.
    pub nonce: Nonce,
    /// The fence that the store gave.
    pub fence: Fence,
}

/// The treatment of a key whose owner vanished. Its lease expired, and nobody knows whether it had
/// an effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "stores must handle every case")]
pub enum IfLost {
    /// The next claim runs (at least once).
    Execute,
    /// The owner of the next claim must first check whether the lost attempt took effect.
    Recover,
    /// No claim runs. The outcome is unknown until a late completion or a resolution (at most
    /// once).
    #[default]
    Refuse,
}

/// A claim: it asks a store for a key.
#[derive(Clone, Debug)]
#[expect(
    clippy::exhaustive_structs,
    reason = "stores read every field; a new one changes their contract"
)]
pub struct Claim {
    /// The name of the record.
    pub key: StorageKey,
    /// The fingerprint of the request.
    pub fingerprint: Fingerprint,
    /// The identity of this claim. A repeat of the claim has the same nonce.
    pub nonce: Nonce,
    /// The longest time that the owner may go without a renewal.
    pub lease: Duration,
    /// The time for which the record outlives the lease if the owner vanishes.
    pub retention: Duration,
    /// The treatment of the key if its owner vanished.
    pub if_lost: IfLost,
    /// The maximum number of attempts for a key before its outcome is unknown, at least 1.
    pub max_attempts: u32,
}

/// The right to run, which the store gives to an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "stores make it")]
pub struct Grant {
    /// The owner that the key now has.
    pub owner: Owner,
    /// The number of the attempt. The first attempt under a key has number 1.
    pub attempt: u32,
    /// The lease that the owner must renew. `None` from a store whose owners live as long as it
    /// does.
    pub lease: Option<Duration>,
}

/// The reply to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "this is the protocol: a caller must handle every case"
)]
pub enum Decision {
    /// The claimant owns the key and runs.
    Execute(Grant),
    /// The key was used for another request.
    Mismatch,
    /// The request took effect, and its response was not stored.
    NotStored,
    /// An earlier attempt was lost. The claimant owns the key. It must check whether the lost
    /// attempt took effect, and run only if it did not.
    Recover(Grant),
    /// The request took effect, and this is its response.
    Replay(StoredResponse),
    /// An earlier attempt was lost, and no claim may run.
    Unknown,
    /// Another owner holds the key.
    Wait {
        /// The time left of the owner's lease.
        left: Duration,
    },
}

/// A response as a store sees it: two byte strings.
#[derive(Clone, Default, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "stores make it")]
pub struct StoredResponse {
    /// The status, the headers and the trailers, or other data that the layer needs beside the
    /// body.
    pub head: Bytes,
    /// The body.
    pub body: Bytes,
}

impl StoredResponse {
    /// Returns the length of head and body together, in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// Copies head and body into one allocation of exactly their length.
    ///
    /// The bytes of a response may be slices of far larger buffers, such as those of a cache, a
    /// file or a connection. A store that holds responses in this process and counts their bytes
    /// must copy them. Otherwise it holds more memory than it counts.
    #[must_use]
    pub fn to_exact(&self) -> Self {
        let mut whole = Vec::with_capacity(self.len());
        whole.extend_from_slice(&self.head);
        whole.extend_from_slice(&self.body);
        let mut head = Bytes::from(whole);
        let body = head.split_off(self.head.len());
        Self { head, body }
    }

    /// Returns whether head and body are empty.
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

/// The end of a key's execution.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores must handle every case")]
pub enum Outcome {
    /// A response that every duplicate gets.
    Stored(StoredResponse),
    /// A final rejection. A record that is completed with this outcome becomes
    /// [unknown](Status::Unknown), even for claims that would run a lost attempt again. It stays
    /// unknown until an operator resolves the key or the retention ends. Receivers record this
    /// outcome for a message that its handler rejects.
    Rejected,
    /// A response that is not stored. The request does not run again, and no duplicate gets the
    /// response.
    Tombstone,
}

impl Outcome {
    /// Returns the same outcome. Its response, if it has one, uses no memory beyond its own bytes.
    pub(crate) fn to_exact(&self) -> Self {
        match self {
            Self::Stored(response) => Self::Stored(response.to_exact()),
            Self::Rejected => Self::Rejected,
            Self::Tombstone => Self::Tombstone,
        }
    }
}

/// The reply to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum Renewal {
    /// The lease has a new deadline.
    Renewed,
    /// The owner does not hold the key any more. Another attempt took it over, or the record is
    /// completed, unknown or absent.
    Superseded,
}

/// The reply to a completion.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum Completion {
    /// The outcome is recorded.
    Completed,
    /// The owner does not hold the key any more. The value is the recorded outcome, if there is
    /// one.
    Superseded(Option<Outcome>),
}

/// The reply to a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum Release {
    /// The key is free, unless it had an earlier attempt. In that case the record stays as
    /// evidence, with its lease expired or its outcome unknown.
    Released,
    /// Another owner holds the key, or the record is completed.
    Superseded,
}

/// The fate of a lost attempt, as an operator or a hook found it out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores must handle every case")]
pub enum Resolution {
    /// The attempt had no effect. The next request runs.
    Absent,
    /// The attempt took effect. The values are its outcome and the retention of the record from now
    /// on.
    Completed(Outcome, Duration),
}

/// The reply to a resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "stores make it")]
pub enum ResolveResult {
    /// The record cannot be resolved. It has another fence, or its owner is alive, or it is
    /// completed. The value is the fence of the record, `None` if there is no record.
    Conflict(Option<Fence>),
    /// The resolution is recorded.
    Resolved,
}

/// The state of a record, as [`peek`](crate::Store::peek) returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "stores make it")]
pub struct Snapshot {
    /// The fingerprint of the requests under the key.
    pub fingerprint: Fingerprint,
    /// The nonce of the current or last attempt. If a resolution completed the record, another
    /// nonce.
    pub nonce: Nonce,
    /// The fence of the current or last attempt.
    pub fence: Fence,
    /// The number of the current or last attempt.
    pub attempt: u32,
    /// The state of the record.
    pub status: Status,
}

/// The state of a record at a point in time.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::exhaustive_enums,
    reason = "this is the protocol: a caller must handle every case"
)]
pub enum Status {
    /// The record is completed with this outcome.
    Completed(Outcome),
    /// An owner holds the key.
    InFlight {
        /// The time left of the owner's lease.
        left: Duration,
    },
    /// The owner's lease has expired. The next claim decides what happens.
    Lost,
    /// No attempt may run. A lost attempt was refused another run, its attempts are used up, or the
    /// owner [rejected](Outcome::Rejected) the request.
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
    fn a_stored_response_shows_its_lengths_only() {
        let response = StoredResponse {
            head: Bytes::from_static(b"head"),
            body: Bytes::from_static(b"card 4242"),
        };
        assert_eq!(format!("{response:?}"), "StoredResponse(4 + 9 bytes)");
    }

    #[test]
    fn an_exact_copy_equals_its_response_in_one_allocation() {
        for (head, body) in [("", ""), ("head", ""), ("", "body"), ("head", "longer body")] {
            let response = StoredResponse {
                head: head.into(),
                body: body.into(),
            };
            let exact = response.to_exact();
            assert_eq!(exact, response);
            assert_eq!(response.len(), (head.to_owned() + body).len());
            assert_eq!(response.is_empty(), head.is_empty() && body.is_empty());
            let end_of_head = exact.head.as_ptr().wrapping_add(exact.head.len());
            assert!(exact.body.is_empty() || exact.body.as_ptr() == end_of_head);
        }
    }
}
