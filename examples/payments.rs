//! A payment that is made once, however often it is sent: the layer around one route, and a page that attacks it.
//!
//! ```text
//! cargo run --features axum --example payments
//! ```
//!
//! Open <http://127.0.0.1:3000> and press the buttons. Or send the same request twice, at once or one after the other:
//!
//! ```text
//! curl -i http://127.0.0.1:3000/payments -H 'Idempotency-Key: order-1' --json '{"order": "1", "amount": 4200}'
//! curl http://127.0.0.1:3000/charges
//! ```
//!
//! The second response is the first one, with `Idempotent-Replayed: true`, and the bank has one charge. `LISTEN` sets
//! another address.
//!
//! # Kill the owner of a key
//!
//! A request with `Kill-Server: after-charge` or `Kill-Server: before-charge` ends its server in the middle of the payment:
//!
//! ```text
//! K='Idempotency-Key: order-2'; B='{"order": "2", "amount": 4200}'
//! curl -i http://127.0.0.1:3000/payments -H "$K" --json "$B" -H 'Kill-Server: after-charge'   # no response
//! curl -i http://127.0.0.1:3000/payments -H "$K" --json "$B"                                  # 409 outcome-unknown
//! curl http://127.0.0.1:3000/charges                                                          # charge 2 is of order 2
//! curl http://127.0.0.1:3000/operator/resolve --json '{"key": "order-2", "charge": 2}'
//! curl -i http://127.0.0.1:3000/payments -H "$K" --json "$B"                                  # 201, replayed
//! ```
//!
//! Each server runs on a tokio runtime of its own. The kill drops this runtime with every connection and every handler on it,
//! and the next server begins. The store and the bank survive, as a database and a third party survive the end of a process.
//! Two things differ from a power cut:
//!
//! * The layer sees that its runtime ends, and gives up the lease. A power cut gives nothing up, so the key stays in flight
//!   until its lease is over (30 s by default), and only then is the outcome unknown.
//! * A [`MemoryStore`] ends with its process. Take a store in Redis or PostgreSQL to keep the keys.

use std::future::pending;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{FromRef, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state, map_response};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tower_idempotency::protocol::{Resolution, ResolveResult};
use tower_idempotency::{IdempotencyLayer, MemoryStore, OnLost, Store};

#[derive(Deserialize)]
struct Payment {
    /// The number of the order, by which the bank finds its charge.
    order: Option<String>,
    /// In cents.
    amount: u32,
}

#[derive(Clone, Serialize)]
struct Charge {
    id: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<String>,
    amount: u32,
}

/// A bank that takes a second, and makes a charge for each request that it gets. It survives the servers.
#[derive(Clone, Default)]
struct Bank(Arc<Mutex<Vec<Charge>>>);

impl Bank {
    async fn charge(&self, Payment { order, amount }: Payment) -> Charge {
        println!("a charge of {amount} begins");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut charges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = charges.len() + 1;
        charges.push(Charge { id, order, amount });
        charges[id - 1].clone()
    }

    fn charges(&self) -> Vec<Charge> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The handler knows nothing of keys and retries.
async fn pay(State(bank): State<Bank>, Json(payment): Json<Payment>) -> Response {
    receipt(bank.charge(payment).await)
}

fn receipt(charge: Charge) -> Response {
    let location = format!("/charges#{}", charge.id);
    (StatusCode::CREATED, [(header::LOCATION, location)], Json(charge)).into_response()
}

async fn charges(State(bank): State<Bank>) -> Json<Vec<Charge>> {
    Json(bank.charges())
}

async fn page() -> Html<&'static str> {
    Html(include_str!("payments.html"))
}

#[derive(Clone, FromRef)]
struct Shop {
    bank: Bank,
    idempotency: IdempotencyLayer<MemoryStore>,
    kill: Kill,
}

