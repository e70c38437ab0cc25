//! One transfer at a third party that accepts ids made by its clients: it refuses to create the
//! same id twice.
//!
//! ```text
//! cargo run --features retry --example client_generated_id
//! ```
//!
//! The client derives the id from the job that needs the transfer. So every attempt has the same
//! id, even in another process that runs the job after a crash. The layer writes the id into the
//! body, and may then send the request again.

mod third_party;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use http::{Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::{Value, json};
use third_party::{Accident, ThirdParty};
use tower::{BoxError, ServiceBuilder, ServiceExt};
use tower_idempotency::client::{
    CallLayer, IdempotencyKeyLayer, KeyDeriver, KeyGenerator, KeyOrigin, ProviderProfile, RetryPolicy,
};

/// The transfers at the third party: amounts by id. The third party refuses an id that exists with
/// 409.
type Transfers = Arc<Mutex<HashMap<String, u64>>>;

#[derive(Deserialize)]
struct Transfer {
    id: String,
    amount: u64,
}

async fn create(State(transfers): State<Transfers>, Json(new): Json<Transfer>) -> StatusCode {
    let mut transfers = transfers.lock().unwrap_or_else(PoisonError::into_inner);
    if transfers.contains_key(&new.id) {
        return StatusCode::CONFLICT;
    }
    transfers.insert(new.id, new.amount);
    StatusCode::CREATED
}

/// Writes the id into the body.
fn put_id(request: &mut Request<String>, id: &str) -> Result<(), serde_json::Error> {
    let mut transfer: Value = serde_json::from_str(request.body())?;
    transfer["id"] = id.into();
    *request.body_mut() = transfer.to_string();
    Ok(())
}

/// The job: transfers an amount. It creates a new client each time, as a process does after a
/// crash.
async fn transfer(party: &ThirdParty, payout: &str, amount: u64) -> Result<StatusCode, BoxError> {
    let ids = KeyDeriver::new(b"32 bytes from the secret manager")?;
    let retries = RetryPolicy::new(ProviderProfile::draft())
        .with_initial_backoff(Duration::from_millis(50))
        .with_max_backoff(Duration::from_secs(1));
    let client = ServiceBuilder::new()
        .layer(
            IdempotencyKeyLayer::new(ProviderProfile::draft())
                .with_generator(KeyGenerator::derived(ids))
                .with_body_key(put_id),
        )
        .layer(CallLayer::new(retries))
        .service(Client::builder(TokioExecutor::new()).build_http::<String>());

    let mut request = Request::post(party.url("/transfers"))
        .header("content-type", "application/json")
        .body(json!({ "amount": amount }).to_string())?;
    request.extensions_mut().insert(KeyOrigin::new(payout, "transfer"));
    let status = client.oneshot(request).await?.status();
    match status {
        StatusCode::CREATED => println!("{payout} is made"),
        // Nobody else makes this id, so an earlier attempt of ours made the transfer, and its
        // response was lost.
        StatusCode::CONFLICT => println!("{payout} was made before"),
        other => return Err(format!("the third party refused {payout}: {other}").into()),
    }
    Ok(status)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let transfers = Transfers::default();
    let app = Router::new()
        .route("/transfers", post(create))
        .with_state(Arc::clone(&transfers));
    let party = ThirdParty::serve(app).await?;

    party.expect([Accident::Overload, Accident::ResponseLost]);
    assert_eq!(transfer(&party, "payout-31", 4200).await?, StatusCode::CONFLICT);
    // The process crashed before it recorded the transfer, and the job is started again.
    assert_eq!(transfer(&party, "payout-31", 4200).await?, StatusCode::CONFLICT);
    assert_eq!(transfer(&party, "payout-32", 1700).await?, StatusCode::CREATED);

    let mut amounts: Vec<u64> = transfers
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .values()
        .copied()
        .collect();
    amounts.sort_unstable();
    println!("the third party transferred {amounts:?}");
    assert_eq!(amounts, [1700, 4200], "one transfer for each payout");
    Ok(())
}
