//! Messages that leave with a transaction, whatever happens to the relay that publishes them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::Notify;
use tower_idempotency::outbox::{Outbox, OutboxMessage, Published};
use tower_idempotency::receiver::{Inbox, Receipt};
use tower_idempotency::{Error, ErrorKind, PostgresStore};

use crate::support::postgres::PostgresServer;
use crate::support::proxy::{Direction, Fate, Proxy};

struct Bench {
    _server: PostgresServer,
    pool: PgPool,
}

impl Bench {
    async fn new() -> Self {
        Self::with_connections(40).await
    }

    async fn with_connections(count: u32) -> Self {
        let server = PostgresServer::start();
        let pool = PgPoolOptions::new().max_connections(count).connect(&server.url()).await;
        Self {
            _server: server,
            pool: pool.unwrap(),
        }
    }

    /// Makes an outbox with one message for each of the topics.
    async fn outbox(&self, topics: &[&str]) -> Outbox {
        let outbox = Outbox::new(self.pool.clone());
        outbox.migrate().await.unwrap();
        for topic in topics {
            assert!(put(self, &outbox, &OutboxMessage::new(*topic, "x")).await);
        }
        outbox
    }

    async fn execute(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&self.pool).await.unwrap();
    }

    /// Returns the time of the server, in seconds.
    async fn clock(&self) -> f64 {
        let clock = "SELECT extract(epoch FROM clock_timestamp())::float8";
        sqlx::query_scalar(clock).fetch_one(&self.pool).await.unwrap()
    }

    async fn number(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.unwrap()
    }
}

/// Collects the messages that it publishes, or fails.
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
    assert!(
        !put(&bench, &outbox, &message).await,
        "a message with this id waits already"
    );
    assert_eq!(outbox.waiting().await.unwrap(), 1);
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 0));
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 0));
    assert_eq!(outbox.waiting().await.unwrap(), 0);
    let got = broker.got.lock().unwrap();
    assert_eq!(*got, [message]);
    assert_eq!(
        (got[0].id(), got[0].topic(), got[0].failures()),
        ("paid-7", "orders.paid", 0)
    );
    let headers = [("trace", "1"), ("trace", "\u{e4} \"{},\\")];
    assert_eq!(
        *got[0].headers(),
        headers.map(|(name, content)| (name.to_owned(), content.to_owned()))
    );
    assert_eq!(got[0].payload()[..], [0, 0xff, 7]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_published_waits_and_delays_no_other() {
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
            panic!("the publisher panics");
        }
        publish(message)
    };
    let relay = outbox
        .relay(publish)
        .with_initial_backoff(pause)
        .with_max_backoff(pause);
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

    // With the default backoff, the relay does not try it again at once.
    broker.refused.lock().unwrap().insert("poison".to_owned(), 1);
    assert!(put(&bench, &outbox, &OutboxMessage::new("poison", "x")).await);
    let patient = outbox.relay(broker.publish());
    assert_eq!(patient.publish_once().await.unwrap(), published(0, 1));
    let patient = "SELECT count(*) FROM public.outgoing WHERE publish_at > put_at + interval '1 s'";
    assert_eq!(bench.number(patient).await, 1);
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
    // A relay that is dropped in the middle of a batch.
    let mut dying = Box::pin({
        let pause = Duration::from_millis(10);
        let relay = relay()
            .with_lease(Duration::from_secs(3))
            .with_initial_backoff(pause)
            .with_max_backoff(pause);
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
    assert_eq!(copies.len(), MESSAGES, "no message is lost");
    for (topic, ids) in &copies {
        let expected = if seen_by_the_dead.contains(topic) { 2 } else { 1 };
        assert_eq!(ids.len(), expected, "{topic}");
        assert!(ids.iter().all(|id| *id == ids[0]), "every copy has the same id");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_published_twice_is_handled_once() {
    let bench = Bench::new().await;
    let outbox = Outbox::new(bench.pool.clone());
    outbox.migrate().await.unwrap();
    assert!(put(&bench, &outbox, &OutboxMessage::new("orders", "x").with_id("paid-7")).await);
    let store = PostgresStore::builder().with_pool(bench.pool.clone()).unwrap();
    store.migrate().await.unwrap();
    bench.execute("CREATE TABLE effects (message text NOT NULL)").await;
    let inbox = Inbox::new(store, "shipping");
    let (pool, receipts) = (bench.pool.clone(), Arc::new(Mutex::new(Vec::new())));
    let noted = Arc::clone(&receipts);
    // The first acknowledgement is lost.
    let relay = outbox.relay(move |message: OutboxMessage| {
        let (pool, inbox, noted) = (pool.clone(), inbox.clone(), Arc::clone(&noted));
        async move {
            let mut transaction = pool.begin().await.unwrap();
            let receipt = inbox.receive(&mut transaction, message.id()).await.unwrap();
            if receipt == Receipt::First(()) {
                let effect = sqlx::query("INSERT INTO effects VALUES ($1)").bind(message.id().to_owned());
                effect.execute(&mut *transaction).await.unwrap();
                transaction.commit().await.unwrap();
            }
            noted.lock().unwrap().push(receipt);
            if message.failures() == 0 { Err("lost") } else { Ok(()) }
        }
    });
    let relay = relay
        .with_initial_backoff(Duration::from_millis(1))
        .with_max_backoff(Duration::from_millis(1));
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 1));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 0));
    assert_eq!(*receipts.lock().unwrap(), [Receipt::First(()), Receipt::Duplicate]);
    assert_eq!(bench.number("SELECT count(*) FROM effects").await, 1);
}

