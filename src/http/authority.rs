//! The authority of a request, in the form in which fingerprints compare it.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use http::Uri;
use http::header::{HOST, HeaderMap, HeaderValue};

use crate::protocol::Hasher;

/// The host that a request was sent to. It is `:authority` or the absolute target of the request
/// line, and otherwise the `Host` field (RFC 9112 section 3.2.2, RFC 9113 section 8.3.1).
///
/// Different spellings of one authority are equal. Letter case, user information and the default
/// ports of HTTP and HTTPS make no difference. An HTTP/1.1 request does not name its scheme, so
/// both default ports are ignored for both schemes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Authority<'r> {
    /// No host, or an IP address. An address does not count, because a client that balances its
    /// load over addresses may retry on another node, and because an address names no tenant.
    Unnamed,
    Named(Name<'r>),
    /// A request that repeats `Host`, names two different hosts, or names a host that cannot be
    /// parsed. Every `Host` line and the target count byte by byte.
    Doubtful(Option<&'r str>, &'r HeaderMap),
}

/// A host name in any letter case, and its port unless it is a default port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'r> {
    host: &'r [u8],
    port: Option<u16>,
}

impl PartialEq for Name<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.host.eq_ignore_ascii_case(other.host) && self.port == other.port
    }
}

impl Eq for Name<'_> {}

impl<'r> Authority<'r> {
    pub(super) fn of(uri: &'r Uri, headers: &'r HeaderMap) -> Self {
        let target = uri.authority().map(http::uri::Authority::as_str);
        let mut lines = headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
        let (line, is_repeated) = (lines.next(), lines.next().is_some());
        let (in_target, in_line) = (target.map(str::as_bytes).map(read), line.map(read));
        match (in_target, in_line) {
            _ if is_repeated => Self::Doubtful(target, headers),
            (None, None) => Self::Unnamed,
            (Some(Some(one)), None) | (None, Some(Some(one))) => one,
            // A client that balances its load over addresses sends the name of the service in
            // `Host`.
            (Some(Some(Self::Unnamed)), Some(Some(one))) | (Some(Some(one)), Some(Some(Self::Unnamed))) => one,
            (Some(Some(one)), Some(Some(two))) if one == two => one,
            _ => Self::Doubtful(target, headers),
        }
    }

    /// Adds the fields of this authority to the hash. No other combination of fields hashes the
    /// same, because the last fields differ in length. The number of header lines, which comes
    /// before them, has four bytes, a port has two, and the mark of a doubtful authority has eight.
    pub(super) fn add_to(self, hasher: &mut Hasher) {
        match self {
            Self::Unnamed => {}
            Self::Named(Name { host, port }) => {
                hasher.field_in_lower_case(host);
                hasher.field(&port.unwrap_or_default().to_le_bytes());
            }
            Self::Doubtful(target, headers) => {
                hasher.field(target.unwrap_or_default().as_bytes());
                let mut lines: u32 = 0;
                for line in headers.get_all(HOST) {
                    hasher.field(line.as_bytes());
                    lines += 1;
                }
                hasher.field(&lines.to_le_bytes());
                hasher.field(b"doubtful");
            }
        }
    }
}

/// Parses `[userinfo@]host[:port]`. Returns `None` if the text has another form, or if its port is 0,
/// which no server has. In the hash, 0 stands for no port.
fn read(authority: &[u8]) -> Option<Authority<'_>> {
    // Fast path: most hosts are a plain name without a port.
    let is_plain = authority.iter().all(|byte| IS_PLAIN[usize::from(*byte)]);
    if is_plain && authority.last().is_some_and(u8::is_ascii_alphabetic) {
        return Some(Authority::Named(Name {
            host: authority,
            port: None,
        }));
    }
    let host_and_port = match authority.iter().rposition(|byte| *byte == b'@') {
        Some(at) => &authority[at + 1..],
        None => authority,
    };
    let end_of_host = if host_and_port.first() == Some(&b'[') {
        1 + host_and_port.iter().position(|byte| *byte == b']')?
    } else {
        let colon = host_and_port.iter().position(|byte| *byte == b':');
        colon.unwrap_or(host_and_port.len())
    };
    let (host, port) = host_and_port.split_at(end_of_host);
    let port = match port {
        [] | [b':'] => None,
        [b':', digits @ ..] if digits.iter().all(u8::is_ascii_digit) => {
            let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
            Some(NonZeroU16::new(port)?.get())
        }
        _ => return None,
    };
    let in_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(byte);
    if host.is_empty() && port.is_none() || is_ip_address(host) {
        return Some(Authority::Unnamed);
    }
    (!host.is_empty() && host.iter().all(in_name)).then(|| {
        Authority::Named(Name {
            host,
            port: port.filter(|port| ![80, 443].contains(port)),
        })
    })
}

/// The bytes of a plain host name: letters, digits, dots and hyphens.
const IS_PLAIN: [bool; 256] = {
    let mut is_plain = [false; 256];
    let mut byte = 0_u8;
    while byte < 128 {
        is_plain[byte as usize] = byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-';
        byte += 1;
    }
    is_plain
};

