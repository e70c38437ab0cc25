//! Consumers that are killed at random, acknowledgements that are lost, a short ack wait, every message sent up to three times: and
//! still the effects are as many as is promised.
//!
//! `MESSAGES=10000` makes it longer; some consumer is killed for every 25 of them.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::Message;
use async_nats::HeaderMap;
use harness::{Fleet, Folder, Ledger, NatsServer, PostgresServer, RedisServer, Told};
use mediator::{disposition, Broker, Event, Mediation, Party, Promise, Settings, Switches};
use sqlx::PgPool;
use tower::{service_fn, Layer, Service};
use tower_idempotency::protocol::Status;
use tower_idempotency::receiver::{ids, Disposition, MessageId, Receipt, ReceiveError, ReceiverLayer};
use tower_idempotency::{BoxStore, Error, Store};

/// What the consumers do with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The mediator, at a third party that heeds keys.
    Keys,
    /// The mediator, at a third party that heeds none.
    NoKeys,
    /// An effect in the ledger, under the receiver's defaults.
    Refuse,
    /// An effect in the transaction that records the message.
    Transaction,
}

const MODES: [Mode; 4] = [Mode::Keys, Mode::NoKeys, Mode::Refuse, Mode::Transaction];

/// Short, so that what was killed is soon delivered again, and soon lost.
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
        .pass_lease(|event: &mut Event, lease| event.lease = Some(lease))
}

/// What came of a run.
struct Seen {
    messages: usize,
    /// How many deliveries got each receipt.
    receipts: BTreeMap<String, usize>,
    /// Effects of each message.
    effects: BTreeMap<String, usize>,
    /// Messages whose record says that they were handled.
    handled: HashSet<usize>,
    /// Messages in the dead-letter place.
    dead: HashSet<usize>,
    /// Calls that the third party knew already.
    repeated: usize,
}

impl Seen {
    fn effects(&self, message: usize) -> usize {
        self.effects.get(&message.to_string()).copied().unwrap_or(0)
    }

    fn receipts(&self, name: &str) -> usize {
        self.receipts.get(name).copied().unwrap_or(0)
    }
}

/// Sends messages while the consumers are killed, and waits until all are settled.
async fn run(mode: Mode, url: &str) -> Seen {
    let messages = harness::number_from("MESSAGES", 300);
    let (server, folder) = (NatsServer::start(), Folder::new("kills"));
    let (effects, told) = (Ledger::open(&folder.file("effects")), Told::open(&folder.file("told")));
    let switches = Switches {
        heeds_keys: mode == Mode::Keys,
        slowness: 20,
        loses_one_in: 20,
    };
    let party = Party::new(effects.clone(), switches);
    let orders = format!("http://{}/orders", party.serve().await.unwrap());
    // The first one also makes the table, where there is one.
    let store = BoxStore::from_url(url).await.unwrap();
    if mode == Mode::Transaction {
        let pool = PgPool::connect(url).await.unwrap();
        let table = sqlx::raw_sql("CREATE TABLE effects (message text NOT NULL)");
        table.execute(&pool).await.unwrap();
    }
    let broker = Broker::connect(&server.url(), settings()).await.unwrap();
    let mut fleet = Fleet::start(2, || {
        let mut command = harness::this_test("consume_if_told");
        command
            .env("CONSUME_MODE", format!("{mode:?}"))
            .env("CONSUME_BROKER", server.url())
            .env("CONSUME_STORE", url)
            .env("CONSUME_ORDERS", &orders)
            .env("CONSUME_EFFECTS", folder.file("effects"))
            .env("CONSUME_TOLD", folder.file("told"));
        command
    });
    let undertaker = broker.clone();
    tokio::spawn(async move { undertaker.bury_given_up().await });
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
    assert!(stored > sent * 9 / 10, "of {sent} copies the broker has kept {stored}");

    let mut seen = Seen {
        messages,
        receipts: told.receipts(),
        effects: effects.counts(),
        handled: HashSet::new(),
        dead: HashSet::new(),
        repeated: party.repeated(),
    };
    for payload in broker.dead().await.unwrap() {
        seen.dead.insert(String::from_utf8_lossy(&payload).parse().unwrap());
    }
    let layer = layer(store.clone());
    for message in 0..messages {
        let record = store.peek(&layer.storage_key(id(message)).unwrap()).await.unwrap();
        if record.is_some_and(|record| matches!(record.status, Status::Completed(_))) {
            seen.handled.insert(message);
        }
    }
    if mode == Mode::Transaction {
        let pool = PgPool::connect(url).await.unwrap();
        let rows = sqlx::query_as::<_, (String, i64)>("SELECT message, count(*) FROM effects GROUP BY message");
        for (message, count) in rows.fetch_all(&pool).await.unwrap() {
            seen.effects.insert(message, count.try_into().unwrap());
        }
    }
    let redelivered = told.redeliveries();
    eprintln!(
        "{mode:?} over {}: {messages} messages stored {stored} times, {kills} kills, {redelivered} redeliveries, {} dead, \
         calls repeated {} times; {:?}",
        url.split(':').next().unwrap_or_default(),
        seen.dead.len(),
        seen.repeated,
        seen.receipts,
    );
    assert!(kills >= messages / 25 && redelivered > 0 && seen.receipts("Duplicate") > 0);
    for message in 0..messages {
        let (handled, dead) = (seen.handled.contains(&message), seen.dead.contains(&message));
        assert!(handled || dead, "{message} was lost");
    }
    seen
}

