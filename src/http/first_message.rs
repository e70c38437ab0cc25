//! The end of the first gRPC message in a body.

/// The length of the prefix of a message: a flag and four bytes of length.
const PREFIX: usize = 5;

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

    proptest! {
        #[test]
        fn the_first_message_ends_at_its_last_byte_in_whatever_pieces(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..3),
            pieces in prop::collection::vec(0_usize..8, 0..40),
        ) {
            let framed = messages.iter().map(|message| {
                let length = u32::try_from(message.len()).unwrap();
                [&[0][..], &length.to_be_bytes(), &message[..]].concat()
            });
            let body = framed.collect::<Vec<_>>().concat();
            let end = PREFIX + messages[0].len();
            let (mut first, mut seen) = (FirstMessage::default(), 0);
            for piece in pieces {
                let next = (seen + piece).min(body.len());
                prop_assert_eq!(first.ends_with(&body[seen..next]), next >= end, "{} of {}", next, end);
                seen = next;
            }
        }
    }
}
