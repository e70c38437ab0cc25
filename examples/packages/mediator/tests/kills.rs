//! The promised number of effects holds, although the test kills consumers at random, loses
//! acknowledgements, uses a short ack wait, and sends every message up to three times.
//!
//! `MESSAGES` sets the number of messages. The test kills a consumer for every 25 messages.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::Message;
use harness::{Consumer, DeliveryLog, Fleet, NatsServer, PostgresServer, RedisServer, Run, RunReport};
use mediator::{Broker, Event, Mediation, Party, Promise, Settings, Switches};
use tower::{Layer, Service, service_fn};
use tower_idempotency::receiver::{Disposition, MessageId, Receipt, ReceiveError, ReceiverLayer, ids};
use tower_idempotency::{BoxStore, MemoryStore};

/// The work of the consumers for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The mediator, with a third party that supports keys.
    Keys,
    /// The mediator, with a third party that ignores keys.
    NoKeys,
    /// An effect in the ledger, with the receiver's defaults.
    Refuse,
    /// An effect in the transaction that completes the record of the message.
    Transaction,
}

const MODES: [Mode; 4] = [Mode::Keys, Mode::NoKeys, Mode::Refuse, Mode::Transaction];

/// The lease. It is short, so that the messages of killed consumers are soon taken over.
const LEASE: Duration = Duration::from_secs(1);

fn settings() -> Settings {
    Settings {
        ack_wait: Duration::from_secs(1),
        max_deliver: 1_000,
        pause: Duration::from_millis(20),
        concurrency: 8,
        ..Settings::default()
    }
}

fn headers(message: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if message.is_multiple_of(2) {
        headers.insert(NATS_MESSAGE_ID, message.to_string());
    } else {
        headers.insert("ce-source", "/kills");
        headers.insert("ce-id", message.to_string());
    }
    headers
}

fn id(message: usize) -> MessageId {
    if message.is_multiple_of(2) {
        ids::nats(Some(message.to_string()))
    } else {
        ids::cloud_event("/kills", message.to_string())
    }
}

fn layer(store: BoxStore) -> ReceiverLayer<BoxStore, Event> {
    ReceiverLayer::new(store, "mediator")
        .with_id(|event: &Event| event.id.clone())
        .with_payload(|event| &event.payload)
        .with_lease(LEASE)
        .with_max_attempts(1_000)
}

