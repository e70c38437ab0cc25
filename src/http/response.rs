//! Converts a response to its stored form and back.
//!
//! The head of a [`StoredResponse`] consists of, in this order: version (1 byte), status (2),
//! number of headers (4), number of trailers (4), then each field as a name with a length of 2
//! bytes and a value with a length of 4. All numbers are little-endian. The highest bit of a
//! value's length marks a sensitive value, which neither `Debug` nor HPACK may show.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue, MaxSizeReached};
use http::{Response, StatusCode, response};
use http_body::Body as HttpBody;

use super::RebuildBody;
use super::body::{BufferedBody, Collected};
use crate::protocol::StoredResponse;

const VERSION: u8 = 1;

/// The bit of a value's length that marks the value as sensitive.
const SENSITIVE: u32 = 1 << 31;

/// The error for a stored response that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CorruptResponse;

/// The headers that replays carry, and the header that marks a replay.
#[derive(Clone, Debug)]
pub(crate) struct ResponseHeaders {
    pub(crate) denied: Vec<HeaderName>,
    pub(crate) allowed: Vec<HeaderName>,
    pub(crate) marker: Option<(HeaderName, HeaderValue)>,
}

impl Default for ResponseHeaders {
    fn default() -> Self {
        Self {
            denied: Vec::new(),
            allowed: Vec::new(),
            marker: Some((
                HeaderName::from_static("idempotent-replayed"),
                HeaderValue::from_static("true"),
            )),
        }
    }
}

impl ResponseHeaders {
    /// Returns the stored form of a response whose body was read.
    pub(crate) fn store(&self, parts: &response::Parts, body: &Collected) -> StoredResponse {
        let no_trailers = HeaderMap::new();
        let trailers = body.trailers.as_ref().unwrap_or(&no_trailers);
        let connection = options_of(&parts.headers);
        let mut out = BytesMut::with_capacity(256);
        out.put_u8(VERSION);
        out.put_u16_le(parts.status.as_u16());
        out.put_u64_le(0);
        let headers = self.put_all(&mut out, &parts.headers, &connection);
        let trailers = self.put_all(&mut out, trailers, &connection);
        out[3..7].copy_from_slice(&headers.to_le_bytes());
        out[7..11].copy_from_slice(&trailers.to_le_bytes());
        StoredResponse {
            head: out.freeze(),
            body: body.bytes.clone(),
        }
    }

    /// Returns the replay of a stored response, with the replay header if `marked`.
    pub(crate) fn replay<B: RebuildBody>(
        &self,
        stored: &StoredResponse,
        marked: bool,
    ) -> Result<Response<B>, CorruptResponse> {
        Ok(self.replay_in_parts(stored, marked)?.map(Collected::rebuild))
    }

    /// Returns the same replay with its body in parts.
    pub(crate) fn replay_in_parts(
        &self,
        stored: &StoredResponse,
        marked: bool,
    ) -> Result<Response<Collected>, CorruptResponse> {
        let (mut head, ()) = Response::new(()).into_parts();
        let trailers = decode(&stored.head, &mut head).ok_or(CorruptResponse)?;
        if marked {
            self.mark(&mut head.headers);
        }
        let body = Collected {
            bytes: stored.body.clone(),
            trailers,
        };
        Ok(Response::from_parts(head, body))
    }

    /// Returns an empty 200 with the replay header, for a response that was not stored.
    pub(crate) fn bare_replay<B: RebuildBody>(&self) -> Response<B> {
        let mut response = Response::new(B::rebuild(BufferedBody::from_bytes(Bytes::new())));
        self.mark(response.headers_mut());
        response
    }

    /// Adds the replay header. If the header map has no room for it, the response is replayed
    /// without it, because the replay header is not part of the response.
    fn mark(&self, headers: &mut HeaderMap) {
        if let Some((name, value)) = &self.marker {
            let _: Result<_, MaxSizeReached> = headers.try_insert(name, value.clone());
        }
    }

