//! The layer in an axum app with its default settings, over a real server where the connection
//! matters.

mod cut_off;
mod framing;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::error_handling::HandleErrorLayer;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Extension, Json, Router};
use http_body_util::{BodyExt, Full};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::{BoxError, ServiceBuilder, ServiceExt};
use tower_idempotency::client::{OnceLayer, ProviderProfile};
use tower_idempotency::{
    AttemptNumber, CanonicalJson, DoNotStore, IdempotencyKey, IdempotencyLayer, Lease, LeaseRejection, MemoryStore,
    OnError, Scope, StoreResponse,
};

/// A response whose body has been read.
#[derive(Clone, Debug)]
struct Got {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Got {
    fn is_replay(&self) -> bool {
        self.headers
            .get("idempotent-replayed")
            .is_some_and(|marker| marker == "true")
    }
}

async fn send(app: &Router, request: Request<Body>) -> Got {
    let (head, body) = app.clone().oneshot(request).await.unwrap().into_parts();
    Got {
        status: head.status.as_u16(),
        headers: head.headers,
        body: body.collect().await.unwrap().to_bytes(),
    }
}

fn request(method: Method, uri: &str, headers: &[(&str, &str)], body: &'static str) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Body::from(body)).unwrap()
}

async fn pay(app: &Router, uri: &str, headers: &[(&str, &str)], body: &'static str) -> Got {
    send(app, request(Method::POST, uri, headers, body)).await
}

const KEY: (&str, &str) = ("idempotency-key", "k");

/// Counts the runs of the handler. Each response has the number of its run in a header field and in
/// its body.
#[derive(Clone, Default)]
struct Runs(Arc<AtomicUsize>);

impl Runs {
    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

async fn handler(State(runs): State<Runs>, headers: HeaderMap, body: Bytes) -> Response {
    let n = runs.0.fetch_add(1, Ordering::SeqCst) + 1;
    let status = headers
        .get("x-status")
        .map_or(201, |status| status.to_str().unwrap().parse().unwrap());
    let fields = [
        (header::LOCATION, format!("/payments/{n}")),
        (header::SET_COOKIE, format!("sid={n}")),
    ];
    let mut response = (
        StatusCode::from_u16(status).unwrap(),
        fields,
        format!("{n}: {} bytes", body.len()),
    )
        .into_response();
    match headers.get("x-store").map(HeaderValue::as_bytes) {
        Some(b"yes") => drop(response.extensions_mut().insert(StoreResponse)),
        Some(b"no") => drop(response.extensions_mut().insert(DoNotStore)),
        _ => {}
    }
    response
}

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new())
}

fn app(layer: IdempotencyLayer<MemoryStore>) -> (Router, Runs) {
    let runs = Runs::default();
    let app = Router::new()
        .route("/{*path}", any(handler))
        .layer(layer)
        .with_state(runs.clone());
    (app, runs)
}

