//! The identity of a message.

use std::fmt;

use crate::protocol::Scope;

/// The identity of a message. Two deliveries with the same id are the same message. Make an id from
/// a string, bytes, a number, an `Option` of one of them, or [several parts](Self::of).
///
/// ```
/// use tower_idempotency::receiver::MessageId;
///
/// assert_ne!(MessageId::of(["/orders", "1"]), MessageId::of(["/order", "s1"]));
/// assert_eq!(MessageId::from("1"), MessageId::of(["1"]));
/// assert_eq!(MessageId::from(None::<String>), MessageId::from(""));
/// ```
///
/// An id has 1 to 4096 bytes in all, UTF-8 or not. If ids are unique per source only, make the
/// source a part.
///
/// # Enums of messages
///
/// The id of the thing that a message is about is not the id of the message. If an order is placed
/// and then cancelled, the two messages need two ids. Under one id the cancellation is a duplicate,
/// and the consumer acknowledges it without handling it:
///
/// ```
/// use tower::{service_fn, Layer, ServiceExt};
/// use tower_idempotency::receiver::{MessageId, Receipt, ReceiverLayer};
/// use tower_idempotency::MemoryStore;
///
/// enum Event {
///     OrderPlaced { id: u64 },
///     OrderCancelled { id: u64 },
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let handler = service_fn(|_: Event| async { Ok::<_, std::io::Error>(()) });
///
/// // Wrong: one id for both. The layer logs a WARN event `type-mismatch`.
/// let trap = ReceiverLayer::new(MemoryStore::new(), "billing").with_id(|event: &Event| match event {
///     Event::OrderPlaced { id } | Event::OrderCancelled { id } => *id,
/// });
/// let trap = trap.layer(handler);
/// assert!(matches!(trap.clone().oneshot(Event::OrderPlaced { id: 1 }).await, Ok(Receipt::First(()))));
/// assert!(matches!(trap.oneshot(Event::OrderCancelled { id: 1 }).await, Ok(Receipt::Duplicate)));
///
/// // Right: the type is a part of the id.
/// let layer = ReceiverLayer::new(MemoryStore::new(), "billing").with_id(|event: &Event| match event {
///     Event::OrderPlaced { id } => MessageId::of(["placed", &id.to_string()]),
///     Event::OrderCancelled { id } => MessageId::of(["cancelled", &id.to_string()]),
/// });
/// let consumer = layer.layer(handler);
/// assert!(matches!(consumer.clone().oneshot(Event::OrderPlaced { id: 1 }).await, Ok(Receipt::First(()))));
/// assert!(matches!(consumer.oneshot(Event::OrderCancelled { id: 1 }).await, Ok(Receipt::First(()))));
/// # }
/// ```
///
/// [`ReceiverLayer::with_type`](super::ReceiverLayer::with_type) turns this mistake into an error.
/// Its docs list the cases that stay unnoticed without it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct MessageId {
    parts: Scope,
    /// The length of all parts, in bytes.
    length: usize,
    is_missing: bool,
}

/// The largest length of an id, in bytes.
const MAX_LENGTH: usize = 4096;

impl MessageId {
    /// Makes an id of several parts, such as a source and its id. Two different lists of parts are
    /// two ids.
    ///
    /// The id is [missing](Self::is_missing) if it has no part or an empty part. Otherwise all
    /// messages of a source that come without an id would count as one message.
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

    /// Makes an id whose parts may be empty. It differs from every id of [`of`](Self::of), because
    /// it begins with an empty part.
    pub(super) fn with_optional<'p>(kind: &'p str, parts: impl IntoIterator<Item = &'p [u8]>) -> Self {
        let all = [&[], kind.as_bytes()].into_iter().chain(parts);
        Self {
            is_missing: false,
            ..Self::of(all)
        }
    }

    /// Returns a missing id, for a message without one.
    /// [`on_missing_id`](super::ReceiverLayer::on_missing_id) decides about the message.
    #[must_use]
    pub fn missing() -> Self {
        Self::of([""])
    }

    /// Returns whether the message has no id, or an id with an empty part.
    #[must_use]
    pub const fn is_missing(&self) -> bool {
        self.is_missing
    }

    /// Checks the length of the id.
    pub(super) const fn check(&self) -> Result<(), InvalidMessageId> {
        if self.length > MAX_LENGTH {
            return Err(InvalidMessageId { length: self.length });
        }
        Ok(())
    }

    /// Returns the parts with their lengths.
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

/// Makes ids from numbers, in decimal. `7` of any type and `"7"` are the same id.
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

/// The error of a message whose id is longer than 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidMessageId {
    length: usize,
}

impl InvalidMessageId {
    /// Returns the length of the id, in bytes.
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
