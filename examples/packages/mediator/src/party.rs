//! The third party: a REST API as it is out there. It is slow, and loses answers to what it has done.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::Router;
use bytes::Bytes;
use harness::Ledger;

/// How it behaves.
#[derive(Clone, Copy, Debug)]
pub struct Switches {
    /// Whether it takes an order with a key that it has seen for the same order.
    pub heeds_keys: bool,
    /// Up to how many milliseconds it takes before it acts, and again before it answers.
    pub slowness: u64,
    /// Of how many answers one is lost after the order was made; 0: none.
    pub loses_one_in: u32,
}

/// A third party, which enters each order that it makes into a ledger.
#[derive(Clone)]
pub struct Party {
    ledger: Ledger,
    switches: Switches,
    books: Arc<Mutex<Books>>,
}

#[derive(Default)]
struct Books {
    /// The number of each order that came with a key.
    orders: HashMap<String, usize>,
    made: usize,
    repeated: usize,
}

impl Party {
    pub fn new(ledger: Ledger, switches: Switches) -> Self {
        Self {
            ledger,
            switches,
            books: Arc::default(),
        }
    }

    /// Serves on a free port.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub async fn serve(&self) -> io::Result<SocketAddr> {
        let router = Router::new().route("/orders", post(order)).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(address)
    }

    /// How many requests came with a key that was known.
    ///
    /// # Panics
    ///
    /// If a request has panicked.
    pub fn repeated(&self) -> usize {
        self.books.lock().unwrap().repeated
    }

    async fn take_time(&self) {
        tokio::time::sleep(harness::up_to(self.switches.slowness)).await;
    }

    /// Makes an order, or finds the one of its key.
    fn order(&self, key: Option<&str>, order: &str) -> usize {
        let mut books = self.books.lock().unwrap();
        if let Some(number) = key.and_then(|key| books.orders.get(key).copied()) {
            books.repeated += 1;
            return number;
        }
        books.made += 1;
        let number = books.made;
        if let Some(key) = key {
            books.orders.insert(key.to_owned(), number);
        }
        self.ledger.enter(order);
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

/// An answer that says nothing of what was done: it breaks off, or a gateway gave up waiting for it.
fn lost() -> Response {
    if harness::one_in(2) {
        return StatusCode::GATEWAY_TIMEOUT.into_response();
    }
    let broken = futures::stream::iter([Err::<Bytes, _>(io::Error::other("lost"))]);
    Body::from_stream(broken).into_response()
}