/// Returns whether a host is an IPv4 address, or an IPv6 address in brackets, with or without a
/// zone.
fn is_ip_address(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else {
        return false;
    };
    if let Some(literal) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let address = literal.split('%').next().unwrap_or_default();
        return address.parse::<Ipv6Addr>().is_ok();
    }
    host.ends_with(|last: char| last.is_ascii_digit()) && host.parse::<Ipv4Addr>().is_ok()
}

#[cfg(test)]
mod tests {
    use http::Request;
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::Fingerprint;

    fn of(uri: &str, hosts: &[&str]) -> Fingerprint {
        let mut request = Request::builder().uri(uri);
        for host in hosts {
            request = request.header("host", *host);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let mut hasher = Hasher::over_bytes(b"");
        Authority::of(&parts.uri, &parts.headers).add_to(&mut hasher);
        hasher.finish()
    }

    #[test]
    fn an_authority_is_one_however_it_is_sent_and_written() {
        let one = of("/", &["shop.example"]);
        for same in [
            "Shop.EXAMPLE",
            "shop.example:",
            "shop.example:443",
            "shop.example:80",
            "shop.example:0443",
        ] {
            assert_eq!(of("/", &[same]), one, "{same}");
        }
        for uri in [
            "https://shop.example/",
            "http://SHOP.example:80/",
            "https://alice:secret@shop.example:443/",
        ] {
            assert_eq!(of(uri, &[]), one, "{uri}");
            assert_eq!(of(uri, &["shop.example"]), one, "{uri} with a Host line");
        }
    }

    #[test]
    fn other_hosts_and_ports_are_other_authorities() {
        let hosts = [
            "a.example",
            "b.example",
            "a.example:0",
            "a.example:00",
            "a.example:8080",
            "a.example:8443",
            "node_1",
            "node-2:",
            "example",
            "a.example.",
            // Names whose end looks like an address.
            "shop1",
            "shop2",
            "shop-1.example-1",
            "a.10",
            "b.10",
            "10.0.0",
            "10.0.0.256",
            "10.0.0.1.2",
            "shop1:8080",
        ];
        for (at, one) in hosts.iter().enumerate() {
            for other in &hosts[at + 1..] {
                assert_ne!(of("/", &[one]), of("/", &[other]), "{one} {other}");
                assert_ne!(of(&format!("http://{one}/"), &[]), of("/", &[other]), "{one} {other}");
            }
        }
    }

    #[test]
    fn ip_addresses_are_left_out_with_their_ports() {
        let none = of("/", &[]);
        for host in [
            "10.0.0.1",
            "10.0.0.1:8080",
            "[::1]",
            "[2001:db8::1]:8443",
            "[fe80::1%25eth0]",
            "",
        ] {
            assert_eq!(of("/", &[host]), none, "{host}");
        }
        assert_eq!(of("http://10.0.0.2:3000/", &["10.0.0.2:3000"]), none);
        assert_eq!(of("http://[::1]:3000/", &[]), none);
        // The name counts, whether the target or the `Host` field has it.
        let named = of("/", &["a.example"]);
        assert_eq!(of("http://10.0.0.2:3000/", &["a.example"]), named);
        assert_eq!(of("http://a.example/", &["10.0.0.2"]), named);
        assert_ne!(of("/", &["10.0.0.1.example"]), none);
        assert_ne!(of("/", &["1.2.3"]), none);
    }

    #[test]
    fn a_host_that_is_named_twice_or_not_well_formed_counts_as_it_stands() {
        let doubtful: [(&str, &[&str]); 14] = [
            ("/", &["a.example", "b.example"]),
            ("/", &["b.example", "a.example"]),
            ("/", &["a.example", "a.example"]),
            ("/", &["10.0.0.1", "10.0.0.1"]),
            ("http://a.example/", &["b.example"]),
            ("http://b.example/", &["a.example"]),
            ("http://a.example/", &["b.example/"]),
            ("http://c.example/", &["b.example/"]),
            ("http://a.example:8080/", &["a.example:9090"]),
            ("/", &["[a.example]"]),
            ("/", &["a.example/b"]),
            ("/", &["a.example/B"]),
            ("/", &["a.example:99999"]),
            ("/", &["a.example:+80"]),
        ];
        let plain: [(&str, &[&str]); 5] = [
            ("/", &[]),
            ("/", &["a.example"]),
            ("/", &["b.example"]),
            ("/", &["a.example:80"]),
            ("/", &["a.example:8080"]),
        ];
        for (at, (uri, hosts)) in doubtful.iter().enumerate() {
            assert_eq!(of(uri, hosts), of(uri, hosts));
            for (other_uri, others) in doubtful[at + 1..].iter().chain(&plain) {
                assert_ne!(
                    of(uri, hosts),
                    of(other_uri, others),
                    "{uri} {hosts:?} {other_uri} {others:?}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn any_host_line_can_be_read(host in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = read(&host);
        }
    }
}
