//! The field `Host` in a fingerprint.
//!
//! Two requests count as the same only if their hosts are the same name in any letter case with the
//! same port, or are both addresses or empty. The two default ports equal no port.

use std::net::{Ipv4Addr, Ipv6Addr};

use bytes::Bytes;
use http::{HeaderValue, Request};
use tower_idempotency::protocol::Fingerprint;

use crate::exchange::fingerprint;
use crate::input::halves;

pub fn property(bytes: &[u8]) {
    let (one, other) = halves(bytes);
    let (Some(first), Some(second)) = (of_host(one), of_host(other)) else {
        return;
    };
    let (one, other) = (Host::of(one), Host::of(other));
    assert_eq!(first == second, one == other, "{one:?} and {other:?}");
}

fn of_host(host: &[u8]) -> Option<Fingerprint> {
    let host = HeaderValue::from_bytes(host).ok()?;
    let request = Request::post("/").header("idempotency-key", "k").header("host", host);
    Some(fingerprint(|layer| layer, request.body(Bytes::new()).unwrap()))
}

#[derive(Debug, PartialEq)]
enum Host {
    Address,
    Name(String, Option<u16>),
    /// A host in no known form, which equals only itself.
    Other(Vec<u8>),
}

impl Host {
    fn of(line: &[u8]) -> Self {
        Self::parse(line).unwrap_or_else(|| Self::Other(line.to_vec()))
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(line.rsplit(|byte| *byte == b'@').next()?).ok()?;
        let host_end = match text.starts_with('[') {
            true => text.find(']')? + 1,
            false => text.find(':').unwrap_or(text.len()),
        };
        let (host, port) = text.split_at(host_end);
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => None,
            Some("") => None,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().ok().filter(|port| *port != 0)?)
            }
            _ => return None,
        };
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_address = match bracketed {
            Some(inner) => inner.split('%').next()?.parse::<Ipv6Addr>().is_ok(),
            None => host.parse::<Ipv4Addr>().is_ok(),
        };
        if is_address || host.is_empty() && port.is_none() {
            return Some(Self::Address);
        }
        let in_name = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=".contains(c);
        let port = port.filter(|port| ![80, 443].contains(port));
        (!host.is_empty() && host.chars().all(in_name)).then(|| Self::Name(host.to_ascii_lowercase(), port))
    }
}
