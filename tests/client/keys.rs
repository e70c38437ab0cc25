//! Every logical request has one key. The tests cover how the key is made and to which requests it
//! is added.

use std::convert::Infallible;
use std::future::ready;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use http::{HeaderName, Method, Request, Response};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::client::{
    CallLayer, IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin, KeyPlacementError, ProviderProfile,
    RetryPolicy,
};
use tower_idempotency::{ErrorKind, InvalidKey, Scope};

type Sent = Arc<Mutex<Vec<http::HeaderMap>>>;

/// Sends requests through a layer. Returns the header fields of the requests that arrived.
async fn send(
    layer: &IdempotencyKeyLayer,
    requests: impl IntoIterator<Item = Request<()>>,
) -> (Sent, Vec<Result<(), KeyPlacementError<Infallible>>>) {
    let sent = Sent::default();
    let seen = Arc::clone(&sent);
    let mut client = layer.layer(service_fn(move |request: Request<()>| {
        seen.lock().unwrap().push(request.headers().clone());
        async { Ok::<_, Infallible>(Response::new(())) }
    }));
    let mut ended = Vec::new();
    for request in requests {
        ended.push(client.ready().await.unwrap().call(request).await.map(drop));
    }
    (sent, ended)
}

async fn only(layer: &IdempotencyKeyLayer, request: Request<()>) -> http::HeaderMap {
    let (sent, ended) = send(layer, [request]).await;
    assert!(matches!(ended[..], [Ok(())]), "{ended:?}");
    let sent = sent.lock().unwrap();
    assert_eq!(sent.len(), 1);
    sent[0].clone()
}

fn post() -> Request<()> {
    Request::post("https://bank.example/charges").body(()).unwrap()
}

fn value<'h>(headers: &'h http::HeaderMap, name: &str) -> &'h str {
    assert_eq!(headers.get_all(name).iter().count(), 1, "{name}");
    headers[name].to_str().unwrap()
}

#[tokio::test]
async fn every_logical_request_has_a_key_of_its_own_and_hides_it() {
    let layer = IdempotencyKeyLayer::new(ProviderProfile::stripe());
    let (sent, _) = send(&layer, (0..100).map(|_| post())).await;
    let sent = sent.lock().unwrap();
    let keys: std::collections::HashSet<&str> = sent.iter().map(|headers| value(headers, "idempotency-key")).collect();
    assert_eq!(keys.len(), 100);
    assert!(sent.iter().all(|headers| headers["idempotency-key"].is_sensitive()));
    let shown = format!("{:?}", sent[0]);
    assert!(keys.iter().all(|key| !shown.contains(key)), "{shown}");
}

#[tokio::test]
async fn only_post_and_patch_get_a_key_unless_other_methods_are_set() {
    let every = || {
        ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "POST", "PATCH"]
            .map(|method| Request::builder().method(method).uri("/").body(()).unwrap())
    };
    let keyed = |sent: &Sent| -> Vec<bool> {
        let sent = sent.lock().unwrap();
        sent.iter()
            .map(|headers| headers.contains_key("idempotency-key"))
            .collect()
    };
    let layer = IdempotencyKeyLayer::new(ProviderProfile::stripe());
    let (sent, _) = send(&layer, every()).await;
    assert_eq!(keyed(&sent), [false, false, false, false, false, true, true]);
    let (sent, _) = send(&layer.with_methods([Method::PUT]), every()).await;
    assert_eq!(keyed(&sent), [false, false, false, true, false, false, false]);
}

#[tokio::test]
async fn a_valid_key_of_the_caller_takes_precedence() {
    let layer = IdempotencyKeyLayer::new(ProviderProfile::adyen());
    let with = |keys: &[&str]| {
        let mut request = post();
        for key in keys {
            request.headers_mut().append("idempotency-key", key.parse().unwrap());
        }
        request
    };
    let headers = only(&layer, with(&["mine"])).await;
    assert_eq!(value(&headers, "idempotency-key"), "mine");
    let too_long = "k".repeat(65);
    for (keys, reason) in [
        (&["one", "two"][..], InvalidKey::Repeated),
        (&[""], InvalidKey::Empty),
        (&[too_long.as_str()], InvalidKey::TooLong),
        (&["a b"], InvalidKey::NotVisibleAscii),
    ] {
        let (sent, ended) = send(&layer, [with(keys)]).await;
        assert!(sent.lock().unwrap().is_empty(), "a request was sent with {keys:?}");
        assert!(
            matches!(&ended[0], Err(KeyPlacementError::Key(error)) if error.reason() == reason),
            "{keys:?}: {ended:?}"
        );
    }
}