    /// Writes the headers that replays carry, and returns their number.
    fn put_all(&self, out: &mut BytesMut, headers: &HeaderMap, connection: &[HeaderName]) -> u32 {
        let mut count = 0;
        for (name, value) in headers {
            if self.is_dropped(name, connection) {
                continue;
            }
            let (Ok(name_len), Ok(value_len)) = (u16::try_from(name.as_str().len()), u32::try_from(value.len())) else {
                continue;
            };
            if value_len >= SENSITIVE {
                continue;
            }
            out.put_u16_le(name_len);
            out.put_slice(name.as_str().as_bytes());
            out.put_u32_le(if value.is_sensitive() {
                value_len | SENSITIVE
            } else {
                value_len
            });
            out.put_slice(value.as_bytes());
            count += 1;
        }
        count
    }

    fn is_dropped(&self, name: &HeaderName, connection: &[HeaderName]) -> bool {
        if self.allowed.contains(name) {
            return false;
        }
        let marker = self.marker.as_ref().is_some_and(|(marker, _)| marker == name);
        marker || self.denied.contains(name) || is_never_replayed(name) || connection.contains(name)
    }
}

/// Removes the fields that frame a body. The server frames a buffered response by the bytes that it
/// writes. A length or a transfer coding that the handler has set could only contradict them (RFC
/// 9112 section 6).
pub(crate) fn reframe(headers: &mut HeaderMap) {
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::CONTENT_LENGTH);
}

/// Removes framing fields that contradict a response whose body streams, because the server frames
/// it. A length that the handler has set counts only for a body of unknown size, only without a
/// transfer coding, which takes precedence, and only if it is a single valid number (RFC 9112
/// section 6.3).
pub(crate) fn reframe_stream<B: HttpBody>(response: &mut Response<B>) {
    let is_known = response.body().size_hint().exact().is_some();
    let headers = response.headers_mut();
    if headers.remove(header::TRANSFER_ENCODING).is_some() || is_known || !has_valid_length(headers) {
        headers.remove(header::CONTENT_LENGTH);
    }
}

/// Returns whether there is exactly one length, and it is a number in the syntax of RFC 9110
/// section 8.6.
fn has_valid_length(headers: &HeaderMap) -> bool {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let (Some(length), None) = (lengths.next(), lengths.next()) else {
        return false;
    };
    let is_number = length.as_bytes().iter().all(u8::is_ascii_digit);
    is_number && length.to_str().is_ok_and(|length| length.parse::<u64>().is_ok())
}

/// Returns whether a field belongs to one exchange, one connection or one caller.
fn is_never_replayed(name: &HeaderName) -> bool {
    let name = name.as_str();
    match name {
        "age" | "authentication-info" | "authorization" | "clear-site-data" | "content-length" | "date" => true,
        "server-timing" | "set-cookie" | "traceparent" | "tracestate" => true,
        "www-authenticate" | "x-csrf-token" | "x-request-id" => true,
        // RFC 9110 section 7.6.1: a recipient must remove these fields before it forwards a
        // message.
        "connection" | "keep-alive" | "te" | "transfer-encoding" | "upgrade" => true,
        _ => {
            let families = ["proxy-", "access-control-", "ratelimit", "x-ratelimit-"];
            families.iter().any(|family| name.starts_with(family))
        }
    }
}

/// Returns the fields that `Connection` names, without those that it must not name.
fn options_of(headers: &HeaderMap) -> Vec<HeaderName> {
    let mut options = Vec::new();
    for line in headers.get_all(header::CONNECTION) {
        for option in line.as_bytes().split(|byte| *byte == b',') {
            if let Ok(name) = HeaderName::from_bytes(option.trim_ascii()) {
                if !is_end_to_end(&name) {
                    options.push(name);
                }
            }
        }
    }
    options
}

