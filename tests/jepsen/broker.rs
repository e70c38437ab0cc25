//! The broker between the outbox and the inboxes, in the process of the test, where no fault reaches
//! it. It delivers each message to every consumer at least once, in any order.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::post;

use crate::bank::{Bank, Event};

/// The consumers. Each of them gets every message.
pub(crate) const CONSUMERS: [&str; 2] = ["billing", "shipping"];

/// The time after which the broker repeats a delivery that was not acknowledged.
const PATIENCE: Duration = Duration::from_millis(1_500);

/// The deliveries that were not acknowledged yet.
#[derive(Clone, Default)]
pub(crate) struct Broker(Arc<Mutex<Deliveries>>);

#[derive(Default)]
struct Deliveries {
    count: u64,
    open: Vec<Delivery>,
}

struct Delivery {
    number: u64,
    consumer: &'static str,
    key: usize,
    /// The id and the payload.
    message: String,
    due: Duration,
}

impl Broker {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().unwrap().open.is_empty()
    }

    fn add(&self, key: usize, message: &str, now: Duration) {
        let mut deliveries = self.0.lock().unwrap();
        for consumer in CONSUMERS {
            let copies = if rand::random_range(0..4) == 0 { 2 } else { 1 };
            for _ in 0..copies {
                deliveries.count += 1;
                let delivery = Delivery {
                    number: deliveries.count,
                    consumer,
                    key,
                    message: message.to_owned(),
                    due: now + Duration::from_millis(rand::random_range(0..500)),
                };
                deliveries.open.push(delivery);
            }
        }
    }

    /// Returns the key, the number and the message of any delivery that is due.
    fn take(&self, consumer: &str, now: Duration) -> Option<(usize, u64, String)> {
        let mut deliveries = self.0.lock().unwrap();
        let open = deliveries.open.iter_mut();
        let mut due: Vec<_> = open
            .filter(|delivery| delivery.consumer == consumer && delivery.due <= now)
            .collect();
        if due.is_empty() {
            return None;
        }
        let taken = due.swap_remove(rand::random_range(0..due.len()));
        taken.due = now + PATIENCE;
        Some((taken.key, taken.number, taken.message.clone()))
    }

    /// Returns the key of an open delivery. The broker loses some acknowledgements.
    fn acknowledge(&self, number: u64) -> Option<usize> {
        let open = &mut self.0.lock().unwrap().open;
        let at = open.iter().position(|delivery| delivery.number == number)?;
        (rand::random_range(0..10) > 0).then(|| open.swap_remove(at).key)
    }
}

pub(crate) fn router() -> Router<Bank> {
    Router::new()
        .route("/publish/{id}", post(publish))
        .route("/next/{consumer}", post(next))
        .route("/acknowledge/{delivery}", post(acknowledge))
}

/// Returns the key that a payload begins with.
pub(crate) fn key_of(payload: &str) -> usize {
    payload.split(' ').next().unwrap().parse().unwrap()
}

/// Accepts a message, or refuses it. The reply about an accepted message may be late, or say that
/// the broker has refused it.
async fn publish(State(bank): State<Bank>, Path(id): Path<String>, payload: String) -> StatusCode {
    let fate = rand::random_range(0..40);
    if fate < 3 {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    let key = key_of(&payload);
    bank.broker.add(key, &format!("{id} {payload}"), bank.elapsed());
    bank.note(Some(key), Event::Published { id, payload });
    match fate {
        3..6 => return StatusCode::SERVICE_UNAVAILABLE,
        // The lease of a relay is 1 s.
        6..8 => tokio::time::sleep(Duration::from_millis(rand::random_range(300..1_300))).await,
        _ => {}
    }
    StatusCode::OK
}

/// Waits for a delivery, for at most half a second. Returns its number, the id and the payload.
async fn next(State(bank): State<Bank>, Path(consumer): Path<String>) -> String {
    for _ in 0..20 {
        if let Some((key, delivery, message)) = bank.broker.take(&consumer, bank.elapsed()) {
            bank.note(Some(key), Event::Delivered { consumer, delivery });
            return format!("{delivery} {message}");
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    String::new()
}

async fn acknowledge(State(bank): State<Bank>, Path(delivery): Path<u64>) {
    if let Some(key) = bank.broker.acknowledge(delivery) {
        bank.note(Some(key), Event::Acknowledged { delivery });
    }
}
