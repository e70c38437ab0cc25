//! Payments that are made once, whichever process receives them. The records are in Redis or
//! Valkey.
//!
//! ```text
//! redis-server --appendonly yes --maxmemory-policy noeviction &
//! REDIS_URL=redis://127.0.0.1:6379 LISTEN=127.0.0.1:3000 cargo run --features axum,redis --example redis &
//! REDIS_URL=redis://127.0.0.1:6379 LISTEN=127.0.0.1:3001 cargo run --features axum,redis --example redis &
//! curl -i http://127.0.0.1:3000/payments -H 'Idempotency-Key: order-1' -d 4200
//! curl -i http://127.0.0.1:3001/payments -H 'Idempotency-Key: order-1' -d 4200
//! ```
//!
//! The second process replays the response of the first one. If the first process is still busy
//! with the payment, the second one waits for it.

use std::error::Error;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use tokio::net::TcpListener;
use tower_idempotency::{IdempotencyLayer, RedisStore};

/// Makes a payment. The handler knows nothing about keys and retries.
async fn pay(amount: String) -> (StatusCode, String) {
    println!("a charge of {amount} begins");
    tokio::time::sleep(Duration::from_secs(2)).await;
    (
        StatusCode::CREATED,
        format!("charged {amount} by process {}\n", std::process::id()),
    )
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("REDIS_URL").map_err(|_| "set REDIS_URL, for example to redis://127.0.0.1:6379")?;
    let store = RedisStore::connect(&url).await?;
    let app = Router::new()
        .route("/payments", post(pay))
        .layer(IdempotencyLayer::new(store));
    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, app).await?)
}
