//! A server with one route for each setting, for black-box tests of the layer over HTTP.
//!
//! `LISTEN` sets the address (default: `127.0.0.1:3999`). `STORE` sets the store: `memory`
//! (default), `redis` at `REDIS_URL`, or `postgres` at `DATABASE_URL`. The last two need the
//! feature of the same name.
//!
//! Every route accepts any method and any further path segments, and runs the same handler. The
//! handler obeys the `x-test-*` headers of the request. `GET /executions?tag=T` returns how often
//! the handler started and finished under a tag.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, get};
use axum::{Json, Router};
use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tower_idempotency::{
    BoxStore, CanonicalJson, DoNotStore, IdempotencyLayer, KeySyntax, OnError, Scope, StoreOutcomeOnly, StoreResponse,
};

#[derive(Clone, Default)]
struct Counters(Arc<Mutex<HashMap<String, Count>>>);

#[derive(Clone, Copy, Default, Serialize)]
struct Count {
    started: u64,
    finished: u64,
}

impl Counters {
    fn change<R>(&self, tag: &str, change: impl FnOnce(&mut Count) -> R) -> R {
        change(self.0.lock().unwrap().entry(tag.to_owned()).or_default())
    }
}

#[derive(Deserialize)]
struct Tagged {
    tag: String,
}

async fn executions(State(counters): State<Counters>, Query(Tagged { tag }): Query<Tagged>) -> Json<Count> {
    Json(counters.change(&tag, |count| *count))
}

fn control<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn number<N: std::str::FromStr>(headers: &HeaderMap, name: &str) -> Option<N> {
    control(headers, name)?.parse().ok()
}

async fn handler(State(counters): State<Counters>, headers: HeaderMap, _body: Bytes) -> Response {
    let tag = control(&headers, "x-test-tag").unwrap_or_default().to_owned();
    let n = counters.change(&tag, |count| {
        count.started += 1;
        count.started
    });
    tokio::time::sleep(Duration::from_millis(number(&headers, "x-test-delay-ms").unwrap_or(0))).await;
    assert!(
        !headers.contains_key("x-test-panic"),
        "the request asked for a panic by `x-test-panic`"
    );

    let mut response = body(&tag, n, &headers);
    let status = number::<u16>(&headers, "x-test-status").and_then(|status| StatusCode::from_u16(status).ok());
    *response.status_mut() = status.unwrap_or(StatusCode::OK);
    decorate(&mut response, n, &headers);
    counters.change(&tag, |count| count.finished += 1);
    response
}

fn body(tag: &str, n: u64, headers: &HeaderMap) -> Response {
    let bytes = [(header::CONTENT_TYPE, "application/octet-stream")];
    let text = [(header::CONTENT_TYPE, "text/plain")];
    match control(headers, "x-test-kind").unwrap_or("json") {
        "bin" => (bytes, Bytes::from_static(b"\x00\xff\xfe\x80\r\n")).into_response(),
        "big" => (bytes, vec![b'b'; number(headers, "x-test-size").unwrap_or(0)]).into_response(),
        "empty" => Body::empty().into_response(),
        "stream" => (text, chunks()).into_response(),
        "ndjson" => ([(header::CONTENT_TYPE, "application/x-ndjson")], lines()).into_response(),
        "slow-text" => (text, lines()).into_response(),
        "stall" => (text, stalled()).into_response(),
        _ => Json(serde_json::json!({ "tag": tag, "n": n })).into_response(),
    }
}

