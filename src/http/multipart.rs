//! Fingerprints of multipart bodies without their boundary (RFC 2046 section 5.1, RFC 7578).
//!
//! Clients choose a random boundary for each message, so the bytes of a retry differ from those of
//! the first request.
//!
//! This module splits bodies itself, because multipart libraries do another job. They read a stream
//! part by part, and they hide the bytes between the parts. A fingerprint needs every byte except
//! the boundary, and it needs to know whether a body is malformed. For a malformed body, the caller
//! compares the bytes.

use http::HeaderMap;
use http::header::CONTENT_TYPE;
use memchr::memmem;

use crate::protocol::Hasher;

/// The length of the longest boundary (RFC 2046 section 5.1.1).
const LONGEST_BOUNDARY: usize = 70;

const CRLF: &[u8] = b"\r\n";

/// Starts a fingerprint with the content type and the parts of a multipart body. Returns `None` if
/// the body is not multipart, or if it is malformed.
///
/// The function cuts the body at its delimiters and hashes every piece between them with its
/// length. The pieces contain every byte except the boundary, so two bodies with the same
/// fingerprint differ in their boundaries only.
pub(super) fn over_parts(headers: &HeaderMap, body: &[u8]) -> Option<Hasher> {
    let content_type = ContentType::of(headers)?;
    let mut hasher = Hasher::over_parts(|piece| split(body, &content_type.delimiter, piece))?;
    hasher.field(content_type.before);
    hasher.field(content_type.after);
    Some(hasher)
}

/// The value of a `Content-Type` field without its boundary.
struct ContentType<'v> {
    before: &'v [u8],
    after: &'v [u8],
    /// Two hyphens and the boundary.
    delimiter: Vec<u8>,
}

impl<'v> ContentType<'v> {
    fn of(headers: &'v HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(CONTENT_TYPE).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return None;
        };
        Self::parse(value.as_bytes())
    }

    /// Finds the boundary among the parameters (RFC 9110 section 5.6.6). Returns `None` if there is
    /// none, or if there is more than one, because readers disagree about which of them counts.
    fn parse(value: &'v [u8]) -> Option<Self> {
        const MULTIPART: &[u8] = b"multipart/";
        if !value.get(..MULTIPART.len())?.eq_ignore_ascii_case(MULTIPART) {
            return None;
        }
        let mut at = value.iter().position(|byte| *byte == b';')?;
        let mut found = None;
        loop {
            at += run(&value[at..], |byte| matches!(byte, b';' | b' ' | b'\t'));
            let name = &value[at..at + run(&value[at..], is_token)];
            at += name.len();
            if name.is_empty() {
                break;
            }
            if value.get(at) != Some(&b'=') {
                return None;
            }
            at += 1;
            let (content, len) = parameter(&value[at..])?;
            if name.eq_ignore_ascii_case(b"boundary") {
                let piece = Self {
                    before: &value[..at],
                    after: &value[at + len..],
                    delimiter: delimiter(&content)?,
                };
                if found.replace(piece).is_some() {
                    return None;
                }
            }
            at += len;
        }
        (at == value.len()).then_some(found).flatten()
    }
}

/// Reads the value of a parameter, bare or quoted. Returns its content and its length as written. A
/// bare value may contain characters that require quotes, because some clients do not quote.
fn parameter(rest: &[u8]) -> Option<(Vec<u8>, usize)> {
    if rest.first() != Some(&b'"') {
        let len = run(rest, |byte| !matches!(byte, b';' | b'"' | b' ' | b'\t'));
        return (len > 0).then(|| (rest[..len].to_vec(), len));
    }
    let (mut content, mut at) = (Vec::new(), 1);
    loop {
        match *rest.get(at)? {
            b'"' => return Some((content, at + 1)),
            b'\\' => {
                at += 1;
                content.push(*rest.get(at)?);
            }
            byte => content.push(byte),
        }
        at += 1;
    }
}

/// Returns two hyphens and the boundary. Returns `None` if the boundary is invalid (RFC 2046
/// section 5.1.1, `boundary`).
fn delimiter(boundary: &[u8]) -> Option<Vec<u8>> {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"'()+_,-./:=? ".contains(byte);
    let is_boundary = (1..=LONGEST_BOUNDARY).contains(&boundary.len())
        && boundary.iter().all(is_allowed)
        && boundary.last() != Some(&b' ');
    is_boundary.then(|| [b"--", boundary].concat())
}

