//! Conversion between rows and records.

use std::time::Duration;

use bytes::Bytes;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use crate::clock::Timestamp;
use crate::error::Error;
use crate::protocol::{Columns, Fence, Fingerprint, IfLost, Nonce, Outcome, Owner, Record, StoredResponse};

/// The row that every statement on a record returns.
pub(super) struct Row {
    /// Whether the statement changed the record. If it did, a claim shows the changed record, and
    /// every other statement shows the record as it was before.
    pub(super) changed: bool,
    /// The record and the server's time; `None` if there is no row in the table.
    pub(super) seen: Option<(Record, Timestamp)>,
    /// The time since the lease of a changed record began.
    pub(super) leased_for: Duration,
}

impl Row {
    pub(super) fn read(row: &PgRow) -> Result<Self, Error> {
        let changed = row.try_get("changed").map_err(unreadable)?;
        let Some(version) = row.try_get::<Option<i16>, _>("version").map_err(unreadable)? else {
            return Ok(Self {
                changed,
                seen: None,
                leased_for: Duration::ZERO,
            });
        };
        if version != VERSION {
            return Err(NEWER);
        }
        let seen = Some(record(row).map_err(unreadable)?.ok_or(DAMAGED)?);
        let leased_for = changed.then(|| leased_for(row)).flatten();
        Ok(Self {
            changed,
            seen,
            leased_for: leased_for.unwrap_or_default(),
        })
    }
}

fn leased_for(row: &PgRow) -> Option<Duration> {
    let leased_at = number(row, "lease_until")?.saturating_sub(number(row, "lease")?);
    let leased_for = number(row, "now")?.saturating_sub(leased_at);
    Some(Duration::from_micros(leased_for))
}

/// The layout that this release writes.
const VERSION: i16 = 1;

const DAMAGED: Error = Error::corrupt_record(
    "a stored record is damaged; find out whether its request took effect before you delete the row",
);
const NEWER: Error = Error::corrupt_record(
    "a stored record has a version that this release does not know; update every process that shares the store",
);

/// Returns the error of a column that is missing or has another type.
fn unreadable(error: sqlx::Error) -> Error {
    const OTHER: Error = Error::corrupt_record(
        "a stored record cannot be read; compare the columns of its table with `PostgresStore::schema`",
    );
    OTHER.with_source(error)
}

fn record(row: &PgRow) -> Result<Option<(Record, Timestamp)>, sqlx::Error> {
    let state: i16 = row.try_get("state")?;
    let (head, body) = (bytes(row, "head")?, bytes(row, "body")?);
    let columns = || {
        let fingerprint: &[u8] = row.try_get("fingerprint").ok()?;
        let (algorithm, digest) = fingerprint.split_first()?;
        let nonce: &[u8] = row.try_get("nonce").ok()?;
        let response = match (head, body) {
            (Some(head), Some(body)) => Some(StoredResponse { head, body }),
            (None, None) => None,
            _ => return None,
        };
        Some(Columns {
            state: u8::try_from(state).ok()?,
            kind: u8::try_from(row.try_get::<i16, _>("kind").ok()?).ok()?,
            fingerprint: Fingerprint::new(*algorithm, digest.try_into().ok()?),
            owner: Owner {
                nonce: Nonce::from_bytes(nonce.try_into().ok()?),
                fence: Fence::new(number(row, "fence")?),
            },
            attempt: u32::try_from(row.try_get::<i32, _>("attempt").ok()?).ok()?,
            lease: Duration::from_micros(number(row, "lease")?),
            retention: Duration::from_micros(number(row, "retention")?),
            until: Timestamp::from_micros(number(row, "lease_until")?),
            expires: Timestamp::from_micros(number(row, "expires")?),
            response,
        })
    };
    let now = number(row, "now").map(Timestamp::from_micros);
    Ok(columns().and_then(Record::from_columns).zip(now))
}

fn number(row: &PgRow, column: &str) -> Option<u64> {
    u64::try_from(row.try_get::<i64, _>(column).ok()?).ok()
}

fn bytes(row: &PgRow, column: &str) -> Result<Option<Bytes>, sqlx::Error> {
    let bytes: Option<&[u8]> = row.try_get(column)?;
    Ok(bytes.map(Bytes::copy_from_slice))
}

/// Returns whole microseconds, at most a century, so that sums of times fit into a `bigint`.
pub(super) fn micros(duration: Duration) -> i64 {
    const CENTURY: i64 = 100 * 365 * 86_400 * 1_000_000;
    i64::try_from(duration.as_micros()).unwrap_or(CENTURY).min(CENTURY)
}

pub(super) fn fence(fence: Fence) -> i64 {
    i64::try_from(fence.as_u64()).unwrap_or(i64::MAX)
}

pub(super) fn fingerprint(fingerprint: &Fingerprint) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(33);
    bytes.push(fingerprint.algorithm());
    bytes.extend_from_slice(fingerprint.digest());
    bytes
}

pub(super) const fn if_lost(if_lost: IfLost) -> i16 {
    match if_lost {
        IfLost::Execute => 0,
        IfLost::Recover => 1,
        IfLost::Refuse => 2,
    }
}

/// Returns state, head and body of an outcome.
pub(super) fn outcome(outcome: &Outcome) -> (i16, Option<&[u8]>, Option<&[u8]>) {
    match outcome {
        Outcome::Rejected => (1, None, None),
        Outcome::Tombstone => (2, None, None),
        Outcome::Stored(response) => (3, Some(&response.head), Some(&response.body)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_time_is_a_century_and_sums_of_times_fit() {
        let century = Duration::from_secs(100 * 365 * 86_400);
        assert_eq!(micros(Duration::from_millis(1_500)), 1_500_000);
        for duration in [century, century + Duration::from_secs(1), Duration::MAX] {
            assert_eq!(u128::try_from(micros(duration)).unwrap(), century.as_micros());
        }
        assert!(micros(Duration::MAX).checked_mul(3).is_some());
    }
}