fn exactly_one_each(seen: &Seen) {
    for message in 0..seen.messages {
        assert_eq!(seen.effects(message), 1, "{message}");
    }
    assert_eq!(seen.dead, HashSet::new());
}

fn at_most_one_each(seen: &Seen) {
    for message in 0..seen.messages {
        let effects = seen.effects(message);
        assert!(effects <= 1, "{message}: {effects}");
        if seen.handled.contains(&message) && !seen.dead.contains(&message) {
            assert_eq!(effects, 1, "{message} was handled");
        }
    }
    // Some were killed between their claim and their record.
    assert!(!seen.dead.is_empty(), "nothing was lost, so that nothing was refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_party_that_heeds_keys_has_one_effect_each_over_redis() {
    let seen = run(Mode::Keys, &RedisServer::start().url()).await;
    exactly_one_each(&seen);
    assert!(seen.repeated > 0, "no key was sent twice, so that none was needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_party_that_heeds_keys_has_one_effect_each_over_postgres() {
    let seen = run(Mode::Keys, &PostgresServer::start().url()).await;
    exactly_one_each(&seen);
    assert!(seen.repeated > 0, "no key was sent twice, so that none was needed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_party_without_keys_has_at_most_one_effect_each() {
    at_most_one_each(&run(Mode::NoKeys, &RedisServer::start().url()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_there_is_at_most_one_effect_each_over_redis() {
    at_most_one_each(&run(Mode::Refuse, &RedisServer::start().url()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_there_is_at_most_one_effect_each_over_postgres() {
    at_most_one_each(&run(Mode::Refuse, &PostgresServer::start().url()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_transaction_of_the_record_there_is_one_effect_each() {
    exactly_one_each(&run(Mode::Transaction, &PostgresServer::start().url()).await);
}

/// No test: consumes until it is killed, where [`run`] has started this process.
#[test]
fn consume_if_told() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let Ok(mode) = std::env::var("CONSUME_MODE") else {
        return;
    };
    let mode = MODES.into_iter().find(|known| format!("{known:?}") == mode).unwrap();
    let effects = Ledger::open(variable("CONSUME_EFFECTS").as_ref());
    let told = Told::open(variable("CONSUME_TOLD").as_ref());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let url = variable("CONSUME_STORE");
        let store = BoxStore::from_url(&url).await.unwrap();
        let broker = Broker::connect(&variable("CONSUME_BROKER"), settings()).await.unwrap();
        match mode {
            Mode::Keys | Mode::NoKeys => {
                let mediation = Mediation {
                    url: variable("CONSUME_ORDERS"),
                    promise: if mode == Mode::Keys {
                        Promise::ExactlyOnce
                    } else {
                        Promise::AtMostOnce
                    },
                    lease: LEASE,
                    max_attempts: 1_000,
                };
                consume(&broker, told, mediation.over(store).unwrap(), disposition).await;
            }
            Mode::Refuse => {
                let handler = service_fn(move |event: Event| {
                    let effects = effects.clone();
                    async move {
                        pause().await;
                        effects.enter(&String::from_utf8_lossy(&event.payload));
                        pause().await;
                        Ok::<_, Error>(())
                    }
                });
                consume(&broker, told, layer(store).layer(handler), Disposition::of).await;
            }
            Mode::Transaction => {
                let pool = PgPool::connect(&url).await.unwrap();
                let handler = service_fn(move |event| take_effect(pool.clone(), event));
                let receiver = layer(store).at_least_once().layer(handler);
                consume(&broker, told, receiver, Disposition::of).await;
            }
        }
    });
}

/// Consumes until the process is killed.
async fn consume<S, T, E>(
    broker: &Broker,
    told: Told,
    receiver: S,
    disposition: fn(&Result<Receipt<T>, ReceiveError<E>>) -> Disposition,
) where
    S: Service<Event, Response = Receipt<T>, Error = ReceiveError<E>> + Clone + Send + 'static,
    S::Future: Send,
    T: Send + 'static,
    E: Send + 'static,
{
    let decide = move |message: &Message, received| {
        let is_first = message.info().unwrap().delivered == 1;
        told.note(is_first, &received, disposition(&received))
    };
    broker.consume(receiver, decide).await.unwrap();
}

async fn pause() {
    tokio::time::sleep(harness::up_to(20)).await;
}

async fn take_effect(pool: PgPool, event: Event) -> Result<(), mediator::Error> {
    pause().await;
    let mut transaction = pool.begin().await?;
    let message = String::from_utf8_lossy(&event.payload).into_owned();
    let insert = sqlx::query("INSERT INTO effects (message) VALUES ($1)").bind(message);
    insert.execute(&mut *transaction).await?;
    pause().await;
    event.lease.ok_or("no lease")?.complete_in(&mut transaction).await?;
    transaction.commit().await?;
    Ok(())
}
