//! The identity of a message.

use std::fmt;

use crate::protocol::Scope;

/// What makes two deliveries the same message. Made of a string, of bytes, of a number, or of an `Option` of one of them; or
/// [of several parts](Self::of).
///
/// ```
/// use tower_idempotency::receiver::MessageId;
///
/// assert_ne!(MessageId::of(["/orders", "1"]), MessageId::of(["/order", "s1"]));
/// assert_eq!(MessageId::from("1"), MessageId::of(["1"]));
/// assert_eq!(MessageId::from(None::<String>), MessageId::from(""));
/// ```
///
/// Any bytes will do, UTF-8 or not; 1 to 4096 of them in all. An id that several sources give out is none: add the source.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct MessageId {
    parts: Scope,
    /// Of all parts, in bytes.
    length: usize,
    is_missing: bool,
}

/// The most bytes that an id may have.
const MAX_LENGTH: usize = 4096;

impl MessageId {
    /// An id of several parts, such as a source and its id; no two lists of parts run together.
    ///
    /// It is [missing](Self::is_missing) when it has no part, or when any of them is empty: else all messages of a source that come without
    /// an id would be one.
    ///
    /// ```
    /// use tower_idempotency::receiver::MessageId;
    ///
    /// assert!(MessageId::of(["shop-2", ""]).is_missing());
    /// ```
    #[must_use]
    pub fn of<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> Self {
        let (mut length, mut is_missing) = (0, false);
        let parts = Scope::of(parts.into_iter().inspect(|part| {
            length += part.as_ref().len();
            is_missing |= part.as_ref().is_empty();
        }));
        Self {
            parts,
            length,
            is_missing: is_missing || length == 0,
        }
    }

    /// An id of which some parts may be empty. It meets none of [`of`](Self::of)'s: before its kind it has a part that is empty.
    pub(super) fn with_optional<'p>(kind: &'p str, parts: impl IntoIterator<Item = &'p [u8]>) -> Self {
        let all = [&[], kind.as_bytes()].into_iter().chain(parts);
        Self {
            is_missing: false,
            ..Self::of(all)
        }
    }

    /// No id. What becomes of the message is for [`on_missing_id`](super::ReceiverLayer::on_missing_id) to say.
    #[must_use]
    pub fn missing() -> Self {
        Self::of([""])
    }

    /// Whether there is none, or one of which a part is empty.
    #[must_use]
    pub const fn is_missing(&self) -> bool {
        self.is_missing
    }

    pub(super) const fn check(&self) -> Result<(), InvalidMessageId> {
        if self.length > MAX_LENGTH {
            return Err(InvalidMessageId { length: self.length });
        }
        Ok(())
    }

    /// The parts with their lengths.
    pub(super) const fn parts(&self) -> &Scope {
        &self.parts
    }
}

impl From<&str> for MessageId {
    fn from(id: &str) -> Self {
        Self::of([id])
    }
}

impl From<String> for MessageId {
    fn from(id: String) -> Self {
        Self::of([id])
    }
}

impl From<&[u8]> for MessageId {
    fn from(id: &[u8]) -> Self {
        Self::of([id])
    }
}

impl From<Vec<u8>> for MessageId {
    fn from(id: Vec<u8>) -> Self {
        Self::of([id])
    }
}

/// In decimal: `7`, be it of which type, and `"7"` are one.
macro_rules! from_number {
    ($($number:ty),*) => {$(
        impl From<$number> for MessageId {
            fn from(id: $number) -> Self {
                Self::of([id.to_string()])
            }
        }
    )*};
}

from_number!(i8, i16, i32, i64, i128, isize, u8, u16, u32, u64, u128, usize);

impl From<&String> for MessageId {
    fn from(id: &String) -> Self {
        Self::of([id])
    }
}

impl<I: Into<Self>> From<Option<I>> for MessageId {
    fn from(id: Option<I>) -> Self {
        id.map_or_else(Self::missing, Into::into)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MessageId(..)")
    }
}

/// The id of a message is longer than 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidMessageId {
    length: usize,
}

impl InvalidMessageId {
    /// How long it is, in bytes.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.length
    }
}

impl fmt::Display for InvalidMessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { length } = self;
        write!(
            f,
            "the id of the message is {length} bytes long, more than {MAX_LENGTH}; take its hash instead"
        )
    }
}

impl std::error::Error for InvalidMessageId {}
