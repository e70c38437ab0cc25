//! Encodes records as bytes, for stores that store bytes.
//!
//! Version 1. All numbers are little-endian. The body comes last, so that it can be sliced from its
//! buffer.
//!
//! | bytes | content |
//! |---|---|
//! | 1 | version |
//! | 1 | state: 0 in flight, 1 unknown, 2 tombstone, 3 stored response |
//! | 1 | kind of the grant: 0 execute, 1 recover |
//! | 1 + 32 | algorithm and digest of the fingerprint |
//! | 16 + 8 | nonce, fence |
//! | 4 | attempt |
//! | 8 + 8 | lease and retention, µs |
//! | 8 + 8 | end of the lease (0 unless in flight) and expiry, µs since the Unix epoch |
//! | 4 + n | length of the response's head, head (stored response only) |
//! | rest | body (stored response only) |

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::record::{GrantKind, State};
use super::{Fence, Fingerprint, Nonce, Outcome, Owner, Record, StoredResponse};
use crate::clock::Timestamp;
use crate::error::Error;

const VERSION: u8 = 1;
// The length of the fixed fields in bytes, from the version to the expiry.
const FIXED: usize = 1 + 1 + 1 + 33 + 24 + 4 + 16 + 16;

const IN_FLIGHT: u8 = 0;
const UNKNOWN: u8 = 1;
const TOMBSTONE: u8 = 2;
const STORED: u8 = 3;

impl Record {
    /// Encodes the record in the version that this release writes.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(FIXED + 4 + self.response().map_or(0, StoredResponse::len));
        let (state, until) = match &self.state {
            State::InFlight { until } => (IN_FLIGHT, *until),
            State::Unknown | State::Completed(Outcome::Rejected) => (UNKNOWN, Timestamp::default()),
            State::Completed(Outcome::Tombstone) => (TOMBSTONE, Timestamp::default()),
            State::Completed(Outcome::Stored(_)) => (STORED, Timestamp::default()),
        };
        out.put_u8(VERSION);
        out.put_u8(state);
        out.put_u8(u8::from(self.kind == GrantKind::Recover));
        out.put_u8(self.fingerprint.algorithm());
        out.put_slice(self.fingerprint.digest());
        out.put_slice(self.owner.nonce.as_bytes());
        out.put_u64_le(self.owner.fence.as_u64());
        out.put_u32_le(self.attempt);
        out.put_u64_le(micros(self.lease));
        out.put_u64_le(micros(self.retention));
        out.put_u64_le(until.as_micros());
        out.put_u64_le(self.expires.as_micros());
        if let Some(response) = self.response() {
            out.put_u32_le(u32::try_from(response.head.len()).unwrap_or(u32::MAX));
            out.put_slice(&response.head);
            out.put_slice(&response.body);
        }
        out.freeze()
    }

    /// Decodes a record. The head and the body of its response are slices of `bytes`.
    ///
    /// # Errors
    ///
    /// [`CorruptRecord`](crate::ErrorKind::CorruptRecord) if the bytes are damaged, cut short, or
    /// of a version that this release does not know. The key of such a record is in use all the
    /// same. Refuse the request, and never treat the key as absent.
    pub fn from_bytes(mut bytes: Bytes) -> Result<Self, Error> {
        const DAMAGED: Error = Error::corrupt_record("a stored record is damaged");
        const NEWER: Error = Error::corrupt_record(
            "a stored record has a version that this release does not know; update every process that shares the store",
        );
        if *bytes.first().ok_or(DAMAGED)? != VERSION {
            return Err(NEWER);
        }
        if bytes.len() < FIXED {
            return Err(DAMAGED);
        }
        bytes.advance(1);
        let state = bytes.get_u8();
        let kind = match bytes.get_u8() {
            0 => GrantKind::Execute,
            1 => GrantKind::Recover,
            _ => return Err(DAMAGED),
        };
        let fingerprint = Fingerprint::new(bytes.get_u8(), take(&mut bytes));
        let owner = Owner {
            nonce: Nonce::from_bytes(take(&mut bytes)),
            fence: Fence::new(bytes.get_u64_le()),
        };
        let attempt = bytes.get_u32_le();
        let lease = Duration::from_micros(bytes.get_u64_le());
        let retention = Duration::from_micros(bytes.get_u64_le());
        let until = Timestamp::from_micros(bytes.get_u64_le());
        let expires = Timestamp::from_micros(bytes.get_u64_le());
        let state = decode_state(state, until, bytes).ok_or(DAMAGED)?;
        Ok(Self {
            fingerprint,
            owner,
            attempt,
            kind,
            lease,
            retention,
            expires,
            state,
        })
    }
}