/// Ten chunks of 1,000 bytes, 20 ms apart.
fn chunks() -> Body {
    Body::from_stream(stream::unfold(0_u8, |sent| async move {
        if sent == 10 {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        Some((Ok::<_, Infallible>(Bytes::from(vec![b'0' + sent; 1000])), sent + 1))
    }))
}

/// Four lines of JSON, 500 ms apart. The first line comes at once.
fn lines() -> Body {
    Body::from_stream(stream::unfold(0_u8, |sent| async move {
        if sent == 4 {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(if sent == 0 { 0 } else { 500 })).await;
        Some((Ok::<_, Infallible>(format!("{{\"line\":{sent}}}\n")), sent + 1))
    }))
}

/// Ten bytes, and then neither further bytes nor an end.
fn stalled() -> Body {
    let first = stream::once(async { Ok::<_, Infallible>("0123456789") });
    Body::from_stream(first.chain(stream::pending()))
}

fn decorate(response: &mut Response, n: u64, asked: &HeaderMap) {
    match control(asked, "x-test-keep") {
        Some("yes") => drop(response.extensions_mut().insert(StoreResponse)),
        Some("no") => drop(response.extensions_mut().insert(DoNotStore)),
        Some("outcome") => drop(response.extensions_mut().insert(StoreOutcomeOnly)),
        _ => {}
    }
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, format!("/things/{n}").parse().unwrap());
    headers.insert("x-foo", HeaderValue::from(n));
    headers.append(header::LINK, HeaderValue::from_static("</a>; rel=\"a\""));
    headers.append(header::LINK, HeaderValue::from_static("</b>; rel=\"b\""));
    if asked.contains_key("x-test-no-store") {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if asked.contains_key("x-test-set-cookie") {
        headers.insert(header::SET_COOKIE, format!("sid={n}").parse().unwrap());
    }
    if let Some(coding) = asked.get("x-test-transfer-encoding") {
        headers.insert(header::TRANSFER_ENCODING, coding.clone());
    }
    if asked.contains_key("x-test-exchange-fields") {
        headers.insert("x-request-id", HeaderValue::from(n));
        headers.insert("ratelimit", HeaderValue::from_static("\"default\";r=50;t=30"));
        headers.insert("x-ratelimit-remaining", HeaderValue::from_static("50"));
        headers.insert("authentication-info", HeaderValue::from_static("nextnonce=\"1\""));
        headers.insert("clear-site-data", HeaderValue::from_static("\"cache\""));
        let parent = HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        headers.insert("traceparent", parent);
    }
    if asked.contains_key("x-test-latin1") {
        headers.insert("x-latin1", HeaderValue::from_bytes(b"caf\xe9").unwrap());
    }
}

fn app(store: BoxStore) -> Router {
    let layer = IdempotencyLayer::new(store);
    let json = CanonicalJson::new().leave_out("/sent_at").unwrap();
    let put = [Method::POST, Method::PATCH, Method::PUT, Method::DELETE];
    let tenant =
        |head: &http::request::Parts| Scope::from(head.headers.get("x-tenant").map_or(&b""[..], HeaderValue::as_bytes));
    let routes = [
        ("/default", layer.clone()),
        ("/put", layer.clone().with_methods(put)),
        ("/required", layer.clone().require_key()),
        ("/strict", layer.clone().with_key_syntax(KeySyntax::Strict)),
        ("/conflict", layer.clone().with_wait(Duration::ZERO)),
        ("/wait-short", layer.clone().with_wait(Duration::from_millis(300))),
        ("/scoped", layer.clone().with_scope(tenant)),
        ("/keep-all", layer.clone().on_error(OnError::Store).store_if(|_| true)),
        (
            "/success-only",
            layer.clone().store_if(|response| response.status.is_success()),
        ),
        ("/json", layer.clone().with_json_fingerprint(json)),
        ("/short", layer.clone().with_retention(Duration::from_secs(1))),
        ("/small", layer.clone().with_body_limit(1024).with_response_limit(1024)),
        ("/stripe", layer.clone().stripe()),
        (
            "/impatient",
            layer.clone().with_response_timeout(Duration::from_millis(500)),
        ),
    ];
    let mut app = Router::new().route("/executions", get(executions));
    for (path, layer) in routes {
        let route: MethodRouter<Counters> = any(handler).layer(layer);
        app = app
            .route(path, route.clone())
            .route(&format!("{path}/{{*rest}}"), route);
    }
    let nested = Router::new().route("/create", any(handler)).layer(layer);
    app.nest("/nest-a", nested.clone())
        .nest("/nest-b", nested)
        .with_state(Counters::default())
}

#[tokio::main]
async fn main() {
    let url = match std::env::var("STORE").as_deref() {
        Ok("memory") | Err(_) => "memory:".to_owned(),
        Ok("redis") => std::env::var("REDIS_URL").expect("STORE=redis needs REDIS_URL"),
        Ok("postgres") => std::env::var("DATABASE_URL").expect("STORE=postgres needs DATABASE_URL"),
        Ok(other) => panic!("STORE={other} is unknown; use memory, redis or postgres"),
    };
    let store = BoxStore::from_url(&url)
        .await
        .expect("the store is reachable and set up");
    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3999".to_owned());
    let listener = tokio::net::TcpListener::bind(&address).await.unwrap();
    println!("listening on {}", listener.local_addr().unwrap());
    axum::serve(listener, app(store)).await.unwrap();
}
