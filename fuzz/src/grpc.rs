//! Compressed gRPC messages in a fingerprint.
//!
//! A body whose messages decompress is the same request as its plain form. The model below finds
//! that form with a reader of its own. All other bodies count by their bytes and the name of their
//! encoding. No body makes the layer decompress more than its limit.

use std::io::Read;

use bytes::Bytes;
use flate2::read::{GzDecoder, ZlibDecoder};
use http::Request;
use tower_idempotency::protocol::Fingerprint;

use crate::exchange::fingerprint;
use crate::input::Input;

pub(crate) const ENCODINGS: [&str; 4] = ["identity", "gzip", "deflate", "zstd"];

pub(crate) const LIMIT: usize = 1 << 16;

/// The largest number of compressed messages that the layer reads.
const MOST_COMPRESSED: usize = 1_024;

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let encoding = ENCODINGS[usize::from(input.byte() % 4)];
    let body = input.rest();
    if body.len() > LIMIT {
        return;
    }
    let of_body = of(encoding, body);
    // Only the crate itself reads `zstd` here, so the model cannot tell its plain form.
    if encoding == "zstd" {
        return;
    }
    match plain(encoding, body) {
        Some(plain) => assert_eq!(of_body, of("identity", &plain)),
        None => {
            assert_eq!(of_body.algorithm(), Fingerprint::BYTES);
            assert_ne!(of_body, of("other", body));
        }
    }
}

fn of(encoding: &str, body: &[u8]) -> Fingerprint {
    let request = Request::post("/bank/Pay").header("idempotency-key", "k");
    let request = request
        .header("content-type", "application/grpc")
        .header("grpc-encoding", encoding);
    let request = request.body(Bytes::copy_from_slice(body)).unwrap();
    fingerprint(|layer| layer.grpc().with_body_limit(LIMIT), request)
}

/// Returns the same messages without compression; `None` if there is no such form within the limit.
pub(crate) fn plain(encoding: &str, mut body: &[u8]) -> Option<Vec<u8>> {
    let (mut out, mut compressed) = (Vec::new(), 0);
    while !body.is_empty() {
        let (prefix, rest) = body.split_at_checked(5)?;
        let length = usize::try_from(u32::from_be_bytes(prefix[1..].try_into().ok()?)).ok()?;
        let (message, rest) = rest.split_at_checked(length)?;
        let message = match prefix[0] {
            0 => message.to_vec(),
            1 => {
                compressed += 1;
                decompressed(encoding, message)?
            }
            _ => return None,
        };
        out.push(0);
        out.extend_from_slice(&u32::try_from(message.len()).ok()?.to_be_bytes());
        out.extend_from_slice(&message);
        body = rest;
    }
    (out.len() <= LIMIT && compressed <= MOST_COMPRESSED).then_some(out)
}

fn decompressed(encoding: &str, message: &[u8]) -> Option<Vec<u8>> {
    let most = u64::try_from(LIMIT + 1).ok()?;
    let (mut out, mut rest) = (Vec::new(), message);
    match encoding {
        "gzip" => GzDecoder::new(BytesOneByOne(&mut rest))
            .take(most)
            .read_to_end(&mut out),
        "deflate" => ZlibDecoder::new(BytesOneByOne(&mut rest))
            .take(most)
            .read_to_end(&mut out),
        _ => return None,
    }
    .ok()?;
    (rest.is_empty() && out.len() <= LIMIT).then_some(out)
}

/// A reader that never reads further than its user asks, so that the end of the compressed message
/// shows.
struct BytesOneByOne<'r, 'b>(&'r mut &'b [u8]);

impl Read for BytesOneByOne<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = buffer.len().min(1);
        self.0.read(&mut buffer[..length])
    }
}
