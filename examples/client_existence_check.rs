//! One order at a third party that has no idempotency keys, but can be asked which orders it has.
//!
//! ```text
//! cargo run --features axum,reqwest --example client_existence_check
//! ```
//!
//! `OnceLayer` records the response of every call in a store that survives the process. Here it is
//! the store of the example `custom_store`; use Redis or PostgreSQL in production. If the caller
//! died before it had a response, the next caller asks the third party. If the third party has the
//! order, the layer records it and returns it. Otherwise the layer makes the call.
//!
//! The caller runs in a process of its own. The example kills this process twice: once after the
//! third party took the order but before it responded, and once after the request was sent but
//! before the third party took the order. Each time another process takes over, and there is one
//! order.
//!
//! # The remaining risk
//!
//! A request of a dead caller may still be on its way while the next caller asks. If it arrives
//! *after* the third party correctly said "no such order", there are two orders.
//! `with_settle_delay` waits before it asks, which makes this less likely. Only a third party that
//! accepts a fence excludes it: the check first sends `Attempt::fence`, so that the third party
//! refuses the old request, and then asks.

#[expect(
    dead_code,
    unreachable_pub,
    reason = "this example needs only the store of the other one"
)]
mod custom_store;
mod third_party;

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use custom_store::DirectoryStore;
use http::{Request, Response};
use third_party::{Accident, Scratch, ThirdParty};
use tokio::process::Command;
use tower::{ServiceBuilder, ServiceExt};
use tower_idempotency::Clock;
use tower_idempotency::Recovered;
use tower_idempotency::client::{LostCall, OnceLayer, ProviderProfile, ReqwestService};

/// The orders at the third party, by reference. The third party accepts the same reference any
/// number of times.
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

/// Asks the third party about a lost call. The call stays unknown unless the third party reports
/// that it has, or does not have, the order.
async fn check(lost: LostCall) -> Recovered<Response<bytes::Bytes>> {
    let found = async {
        let response = reqwest::Client::new().get(lost.head.uri.to_string()).send().await?;
        Ok::<_, reqwest::Error>((response.status(), response.bytes().await?))
    };
    let found = match found.await {
        Ok((StatusCode::OK, order)) => Recovered::Happened(Response::new(order)),
        Ok((StatusCode::NOT_FOUND, _)) => Recovered::NotHappened,
        _ => Recovered::Unknown,
    };
    let result = match &found {
        Recovered::Happened(_) => "found",
        Recovered::NotHappened => "not found",
        Recovered::Unknown => "unknown",
    };
    println!("  attempt {} asks for {}: {result}", lost.attempt.number(), lost.key);
    found
}

/// The caller: orders once.
async fn order(store: DirectoryStore, party: &str, reference: &str) -> Result<(), Box<dyn Error>> {
    let once = OnceLayer::new(store, ProviderProfile::draft())
        // Another process takes over one second after the last renewal of the lease. Default: 30 s.
        .with_lease(Duration::from_secs(1))
        .without_sending_key()
        .with_recovery(check);
    let http = ReqwestService::build(reqwest::Client::builder())?;
    let client = ServiceBuilder::new().layer(once).service(http);

    let request = Request::post(format!("{party}/orders/{reference}")).header("idempotency-key", reference);
    let response = client.oneshot(request.body(reqwest::Body::from("2 teapots"))?).await?;
    println!("  {reference} is {}", reqwest::Response::from(response).text().await?);
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
            Accident::ResponseStuck,
            "a process that is killed after its order was taken:",
        ),
        (
            "not-taken",
            Accident::RequestStuck,
            "a process that is killed before its order was taken:",
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
    println!("a request that arrives after the check would make another order: see the head of this file");
    Ok(())
}