/// A server without quoted keys counts the quotes. The layer did not, and sent a key that such a
/// server rejects.
#[tokio::test]
async fn quotes_are_a_part_of_a_key_that_the_profile_does_not_quote() {
    let with = |key: String| {
        let request = Request::post("/").header("idempotency-key", key);
        request.body(()).unwrap()
    };
    let quoted = |length: usize| format!("\"{}\"", "k".repeat(length - 2));
    let layer = IdempotencyKeyLayer::new(ProviderProfile::adyen());
    only(&layer, with(quoted(64))).await;
    only(&layer, with("\"open".to_owned())).await;
    let (sent, ended) = send(&layer, [with(quoted(65))]).await;
    assert!(
        matches!(&ended[0], Err(KeyPlacementError::Key(error)) if error.reason() == InvalidKey::TooLong),
        "{ended:?}"
    );
    assert!(sent.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_profile_sets_the_header_field_and_the_form_of_the_key() {
    let generator = || KeyGenerator::from_fn(|_| Ok::<_, Infallible>(r#"a"b\c"#.to_owned()));
    for (profile, header, form) in [
        (ProviderProfile::draft(), "idempotency-key", r#""a\"b\\c""#),
        (ProviderProfile::stripe(), "idempotency-key", r#"a"b\c"#),
        (ProviderProfile::adyen(), "idempotency-key", r#"a"b\c"#),
        (ProviderProfile::paypal(), "paypal-request-id", r#"a"b\c"#),
        (ProviderProfile::checkout(), "cko-idempotency-key", r#"a"b\c"#),
        (
            ProviderProfile::repeatable_requests(),
            "repeatability-request-id",
            r#"a"b\c"#,
        ),
        (
            ProviderProfile::draft()
                .with_header(HeaderName::from_static("x-key"))
                .with_quotes(false),
            "x-key",
            r#"a"b\c"#,
        ),
    ] {
        let layer = IdempotencyKeyLayer::new(profile).with_generator(generator());
        let mut request = post();
        request
            .extensions_mut()
            .insert(KeyOrigin::new("order", "charge").with_first_sent(UNIX_EPOCH));
        let headers = only(&layer, request).await;
        assert_eq!(value(&headers, header), form);
    }
}

#[tokio::test]
async fn each_profile_bounds_the_length_of_a_key() {
    for (profile, longest) in [
        (ProviderProfile::draft(), 255),
        (ProviderProfile::stripe(), 255),
        (ProviderProfile::adyen(), 64),
        (ProviderProfile::paypal(), 108),
        (ProviderProfile::checkout(), 255),
        (ProviderProfile::repeatable_requests(), 255),
    ] {
        for (len, is_sent) in [(longest, true), (longest + 1, false)] {
            let generator = KeyGenerator::from_fn(move |_| Ok::<_, Infallible>("k".repeat(len)));
            let layer = IdempotencyKeyLayer::new(profile.clone()).with_generator(generator);
            let mut request = post();
            request
                .extensions_mut()
                .insert(KeyOrigin::new("order", "charge").with_first_sent(UNIX_EPOCH));
            let (sent, _) = send(&layer, [request]).await;
            assert_eq!(sent.lock().unwrap().len(), usize::from(is_sent), "{len}");
        }
    }
}

#[tokio::test]
async fn repeatable_requests_carry_the_date_of_the_first_attempt() {
    let layer = IdempotencyKeyLayer::new(ProviderProfile::repeatable_requests());
    let headers = only(&layer, post()).await;
    let date = value(&headers, "repeatability-first-sent");
    assert!(date.ends_with(" GMT") && date.len() == 29, "{date}");

    let mut own = post();
    for (name, value) in [
        ("repeatability-request-id", "mine"),
        ("repeatability-first-sent", "Fri, 31 Dec 1999 23:59:59 GMT"),
    ] {
        own.headers_mut().insert(name, value.parse().unwrap());
    }
    let headers = only(&layer, own.clone()).await;
    assert_eq!(headers, *own.headers());
}

/// A caller's own key or a derived key may belong to a request that an earlier process sent before
/// it crashed. If the retry has the present date, the server takes it for a new request once its
/// record of the key is gone.
#[tokio::test]
async fn a_retry_after_a_crash_carries_the_date_of_the_first_attempt_or_is_not_sent() {
    const NAME: &str = "repeatability-first-sent";
    let keys = KeyDeriver::new(b"32 bytes from the secret manager").unwrap();
    let plain = || IdempotencyKeyLayer::new(ProviderProfile::repeatable_requests());
    let derived = || plain().with_generator(KeyGenerator::derived(keys.clone()));
    let by_function = plain().with_generator(KeyGenerator::from_fn(|_| Ok::<_, Infallible>("order-7".to_owned())));
    let origin = KeyOrigin::new("order-7", "charge");
    let from = |origin: &KeyOrigin| {
        let mut request = post();
        request.extensions_mut().insert(origin.clone());
        request
    };
    let mut own = post();
    own.headers_mut()
        .insert("repeatability-request-id", "mine".parse().unwrap());

    for (layer, request) in [
        (derived(), from(&origin)),
        (by_function, post()),
        (plain(), own.clone()),
        // HTTP cannot express this date.
        (
            derived(),
            from(&origin.clone().with_first_sent(UNIX_EPOCH - Duration::from_secs(1))),
        ),
    ] {
        let (sent, ended) = send(&layer, [request]).await;
        assert!(matches!(ended[..], [Err(KeyPlacementError::FirstSent)]), "{ended:?}");
        assert_eq!(sent.lock().unwrap().len(), 0);
    }

    let dated = origin.with_first_sent(UNIX_EPOCH + Duration::from_secs(946_684_799));
    let (first, again) = (
        only(&derived(), from(&dated)).await,
        only(&derived(), from(&dated)).await,
    );
    assert_eq!(first, again, "a retry after a crash sends the same header fields");
    assert_eq!(value(&first, NAME), "Fri, 31 Dec 1999 23:59:59 GMT");
    own.extensions_mut().insert(dated);
    assert_eq!(value(&only(&plain(), own).await, NAME), "Fri, 31 Dec 1999 23:59:59 GMT");
}

#[tokio::test]
async fn a_request_is_not_sent_if_its_maker_fails_or_returns_an_invalid_key() {
    let layer = |generator| IdempotencyKeyLayer::new(ProviderProfile::adyen()).with_generator(generator);
    let failing = KeyGenerator::from_fn(|_| Err::<String, _>("the vault is closed"));
    let (sent, ended) = send(&layer(failing), [post()]).await;
    assert!(sent.lock().unwrap().is_empty());
    let error = ended.into_iter().next().unwrap().unwrap_err();
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "the vault is closed"
    );

    for (key, reason) in [
        (String::new(), InvalidKey::Empty),
        ("k".repeat(65), InvalidKey::TooLong),
        ("schlüssel".to_owned(), InvalidKey::NotVisibleAscii),
        ("a\r\nx-admin: 1".to_owned(), InvalidKey::NotVisibleAscii),
    ] {
        let made = key.clone();
        let generator = KeyGenerator::from_fn(move |_| Ok::<_, Infallible>(made.clone()));
        let (sent, ended) = send(&layer(generator), [post()]).await;
        assert!(sent.lock().unwrap().is_empty());
        assert!(
            matches!(&ended[0], Err(KeyPlacementError::Key(error)) if error.reason() == reason),
            "{key:?}: {ended:?}"
        );
    }
}

#[tokio::test]
async fn random_keys_are_uuids_of_the_chosen_version() {
    for (generator, version) in [(KeyGenerator::uuid_v4(), '4'), (KeyGenerator::uuid_v7(), '7')] {
        let headers = only(
            &IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(generator),
            post(),
        )
        .await;
        let key = value(&headers, "idempotency-key");
        let dashes: Vec<usize> = key.match_indices('-').map(|(at, _)| at).collect();
        assert_eq!(
            (key.len(), dashes, key.chars().nth(14)),
            (36, vec![8, 13, 18, 23], Some(version)),
            "{key}"
        );
    }
    // UUIDs of version 7 are ordered by time.
    let layer = IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(KeyGenerator::uuid_v7());
    let earlier = only(&layer, post()).await;
    tokio::time::sleep(Duration::from_millis(3)).await;
    let later = only(&layer, post()).await;
    assert!(value(&earlier, "idempotency-key") < value(&later, "idempotency-key"));
}

#[tokio::test]
async fn a_derived_key_survives_a_crash_and_depends_on_scope_key_and_step() {
    let keys = || KeyDeriver::new(&[7; 32]).unwrap();
    let derived = |origin: KeyOrigin| {
        let layer = IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(KeyGenerator::derived(keys()));
        let mut request = post();
        request.extensions_mut().insert(origin);
        async move { value(&only(&layer, request).await, "idempotency-key").to_owned() }
    };
    let origin = || KeyOrigin::new("order-1", "charge").with_scope("a".to_owned());
    let key = derived(origin()).await;
    assert_eq!(
        key,
        derived(origin()).await,
        "another process derives the same key after a crash"
    );
    assert!(!key.contains("order-1"));
    for other in [
        KeyOrigin::new("order-1", "charge"),
        KeyOrigin::new("order-1", "charge").with_scope("b".to_owned()),
        KeyOrigin::new("order-2", "charge").with_scope("a".to_owned()),
        KeyOrigin::new("order-1", "refund").with_scope("a".to_owned()),
        KeyOrigin::new("order-1c", "harge").with_scope("a".to_owned()),
    ] {
        assert_ne!(key, derived(other).await);
    }
    let other_secret = KeyDeriver::new(&[8; 32]).unwrap();
    assert_ne!(key, other_secret.derive(&origin()));

    let layer = IdempotencyKeyLayer::new(ProviderProfile::stripe()).with_generator(KeyGenerator::derived(keys()));
    let (sent, ended) = send(&layer, [post()]).await;
    assert!(
        sent.lock().unwrap().is_empty() && matches!(&ended[0], Err(KeyPlacementError::Generator(_))),
        "{ended:?}"
    );
    assert_eq!(KeyDeriver::new(&[7; 15]).unwrap_err().kind(), ErrorKind::Configuration);
}

/// The expected keys were computed with `hmac` and `uuid` of Python, so other programs can derive
/// the same keys.
#[test]
fn a_derived_key_is_hmac_sha_256_as_documented() {
    let keys = KeyDeriver::new(b"0123456789abcdef0123456789abcdef").unwrap();
    assert_eq!(
        keys.derive(&KeyOrigin::new("order-4711", "charge")),
        "3733eb3b-d38e-8963-afa9-9e92306d9236"
    );
    let scoped = KeyOrigin::new("order-4711", "charge").with_scope(Scope::of(["tenant-7"]));
    assert_eq!(keys.derive(&scoped), "b1ab8298-dc31-8b62-a1f6-19596e25f28e");
    assert_eq!(
        format!("{keys:?} {scoped:?}"),
        "KeyDeriver(..) KeyOrigin { step: \"charge\", .. }"
    );
}

#[tokio::test]
async fn a_key_can_be_put_into_the_body() {
    let layer = IdempotencyKeyLayer::new(ProviderProfile::draft().with_max_len(45))
        .with_generator(KeyGenerator::from_fn(|request| {
            request.headers["x-order"]
                .to_str()
                .map(|order| format!("order-{order}"))
        }))
        .with_body_key(|request: &mut Request<String>, key: &str| {
            let mut body: serde_json::Value = serde_json::from_str(request.body())?;
            body["idempotency_key"] = key.into();
            *request.body_mut() = body.to_string();
            Ok::<_, serde_json::Error>(())
        });
    let mut client = ServiceBuilder::new()
        .layer(layer)
        .service(service_fn(|request: Request<String>| async move {
            assert!(!request.headers().contains_key("idempotency-key"));
            Ok::<_, Infallible>(Response::new(request.into_body()))
        }));
    let mut send = |body: &str| {
        let request = Request::post("/v2/payments")
            .header("x-order", "7")
            .body(body.to_owned())
            .unwrap();
        client.call(request)
    };
    let sent = send(r#"{"amount":1}"#).await.unwrap().into_body();
    assert_eq!(sent, r#"{"amount":1,"idempotency_key":"order-7"}"#);
    assert!(matches!(send("no JSON").await, Err(KeyPlacementError::Generator(_))));
}

/// A key in the body lets the server recognise a retry, as a key in a header field does.
#[tokio::test(start_paused = true)]
async fn a_request_with_its_key_in_the_body_is_retried() {
    let layer = || {
        IdempotencyKeyLayer::new(ProviderProfile::draft()).with_body_key(|request: &mut Request<String>, key: &str| {
            request.body_mut().push_str(key);
            Ok::<_, Infallible>(())
        })
    };
    let sent = Arc::new(Mutex::new(Vec::new()));
    let bodies = Arc::clone(&sent);
    let http = service_fn(move |request: Request<String>| {
        bodies.lock().unwrap().push(request.into_body());
        let mut response = Response::new(());
        *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        ready(Ok::<_, Infallible>(response))
    });
    let policy = RetryPolicy::new(ProviderProfile::draft()).with_max_attempts(3);
    let client = ServiceBuilder::new()
        .layer(layer())
        .layer(CallLayer::new(policy))
        .service(http.clone());
    client
        .oneshot(Request::post("/").body("amount=1&key=".to_owned()).unwrap())
        .await
        .unwrap();
    let sent = sent.lock().unwrap();
    assert!(
        sent.len() == 3 && sent.iter().all(|body| *body == sent[0] && body.len() > 20),
        "{sent:?}"
    );
}

#[tokio::test]
async fn an_invalid_key_is_not_put_into_the_body() {
    let generator = KeyGenerator::from_fn(|_| Ok::<_, Infallible>("line\nbreak".to_owned()));
    let layer = IdempotencyKeyLayer::new(ProviderProfile::draft())
        .with_generator(generator)
        .with_body_key(|_: &mut Request<String>, _: &str| Ok::<_, Infallible>(()));
    let http = service_fn(|_: Request<String>| ready(Ok::<_, Infallible>(Response::new(()))));
    let sent = layer
        .layer(http)
        .oneshot(Request::post("/").body(String::new()).unwrap())
        .await;
    assert!(sent.is_err());
}

#[cfg(feature = "follow-redirect")]
mod redirects {
    use super::*;
    use http::StatusCode;
    use http::header::LOCATION;
    use tower_http::follow_redirect::FollowRedirectLayer;
    use tower_http::follow_redirect::policy::{Limited, PolicyExt, clone_body_fn};
    use tower_idempotency::client::SameOriginKey;

    async fn follow(places: &'static [&'static str], has_policy: bool) -> Vec<(String, Option<String>)> {
        follow_with(&Method::POST, &[307, 308], places, has_policy).await
    }

    /// Follows redirects from `/0` to these places with these statuses in order. Returns the URL
    /// and the key of each request that arrived.
    async fn follow_with(
        method: &Method,
        statuses: &'static [u16],
        places: &'static [&'static str],
        has_policy: bool,
    ) -> Vec<(String, Option<String>)> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let arrived = Arc::clone(&seen);
        let server = service_fn(move |request: Request<String>| {
            let mut arrived = arrived.lock().unwrap();
            let key = request.headers().get("idempotency-key");
            arrived.push((
                request.uri().to_string(),
                key.map(|key| key.to_str().unwrap().to_owned()),
            ));
            let mut response = Response::new(String::new());
            if let Some(place) = places.get(arrived.len() - 1) {
                let status = statuses[(arrived.len() - 1) % statuses.len()];
                *response.status_mut() = StatusCode::from_u16(status).unwrap();
                response.headers_mut().insert(LOCATION, place.parse().unwrap());
            }
            async { Ok::<_, Infallible>(response) }
        });
        let body = clone_body_fn(|body: &String| Some(body.clone()));
        let profile = ProviderProfile::stripe();
        let limited = Limited::new(9).and::<_, String, ()>(body);
        let keys = IdempotencyKeyLayer::new(profile.clone()).with_methods([method.clone()]);
        let request = Request::builder()
            .method(method)
            .uri("http://bank.example/0")
            .body("amount=1".to_owned())
            .unwrap();
        if has_policy {
            let policy = limited.and::<_, String, ()>(SameOriginKey::new(&profile));
            let redirects = FollowRedirectLayer::with_policy(policy);
            let client = ServiceBuilder::new().layer(keys).layer(redirects).service(server);
            client.oneshot(request).await.unwrap();
        } else {
            let redirects = FollowRedirectLayer::with_policy(limited);
            let client = ServiceBuilder::new().layer(keys).layer(redirects).service(server);
            client.oneshot(request).await.unwrap();
        }
        let seen = seen.lock().unwrap();
        seen.clone()
    }

    #[tokio::test]
    async fn every_hop_within_an_origin_carries_the_same_key() {
        let hops = follow(&["/1", "http://BANK.example:80/2"], true).await;
        assert_eq!(hops.len(), 3);
        assert!(
            hops[0].1.is_some() && hops.iter().all(|hop| hop.1 == hops[0].1),
            "{hops:?}"
        );
    }

    /// Each list begins with a redirect to another origin and goes on from there.
    const ELSEWHERE: [&[&str]; 3] = [
        &["https://bank.example/1", "https://bank.example/2"],
        &["http://thief.example/1", "http://bank.example/back"],
        &["http://bank.example:8080/1", "/2"],
    ];

    #[tokio::test]
    async fn an_unsafe_request_does_not_leave_its_origin() {
        for method in [Method::POST, Method::PATCH, Method::PUT, Method::DELETE] {
            for elsewhere in ELSEWHERE {
                let hops = follow_with(&method, &[307, 308], elsewhere, true).await;
                assert_eq!(hops.len(), 1, "{method}: {hops:?}");
            }
        }
        let hops = follow(&["http://partner.example/1"], false).await;
        assert!(
            hops[1].1.is_some(),
            "without the policy, the client sends the request and its key to another origin: {hops:?}"
        );
    }

    #[tokio::test]
    async fn a_safe_request_leaves_its_origin_without_its_key() {
        for elsewhere in ELSEWHERE {
            let hops = follow_with(&Method::GET, &[307, 308], elsewhere, true).await;
            let keys: Vec<bool> = hops.iter().map(|hop| hop.1.is_some()).collect();
            assert_eq!(keys, [true, false, false], "{hops:?}");
        }
    }

    #[tokio::test]
    async fn an_unsafe_request_is_not_followed_by_another_request() {
        for status in [&[301][..], &[302], &[303]] {
            for method in [Method::POST, Method::PATCH, Method::PUT, Method::DELETE] {
                let hops = follow_with(&method, status, &["/1"], true).await;
                assert_eq!(hops.len(), 1, "{method} {status:?}: {hops:?}");
            }
            let hops = follow_with(&Method::GET, status, &["/1"], true).await;
            assert_eq!(hops.len(), 2, "{status:?}: {hops:?}");
        }
    }
}

#[tokio::test]
async fn a_request_without_room_for_its_key_is_not_sent() {
    let mut full = post();
    let headers = full.headers_mut();
    let name = |n: usize| HeaderName::from_bytes(format!("x-{n}").as_bytes()).unwrap();
    while headers.try_insert(name(headers.len()), "1".parse().unwrap()).is_ok() {}
    let (sent, ended) = send(&IdempotencyKeyLayer::new(ProviderProfile::stripe()), [full]).await;
    assert!(sent.lock().unwrap().is_empty());
    assert!(ended[0].is_err());
}