/// `CREATE TABLE IF NOT EXISTS` needs the right to make a table even if the table exists.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rights_suffice() {
    let bench = Bench::new().await;
    bench.outbox(&[]).await;
    let source = include_str!("../../src/outbox/mod.rs");
    let grants = source.lines().filter(|line| line.starts_with("//! GRANT "));
    let grants: String = grants.map(|line| line.trim_start_matches("//!")).collect();
    assert_eq!(grants.matches("GRANT").count(), 2);
    bench
        .execute("CREATE ROLE web LOGIN; REVOKE ALL ON SCHEMA public FROM public")
        .await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(grants))
        .execute(&bench.pool)
        .await
        .unwrap();
    let url = bench._server.url().replace("app@", "web@");
    let pool = PgPoolOptions::new().connect(&url).await.unwrap();
    let outbox = Outbox::new(pool.clone());
    outbox.migrate().await.unwrap();
    let mut connection = pool.acquire().await.unwrap();
    for _ in 0..2 {
        outbox
            .put(&mut connection, &OutboxMessage::new("t", "x").with_id("7"))
            .await
            .unwrap();
    }
    let broker = Broker::default();
    let relay = outbox.relay(|_| async { Err("not now") });
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 1));
    bench.execute("UPDATE idempotency_outbox SET publish_at = now()").await;
    assert_eq!(
        outbox.relay(broker.publish()).publish_once().await.unwrap(),
        published(1, 0)
    );
    assert_eq!(outbox.waiting().await.unwrap(), 0);
    bench
        .execute("REVOKE UPDATE, DELETE ON idempotency_outbox FROM web")
        .await;
    outbox
        .put(&mut connection, &OutboxMessage::new("t", "x"))
        .await
        .unwrap();
    let error = outbox.relay(broker.publish()).publish_once().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    bench.execute("DROP TABLE idempotency_outbox").await;
    let error = outbox.migrate().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains("may not make it"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_reports_the_cause_of_its_errors() {
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
    assert!(
        outbox
            .schema()
            .contains("CREATE TABLE IF NOT EXISTS \"idempotency_outbox\"")
    );
    let message = OutboxMessage::new("t", "secret").with_id("secret");
    let relay = outbox.relay(());
    let shown = format!("{outbox:?} {message:?} {relay:?}");
    for part in ["Outbox {", "OutboxMessage { topic: \"t\"", "Relay { interval: 1s"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(!shown.contains("secret"), "{shown}");
}

const SHORT: Duration = Duration::from_millis(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_relay_does_not_block_the_others() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["before", "poison", "behind"]).await;
    let got: Mutex<Vec<String>> = Mutex::default();
    let times = |topic| got.lock().unwrap().iter().filter(|got| *got == topic).count();
    for _ in 0..20 {
        let note = |topic: &str| got.lock().unwrap().push(topic.to_owned());
        die_at(&outbox, "poison", (Duration::from_secs(60), SHORT), note).await;
        if times("behind") > 0 && times("poison") > 2 {
            break;
        }
        // The lease passes, and then the backoff.
        bench
            .execute(
                "UPDATE idempotency_outbox SET publish_at = publish_at - interval '60 s' WHERE taken_at IS NOT NULL",
            )
            .await;
        tokio::time::sleep(SHORT * 5).await;
    }
    assert!(times("poison") > 2, "{got:?}");
    assert_eq!((times("before"), times("behind")), (2, 1), "{got:?}");
    assert_eq!(outbox.waiting().await.unwrap(), 1);
}

/// Looks once at the outbox, with a lease and a first backoff, and dies while it publishes the
/// message for this topic.
async fn die_at(
    outbox: &Outbox,
    poison: &'static str,
    (lease, pause): (Duration, Duration),
    note: impl Fn(&str) + Send + Sync,
) {
    let dead = Arc::new(Notify::new());
    let dies = Arc::clone(&dead);
    let relay = outbox.relay(move |message: OutboxMessage| {
        note(message.topic());
        let dies = Arc::clone(&dies);
        async move {
            if message.topic() == poison {
                dies.notify_one();
                std::future::pending::<()>().await;
            }
            Ok::<_, &str>(())
        }
    });
    let relay = relay
        .with_lease(lease)
        .with_initial_backoff(pause)
        .with_max_backoff(pause * 3);
    tokio::select! {
        count = relay.publish_once() => assert_eq!(count.unwrap().failed, 0),
        () = dead.notified() => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_relays_pauses_for_longer_each_time() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["poison"]).await;
    let mut pauses = Vec::new();
    for _ in 0..4 {
        let times = (Duration::from_secs(60), Duration::from_secs(100));
        die_at(&outbox, "poison", times, |_| {}).await;
        let pause = "SELECT extract(epoch FROM publish_at - clock_timestamp())::bigint FROM idempotency_outbox";
        pauses.push(bench.number(pause).await);
        bench.execute("UPDATE idempotency_outbox SET publish_at = now()").await;
    }
    // The lease plus the backoff.
    for (pause, expected) in pauses.iter().zip([160, 260, 360, 360]) {
        assert!((expected - 20..=expected).contains(pause), "{pauses:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_transaction_is_open_while_a_message_is_published() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a"]).await;
    let open = Arc::new(Mutex::new(None));
    let (pool, noted) = (bench.pool.clone(), Arc::clone(&open));
    let relay = outbox.relay(move |_| {
        let (pool, noted) = (pool.clone(), Arc::clone(&noted));
        async move {
            let query = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
            let count: i64 = sqlx::query_scalar(query).fetch_one(&pool).await?;
            *noted.lock().unwrap() = Some(count);
            Ok::<_, sqlx::Error>(())
        }
    });
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 0));
    assert_eq!(*open.lock().unwrap(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_failed_without_killing_its_relay_is_tried_again_in_a_batch() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a", "b", "c"]).await;
    let broker = Broker::default();
    for topic in ["a", "b", "c"] {
        broker.refused.lock().unwrap().insert(topic.to_owned(), 1);
    }
    let relay = outbox
        .relay(broker.publish())
        .with_initial_backoff(SHORT)
        .with_max_backoff(SHORT);
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 3));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(relay.publish_once().await.unwrap(), published(3, 0));
}