/// The columns of a record in a table.
#[cfg(feature = "postgres")]
pub(crate) struct Columns {
    pub(crate) state: u8,
    pub(crate) kind: u8,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) owner: Owner,
    pub(crate) attempt: u32,
    pub(crate) lease: Duration,
    pub(crate) retention: Duration,
    pub(crate) until: Timestamp,
    pub(crate) expires: Timestamp,
    pub(crate) response: Option<StoredResponse>,
}

#[cfg(feature = "postgres")]
impl Record {
    /// Returns the record of these columns. `None` if they are not a valid record.
    pub(crate) fn from_columns(columns: Columns) -> Option<Self> {
        let state = match (columns.state, columns.response) {
            (IN_FLIGHT, None) => State::InFlight { until: columns.until },
            (UNKNOWN, None) => State::Unknown,
            (TOMBSTONE, None) => State::Completed(Outcome::Tombstone),
            (STORED, Some(response)) => State::Completed(Outcome::Stored(response)),
            _ => return None,
        };
        let kind = match columns.kind {
            0 => GrantKind::Execute,
            1 => GrantKind::Recover,
            _ => return None,
        };
        Some(Self {
            fingerprint: columns.fingerprint,
            owner: columns.owner,
            attempt: columns.attempt,
            kind,
            lease: columns.lease,
            retention: columns.retention,
            expires: columns.expires,
            state,
        })
    }
}

/// Decodes the state with this tag. Returns `None` if bytes are missing or left over.
fn decode_state(tag: u8, until: Timestamp, mut rest: Bytes) -> Option<State> {
    if tag != IN_FLIGHT && until != Timestamp::default() {
        return None;
    }
    if tag == STORED {
        let len = usize::try_from(rest.try_get_u32_le().ok()?).ok()?;
        if len > rest.len() {
            return None;
        }
        let head = rest.split_to(len);
        return Some(State::Completed(Outcome::Stored(StoredResponse { head, body: rest })));
    }
    if !rest.is_empty() {
        return None;
    }
    match tag {
        IN_FLIGHT => Some(State::InFlight { until }),
        UNKNOWN => Some(State::Unknown),
        TOMBSTONE => Some(State::Completed(Outcome::Tombstone)),
        _ => None,
    }
}

