//! The service: a bank whose accounts behave as their names say.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use tower_idempotency::{DoNotStore, Lease, MarkStatus};

use crate::proto::payments_server::Payments;
use crate::proto::{ChargeCount, ChargeRequest, CountChargesRequest, Event, Receipt, WatchRequest};

/// A bank that counts the calls for each account.
#[derive(Clone, Debug, Default)]
pub struct Bank(Arc<Mutex<HashMap<String, u64>>>);

impl Bank {
    /// Counts a call for an account, and returns the number of the call.
    fn count(&self, account: &str) -> u64 {
        let mut charges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = charges.entry(account.to_owned()).or_default();
        *count += 1;
        *count
    }

    /// Returns how often an account was charged.
    pub fn charges(&self, account: &str) -> u64 {
        let charges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        charges.get(account).copied().unwrap_or_default()
    }
}

#[tonic::async_trait]
impl Payments for Bank {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn charge(&self, request: Request<ChargeRequest>) -> Result<Response<Receipt>, Status> {
        // Every attempt of this call derives the same key. Pass the key to a system that
        // deduplicates by keys.
        let key = request
            .extensions()
            .get::<Lease>()
            .map(|lease| lease.derive_key("charge"));
        let ChargeRequest { account, cents, note } = request.into_inner();
        let number = self.count(&account);
        match account.as_str() {
            // The status is definite, so the layer stores it and every retry gets it.
            "blocked" => return Err(Status::failed_precondition(format!("blocked, run {number}"))),
            // The status says that nothing happened, so the layer does not store it and the retry
            // runs.
            "unreachable" if number == 1 => return Err(Status::unavailable("the bank does not respond")),
            // The status is definite, but the handler marks the response, so the retry runs.
            "closed" if number == 1 => {
                return Err(Status::failed_precondition("the bank opens at nine").with_mark(DoNotStore));
            }
            "slow" => tokio::time::sleep(Duration::from_millis(1_500)).await,
            _ => {}
        }
        Ok(Response::new(Receipt {
            id: format!("receipt {number} for {cents} cents of {account}"),
            text: format!("{note}{}", if key.is_some() { "" } else { ", without a key" }),
        }))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let account = request.into_inner().account;
        let run = self.count(&account);
        let event = |number| Ok(Event { number });
        let (first, second) = (event(10 * run), event(10 * run + 1));
        let events: Self::WatchStream = match account.as_str() {
            "endless" => {
                let numbers = tokio_stream::iter(1_u64..).map(move |number| event(10 * run + number));
                Box::pin(numbers.throttle(Duration::from_millis(300)))
            }
            // The status is in the trailers, after the events.
            "refused" => Box::pin(tokio_stream::iter([
                first,
                second,
                Err(Status::out_of_range("no more")),
            ])),
            "interrupted" if run == 1 => Box::pin(tokio_stream::iter([
                first,
                second,
                Err(Status::unavailable("interrupted")),
            ])),
            _ => Box::pin(tokio_stream::iter([first, second])),
        };
        Ok(Response::new(events))
    }

    async fn count_charges(&self, request: Request<CountChargesRequest>) -> Result<Response<ChargeCount>, Status> {
        let count = self.charges(&request.into_inner().account);
        Ok(Response::new(ChargeCount { count }))
    }
}
