//! One order at a third party that knows nothing of keys, but can be asked what it has.
//!
//! ```text
//! cargo run --features axum,reqwest --example client_existence_check
//! ```
//!
//! `OnceLayer` records the answer of every call in a store that survives the process (that of `custom_store`; in production Redis or
//! PostgreSQL). Where the caller died before there was an answer, the next one asks: if the order is found, it is recorded and given; if
//! not, it is made. The caller runs in a process of its own, which is killed when the order was taken and not yet answered, or when the
//! request was sent and not yet taken. Another process takes over, and there is one order.
//!
//! # Where the window remains
//!
//! A request of a dead caller may still be under way while the next one asks. It arrives *after* the third party has truly said "no
//! such order", and there are two. `with_settle_delay` waits before it asks and so narrows this window; what shuts it is a third party that
//! can be told not to take the old request any more, by its `Attempt::fence`, before it is asked.

#[expect(dead_code, unreachable_pub, reason = "only the store of that example is needed here")]
mod custom_store;
mod third_party;

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::Router;
use custom_store::DirectoryStore;
use http::{Request, Response};
use third_party::{Accident, Scratch, ThirdParty};
use tokio::process::Command;
use tower::{ServiceBuilder, ServiceExt};
use tower_idempotency::client::{LostCall, OnceLayer, ProviderProfile, ReqwestService};
use tower_idempotency::Clock;
use tower_idempotency::Recovered;

/// The third party's: the references of its orders. It takes the same reference as often as it comes.
type Orders = Arc<Mutex<Vec<String>>>;

async fn create(State(orders): State<Orders>, Path(reference): Path<String>) -> (StatusCode, String) {
    let mut orders = orders.lock().unwrap_or_else(PoisonError::into_inner);
    orders.push(reference);
    (StatusCode::CREATED, format!("order {}", orders.len()))
}

async fn find(State(orders): State<Orders>, Path(reference): Path<String>) -> Result<String, StatusCode> {
    let orders = orders.lock().unwrap_or_else(PoisonError::into_inner);
    let at = orders.iter().position(|order| *order == reference);
    at.map(|at| format!("order {}", at + 1)).ok_or(StatusCode::NOT_FOUND)
}

/// What became of a lost call. Whatever is neither "found" nor "not found" leaves it unknown.
async fn check(lost: LostCall) -> Recovered<Response<bytes::Bytes>> {
    let found = async {
        let answer = reqwest::Client::new().get(lost.head.uri.to_string()).send().await?;
        Ok::<_, reqwest::Error>((answer.status(), answer.bytes().await?))
    };
    let found = match found.await {
        Ok((StatusCode::OK, order)) => Recovered::Happened(Response::new(order)),
        Ok((StatusCode::NOT_FOUND, _)) => Recovered::NotHappened,
        _ => Recovered::Unknown,
    };
    let answer = match &found {
        Recovered::Happened(_) => "found",
        Recovered::NotHappened => "not found",
        Recovered::Unknown => "nobody knows",
    };
    println!("  attempt {} asks for {}: {answer}", lost.attempt.number(), lost.key);
    found
}

/// The caller.
async fn order(store: DirectoryStore, party: &str, reference: &str) -> Result<(), Box<dyn Error>> {
    let once = OnceLayer::new(store, ProviderProfile::draft())
        // Another process takes over a second after the last sign of life; 30 s is the default.
        .with_lease(Duration::from_secs(1))
        .without_sending_key()
        .with_recovery(check);
    let http = ReqwestService::build(reqwest::Client::builder())?;
    let client = ServiceBuilder::new().layer(once).service(http);

    let request = Request::post(format!("{party}/orders/{reference}")).header("idempotency-key", reference);
    let answer = client.oneshot(request.body(reqwest::Body::from("2 teapots"))?).await?;
    println!("  {reference} is {}", reqwest::Response::from(answer).text().await?);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, party, directory, reference] = &arguments[..] {
        let store = DirectoryStore::open(directory.into(), Clock::system())?;
        return order(store, party, reference).await;
    }

    let orders = Orders::default();
    let app = Router::new().route("/orders/{reference}", get(find).post(create));
    let party = ThirdParty::serve(app.with_state(Arc::clone(&orders))).await?;
    let directory = Scratch::new("existence-check")?;
    for (reference, accident, story) in [
        (
            "taken",
            Accident::AnswerStuck,
            "a process that is killed when its order was taken:",
        ),
        (
            "not-taken",
            Accident::RequestStuck,
            "one that is killed before its order was taken:",
        ),
    ] {
        let process = || {
            let mut process = Command::new(&arguments[0]);
            process.arg(party.url("")).arg(directory.path()).arg(reference);
            process
        };
        println!("{story}");
        party.expect([accident]);
        party.crash(&mut process()).await?;
        assert!(process().status().await?.success());
    }

    let orders = orders.lock().unwrap_or_else(PoisonError::into_inner);
    println!("the third party has {orders:?}");
    assert_eq!(*orders, ["taken", "not-taken"], "one order for each reference");
    println!("a request that arrives after the check would be one more: see the head of this file");
    Ok(())
}
