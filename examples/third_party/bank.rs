//! A bank with idempotency keys that behaves as Stripe documents.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;

/// A bank that charges the amount in the body of each request. It responds to a repeated key with
/// the first response, marked as a replay, and refuses a repeated key with another amount. It
/// charges every request without a key.
#[derive(Clone, Default)]
pub(crate) struct Bank(Arc<Mutex<Vec<Charge>>>);

#[derive(Clone)]
struct Charge {
    key: Option<String>,
    amount: String,
}

impl Bank {
    pub(crate) fn app(&self) -> Router {
        Router::new()
            .route("/v1/charges", post(charge))
            .with_state(self.clone())
    }

    /// Returns the amounts that the bank charged.
    pub(crate) fn charges(&self) -> Vec<String> {
        let charges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        charges.iter().map(|charge| charge.amount.clone()).collect()
    }
}

async fn charge(State(bank): State<Bank>, headers: HeaderMap, amount: String) -> Response {
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok());
    let mut charges = bank.0.lock().unwrap_or_else(PoisonError::into_inner);
    let earlier = charges
        .iter()
        .position(|charge| key.is_some() && charge.key.as_deref() == key);
    let Some(at) = earlier else {
        let key = key.map(str::to_owned);
        charges.push(Charge { key, amount });
        return (StatusCode::CREATED, format!("ch_{}", charges.len())).into_response();
    };
    if charges[at].amount == amount {
        (
            StatusCode::CREATED,
            [("idempotent-replayed", "true")],
            format!("ch_{}", at + 1),
        )
            .into_response()
    } else {
        (StatusCode::BAD_REQUEST, "idempotency_error").into_response()
    }
}
