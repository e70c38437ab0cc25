//! Starts a broker and a third party that loses every second answer, sends events up to three times, mediates in two consumers,
//! and counts the orders.
//!
//! `cargo run --manifest-path examples/packages/Cargo.toml -p mediator` keeps its records in memory; `cargo run -p mediator redis://127.0.0.1/` or `postgres://..` over there.

use std::process::ExitCode;
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::Message;
use async_nats::HeaderMap;
use harness::{Folder, Ledger, NatsServer};
use mediator::{Broker, Error, Mediation, Party, Promise, Received, Settings, Switches};
use tower_idempotency::receiver::{Disposition, Receipt};
use tower_idempotency::BoxStore;

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
        // What the broker itself would drop comes within this time.
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
        "{sent} messages of {EVENTS} events, {} calls repeated, orders for each event: {:?}",
        party.repeated(),
        orders.values().collect::<Vec<_>>()
    );
    let dead = broker.dead().await?.len();
    let is_once = orders.len() == EVENTS && orders.values().all(|orders| *orders == 1) && dead == 0;
    println!(
        "{}",
        if is_once {
            "one order each"
        } else {
            "NOT one order each"
        }
    );
    Ok(if is_once { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Some have the id of NATS, others are CloudEvents. A new run of this program sends other events.
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
            Ok(Receipt::First(answer)) => println!("{name}: event {event}: {answer}"),
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