/// A relay that is slow with every message, and the messages that it began.
fn slow(outbox: &Outbox, each: Duration) -> (impl Future<Output = Published>, Arc<Mutex<Vec<String>>>) {
    let begun = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&begun);
    let relay = outbox.relay(move |message: OutboxMessage| {
        noted.lock().unwrap().push(message.topic().to_owned());
        async move {
            tokio::time::sleep(each).await;
            Ok::<_, &str>(())
        }
    });
    let relay = relay
        .with_lease(Duration::from_secs(9))
        .with_initial_backoff(SHORT)
        .with_max_backoff(SHORT);
    (async move { relay.publish_once().await.unwrap() }, begun)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_relay_returns_the_messages_that_it_cannot_begin_within_its_lease() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a", "b", "c"]).await;
    let (publishing, begun) = slow(&outbox, Duration::from_millis(6_300));
    assert_eq!(publishing.await, published(1, 0));
    assert_eq!(*begun.lock().unwrap(), ["a"]);
    let broker = Broker::default();
    assert_eq!(
        outbox.relay(broker.publish()).publish_once().await.unwrap(),
        published(2, 0)
    );
    let got = broker.got.lock().unwrap();
    assert!(
        got.iter().all(|message| message.failures() == 0),
        "the relay did not try them: {got:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_does_not_end_within_the_lease_is_given_up() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a", "b"]).await;
    let (publishing, begun) = slow(&outbox, Duration::MAX);
    assert_eq!(publishing.await, published(0, 1));
    assert_eq!(*begun.lock().unwrap(), ["a"]);
}