#[tokio::test]
async fn a_replay_has_the_same_status_bytes_and_headers_but_no_cookie() {
    let (app, runs) = app(layer());
    let first = pay(&app, "/pay", &[KEY], "x").await;
    let again = pay(&app, "/pay", &[KEY], "x").await;
    assert_eq!((first.status, first.is_replay(), again.is_replay()), (201, false, true));
    assert_eq!((again.status, &again.body), (first.status, &first.body));
    assert_eq!(again.headers["location"], first.headers["location"]);
    assert_eq!(again.headers.get_all("content-length").iter().count(), 1);
    assert!(first.headers.contains_key("set-cookie") && !again.headers.contains_key("set-cookie"));
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn post_and_patch_with_a_key_are_covered_and_all_other_requests_pass() {
    let (app, runs) = app(layer());
    for (method, new_runs) in [
        (Method::POST, 1),
        (Method::PATCH, 1),
        (Method::PUT, 2),
        (Method::DELETE, 2),
        (Method::GET, 2),
    ] {
        let before = runs.count();
        let key = format!("key-{method}");
        for _ in 0..2 {
            send(&app, request(method.clone(), "/pay", &[("idempotency-key", &key)], "")).await;
        }
        assert_eq!(runs.count() - before, new_runs, "{method}");
    }
    let before = runs.count();
    pay(&app, "/pay", &[], "x").await;
    pay(&app, "/pay", &[], "x").await;
    assert_eq!(runs.count() - before, 2);
}

#[tokio::test]
async fn quoted_and_bare_keys_are_equal_and_case_matters() {
    let (app, runs) = app(layer());
    for key in ["abc", "\"abc\"", "\"abc\";v=1", "q83vEjRWeJA+/w==", "urn:uuid:1", "ABC"] {
        pay(&app, "/pay", &[("idempotency-key", key)], "x").await;
    }
    assert_eq!(runs.count(), 4);
}

#[tokio::test]
async fn another_method_path_query_body_or_authorization_is_a_mismatch() {
    let (app, runs) = app(layer());
    let alice = ("authorization", "Bearer alice");
    let first = pay(&app, "/pay?x=1", &[KEY, alice], "x").await;
    let others = [
        request(Method::PATCH, "/pay?x=1", &[KEY, alice], "x"),
        request(Method::POST, "/refund?x=1", &[KEY, alice], "x"),
        request(Method::POST, "/pay?x=2", &[KEY, alice], "x"),
        request(Method::POST, "/pay?x=1", &[KEY, alice], "y"),
        request(
            Method::POST,
            "/pay?x=1",
            &[KEY, ("authorization", "Bearer mallory")],
            "x",
        ),
        request(Method::POST, "/pay?x=1", &[KEY], "x"),
    ];
    for other in others {
        assert_eq!(send(&app, other).await.status, 422);
    }
    let trace = ("traceparent", "00-2");
    let again = pay(&app, "/pay?x=1", &[KEY, alice, trace], "x").await;
    assert_eq!((again.is_replay(), again.body, runs.count()), (true, first.body, 1));
}

#[tokio::test]
async fn nested_routers_with_the_same_inner_path_do_not_share_a_response() {
    let runs = Runs::default();
    let nested = Router::new().route("/create", post(handler)).layer(layer());
    let app = Router::new()
        .nest("/a", nested.clone())
        .nest("/b", nested)
        .with_state(runs.clone());
    assert_eq!(pay(&app, "/a/create", &[KEY], "x").await.status, 201);
    assert_eq!(pay(&app, "/b/create", &[KEY], "x").await.status, 422);
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn scopes_are_separate_and_a_renewed_token_still_gets_the_replay() {
    let tenant = |head: &http::request::Parts| Scope::from(head.headers["x-tenant"].as_bytes());
    let (app, runs) = app(layer().with_scope(tenant));
    for tenant in ["alice", "bob"] {
        for token in ["old", "new"] {
            pay(
                &app,
                "/pay",
                &[KEY, ("x-tenant", tenant), ("authorization", token)],
                "x",
            )
            .await;
        }
    }
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn a_request_without_its_required_scope_is_refused() {
    let tenant = |head: &http::request::Parts| Some(Scope::from(head.headers.get("x-tenant")?.as_bytes()));
    let (app, runs) = app(layer().with_scope(tenant));
    let refused = pay(&app, "/pay", &[KEY], "x").await;
    let document: serde_json::Value = serde_json::from_slice(&refused.body).unwrap();
    assert_eq!((refused.status, &document["code"]), (500, &"scope-missing".into()));
    assert_eq!(pay(&app, "/pay", &[KEY, ("x-tenant", "alice")], "x").await.status, 201);
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_response_is_stored_by_its_status_unless_the_handler_marks_it() {
    for (status, stored) in [
        ("200", true),
        ("302", true),
        ("400", true),
        ("409", true),
        ("410", true),
        ("413", true),
        ("422", true),
        ("401", false),
        ("403", false),
        ("404", false),
        ("405", false),
        ("406", false),
        ("407", false),
        ("408", false),
        ("412", false),
        ("415", false),
        ("417", false),
        ("421", false),
        ("425", false),
        ("426", false),
        ("428", false),
        ("429", false),
        ("431", false),
        ("500", false),
        ("503", false),
    ] {
        let (app, runs) = app(layer());
        for _ in 0..2 {
            pay(&app, "/pay", &[KEY, ("x-status", status)], "x").await;
        }
        assert_eq!(runs.count(), if stored { 1 } else { 2 }, "{status}");
    }
    for (mark, status, runs_wanted) in [("no", "200", 2), ("yes", "500", 1)] {
        let (app, runs) = app(layer());
        for _ in 0..2 {
            pay(&app, "/pay", &[KEY, ("x-status", status), ("x-store", mark)], "x").await;
        }
        assert_eq!(runs.count(), runs_wanted, "{mark}");
    }
}

#[tokio::test]
async fn canonical_json_ignores_order_space_and_excluded_members() {
    let json = CanonicalJson::new().leave_out("/sent_at").unwrap();
    let (app, runs) = app(layer().with_json_fingerprint(json));
    let first = pay(&app, "/pay", &[KEY], r#"{"a":1,"b":[1,2],"sent_at":"10:00"}"#).await;
    let again = pay(&app, "/pay", &[KEY], r#"{ "sent_at": "10:01", "b": [1, 2], "a": 1.0 }"#).await;
    assert_eq!((again.is_replay(), again.body), (true, first.body));
    assert_eq!(pay(&app, "/pay", &[KEY], r#"{"a":1,"b":[2,1]}"#).await.status, 422);
    assert_eq!(
        pay(&app, "/pay", &[KEY], r#"{"a":1,"a":1,"b":[1,2]}"#).await.status,
        422
    );
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn added_headers_and_a_custom_function_change_the_fingerprint() {
    let (one, _) = app(layer().add_fingerprint_header("x-currency".parse().unwrap()));
    assert_eq!(pay(&one, "/pay", &[KEY, ("x-currency", "EUR")], "x").await.status, 201);
    assert_eq!(pay(&one, "/pay", &[KEY, ("x-currency", "USD")], "x").await.status, 422);
    let (two, _) = app(layer().with_fingerprint(|_, body| body[..1].to_vec()));
    pay(&two, "/pay", &[KEY], "xa").await;
    assert!(pay(&two, "/pay", &[KEY], "xb").await.is_replay());
    assert_eq!(pay(&two, "/pay", &[KEY], "yb").await.status, 422);
    let (three, _) = app(layer().dangerously_without_fingerprint());
    pay(&three, "/pay", &[KEY], "x").await;
    assert!(pay(&three, "/other", &[KEY], "y").await.is_replay());
}

#[tokio::test]
async fn the_presets_behave_like_their_models() {
    let (stripe, runs) = app(layer().stripe());
    let first = pay(&stripe, "/pay", &[KEY, ("x-status", "500")], "x").await;
    let again = pay(&stripe, "/pay", &[KEY, ("x-status", "500")], "x").await;
    assert_eq!((again.is_replay(), again.body, runs.count()), (true, first.body, 1));
    let mismatch = pay(&stripe, "/pay", &[KEY], "y").await;
    let document: serde_json::Value = serde_json::from_slice(&mismatch.body).unwrap();
    assert_eq!(
        (mismatch.status, &document["error"]["type"]),
        (400, &"idempotency_error".into())
    );

    let (ietf, runs) = app(layer().ietf());
    assert_eq!(pay(&ietf, "/pay", &[], "x").await.status, 400);
    assert_eq!(pay(&ietf, "/pay", &[KEY], "x").await.status, 400);
    assert_eq!(
        pay(&ietf, "/pay", &[("idempotency-key", "\"k\"")], "x").await.status,
        201
    );
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn another_header_marker_and_namespace_can_be_set() {
    let marker = Some(("x-replayed".parse().unwrap(), HeaderValue::from_static("1")));
    let own = layer()
        .with_header("x-request-key".parse().unwrap())
        .with_replay_header(marker)
        .with_namespace("billing");
    let (app, runs) = app(own);
    for _ in 0..2 {
        pay(
            &app,
            "/pay",
            &[("x-request-key", "k"), ("idempotency-key", "not used")],
            "x",
        )
        .await;
    }
    let again = pay(&app, "/pay", &[("x-request-key", "k")], "x").await;
    assert_eq!(
        (&again.headers["x-replayed"], runs.count()),
        (&HeaderValue::from_static("1"), 1)
    );
    assert!(!again.is_replay());
}

#[tokio::test]
async fn each_route_can_have_settings_of_its_own() {
    let runs = Runs::default();
    let base = layer();
    let by_route = Router::new()
        .route("/strict", post(handler).layer(base.clone().require_key()))
        .route("/lax", post(handler).layer(base.clone()))
        .with_state(runs.clone());
    assert_eq!(pay(&by_route, "/strict", &[], "x").await.status, 400);
    assert_eq!(pay(&by_route, "/lax", &[], "x").await.status, 201);

    let strict = base.clone().require_key().settings();
    let lax = base.clone().settings();
    let selected = base.with_settings_for(move |head| match head.uri.path() {
        "/strict" => Some(strict.clone()),
        "/open" => None,
        _ => Some(lax.clone()),
    });
    let (app, runs) = app(selected);
    assert_eq!(pay(&app, "/strict", &[], "x").await.status, 400);
    for path in ["/open", "/lax"] {
        let before = runs.count();
        for _ in 0..2 {
            pay(&app, path, &[("idempotency-key", "selected")], "x").await;
        }
        assert_eq!(runs.count() - before, if path == "/open" { 2 } else { 1 }, "{path}");
    }
}

#[tokio::test]
async fn extractors_return_the_key_and_the_attempt_or_reject_the_request() {
    async fn shows(
        key: Option<IdempotencyKey>,
        lease: Option<Lease>,
        attempt: Option<AttemptNumber>,
    ) -> Json<serde_json::Value> {
        Json(serde_json::json!({
            "key": key.as_ref().map(IdempotencyKey::as_str),
            "fenced": lease.is_some_and(|lease| lease.fence().as_u64() > 0 && lease.is_held()),
            "first": attempt.map(AttemptNumber::is_first),
        }))
    }
    async fn needs(_: Lease, _: AttemptNumber, _: IdempotencyKey) {}

    let app = Router::new()
        .route("/shows", post(shows))
        .route("/needs", post(needs))
        .layer(layer());
    let with = pay(&app, "/shows", &[("idempotency-key", "\"shown\"")], "").await;
    assert_eq!(with.body, r#"{"fenced":true,"first":true,"key":"shown"}"#);
    assert_eq!(
        pay(&app, "/shows", &[], "").await.body,
        r#"{"fenced":false,"first":null,"key":null}"#
    );
    assert_eq!(pay(&app, "/needs", &[KEY], "").await.status, 200);
    let put = Router::new().route("/needs", any(needs)).layer(layer());
    assert_eq!(send(&put, request(Method::PUT, "/needs", &[KEY], "")).await.status, 500);
    let missing = pay(&app, "/needs", &[], "").await;
    assert_eq!(
        (missing.status, &missing.headers["content-type"]),
        (400, &"application/problem+json".parse().unwrap())
    );
}

/// The rejection looked for `Idempotency-Key` even if the layer used another header field.
#[tokio::test]
async fn an_extractor_without_a_lease_looks_for_the_key_where_the_layer_does() {
    async fn needs(_: Lease) {}

    let layer = layer().with_header(header::HeaderName::from_static("x-request-key"));
    let settings = layer.settings();
    let selecting = layer.clone().with_settings_for(move |_| Some(settings.clone()));
    for layer in [layer, selecting] {
        let app = Router::new().route("/needs", any(needs)).layer(layer);
        let (ours, usual) = (("x-request-key", "k"), ("idempotency-key", "k"));
        assert_eq!(pay(&app, "/needs", &[ours], "").await.status, 200);
        assert_eq!(pay(&app, "/needs", &[], "").await.status, 400);
        assert_eq!(pay(&app, "/needs", &[usual], "").await.status, 400);
        for (key, status) in [(ours, 500), (usual, 400)] {
            let put = request(Method::PUT, "/needs", &[key], "");
            let refused = send(&app, put).await;
            assert_eq!(refused.status, status, "{key:?}");
            // The rejection also named `Idempotency-Key` for any other field.
            let body = std::str::from_utf8(&refused.body).unwrap();
            assert_eq!(body.contains("x-request-key is missing"), status == 400, "{body}");
            assert!(!body.contains("Idempotency-Key"), "{body}");
        }
    }
}

#[tokio::test]
async fn a_handler_can_show_why_there_is_no_lease() {
    async fn shows(lease: Result<Lease, LeaseRejection>) -> String {
        lease.map_or_else(|rejection| rejection.to_string(), |_| "guarded".to_owned())
    }

    let app = Router::new().route("/shows", any(shows)).layer(layer());
    assert_eq!(pay(&app, "/shows", &[KEY], "").await.body, "guarded");
    let missing = pay(&app, "/shows", &[], "").await.body;
    assert_eq!(
        missing,
        "the request has no idempotency key in the header field Idempotency-Key"
    );
    let not_covered = send(&app, request(Method::PUT, "/shows", &[KEY], "")).await.body;
    assert_eq!(not_covered, "the route or method is not covered by an IdempotencyLayer");
}

/// Services in axum have no errors. A `HandleErrorLayer` turns an error into a response, and the
/// layer judges that response.
#[tokio::test(start_paused = true)]
async fn a_marked_response_of_a_load_shedder_behind_an_error_handler_frees_the_key() {
    async fn slow() {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    async fn rejected(_: BoxError) -> impl IntoResponse {
        (StatusCode::SERVICE_UNAVAILABLE, Extension(DoNotStore), "busy")
    }

    for on_error in [OnError::Store, OnError::Release, OnError::Unknown] {
        let inside = ServiceBuilder::new()
            .layer(layer().on_error(on_error))
            .layer(HandleErrorLayer::new(rejected))
            .load_shed()
            .concurrency_limit(1);
        // Without a state, axum applies the layers again for each request, so each request would
        // have its own limit.
        let app: Router = Router::new().route("/", post(slow).layer(inside)).with_state(());
        let (one, two) = ([("idempotency-key", "one")], [("idempotency-key", "two")]);
        let (first, second) = tokio::join!(pay(&app, "/", &one, ""), pay(&app, "/", &two, ""));
        let shed = if first.status == 503 { one } else { two };
        assert_eq!(first.status + second.status, 200 + 503, "{on_error:?}");
        let again = pay(&app, "/", &shed, "").await;
        assert_eq!((again.status, again.is_replay()), (200, false), "{on_error:?}");
    }
}

#[tokio::test]
async fn extensions_in_a_response_tuple_reach_the_layer() {
    let runs = Runs::default();
    let vetoed = |State(runs): State<Runs>| async move {
        let n = runs.0.fetch_add(1, Ordering::SeqCst);
        (Extension(DoNotStore), format!("{n}"))
    };
    let app = Router::new()
        .route("/", post(vetoed))
        .layer(layer())
        .with_state(runs.clone());
    pay(&app, "/", &[KEY], "").await;
    pay(&app, "/", &[KEY], "").await;
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn the_layer_works_inside_cors_and_compression_as_documented() {
    use tower_http::compression::CompressionLayer;
    use tower_http::cors::CorsLayer;

    let runs = Runs::default();
    let long = |State(runs): State<Runs>| async move {
        format!("{} {}", runs.0.fetch_add(1, Ordering::SeqCst), "x".repeat(1_000))
    };
    let app = Router::new()
        .route("/", post(long))
        .layer(layer())
        .layer(CompressionLayer::new())
        .layer(CorsLayer::very_permissive())
        .with_state(runs.clone());
    let cross = [KEY, ("origin", "https://a.example"), ("accept-encoding", "gzip")];
    let first = pay(&app, "/", &cross, "").await;
    let other = [KEY, ("origin", "https://b.example")];
    let again = pay(&app, "/", &other, "").await;
    assert_eq!(
        (
            &first.headers["content-encoding"],
            again.headers.get("content-encoding")
        ),
        (&"gzip".parse().unwrap(), None)
    );
    assert_eq!(again.headers["access-control-allow-origin"], "https://b.example");
    assert_eq!((again.body.len(), again.is_replay(), runs.count()), (1_002, true, 1));
}

// --- over a connection -------------------------------------------------------------------------------------------

async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    address
}

fn wire(path: &str, key: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nidempotency-key: {key}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Reads a response with a declared length from the connection.
async fn read_response(connection: &mut TcpStream) -> (u16, HashMap<String, String>, String) {
    let mut read = Vec::new();
    let head_end = loop {
        if let Some(at) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        assert_ne!(connection.read_buf(&mut read).await.unwrap(), 0, "the connection ended");
    };
    let head = String::from_utf8(read[..head_end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: HashMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let length: usize = headers["content-length"].parse().unwrap();
    while read.len() < head_end + length {
        assert_ne!(connection.read_buf(&mut read).await.unwrap(), 0, "the connection ended");
    }
    (status, headers, String::from_utf8(read[head_end..].to_vec()).unwrap())
}

#[tokio::test]
async fn a_client_that_hangs_up_does_not_stop_the_execution_and_its_retry_gets_the_response() {
    let runs: Arc<Mutex<(usize, usize)>> = Arc::default();
    let slow = {
        let runs = Arc::clone(&runs);
        move || async move {
            runs.lock().unwrap().0 += 1;
            tokio::time::sleep(Duration::from_millis(500)).await;
            runs.lock().unwrap().1 += 1;
            "paid"
        }
    };
    let layer = layer();
    let drain = layer.drain();
    let address = serve(Router::new().route("/pay", post(slow)).layer(layer)).await;
    let mut first = TcpStream::connect(address).await.unwrap();
    first.write_all(wire("/pay", "k", "x").as_bytes()).await.unwrap();
    while runs.lock().unwrap().0 == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(first);
    while drain.running() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut retry = TcpStream::connect(address).await.unwrap();
    retry.write_all(wire("/pay", "k", "x").as_bytes()).await.unwrap();
    let (status, headers, body) = read_response(&mut retry).await;
    assert_eq!(
        (status, &body[..], &headers["idempotent-replayed"][..]),
        (200, "paid", "true")
    );
    drain.wait().await;
    assert_eq!(*runs.lock().unwrap(), (1, 1));
}

#[tokio::test]
async fn a_connection_stays_usable_after_refusals() {
    let (app, runs) = app(layer().require_key().with_body_limit(10));
    let address = serve(app).await;
    let mut connection = TcpStream::connect(address).await.unwrap();
    for (key, body, wanted) in [
        ("\"", "x", 400),
        ("", "x", 400),
        ("k", "x", 201),
        ("k", "y", 422),
        ("k", "x", 201),
    ] {
        connection.write_all(wire("/pay", key, body).as_bytes()).await.unwrap();
        let (status, headers, _) = read_response(&mut connection).await;
        assert_eq!(status, wanted);
        assert_eq!(
            headers.get("connection"),
            None,
            "the server reads small bodies and leaves the connection open"
        );
    }
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_layer_over_the_whole_app_passes_unknown_routes_and_health_checks() {
    let app = Router::new().route("/health", get(|| async { "ok" })).layer(layer());
    assert_eq!(send(&app, request(Method::GET, "/health", &[], "")).await.body, "ok");
    assert_eq!(pay(&app, "/nowhere", &[KEY], "").await.status, 404);
}

/// Forwards each request to `/debit` and to `/credit`, and returns both responses.
async fn forward_twice<S, E>(service: S, request: Request<Body>) -> String
where
    S: tower::Service<Request<Full<Bytes>>, Response = http::Response<Full<Bytes>>, Error = E, Future: Send>
        + Clone
        + Send,
    E: std::fmt::Debug,
{
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let mut responses = Vec::new();
    for path in ["/debit", "/credit"] {
        let mut request = Request::from_parts(head.clone(), Full::new(body.clone()));
        *request.uri_mut() = format!("http://bank.example{path}").parse().unwrap();
        let response = match service.clone().oneshot(request).await {
            Ok(response) => {
                let body = response.into_body().collect().await.unwrap().to_bytes();
                String::from_utf8(body.into()).unwrap()
            }
            Err(error) => format!("{error:?}"),
        };
        responses.push(response);
    }
    responses.join(", ")
}

/// The fingerprint of a forwarded call used the target of the request that the app had received.
/// The second call got the response to the first one.
#[tokio::test]
async fn calls_that_forward_a_request_to_two_targets_do_not_share_a_response() {
    let bank = tower::service_fn(|request: Request<Full<Bytes>>| async move {
        let done = Full::from(request.uri().path().to_owned());
        Ok::<_, std::convert::Infallible>(http::Response::new(done))
    });
    let once = OnceLayer::new(MemoryStore::new(), ProviderProfile::draft());
    let client = ServiceBuilder::new().layer(once).service(bank);
    let handler = move |request: Request<Body>| forward_twice(client, request);
    let app = Router::new().route("/pay", post(handler));
    assert_eq!(pay(&app, "/pay", &[KEY], "x").await.body, "/debit, Mismatch");
}

/// In a nested router, the layer hashed the authority as sent and ignored its setting.
#[tokio::test]
async fn the_authority_setting_applies_in_nested_routers() {
    let nested = |layer: IdempotencyLayer<MemoryStore>| {
        let inner = Router::new().route("/pay", post(handler)).layer(layer);
        Router::new().nest("/api", inner).with_state(Runs::default())
    };
    let same = |a: &'static str, b: &'static str, app: Router| async move {
        let first = pay(&app, a, &[KEY], "x").await;
        let second = pay(&app, b, &[KEY], "x").await;
        assert_eq!(first.status, 201);
        second.status == 201 && second.is_replay()
    };
    let (one, two) = ("http://10.0.0.3/api/pay", "http://10.0.0.7/api/pay");
    assert!(same(one, two, nested(layer())).await, "addresses");
    let (one, two) = ("http://a.example/api/pay", "http://b.example/api/pay");
    assert!(!same(one, two, nested(layer())).await, "names");
    assert!(
        same(one, two, nested(layer().without_authority_in_fingerprint())).await,
        "left out"
    );
    assert!(
        same(one, "http://A.example:80/api/pay", nested(layer())).await,
        "spellings"
    );
}

#[tokio::test]
async fn a_layer_that_gets_a_forwarded_request_compares_the_target_of_that_request() {
    let bank = |uri: http::Uri| async move { uri.path().to_owned() };
    let bank = Router::new().route("/{path}", post(bank)).layer(layer());
    let bank = tower::service_fn(move |request: Request<Full<Bytes>>| {
        let bank = bank.clone();
        async move {
            let (head, body) = bank.oneshot(request.map(Body::new)).await?.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Ok::<_, std::convert::Infallible>(match head.status {
                StatusCode::OK => http::Response::new(Full::new(body)),
                status => http::Response::new(Full::from(status.as_str().to_owned())),
            })
        }
    });
    let handler = move |request: Request<Body>| forward_twice(bank, request);
    let app = Router::new().route("/pay", post(handler));
    assert_eq!(pay(&app, "/pay", &[KEY], "x").await.body, "/debit, 422");
}
