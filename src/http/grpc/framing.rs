//! Splits a body into its messages. Each message follows a prefix, which consists of a flag of one
//! byte and a length of four bytes, big-endian.

/// The length of a message's prefix in bytes.
pub(super) const PREFIX: usize = 5;

/// One message of a body.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message<'b> {
    pub(super) is_compressed: bool,
    pub(super) content: &'b [u8],
}

/// The error for a body that is no sequence of messages.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// An iterator over the messages of a body, in their order.
pub(super) struct Messages<'b> {
    rest: &'b [u8],
}

impl<'b> Messages<'b> {
    pub(super) const fn of(body: &'b [u8]) -> Self {
        Self { rest: body }
    }
}

impl<'b> Iterator for Messages<'b> {
    type Item = Result<Message<'b>, Malformed>;

    /// Returns the next message. A malformed message is the last one.
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.rest);
        let Some((message, rest)) = split(rest) else {
            return Some(Err(Malformed));
        };
        self.rest = rest;
        Some(Ok(message))
    }
}

/// Splits the first message from the rest.
fn split(body: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let (prefix, rest) = body.split_first_chunk::<PREFIX>()?;
    let [flag, length @ ..] = *prefix;
    let (content, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(length)).ok()?)?;
    let is_compressed = match flag {
        0 => false,
        1 => true,
        _ => return None,
    };
    Some((Message { is_compressed, content }, rest))
}

/// Returns the prefix of a message that is not compressed. Returns `None` if the message is too
/// long.
pub(super) fn plain_prefix(length: usize) -> Option<[u8; PREFIX]> {
    let [a, b, c, d] = u32::try_from(length).ok()?.to_be_bytes();
    Some([0, a, b, c, d])
}

/// Detects the end of the first message in a body that arrives in pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FirstMessage {
    prefix: [u8; PREFIX],
    /// The number of bytes of the prefix that have arrived.
    filled: u8,
    /// The number of bytes of the content that have arrived.
    content: u32,
}

impl FirstMessage {
    /// Adds the next piece of the body. Returns whether the message is complete with it.
    pub(crate) fn ends_with(&mut self, mut piece: &[u8]) -> bool {
        for slot in &mut self.prefix[usize::from(self.filled)..] {
            let Some((byte, rest)) = piece.split_first() else {
                return false;
            };
            (*slot, piece) = (*byte, rest);
            self.filled += 1;
        }
        let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        self.content = self.content.saturating_add(length);
        let [_, length @ ..] = self.prefix;
        self.content >= u32::from_be_bytes(length)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn framed(messages: &[Vec<u8>]) -> Vec<u8> {
        let framed = messages.iter().map(|message| {
            let prefix = plain_prefix(message.len()).unwrap();
            [&prefix[..], &message[..]].concat()
        });
        framed.collect::<Vec<_>>().concat()
    }

    proptest! {
        #[test]
        fn messages_come_back(messages: Vec<Vec<u8>>) {
            let body = framed(&messages);
            let split: Result<Vec<_>, _> = Messages::of(&body).collect();
            let contents: Vec<_> = split.unwrap().iter().map(|message| message.content.to_vec()).collect();
            prop_assert_eq!(contents, messages);
        }

        #[test]
        fn the_first_message_ends_at_its_last_byte_in_whatever_pieces(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..3),
            pieces in prop::collection::vec(0_usize..8, 0..40),
        ) {
            let body = framed(&messages);
            let end = PREFIX + messages[0].len();
            let (mut first, mut seen) = (FirstMessage::default(), 0);
            for piece in pieces {
                let next = (seen + piece).min(body.len());
                prop_assert_eq!(first.ends_with(&body[seen..next]), next >= end, "{} of {}", next, end);
                seen = next;
            }
        }
    }

    #[test]
    fn a_body_that_breaks_off_or_has_an_unknown_flag_is_malformed() {
        for body in [
            &[0_u8][..],
            &[0, 0, 0, 0],
            &[0, 0, 0, 0, 1],
            &[2, 0, 0, 0, 0],
            &[0, 255, 255, 255, 255, 1],
        ] {
            let messages: Result<Vec<_>, _> = Messages::of(body).collect();
            assert_eq!(messages, Err(Malformed), "{body:?}");
        }
        assert_eq!(Messages::of(&[9]).count(), 1, "it ends");
    }
}