/// The lease begins when the server takes the messages, not when its reply arrives.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_got_its_messages_late_publishes_none_beside_another_relay() {
    const LATE: Duration = Duration::from_secs(1);
    let bench = Bench::new().await;
    let outbox = bench.outbox(&[]).await;
    let proxy = Proxy::to(([127, 0, 0, 1], bench._server.port()).into()).await;
    let url = bench._server.url_by(proxy.address.port());
    let pool = PgPoolOptions::new().max_connections(1).connect(&url).await.unwrap();
    let publication = Arc::new(());
    let publications = Arc::clone(&publication);
    let late = Outbox::new(pool)
        .relay(move |_| {
            let publication = Arc::clone(&publication);
            async move {
                std::future::pending::<()>().await;
                drop(publication);
                Ok::<_, &str>(())
            }
        })
        .with_lease(6 * LATE)
        .with_initial_backoff(SHORT)
        .with_max_backoff(SHORT);
    // From the second look on, the connection knows the statement, so the lease begins at most two delays after the relay.
    assert_eq!(late.publish_once().await.unwrap(), published(0, 0));
    assert!(put(&bench, &outbox, &OutboxMessage::new("a", "x")).await);
    proxy.set(Fate::Delay(LATE));
    let is_publishing = || Arc::strong_count(&publications) > 2;
    let late = tokio::spawn(async move { late.publish_once().await });
    while !is_publishing() {
        tokio::time::sleep(SHORT).await;
    }
    let other = outbox.relay(|_| async { Ok::<_, &str>(()) });
    while other.publish_once().await.unwrap().published == 0 {
        tokio::time::sleep(SHORT).await;
    }
    assert!(!is_publishing(), "two relays publish the message at the same time");
    late.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_relay_does_not_postpone_messages_that_another_has_taken() {
    const TAKEN: &str =
        "UPDATE idempotency_outbox SET failures = failures + 1, taken_at = now(), publish_at = 'infinity'";
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["failing", "untried"]).await;
    let pool = bench.pool.clone();
    // Meanwhile, another relay takes both messages.
    let relay = outbox.relay(move |_| {
        let pool = pool.clone();
        async move {
            sqlx::raw_sql(TAKEN).execute(&pool).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            Err::<(), _>("not now")
        }
    });
    let relay = relay
        .with_lease(Duration::from_secs(2))
        .with_initial_backoff(SHORT)
        .with_max_backoff(SHORT);
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 1));
    let untouched = "SELECT count(*) FROM idempotency_outbox WHERE failures = 2 AND taken_at IS NOT NULL AND publish_at = 'infinity'";
    assert_eq!(bench.number(untouched).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_bounded_by_its_bytes_but_has_one_message() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&[]).await;
    for size in [4, 6, 1, 100, 1] {
        assert!(put(&bench, &outbox, &OutboxMessage::new("t", vec![0; size])).await);
    }
    let relay = outbox.relay(Broker::default().publish()).with_batch_bytes(10);
    for count in [2, 1, 1, 1, 0] {
        assert_eq!(relay.publish_once().await.unwrap(), published(count, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_read_does_not_stop_the_others() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["null", "uneven", "good"]).await;
    let spoil = |names: &str, topic: &str| {
        let update =
            format!("UPDATE idempotency_outbox SET names = '{names}', contents = '{{x}}' WHERE topic = '{topic}'");
        sqlx::raw_sql(sqlx::AssertSqlSafe(update)).execute(&bench.pool)
    };
    assert!(spoil("{NULL}", "null").await.is_err());
    assert!(spoil("{x,y}", "uneven").await.is_err());
    bench
        .execute("ALTER TABLE idempotency_outbox DROP CONSTRAINT idempotency_outbox_headers")
        .await;
    spoil("{NULL}", "null").await.unwrap();
    spoil("{x,y}", "uneven").await.unwrap();
    let log = listen();
    let broker = Broker::default();
    let relay = outbox.relay(broker.publish());
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 2));
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 0));
    assert_eq!(broker.topics(), ["good"]);
    for logged in [
        "event=\"message-unreadable\" position=1 failures=1",
        "event=\"message-unreadable\" position=2 failures=1",
    ] {
        assert!(log.text().contains(logged), "{}", log.text());
    }
}

