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

/// Makes a fingerprint of a body and of the fields of its request's head.
///
/// The body comes first, because BLAKE3 is fastest on input that begins at a chunk. Each field behind it is followed by its
/// length, the last by the number of fields, the length of the body and the algorithm: read from the end, no two requests
/// run together.
pub(crate) struct Hasher {
    /// The body, where it is short, and what stands behind it.
    tail: Vec<u8>,
    /// The body, where it is long.
    long: Option<Box<blake3::Hasher>>,
    body_len: u64,
    fields: u32,
    algorithm: u8,
}

/// A body up to this length is hashed in one call together with its fields.
const ONE_CALL: usize = 1024;
const FIELDS: usize = 192;

impl Hasher {
    /// Begins with the body as it is.
    pub(crate) fn over_bytes(body: &[u8]) -> Self {
        let mut hasher = Self::new(Fingerprint::BYTES, if body.len() <= ONE_CALL { body.len() } else { 0 });
        if body.len() <= ONE_CALL {
            hasher.tail.extend_from_slice(body);
        } else {
            hasher.long.insert(Box::default()).update(body);
        }
        hasher.body_len = length(body);
        hasher
    }

    /// Begins with the body as canonical JSON; with its bytes when it is no JSON.
    pub(crate) fn over_json(json: &super::CanonicalJson, body: &[u8]) -> Self {
        let mut hasher = Self::new(Fingerprint::JSON, 0);
        let long = hasher.long.insert(Box::default());
        let fed = json.feed(body, &mut |part| {
            long.update(part);
            hasher.body_len += length(part);
        });
        if fed {
            hasher
        } else {
            Self::over_bytes(body)
        }
    }

    fn new(algorithm: u8, body_len: usize) -> Self {
        Self {
            tail: Vec::with_capacity(body_len + FIELDS),
            long: None,
            body_len: 0,
            fields: 0,
            algorithm,
        }
    }

    /// Adds a field of the request's head.
    pub(crate) fn field(&mut self, field: &[u8]) {
        self.tail.extend_from_slice(field);
        self.tail.extend_from_slice(&length(field).to_le_bytes());
        self.fields += 1;
    }

    pub(crate) fn finish(mut self) -> Fingerprint {
        self.tail.extend_from_slice(&self.fields.to_le_bytes());
        self.tail.extend_from_slice(&self.body_len.to_le_bytes());
        self.tail.push(self.algorithm);
        let digest = match &mut self.long {
            Some(long) => long.update(&self.tail).finalize(),
            None => blake3::hash(&self.tail),
        };
        Fingerprint::new(self.algorithm, *digest.as_bytes())
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
        let long = [b'b'; 3 * ONE_CALL];
        let all = [
            fingerprint(&[b"POST", b"/a"], b"b"),
            fingerprint(&[b"POST/", b"a"], b"b"),
            fingerprint(&[b"POST", b"/ab"], b""),
            fingerprint(&[b"POST", b"/a", b""], b"b"),
            fingerprint(&[b"OST", b"/a"], b"bP"),
            fingerprint(&[b"POST", b"/a"], &long),
            fingerprint(&[b"bPOST", b"/a"], &long[1..]),
            fingerprint(&[b"POST", b"/a"], &long[..ONE_CALL]),
            fingerprint(&[b"POST", b"/a"], &long[..=ONE_CALL]),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| one != other), "{at}");
        }
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
    fn json_falls_back_to_bytes_and_says_so() {
        let json = super::super::CanonicalJson::new();
        let over = |body: &[u8]| Hasher::over_json(&json, body).finish();
        assert_eq!(over(b"{\"a\":1,\"b\":2}"), over(b"{ \"b\": 2, \"a\": 1 }"));
        assert_eq!(over(b"{not json").algorithm(), Fingerprint::BYTES);
        assert_ne!(over(b"{not json"), over(b"{not  json"));
    }

    #[test]
    fn the_fingerprints_of_this_version_stay() {
        let short = fingerprint(&[b"POST", b"/"], b"pay");
        let mut input = b"payPOST".to_vec();
        input.extend_from_slice(&4_u64.to_le_bytes());
        input.push(b'/');
        input.extend_from_slice(&1_u64.to_le_bytes());
        input.extend_from_slice(&2_u32.to_le_bytes());
        input.extend_from_slice(&3_u64.to_le_bytes());
        input.push(Fingerprint::BYTES);
        assert_eq!(short.digest(), blake3::hash(&input).as_bytes());
    }
}
