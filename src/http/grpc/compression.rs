//! Decompresses bodies whose messages are compressed.

use bytes::Bytes;
use http::HeaderValue;

#[cfg(feature = "tonic")]
use super::decoder::Encoding;
use super::framing::{Messages, PREFIX, plain_prefix};

/// The largest number of compressed messages in a body that this module decompresses. The body is a
/// request, for its fingerprint, or a stored response for another client.
pub(crate) const MOST_COMPRESSED: usize = 1_024;

/// Limits of the decompressed form of a body, against decompression bombs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The longest decompressed form in bytes, prefixes included.
    pub(crate) bytes: usize,
    /// The largest number of compressed messages. Each one needs a decoder of its own.
    pub(crate) compressed: usize,
}

/// The error for a body that cannot be decompressed. Its framing is malformed, its encoding is
/// unknown, a message is not in that encoding, or the decompressed form exceeds a limit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotPlain;

/// Without the feature, no encoding can be decompressed.
#[cfg(not(feature = "tonic"))]
enum Encoding {}

#[cfg(not(feature = "tonic"))]
impl Encoding {
    const fn named(_: &HeaderValue) -> Option<Self> {
        None
    }

    const fn decode(&self, _: &[u8], _: &mut Vec<u8>, _: usize) -> Option<()> {
        match *self {}
    }
}

/// Returns the body with every message decompressed. Shares the memory of `body` if no message is
/// compressed.
pub(crate) fn plain(body: &Bytes, encoding: Option<&HeaderValue>, limits: Limits) -> Result<Bytes, NotPlain> {
    let mut compressed = 0;
    for message in Messages::of(body) {
        compressed += usize::from(message.map_err(|_| NotPlain)?.is_compressed);
    }
    if compressed == 0 {
        return Ok(body.clone());
    }
    let encoding = encoding.and_then(Encoding::named).ok_or(NotPlain)?;
    if compressed > limits.compressed {
        return Err(NotPlain);
    }
    let mut out = Vec::with_capacity(body.len().saturating_mul(2).min(limits.bytes));
    for message in Messages::of(body) {
        let message = message.map_err(|_| NotPlain)?;
        let start = out.len();
        out.extend_from_slice(&[0; PREFIX]);
        if message.is_compressed {
            let room = limits.bytes.checked_sub(out.len()).ok_or(NotPlain)?;
            encoding.decode(message.content, &mut out, room).ok_or(NotPlain)?;
        } else {
            out.extend_from_slice(message.content);
        }
        if out.len() > limits.bytes {
            return Err(NotPlain);
        }
        let prefix = plain_prefix(out.len() - start - PREFIX).ok_or(NotPlain)?;
        out[start..start + PREFIX].copy_from_slice(&prefix);
    }
    Ok(out.into())
}

#[cfg(all(test, feature = "tonic"))]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};

    use super::*;

    const LIMITS: Limits = Limits {
        bytes: 1 << 20,
        compressed: 4,
    };

    fn gzip(content: &[u8], level: u32) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn deflate(content: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(6));
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(content: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn message(flag: u8, content: &[u8]) -> Vec<u8> {
        let mut prefix = plain_prefix(content.len()).unwrap();
        prefix[0] = flag;
        [&prefix[..], content].concat()
    }

    fn form(body: &[Vec<u8>], encoding: &'static str) -> Result<Bytes, NotPlain> {
        plain(&body.concat().into(), Some(&HeaderValue::from_static(encoding)), LIMITS)
    }

    #[test]
    fn every_encoding_of_a_message_has_one_plain_form() {
        let content = b"charge 100 ".repeat(50);
        let expected = Bytes::from([message(0, &content), message(0, b"and a tip")].concat());
        for (encoding, compressed) in [
            ("gzip", gzip(&content, 1)),
            ("gzip", gzip(&content, 9)),
            ("deflate", deflate(&content)),
            ("zstd", zstd(&content)),
        ] {
            let body = [message(1, &compressed), message(0, b"and a tip")];
            assert_eq!(form(&body, encoding), Ok(expected.clone()), "{encoding}");
        }
        let body = [message(0, &content), message(0, b"and a tip")];
        assert_eq!(form(&body, "br"), Ok(expected), "nothing is compressed");
    }

    #[test]
    fn a_plain_body_is_not_copied() {
        let body = Bytes::from(message(0, b"x"));
        assert_eq!(plain(&body, None, LIMITS).unwrap().as_ptr(), body.as_ptr());
    }

    #[test]
    fn a_body_without_a_plain_form_is_an_error() {
        let whole = gzip(b"charge", 6);
        let mut damaged = whole.clone();
        let last = damaged.len() - 6;
        damaged[last] ^= 1;
        for (what, content, encoding) in [
            ("unknown encoding", whole.clone(), "br"),
            ("other encoding", whole.clone(), "zstd"),
            ("identity", whole.clone(), "identity"),
            ("broken off", whole[..whole.len() - 1].to_vec(), "gzip"),
            ("damaged", damaged, "gzip"),
            ("bytes behind it", [&whole[..], b"x"].concat(), "gzip"),
            ("two members", [&whole[..], &whole[..]].concat(), "gzip"),
            ("bytes behind it", [&zstd(b"charge")[..], b"x"].concat(), "zstd"),
            ("no header", Vec::new(), "zstd"),
            ("no header", Vec::new(), "gzip"),
        ] {
            assert_eq!(form(&[message(1, &content)], encoding), Err(NotPlain), "{what}");
        }
        assert_eq!(form(&[vec![0, 0]], "gzip"), Err(NotPlain), "malformed");
        let many = vec![message(1, &whole); 5];
        assert_eq!(form(&many, "gzip"), Err(NotPlain), "too many");
        assert!(form(&many[..4], "gzip").is_ok());
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        let zeros = vec![0; 8 << 20];
        for (encoding, bomb) in [
            ("gzip", gzip(&zeros, 9)),
            ("deflate", deflate(&zeros)),
            ("zstd", zstd(&zeros)),
        ] {
            assert!(bomb.len() < 1 << 16, "{encoding}");
            assert_eq!(form(&[message(1, &bomb)], encoding), Err(NotPlain), "{encoding}");
        }
        let fits = vec![0; LIMITS.bytes - PREFIX];
        assert_eq!(
            form(&[message(1, &gzip(&fits, 9))], "gzip").unwrap().len(),
            LIMITS.bytes
        );
        let over = vec![0; LIMITS.bytes - PREFIX + 1];
        assert_eq!(form(&[message(1, &gzip(&over, 9))], "gzip"), Err(NotPlain));
    }
}
