//! JetStream and messages that are slow, that always fail, or that are invalid.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::Message;
use harness::NatsServer;
use mediator::{Broker, Event, Settings};
use tokio::task::JoinSet;
use tower::{Layer, service_fn};
use tower_idempotency::MemoryStore;
use tower_idempotency::receiver::{Disposition, Receipt, ReceiveError, ReceiverLayer};

const ACK_WAIT: Duration = Duration::from_millis(500);

fn settings() -> Settings {
    Settings {
        ack_wait: ACK_WAIT,
        max_deliver: 5,
        pause: Duration::from_millis(10),
        ..Settings::default()
    }
}

/// Two consumers in one group, and the observations of their deliveries.
struct Bench {
    server: NatsServer,
    broker: Broker,
    seen: Arc<Mutex<Seen>>,
    _consumers: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The number of runs of the handler for each payload.
    runs: HashMap<String, usize>,
    /// The number of handlers that run now.
    running: usize,
    /// The largest number of handlers that ran at the same time.
    most_running: usize,
    /// The handled payloads, in their order.
    handled: Vec<String>,
    /// The number of deliveries of each payload.
    deliveries: HashMap<String, usize>,
    in_flight: usize,
}

impl Bench {
    async fn start(settings: Settings) -> Self {
        let server = NatsServer::start();
        let broker = Broker::connect(&server.url(), settings).await.unwrap();
        let (seen, store) = (Arc::<Mutex<Seen>>::default(), MemoryStore::new());
        let mut consumers = JoinSet::new();
        for _ in 0..2 {
            let broker = Broker::connect(&server.url(), settings).await.unwrap();
            let (counting, handling) = (seen.clone(), seen.clone());
            let handler = service_fn(move |event| handle(handling.clone(), event));
            let receiver = ReceiverLayer::new(store.clone(), "delivery")
                .with_id(|event: &Event| event.id.clone())
                .with_payload(|event| &event.payload)
                .layer(handler);
            let decide = move |message: &Message, received: Result<Receipt<()>, ReceiveError<String>>| {
                let payload = String::from_utf8_lossy(&message.payload).into_owned();
                let mut seen = counting.lock().unwrap();
                *seen.deliveries.entry(payload).or_default() += 1;
                seen.in_flight += usize::from(matches!(received, Ok(Receipt::InFlight { .. })));
                Some(Disposition::of(&received))
            };
            consumers.spawn(async move { broker.consume(receiver, decide).await.unwrap() });
        }
        let collector = broker.clone();
        consumers.spawn(async move { collector.collect_dead_letters().await.unwrap() });
        Self {
            server,
            broker,
            seen,
            _consumers: consumers,
        }
    }

    async fn send(&self, id: &str, payload: &str) {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, id);
        self.broker.publish(headers, payload.to_owned()).await.unwrap();
    }

    async fn drain(&self) {
        for _ in 0..1_200 {
            // This fails while the broker is down.
            if self.broker.is_drained().await.is_ok_and(|is_drained| is_drained) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!(
            "the messages are not settled after 60 s: {:?}",
            self.seen.lock().unwrap()
        );
    }

    async fn dead(&self) -> Vec<String> {
        let dead = self.broker.dead().await.unwrap().into_iter();
        dead.map(|payload| String::from_utf8_lossy(&payload).into_owned())
            .collect()
    }
}

/// The handler. The payload `slow` takes three times the ack wait, and the payload `poison` always
/// fails.
async fn handle(seen: Arc<Mutex<Seen>>, event: Event) -> Result<(), String> {
    let payload = String::from_utf8_lossy(&event.payload).into_owned();
    {
        let mut seen = seen.lock().unwrap();
        *seen.runs.entry(payload.clone()).or_default() += 1;
        seen.running += 1;
        seen.most_running = seen.most_running.max(seen.running);
    }
    if payload == "slow" {
        tokio::time::sleep(ACK_WAIT * 3).await;
    }
    let mut seen = seen.lock().unwrap();
    seen.running -= 1;
    if payload == "poison" {
        return Err("this message always fails".to_owned());
    }
    seen.handled.push(payload);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_beyond_the_ack_wait_runs_once_although_its_message_comes_again() {
    let bench = Bench::start(Settings {
        reports_progress: false,
        max_deliver: 20,
        ..settings()
    })
    .await;
    bench.send("1", "slow").await;
    bench.drain().await;
    let seen = bench.seen.lock().unwrap();
    assert!(seen.deliveries["slow"] > 1 && seen.in_flight > 0, "{seen:?}");
    assert_eq!((seen.runs["slow"], seen.most_running), (1, 1));
    assert_eq!(seen.handled, ["slow"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_reports_its_progress_keeps_its_message_to_itself() {
    let bench = Bench::start(settings()).await;
    bench.send("1", "slow").await;
    bench.drain().await;
    let seen = bench.seen.lock().unwrap();
    assert_eq!((seen.deliveries["slow"], seen.runs["slow"]), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_message_ends_in_the_dead_letter_place_and_blocks_no_other() {
    let bench = Bench::start(settings()).await;
    bench.send("0", "poison").await;
    for message in 1..=100 {
        bench.send(&message.to_string(), &message.to_string()).await;
    }
    for _ in 0..600 {
        if !bench.dead().await.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bench.drain().await;
    assert_eq!(bench.dead().await, ["poison"]);
    let seen = bench.seen.lock().unwrap();
    assert_eq!(seen.runs["poison"], 5);
    assert_eq!(seen.handled.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_delivery_can_help_goes_to_the_dead_letter_place_at_once() {
    let bench = Bench::start(settings()).await;
    bench.send("1", "one").await;
    bench.drain().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    bench.send("1", "another").await;
    bench.broker.publish(HeaderMap::new(), "without an id").await.unwrap();
    let mut long = HeaderMap::new();
    long.insert("ce-source", "/long");
    long.insert("ce-id", "x".repeat(5_000));
    bench.broker.publish(long, "with a too long id").await.unwrap();
    bench.drain().await;
    let mut dead = bench.dead().await;
    dead.sort_unstable();
    assert_eq!(dead, ["another", "with a too long id", "without an id"]);
    let seen = bench.seen.lock().unwrap();
    assert_eq!(seen.handled, ["one"]);
    assert!(dead.iter().all(|payload| seen.deliveries[payload] == 1), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_vanishes_loses_nothing() {
    // Each delivery that finds the slow message in flight counts.
    let mut bench = Bench::start(Settings {
        max_deliver: 20,
        ..settings()
    })
    .await;
    for message in 1..=20 {
        bench.send(&message.to_string(), &message.to_string()).await;
    }
    bench.send("0", "slow").await;
    tokio::time::sleep(ACK_WAIT / 2).await;
    bench.server.restart();
    bench.drain().await;
    let seen = bench.seen.lock().unwrap();
    assert_eq!((seen.handled.len(), seen.runs["slow"]), (21, 1), "{seen:?}");
}
