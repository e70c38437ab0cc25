//! The third party: a typical REST API. It is slow, and loses the responses to some of the orders
//! that it made.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use harness::Ledger;

/// The behaviour of the third party.
#[derive(Clone, Copy, Debug)]
pub struct Switches {
    /// Whether the third party makes one order for all requests with the same key.
    pub heeds_keys: bool,
    /// The longest pause before the order is made, and again before the response, in milliseconds.
    pub slowness: u64,
    /// On average, the third party loses one in this number of responses. With 0 it loses none.
    pub loses_one_in: u32,
}

/// A third party that records each order in a ledger. Clones share the orders.
#[derive(Clone)]
pub struct Party {
    ledger: Ledger,
    switches: Switches,
    state: Arc<Mutex<PartyState>>,
}

#[derive(Default)]
struct PartyState {
    /// The order of each key.
    orders: HashMap<String, usize>,
    /// The number of orders.
    made: usize,
    /// The number of requests with a known key.
    repeated: usize,
}

impl Party {
    pub fn new(ledger: Ledger, switches: Switches) -> Self {
        Self {
            ledger,
            switches,
            state: Arc::default(),
        }
    }

    /// Serves on a free port, and returns the address.
    ///
    /// # Errors
    ///
    /// Fails if no port is free.
    pub async fn serve(&self) -> io::Result<SocketAddr> {
        let router = Router::new().route("/orders", post(order)).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(address)
    }

    /// Returns the number of requests with a known key.
    ///
    /// # Panics
    ///
    /// Panics if a request has panicked.
    pub fn repeated(&self) -> usize {
        self.state.lock().unwrap().repeated
    }

    /// Waits for a random time.
    async fn take_time(&self) {
        tokio::time::sleep(harness::up_to(self.switches.slowness)).await;
    }

    /// Makes an order, or finds the order of the key. Returns the number of the order.
    fn order(&self, key: Option<&str>, order: &str) -> usize {
        let mut state = self.state.lock().unwrap();
        if let Some(number) = key.and_then(|key| state.orders.get(key).copied()) {
            state.repeated += 1;
            return number;
        }
        state.made += 1;
        let number = state.made;
        if let Some(key) = key {
            state.orders.insert(key.to_owned(), number);
        }
        self.ledger.append_synced(order);
        number
    }
}

async fn order(State(party): State<Party>, headers: HeaderMap, order: String) -> Response {
    let key = headers.get("idempotency-key").filter(|_| party.switches.heeds_keys);
    let key = key.and_then(|key| Some(key.to_str().ok()?.to_owned()));
    party.take_time().await;
    let making = party.clone();
    let made = tokio::task::spawn_blocking(move || making.order(key.as_deref(), &order)).await;
    party.take_time().await;
    let Switches { loses_one_in, .. } = party.switches;
    match made {
        Ok(_) if loses_one_in > 0 && harness::one_in(loses_one_in) => lost(),
        Ok(number) => format!("order number {number}").into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Returns a response that says nothing about the order: its body breaks off, or it is the 504 of a
/// gateway.
fn lost() -> Response {
    if harness::one_in(2) {
        return StatusCode::GATEWAY_TIMEOUT.into_response();
    }
    let broken = futures::stream::iter([Err::<Bytes, _>(io::Error::other("lost"))]);
    Body::from_stream(broken).into_response()
}
