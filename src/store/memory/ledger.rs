//! The ledger of a memory store: completed records by the second in which they expire, and their
//! responses by age.

use std::collections::{BTreeMap, VecDeque};

use crate::clock::Timestamp;
use crate::protocol::{Fence, Record, StorageKey};

/// The completed records by the time at which they may be removed, and the total size of their
/// responses.
///
/// The ledger only proposes records. The store looks each of them up under the lock of its shard.
/// When the store removes or shrinks a record, it subtracts the size that the record has at that
/// moment. So an entry whose record is gone is harmless, in any order of clocks and locks.
#[derive(Debug)]
pub(super) struct Ledger {
    byte_budget: u64,
    bytes: u64,
    responses: usize,
    by_age: VecDeque<AgedResponse>,
    by_second: BTreeMap<u64, Vec<StorageKey>>,
}

/// A response that may have to become a tombstone, identified by its key and the fence of its
/// attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AgedResponse {
    pub(super) key: StorageKey,
    pub(super) fence: Fence,
    expires: Timestamp,
}

impl Ledger {
    pub(super) const fn new(byte_budget: u64) -> Self {
        Self {
            byte_budget,
            bytes: 0,
            responses: 0,
            by_age: VecDeque::new(),
            by_second: BTreeMap::new(),
        }
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Enters a completed record. Returns true if the responses now exceed the budget.
    pub(super) fn enter(&mut self, key: &StorageKey, record: &Record) -> bool {
        let expires = record.expires_at();
        self.by_second.entry(second_of(expires)).or_default().push(*key);
        if let Some(response) = record.response() {
            self.responses += 1;
            self.bytes = self.bytes.saturating_add(size(response.len()));
            self.by_age.push_back(AgedResponse {
                key: *key,
                fence: record.fence(),
                expires,
            });
        }
        self.bytes > self.byte_budget
    }

    /// Subtracts the response of a record that the store removes or shrinks.
    pub(super) fn count_off(&mut self, record: &Record) {
        if let Some(response) = record.response() {
            self.responses = self.responses.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(size(response.len()));
        }
    }

    /// Removes and returns the oldest response, if the responses exceed the budget.
    pub(super) fn pop_oldest(&mut self) -> Option<AgedResponse> {
        (self.bytes > self.byte_budget).then(|| self.by_age.pop_front())?
    }

    /// Whether the second of expiry of any record has passed.
    pub(super) fn has_expired(&self, now: Timestamp) -> bool {
        let first = self.by_second.first_key_value();
        first.is_some_and(|(second, _)| *second <= now.as_micros() / MICROS)
    }

    /// Removes and returns at most `limit` keys whose second of expiry has passed.
    pub(super) fn pop_expired(&mut self, now: Timestamp, limit: usize) -> Vec<StorageKey> {
        let mut expired = Vec::new();
        while let Some(mut second) = self.by_second.first_entry() {
            let room = limit - expired.len();
            if room == 0 || *second.key() > now.as_micros() / MICROS {
                break;
            }
            let keys = second.get_mut();
            expired.extend(keys.drain(keys.len().saturating_sub(room)..));
            if keys.is_empty() {
                second.remove();
            }
        }
        // Retentions differ, so `by_age` is not in the order of expiry. Remove its expired entries
        // once they are the majority.
        if self.by_age.len() > 2 * self.responses + 64 {
            self.by_age.retain(|response| response.expires > now);
            self.by_age.shrink_to(2 * self.by_age.len());
        }
        expired
    }
}

const MICROS: u64 = 1_000_000;

/// The first full second at which a record has certainly expired.
const fn second_of(expires: Timestamp) -> u64 {
    expires.as_micros() / MICROS + 1
}

fn size(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::protocol::{Change, Claim, Fingerprint, IfLost, Nonce, Outcome, Owner, StoredResponse};

    fn key(n: u8) -> StorageKey {
        StorageKey::from_bytes([n; 32])
    }

    fn at(second: u64) -> Timestamp {
        Timestamp::from_micros(second * MICROS)
    }

    /// Returns a record that completed at `now` and lives for some seconds, with a response of
    /// `bytes` bytes.
    fn completed(now: u64, seconds: u64, bytes: usize) -> Record {
        let claim = Claim {
            key: key(0),
            fingerprint: Fingerprint::of(b"pay"),
            nonce: Nonce::from_bytes([1; 16]),
            lease: Duration::from_secs(30),
            retention: Duration::from_secs(30),
            if_lost: IfLost::Refuse,
            max_attempts: 5,
        };
        let Change::Put(record) = Record::claim(None, &claim, at(now)).change else {
            panic!("a first claim is granted");
        };
        let owner = Owner {
            nonce: claim.nonce,
            fence: record.fence(),
        };
        let outcome = Outcome::Stored(StoredResponse {
            head: vec![0; bytes].into(),
            ..StoredResponse::default()
        });
        let Change::Put(record) =
            Record::complete(Some(&record), owner, &outcome, Duration::from_secs(seconds), at(now)).change
        else {
            panic!("the owner completes");
        };
        record
    }

    #[test]
    fn the_oldest_responses_shrink_when_the_bytes_are_used_up() {
        let mut ledger = Ledger::new(100);
        let record = completed(1, 49, 40);
        let mut shrunk = Vec::new();
        for n in 0..5 {
            ledger.enter(&key(n), &record);
            while let Some(oldest) = ledger.pop_oldest() {
                shrunk.push(oldest.key);
                ledger.count_off(&record);
            }
        }
        assert_eq!(shrunk, [key(0), key(1), key(2)]);
        assert_eq!(ledger.bytes(), 80);
    }

    #[test]
    fn responses_that_take_exactly_the_budget_stay() {
        let mut ledger = Ledger::new(80);
        for (n, exceeds) in [(0, false), (1, false), (2, true)] {
            assert_eq!(ledger.enter(&key(n), &completed(1, 49, 40)), exceeds);
            assert_eq!(ledger.pop_oldest().is_some(), exceeds);
        }
    }

    #[test]
    fn a_record_is_due_only_when_its_second_has_passed() {
        let mut ledger = Ledger::new(100);
        ledger.enter(&key(1), &completed(1, 9, 0));
        assert!(ledger.pop_expired(at(10), 9).is_empty());
        assert_eq!(ledger.pop_expired(at(11), 9), [key(1)]);
        assert!(ledger.by_second.is_empty());
    }

    #[test]
    fn the_records_of_one_second_are_taken_in_portions() {
        let mut ledger = Ledger::new(100);
        for n in 0..10 {
            ledger.enter(&key(n), &completed(1, u64::from(n) / 6, 0));
        }
        let portions = [(); 4].map(|()| ledger.pop_expired(at(50), 4).len());
        assert_eq!(portions, [4, 4, 2, 0]);
    }

    #[test]
    fn expired_responses_do_not_pile_up_behind_one_that_lives_long() {
        let mut ledger = Ledger::new(u64::MAX);
        ledger.enter(&key(0), &completed(0, 1_000_000, 1));
        for second in 1..10_000 {
            let record = completed(second, 0, 1);
            ledger.enter(&key(1), &record);
            for _ in ledger.pop_expired(at(second + 1), usize::MAX) {
                ledger.count_off(&record);
            }
        }
        assert!(ledger.by_age.len() < 200, "{}", ledger.by_age.len());
        assert_eq!(ledger.responses, 1);
    }

    /// A look through all entries would cost too much at each claim.
    #[test]
    fn the_entries_of_expired_responses_are_removed_once_they_are_the_majority() {
        let mut ledger = Ledger::new(u64::MAX);
        let (live, expired) = (completed(1, 9, 1), completed(1, 1, 1));
        for _ in 0..100 {
            ledger.enter(&key(0), &live);
        }
        for (n, entries) in [(164, 264), (1, 100)] {
            for _ in 0..n {
                ledger.enter(&key(1), &expired);
                ledger.count_off(&expired);
            }
            ledger.pop_expired(expired.expires_at(), usize::MAX);
            assert_eq!(ledger.by_age.len(), entries);
        }
        // Half of the room stays free for new responses.
        assert_eq!(ledger.by_age.capacity(), 200);
    }
}
