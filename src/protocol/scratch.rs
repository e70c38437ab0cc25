//! A buffer for bytes that are hashed. It is on the stack, unless there are many bytes.

/// The size of the part on the stack, in bytes.
const ROOM: usize = 192;

/// Collects bytes in order.
pub(super) struct Scratch {
    short: [u8; ROOM],
    len: usize,
    long: Vec<u8>,
}

impl Scratch {
    pub(super) const fn new() -> Self {
        Self {
            short: [0; ROOM],
            len: 0,
            long: Vec::new(),
        }
    }

    #[inline]
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        if let (true, Some(free)) = (self.long.is_empty(), self.short.get_mut(self.len..end)) {
            free.copy_from_slice(bytes);
            self.len = end;
        } else {
            self.push_to_long(bytes);
        }
    }

    #[cold]
    fn push_to_long(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        if self.long.is_empty() {
            self.long.reserve(2 * end);
            self.long.extend_from_slice(&self.short[..self.len]);
        }
        self.long.extend_from_slice(bytes);
    }

    pub(super) fn push_in_lower_case(&mut self, bytes: &[u8]) {
        let start = self.as_slice().len();
        self.push(bytes);
        let pushed = if self.long.is_empty() {
            &mut self.short[start..self.len]
        } else {
            &mut self.long[start..]
        };
        pushed.make_ascii_lowercase();
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        if self.long.is_empty() {
            &self.short[..self.len]
        } else {
            &self.long
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_pushed_is_there(parts: Vec<Vec<u8>>) {
            let mut scratch = Scratch::new();
            parts.iter().for_each(|part| scratch.push(part));
            prop_assert_eq!(scratch.as_slice(), &parts.concat()[..]);
        }

        #[test]
        fn only_what_is_pushed_in_lower_case_is(before in "[A-Z]{0,250}", pushed in "[A-Z]{0,250}") {
            let mut scratch = Scratch::new();
            scratch.push(before.as_bytes());
            scratch.push_in_lower_case(pushed.as_bytes());
            let wanted = before + &pushed.to_lowercase();
            prop_assert_eq!(scratch.as_slice(), wanted.as_bytes());
        }
    }
}
