//! The types of messages. A type that the application sets is a part of the fingerprint. Without
//! it, the layer remembers the variants of enums for a while.
//!
//! An enum of messages sets a trap. If the id of an order is the id of all of its messages, then
//! the cancellation of the order counts as a duplicate of its placement. It is acknowledged and
//! never handled.

use std::hash::{Hash, Hasher};
use std::mem::discriminant;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::protocol::{Fingerprint, StorageKey};

/// The lengths of the two parts of a [typed](Fingerprint::TYPED) fingerprint, in bytes.
const TYPE: usize = 8;
const PAYLOAD: usize = 32 - TYPE;

/// Returns the fingerprint of a message: of its type and its payload, as far as the layer compares
/// them.
pub(super) fn fingerprint(kind: Option<&str>, payload: Option<&[u8]>) -> Fingerprint {
    let Some(kind) = kind else {
        return payload.map_or(Fingerprint::NONE, Fingerprint::of);
    };
    let mut digest = [0; 32];
    digest[..TYPE].copy_from_slice(&blake3::hash(kind.as_bytes()).as_bytes()[..TYPE]);
    if let Some(payload) = payload {
        digest[TYPE..].copy_from_slice(&blake3::hash(payload).as_bytes()[..PAYLOAD]);
    }
    Fingerprint::new(Fingerprint::TYPED, digest)
}

/// The parts of a fingerprint that can be compared.
struct Parts<'f> {
    kind: Option<&'f [u8]>,
    payload: Option<&'f [u8]>,
}

impl<'f> Parts<'f> {
    fn of(fingerprint: &'f Fingerprint) -> Self {
        let digest = fingerprint.digest();
        let (kind, payload) = match fingerprint.algorithm() {
            Fingerprint::TYPED => (Some(&digest[..TYPE]), Some(&digest[TYPE..])),
            // The fingerprint is made from the payload alone, or is empty.
            _ => (None, Some(&digest[..PAYLOAD])),
        };
        Self {
            kind,
            payload: payload.filter(|payload| payload.iter().any(|byte| *byte != 0)),
        }
    }
}

/// The difference between two messages of one id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// The parts that both fingerprints have are equal. The settings changed between the two
    /// messages, so that one fingerprint has a part that the other one lacks.
    Nothing,
    Payload,
    Type,
}

/// Compares the parts that both fingerprints have.
pub(super) fn difference(recorded: &Fingerprint, own: &Fingerprint) -> Difference {
    let (recorded, own) = (Parts::of(recorded), Parts::of(own));
    let differ = |pair: Option<(&[u8], &[u8])>| pair.is_some_and(|(one, other)| one != other);
    if differ(recorded.kind.zip(own.kind)) {
        Difference::Type
    } else if differ(recorded.payload.zip(own.payload)) {
        Difference::Payload
    } else {
        Difference::Nothing
    }
}

/// The variant of an enum, as one byte. All values of a type that is not an enum have the same
/// byte. The byte differs between builds of the program, so the layer never stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant(u8);

impl Variant {
    pub(super) fn of<M>(message: &M) -> Self {
        let mut hasher = Fold(0);
        discriminant(message).hash(&mut hasher);
        Self(hasher.0)
    }
}

/// Folds a number into a byte. The numbers from 0 to 255 stay different, so only an enum with more
/// variants has variants that look alike.
struct Fold(u8);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        u64::from(self.0)
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |sum, byte| sum.wrapping_mul(31) ^ byte);
    }
}

/// The variants of some recent messages of this process. A slot is one word: the tag of the key,
/// with the variant in the lowest byte. A message overwrites the message that had its slot before.
pub(super) struct Variants {
    slots: OnceLock<Box<[AtomicU64; SLOTS]>>,
}

/// The largest number of remembered messages (I10). The slots take 64 KiB.
const SLOTS: usize = 8_192;

impl Variants {
    pub(super) const fn new() -> Self {
        Self { slots: OnceLock::new() }
    }

    /// Remembers the variant of a message that has just been handled.
    pub(super) fn remember(&self, key: &StorageKey, variant: Variant) {
        let (slot, tag) = self.slot_of(key);
        slot.store(tag | u64::from(variant.0), Ordering::Relaxed);
    }

