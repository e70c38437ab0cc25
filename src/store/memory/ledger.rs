//! What a memory store holds and what it costs: records by the second in which they expire, kept answers by age.

use std::collections::{BTreeMap, VecDeque};

use crate::clock::Timestamp;
use crate::protocol::StorageKey;

/// Counts completed records and the bytes of their answers. Knows nothing of the cache that holds them: what it says follows
/// from the records' own expiry, whenever the cache gets round to freeing them.
#[derive(Debug)]
pub(super) struct Ledger {
    byte_budget: u64,
    bytes: u64,
    kept: usize,
    by_age: VecDeque<KeptAnswer>,
    by_second: BTreeMap<u64, Second>,
}

/// A kept answer that may have to shrink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeptAnswer {
    pub(super) key: StorageKey,
    pub(super) expires: Timestamp,
    bytes: u64,
}

/// The records that expire within one second.
#[derive(Debug, Default)]
struct Second {
    records: u64,
    kept: usize,
    bytes: u64,
}

impl Ledger {
    pub(super) const fn new(byte_budget: u64) -> Self {
        Self {
            byte_budget,
            bytes: 0,
            kept: 0,
            by_age: VecDeque::new(),
            by_second: BTreeMap::new(),
        }
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether an answer of this size can be kept at all.
    pub(super) const fn fits(&self, bytes: u64) -> bool {
        bytes <= self.byte_budget
    }

    /// Enters a record that ended with a tombstone.
    pub(super) fn enter_tombstone(&mut self, expires: Timestamp) {
        self.second(expires).records += 1;
    }

    /// Enters a record that ended with an answer; the answers that must shrink for it are handed to `shrink`, oldest first.
    pub(super) fn enter_kept(
        &mut self,
        key: StorageKey,
        expires: Timestamp,
        bytes: u64,
        now: Timestamp,
        mut shrink: impl FnMut(KeptAnswer),
    ) {
        let second = self.second(expires);
        second.records += 1;
        second.kept += 1;
        second.bytes += bytes;
        self.kept += 1;
        self.bytes += bytes;
        self.by_age.push_back(KeptAnswer { key, expires, bytes });
        while self.bytes > self.byte_budget {
            let Some(oldest) = self.by_age.pop_front() else { break };
            if self.forget_answer(&oldest, now) {
                shrink(oldest);
            }
        }
    }

    /// Strikes the records that have expired and returns how many there were.
    pub(super) fn expire(&mut self, now: Timestamp) -> u64 {
        let mut records = 0;
        while let Some(entry) = self.by_second.first_entry() {
            if *entry.key() > now.as_micros() / MICROS {
                break;
            }
            let second = entry.remove();
            records += second.records;
            self.kept -= second.kept;
            self.bytes -= second.bytes;
        }
        // Retentions differ, so the ages are not in the order of expiry: dead entries are swept once they are the majority.
        if self.by_age.len() > 2 * self.kept + 64 {
            self.by_age.retain(|answer| answer.expires > now);
            self.by_age.shrink_to(2 * self.by_age.len());
        }
        records
    }

    /// Takes the bytes of an answer off, unless its second has done so; says whether the answer is still there to shrink.
    fn forget_answer(&mut self, answer: &KeptAnswer, now: Timestamp) -> bool {
        let Some(second) = self.by_second.get_mut(&second_of(answer.expires)) else {
            return false;
        };
        second.bytes -= answer.bytes;
        second.kept -= 1;
        self.bytes -= answer.bytes;
        self.kept -= 1;
        answer.expires > now
    }

    fn second(&mut self, expires: Timestamp) -> &mut Second {
        self.by_second.entry(second_of(expires)).or_default()
    }
}

const MICROS: u64 = 1_000_000;

/// The second at whose beginning a record has certainly expired.
const fn second_of(expires: Timestamp) -> u64 {
    expires.as_micros() / MICROS + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> StorageKey {
        StorageKey::from_bytes([n; 32])
    }

    fn at(second: u64) -> Timestamp {
        Timestamp::from_micros(second * MICROS)
    }

    #[test]
    fn the_oldest_answers_shrink_when_the_bytes_are_used_up() {
        let mut ledger = Ledger::new(100);
        let mut shrunk = Vec::new();
        for n in 0..5 {
            ledger.enter_kept(key(n), at(50), 40, at(1), |answer| shrunk.push(answer.key));
        }
        assert_eq!(shrunk, [key(0), key(1), key(2)]);
        assert_eq!(ledger.bytes(), 80);
        assert_eq!(ledger.expire(at(52)), 5);
        assert_eq!(ledger.bytes(), 0);
    }

    #[test]
    fn a_record_counts_until_its_second_has_passed() {
        let mut ledger = Ledger::new(100);
        ledger.enter_tombstone(at(10));
        assert_eq!(ledger.expire(at(10)), 0);
        assert_eq!(ledger.expire(at(11)), 1);
    }

    #[test]
    fn expired_answers_do_not_pile_up_behind_one_that_lives_long() {
        let mut ledger = Ledger::new(u64::MAX);
        ledger.enter_kept(key(0), at(1_000_000), 1, at(0), |_| {});
        for second in 0..10_000 {
            ledger.enter_kept(key(1), at(second), 1, at(second), |_| {});
            ledger.expire(at(second));
        }
        assert!(ledger.by_age.len() < 200, "{}", ledger.by_age.len());
        assert_eq!(ledger.kept, 2);
    }

    #[test]
    fn an_expired_answer_is_not_taken_off_twice() {
        let mut ledger = Ledger::new(100);
        ledger.enter_kept(key(0), at(5), 80, at(1), |_| {});
        ledger.enter_kept(key(1), at(50), 80, at(7), |answer| panic!("{answer:?} has expired"));
        ledger.expire(at(7));
        assert_eq!(ledger.bytes(), 80);
    }
}
