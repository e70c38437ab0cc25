//! Messages whose effect is in PostgreSQL, handled in one transaction with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use sqlx::PgPool;
use sqlx::postgres::{PgConnection, PgPoolOptions};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::protocol::Resolution;
use tower_idempotency::receiver::{
    Disposition, HandlerErrorClass, Inbox, MessageLease, Receipt, ReceiveError, ReceiverLayer,
};
use tower_idempotency::{BoxStore, ErrorKind, MemoryStore, OnError, PostgresStore, Store};

use crate::support::postgres::PostgresServer;
use crate::support::proxy::{Direction, Fate, Proxy};

pub(crate) struct Bench {
    _server: PostgresServer,
    pub(crate) pool: PgPool,
    pub(crate) store: PostgresStore,
}

impl Bench {
    pub(crate) async fn new() -> Self {
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
    lease: Option<MessageLease>,
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

/// The end of the handler's transaction.
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
            panic!("the handler panics")
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
async fn effect_and_receipt_are_committed_together_or_not_at_all() {
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
            // The record proves that the message took effect.
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
            // The test ends the lease, and another attempt handles the message.
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
async fn the_store_is_found_in_a_box_and_a_store_of_another_kind_is_a_clear_error() {
    let bench = Bench::new().await;
    let boxed = deliver(&bench, BoxStore::new(bench.store.clone()), "boxed", Ending::Commit).await;
    assert!(matches!(boxed, Ok(Receipt::First(()))), "{boxed:?}");
    let shared = deliver(&bench, Arc::new(bench.store.clone()), "shared", Ending::Commit).await;
    assert!(matches!(shared, Ok(Receipt::First(()))), "{shared:?}");
    let nested = BoxStore::new(BoxStore::new(Arc::new(Arc::new(bench.store.clone()))));
    let nested = deliver(&bench, Arc::new(nested), "nested", Ending::Commit).await;
    assert!(matches!(nested, Ok(Receipt::First(()))), "{nested:?}");
    let elsewhere = deliver(&bench, MemoryStore::new(), "elsewhere", Ending::Commit).await;
    assert!(
        matches!(&elsewhere, Err(ReceiveError::Handler(error)) if error.contains("PostgresStore")),
        "{elsewhere:?}"
    );
    assert_eq!(bench.effects("elsewhere").await, 0);
}

/// Receives through the inbox, and commits if the message is new.
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
async fn an_inbox_accepts_each_message_once_among_many_concurrent_deliveries() {
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
    // A rollback leaves no trace.
    let mut transaction = bench.pool.begin().await.unwrap();
    assert_eq!(inbox.receive(&mut transaction, "d").await.unwrap(), Receipt::First(()));
    take_effect(&mut transaction, "d").await;
    transaction.rollback().await.unwrap();
    assert_eq!(receive(&bench, &inbox, "d").await, Receipt::First(()));
    assert_eq!(bench.effects("d").await, 1);
    // Another consumer and another namespace see a new message. The layer of the same consumer sees
    // a duplicate.
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
async fn an_inbox_refuses_a_message_without_an_id_or_with_a_huge_one() {
    let bench = Bench::new().await;
    let inbox = Inbox::new(bench.store.clone(), "billing");
    let mut connection = bench.pool.acquire().await.unwrap();
    let missing = inbox.receive(&mut connection, None::<String>).await;
    assert!(matches!(missing, Err(ReceiveError::MissingId)));
    let huge = inbox.receive(&mut connection, "x".repeat(5_000)).await;
    assert!(matches!(huge, Err(ReceiveError::InvalidId(_))));
}

/// A handler may retry its transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_failed_leaves_the_lease_renewed() {
    let bench = Bench::new().await;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (pool, now, top) = (bench.pool.clone(), Arc::clone(&running), Arc::clone(&most));
    let layer = layer(bench.store.clone()).with_lease(Duration::from_secs(6));
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
            tokio::time::sleep(Duration::from_secs(14)).await;
            let mut transaction = pool.begin().await.unwrap();
            take_effect(&mut transaction, &message.id).await;
            let completed = lease.complete_in(&mut transaction).await;
            now.fetch_sub(1, Ordering::SeqCst);
            completed.map_err(|error| error.to_string())?;
            transaction.commit().await.map_err(|error| error.to_string())
        }
    }));
    let first = tokio::spawn(receiver.clone().oneshot(message("m")));
    tokio::time::sleep(Duration::from_secs(9)).await;
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
    let layer = layer(bench.store.clone()).on_error(OnError::Store);
    let receiver = layer.layer(service_fn(move |message: Message| {
        counted.fetch_add(1, Ordering::SeqCst);
        handle(pool.clone(), message, Ending::RollBackAndFail)
    }));
    assert!(receiver.clone().oneshot(message("m")).await.is_err());
    let again = receiver.oneshot(message("m")).await;
    assert!(matches!(again, Ok(Receipt::Duplicate)), "{again:?}");
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejection_is_recorded_after_a_rollback_and_does_not_undo_a_commit() {
    let bench = Bench::new().await;
    for (id, ending, effects) in [
        ("rolled back", Ending::RollBackAndFail, 0),
        ("committed", Ending::CommitAndFail, 1),
    ] {
        let runs = Arc::new(AtomicUsize::new(0));
        let (pool, counted) = (bench.pool.clone(), Arc::clone(&runs));
        let layer = layer(bench.store.clone())
            .at_least_once()
            .with_error_class(|_: &String| HandlerErrorClass::Reject);
        let receiver = layer.layer(service_fn(move |message: Message| {
            counted.fetch_add(1, Ordering::SeqCst);
            handle(pool.clone(), message, ending)
        }));
        let received = receiver.clone().oneshot(message(id)).await;
        let again = receiver.oneshot(message(id)).await;
        let is_right = match ending {
            Ending::CommitAndFail => matches!((&received, &again), (Ok(Receipt::Duplicate), Ok(Receipt::Duplicate))),
            _ => matches!(
                (&received, &again),
                (Err(ReceiveError::Rejected(Some(_))), Ok(Receipt::Unknown))
            ),
        };
        assert!(is_right, "{received:?}, {again:?}");
        assert_eq!((runs.load(Ordering::SeqCst), bench.effects(id).await), (1, effects));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inbox_remembers_rejected_messages() {
    let bench = Bench::new().await;
    let inbox = Inbox::new(bench.store.clone(), "billing");
    let rejects = |commits: bool| {
        let (inbox, pool) = (inbox.clone(), bench.pool.clone());
        async move {
            let mut transaction = pool.begin().await.unwrap();
            let rejected = inbox.reject(&mut transaction, "poison").await.unwrap();
            if commits {
                transaction.commit().await.unwrap();
            }
            rejected
        }
    };
    for (commits, receipt) in [
        (false, Receipt::First(())),
        (true, Receipt::First(())),
        (true, Receipt::Unknown),
    ] {
        assert_eq!(rejects(commits).await, receipt);
    }
    assert_eq!(receive(&bench, &inbox, "poison").await, Receipt::Unknown);
    assert_eq!(receive(&bench, &inbox, "another").await, Receipt::First(()));
    let key = layer(bench.store.clone()).storage_key("poison").unwrap();
    let record = bench.store.peek(&key).await.unwrap().unwrap();
    bench
        .store
        .resolve(&key, record.fence, &Resolution::Absent)
        .await
        .unwrap();
    assert_eq!(receive(&bench, &inbox, "poison").await, Receipt::First(()));
}

#[cfg(feature = "testing")]
#[tokio::test(flavor = "multi_thread")]
async fn a_test_lease_completes_in_a_transaction_if_its_key_is_claimed() {
    use tower_idempotency::BufferedBody;
    use tower_idempotency::protocol::Status;
    use tower_idempotency::testing::TestLease;

    let bench = Bench::new().await;
    let response = || http::Response::new(BufferedBody::new(http_body_util::Full::new(bytes::Bytes::from("paid"))));
    let unclaimed = TestLease::new("order-7");
    let mut transaction = bench.pool.begin().await.unwrap();
    let errors = [
        unclaimed
            .for_receiver()
            .complete_in(&mut transaction)
            .await
            .unwrap_err(),
        unclaimed
            .for_server()
            .complete_response_in(&mut transaction, response())
            .await
            .unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Configuration);
        assert!(error.to_string().contains("`TestLease::claimed_in`"), "{error}");
    }
    drop(transaction);

    for (key, is_request) in [("request", true), ("message", false)] {
        let made = TestLease::new(key).claimed_in(&bench.store).await.unwrap();
        for is_first in [true, false] {
            let mut transaction = bench.pool.begin().await.unwrap();
            let completed = if is_request {
                let completed = made
                    .for_server()
                    .complete_response_in(&mut transaction, response())
                    .await;
                completed.map(drop)
            } else {
                made.for_receiver().complete_in(&mut transaction).await
            };
            assert_eq!(completed.is_ok(), is_first, "{completed:?}");
            transaction.commit().await.unwrap();
        }
        let record = bench
            .store
            .peek(made.for_server().storage_key())
            .await
            .unwrap()
            .unwrap();
        assert!(matches!(record.status, Status::Completed(_)), "{record:?}");
        let again = TestLease::new(key).claimed_in(&bench.store).await;
        assert_eq!(again.unwrap_err().kind(), ErrorKind::Superseded);
    }
}

/// A handler hangs between `complete_in` and the commit, and its message is delivered again. Each
/// delivery left backends that waited for its lock.
#[tokio::test(flavor = "multi_thread")]
async fn deliveries_that_meet_an_open_transaction_leave_no_connections_behind() {
    let bench = Bench::new().await;
    let pool = PgPoolOptions::new()
        .max_connections(4)
        .connect(&bench._server.url())
        .await
        .unwrap();
    let builder = PostgresStore::builder().with_timeout(Duration::from_secs(1));
    let layer = layer(builder.with_pool(pool.clone()).unwrap())
        .with_lease(Duration::from_secs(1))
        .with_store_timeout(Duration::from_secs(2))
        .with_completion_timeout(Duration::from_secs(2));
    let (open, is_open) = tokio::sync::oneshot::channel();
    let (open, pool) = (Arc::new(std::sync::Mutex::new(Some(open))), pool.clone());
    let receiver = layer.layer(service_fn(move |message: Message| {
        let (pool, open) = (pool.clone(), Arc::clone(&open));
        async move {
            let mut transaction = pool.begin().await.unwrap();
            let completed = message.lease.unwrap().complete_in(&mut transaction).await;
            completed.map_err(|error| error.to_string())?;
            open.lock().unwrap().take().unwrap().send(()).unwrap();
            std::future::pending::<Result<(), String>>().await
        }
    }));
    tokio::spawn(receiver.clone().oneshot(message("7")));
    is_open.await.unwrap();
    let waiting = || async {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        sqlx::query_scalar::<_, i64>(query)
            .fetch_one(&bench.pool)
            .await
            .unwrap()
    };
    // Wait until the lease, which is not renewed any more, has ended.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for _ in 0..6 {
        let received = receiver.clone().oneshot(message("7")).await;
        assert!(matches!(received, Err(ReceiveError::Store(_))), "{received:?}");
    }
    // The claims that the receiver releases in the background wait too, with a connection each.
    for _ in 0..20 {
        assert!(waiting().await <= 4);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The message was handled, committed and forgotten at once. The look at the record after the
/// transaction found none, and the receiver took that for a lost attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_committed_message_is_not_rejected_because_its_record_has_expired() {
    let bench = Bench::new().await;
    let pool = bench.pool.clone();
    let receiver = layer(bench.store.clone())
        .with_retention(Duration::ZERO)
        .layer(service_fn(move |message| handle(pool.clone(), message, Ending::Commit)));
    let received = receiver.oneshot(message("7")).await;
    assert!(matches!(received, Ok(Receipt::First(()))), "{received:?}");
}

/// Delivers a message, and cuts its store off between `complete_in` and the end of the transaction.
/// Then reconnects the store, and waits for the deferred work.
async fn cut_off(bench: &Bench, id: &str, commits: bool, on_error: OnError, ending: Ending) -> Received {
    let proxy = Proxy::to(([127, 0, 0, 1], bench._server.port()).into()).await;
    let store = PostgresStore::connect(&bench._server.url_by(proxy.address.port())).await;
    // Long enough that the lease does not end during a test.
    let layer = layer(store.unwrap())
        .on_error(on_error)
        .with_lease(Duration::from_secs(3_600))
        .with_store_timeout(Duration::from_secs(1))
        .with_completion_timeout(Duration::from_secs(1));
    let drain = layer.drain();
    let (pool, cut) = (bench.pool.clone(), proxy.clone());
    let receiver = layer.layer(service_fn(move |message: Message| {
        let (pool, cut) = (pool.clone(), cut.clone());
        async move {
            let mut transaction = pool.begin().await.unwrap();
            take_effect(&mut transaction, &message.id).await;
            message.lease.unwrap().complete_in(&mut transaction).await.unwrap();
            cut.set(Fate::CutAfter(Direction::ToServer, 0));
            if commits {
                transaction.commit().await.unwrap();
            } else {
                transaction.rollback().await.unwrap();
            }
            match ending {
                Ending::Commit => Ok(()),
                _ => Err("failed".to_owned()),
            }
        }
    }));
    let received = receiver.oneshot(message(id)).await;
    assert_eq!(drain.running(), 1, "{received:?}");
    proxy.heal();
    drain.wait().await;
    received
}

/// Such a message counted as lost when its lease ended, and under `Refuse` it was rejected.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_could_not_be_seen_is_seen_when_the_store_is_back() {
    let bench = Bench::new().await;
    for (id, on_error, ending) in [
        ("success", OnError::Release, Ending::Commit),
        ("failure", OnError::Release, Ending::RollBackAndFail),
    ] {
        let received = cut_off(&bench, id, false, on_error, ending).await;
        assert!(received.is_err(), "{received:?}");
        assert_eq!(bench.effects(id).await, 0);
        let again = deliver(&bench, bench.store.clone(), id, Ending::Commit).await;
        assert!(matches!(again, Ok(Receipt::First(()))), "{id}: {again:?}");
        assert_eq!(bench.effects(id).await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_could_not_be_seen_stands_when_the_store_is_back() {
    let bench = Bench::new().await;
    for on_error in [OnError::Release, OnError::Store, OnError::Unknown] {
        for ending in [Ending::Commit, Ending::RollBackAndFail] {
            let id = format!("{on_error:?} {ending:?}");
            drop(cut_off(&bench, &id, true, on_error, ending).await);
            let again = deliver(&bench, bench.store.clone(), &id, Ending::Commit).await;
            assert!(matches!(again, Ok(Receipt::Duplicate)), "{id}: {again:?}");
            assert_eq!(bench.effects(&id).await, 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_is_seen_late_is_handled_as_configured() {
    let bench = Bench::new().await;
    drop(cut_off(&bench, "keep", false, OnError::Store, Ending::RollBackAndFail).await);
    let again = deliver(&bench, bench.store.clone(), "keep", Ending::Commit).await;
    assert!(matches!(again, Ok(Receipt::Duplicate)), "{again:?}");
    drop(cut_off(&bench, "unknown", false, OnError::Unknown, Ending::RollBackAndFail).await);
    let refusing = ReceiverLayer::new(bench.store.clone(), "billing").with_id(|message: &Message| message.id.clone());
    let refusing = refusing.layer(service_fn(|_: Message| async { Ok::<_, String>(()) }));
    let again = refusing.oneshot(message("unknown")).await;
    assert!(matches!(again, Ok(Receipt::Unknown)), "{again:?}");
    assert_eq!((bench.effects("keep").await, bench.effects("unknown").await), (0, 0));
}