/// Cuts a body at its delimiters into the preamble with its line end, each part, and the epilogue.
/// Returns `None` if the body is malformed. Looks at each byte a bounded number of times.
///
/// The rules are stricter than those of the RFC. The text of the delimiter may appear only at the
/// start of a line, and the line must end directly after it. Otherwise a reader that is less strict
/// than this function could see other parts than the compared ones.
fn split(body: &[u8], delimiter: &[u8], piece: &mut dyn FnMut(&[u8])) -> Option<()> {
    // The start of the current part. `None` before the first delimiter.
    let mut part: Option<usize> = None;
    let mut delimiters = memmem::find_iter(body, delimiter);
    loop {
        let at = delimiters.next()?;
        match part {
            None => {
                let preamble = &body[..at];
                if !preamble.is_empty() && !preamble.ends_with(CRLF) {
                    return None;
                }
                piece(preamble);
            }
            Some(start) => {
                // RFC 2046 section 5.1.1: the line end before a delimiter belongs to the delimiter.
                let content = body.get(start..at)?.strip_suffix(CRLF)?;
                if !has_header_end(content) {
                    return None;
                }
                piece(content);
            }
        }
        let end = at + delimiter.len();
        if body[end..].starts_with(CRLF) {
            part = Some(end + CRLF.len());
            continue;
        }
        let epilogue = body[end..].strip_prefix(b"--")?;
        if !(epilogue.is_empty() || epilogue.starts_with(CRLF)) || delimiters.next().is_some() {
            return None;
        }
        piece(epilogue);
        return Some(());
    }
}

/// Returns whether an empty line ends the header fields of a part (RFC 2046 section 5.1,
/// `body-part`).
fn has_header_end(part: &[u8]) -> bool {
    part.starts_with(CRLF) || memmem::find(part, b"\r\n\r\n").is_some()
}

