//! Messages whose effect is in PostgreSQL: handled in one transaction with it, and sent out of one.

#[path = "support/postgres.rs"]
mod postgres;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::{join_all, BoxFuture};
use futures::FutureExt;
use postgres::PostgresServer;
use sqlx::postgres::{PgConnection, PgPoolOptions};
use sqlx::PgPool;
use tower::{service_fn, Layer, ServiceExt};
use tower_idempotency::outbox::{Outbox, OutboxMessage, Published};
use tower_idempotency::receiver::{Disposition, Inbox, Lease, Receipt, ReceiveError, ReceiverLayer};
use tower_idempotency::{BoxStore, Error, ErrorKind, MemoryStore, OnError, PostgresStore, Store};

struct Bench {
    _server: PostgresServer,
    pool: PgPool,
    store: PostgresStore,
}

impl Bench {
    async fn new() -> Self {
        let server = PostgresServer::start();
        let pool = PgPoolOptions::new()
            .max_connections(40)
            .connect(&server.url())
            .await
            .unwrap();
        let store = PostgresStore::builder().with_pool(pool.clone()).unwrap();
        store.migrate().await.unwrap();
        let table = sqlx::raw_sql("CREATE TABLE effects (message text NOT NULL)");
        table.execute(&pool).await.unwrap();
        Self {
            _server: server,
            pool,
            store,
        }
    }

    async fn effects(&self, message: &str) -> i64 {
        let count = sqlx::query_scalar("SELECT count(*) FROM effects WHERE message = $1").bind(message);
        count.fetch_one(&self.pool).await.unwrap()
    }
}

async fn take_effect(connection: &mut PgConnection, message: &str) {
    let insert = sqlx::query("INSERT INTO effects (message) VALUES ($1)").bind(message.to_owned());
    insert.execute(connection).await.unwrap();
}

#[derive(Clone)]
struct Message {
    id: String,
    lease: Option<Lease>,
}

fn message(id: &str) -> Message {
    Message {
        id: id.to_owned(),
        lease: None,
    }
}

fn layer<St>(store: St) -> ReceiverLayer<St, Message> {
    ReceiverLayer::new(store, "billing")
        .with_id(|message: &Message| message.id.clone())
        .pass_lease(|message: &mut Message, lease| message.lease = Some(lease))
        .at_least_once()
}

/// What a handler does with its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Commit,
    CommitAndFail,
    CommitAndPanic,
    Forget,
    RollBackAndFail,
}

type Received = Result<Receipt<()>, ReceiveError<String>>;

async fn handle(pool: PgPool, message: Message, ending: Ending) -> Result<(), String> {
    let mut transaction = pool.begin().await.unwrap();
    take_effect(&mut transaction, &message.id).await;
    let completed = message.lease.unwrap().complete_in(&mut transaction).await;
    completed.map_err(|error| error.to_string())?;
    match ending {
        Ending::Commit => transaction.commit().await.map_err(|error| error.to_string()),
        Ending::CommitAndFail => {
            transaction.commit().await.unwrap();
            Err("the commit's reply was lost".to_owned())
        }
        Ending::CommitAndPanic => {
            transaction.commit().await.unwrap();
            panic!("the handler panics, as planned")
        }
        Ending::Forget => Ok(()),
        Ending::RollBackAndFail => {
            transaction.rollback().await.unwrap();
            Err("rolled back".to_owned())
        }
    }
}

