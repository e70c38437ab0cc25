//! Public keys of Ed25519.

use std::fmt;

use ring::signature::{ED25519, UnparsedPublicKey};

/// A public key of 32 bytes.
///
/// `ring` verifies strictly. The scalar must be reduced and the point must be encoded canonically,
/// so a signature has no second spelling. `ring` does not reject keys of small order, so
/// [`new`](Self::new) does.
#[derive(Clone)]
pub(super) struct PublicKey(UnparsedPublicKey<[u8; 32]>);

impl PublicKey {
    /// Returns `None` if the key does not have 32 bytes, or is of small order. Anyone can sign for
    /// a key of small order, such as the 32 zero bytes of a placeholder.
    pub(super) fn new(bytes: &[u8]) -> Option<Self> {
        let key: [u8; 32] = bytes.try_into().ok()?;
        (!is_of_small_order(key)).then(|| Self(UnparsedPublicKey::new(&ED25519, key)))
    }

    pub(super) fn verify(&self, signed: &[u8], signature: &[u8]) -> bool {
        self.0.verify(signed, signature).is_ok()
    }
}

/// The y coordinates of the points of order 1, 2, 4 and 8, little-endian, in each encoding that
/// fits into 255 bits.
const SMALL_ORDER: [[u8; 32]; 7] = {
    const fn near_p(last: u8) -> [u8; 32] {
        let mut y = [0xff; 32];
        y[0] = last;
        y[31] = 0x7f;
        y
    }
    let mut one = [0; 32];
    one[0] = 1;
    [
        // 0, of order 4, and p, which is 0 modulo p.
        [0; 32],
        near_p(0xed),
        // 1, of order 1, and p + 1.
        one,
        near_p(0xee),
        // p - 1, of order 2.
        near_p(0xec),
        // Both of order 8.
        [
            0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0, 0xd5, 0xdf,
            0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
        ],
        [
            0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a, 0x20,
            0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
        ],
    ]
};

/// Returns whether the order of a key is small. The highest bit is the sign of x, which does not
/// change the order.
fn is_of_small_order(mut key: [u8; 32]) -> bool {
    key[31] &= 0x7f;
    SMALL_ORDER.contains(&key)
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PublicKey(..)")
    }
}
