//! Fingerprints: digests of the requests under a key, of 32 bytes each.

use std::fmt;

use sha2::{Digest, Sha256};

use super::scratch::Scratch;

/// A digest of a request, with the id of the algorithm that made it.
///
/// Two requests under one key are "the same" only if algorithm and digest are equal. After a change
/// of the algorithm, an old record does not match, so a request that was not compared never gets
/// its response.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    algorithm: u8,
    digest: [u8; 32],
}

impl Fingerprint {
    /// The fingerprint of a layer that compares nothing. Every request under a key counts as the
    /// same.
    pub const NONE: Self = Self::new(0, [0; 32]);

    /// The id of the algorithm "the body as it is, then method, path, query and headers".
    pub const BYTES: u8 = 1;
    /// The id of the algorithm "the body as canonical JSON, then method, path, query and headers".
    pub const JSON: u8 = 2;
    /// The id of the algorithm "whatever a function of the application returned".
    pub const CUSTOM: u8 = 3;
    /// The id of the algorithm "the parts of a multipart body and its content type without the
    /// boundary, then method, path, query and headers".
    pub const MULTIPART: u8 = 4;
    /// The id of the algorithm "the decompressed messages of a gRPC call, then method, path, query
    /// and headers".
    pub const GRPC: u8 = 5;
    /// The id of the algorithm "BLAKE3 of a message's type in 8 bytes, then of its payload in 24
    /// bytes, zeros without a payload".
    pub const TYPED: u8 = 6;

    /// Returns a fingerprint of a digest that the algorithm with the given id has computed. The ids
    /// 0 to 127 belong to this crate.
    #[must_use]
    pub const fn new(algorithm: u8, digest: [u8; 32]) -> Self {
        Self { algorithm, digest }
    }

    /// Returns a fingerprint over `material`, which the application chose. The digest is BLAKE3.
    #[must_use]
    pub fn of(material: &[u8]) -> Self {
        Self::new(Self::CUSTOM, *blake3::hash(material).as_bytes())
    }

    /// Returns the id of the algorithm.
    #[must_use]
    pub const fn algorithm(&self) -> u8 {
        self.algorithm
    }

    /// Returns the digest.
    #[must_use]
    pub const fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Do not show the digest, because the digest of a short body lets a reader guess the body.
        write!(f, "Fingerprint(algorithm {}, ..)", self.algorithm)
    }
}

/// Computes the fingerprint of a body and of fields of its request's head.
///
/// SHA-256 hashes a short body as it is, and a long body as its BLAKE3 digest. Most processors have
/// instructions for SHA-256, which make it faster than BLAKE3 for 200 bytes. For a megabyte, BLAKE3
/// needs a quarter of the time. Canonical JSON and the parts of a multipart body always go in as a
/// BLAKE3 digest.
///
/// The fields follow the body, each with its length after it. At the end come the number of fields,
/// the length of the body and the algorithm. This sequence can be read from its end, so two
/// different requests never give the same bytes. A number below 255 takes one byte. Any other
/// number takes eight bytes and a byte 255 after them.
pub(crate) struct Hasher {
    sha: Sha256,
    fields: Scratch,
    count: u64,
    body_len: u64,
    algorithm: u8,
}

/// The longest body in bytes that SHA-256 hashes as it is.
const SHORT: usize = 2048;

impl Hasher {
    /// Starts with the body as it is.
    pub(crate) fn over_bytes(body: &[u8]) -> Self {
        Self::over(body, Fingerprint::BYTES)
    }

    /// Starts with the messages of a gRPC call.
    #[cfg(feature = "tonic")]
    pub(crate) fn over_messages(messages: &[u8]) -> Self {
        Self::over(messages, Fingerprint::GRPC)
    }

    fn over(body: &[u8], algorithm: u8) -> Self {
        let mut sha = Sha256::new();
        if body.len() <= SHORT {
            sha.update(body);
        } else {
            sha.update(blake3::hash(body).as_bytes());
        }
        Self::new(sha, algorithm, length(body))
    }

