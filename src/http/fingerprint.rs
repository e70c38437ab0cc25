//! Computes the fingerprint of a request.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName};
use http::request::Parts;
use http::{HeaderMap, Uri};

use super::authority::Authority;
#[cfg(feature = "tonic")]
use super::grpc;
use super::multipart;
use crate::protocol::CanonicalJson;
use crate::protocol::{Fingerprint, Hasher};

type Digest = Arc<dyn Fn(&Parts, &Bytes) -> Vec<u8> + Send + Sync>;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The parts of a request that make it "the same request".
#[derive(Clone, Debug)]
pub(crate) struct Fingerprinting {
    pub(crate) body: BodyForm,
    pub(crate) headers: Vec<HeaderName>,
    /// Whether multipart bodies are compared without their boundaries.
    pub(crate) multipart: bool,
    /// Whether the fingerprint includes the authority if no scope is set.
    pub(crate) authority: bool,
}

impl Default for Fingerprinting {
    fn default() -> Self {
        Self {
            body: BodyForm::default(),
            headers: Vec::new(),
            multipart: false,
            authority: true,
        }
    }
}

#[derive(Clone, Default)]
pub(crate) enum BodyForm {
    #[default]
    Bytes,
    Custom(Digest),
    /// The decompressed messages, so that their compression makes no difference.
    #[cfg(feature = "tonic")]
    Grpc,
    Json(CanonicalJson),
    /// Nothing is compared, not even the method.
    Nothing,
}

impl Fingerprinting {
    /// Returns the fingerprint of a request that a server received. Without a scope, the
    /// fingerprint includes the credentials and the host of the request (I4). `limit` bounds the
    /// size of a decompressed body in bytes.
    pub(crate) fn of(&self, parts: &Parts, body: &Bytes, scoped: bool, limit: usize) -> Fingerprint {
        self.of_target(uri_as_received(parts), parts, body, scoped, limit)
    }

    /// Returns the fingerprint of a request that a client sends, without credentials and host. The
    /// request's extensions do not count. If the application forwards a request that it has
    /// received, they describe the received request.
    pub(crate) fn of_call(&self, parts: &Parts, body: &Bytes) -> Fingerprint {
        self.of_target(&parts.uri, parts, body, true, body.len())
    }

    #[cfg_attr(
        not(feature = "tonic"),
        expect(unused_variables, reason = "only bodies of gRPC are decompressed")
    )]
    fn of_target(&self, uri: &Uri, parts: &Parts, body: &Bytes, scoped: bool, limit: usize) -> Fingerprint {
        if matches!(self.body, BodyForm::Nothing) {
            return Fingerprint::NONE;
        }
        let over_parts = self.over_parts(&parts.headers, body);
        let is_in_parts = over_parts.is_some();
        let mut hasher = over_parts.unwrap_or_else(|| match &self.body {
            BodyForm::Bytes | BodyForm::Nothing => Hasher::over_bytes(body),
            BodyForm::Custom(digest) => {
                let mut hasher = Hasher::over_bytes(&digest(parts, body));
                hasher.field(b"custom");
                hasher
            }
            #[cfg(feature = "tonic")]
            BodyForm::Grpc => over_messages(&parts.headers, body, limit),
            BodyForm::Json(json) => Hasher::over_json(json, body),
        });
        hasher.field(parts.method.as_str().as_bytes());
        hasher.field(uri.path().as_bytes());
        hasher.field(uri.query().unwrap_or_default().as_bytes());
        if !scoped {
            add_lines(&mut hasher, &parts.headers, &AUTHORIZATION);
            add_lines(&mut hasher, &parts.headers, &X_API_KEY);
            if self.authority {
                Authority::of(uri, &parts.headers).add_to(&mut hasher);
            }
        }
        for name in &self.headers {
            // Skip the content type, because its boundary would make every retry a different
            // request. The fingerprint already includes the content type without the boundary.
            if is_in_parts && name == CONTENT_TYPE {
                continue;
            }
            add_lines(&mut hasher, &parts.headers, name);
        }
        // Either a router has stripped a prefix, or the application has forwarded the request to
        // another target.
        if uri != &parts.uri {
            // A router does not change the authority. Any other authority was chosen by the
            // application, so it counts, even if it is an IP address or a scope is set.
            if let Some(authority) = parts.uri.authority().filter(|chosen| uri.authority() != Some(chosen)) {
                hasher.field(authority.as_str().as_bytes());
            }
            hasher.field(parts.uri.path().as_bytes());
            hasher.field(parts.uri.query().unwrap_or_default().as_bytes());
        }
        hasher.finish()
    }

    /// Starts a fingerprint with the parts of a multipart body if the settings ask for it. A
    /// function of the application always gets the whole body.
    fn over_parts(&self, headers: &HeaderMap, body: &[u8]) -> Option<Hasher> {
        if !self.multipart || matches!(self.body, BodyForm::Custom(_)) {
            return None;
        }
        multipart::over_parts(headers, body)
    }
}

