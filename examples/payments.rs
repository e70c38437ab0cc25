//! A payment that is made once, however often it is sent: the layer in one line, and a page to attack it from.
//!
//! ```text
//! cargo run --features axum --example payments
//! ```
//!
//! Then open <http://127.0.0.1:3000>, or send the same request twice, at once or one after the other:
//!
//! ```text
//! curl -i http://127.0.0.1:3000/payments -H 'Idempotency-Key: order-1' --json '{"amount": 4200}'
//! curl http://127.0.0.1:3000/charges
//! ```
//!
//! The second answer is the first one, with `Idempotent-Replayed: true`, and the bank has one charge. `LISTEN` sets another
//! address.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{header, StatusCode};
use axum::response::{Html, IntoResponse};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tower_idempotency::{IdempotencyLayer, MemoryStore};

#[derive(Deserialize)]
struct Payment {
    /// In cents.
    amount: u32,
}

#[derive(Clone, Serialize)]
struct Charge {
    id: usize,
    amount: u32,
}

/// A bank that takes a second and charges whatever it is told to, as often as it is told to.
#[derive(Clone, Default)]
struct Bank(Arc<Mutex<Vec<Charge>>>);

impl Bank {
    async fn charge(&self, Payment { amount }: Payment) -> Charge {
        println!("a charge of {amount} begins");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut charges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = charges.len() + 1;
        charges.push(Charge { id, amount });
        Charge { id, amount }
    }

    fn charges(&self) -> Vec<Charge> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Knows nothing of keys and retries.
async fn pay(State(bank): State<Bank>, Json(payment): Json<Payment>) -> impl IntoResponse {
    let charge = bank.charge(payment).await;
    let location = format!("/charges#{}", charge.id);
    (StatusCode::CREATED, [(header::LOCATION, location)], Json(charge))
}

async fn charges(State(bank): State<Bank>) -> Json<Vec<Charge>> {
    Json(bank.charges())
}

async fn page() -> Html<&'static str> {
    Html(include_str!("payments.html"))
}

fn app() -> Router {
    Router::new()
        .route("/", get(page))
        .route("/charges", get(charges))
        .route("/payments", post(pay))
        .layer(IdempotencyLayer::new(MemoryStore::new()))
        .with_state(Bank::default())
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app()).await
}
