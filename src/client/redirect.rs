//! A redirect policy that sends a key only to the origin that it was made for.

use http::header::HeaderName;
use http::{Request, StatusCode, Uri};
use tower_http::follow_redirect::policy::{Action, Attempt, Policy};

use super::keys::ProviderProfile;
use super::report::{OnlyUnsent, Report};

/// A redirect policy for `tower-http` 0.7. With it, the layers never mistake the response to a
/// redirected request for the response to the request that was sent. The policy never sends an
/// idempotency key to another origin (RFC 6454 section 5), because anyone who knows a key can ask
/// for the response that is stored under it.
///
/// | the request | 301, 302, 303 | 307, 308 within the origin | 307, 308 to another origin |
/// |---|---|---|---|
/// | has a safe method (RFC 9110 section 9.2.1) | follows | follows | follows without the key |
/// | has any other method | stops: the 3xx is the response | follows with the key | stops: the 307 or 308 is the response |
///
/// A server that responds with 303 has processed the request. A failure of the page that the 303
/// points to, or an error on the way there, shows nothing about the effect. The policy also reports
/// the redirects that it follows to the outer [`OnceLayer`](super::OnceLayer), `CallLayer` and
/// `RetryPolicy`. These layers then count an error or a refusal of a later hop as "unknown", never
/// as "not sent", even if `with_errors` classifies it otherwise.
///
/// A policy that overrules this one (by `or`) can send a request that is not safe to another
/// origin. `SameOriginKey` then removes the key from the request, and `CallLayer` does not repeat
/// it.
///
/// `FollowRedirect` without this policy follows every redirect and sends the key along. Every
/// `FollowRedirect` needs a policy of its own, because a policy does not see the redirects that
/// another `FollowRedirect` follows. If the outer layers recognise a `FollowRedirect` without this
/// policy, they report "unknown" for every error, and for every response that is neither a success
/// nor a redirect. They recognise it by its type, in every version of `tower-http`, and by the mark
/// that version 0.7 puts into each response. In a boxed service, they do not recognise it in four
/// cases: after an error, in another version, after a redirect to the same URI, and inside an outer
/// `FollowRedirect` that replaces the mark. They also do not recognise a later hop if a layer drops
/// the extensions of the request on its way to a second `FollowRedirect`. Therefore give every
/// `FollowRedirect` this policy, and preserve the extensions.
///
/// The type of the `FollowRedirect` must show this policy. Combine the policy with others by `and`
/// or `or`. The layers do not see it in a field of a policy type of your own. If the service is an
/// `Either` of a `FollowRedirect` with this policy and one without it, the layers cannot see which
/// of them sends the request, so they report "unknown" too.
///
/// The policy restores the extensions that the layers of this crate need in redirected requests, so
/// `preserve_extensions(false)` is safe. Put it after other policies that change the extensions,
/// such as `FilterCredentials`.
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::Full;
/// use tower_http::follow_redirect::policy::{clone_body_fn, FilterCredentials, Limited, PolicyExt};
/// use tower_http::follow_redirect::FollowRedirectLayer;
/// use tower_idempotency::client::{SameOriginKey, ProviderProfile};
///
/// let policy = Limited::new(5)
///     .and::<_, Full<Bytes>, ()>(FilterCredentials::new())
///     .and::<_, Full<Bytes>, ()>(SameOriginKey::new(&ProviderProfile::stripe()))
///     // A 307 or 308 sends the body again.
///     .and::<_, Full<Bytes>, ()>(clone_body_fn(|body: &Full<Bytes>| Some(body.clone())));
/// let redirects = FollowRedirectLayer::with_policy(policy);
/// # drop(redirects);
/// ```
#[derive(Clone, Debug)]
pub struct SameOriginKey {
    fields: Vec<HeaderName>,
    /// The target of the first request, once that request was sent.
    home: Option<Uri>,
    has_left: bool,
    report: Option<Report>,
    only_unsent: Option<OnlyUnsent>,
}

impl SameOriginKey {
    /// Creates a policy that sends the header fields of this profile only to the origin of the
    /// first request.
    #[must_use]
    pub fn new(profile: &ProviderProfile) -> Self {
        let fields = profile.first_sent.iter().chain([&profile.header]);
        Self {
            fields: fields.cloned().collect(),
            home: None,
            has_left: false,
            report: None,
            only_unsent: None,
        }
    }
}

impl<B, E> Policy<B, E> for SameOriginKey {
    fn redirect(&mut self, attempt: &Attempt<'_>) -> Result<Action, E> {
        let is_same_request = matches!(
            attempt.status(),
            StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT
        );
        let stays = is_same_request && is_same_origin(attempt.previous(), attempt.location());
        if attempt.previous_method().is_safe() || stays {
            return Ok(Action::Follow);
        }
        if let Some(report) = &self.report {
            report.stop();
        }
        Ok(Action::Stop)
    }