/// Starts a fingerprint with the decompressed form of a gRPC body, so that its compression makes no
/// difference. If the body cannot be decompressed, the fingerprint includes its bytes and the name
/// of its encoding.
#[cfg(feature = "tonic")]
fn over_messages(headers: &HeaderMap, body: &Bytes, limit: usize) -> Hasher {
    let encoding = headers.get(grpc::GRPC_ENCODING);
    let limits = grpc::Limits {
        bytes: limit,
        compressed: grpc::MOST_COMPRESSED,
    };
    match grpc::plain(body, encoding, limits) {
        Ok(plain) => Hasher::over_messages(&plain),
        Err(_) => {
            let mut hasher = Hasher::over_bytes(body);
            hasher.field(encoding.map_or(&b""[..], |name| name.as_bytes()));
            hasher.field(b"grpc-encoding");
            hasher
        }
    }
}

/// Adds the lines of a header field, and their number.
fn add_lines(hasher: &mut Hasher, headers: &HeaderMap, name: &HeaderName) {
    let mut lines: u32 = 0;
    for value in headers.get_all(name) {
        hasher.field(value.as_bytes());
        lines += 1;
    }
    hasher.field(&lines.to_le_bytes());
}

/// Returns the target that the client sent. A nested axum router strips its prefix from `uri`.
/// Without the original target, two nested routers with equal inner paths would replay each other's
/// responses.
pub(crate) fn uri_as_received(parts: &Parts) -> &Uri {
    #[cfg(feature = "axum")]
    if let Some(original) = parts.extensions.get::<axum::extract::OriginalUri>() {
        return &original.0;
    }
    &parts.uri
}

