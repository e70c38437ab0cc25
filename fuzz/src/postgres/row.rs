//! A row with a record, in any state and with any damage.

use tower_idempotency::protocol::{Fence, Nonce, Owner, Record};
use tower_idempotency::{Error, ErrorKind, Timestamp};

use crate::input::Input;
use crate::server::check_error;

/// The types of columns by their object id (`pg_type.dat` in PostgreSQL's sources).
pub(super) const BOOL: u32 = 16;
const BYTEA: u32 = 17;
pub(super) const INT8: u32 = 20;
const INT2: u32 = 21;
pub(super) const INT4: u32 = 23;
pub(super) const TEXT: u32 = 25;

const IN_FLIGHT: i16 = 0;
const STORED: i16 = 3;

/// A column: its name, its type and its value in the binary format.
pub(super) type Column = (&'static str, u32, Option<Vec<u8>>);

pub(super) struct Row {
    flags: u8,
    /// The place of the damage, if there is any.
    damage: u8,
    version: i16,
    state: i16,
    kind: i16,
    fingerprint: [u8; 33],
    nonce: [u8; 16],
    attempt: i32,
    /// Fence, lease, retention, end of the lease, expiry, and the time of the server.
    numbers: [i64; 6],
    head: Option<Vec<u8>>,
    body: Option<Vec<u8>>,
}

impl Row {
    pub(super) fn of(input: &mut Input<'_>) -> Self {
        let (flags, damage) = (input.byte(), input.byte());
        let [version, state, kind] = input.take::<3>().map(|byte| i16::from(byte.cast_signed()));
        let (fingerprint, nonce) = (input.take(), input.take());
        let attempt = i32::from_le_bytes(input.take());
        let numbers = [(); 6].map(|()| i64::from_le_bytes(input.take()));
        let length = usize::from(input.byte());
        let (head, body) = (input.part(length).to_vec(), input.rest().to_vec());
        Self {
            flags,
            damage,
            version,
            state,
            kind,
            fingerprint,
            nonce,
            attempt,
            numbers,
            head: (flags & 8 == 0).then_some(head),
            body: (flags & 16 == 0).then_some(body),
        }
    }

    pub(super) fn is_changed(&self) -> bool {
        self.flags & 1 != 0
    }

    pub(super) fn is_standby(&self) -> bool {
        self.flags & 2 != 0
    }

    fn is_absent(&self) -> bool {
        self.flags & 4 != 0
    }

    /// Whether the row belongs to another statement.
    pub(super) fn is_of_other_statement(&self) -> bool {
        self.flags & 32 != 0
    }

    /// Whether the row is of an earlier execution of the statement.
    pub(super) fn is_earlier(&self) -> bool {
        self.flags & 64 != 0
    }

    /// Whether the statement ran in a transaction that was open before.
    pub(super) fn is_in_transaction(&self) -> bool {
        self.flags & 128 != 0
    }

    pub(super) fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.numbers[5].try_into().unwrap_or_default())
    }

    /// Returns the end of the lease, if the record is in flight.
    pub(super) fn lease_end(&self) -> Option<Timestamp> {
        let until = Timestamp::from_micros(self.numbers[3].try_into().unwrap_or_default());
        (self.state == IN_FLIGHT).then_some(until)
    }

    pub(super) fn owner(&self) -> Owner {
        Owner {
            nonce: Nonce::from_bytes(self.nonce),
            fence: Fence::new(self.numbers[0].try_into().unwrap_or_default()),
        }
    }

    pub(super) fn attempt(&self) -> u32 {
        self.attempt.try_into().unwrap_or_default()
    }

    pub(super) fn is_recovery(&self) -> bool {
        self.kind == 1
    }

    /// Returns the record by the codec for bytes; `None` if the row has no valid record.
    fn record(&self) -> Option<Record> {
        let number = |at: usize| u64::try_from(self.numbers[at]).ok().map(u64::to_le_bytes);
        number(5)?;
        let until = number(3)?;
        let until = if self.state == IN_FLIGHT { until } else { [0; 8] };
        let attempt = u32::try_from(self.attempt).ok()?.to_le_bytes();
        let mut bytes = vec![1, u8::try_from(self.state).ok()?, u8::try_from(self.kind).ok()?];
        bytes.extend([&self.fingerprint[..], &self.nonce, &number(0)?, &attempt].concat());
        bytes.extend([number(1)?, number(2)?, until, number(4)?].concat());
        match (&self.head, &self.body, self.state) {
            (Some(head), Some(body), STORED) => {
                bytes.extend(u32::try_from(head.len()).ok()?.to_le_bytes());
                bytes.extend([&head[..], body].concat());
            }
            (None, None, state) if state != STORED => {}
            _ => return None,
        }
        Record::from_bytes(bytes.into()).ok()
    }

    /// Checks the result of an operation. `expected` is its result for a record or none, or `None`
    /// if it fails.
    pub(super) fn check<T: PartialEq + std::fmt::Debug>(
        &self,
        result: Result<T, Error>,
        expected: impl FnOnce(Option<&Record>) -> Option<T>,
    ) {
        let is_mixed_up = self.is_of_other_statement() || self.is_earlier();
        let record = self.record();
        let is_damaged = self.damage != 0 || !self.is_absent() && (self.version != 1 || record.is_none());
        match result {
            Err(error) if is_mixed_up => assert_eq!(error.kind(), ErrorKind::Configuration, "{error:?}"),
            Ok(result) if is_mixed_up => panic!("{result:?} from the row of another statement"),
            Err(error) if self.damage != 0 => check_error(&error),
            Err(error) if is_damaged => assert_eq!(error.kind(), ErrorKind::CorruptRecord, "{error:?}"),
            Ok(result) if is_damaged => panic!("{result:?} from a damaged row"),
            result => {
                let record = record.filter(|_| !self.is_absent());
                let result = result.map_err(|error| check_error(&error)).ok();
                assert_eq!(result, expected(record.as_ref()));
            }
        }
    }

    /// Returns the columns of the record.
    pub(super) fn columns(&self) -> Vec<Column> {
        let null = self.is_absent();
        let some = |bytes: Vec<u8>| (!null).then_some(bytes);
        let number = |at: usize| some(self.numbers[at].to_be_bytes().to_vec());
        let mut columns = vec![
            ("version", INT2, some(self.version.to_be_bytes().to_vec())),
            ("state", INT2, some(self.state.to_be_bytes().to_vec())),
            ("kind", INT2, some(self.kind.to_be_bytes().to_vec())),
            ("fingerprint", BYTEA, some(self.fingerprint.to_vec())),
            ("nonce", BYTEA, some(self.nonce.to_vec())),
            ("fence", INT8, number(0)),
            ("attempt", INT4, some(self.attempt.to_be_bytes().to_vec())),
            ("lease", INT8, number(1)),
            ("retention", INT8, number(2)),
            ("lease_until", INT8, number(3)),
            ("expires", INT8, number(4)),
            ("now", INT8, number(5)),
            ("head", BYTEA, self.head.clone().filter(|_| !null)),
            ("body", BYTEA, self.body.clone().filter(|_| !null)),
            ("changed", BOOL, Some(vec![u8::from(self.is_changed())])),
        ];
        self.damage(&mut columns);
        columns.push(("standby", BOOL, Some(vec![u8::from(self.is_standby())])));
        columns
    }

    /// Removes a column that every row needs, changes its type, shortens its value, or makes it NULL.
    fn damage(&self, columns: &mut Vec<Column>) {
        const VERSION: usize = 0;
        const CHANGED: usize = 14;
        let Some(damage) = self.damage.checked_sub(1) else {
            return;
        };
        let at = match self.is_absent() {
            true => CHANGED,
            false => usize::from(damage / 4) % 12,
        };
        match damage % 4 {
            0 => drop(columns.remove(at)),
            1 => columns[at].1 = TEXT,
            // The driver reads a number of any length.
            2 if columns[at].1 == BYTEA => drop(columns[at].2.as_mut().and_then(Vec::pop)),
            2 => columns[at].1 = BYTEA,
            // A row whose version is NULL shows no record.
            _ => columns[at.max(VERSION + 1)].2 = None,
        }
    }
}