    /// Starts with the body as canonical JSON, or with its bytes if it is not JSON.
    pub(crate) fn over_json(json: &super::CanonicalJson, body: &[u8]) -> Self {
        let (mut hasher, mut len) = (blake3::Hasher::new(), 0);
        let is_json = json.feed(body, &mut |part| {
            hasher.update(part);
            len += length(part);
        });
        if !is_json {
            return Self::over_bytes(body);
        }
        let sha = Sha256::new().chain_update(hasher.finalize().as_bytes());
        Self::new(sha, Fingerprint::JSON, len)
    }

    /// Starts with the pieces of a body that `split` passes on, each after its length. Returns
    /// `None` if `split` does.
    pub(crate) fn over_parts(split: impl FnOnce(&mut dyn FnMut(&[u8])) -> Option<()>) -> Option<Self> {
        let (mut hasher, mut len) = (blake3::Hasher::new(), 0);
        split(&mut |piece| {
            hasher.update(&length(piece).to_le_bytes());
            hasher.update(piece);
            len += length(piece);
        })?;
        let sha = Sha256::new().chain_update(hasher.finalize().as_bytes());
        Some(Self::new(sha, Fingerprint::MULTIPART, len))
    }

    fn new(sha: Sha256, algorithm: u8, body_len: u64) -> Self {
        Self {
            sha,
            fields: Scratch::new(),
            count: 0,
            body_len,
            algorithm,
        }
    }

    /// Adds a field of the request's head.
    pub(crate) fn field(&mut self, field: &[u8]) {
        self.fields.push(field);
        self.number(length(field));
        self.count += 1;
    }

    /// Adds a field in lower case.
    pub(crate) fn field_in_lower_case(&mut self, field: &[u8]) {
        self.fields.push_in_lower_case(field);
        self.number(length(field));
        self.count += 1;
    }

    fn number(&mut self, number: u64) {
        match u8::try_from(number) {
            Ok(number) if number < u8::MAX => self.fields.push(&[number]),
            _ => {
                self.fields.push(&number.to_le_bytes());
                self.fields.push(&[u8::MAX]);
            }
        }
    }

