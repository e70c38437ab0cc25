//! A payment that is a row in PostgreSQL. One transaction commits the row together with the stored
//! response, so the payment is made exactly once, even if this process is killed in the middle.
//!
//! ```text
//! DATABASE_URL=postgres://app@localhost/shop cargo run --features axum,postgres --example postgres_transaction
//! ```
//!
//! Send the same request twice, at the same time or one after the other. Or kill the process during
//! the two seconds that a payment takes, start it again, and repeat the request:
//!
//! ```text
//! curl -i http://127.0.0.1:3000/payments -H 'Idempotency-Key: order-1' --json '{"amount": 4200}'
//! curl http://127.0.0.1:3000/payments
//! ```
//!
//! The second command shows one row. The environment variable `LISTEN` sets another address.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tower_idempotency::{IdempotencyLayer, Lease, OnLost, PostgresStore};

#[derive(Deserialize)]
struct NewPayment {
    /// In cents.
    amount: i64,
}

#[derive(Serialize)]
struct Payment {
    id: i64,
    amount: i64,
}

impl From<(i64, i64)> for Payment {
    fn from((id, amount): (i64, i64)) -> Self {
        Self { id, amount }
    }
}

/// Any error of a payment. The handler returns early and drops the transaction, which rolls it
/// back. The layer then looks up whether the transaction was committed.
struct Failed;

impl<E: std::error::Error> From<E> for Failed {
    fn from(error: E) -> Self {
        eprintln!("a payment failed: {error}");
        Self
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    }
}

async fn pay(State(pool): State<PgPool>, lease: Lease, Json(new): Json<NewPayment>) -> Result<Response, Failed> {
    let mut transaction = pool.begin().await?;
    let insert = "INSERT INTO payments (amount) VALUES ($1) RETURNING id, amount";
    let insert = sqlx::query_as::<_, (i64, i64)>(insert).bind(new.amount);
    let payment = Payment::from(insert.fetch_one(&mut *transaction).await?);
    println!("payment {} is inserted, but not yet committed", payment.id);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let response = lease
        .complete_in(&mut transaction, (StatusCode::CREATED, Json(payment)))
        .await?;
    transaction.commit().await?;
    Ok(response)
}

async fn payments(State(pool): State<PgPool>) -> Result<Json<Vec<Payment>>, Failed> {
    let rows = sqlx::query_as::<_, (i64, i64)>("SELECT id, amount FROM payments ORDER BY id");
    let payments = rows.fetch_all(&pool).await?;
    Ok(Json(payments.into_iter().map(Payment::from).collect()))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::var("DATABASE_URL").map_err(|_| "DATABASE_URL is not set; see the head of this file")?;
    let store = PostgresStore::connect(&url).await?;
    let pool = PgPool::connect(&url).await?;
    let create = "CREATE TABLE IF NOT EXISTS payments (id bigserial PRIMARY KEY, amount bigint NOT NULL)";
    sqlx::query(create).execute(&pool).await?;
    // A lost attempt had no effect, because its transaction was rolled back. So the next attempt
    // may run.
    let idempotency = IdempotencyLayer::new(store)
        .on_lost(OnLost::Execute)
        .with_lease(Duration::from_secs(5));
    let app = Router::new()
        .route("/payments", post(pay).layer(idempotency).get(payments))
        .with_state(pool);
    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