    /// Returns whether an earlier message under this key had another variant. Remembers the variant
    /// if none is known.
    pub(super) fn differs(&self, key: &StorageKey, variant: Variant) -> bool {
        let (slot, tag) = self.slot_of(key);
        let known = slot.load(Ordering::Relaxed);
        if known & TAG != tag {
            slot.store(tag | u64::from(variant.0), Ordering::Relaxed);
            return false;
        }
        known != tag | u64::from(variant.0)
    }

    /// Returns the slot of a key and its tag. The tag is never zero. All bytes of the key are
    /// random, because the key is a hash.
    fn slot_of(&self, key: &StorageKey) -> (&AtomicU64, u64) {
        let slots = self
            .slots
            .get_or_init(|| Box::new([const { AtomicU64::new(0) }; SLOTS]));
        let bytes = key.as_bytes();
        let (slot, tag) = (u16::from_le_bytes([bytes[0], bytes[1]]), &bytes[2..10]);
        let tag = tag.iter().fold(0, |tag, byte| tag << 8 | u64::from(*byte));
        (&slots[usize::from(slot) % SLOTS], tag & TAG | 0x100)
    }
}

/// The bits of a slot that hold the tag.
const TAG: u64 = !0xFF;

#[cfg(test)]
mod tests {
    use super::*;

    enum Event {
        Placed(u64),
        Cancelled { id: u64 },
    }

    #[test]
    fn variants_are_compared_without_their_fields() {
        let of = |event: Event| match &event {
            Event::Placed(id) | Event::Cancelled { id } => (*id, Variant::of(&event)),
        };
        assert_eq!(of(Event::Placed(1)).1, of(Event::Placed(2)).1);
        assert_ne!(of(Event::Placed(1)).1, of(Event::Cancelled { id: 1 }).1);
        assert_eq!(Variant::of(&1), Variant::of(&2));
    }

    #[test]
    fn another_variant_under_a_key_is_noticed_until_its_slot_is_overwritten() {
        let variants = Variants::new();
        let key = |first, tag| {
            let mut bytes = [0; 32];
            (bytes[0], bytes[8]) = (first, tag);
            StorageKey::from_bytes(bytes)
        };
        assert!(!variants.differs(&key(1, 1), Variant(0)));
        assert!(!variants.differs(&key(1, 1), Variant(0)));
        assert!(variants.differs(&key(1, 1), Variant(1)));
        // The message is handled again after its retention.
        variants.remember(&key(1, 1), Variant(1));
        assert!(!variants.differs(&key(1, 1), Variant(1)));
        assert!(!variants.differs(&key(2, 1), Variant(1)));
        // Another key overwrites the slot.
        assert!(!variants.differs(&key(1, 2), Variant(1)));
        assert!(!variants.differs(&key(1, 1), Variant(1)));
        // The variant of another key that had the slot does not count. The last bit of a tag is lost.
        for tag in (0..=255).step_by(2) {
            assert!(!variants.differs(&key(3, tag), Variant(tag)), "{tag}");
        }
    }

    #[test]
    fn all_slots_are_used() {
        let variants = Variants::new();
        let keys: Vec<_> = (0..SLOTS)
            .map(|slot| {
                let mut bytes = [0; 32];
                bytes[..2].copy_from_slice(&u16::try_from(slot).unwrap().to_le_bytes());
                StorageKey::from_bytes(bytes)
            })
            .collect();
        for variant in [Variant(0), Variant(1)] {
            let changed = keys.iter().filter(|key| variants.differs(key, variant)).count();
            assert_eq!(changed, if variant == Variant(0) { 0 } else { SLOTS });
        }
    }

    #[test]
    fn fingerprints_are_compared_in_the_parts_that_both_have() {
        let all = [
            fingerprint(None, None),
            fingerprint(None, Some(b"1")),
            fingerprint(Some("placed"), None),
            fingerprint(Some("placed"), Some(b"1")),
        ];
        for (one, other) in all.iter().flat_map(|one| all.iter().map(move |other| (one, other))) {
            assert_eq!(difference(one, other), Difference::Nothing);
        }
        for kind in [None, Some("placed")] {
            let differs = difference(&fingerprint(kind, Some(b"2")), &fingerprint(Some("placed"), Some(b"1")));
            assert_eq!(differs, Difference::Payload);
        }
        for payload in [None, Some(&b"1"[..])] {
            let differs = difference(
                &fingerprint(Some("cancelled"), payload),
                &fingerprint(Some("placed"), Some(b"1")),
            );
            assert_eq!(differs, Difference::Type);
        }
    }
}
