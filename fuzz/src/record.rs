//! The codec of records and the transitions of whatever it decodes.
//!
//! The encoded form of a record is unique: bytes that decode are the bytes that the record encodes
//! to. Any other bytes are a corrupt record. A claim on a decoded record obeys the contract of
//! stores at every time that the record mentions.

use std::time::Duration;

use bytes::Bytes;
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Fingerprint, IfLost, Nonce, Outcome, Owner, Record, StorageKey,
};
use tower_idempotency::{ErrorKind, Timestamp};

/// The places of fields in version 1 (`src/protocol/codec.rs`).
const ALGORITHM: usize = 3;
const NONCE: usize = 36;
const FENCE: usize = 52;
const ENDS: usize = 80;
const EXPIRES: usize = 88;
const HEADER: usize = 96;

pub fn property(bytes: &[u8]) {
    let record = match Record::from_bytes(Bytes::copy_from_slice(bytes)) {
        Ok(record) => record,
        Err(error) => return assert_eq!(error.kind(), ErrorKind::CorruptRecord),
    };
    assert_eq!(record.to_bytes(), bytes);
    for near in [0, number(bytes, ENDS), number(bytes, EXPIRES), u64::MAX] {
        for now in [near.saturating_sub(1), near, near.saturating_add(1)] {
            let now = Timestamp::from_micros(now);
            let is_absent = Record::peek(Some(&record), now).is_none();
            assert_eq!(is_absent, record.is_expired(now));
            for if_lost in [IfLost::Execute, IfLost::Recover, IfLost::Refuse] {
                check_claims(bytes, &record, if_lost, now);
            }
            check_owners(bytes, &record, now);
        }
    }
}

/// Checks the claims of the same request and of another request.
fn check_claims(bytes: &[u8], record: &Record, if_lost: IfLost, now: Timestamp) {
    let is_absent = record.is_expired(now);
    let same = claim_for(bytes, if_lost);
    let mut other = same.clone();
    other.fingerprint = Fingerprint::new(bytes[ALGORITHM] ^ 1, *same.fingerprint.digest());
    if !is_absent {
        let decided = Record::claim(Some(record), &other, now);
        assert_eq!((decided.reply, decided.change), (Decision::Mismatch, Change::Unchanged));
    }
    let decided = Record::claim(Some(record), &same, now);
    match &decided.reply {
        Decision::Execute(grant) | Decision::Recover(grant) => {
            assert!(is_absent || record.response().is_none());
            assert_eq!(grant.owner.nonce, same.nonce);
            let before = number(bytes, FENCE);
            assert!(is_absent || before == u64::MAX || grant.owner.fence > Fence::new(before));
            assert!(is_absent || if_lost != IfLost::Refuse);
        }
        Decision::Replay(response) => {
            assert_eq!([&response.head[..], &response.body[..]].concat(), bytes[HEADER + 4..]);
        }
        Decision::Wait { left } => assert!(*left > Duration::ZERO),
        Decision::Mismatch => panic!("the fingerprints are equal"),
        Decision::NotStored | Decision::Unknown => {}
    }
    check_change(&decided.change);
}

/// Checks that only the owner completes a record, and completes it once.
fn check_owners(bytes: &[u8], record: &Record, now: Timestamp) {
    let owner = Owner {
        nonce: Nonce::from_bytes(bytes[NONCE..FENCE].try_into().unwrap()),
        fence: Fence::new(number(bytes, FENCE)),
    };
    let stranger = Owner {
        fence: Fence::new(owner.fence.as_u64() ^ 1),
        ..owner
    };
    let complete = |owner| Record::complete(Some(record), owner, &Outcome::Tombstone, Duration::from_secs(1), now);
    assert_eq!(complete(stranger).change, Change::Unchanged);
    assert_ne!(complete(stranger).reply, Completion::Completed);
    let completed = complete(owner);
    assert_eq!(completed.reply == Completion::Completed, !record.is_expired(now));
    check_change(&completed.change);
    assert!(!record.is_completed() || completed.change == Change::Unchanged);
}

fn check_change(change: &Change) {
    if let Change::Put(record) = change {
        assert_eq!(Record::from_bytes(record.to_bytes()).as_ref().ok(), Some(record));
    }
}

/// Returns the claim of another owner for the request of an encoded record.
pub(crate) fn claim_for(bytes: &[u8], if_lost: IfLost) -> Claim {
    let mut nonce: [u8; 16] = bytes[NONCE..FENCE].try_into().unwrap();
    nonce[0] ^= 1;
    Claim {
        key: StorageKey::from_bytes([7; 32]),
        fingerprint: Fingerprint::new(bytes[ALGORITHM], bytes[ALGORITHM + 1..NONCE].try_into().unwrap()),
        nonce: Nonce::from_bytes(nonce),
        lease: Duration::from_secs(30),
        retention: Duration::from_secs(86_400),
        if_lost,
        max_attempts: 5,
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
