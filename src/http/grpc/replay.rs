//! Adapts replays for clients that accept other encodings than the client of the first response.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};

use super::compression::{Limits, MOST_COMPRESSED, plain};
use super::{GRPC_ACCEPT_ENCODING, GRPC_ENCODING};

/// The limits of decompressing a stored response. Its decompressed form has at most 16 MiB, four
/// times the longest message that gRPC clients accept by default. For a larger response, a client
/// that does not accept the encoding gets a refusal.
const LIMITS: Limits = Limits {
    bytes: 16 << 20,
    compressed: MOST_COMPRESSED,
};

/// The encodings that a client accepts besides `identity`. They are stored apart from the request,
/// because a waiter drops its request. They are boxed, because few requests have them.
#[derive(Debug, Default)]
pub(crate) struct Accepted(Option<Box<HeaderValue>>);

/// The error for a response in an encoding that its client does not accept. This crate does not
/// know the encoding either, or cannot decompress the response within its limits.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotAccepted;

impl Accepted {
    /// Returns the encodings that a request lists. Lists in several field lines are not combined,
    /// because no client sends them.
    pub(crate) fn by(request: &HeaderMap) -> Self {
        Self(request.get(GRPC_ACCEPT_ENCODING).map(|list| Box::new(list.clone())))
    }

    fn contains(&self, encoding: &HeaderValue) -> bool {
        let list = self.0.as_ref().map_or(&b""[..], |list| list.as_bytes());
        encoding == "identity"
            || list
                .split(|byte| *byte == b',')
                .any(|name| name.trim_ascii() == encoding.as_bytes())
    }

    /// Converts the head and the body of a stored response into a form that the client accepts.
    /// Every client accepts messages that are not compressed.
    pub(crate) fn adapt(&self, head: &mut HeaderMap, body: Bytes) -> Result<Bytes, NotAccepted> {
        let Some(encoding) = head.get(GRPC_ENCODING).filter(|encoding| !self.contains(encoding)) else {
            return Ok(body);
        };
        let body = plain(&body, Some(encoding), LIMITS).map_err(|_| NotAccepted)?;
        head.remove(GRPC_ENCODING);
        Ok(body)
    }
}

#[cfg(all(test, feature = "tonic"))]
mod tests {
    use std::io::Write;

    use super::*;

    fn fields(name: http::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    fn accepted(list: &'static str) -> Accepted {
        Accepted::by(&fields(GRPC_ACCEPT_ENCODING, list))
    }

    fn compressed() -> Bytes {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(b"paid").unwrap();
        let message = encoder.finish().unwrap();
        [&[1, 0, 0, 0, u8::try_from(message.len()).unwrap()][..], &message]
            .concat()
            .into()
    }

    #[test]
    fn a_client_that_reads_the_encoding_gets_the_stored_bytes() {
        for list in ["gzip", "identity, deflate,gzip ,br"] {
            let mut head = fields(GRPC_ENCODING, "gzip");
            assert_eq!(
                accepted(list).adapt(&mut head, compressed()),
                Ok(compressed()),
                "{list}"
            );
            assert_eq!(head, fields(GRPC_ENCODING, "gzip"));
        }
    }

    #[test]
    fn any_other_client_gets_plain_messages() {
        for client in [
            Accepted::default(),
            accepted(""),
            accepted("gzipped,x-gzip"),
            accepted("identity"),
        ] {
            let mut head = fields(GRPC_ENCODING, "gzip");
            assert_eq!(client.adapt(&mut head, compressed()).unwrap(), &b"\0\0\0\0\x04paid"[..]);
            assert!(head.is_empty());
        }
    }

    #[test]
    fn a_response_that_is_not_compressed_is_for_every_client() {
        let body = Bytes::from_static(b"\0\0\0\0\x04paid");
        for mut head in [
            HeaderMap::new(),
            fields(GRPC_ENCODING, "identity"),
            fields(GRPC_ENCODING, "br"),
        ] {
            let adapted = Accepted::default().adapt(&mut head, body.clone());
            assert_eq!(adapted.unwrap().as_ptr(), body.as_ptr());
        }
    }

    /// Each compressed message needs a decoder of its own, so thousands of tiny messages once made
    /// each replay expensive.
    #[test]
    fn a_response_of_more_than_1024_compressed_messages_is_not_decompressed() {
        let mut head = fields(GRPC_ENCODING, "gzip");
        let most = compressed().repeat(1_024);
        let over: Bytes = [&most[..], &compressed()].concat().into();
        assert_eq!(accepted("").adapt(&mut head, over.clone()), Err(NotAccepted));
        assert_eq!(accepted("gzip").adapt(&mut head, over.clone()), Ok(over));
        let plain = accepted("").adapt(&mut head, most.into());
        assert_eq!(plain.unwrap(), b"\0\0\0\0\x04paid".repeat(1_024));
    }

    #[test]
    fn an_encoding_that_nobody_reads_is_not_sent() {
        let mut head = fields(GRPC_ENCODING, "br");
        let body = Bytes::from_static(b"\x01\0\0\0\x04paid");
        assert_eq!(Accepted::default().adapt(&mut head, body.clone()), Err(NotAccepted));
        assert_eq!(accepted("br").adapt(&mut head, body.clone()), Ok(body));
    }
}
