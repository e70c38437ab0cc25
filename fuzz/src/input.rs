//! The input of a property, read from its start. After its end, every byte is zero.

pub(crate) struct Input<'i>(&'i [u8]);

impl<'i> Input<'i> {
    pub(crate) fn new(bytes: &'i [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let part = self.part(N);
        taken[..part.len()].copy_from_slice(part);
        taken
    }

    /// Returns the next `length` bytes, or the bytes that are left if these are fewer.
    pub(crate) fn part(&mut self, length: usize) -> &'i [u8] {
        let (part, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        part
    }

    pub(crate) fn rest(&mut self) -> &'i [u8] {
        std::mem::take(&mut self.0)
    }
}

/// Splits an input at its first byte `FF`, which no UTF-8 text contains. Without this byte, the
/// second part is empty.
pub(crate) fn halves(bytes: &[u8]) -> (&[u8], &[u8]) {
    match bytes.iter().position(|byte| *byte == 0xff) {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (bytes, &[]),
    }
}