/// The take of every batch failed, because the server could not compute the next count or the pause
/// of such a row.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_with_any_count_of_failures_does_not_stop_the_others() {
    for count in [i32::MAX, i32::MIN] {
        let bench = Bench::new().await;
        let outbox = bench.outbox(&["spoiled", "good"]).await;
        let spoil = format!("UPDATE idempotency_outbox SET failures = {count} WHERE topic = 'spoiled'");
        sqlx::raw_sql(sqlx::AssertSqlSafe(spoil))
            .execute(&bench.pool)
            .await
            .unwrap();
        let broker = Broker::default();
        broker.refused.lock().unwrap().insert("spoiled".to_owned(), 1);
        let relay = outbox.relay(broker.publish());
        assert_eq!(relay.publish_once().await.unwrap(), published(1, 1), "{count}");
        assert_eq!(broker.topics(), ["good"]);
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Returns the log of all tests in this process.
fn listen() -> Log {
    static LOG: std::sync::OnceLock<Log> = std::sync::OnceLock::new();
    let log = LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::WARN)
            .with_writer(move || writer.clone())
            .init();
        log
    });
    log.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_error_of_a_message_that_could_not_be_published_is_logged_and_its_content_is_not() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&[]).await;
    let message = OutboxMessage::new("secret-topic", "secret-payload").add_header("secret-name", "secret-content");
    assert!(put(&bench, &outbox, &message.with_id("secret-id")).await);
    let log = listen();
    let relay = outbox.relay(|_| async { Err::<(), _>("the broker is on holiday") });
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 1));
    let text = log.text();
    let logged = "event=\"message-failed\" position=1 failures=1 error=the broker is on holiday";
    assert!(text.contains(logged), "{text}");
    assert!(!text.contains("secret"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_backoff_of_one_message_does_not_repeat_the_others() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["good", "bad"]).await;
    let got = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&got);
    let relay = outbox.relay(move |message: OutboxMessage| {
        noted.lock().unwrap().push(message.topic().to_owned());
        async move {
            if message.topic() == "bad" {
                Err("not now")
            } else {
                Ok(())
            }
        }
    });
    let relay = relay
        .with_initial_backoff(Duration::MAX)
        .with_max_backoff(Duration::MAX)
        .with_lease(Duration::MAX);
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 1));
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 0));
    assert_eq!(*got.lock().unwrap(), ["good", "bad"]);
    // The longest pause is a century.
    let pause = "SELECT count(*) FROM idempotency_outbox
        WHERE publish_at BETWEEN now() + interval '99 years' AND now() + interval '101 years'";
    assert_eq!(bench.number(pause).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_can_publish_nothing_does_not_spin() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a"]).await;
    let tries = Arc::new(Mutex::new(0));
    let noted = Arc::clone(&tries);
    let relay = outbox.relay(move |_| {
        *noted.lock().unwrap() += 1;
        async { Err::<(), _>("not now") }
    });
    let relay = relay
        .with_batch(1)
        .with_initial_backoff(Duration::ZERO)
        .with_max_backoff(Duration::ZERO)
        .with_interval(Duration::from_secs(120));
    let begun: f64 = bench.clock().await;
    let eight_tries = async {
        while *tries.lock().unwrap() < 8 {
            tokio::time::sleep(SHORT).await;
        }
    };
    tokio::select! {
        never = relay.run() => match never {},
        () = eight_tries => {}
    }
    // The relay pauses for 10 ms, then for twice as long each time: 1.27 s.
    let seconds = bench.clock().await - begun;
    assert!((1.26..60.0).contains(&seconds), "{seconds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_publishes_batch_after_batch_and_pauses_only_when_nothing_is_due() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a", "b", "c"]).await;
    let broker = Broker::default();
    let url = format!("{}?application_name=relay", bench._server.url());
    let pool = PgPoolOptions::new().max_connections(1).connect(&url).await.unwrap();
    let relay = Outbox::new(pool).relay(broker.publish()).with_batch(1);
    let relay = tokio::spawn(relay.with_interval(Duration::from_secs(3_600)).run());
    let all = async {
        while outbox.waiting().await.unwrap() > 0 {
            tokio::time::sleep(SHORT).await;
        }
    };
    let all = tokio::time::timeout(Duration::from_secs(20), all).await;
    all.expect("the relay pauses although messages are due");
    // The relay deletes each published message, then takes the next ones. Nothing is left, so its last take finds nothing.
    const PAUSES: &str = "SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'relay' AND state = 'idle' AND query LIKE '-- Takes due messages%'";
    while bench.number(PAUSES).await == 0 {
        tokio::time::sleep(SHORT).await;
    }
    assert!(put(&bench, &outbox, &OutboxMessage::new("d", "x")).await);
    tokio::time::sleep(Duration::from_secs(1)).await;
    relay.abort();
    assert_eq!(
        broker.topics(),
        ["a", "b", "c"],
        "the relay looks again within its pause"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_hang_do_not_block_the_others() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["hangs", "hangs, too", "good"]).await;
    let broker = Broker::default();
    let publish = broker.publish();
    let relay = outbox.relay(move |message: OutboxMessage| {
        let publishing = publish(message.clone());
        async move {
            if message.topic().starts_with("hangs") {
                std::future::pending::<()>().await;
            }
            publishing.await
        }
    });
    let relay = relay
        .with_lease(Duration::from_millis(300))
        .with_initial_backoff(SHORT)
        .with_max_backoff(SHORT);
    for _ in 0..3 {
        relay.publish_once().await.unwrap();
    }
    assert_eq!(broker.topics(), ["good"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_interval_ends_no_relay() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a"]).await;
    let broker = Broker::default();
    // Each relay makes its interval longer or shorter at random.
    let relays = (0..20).map(|_| outbox.relay(broker.publish()).with_interval(Duration::MAX).run());
    let published = async {
        while broker.topics().is_empty() {
            tokio::time::sleep(SHORT).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    tokio::select! {
        _ = join_all(relays) => panic!("a relay ended"),
        () = published => {}
    }
    assert_eq!(broker.topics(), ["a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_can_never_be_put_is_not_reported_as_an_unreachable_server() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&[]).await;
    let message = |topic: &str| OutboxMessage::new(topic, "x");
    let mut transaction = bench.pool.begin().await.unwrap();
    for refused in [
        message("t").with_id(""),
        message("t").with_id("x".repeat(256)),
        message("t").with_id("0123456789abcdef".repeat(3_000)),
        message("t").with_id("\0"),
        message("t\0"),
        message("t").add_header("\0", "x"),
        message("t").add_header("x", "\0"),
    ] {
        let error = outbox.put(&mut transaction, &refused).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    }
    // The transaction continues, because the store sent no statement.
    for put in [message("").with_id("x".repeat(255)), OutboxMessage::new("t", "\0")] {
        assert!(outbox.put(&mut transaction, &put).await.unwrap());
    }
    transaction.commit().await.unwrap();
    assert_eq!(outbox.waiting().await.unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_reads_due_messages_and_no_waiting_ones() {
    const READ: &str = "SELECT (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes)
        + (SELECT sum(seq_tup_read)::bigint FROM pg_stat_user_tables)";
    // A single connection, which counts its own reads.
    let bench = Bench::with_connections(1).await;
    let outbox = bench.outbox(&[]).await;
    bench
        .execute(
            "INSERT INTO idempotency_outbox (id, topic, names, contents, payload, publish_at)
             SELECT n::text, 't', '{}', '{}', '', now() + interval '1 day' FROM generate_series(1, 20000) n;
             ANALYZE idempotency_outbox",
        )
        .await;
    assert!(put(&bench, &outbox, &OutboxMessage::new("due", "x")).await);
    let relay = outbox.relay(Broker::default().publish());
    let relay = relay
        .with_initial_backoff(SHORT)
        .with_max_backoff(Duration::from_secs(2 * 86_400));
    bench.execute("SELECT pg_stat_force_next_flush()").await;
    let before = bench.number(READ).await;
    assert_eq!(relay.publish_once().await.unwrap(), published(1, 0));
    assert_eq!(relay.publish_once().await.unwrap(), published(0, 0));
    bench.execute("SELECT pg_stat_force_next_flush()").await;
    let read = bench.number(READ).await - before;
    assert!((1..1_000).contains(&read), "{read}");
}

/// As after a failover to a server whose clock is behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_goes_back_delays_no_message() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["t"]).await;
    bench
        .execute(
            "UPDATE idempotency_outbox SET put_at = put_at + interval '1 h', publish_at = publish_at + interval '1 h'",
        )
        .await;
    let relay = outbox.relay(|_| async { Ok::<_, std::io::Error>(()) });
    assert_eq!(
        relay.publish_once().await.unwrap().published,
        0,
        "the first look makes the message due"
    );
    assert_eq!(relay.publish_once().await.unwrap().published, 1);
}

/// Such a message was not due before the clock had caught up.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_goes_back_delays_no_message_of_a_relay_that_died() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["t"]).await;
    die_at(&outbox, "t", (Duration::from_secs(3_600), SHORT), |_| {}).await;
    let lease = Duration::from_millis(200);
    let relay = outbox.relay(|_| async { Ok::<_, std::io::Error>(()) });
    let relay = relay
        .with_lease(lease)
        .with_initial_backoff(SHORT)
        .with_max_backoff(SHORT);
    let mut looks = Vec::new();
    for goes_back in [false, true] {
        if goes_back {
            bench
                .execute("UPDATE idempotency_outbox SET taken_at = taken_at + interval '1 h'")
                .await;
        }
        for _ in 0..2 {
            looks.push(relay.publish_once().await.unwrap().published);
            tokio::time::sleep(lease * 2).await;
        }
    }
    // At first, the clock is right, and the relay with the longer lease may still be alive. After the
    // jump, the message waits for one lease.
    assert_eq!(looks, [0, 0, 0, 1]);
}

/// The other end of the connection has disappeared silently, as after a failover or in a firewall
/// that has forgotten the connection. The relay waited for its reply forever.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_whose_connection_died_queries_again_over_another() {
    let bench = Bench::new().await;
    let outbox = bench.outbox(&[]).await;
    let proxy = Proxy::to(([127, 0, 0, 1], bench._server.port()).into()).await;
    let url = bench._server.url_by(proxy.address.port());
    let pool = PgPoolOptions::new().max_connections(5).connect(&url).await.unwrap();
    let published = Arc::new(Notify::new());
    let notify = Arc::clone(&published);
    let relay = Outbox::new(pool)
        .with_timeout(Duration::from_secs(1))
        .relay(move |_| {
            notify.notify_one();
            async { Ok::<_, std::io::Error>(()) }
        })
        .with_interval(Duration::from_millis(100));
    let relay = tokio::spawn(relay.run());
    // The relay looks, and waits for the server. The first reply is lost, and all later bytes pass.
    let mut lock = bench.pool.begin().await.unwrap();
    sqlx::raw_sql("LOCK TABLE idempotency_outbox IN ACCESS EXCLUSIVE MODE")
        .execute(&mut *lock)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    proxy.set(Fate::Swallow(Direction::ToClient));
    lock.rollback().await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    proxy.set(Fate::Pass);
    assert!(put(&bench, &outbox, &OutboxMessage::new("late", "x")).await);
    let publishing = tokio::time::timeout(Duration::from_secs(60), published.notified());
    publishing.await.expect("the relay queries again");
    relay.abort();
}

/// An error whose text cannot be formatted must not end the relay.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_whose_text_panics_fails_its_message_only() {
    struct Wordless;
    impl std::fmt::Display for Wordless {
        fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            panic!("planned")
        }
    }
    let bench = Bench::new().await;
    let outbox = bench.outbox(&["a", "b"]).await;
    let relay = outbox.relay(|message: OutboxMessage| async move {
        match message.topic() {
            "a" => Err(Wordless),
            _ => Ok(()),
        }
    });
    let published = relay.publish_once().await.unwrap();
    assert_eq!((published.published, published.failed), (1, 1));
}

/// At repeatable read and above, 30 of 360 looks failed, and relays published 273 of 500 messages
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn relays_share_the_work_at_every_default_isolation() {
    let server = PostgresServer::start();
    let own = PgPoolOptions::new()
        .max_connections(2)
        .connect(&server.url())
        .await
        .unwrap();
    for isolation in ["read committed", "repeatable read", "serializable"] {
        let set = format!("ALTER ROLE app SET default_transaction_isolation = '{isolation}'");
        sqlx::raw_sql(sqlx::AssertSqlSafe(set)).execute(&own).await.unwrap();
        let pool = PgPoolOptions::new()
            .max_connections(16)
            .connect(&server.url())
            .await
            .unwrap();
        let outbox = Outbox::new(pool.clone());
        outbox.migrate().await.unwrap();
        let mut transaction = pool.begin().await.unwrap();
        for _ in 0..500 {
            outbox
                .put(&mut transaction, &OutboxMessage::new("t", "x"))
                .await
                .unwrap();
        }
        transaction.commit().await.unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let relays = (0..6).map(|_| {
            let (outbox, seen) = (outbox.clone(), Arc::clone(&seen));
            tokio::spawn(async move {
                let relay = outbox.relay(move |message: OutboxMessage| {
                    seen.lock().unwrap().push(message.id().to_owned());
                    async { Ok::<_, String>(()) }
                });
                let relay = relay.with_batch(7);
                while outbox.waiting().await.unwrap() > 0 {
                    relay.publish_once().await.unwrap();
                }
            })
        });
        for relayed in join_all(relays).await {
            relayed.unwrap();
        }
        let mut seen = seen.lock().unwrap().clone();
        assert_eq!(seen.len(), 500, "{isolation}");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 500, "{isolation}: some messages were published twice");
    }
}
