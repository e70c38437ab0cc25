//! What was asked under a key, as 32 bytes.

use std::fmt;

/// A digest of a request, with the id of the algorithm that made it.
///
/// Two requests under one key are "the same" only if algorithm and digest are equal: after a change of algorithm an old
/// record does not match, so that an answer is never given to a request that was not compared.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    algorithm: u8,
    digest: [u8; 32],
}

impl Fingerprint {
    /// Nothing is compared: every request under a key counts as the same.
    pub const NONE: Self = Self::new(0, [0; 32]);

    /// Id of the algorithm "BLAKE3 over the body as it is, then method, path, query and headers".
    pub const BYTES: u8 = 1;
    /// Id of the algorithm "BLAKE3 over the body as canonical JSON, then method, path, query and headers".
    pub const JSON: u8 = 2;
    /// Id of the algorithm "whatever a function of the application returned".
    pub const CUSTOM: u8 = 3;

    /// A fingerprint of a digest that was made with the algorithm of the given id (0 to 127 belong to this crate).
    #[must_use]
    pub const fn new(algorithm: u8, digest: [u8; 32]) -> Self {
        Self { algorithm, digest }
    }

    /// A fingerprint over `material`, which an application chose: BLAKE3 of it.
    #[must_use]
    pub fn of(material: &[u8]) -> Self {
        Self::new(Self::CUSTOM, *blake3::hash(material).as_bytes())
    }

    /// The id of the algorithm.
    #[must_use]
    pub const fn algorithm(&self) -> u8 {
        self.algorithm
    }

    /// The digest.
    #[must_use]
    pub const fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The digest of a short body can be guessed from, so it is not shown.
        write!(f, "Fingerprint(algorithm {}, ..)", self.algorithm)
    }
}

/// The fields of a request that stand behind its body in the fingerprint.
///
/// The body comes first, because BLAKE3 is fastest on input that begins at a chunk. Each field is followed by its length,
/// the last by the number of fields, the length of the body and the algorithm: read from the end, no two requests run
/// together.
#[derive(Debug)]
pub(crate) struct Hasher {
    tail: Vec<u8>,
    fields: u32,
}

/// A body up to this length is hashed in one call together with its tail.
const ONE_CALL: usize = 1024;

impl Hasher {
    pub(crate) fn new() -> Self {
        Self {
            tail: Vec::with_capacity(256),
            fields: 0,
        }
    }

    /// Adds a field of the request's head.
    pub(crate) fn field(&mut self, field: &[u8]) {
        self.tail.extend_from_slice(field);
        let len = u64::try_from(field.len()).unwrap_or(u64::MAX);
        self.tail.extend_from_slice(&len.to_le_bytes());
        self.fields += 1;
    }

    /// The fingerprint over the body as it is.
    pub(crate) fn over_bytes<'b>(self, body: impl Iterator<Item = &'b [u8]> + Clone) -> Fingerprint {
        let len = body.clone().map(<[u8]>::len).sum::<usize>();
        let tail = self.finished_tail(len, Fingerprint::BYTES);
        if len <= ONE_CALL {
            let mut all = Vec::with_capacity(len + tail.len());
            body.for_each(|part| all.extend_from_slice(part));
            all.extend_from_slice(&tail);
            return Fingerprint::new(Fingerprint::BYTES, *blake3::hash(&all).as_bytes());
        }
        let mut hasher = blake3::Hasher::new();
        for part in body {
            hasher.update(part);
        }
        hasher.update(&tail);
        Fingerprint::new(Fingerprint::BYTES, *hasher.finalize().as_bytes())
    }

    /// The fingerprint over the body as canonical JSON; over its bytes when it is no JSON.
    pub(crate) fn over_json(self, json: &super::CanonicalJson, body: &[u8]) -> Fingerprint {
        let mut hasher = blake3::Hasher::new();
        let mut len = 0;
        let fed = json.feed(body, &mut |part| {
            hasher.update(part);
            len += part.len();
        });
        if !fed {
            return self.over_bytes(std::iter::once(body));
        }
        hasher.update(&self.finished_tail(len, Fingerprint::JSON));
        Fingerprint::new(Fingerprint::JSON, *hasher.finalize().as_bytes())
    }

    fn finished_tail(mut self, body_len: usize, algorithm: u8) -> Vec<u8> {
        let body_len = u64::try_from(body_len).unwrap_or(u64::MAX);
        self.tail.extend_from_slice(&self.fields.to_le_bytes());
        self.tail.extend_from_slice(&body_len.to_le_bytes());
        self.tail.push(algorithm);
        self.tail
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fingerprint(fields: &[&[u8]], body: &[&[u8]]) -> Fingerprint {
        let mut hasher = Hasher::new();
        fields.iter().for_each(|field| hasher.field(field));
        hasher.over_bytes(body.iter().copied())
    }

    #[test]
    fn fields_and_body_do_not_run_together() {
        let all = [
            fingerprint(&[b"POST", b"/a"], &[b"b"]),
            fingerprint(&[b"POST/", b"a"], &[b"b"]),
            fingerprint(&[b"POST", b"/ab"], &[b""]),
            fingerprint(&[b"POST", b"/a", b""], &[b"b"]),
            fingerprint(&[b"OST", b"/a"], &[b"bP"]),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| one != other), "{at}");
        }
    }

    #[test]
    fn one_byte_makes_a_difference_and_nothing_is_shown() {
        assert_ne!(
            fingerprint(&[], &[b"\x00\xff\x01"]),
            fingerprint(&[], &[b"\x00\xff\x02"])
        );
        assert_eq!(
            format!("{:?}", Fingerprint::of(b"pin 1234")),
            "Fingerprint(algorithm 3, ..)"
        );
        assert_ne!(Fingerprint::of(b""), Fingerprint::NONE);
    }

    #[test]
    fn json_falls_back_to_bytes_and_says_so() {
        let json = super::super::CanonicalJson::new();
        let over = |body: &[u8]| Hasher::new().over_json(&json, body);
        assert_eq!(over(b"{\"a\":1,\"b\":2}"), over(b"{ \"b\": 2, \"a\": 1 }"));
        assert_eq!(over(b"{not json").algorithm(), Fingerprint::BYTES);
        assert_ne!(over(b"{not json"), over(b"{not  json"));
    }

    proptest! {
        #[test]
        fn how_a_body_is_cut_into_frames_does_not_matter(body in prop::collection::vec(any::<u8>(), 0..5000), cut: prop::sample::Index) {
            let at = cut.index(body.len() + 1);
            prop_assert_eq!(fingerprint(&[b"x"], &[&body]), fingerprint(&[b"x"], &[&body[..at], &body[at..]]));
        }
    }
}
