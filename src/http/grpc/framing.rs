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
