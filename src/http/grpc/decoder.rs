//! Decoders of compressed messages.

use std::io::{self, Read};

use flate2::bufread::{GzDecoder, ZlibDecoder};
use http::HeaderValue;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// The encodings that this crate decompresses.
#[derive(Clone, Copy)]
pub(super) enum Encoding {
    Deflate,
    Gzip,
    Zstd,
}

/// The largest accepted window of a zstd frame in bytes. RFC 8878 section 3.1.1.1.2 recommends that
/// decoders support at least this size, and that encoders need no more.
const ZSTD_WINDOW: u64 = 8 << 20;

impl Encoding {
    /// Returns the encoding with this name. Case counts, because `compression.md` defines the names
    /// in lower case.
    pub(super) fn named(name: &HeaderValue) -> Option<Self> {
        match name.as_bytes() {
            b"deflate" => Some(Self::Deflate),
            b"gzip" => Some(Self::Gzip),
            b"zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Appends the decompressed message, which has at most `room` bytes. Returns `None` if the
    /// message is longer, is not valid in this encoding, or has bytes after its end.
    pub(super) fn decode(self, message: &[u8], out: &mut Vec<u8>, room: usize) -> Option<()> {
        let rest = match self {
            Self::Deflate => {
                let mut decoder = ZlibDecoder::new(message);
                read(&mut decoder, out, room)?;
                decoder.into_inner()
            }
            Self::Gzip => {
                let mut decoder = GzDecoder::new(message);
                read(&mut decoder, out, room)?;
                decoder.into_inner()
            }
            Self::Zstd => {
                if zstd_window(message).is_none_or(|window| window > ZSTD_WINDOW) {
                    return None;
                }
                // The decoder yields the bytes that exceed the window after each block. It
                // therefore decompresses at most `room`, the window and one block. RFC 8878 section
                // 3.1.1.2.4 limits a block to 128 KiB. The decoder checks this limit for sequences,
                // but not for literals. The number of literals has 20 bits, so a block has less
                // than 2 MiB.
                let mut decoder = StreamingDecoder::<_, FrameDecoder>::new(message).ok()?;
                read(&mut decoder, out, room)?;
                decoder.into_inner()
            }
        };
        rest.is_empty().then_some(())
    }
}

/// Reads to the end. Returns `None` if more than `room` bytes come.
fn read(from: &mut impl Read, out: &mut Vec<u8>, room: usize) -> Option<()> {
    let bound = u64::try_from(room).unwrap_or(u64::MAX).saturating_add(1);
    let read: io::Result<usize> = from.take(bound).read_to_end(out);
    (read.ok()? <= room).then_some(())
}

/// Returns the window size that a zstd frame asks for (RFC 8878 section 3.1.1.1). The decoder
/// reserves the window before it has seen any content.
fn zstd_window(frame: &[u8]) -> Option<u64> {
    let descriptor = *frame.get(4)?;
    let is_single_segment = descriptor & 0b10_0000 != 0;
    if !is_single_segment {
        let window = *frame.get(5)?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 0b111));
    }
    // The window is as large as the content. The length of the content follows the dictionary id.
    let start = 5 + [0, 1, 2, 4][usize::from(descriptor & 0b11)];
    let length = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let mut bytes = [0; 8];
    bytes[..length].copy_from_slice(frame.get(start..start + length)?);
    Some(u64::from_le_bytes(bytes) + if length == 2 { 256 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a frame with a header, a block of 8 bytes, and a block of `count` sequences that
    /// repeat these bytes. Each sequence takes two bytes and yields 128 KiB.
    fn repeating(count: u16) -> Vec<u8> {
        // The block has no literals. The count of sequences has two bytes. The mode says that each
        // table is a single code. The codes mean no literals, a repeated offset, and the longest
        // match, which has 16 further bits.
        let [high, low] = (0x8000 + count).to_be_bytes();
        let mut block = vec![0, high, low, 0b0101_0100, 0, 0, 52];
        block.resize(block.len() + 2 * usize::from(count), 0xff);
        // This bit ends the stream, which decoders read from its end.
        block.push(1);
        let last_and_compressed = u32::try_from(block.len()).unwrap() << 3 | 0b101;
        let window_of_128_kib = 7 << 3;
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window_of_128_kib];
        // This block repeats one byte eight times.
        frame.extend([8 << 3 | 0b010, 0, 0, b'x']);
        frame.extend(&last_and_compressed.to_le_bytes()[..3]);
        frame.extend(block);
        frame
    }

    /// Returns a frame with a window of 128 KiB and blocks of 8 bytes. Each block repeats one
    /// literal 1,048,575 times.
    fn of_literals(blocks: usize) -> Vec<u8> {
        // The block is compressed and not the last one. Its literals repeat one byte, and their
        // number has 20 bits. The byte follows, and there are no sequences.
        let block = [5 << 3 | 0b100, 0, 0, 0b1111_1101, 0xff, 0xff, b'x', 0];
        let mut frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3][..], &block.repeat(blocks)].concat();
        let last = frame.len() - block.len();
        frame[last] |= 1;
        frame
    }

    /// Checks that a frame is rejected under a limit of 1 MiB, and that this allocates fewer than
    /// `most` bytes.
    fn assert_rejected_within(frame: &[u8], most: u64) {
        let mut out = Vec::new();
        let allocated = allocation_counter::measure(|| {
            assert_eq!(Encoding::Zstd.decode(frame, &mut out, 1 << 20), None);
        });
        assert!(allocated.bytes_max < most, "{allocated:?}");
    }

    /// The decoder accepts such blocks, although they exceed the limit of the format.
    #[test]
    fn a_zstd_block_of_repeated_literals_is_decompressed_up_to_2_mib() {
        let mut out = Vec::new();
        assert_eq!(Encoding::Zstd.decode(&of_literals(2), &mut out, 4 << 20), Some(()));
        assert_eq!(out.len(), 2 * ((1 << 20) - 1));
        assert_rejected_within(&of_literals(1_000), 12 << 20);
    }

    /// Once, a block of 2 KB was decompressed to 131 MB before the limit counted, and a block of
    /// 128 KB to gigabytes.
    #[test]
    fn a_zstd_block_that_exceeds_the_format_is_not_decompressed() {
        assert_rejected_within(&repeating(1_000), 4 << 20);
    }

    #[test]
    fn a_frame_that_asks_for_a_large_window_is_not_begun() {
        // The magic number, no single segment, and windows of 8 MiB and of 9 MiB.
        let frame = |window: u8| [0x28, 0xb5, 0x2f, 0xfd, 0, window];
        assert_eq!(zstd_window(&frame(13 << 3)), Some(ZSTD_WINDOW));
        assert_eq!(zstd_window(&frame(13 << 3 | 1)), Some(9 << 20));
        assert_eq!(zstd_window(&frame(255)), Some((1 << 41) + (1 << 38) * 7));
        // A single segment with a length of two bytes, and one with a length of eight bytes after a
        // dictionary id.
        assert_eq!(zstd_window(&[0, 0, 0, 0, 0b0110_0000, 1, 1]), Some(257 + 256));
        assert_eq!(
            zstd_window(&[0, 0, 0, 0, 0b1110_0001, 9, 1, 0, 0, 0, 0, 0, 0, 1]),
            Some((1 << 56) + 1)
        );
        assert_eq!(zstd_window(&[0, 0, 0, 0, 0b1110_0001, 9, 1]), None);
        // A last block with one byte as it is.
        let block = [1 << 3 | 1, 0, 0, b'x'];
        for (window, decoded) in [(13 << 3, Some(())), (13 << 3 | 1, None)] {
            let message = [&frame(window)[..], &block].concat();
            assert_eq!(Encoding::Zstd.decode(&message, &mut Vec::new(), 9), decoded);
        }
    }
}