/// Returns whether a field is meant for every recipient, so that `Connection` must not name it. RFC
/// 9110 section 7.6.1: "A sender MUST NOT send a connection option corresponding to a field that is
/// intended for all recipients of the content." Such an option is a mistake or an attack, and must
/// not alter the response.
fn is_end_to_end(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "accept-ranges"
            | "allow"
            | "cache-control"
            | "content-disposition"
            | "content-encoding"
            | "content-language"
            | "content-location"
            | "content-range"
            | "content-security-policy"
            | "content-type"
            | "etag"
            | "expires"
            | "last-modified"
            | "link"
            | "location"
            | "pragma"
            | "referrer-policy"
            | "retry-after"
            | "strict-transport-security"
            | "vary"
            | "x-content-type-options"
            | "x-frame-options"
    )
}

/// Decodes the status and the headers into `head`, and returns the trailers. The function is total:
/// it trusts no length, and allocates nothing by an unchecked length.
fn decode(encoded: &Bytes, head: &mut response::Parts) -> Option<Option<HeaderMap>> {
    let mut rest = &encoded[..];
    if rest.try_get_u8().ok()? != VERSION {
        return None;
    }
    head.status = StatusCode::from_u16(rest.try_get_u16_le().ok()?).ok()?;
    let headers = rest.try_get_u32_le().ok()?;
    let trailers = rest.try_get_u32_le().ok()?;
    decode_fields(encoded, &mut rest, headers, &mut head.headers)?;
    let trailers = match trailers {
        0 => None,
        count => {
            let mut trailers = HeaderMap::new();
            decode_fields(encoded, &mut rest, count, &mut trailers)?;
            Some(trailers)
        }
    };
    rest.is_empty().then_some(trailers)
}

/// Moves `count` fields from `rest` to `fields`. Their values share the memory of `encoded`.
fn decode_fields(encoded: &Bytes, rest: &mut &[u8], count: u32, fields: &mut HeaderMap) -> Option<()> {
    // Reserve room for the replay header and the length as well. Cap the reservation, because
    // `count` is untrusted.
    let usual = usize::try_from(count).ok()?.min(64);
    fields.reserve(usual + 2);
    for _ in 0..count {
        let name_len = usize::from(rest.try_get_u16_le().ok()?);
        let name = HeaderName::from_bytes(take(rest, name_len)?).ok()?;
        let value_len = rest.try_get_u32_le().ok()?;
        let value = encoded.slice_ref(take(rest, usize::try_from(value_len & !SENSITIVE).ok()?)?);
        let mut value = HeaderValue::from_maybe_shared(value).ok()?;
        value.set_sensitive(value_len & SENSITIVE != 0);
        fields.try_append(name, value).ok()?;
    }
    Some(())
}