    // `FollowRedirect` calls this for every request, also if another policy overrules this one and
    // follows a redirect.
    fn on_request(&mut self, request: &mut Request<B>) {
        let Some(home) = &self.home else {
            let target = request.uri().clone();
            let extensions = request.extensions_mut();
            self.only_unsent = extensions.get().copied();
            if let Some(report) = extensions.get_mut::<Report>() {
                *report = report.watch(&target);
                self.report = Some(report.clone());
            }
            self.home = Some(target);
            return;
        };
        // The redirect may have dropped the extensions of the first request.
        let extensions = request.extensions_mut();
        if let Some(only_unsent) = self.only_unsent {
            extensions.insert(only_unsent);
        }
        if let Some(report) = &self.report {
            report.redirect();
            extensions.insert(report.clone());
        }
        self.has_left |= !is_same_origin(home, request.uri());
        if self.has_left {
            if let (Some(report), false) = (&self.report, request.method().is_safe()) {
                report.lose_key();
            }
            for field in &self.fields {
                request.headers_mut().remove(field);
            }
        }
    }
}

/// Returns whether two targets have the same origin. A target without a scheme, host or known port
/// has no origin, so the result is false.
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
    use crate::client::follows::{Follows, follows_of};

    #[test]
    fn a_later_hop_has_the_extensions_of_the_first() {
        let mut policy = SameOriginKey::new(&ProviderProfile::stripe());
        let mut on_request = |request: &mut Request<()>| Policy::<(), ()>::on_request(&mut policy, request);
        let mut first = Request::post("http://a.example/").body(()).unwrap();
        first.extensions_mut().insert(Report::of::<()>(None));
        first.extensions_mut().insert(OnlyUnsent);
        on_request(&mut first);
        let mut later = Request::post("http://a.example/v2").body(()).unwrap();
        on_request(&mut later);
        assert!(later.extensions().get::<Report>().is_some());
        assert!(later.extensions().get::<OnlyUnsent>().is_some());
        let mut policy = SameOriginKey::new(&ProviderProfile::stripe());
        for target in ["http://a.example/", "http://a.example/v2"] {
            let mut request = Request::post(target).body(()).unwrap();
            Policy::<(), ()>::on_request(&mut policy, &mut request);
            assert!(request.extensions().is_empty(), "without outer layers");
        }
    }

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
        assert!(!same("https://a.example:8080/", "http://a.example:8080/"));
    }

    #[test]
    fn each_visible_follow_redirect_is_judged_by_its_own_policy() {
        use tower_http::follow_redirect::FollowRedirect;
        use tower_http::follow_redirect::policy::{And, Limited, Or, Standard, redirect_fn};
        use tower_service::Service;
        type Both<S, A, B> = tower::util::Either<FollowRedirect<S, A>, FollowRedirect<S, B>>;
        struct Choice<A, B>(A, B);
        fn naming<P>(_: &P) -> impl Policy<(), ()> {
            redirect_fn(|_| {
                Ok::<_, ()>(if size_of::<P>() == 0 {
                    Action::Stop
                } else {
                    Action::Follow
                })
            })
        }
        fn of<P>(_: &P) -> Follows {
            follows_of::<FollowRedirect<(), P>>()
        }
        type Strict = And<And<Limited, SameOriginKey>, SameOriginKey>;
        assert_eq!(follows_of::<Option<String>>(), Follows::Obedient);
        assert_eq!(follows_of::<FollowRedirect<fn(u8) -> u8, Strict>>(), Follows::Obedient);
        assert_eq!(
            follows_of::<Both<Box<dyn Fn(u8) -> String>, Strict, SameOriginKey>>(),
            Follows::Obedient
        );
        assert_eq!(follows_of::<Both<(), Strict, Limited>>(), Follows::Silent);
        type Buffered<P> =
            tower::buffer::Buffer<Request<String>, <FollowRedirect<Http, P> as Service<Request<String>>>::Future>;
        type Http = tower::util::BoxCloneService<Request<String>, http::Response<String>, std::io::Error>;
        assert_eq!(follows_of::<Buffered<Strict>>(), Follows::Obedient);
        assert_eq!(follows_of::<Buffered<Standard>>(), Follows::Silent);
        for standard in [
            follows_of::<Option<FollowRedirect<String>>>(),
            follows_of::<FollowRedirect<FollowRedirect<(), Strict>>>(),
            follows_of::<FollowRedirect<FollowRedirect<()>, Strict>>(),
            follows_of::<FollowRedirect<FollowRedirect<(), Strict>, Limited>>(),
            // The policy in the name belongs to the service, and is no policy of the redirects.
            follows_of::<FollowRedirect<SameOriginKey>>(),
            follows_of::<FollowRedirect<Box<SameOriginKey>>>(),
        ] {
            assert_eq!(standard, Follows::Silent);
        }
        let home = SameOriginKey::new(&ProviderProfile::stripe());
        assert!(std::any::type_name_of_val(&naming(&home)).contains("SameOriginKey"));
        assert_eq!(of(&naming(&home)), Follows::Silent, "a mention is no policy");
        assert_eq!(
            follows_of::<FollowRedirect<(), Or<SameOriginKey, Limited>>>(),
            Follows::Reporting
        );
        assert_eq!(
            follows_of::<FollowRedirect<(), And<Or<Limited, SameOriginKey>, Limited>>>(),
            Follows::Reporting
        );
        assert_eq!(
            follows_of::<FollowRedirect<(), Box<SameOriginKey>>>(),
            Follows::Reporting
        );
        assert_eq!(
            follows_of::<FollowRedirect<(), Choice<SameOriginKey, Limited>>>(),
            Follows::Silent
        );
    }
}