async fn deliver<St: Store + Clone>(bench: &Bench, store: St, id: &str, ending: Ending) -> Received {
    let pool = bench.pool.clone();
    let handler = service_fn(move |message| handle(pool.clone(), message, ending));
    layer(store).layer(handler).oneshot(message(id)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn effect_and_receipt_are_there_together_or_not_at_all() {
    let bench = Bench::new().await;
    for (ending, handled) in [
        (Ending::Commit, true),
        (Ending::CommitAndFail, true),
        (Ending::CommitAndPanic, true),
        (Ending::Forget, false),
        (Ending::RollBackAndFail, false),
    ] {
        let id = format!("{ending:?}");
        let first = deliver(&bench, bench.store.clone(), &id, ending).await;
        match ending {
            Ending::Commit => assert!(matches!(first, Ok(Receipt::First(()))), "{first:?}"),
            // The record says that it took effect.
            Ending::CommitAndFail | Ending::CommitAndPanic => {
                assert!(matches!(first, Ok(Receipt::Duplicate)), "{first:?}");
            }
            Ending::Forget => assert!(matches!(first, Err(ReceiveError::Unrecorded(_))), "{first:?}"),
            Ending::RollBackAndFail => assert!(matches!(first, Err(ReceiveError::Handler(_))), "{first:?}"),
        }
        assert_eq!(
            Disposition::of(&first) == Disposition::Acknowledge,
            handled,
            "{ending:?}"
        );
        assert_eq!(bench.effects(&id).await, i64::from(handled), "{ending:?}");
        let again = deliver(&bench, bench.store.clone(), &id, Ending::Commit).await;
        assert_eq!(
            matches!(again, Ok(Receipt::Duplicate)),
            handled,
            "{ending:?}: {again:?}"
        );
        assert_eq!(bench.effects(&id).await, 1, "{ending:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_handler_rolls_back_and_acknowledges_the_others_work() {
    let bench = Bench::new().await;
    let (pool, store) = (bench.pool.clone(), bench.store.clone());
    let handler = service_fn(move |message: Message| {
        let (pool, store) = (pool.clone(), store.clone());
        async move {
            let mut transaction = pool.begin().await.unwrap();
            take_effect(&mut transaction, &message.id).await;
            // Meanwhile its lease runs out, and the message is handled by another.
            let lapse = sqlx::raw_sql("UPDATE idempotency_records SET lease_until = 0");
            lapse.execute(&pool).await.unwrap();
            let winner = service_fn(move |message| handle(pool.clone(), message, Ending::Commit));
            let other = layer(store).layer(winner);
            assert!(matches!(other.oneshot(message.clone()).await, Ok(Receipt::First(()))));
            let completed = message.lease.unwrap().complete_in(&mut transaction).await;
            let error = completed.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Superseded);
            Err::<(), _>(error.to_string())
        }
    });
    let loser = layer(bench.store.clone()).layer(handler).oneshot(message("m")).await;
    assert!(matches!(loser, Ok(Receipt::Duplicate)), "{loser:?}");
    assert_eq!(bench.effects("m").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_found_in_a_box_and_elsewhere_is_a_clear_error() {
    let bench = Bench::new().await;
    let boxed = deliver(&bench, BoxStore::new(bench.store.clone()), "boxed", Ending::Commit).await;
    assert!(matches!(boxed, Ok(Receipt::First(()))), "{boxed:?}");
    let shared = deliver(&bench, Arc::new(bench.store.clone()), "shared", Ending::Commit).await;
    assert!(matches!(shared, Ok(Receipt::First(()))), "{shared:?}");
    let elsewhere = deliver(&bench, MemoryStore::new(), "elsewhere", Ending::Commit).await;
    assert!(
        matches!(&elsewhere, Err(ReceiveError::Handler(error)) if error.contains("PostgresStore")),
        "{elsewhere:?}"
    );
    assert_eq!(bench.effects("elsewhere").await, 0);
}

/// Receives through the inbox, and commits if it is the first.
async fn receive(bench: &Bench, inbox: &Inbox, id: &str) -> Receipt<()> {
    let mut transaction = bench.pool.begin().await.unwrap();
    let receipt = inbox.receive(&mut transaction, id).await.unwrap();
    if receipt == Receipt::First(()) {
        take_effect(&mut transaction, id).await;
        transaction.commit().await.unwrap();
    }
    receipt
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inbox_lets_each_message_through_once_however_many_come_at_once() {
    let bench = Bench::new().await;
    let inbox = Inbox::new(bench.store.clone(), "billing");
    for id in ["a", "b", "c"] {
        let receipts = join_all((0..30).map(|_| receive(&bench, &inbox, id))).await;
        let firsts = receipts
            .iter()
            .filter(|receipt| **receipt == Receipt::First(()))
            .count();
        let duplicates = receipts
            .iter()
            .filter(|receipt| **receipt == Receipt::Duplicate)
            .count();
        assert_eq!((firsts, duplicates), (1, 29));
        assert_eq!(bench.effects(id).await, 1);
    }
    // A rollback leaves nothing behind.
    let mut transaction = bench.pool.begin().await.unwrap();
    assert_eq!(inbox.receive(&mut transaction, "d").await.unwrap(), Receipt::First(()));
    take_effect(&mut transaction, "d").await;
    transaction.rollback().await.unwrap();
    assert_eq!(receive(&bench, &inbox, "d").await, Receipt::First(()));
    assert_eq!(bench.effects("d").await, 1);
    // Another consumer, another namespace; and the layer of the same consumer knows what the inbox does.
    assert_eq!(
        receive(&bench, &Inbox::new(bench.store.clone(), "shipping"), "a").await,
        Receipt::First(())
    );
    assert_eq!(
        receive(&bench, &inbox.clone().with_namespace("test"), "a").await,
        Receipt::First(())
    );
    let layered = deliver(&bench, bench.store.clone(), "a", Ending::Commit).await;
    assert!(matches!(layered, Ok(Receipt::Duplicate)), "{layered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inbox_refuses_what_has_no_id_or_a_huge_one() {
    let bench = Bench::new().await;
    let inbox = Inbox::new(bench.store.clone(), "billing");
    let mut connection = bench.pool.acquire().await.unwrap();
    let missing = inbox.receive(&mut connection, None::<String>).await;
    assert!(matches!(missing, Err(ReceiveError::MissingId)));
    let huge = inbox.receive(&mut connection, "x".repeat(5_000)).await;
    assert!(matches!(huge, Err(ReceiveError::InvalidId(_))));
}

/// Takes what it is told to publish, or fails.
#[derive(Clone, Default)]
struct Broker {
    got: Arc<Mutex<Vec<OutboxMessage>>>,
    refused: Arc<Mutex<HashMap<String, usize>>>,
}

impl Broker {
    fn publish(
        &self,
    ) -> impl Fn(OutboxMessage) -> BoxFuture<'static, Result<(), &'static str>> + Send + Sync + 'static {
        let broker = self.clone();
        move |message| {
            let broker = broker.clone();
            async move {
                tokio::task::yield_now().await;
                if let Some(left) = broker
                    .refused
                    .lock()
                    .unwrap()
                    .get_mut(message.topic())
                    .filter(|left| **left > 0)
                {
                    *left -= 1;
                    return Err("not now");
                }
                broker.got.lock().unwrap().push(message);
                Ok(())
            }
            .boxed()
        }
    }

    fn topics(&self) -> Vec<String> {
        let got = self.got.lock().unwrap();
        got.iter().map(|message| message.topic().to_owned()).collect()
    }
}

async fn put(bench: &Bench, outbox: &Outbox, message: &OutboxMessage) -> bool {
    let mut transaction = bench.pool.begin().await.unwrap();
    let is_new = outbox.put(&mut transaction, message).await.unwrap();
    transaction.commit().await.unwrap();
    is_new
}

fn published(published: u32, failed: u32) -> Published {
    let mut count = Published::default();
    (count.published, count.failed) = (published, failed);
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_published_as_it_was_put_if_its_transaction_is_committed() {
    let bench = Bench::new().await;
    let outbox = Outbox::new(bench.pool.clone());
    join_all((0..8).map(|_| outbox.migrate()))
        .await
        .into_iter()
        .for_each(Result::unwrap);
    let broker = Broker::default();
    let relay = outbox.relay(broker.publish());
    let message = OutboxMessage::new("orders.paid", vec![0, 0xff, 7])
        .add_header("trace", "1")
        .add_header("trace", "\u{e4} \"{},\\")
        .with_id("paid-7");
    let mut transaction = bench.pool.begin().await.unwrap();
    outbox.put(&mut transaction, &message).await.unwrap();
    assert_eq!(
        relay.publish_once().await.unwrap(),
        published(0, 0),
        "it is not committed yet"
    );
    transaction.rollback().await.unwrap();
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 0));

    assert!(put(&bench, &outbox, &message).await);
    assert!(!put(&bench, &outbox, &message).await, "it waits already");
    assert_eq!(outbox.waiting().await.unwrap(), 1);
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 0));
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 0));
    assert_eq!(outbox.waiting().await.unwrap(), 0);
    assert_eq!(*broker.got.lock().unwrap(), [message]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_published_waits_and_holds_nothing_up() {
    let bench = Bench::new().await;
    let outbox = Outbox::in_table(bench.pool.clone(), "public.outgoing").unwrap();
    outbox.migrate().await.unwrap();
    let broker = Broker::default();
    broker.refused.lock().unwrap().insert("poison".to_owned(), 2);
    let pause = Duration::from_millis(1);
    let (publish, panics) = (broker.publish(), Arc::new(Mutex::new(2)));
    let publish = move |message: OutboxMessage| {
        let mut left = panics.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if message.topic() == "panic" && *left > 0 {
            *left -= 1;
            panic!("the publisher panics, as planned");
        }
        publish(message)
    };
    let relay = outbox.relay(publish).with_pauses(pause, pause);
    for topic in ["poison", "a", "panic", "b"] {
        assert!(put(&bench, &outbox, &OutboxMessage::new(topic, "x")).await);
    }
    assert_eq!(relay.publish_once().await.unwrap(), published(2, 2));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 2));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(relay.publish_once().await.unwrap(), published(2, 0));
    assert_eq!(broker.topics()[..2], ["a", "b"]);
    let got = broker.got.lock().unwrap()[2..].to_vec();
    assert!(
        got.len() == 2 && got.iter().all(|message| message.failures() == 2),
        "{got:?}"
    );

    // With the pauses that are set by default it is not tried again at once.
    broker.refused.lock().unwrap().insert("poison".to_owned(), 1);
    assert!(put(&bench, &outbox, &OutboxMessage::new("poison", "x")).await);
    let patient = outbox.relay(broker.publish());
    assert_eq!(patient.publish_once().await.unwrap(), published(0, 1));
    assert_eq!(patient.publish_once().await.unwrap(), published(0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn relays_share_the_work_and_a_relay_that_dies_has_its_messages_published_again() {
    const MESSAGES: usize = 300;
    let bench = Bench::new().await;
    let outbox = Outbox::new(bench.pool.clone());
    outbox.migrate().await.unwrap();
    for number in 0..MESSAGES {
        assert!(put(&bench, &outbox, &OutboxMessage::new(number.to_string(), "x")).await);
    }
    let broker = Broker::default();
    let relay = || {
        outbox
            .relay(broker.publish())
            .with_batch(7)
            .with_interval(Duration::from_millis(5))
    };
    // Half-way through a batch, dropped.
    let mut dying = Box::pin({
        let relay = relay();
        async move { relay.publish_once().await.unwrap() }
    });
    while broker.got.lock().unwrap().len() < 3 {
        assert!(futures::poll!(&mut dying).is_pending());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(dying);
    let seen_by_the_dead = broker.topics();
    let relays: Vec<_> = (0..4).map(|_| tokio::spawn(relay().run())).collect();
    while outbox.waiting().await.unwrap() > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    relays.iter().for_each(tokio::task::JoinHandle::abort);
    let mut copies: HashMap<String, Vec<String>> = HashMap::new();
    for message in broker.got.lock().unwrap().iter() {
        copies
            .entry(message.topic().to_owned())
            .or_default()
            .push(message.id().to_owned());
    }
    assert_eq!(copies.len(), MESSAGES, "none is lost");
    for (topic, ids) in &copies {
        let expected = if seen_by_the_dead.contains(topic) { 2 } else { 1 };
        assert_eq!(ids.len(), expected, "{topic}");
        assert!(ids.iter().all(|id| *id == ids[0]), "every copy has the same id");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_out_twice_comes_in_once() {
    let bench = Bench::new().await;
    let outbox = Outbox::new(bench.pool.clone());
    outbox.migrate().await.unwrap();
    assert!(put(&bench, &outbox, &OutboxMessage::new("orders", "x").with_id("paid-7")).await);
    let inbox = Inbox::new(bench.store.clone(), "shipping");
    let (pool, receipts) = (bench.pool.clone(), Arc::new(Mutex::new(Vec::new())));
    let noted = Arc::clone(&receipts);
    // Its acknowledgement is lost the first time.
    let relay = outbox.relay(move |message: OutboxMessage| {
        let (pool, inbox, noted) = (pool.clone(), inbox.clone(), Arc::clone(&noted));
        async move {
            let mut transaction = pool.begin().await.unwrap();
            let receipt = inbox.receive(&mut transaction, message.id()).await.unwrap();
            if receipt == Receipt::First(()) {
                take_effect(&mut transaction, message.id()).await;
                transaction.commit().await.unwrap();
            }
            noted.lock().unwrap().push(receipt);
            if message.failures() == 0 {
                Err("lost")
            } else {
                Ok(())
            }
        }
    });
    let relay = relay.with_pauses(Duration::from_millis(1), Duration::from_millis(1));
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 1));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 0));
    assert_eq!(*receipts.lock().unwrap(), [Receipt::First(()), Receipt::Duplicate]);
    assert_eq!(bench.effects("paid-7").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_says_what_is_wrong() {
    let bench = Bench::new().await;
    let wrong = Outbox::in_table(bench.pool.clone(), "a table").unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::Configuration);
    let outbox = Outbox::new(bench.pool.clone());
    let missing: Error = outbox.waiting().await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Configuration, "{missing}");
    assert!(missing.to_string().contains("migrate"), "{missing}");
    outbox.migrate().await.unwrap();
    let mut connection = bench.pool.acquire().await.unwrap();
    let nameless = outbox
        .put(&mut connection, &OutboxMessage::new("t", "x").with_id(""))
        .await
        .unwrap_err();
    assert_eq!(nameless.kind(), ErrorKind::Configuration);
    assert!(outbox
        .schema()
        .contains("CREATE TABLE IF NOT EXISTS \"idempotency_outbox\""));
    let shown = format!("{outbox:?} {:?}", OutboxMessage::new("t", "secret").with_id("secret"));
    assert!(!shown.contains("secret"), "{shown}");
}

/// A handler may retry its transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_failed_leaves_the_lease_renewed() {
    let bench = Bench::new().await;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (pool, now, top) = (bench.pool.clone(), Arc::clone(&running), Arc::clone(&most));
    let layer = layer(bench.store.clone()).with_lease(Duration::from_secs(2));
    let receiver = layer.layer(service_fn(move |message: Message| {
        let (pool, now, top) = (pool.clone(), Arc::clone(&now), Arc::clone(&top));
        async move {
            top.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let lease = message.lease.unwrap();
            let mut transaction = pool.begin().await.unwrap();
            let fails = sqlx::query("SELECT 1 / 0").execute(&mut *transaction).await;
            assert!(fails.is_err());
            assert!(lease.complete_in(&mut transaction).await.is_err());
            transaction.rollback().await.unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
            let mut transaction = pool.begin().await.unwrap();
            take_effect(&mut transaction, &message.id).await;
            let completed = lease.complete_in(&mut transaction).await;
            now.fetch_sub(1, Ordering::SeqCst);
            completed.map_err(|error| error.to_string())?;
            transaction.commit().await.map_err(|error| error.to_string())
        }
    }));
    let first = tokio::spawn(receiver.clone().oneshot(message("m")));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let second = receiver.oneshot(message("m")).await;
    let first = first.await.unwrap();
    assert!(
        matches!(
            (&first, &second),
            (Ok(Receipt::First(())), Ok(Receipt::InFlight { .. }))
        ),
        "{first:?}, {second:?}"
    );
    assert_eq!((most.load(Ordering::SeqCst), bench.effects("m").await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_that_counts_as_handled_does_so_after_a_rollback_too() {
    let bench = Bench::new().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let (pool, counted) = (bench.pool.clone(), Arc::clone(&runs));
    let layer = layer(bench.store.clone()).on_error(OnError::Keep);
    let receiver = layer.layer(service_fn(move |message: Message| {
        counted.fetch_add(1, Ordering::SeqCst);
        handle(pool.clone(), message, Ending::RollBackAndFail)
    }));
    assert!(receiver.clone().oneshot(message("m")).await.is_err());
    let again = receiver.oneshot(message("m")).await;
    assert!(matches!(again, Ok(Receipt::Duplicate)), "{again:?}");
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}