fn take<'b>(rest: &mut &'b [u8], len: usize) -> Option<&'b [u8]> {
    let (taken, left) = rest.split_at_checked(len)?;
    *rest = left;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use http_body_util::{BodyExt, Full};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stream_has_a_length_only_if_nothing_contradicts_it() {
        let frames = futures::stream::empty::<Result<http_body::Frame<Bytes>, std::convert::Infallible>>();
        let unknown = || http_body_util::StreamBody::new(frames.clone()).boxed_unsync();
        let known = || Full::new(Bytes::from_static(b"12345")).boxed_unsync();
        let coding = ("transfer-encoding", "chunked");
        for (body, fields, expected) in [
            (unknown(), &[("content-length", "5")][..], true),
            (unknown(), &[], false),
            (unknown(), &[("content-length", "")], false),
            (unknown(), &[("content-length", "+5")], false),
            (unknown(), &[("content-length", "99999999999999999999")], false),
            (unknown(), &[("content-length", "5"), ("content-length", "5")], false),
            (unknown(), &[("content-length", "5"), coding], false),
            (known(), &[("content-length", "5")], false),
        ] {
            let mut response = Response::new(body);
            for (name, value) in fields {
                response.headers_mut().append(*name, value.parse().unwrap());
            }
            reframe_stream(&mut response);
            let headers = response.headers();
            assert_eq!(headers.contains_key(header::CONTENT_LENGTH), expected, "{fields:?}");
            assert!(!headers.contains_key(header::TRANSFER_ENCODING));
        }
    }

    fn response(headers: &[(&str, &[u8])]) -> response::Parts {
        let mut response = Response::builder().status(201);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        response.body(()).unwrap().into_parts().0
    }

    fn collected(body: &'static [u8]) -> Collected {
        Collected {
            bytes: Bytes::from_static(body),
            trailers: None,
        }
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        headers.keys().map(HeaderName::as_str).collect()
    }

    fn again(parts: &response::Parts) -> Response<Full<Bytes>> {
        let headers = ResponseHeaders::default();
        headers
            .replay(&headers.store(parts, &collected(b"body")), true)
            .unwrap()
    }

    #[test]
    fn status_headers_and_bytes_come_back_with_the_marker() {
        let parts = response(&[
            ("location", b"/1"),
            ("x-latin1", b"caf\xe9"),
            ("link", b"a"),
            ("link", b"b"),
        ]);
        let again = again(&parts);
        assert_eq!(again.status(), 201);
        assert_eq!(again.headers()["x-latin1"].as_bytes(), b"caf\xe9");
        assert_eq!(again.headers().get_all("link").iter().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(again.headers()["idempotent-replayed"], "true");
        assert_eq!(block_on(again.into_body().collect()).unwrap().to_bytes(), "body");
    }

    #[test]
    fn what_belongs_to_one_exchange_is_never_replayed() {
        let dropped: Vec<(&str, &[u8])> = [
            "set-cookie",
            "date",
            "age",
            "content-length",
            "www-authenticate",
            "authorization",
            "server-timing",
            "connection",
            "transfer-encoding",
            "upgrade",
            "te",
            "keep-alive",
            "proxy-authenticate",
            "proxy-anything",
            "access-control-allow-origin",
            "authentication-info",
            "clear-site-data",
            "ratelimit",
            "ratelimit-policy",
            "traceparent",
            "tracestate",
            "x-csrf-token",
            "x-ratelimit-remaining",
            "x-request-id",
            "idempotent-replayed",
        ]
        .map(|name| (name, &b"1"[..]))
        .to_vec();
        let mut again = again(&response(&dropped));
        again.headers_mut().remove("idempotent-replayed");
        assert!(again.headers().is_empty(), "{:?}", again.headers());
    }

    #[test]
    fn connection_drops_no_field_that_is_meant_for_every_recipient() {
        let fields = "accept-ranges, allow, cache-control, content-disposition, content-encoding, content-language, \
                      content-location, content-range, content-security-policy, content-type, etag, expires, \
                      last-modified, link, location, pragma, referrer-policy, retry-after, strict-transport-security, \
                      vary, x-content-type-options, x-frame-options";
        let mut headers = HeaderMap::new();
        headers.insert(header::CONNECTION, fields.parse().unwrap());
        assert_eq!(options_of(&headers), Vec::<HeaderName>::new());
    }

    #[test]
    fn connection_drops_what_it_names_but_not_what_the_content_needs() {
        let parts = response(&[
            ("connection", b"x-hop, Content-Type"),
            ("connection", b"cache-control,location"),
            ("x-hop", b"1"),
            ("content-type", b"text/plain"),
            ("cache-control", b"no-store"),
            ("location", b"/1"),
        ]);
        let again = again(&parts);
        assert_eq!(
            names(again.headers()),
            ["content-type", "cache-control", "location", "idempotent-replayed"]
        );
    }

    #[test]
    fn denied_and_allowed_headers_are_the_applications_word() {
        let headers = ResponseHeaders {
            denied: vec![HeaderName::from_static("x-internal")],
            allowed: vec![header::AGE],
            marker: None,
        };
        let parts = response(&[("x-internal", b"1"), ("age", b"2"), ("date", b"3")]);
        let again: Response<Full<Bytes>> = headers.replay(&headers.store(&parts, &collected(b"")), true).unwrap();
        assert_eq!(names(again.headers()), ["age"]);
    }

    #[test]
    fn trailers_come_back() {
        let headers = ResponseHeaders::default();
        let body = Collected {
            bytes: Bytes::new(),
            trailers: Some(HeaderMap::from_iter([(header::ETAG, HeaderValue::from_static("t"))])),
        };
        let stored = headers.store(&response(&[]), &body);
        let again: Response<BufferedBody<Full<Bytes>>> = headers.replay(&stored, true).unwrap();
        let collected = block_on(again.into_body().collect()).unwrap();
        assert_eq!(collected.trailers().unwrap()[header::ETAG], "t");
    }

    #[test]
    fn a_body_is_not_copied_on_its_way_to_the_store() {
        let body = collected(b"body");
        let stored = ResponseHeaders::default().store(&response(&[]), &body);
        assert_eq!(stored.body.as_ptr(), body.bytes.as_ptr());
    }

    #[test]
    fn sensitive_values_of_headers_and_trailers_stay_sensitive_and_others_do_not_become_so() {
        let mut secret = HeaderValue::from_static("secret");
        secret.set_sensitive(true);
        let fields = HeaderMap::from_iter([
            (header::ETAG, secret.clone()),
            (header::LINK, HeaderValue::from_static("open")),
        ]);
        let mut parts = response(&[]);
        parts.headers = fields.clone();
        parts.headers.append(header::LINK, secret);
        let body = Collected {
            bytes: Bytes::new(),
            trailers: Some(fields),
        };
        let headers = ResponseHeaders::default();
        let again: Response<BufferedBody<Full<Bytes>>> = headers.replay(&headers.store(&parts, &body), true).unwrap();
        let links: Vec<_> = again.headers().get_all(header::LINK).iter().collect();
        assert_eq!(
            links.iter().map(|link| link.is_sensitive()).collect::<Vec<_>>(),
            [false, true]
        );
        assert_eq!(
            (links[0].as_bytes(), links[1].as_bytes()),
            (&b"open"[..], &b"secret"[..])
        );
        assert!(again.headers()[header::ETAG].is_sensitive());
        let trailers = block_on(again.into_body().collect())
            .unwrap()
            .trailers()
            .unwrap()
            .clone();
        assert!(trailers[header::ETAG].is_sensitive() && !trailers[header::LINK].is_sensitive());
    }

    #[test]
    fn as_many_headers_as_a_map_takes_are_replayed_though_no_mark_fits() {
        let mut parts = response(&[]);
        let name = |n: u32| HeaderName::from_bytes(format!("x-{n}").as_bytes()).unwrap();
        let fits = |n: &u32| {
            parts
                .headers
                .try_insert(name(*n), HeaderValue::from_static("1"))
                .is_ok()
        };
        let count = (0..40_000).take_while(fits).count();
        let again = again(&parts);
        assert_eq!(again.headers().len(), count);
        assert_eq!(again.headers(), &parts.headers);
    }

    proptest! {
        #[test]
        fn decoding_is_total(mut head: Vec<u8>, known: bool) {
            if let (true, Some(first)) = (known, head.first_mut()) {
                *first = VERSION;
            }
            let _ = decode(&head.into(), &mut response(&[]));
        }

        #[test]
        fn a_damaged_head_is_an_error_or_another_response(at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let parts = response(&[("location", b"/1"), ("x-foo", b"2")]);
            let mut head = ResponseHeaders::default().store(&parts, &collected(b"")).head.to_vec();
            let index = at.index(head.len());
            head[index] = byte;
            head.truncate(cut.index(head.len() + 1));
            let _ = decode(&head.into(), &mut response(&[]));
        }
    }

    #[test]
    fn framing_of_a_response_that_was_read_is_the_servers() {
        let mut parts = response(&[
            ("transfer-encoding", b"chunked"),
            ("transfer-encoding", b"gzip"),
            ("content-length", b"7"),
            ("etag", b"1"),
        ]);
        reframe(&mut parts.headers);
        assert_eq!(names(&parts.headers), ["etag"]);
    }
}
