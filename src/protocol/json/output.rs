//! Writes the bytes of the canonical form.

use super::number::Number;
use super::string::RawString;

/// The number of bytes to collect before a call of the sink, because hashing byte by byte would be
/// slow.
pub(super) const CHUNK: usize = 4096;

/// The end mark of a string or of a number's text. UTF-8 text never contains this byte.
pub(super) const END: u8 = 0xff;

/// Passes the canonical bytes to the sink in chunks.
pub(super) struct Output<'s> {
    buffer: Vec<u8>,
    sink: &'s mut dyn FnMut(&[u8]),
    /// True while the writer skips an excluded element.
    pub(super) mute: bool,
}

impl<'s> Output<'s> {
    pub(super) fn new(sink: &'s mut dyn FnMut(&[u8])) -> Self {
        Self {
            buffer: Vec::new(),
            sink,
            mute: false,
        }
    }

    pub(super) fn string(&mut self, string: RawString<'_>) {
        self.write(b"\"");
        if string.escaped {
            for char in string.chars() {
                self.write(char.encode_utf8(&mut [0; 4]).as_bytes());
            }
        } else {
            self.write(string.content.as_bytes());
        }
        self.write(&[END]);
    }

    pub(super) fn number(&mut self, number: &Number<'_>) {
        let Some(decimal) = number.decimal() else {
            self.write(b"~");
            self.write(number.text.as_bytes());
            return self.write(&[END]);
        };
        self.write(if number.negative { b"#-" } else { b"#+" });
        for digits in decimal.digits {
            self.write(digits.as_bytes());
        }
        if decimal.exponent == 0 {
            self.write(b";");
        } else {
            self.write(b"e");
            self.write(&decimal.exponent.to_be_bytes());
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        if self.mute {
            return;
        }
        if self.buffer.len() + bytes.len() > CHUNK {
            self.flush();
        }
        if bytes.len() > CHUNK {
            (self.sink)(bytes);
        } else {
            self.buffer.extend_from_slice(bytes);
        }
    }

    pub(super) fn flush(&mut self) {
        (self.sink)(&self.buffer);
        self.buffer.clear();
    }
}