impl fmt::Debug for BodyForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "Bytes",
            Self::Custom(_) => "Custom",
            #[cfg(feature = "tonic")]
            Self::Grpc => "Grpc",
            Self::Json(_) => "Json",
            Self::Nothing => "Nothing",
        })
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn of(fingerprinting: &Fingerprinting, parts: &Parts, body: &'static str) -> Fingerprint {
        fingerprinting.of(parts, &Bytes::from_static(body.as_bytes()), false, 0)
    }

    #[test]
    fn method_path_query_and_body_each_count() {
        let f = Fingerprinting::default();
        let all = [
            of(&f, &parts("POST", "/a?x=1", &[]), "b"),
            of(&f, &parts("PATCH", "/a?x=1", &[]), "b"),
            of(&f, &parts("POST", "/b?x=1", &[]), "b"),
            of(&f, &parts("POST", "/a?x=2", &[]), "b"),
            of(&f, &parts("POST", "/a", &[]), "b"),
            of(&f, &parts("POST", "/a?x=1", &[]), "c"),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| one != other), "{at}");
        }
    }

    #[test]
    fn credentials_and_the_host_count_unless_there_is_a_scope() {
        let f = Fingerprinting::default();
        for (name, alice, mallory) in [
            ("authorization", "Bearer alice", "Bearer mallory"),
            ("x-api-key", "alice", "mallory"),
            ("host", "alice.shop.example", "mallory.shop.example"),
        ] {
            let alice = parts("POST", "/", &[(name, alice)]);
            let mallory = parts("POST", "/", &[(name, mallory)]);
            let body = Bytes::new();
            assert_ne!(f.of(&alice, &body, false, 0), f.of(&mallory, &body, false, 0), "{name}");
            assert_eq!(f.of(&alice, &body, true, 0), f.of(&mallory, &body, true, 0), "{name}");
        }
    }

    #[test]
    fn the_host_can_be_left_out_and_credentials_still_count() {
        let without = Fingerprinting {
            authority: false,
            ..Fingerprinting::default()
        };
        let to = |host| parts("POST", "/", &[("host", host), ("x-api-key", "1")]);
        assert_eq!(of(&without, &to("a.example"), ""), of(&without, &to("b.example"), ""));
        let other = parts("POST", "/", &[("host", "a.example"), ("x-api-key", "2")]);
        assert_ne!(of(&without, &to("a.example"), ""), of(&without, &other, ""));
    }

    #[test]
    fn a_header_field_that_was_chosen_counts_with_a_scope_too() {
        let chosen = Fingerprinting {
            headers: vec![X_API_KEY],
            ..Fingerprinting::default()
        };
        let by = |key| chosen.of(&parts("POST", "/", &[("x-api-key", key)]), &Bytes::new(), true, 0);
        assert_ne!(by("1"), by("2"));
    }

    #[test]
    fn only_chosen_headers_count_and_their_lines_do_not_run_together() {
        let plain = Fingerprinting::default();
        let one = parts("POST", "/", &[("x-a", "1"), ("traceparent", "00-1")]);
        let two = parts("POST", "/", &[("x-a", "2"), ("traceparent", "00-2")]);
        assert_eq!(of(&plain, &one, ""), of(&plain, &two, ""));
        let chosen = Fingerprinting {
            headers: vec![HeaderName::from_static("x-a"), HeaderName::from_static("x-b")],
            ..Fingerprinting::default()
        };
        assert_ne!(of(&chosen, &one, ""), of(&chosen, &two, ""));
        let in_a = parts("POST", "/", &[("x-a", "1"), ("x-a", "2")]);
        let in_both = parts("POST", "/", &[("x-a", "1"), ("x-b", "2")]);
        assert_ne!(of(&chosen, &in_a, ""), of(&chosen, &in_both, ""));
    }

    /// Combines small parts of a request in every way, so that many requests differ only in the
    /// place of a byte (I4). Two requests have one fingerprint if and only if their parts are equal.
    #[test]
    fn no_two_different_requests_have_one_fingerprint() {
        const LINES: [&[&str]; 4] = [&[], &["1"], &["1", "1"], &["11"]];
        let chosen = ["x-a", "x-b"].map(HeaderName::from_static).to_vec();
        let bytes: [(&'static str, &str); 3] = [("", ""), ("1", "1"), ("11", "11")];
        let json = [("1", "1"), (" 1", "1"), ("[1]", "[1]")];
        let length: Digest = Arc::new(|_, body| body.len().to_le_bytes().to_vec());
        let forms = [
            (BodyForm::Bytes, bytes),
            (BodyForm::Json(CanonicalJson::new()), json),
            (BodyForm::Custom(length), [("", "0"), ("1", "1"), ("2", "1")]),
        ];
        for ((form, bodies), scoped) in forms.iter().flat_map(|form| [(form, true), (form, false)]) {
            let f = Fingerprinting {
                body: form.clone(),
                headers: chosen.clone(),
                ..Fingerprinting::default()
            };
            let mut seen = std::collections::HashMap::new();
            for number in 0..2 * 4 * 4_usize.pow(4) * 3 * 3 {
                let mut rest = number;
                let mut pick = |options: usize| {
                    let picked = rest % options;
                    rest /= options;
                    picked
                };
                let method = ["POST", "PATCH"][pick(2)];
                let target = ["/", "/1", "/?1", "/1?1"][pick(4)];
                let lines = [0; 4].map(|_| LINES[pick(4)]);
                let (host, host_as_compared) = [("", ""), ("a", "a"), ("A:80", "a")][pick(3)];
                let (body, body_as_compared) = bodies[pick(3)];
                let names = ["authorization", "x-api-key", "x-a", "x-b"].into_iter().zip(lines);
                let mut headers: Vec<_> = names
                    .flat_map(|(name, lines)| lines.iter().map(move |line| (name, *line)))
                    .collect();
                headers.extend(Some(("host", host)).filter(|_| !host.is_empty()));
                let fingerprint = f.of(
                    &parts(method, target, &headers),
                    &Bytes::from_static(body.as_bytes()),
                    scoped,
                    0,
                );
                let unscoped = Some((lines[0], lines[1], host_as_compared)).filter(|_| !scoped);
                let request = (method, target, unscoped, lines[2], lines[3], body_as_compared);
                let same = seen.entry(*fingerprint.digest()).or_insert(request);
                assert_eq!(*same, request, "{form:?}, {scoped}");
            }
            let requests: std::collections::HashSet<_> = seen.values().collect();
            assert_eq!(requests.len(), seen.len(), "equal requests differ: {form:?}, {scoped}");
        }
    }

    #[test]
    fn a_function_stands_for_the_body_only() {
        let length = Fingerprinting {
            body: BodyForm::Custom(Arc::new(|_, body| vec![u8::try_from(body.len()).unwrap()])),
            ..Fingerprinting::default()
        };
        let post = parts("POST", "/", &[]);
        assert_eq!(of(&length, &post, "aa"), of(&length, &post, "bb"));
        assert_ne!(of(&length, &post, "aa"), of(&length, &post, "a"));
        assert_ne!(of(&length, &post, "aa"), of(&length, &parts("POST", "/x", &[]), "aa"));
    }

    #[test]
    fn a_multipart_body_is_compared_by_its_parts_where_that_is_set() {
        let with = |multipart, body| Fingerprinting {
            body,
            multipart,
            headers: vec![CONTENT_TYPE],
            ..Fingerprinting::default()
        };
        let upload = |boundary: &str, content: &str| {
            let content_type = format!("multipart/form-data; boundary={boundary}");
            let body = format!("--{boundary}\r\n\r\n{content}\r\n--{boundary}--\r\n");
            (
                parts("POST", "/", &[("content-type", &content_type)]),
                Bytes::from(body),
            )
        };
        let of = |f: &Fingerprinting, (parts, body): (Parts, Bytes)| f.of(&parts, &body, false, 0);
        let json = || BodyForm::Json(CanonicalJson::new());
        for form in [BodyForm::Bytes, json()] {
            let on = with(true, form);
            assert_eq!(of(&on, upload("x", "1")), of(&on, upload("y", "1")));
            assert_ne!(of(&on, upload("x", "1")), of(&on, upload("y", "2")));
            assert_ne!(
                of(&on, upload("x", "\r\n--x")),
                of(&on, upload("y", "\r\n--y")),
                "malformed"
            );
        }
        let off = with(false, BodyForm::Bytes);
        assert_ne!(of(&off, upload("x", "1")), of(&off, upload("y", "1")));
        let custom = with(true, BodyForm::Custom(Arc::new(|_, body| body.to_vec())));
        assert_ne!(of(&custom, upload("x", "1")), of(&custom, upload("y", "1")));
        let on = with(true, json());
        let of_json = |body: &'static str| of(&on, (parts("POST", "/", &[]), Bytes::from(body)));
        assert_eq!(
            of_json("{\"a\":1,\"b\":2}"),
            of_json("{\"b\":2,\"a\":1}"),
            "other bodies are still JSON"
        );
    }

    #[test]
    fn nothing_compares_nothing() {
        let nothing = Fingerprinting {
            body: BodyForm::Nothing,
            ..Fingerprinting::default()
        };
        assert_eq!(
            of(&nothing, &parts("POST", "/a", &[]), "a"),
            of(&nothing, &parts("PATCH", "/b", &[]), "b")
        );
    }

    #[cfg(feature = "axum")]
    #[test]
    fn a_forwarded_request_counts_by_its_own_target_too() {
        let forwarded = |uri: &str| {
            let mut parts = parts("POST", uri, &[]);
            let original = axum::extract::OriginalUri(Uri::from_static("/pay"));
            parts.extensions.insert(original);
            parts
        };
        let (f, body) = (Fingerprinting::default(), Bytes::new());
        let targets = [
            "/pay",
            "/debit",
            "/debit?x",
            "http://a.example/debit",
            "http://b.example/debit",
            "/pay?x",
            "http://a.example/pay",
        ]
        .map(forwarded);
        for (at, one) in targets.iter().enumerate() {
            for other in &targets[at + 1..] {
                assert_ne!(
                    f.of(one, &body, true, 0),
                    f.of(other, &body, true, 0),
                    "{one:?} {other:?}"
                );
            }
        }
        // A call goes to the host of its URI, which the client layer adds itself.
        assert_ne!(f.of_call(&targets[0], &body), f.of_call(&targets[1], &body));
        let call = parts("POST", "/debit", &[]);
        assert_eq!(f.of_call(&targets[1], &body), f.of_call(&call, &body));
    }

    #[cfg(feature = "axum")]
    #[test]
    fn a_stripped_path_is_seen_whole() {
        let nested = |original: &'static str| {
            let mut parts = parts("POST", "/create", &[]);
            parts
                .extensions
                .insert(axum::extract::OriginalUri(Uri::from_static(original)));
            of(&Fingerprinting::default(), &parts, "")
        };
        assert_ne!(nested("/a/create"), nested("/b/create"));
    }

    #[test]
    fn chosen_headers_count_beside_parts_and_a_content_type_counts_without_parts() {
        let chosen = Fingerprinting {
            headers: vec![CONTENT_TYPE, X_API_KEY],
            multipart: true,
            ..Fingerprinting::default()
        };
        let with = |content_type, key| {
            let parts = parts("POST", "/", &[("content-type", content_type), ("x-api-key", key)]);
            chosen.of(&parts, &Bytes::from_static(b"--x\r\n\r\n1\r\n--x--\r\n"), true, 0)
        };
        let in_parts = "multipart/form-data; boundary=x";
        assert_ne!(with(in_parts, "1"), with(in_parts, "2"));
        assert_ne!(with("text/plain", "1"), with("text/csv", "1"));
    }

    #[test]
    fn the_debug_form_names_the_form_and_hides_the_function() {
        let forms = [BodyForm::Bytes, BodyForm::Custom(Arc::new(|_, _| Vec::new()))];
        assert_eq!(forms.map(|form| format!("{form:?}")), ["Bytes", "Custom"]);
    }
}