fn run(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> usize {
    bytes.iter().take_while(|byte| belongs(**byte)).count()
}

/// Returns whether a byte is a `tchar` (RFC 9110 section 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::Fingerprint;

    fn of(content_type: &str, body: &[u8]) -> Option<Fingerprint> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, content_type.parse().unwrap());
        over_parts(&headers, body).map(Hasher::finish)
    }

    fn form(boundary: &str, body: &str) -> Option<Fingerprint> {
        let body = body.replace('\n', "\r\n").replace('B', boundary);
        of(&format!("multipart/form-data; boundary={boundary}"), body.as_bytes())
    }

    const UPLOAD: &str = "--B\nContent-Disposition: form-data; name=\"a\"\n\n1\n--B\n\n2\n--B--\n";

    #[test]
    fn the_boundary_makes_no_difference_and_everything_else_does() {
        let first = form("x1", UPLOAD).unwrap();
        assert_eq!(form("----y", UPLOAD), Some(first));
        let mut all = vec![first];
        for other in [
            "--B\nContent-Disposition: form-data; name=\"b\"\n\n1\n--B\n\n2\n--B--\n",
            "--B\nContent-Disposition: form-data; name=\"a\"\n\n3\n--B\n\n2\n--B--\n",
            "--B\nContent-Disposition: form-data; name=\"a\"\n\n1\n--B--\n",
            "--B\nContent-Disposition: form-data; name=\"a\"\n\n1\n\n2\n--B--\n",
            "--B\nContent-Disposition: form-data; name=\"a\"\n\n1\n--B\n\n2\n--B--",
            "--B\nContent-Disposition: form-data; name=\"a\"\n\n1\n--B\n\n2\n--B--\nepilogue",
            "preamble\n--B\nContent-Disposition: form-data; name=\"a\"\n\n1\n--B\n\n2\n--B--\n",
            "--B\nContent-Disposition: form-data; name=\"a\"\n\n1\n--B\n\n2\n--B\n\n\n--B--\n",
            "--B--\n",
            "\n--B--\n",
        ] {
            all.push(form("x1", other).unwrap_or_else(|| panic!("{other}")));
        }
        let body = UPLOAD.replace('\n', "\r\n").replace('B', "x1");
        for content_type in ["multipart/mixed; boundary=x1", "multipart/form-data; boundary=x1; a=b"] {
            all.push(of(content_type, body.as_bytes()).unwrap());
        }
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| one != other), "{at}");
        }
    }

    #[test]
    fn a_malformed_body_has_no_parts() {
        for malformed in [
            "",
            "--B",
            "--B\n\n1",
            "--B\n\n1\n--B\n",
            "--B\n\n1\n--B-\n",
            "--B\n\n1--B--\n",
            "--B \n\n1\n--B--\n",
            "--B\n--B--\n",
            "--B\nno end of the header\n--B--\n",
            "--B\n\n1\n--B--trailing",
            "--B\n\n1\n--B--\n--B\n\n2\n--B--\n",
            "--B\n\nthe text --B within a line\n--B--\n",
            "--B\n\n1\n--Bcd\n\n2\n--B--\n",
            "preamble--B\n\n1\n--B--\n",
            "{\"json\": true}",
        ] {
            assert_eq!(form("x1", malformed), None, "{malformed:?}");
        }
        // This body has line feeds without carriage returns.
        assert_eq!(of("multipart/form-data; boundary=x", b"--x\n\n1\n--x--\n"), None);
    }

    #[test]
    fn the_boundary_is_found_however_it_is_written() {
        let parsed = |value: &'static str| ContentType::parse(value.as_bytes()).map(|found| found.delimiter);
        for (value, boundary) in [
            ("multipart/form-data; boundary=x-1", "--x-1"),
            ("Multipart/Mixed;charset=utf-8 ; BOUNDARY=\"x 1\"", "--x 1"),
            ("multipart/form-data; a=\"b; boundary=c\"; boundary=\"x\\-1\"", "--x-1"),
            ("multipart/form-data; boundary=x;", "--x"),
            ("multipart/form-data; boundary=--=_Part/1", "----=_Part/1"),
        ] {
            assert_eq!(parsed(value).as_deref(), Some(boundary.as_bytes()), "{value}");
        }
        for value in [
            "application/json; boundary=x",
            "multipart",
            "multipart/form-data",
            "multipart/form-data; boundary",
            "multipart/form-data; boundary=",
            "multipart/form-data; a=; boundary=x",
            "multipart/form-data; boundary=\"\"",
            "multipart/form-data; boundary=\"x",
            "multipart/form-data; boundary=\"x \"",
            "multipart/form-data; boundary=\"x\\",
            "multipart/form-data; boundary=x; boundary=y",
            "multipart/form-data; boundary=x y",
            "multipart/form-data; boundary=x@y",
            "multipart/form-data; boundary=0123456789012345678901234567890123456789012345678901234567890123456789x",
        ] {
            assert_eq!(parsed(value), None, "{value}");
        }
    }

    #[test]
    fn two_content_types_are_none() {
        let mut headers = HeaderMap::new();
        for boundary in ["x", "y"] {
            let value = format!("multipart/form-data; boundary={boundary}");
            headers.append(CONTENT_TYPE, value.parse().unwrap());
        }
        assert!(over_parts(&headers, b"--x\r\n\r\n1\r\n--x--").is_none());
    }

    /// Joins parts as a client does.
    fn joined(boundary: &str, parts: &[Vec<u8>]) -> Vec<u8> {
        let mut body = Vec::new();
        for part in parts {
            body.extend_from_slice(format!("--{boundary}\r\n").as_bytes());
            body.extend_from_slice(b"content-type: a/b\r\n\r\n");
            body.extend_from_slice(part);
            body.extend_from_slice(CRLF);
        }
        body.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
        body
    }

    fn parts() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let byte = prop::sample::select(b"\r\n-ab\x00\xff".to_vec());
        prop::collection::vec(prop::collection::vec(byte, 0..12), 0..4)
    }

    proptest! {
        #[test]
        fn equal_parts_are_equal_and_others_are_not(one in parts(), other in parts()) {
            let of = |boundary: &str, parts: &[Vec<u8>]| {
                of(&format!("multipart/form-data; boundary={boundary}"), &joined(boundary, parts))
            };
            // The bytes above cannot form either boundary.
            prop_assert!(of("zz", &one).is_some());
            prop_assert_eq!(of("zz", &one), of("yyyy", &one));
            prop_assert_eq!(of("zz", &one) == of("yyyy", &other), one == other);
        }

        #[test]
        fn any_body_is_taken_or_left(body: Vec<u8>, text in "[-zx\r\n]{0,40}") {
            let content_type = "multipart/form-data; boundary=z";
            let _ = (of(content_type, &body), of(content_type, text.as_bytes()));
        }
    }
}