/// Sends messages, kills consumers meanwhile, and waits until all messages are settled. Returns the
/// report, and the number of calls whose key the third party knew.
async fn run(mode: Mode, url: &str) -> (RunReport, usize) {
    let messages = harness::number_from("MESSAGES", 300);
    let (server, run) = (NatsServer::start(), Run::over(url).await);
    let switches = Switches {
        heeds_keys: mode == Mode::Keys,
        slowness: 20,
        loses_one_in: 20,
    };
    let party = Party::new(run.effects().clone(), switches);
    let orders = format!("http://{}/orders", party.serve().await.unwrap());
    let broker = Broker::connect(&server.url(), settings()).await.unwrap();
    let mut fleet = Fleet::start(2, || {
        let mut command = run.consumer(&server.url());
        command
            .env("CONSUME_MODE", format!("{mode:?}"))
            .env("CONSUME_ORDERS", &orders);
        command
    });
    let collector = broker.clone();
    tokio::spawn(async move { collector.collect_dead_letters().await });
    let mut sent = 0;
    for batch in harness::batches(messages) {
        tokio::time::sleep(Duration::from_millis(100) + harness::up_to(100)).await;
        for message in batch {
            broker.publish(headers(message), message.to_string()).await.unwrap();
            sent += 1;
        }
        fleet.kill_one();
    }
    harness::until("all messages are settled", async || {
        fleet.check();
        broker.is_drained().await.unwrap()
    })
    .await;
    let kills = fleet.kills();
    drop(fleet);
    let stored = broker.stored().await.unwrap();
    // The broker itself drops a copy that comes within about 100 ms.
    assert!(
        stored > sent * 9 / 10,
        "the broker stored only {stored} of {sent} copies"
    );

    let layer = layer(BoxStore::new(MemoryStore::new()));
    let key = |message| layer.storage_key(id(message)).unwrap();
    let report = run.report(messages, broker.dead().await.unwrap(), key).await;
    let repeated = party.repeated();
    eprintln!(
        "{mode:?}: {messages} messages in {stored} stored copies, {kills} kills, {repeated} repeated calls; {report}"
    );
    assert!(kills >= messages / 25);
    (report, repeated)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_party_that_heeds_keys_has_one_effect_each_over_redis() {
    let (report, repeated) = run(Mode::Keys, &RedisServer::start().url()).await;
    report.assert_one_effect_each();
    assert!(repeated > 0, "no call was repeated, so nothing was tested");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_party_that_heeds_keys_has_one_effect_each_over_postgres() {
    let (report, repeated) = run(Mode::Keys, &PostgresServer::start().url()).await;
    report.assert_one_effect_each();
    assert!(repeated > 0, "no call was repeated, so nothing was tested");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_party_without_keys_has_at_most_one_effect_each() {
    let (report, _) = run(Mode::NoKeys, &RedisServer::start().url()).await;
    report.assert_at_most_one_effect_each();
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_there_is_at_most_one_effect_each_over_redis() {
    let (report, _) = run(Mode::Refuse, &RedisServer::start().url()).await;
    report.assert_at_most_one_effect_each();
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_there_is_at_most_one_effect_each_over_postgres() {
    let (report, _) = run(Mode::Refuse, &PostgresServer::start().url()).await;
    report.assert_at_most_one_effect_each();
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_transaction_of_the_record_there_is_one_effect_each() {
    let (report, _) = run(Mode::Transaction, &PostgresServer::start().url()).await;
    report.assert_one_effect_each();
}

/// Not a test: consumes until the process is killed, if a [`Run`] has started this process.
#[test]
fn consume_if_started_by_a_run() {
    harness::run_consumer(async |consumer: Consumer| {
        let variable = |name: &str| std::env::var(name).unwrap();
        let mode = variable("CONSUME_MODE");
        let mode = MODES.into_iter().find(|known| format!("{known:?}") == mode).unwrap();
        let mediation = |promise| Mediation {
            url: variable("CONSUME_ORDERS"),
            promise,
            lease: LEASE,
            max_attempts: 1_000,
        };
        match mode {
            Mode::Keys => mediate(consumer, mediation(Promise::ExactlyOnce)).await,
            Mode::NoKeys => mediate(consumer, mediation(Promise::AtMostOnce)).await,
            Mode::Refuse => handle(consumer, layer).await,
            Mode::Transaction => {
                let in_transaction = |store| {
                    let layer = layer(store).at_least_once();
                    layer.pass_lease(|event, lease| event.lease = Some(lease))
                };
                handle(consumer, in_transaction).await;
            }
        }
    });
}

async fn mediate(consumer: Consumer, mediation: Mediation) {
    let mediator = mediation.over(consumer.store).unwrap();
    consume(&consumer.broker, consumer.log, mediator).await;
}

async fn handle(consumer: Consumer, layer: impl FnOnce(BoxStore) -> ReceiverLayer<BoxStore, Event>) {
    let work = consumer.work;
    let handler = service_fn(move |event: Event| {
        let work = work.clone();
        async move {
            work.take_effect(&String::from_utf8_lossy(&event.payload), event.lease)
                .await
        }
    });
    let receiver = layer(consumer.store).layer(handler);
    consume(&consumer.broker, consumer.log, receiver).await;
}

async fn consume<S, T, E>(broker: &str, log: DeliveryLog, receiver: S)
where
    S: Service<Event, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + 'static,
    S::Future: Send,
    T: Send + 'static,
    E: Send + 'static,
{
    let decide = move |message: &Message, received| {
        let is_first = message.info().unwrap().delivered == 1;
        log.record(is_first, &received, Disposition::of(&received))
    };
    let broker = Broker::connect(broker, settings()).await.unwrap();
    broker.consume(receiver, decide).await.unwrap();
}
