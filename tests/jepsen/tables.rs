//! The tables of the application, when all faults are over.

use std::time::Duration;

use sqlx::PgPool;
use tower_idempotency::outbox::Outbox;

use crate::bank::{Bank, Event, Mode};
use crate::broker::{CONSUMERS, key_of};
use crate::checks::MessageHistory;

/// The rows of one key.
#[derive(Clone, Default)]
pub(crate) struct Rows {
    pub(crate) receipts: Vec<u64>,
    /// The ids of the messages that were put into the outbox with these receipts.
    put: Vec<String>,
    waiting: Vec<String>,
    /// Consumers and the ids of the messages that they have handled.
    handled: Vec<(String, String)>,
}

impl Rows {
    /// Reads the rows of each key.
    pub(crate) async fn read(url: &str, modes: &[Mode], keys: usize) -> Vec<Self> {
        let mut rows = vec![Self::default(); keys];
        if !url.starts_with("postgres") {
            return rows;
        }
        let pool = PgPool::connect(url).await.unwrap();
        let paid = sqlx::query_as("SELECT key, receipt, message FROM payments").fetch_all(&pool);
        let paid: Vec<(i64, i64, Option<String>)> = paid.await.unwrap();
        for (key, receipt, message) in paid {
            let rows = &mut rows[usize::try_from(key).unwrap()];
            rows.receipts.push(u64::try_from(receipt).unwrap());
            rows.put.extend(message);
        }
        if modes.contains(&Mode::Message) {
            let handled = sqlx::query_as("SELECT key, consumer, message FROM handled").fetch_all(&pool);
            let handled: Vec<(i64, String, String)> = handled.await.unwrap();
            for (key, consumer, message) in handled {
                let rows = &mut rows[usize::try_from(key).unwrap()];
                rows.handled.push((consumer, message));
            }
            let waiting = sqlx::query_as("SELECT id, convert_from(payload, 'UTF8') FROM idempotency_outbox");
            let waiting: Vec<(String, String)> = waiting.fetch_all(&pool).await.unwrap();
            for (id, payload) in waiting {
                rows[key_of(&payload)].waiting.push(id);
            }
        }
        rows
    }

    pub(crate) fn messages(self, events: &[Event]) -> MessageHistory {
        let published = events.iter().filter_map(|event| match event {
            Event::Published { id, payload } => Some((id.clone(), payload.clone())),
            _ => None,
        });
        MessageHistory {
            put: self.put,
            waiting: self.waiting,
            published: published.collect(),
            consumers: &CONSUMERS,
            handled: self.handled,
        }
    }
}

/// Waits until neither the outbox nor the broker has a message, for at most 20 s. The checks find
/// the messages that are left.
pub(crate) async fn wait_for_messages(url: &str, bank: &Bank) {
    let outbox = Outbox::new(PgPool::connect(url).await.unwrap());
    let until = bank.elapsed() + Duration::from_secs(20);
    while bank.elapsed() < until && (outbox.waiting().await.unwrap() > 0 || !bank.broker.is_empty()) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