    pub(crate) fn finish(mut self) -> Fingerprint {
        self.number(self.count);
        self.number(self.body_len);
        self.fields.push(&[self.algorithm]);
        self.sha.update(self.fields.as_slice());
        Fingerprint::new(self.algorithm, self.sha.finalize().into())
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(fields: &[&[u8]], body: &[u8]) -> Fingerprint {
        let mut hasher = Hasher::over_bytes(body);
        fields.iter().for_each(|field| hasher.field(field));
        hasher.finish()
    }

    #[test]
    fn fields_and_body_do_not_run_together() {
        let long = [b'b'; 3 * SHORT];
        let all = [
            fingerprint(&[b"POST", b"/a"], b"b"),
            fingerprint(&[b"POST/", b"a"], b"b"),
            fingerprint(&[b"POST", b"/ab"], b""),
            fingerprint(&[b"POST", b"/a", b""], b"b"),
            fingerprint(&[b"OST", b"/a"], b"bP"),
            fingerprint(&[b"POST", b"/a"], &long),
            fingerprint(&[b"POST", b"/a"], blake3::hash(&long).as_bytes()),
            fingerprint(&[b"bPOST", b"/a"], &long[1..]),
            fingerprint(&[b"POST", b"/a"], &long[..SHORT]),
            fingerprint(&[b"POST", b"/a"], &long[..=SHORT]),
            fingerprint(&[b"POST", &long[..254]], b""),
            fingerprint(&[b"POST", &long[..255]], b""),
            fingerprint(&[b"POST", &long[..254], b"\xff"], b""),
            fingerprint(&[&[&long[..254], &[254; 9]].concat()], b""),
            fingerprint(&[&long[..254], &[]], &[254; 8]),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| one != other), "{at}");
        }
    }

    /// A multipart request and a message with a type once had the same id.
    #[test]
    fn every_algorithm_has_its_own_id() {
        let mut ids = [
            Fingerprint::NONE.algorithm(),
            Fingerprint::BYTES,
            Fingerprint::JSON,
            Fingerprint::CUSTOM,
            Fingerprint::MULTIPART,
            Fingerprint::GRPC,
            Fingerprint::TYPED,
        ];
        ids.sort_unstable();
        assert!(ids.windows(2).all(|pair| pair[0] != pair[1]), "{ids:?}");
        assert!(
            ids.iter().all(|id| *id < 128),
            "the ids from 128 on belong to applications"
        );
    }

    #[test]
    fn a_field_in_lower_case_is_the_same_field() {
        let mut mixed = Hasher::over_bytes(b"");
        mixed.field_in_lower_case(b"Shop.Example");
        assert_eq!(mixed.finish(), fingerprint(&[b"shop.example"], b""));
    }

    #[test]
    fn one_byte_makes_a_difference_and_nothing_is_shown() {
        assert_ne!(fingerprint(&[], b"\x00\xff\x01"), fingerprint(&[], b"\x00\xff\x02"));
        assert_eq!(
            format!("{:?}", Fingerprint::of(b"pin 1234")),
            "Fingerprint(algorithm 3, ..)"
        );
        assert_ne!(Fingerprint::of(b""), Fingerprint::NONE);
    }

    #[test]
    fn json_falls_back_to_bytes_and_their_algorithm() {
        let json = super::super::CanonicalJson::new();
        let over = |body: &[u8]| Hasher::over_json(&json, body).finish();
        assert_eq!(over(b"{\"a\":1,\"b\":2}"), over(b"{ \"b\": 2, \"a\": 1 }"));
        assert_eq!(over(b"{not json").algorithm(), Fingerprint::BYTES);
        assert_ne!(over(b"{not json"), over(b"{not  json"));
    }

    /// Stored fingerprints outlive a deployment, so a change of any of these bytes needs a new id.
    #[test]
    fn the_fingerprints_of_this_version_stay() {
        let long = |len: usize| (length(&vec![b'x'; len]).to_le_bytes(), u8::MAX);
        let blake3 = |bytes: &[u8]| blake3::hash(bytes).as_bytes().to_vec();
        for (body, hashed) in [
            (vec![b'x'; SHORT], vec![b'x'; SHORT]),
            (vec![b'x'; SHORT + 1], blake3(&[b'x'; SHORT + 1])),
        ] {
            let (len, mark) = long(body.len());
            let input = [&hashed[..], b"POST\x04/\x01\x02", &len, &[mark, Fingerprint::BYTES]].concat();
            let digest = *fingerprint(&[b"POST", b"/"], &body).digest();
            assert_eq!(digest[..], Sha256::digest(&input)[..]);
        }
        let (len, mark) = long(255);
        let field = [b'x'; 255];
        let input = [&field[..254], &[254], &field, &len, &[mark, 2, 0, Fingerprint::BYTES]].concat();
        let digest = *fingerprint(&[&field[..254], &field], b"").digest();
        assert_eq!(digest[..], Sha256::digest(&input)[..]);

        let (json, body) = (super::super::CanonicalJson::new(), b"{ \"b\": 1, \"a\": [] }");
        let mut canonical = Vec::new();
        assert!(json.feed(body, &mut |part| canonical.extend_from_slice(part)));
        let len = u8::try_from(canonical.len()).unwrap();
        let input = [&blake3(&canonical)[..], &[0, len, Fingerprint::JSON]].concat();
        let digest = *Hasher::over_json(&json, body).finish().digest();
        assert_eq!(digest[..], Sha256::digest(&input)[..]);

        let parts = Hasher::over_parts(|piece| {
            piece(b"abc");
            piece(b"de");
            Some(())
        });
        let pieces = b"\x03\0\0\0\0\0\0\0abc\x02\0\0\0\0\0\0\0de";
        let input = [&blake3(pieces)[..], &[0, 5, Fingerprint::MULTIPART]].concat();
        assert_eq!(parts.unwrap().finish().digest()[..], Sha256::digest(&input)[..]);
        assert!(Hasher::over_parts(|_| None).is_none());
    }
}