/// Takes the next `N` bytes. The caller has checked that they are there.
fn take<const N: usize>(bytes: &mut Bytes) -> [u8; N] {
    let mut array = [0; N];
    bytes.copy_to_slice(&mut array);
    array
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::ErrorKind;

    prop_compose! {
        fn a_record()(
            state in 0_u8..4, recover: bool, algorithm: u8, digest: [u8; 32], nonce: [u8; 16], fence: u64, attempt: u32,
            times: [u64; 4], head in prop::collection::vec(any::<u8>(), 0..50), body in prop::collection::vec(any::<u8>(), 0..200),
        ) -> Record {
            let state = match state {
                IN_FLIGHT => State::InFlight { until: Timestamp::from_micros(times[0]) },
                UNKNOWN => State::Unknown,
                TOMBSTONE => State::Completed(Outcome::Tombstone),
                _ => State::Completed(Outcome::Stored(StoredResponse { head: head.into(), body: body.into() })),
            };
            Record {
                fingerprint: Fingerprint::new(algorithm, digest),
                owner: Owner { nonce: Nonce::from_bytes(nonce), fence: Fence::new(fence) },
                attempt,
                kind: if recover { GrantKind::Recover } else { GrantKind::Execute },
                lease: Duration::from_micros(times[1]),
                retention: Duration::from_micros(times[2]),
                expires: Timestamp::from_micros(times[3]),
                state,
            }
        }
    }

    fn first_record() -> Record {
        let claim = crate::protocol::record::tests::claim(1);
        let crate::protocol::Change::Put(record) = Record::claim(None, &claim, Timestamp::from_micros(1)).change else {
            panic!()
        };
        record
    }

    #[test]
    fn a_record_without_a_response_has_no_bytes_behind_its_state() {
        let states = [
            State::InFlight {
                until: Timestamp::from_micros(5),
            },
            State::Unknown,
            State::Completed(Outcome::Tombstone),
        ];
        for state in states {
            let record = Record {
                state,
                ..first_record()
            };
            let bytes = [&record.to_bytes()[..], &[0]].concat();
            let error = Record::from_bytes(bytes.into()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::CorruptRecord);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(record in a_record()) {
            prop_assert_eq!(Record::from_bytes(record.to_bytes()).unwrap(), record);
        }

        #[test]
        fn decoding_is_total(mut bytes: Vec<u8>, version_known: bool) {
            if let (true, Some(first)) = (version_known, bytes.first_mut()) {
                *first = VERSION;
            }
            if let Err(error) = Record::from_bytes(bytes.into()) {
                prop_assert_eq!(error.kind(), ErrorKind::CorruptRecord);
            }
        }

        #[test]
        fn a_damaged_record_is_an_error_or_another_record_but_never_a_panic(
            record in a_record(), at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
        ) {
            let mut bytes = record.to_bytes().to_vec();
            let index = at.index(bytes.len());
            bytes[index] = byte;
            bytes.truncate(cut.index(bytes.len() + 1));
            if let Ok(read) = Record::from_bytes(bytes.clone().into()) {
                prop_assert_eq!(read.to_bytes().to_vec(), bytes);
            }
        }
    }

    #[test]
    fn a_response_may_have_no_body() {
        let done = Record {
            state: State::Completed(Outcome::Stored(StoredResponse {
                head: Bytes::from_static(b"head"),
                body: Bytes::new(),
            })),
            ..first_record()
        };
        assert_eq!(Record::from_bytes(done.to_bytes()).unwrap(), done);
    }

    #[cfg(feature = "postgres")]
    #[test]
    fn columns_of_every_state_and_kind_are_read_and_no_others() {
        let response = StoredResponse::default();
        let states = [
            (IN_FLIGHT, None, Some(State::InFlight { until: Timestamp::MAX })),
            (UNKNOWN, None, Some(State::Unknown)),
            (TOMBSTONE, None, Some(State::Completed(Outcome::Tombstone))),
            (
                STORED,
                Some(response.clone()),
                Some(State::Completed(Outcome::Stored(response.clone()))),
            ),
            (IN_FLIGHT, Some(response), None),
            (STORED, None, None),
            (STORED + 1, None, None),
        ];
        let kinds = [(0, Some(GrantKind::Execute)), (1, Some(GrantKind::Recover)), (2, None)];
        for ((tag, response, state), (number, kind)) in states
            .into_iter()
            .flat_map(|state| kinds.map(|kind| (state.clone(), kind)))
        {
            let record = first_record();
            let read = Record::from_columns(Columns {
                state: tag,
                kind: number,
                fingerprint: record.fingerprint,
                owner: record.owner,
                attempt: record.attempt,
                lease: record.lease,
                retention: record.retention,
                until: Timestamp::MAX,
                expires: record.expires,
                response,
            });
            let wanted = state.zip(kind).map(|(state, kind)| Record { state, kind, ..record });
            assert_eq!(read, wanted, "state {tag}, kind {number}");
        }
    }

    #[test]
    fn a_head_longer_than_the_record_is_damage_and_allocates_nothing() {
        let mut bytes = first_record().to_bytes().to_vec();
        bytes[1] = STORED;
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            Record::from_bytes(bytes.into()).unwrap_err().kind(),
            ErrorKind::CorruptRecord
        );
    }

    #[test]
    fn the_layout_of_version_1_stays() {
        let mut claim = crate::protocol::record::tests::claim(7);
        claim.nonce = Nonce::from_bytes([7; 16]);
        let put = Record::claim(None, &claim, Timestamp::from_micros(1_000_000));
        let crate::protocol::Change::Put(record) = put.change else {
            panic!()
        };
        let bytes = record.to_bytes();
        assert_eq!(bytes.len(), FIXED);
        assert_eq!(&bytes[..4], [1, 0, 0, 3]);
        assert_eq!(&bytes[36..52], [7; 16]);
        assert_eq!(&bytes[52..60], 1_000_000_u64.to_le_bytes());
    }

    #[test]
    fn a_newer_version_is_named_as_such() {
        let error = Record::from_bytes(Bytes::from_static(&[2, 0, 0])).unwrap_err();
        assert!(error.to_string().contains("version"), "{error}");
    }
}
