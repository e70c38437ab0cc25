//! Starts a broker, a third party that loses every second response, and two consumers. Sends events
//! up to three times, and counts the orders.
//!
//! `cargo run --manifest-path examples/packages/Cargo.toml -p mediator` stores the records in
//! memory. Add the URL of another store, `redis://127.0.0.1/` or `postgres://..`, to store the
//! records there.

use std::process::ExitCode;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::Message;
use harness::{Folder, Ledger, NatsServer};
use mediator::{Broker, Error, Mediation, Party, Promise, Received, Settings, Switches};
use tower_idempotency::BoxStore;
use tower_idempotency::receiver::{Disposition, Receipt};

const EVENTS: usize = 10;

#[tokio::main]
async fn main() -> Result<ExitCode, Error> {
    let store = std::env::args().nth(1).unwrap_or_else(|| "memory:".to_owned());
    let store = BoxStore::from_url(&store).await?;
    let folder = Folder::new("mediator");
    let ledger = Ledger::open(&folder.file("ledger"));
    let switches = Switches {
        heeds_keys: true,
        slowness: 50,
        loses_one_in: 2,
    };
    let party = Party::new(ledger.clone(), switches);
    let mediation = Mediation {
        url: format!("http://{}/orders", party.serve().await?),
        promise: Promise::ExactlyOnce,
        lease: Duration::from_secs(5),
        max_attempts: 20,
    };
    let server = NatsServer::start();
    let broker = Broker::connect(&server.url(), Settings::default()).await?;
    for consumer in ["A", "B"] {
        tokio::spawn(consume(consumer, broker.clone(), mediation.clone(), store.clone()));
    }
    let run = format!("{:08x}", std::process::id());
    for copy in 0..3 {
        // Wait for longer than the broker's window for duplicates, so that the broker does not drop
        // the copies itself.
        tokio::time::sleep(Duration::from_millis(200)).await;
        for event in (0..EVENTS).filter(|event| event % 3 >= copy) {
            broker.publish(headers(&run, event), format!("{event}")).await?;
        }
    }
    while !broker.is_drained().await? {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (orders, sent) = (ledger.counts(), broker.stored().await?);
    println!(
        "{sent} messages of {EVENTS} events, {} repeated calls, orders for each event: {:?}",
        party.repeated(),
        orders.values().collect::<Vec<_>>()
    );
    let dead = broker.dead().await?.len();
    let is_once = orders.len() == EVENTS && orders.values().all(|orders| *orders == 1) && dead == 0;
    println!(
        "{}",
        if is_once {
            "each event made one order"
        } else {
            "NOT every event made one order"
        }
    );
    Ok(if is_once { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns the headers of an event. Half of the events have the id of NATS, and the others are
/// CloudEvents. Each run of this program sends new events.
fn headers(run: &str, event: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if event.is_multiple_of(2) {
        headers.insert(NATS_MESSAGE_ID, format!("{run}-{event}"));
    } else {
        headers.insert("ce-source", format!("/shops/{run}"));
        headers.insert("ce-id", event.to_string());
    }
    headers
}

async fn consume(name: &'static str, broker: Broker, mediation: Mediation, store: BoxStore) -> Result<(), Error> {
    let decide = move |message: &Message, received: Received| {
        let event = String::from_utf8_lossy(&message.payload);
        match &received {
            Ok(Receipt::First(order)) => println!("{name}: event {event}: {order}"),
            Ok(receipt) => println!("{name}: event {event}: {receipt:?}"),
            Err(error) => println!("{name}: event {event}: {error}: {}", source(error)),
        }
        Some(Disposition::of(&received))
    };
    broker.consume(mediation.over(store)?, decide).await
}

fn source(error: &dyn std::error::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}