fn app(store: MemoryStore, bank: Bank, kill: Kill) -> Router {
    let idempotency = IdempotencyLayer::new(store)
        // The default: if the owner of a key is lost, its payment does not run again by itself.
        .on_lost(OnLost::Refuse);
    let payments = Router::new()
        .route("/payments", post(pay))
        // Inside of the layer, so that the server dies while its request owns the key.
        .layer(from_fn_with_state(kill.clone(), die_on_request))
        .layer(idempotency.clone());
    let shop = Shop {
        bank,
        idempotency,
        kill,
    };
    Router::new()
        .merge(payments)
        .route("/", get(page))
        .route("/charges", get(charges))
        .route("/operator/resolve", post(resolve))
        .layer(map_response(close_connection))
        .with_state(shop)
}

/// Browsers repeat a request by themselves if a connection breaks that has served another request. Here every request has a
/// connection of its own, so that the page shows each request that is sent.
async fn close_connection(mut response: Response) -> Response {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

/// The result of an operator's inquiry at the bank.
#[derive(Deserialize)]
struct Finding {
    key: String,
    /// The charge that the lost attempt made, if it made one.
    charge: Option<usize>,
}

type Refusal = (StatusCode, &'static str);

/// Resolves an unknown outcome. In your service, only operators may reach this route.
async fn resolve(State(shop): State<Shop>, Json(finding): Json<Finding>) -> Result<&'static str, Refusal> {
    let failed = |_| (StatusCode::SERVICE_UNAVAILABLE, "the store failed");
    let store = shop.idempotency.store();
    let key = shop.idempotency.storage_key(None, &finding.key);
    let key = key.map_err(|_| (StatusCode::BAD_REQUEST, "the key is malformed"))?;
    let record = store.peek(&key).await.map_err(failed)?;
    let record = record.ok_or((StatusCode::NOT_FOUND, "no request had this key"))?;
    let resolution = match finding.charge {
        // Every retry gets the response that the lost attempt would have got.
        Some(id) => shop.paid(id).await?,
        // The next request runs.
        None => Resolution::Absent,
    };
    match store.resolve(&key, record.fence, &resolution).await.map_err(failed)? {
        ResolveResult::Resolved => Ok("the key is resolved"),
        ResolveResult::Conflict(_) => Err((StatusCode::CONFLICT, "the key is in flight or completed")),
    }
}

impl Shop {
    /// Returns the resolution of a payment that made this charge.
    async fn paid(&self, id: usize) -> Result<Resolution, Refusal> {
        let charge = self.bank.charges().into_iter().find(|charge| charge.id == id);
        let charge = charge.ok_or((StatusCode::NOT_FOUND, "the bank has no such charge"))?;
        let (head, body) = receipt(charge).into_parts();
        let body = to_bytes(body, usize::MAX).await;
        let body = body.map_err(|_| (StatusCode::INTERNAL_SERVER_ERROR, "the response broke off"))?;
        let outcome = self.idempotency.outcome_of(Response::from_parts(head, body));
        Ok(Resolution::Completed(outcome, Duration::from_secs(24 * 3600)))
    }
}

/// Ends the server that runs at the moment.
#[derive(Clone, Default)]
struct Kill(Arc<Notify>);

impl Kill {
    /// Never returns, because the caller ends with its server.
    async fn now(&self) -> Response {
        self.0.notify_one();
        pending().await
    }
}

async fn die_on_request(State(kill): State<Kill>, request: Request, next: Next) -> Response {
    let moment = request.headers().get("kill-server").cloned();
    match moment.as_ref().map(HeaderValue::as_bytes) {
        Some(b"before-charge") => kill.now().await,
        Some(b"after-charge") => {
            next.run(request).await;
            kill.now().await
        }
        _ => next.run(request).await,
    }
}

fn main() -> std::io::Result<()> {
    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    println!("listening on http://{}", listener.local_addr()?);
    let (store, bank) = (MemoryStore::new(), Bank::default());
    // Each turn is the life of one server.
    loop {
        let kill = Kill::default();
        let app = app(store.clone(), bank.clone(), kill.clone());
        let listener = listener.try_clone()?;
        let runtime = Runtime::new()?;
        runtime.block_on(async {
            tokio::select! {
                ended = axum::serve(TcpListener::from_std(listener)?, app) => ended,
                () = kill.0.notified() => Ok(()),
            }
        })?;
        // Drops every connection and every handler of this server, wherever it waits.
        drop(runtime);
        println!("the server is dead, and the next one begins");
    }
}
