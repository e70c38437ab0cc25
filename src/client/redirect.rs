//! Redirects: a key stays with the server it was made for.

use http::header::HeaderName;
use http::{Request, Uri};
use tower_http::follow_redirect::policy::{Action, Attempt, Policy};

use super::keys::Profile;

/// A policy for `tower-http`'s redirects that takes the idempotency key off a request which is sent on to another origin (RFC 6454
/// section 5): a key tells whoever knows it how to ask for the answer that is kept under it. Once off, it stays off.
///
/// It follows everything; put policies that do not beside it. Within an origin a 307 or 308 carries the key, as every attempt does.
/// Without this policy, `tower-http` sends the key wherever it is redirected to: leave it away to ask for that.
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::Full;
/// use tower_http::follow_redirect::policy::{clone_body_fn, FilterCredentials, Limited, PolicyExt};
/// use tower_http::follow_redirect::FollowRedirectLayer;
/// use tower_idempotency::client::{KeyAtHome, Profile};
///
/// let policy = Limited::new(5)
///     .and::<_, Full<Bytes>, ()>(FilterCredentials::new())
///     .and::<_, Full<Bytes>, ()>(KeyAtHome::new(&Profile::stripe()))
///     // A 307 or 308 sends the body again.
///     .and::<_, Full<Bytes>, ()>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
/// let redirects = FollowRedirectLayer::with_policy(policy);
/// # drop(redirects);
/// ```
#[derive(Clone, Debug)]
pub struct KeyAtHome {
    fields: Vec<HeaderName>,
    has_left: bool,
}

impl KeyAtHome {
    /// Takes off the header fields of this profile.
    #[must_use]
    pub fn new(profile: &Profile) -> Self {
        let fields = profile.first_sent.iter().chain([&profile.header]);
        Self {
            fields: fields.cloned().collect(),
            has_left: false,
        }
    }
}

impl<B, E> Policy<B, E> for KeyAtHome {
    fn redirect(&mut self, attempt: &Attempt<'_>) -> Result<Action, E> {
        self.has_left |= !is_same_origin(attempt.previous(), attempt.location());
        Ok(Action::Follow)
    }

    fn on_request(&mut self, request: &mut Request<B>) {
        if self.has_left {
            for field in &self.fields {
                request.headers_mut().remove(field);
            }
        }
    }
}

/// What cannot be compared is another origin.
fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    let (Some(scheme), Some(host)) = (one.scheme_str(), one.host()) else {
        return false;
    };
    other.scheme_str() == Some(scheme)
        && other.host().is_some_and(|other| other.eq_ignore_ascii_case(host))
        && port(one).is_some()
        && port(one) == port(other)
}

fn port(uri: &Uri) -> Option<u16> {
    uri.port_u16().or(match uri.scheme_str() {
        Some("http") => Some(80),
        Some("https") => Some(443),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |one: &str, other: &str| is_same_origin(&one.parse().unwrap(), &other.parse().unwrap());
        assert!(same("http://a.example/x", "http://A.example:80/y"));
        assert!(same("https://a.example:443/", "https://a.example/"));
        for other in [
            "https://a.example/",
            "http://b.example/",
            "http://a.example:8080/",
            "/relative",
            "ftp://a.example/",
        ] {
            assert!(!same("http://a.example/", other), "{other}");
        }
        assert!(!same("ftp://a.example/", "ftp://a.example/"));
    }
}
