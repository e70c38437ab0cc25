//! A run: consumers handle messages while a test kills them. Each message is a number.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::process::Command;

use sqlx::PgPool;
use tower_idempotency::protocol::{Status, StorageKey};
use tower_idempotency::receiver::MessageLease;
use tower_idempotency::{BoxStore, Store};

use crate::{DeliveryLog, Folder, Ledger, this_test, up_to};

/// The reason why an effect failed.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

const BROKER: &str = "CONSUME_BROKER";
const EFFECTS: &str = "CONSUME_EFFECTS";
const STORE: &str = "CONSUME_STORE";
const DELIVERY_LOG: &str = "CONSUME_DELIVERY_LOG";

/// The ledgers of a run and its store. If the store is PostgreSQL, its database also has a table
/// for effects.
pub struct Run {
    url: String,
    store: BoxStore,
    effects_table: Option<PgPool>,
    effects: Ledger,
    log: DeliveryLog,
    _folder: Folder,
}

impl Run {
    /// Connects to the store and creates the ledgers.
    ///
    /// # Panics
    ///
    /// Panics if the store cannot be reached.
    pub async fn over(url: &str) -> Self {
        let folder = Folder::new("run");
        // In PostgreSQL, this also creates the table of the store.
        let store = BoxStore::from_url(url).await.unwrap();
        let effects_table = pool(url).await;
        if let Some(pool) = &effects_table {
            let table = sqlx::raw_sql("CREATE TABLE effects (message text NOT NULL)");
            table.execute(pool).await.unwrap();
        }
        Self {
            url: url.to_owned(),
            store,
            effects_table,
            effects: folder.ledger("effects"),
            log: DeliveryLog::open(&folder.file("log")),
            _folder: folder,
        }
    }

    /// Returns a command that runs the test `consume_if_started_by_a_run` as a [`Consumer`].
    pub fn consumer(&self, broker: &str) -> Command {
        let mut command = this_test("consume_if_started_by_a_run");
        command
            .env(BROKER, broker)
            .env(STORE, &self.url)
            .env(EFFECTS, self.effects.path())
            .env(DELIVERY_LOG, self.log.path());
        command
    }

    pub const fn effects(&self) -> &Ledger {
        &self.effects
    }

    /// Collects the result of the run. `dead` has the dead letters, and `key` returns the storage
    /// key of a message.
    ///
    /// # Panics
    ///
    /// Panics if the store cannot be reached, if a message was lost (it is neither handled nor
    /// dead), or if no message was delivered again.
    pub async fn report<D: AsRef<[u8]>>(
        &self,
        messages: usize,
        dead: impl IntoIterator<Item = D>,
        key: impl Fn(usize) -> StorageKey,
    ) -> RunReport {
        let dead = dead.into_iter();
        let mut report = RunReport {
            store: self.url.split(':').next().unwrap_or_default().to_owned(),
            messages,
            receipts: self.log.receipts(),
            redeliveries: self.log.redeliveries(),
            effects: self.effects.counts(),
            handled: HashSet::new(),
            dead: dead
                .map(|dead| String::from_utf8_lossy(dead.as_ref()).parse().unwrap())
                .collect(),
        };
        for message in 0..messages {
            let record = self.store.peek(&key(message)).await.unwrap();
            if record.is_some_and(|record| matches!(record.status, Status::Completed(_))) {
                report.handled.insert(message);
            }
            let is_settled = report.handled.contains(&message) || report.dead.contains(&message);
            assert!(is_settled, "{message} was lost");
        }
        if let Some(pool) = &self.effects_table {
            let rows = sqlx::query_as::<_, (String, i64)>("SELECT message, count(*) FROM effects GROUP BY message");
            for (message, count) in rows.fetch_all(pool).await.unwrap() {
                *report.effects.entry(message).or_default() += usize::try_from(count).unwrap();
            }
        }
        assert!(
            report.redeliveries > 0 && report.receipts.contains_key("duplicate"),
            "{report}"
        );
        report
    }
}

/// The result of a run.
pub struct RunReport {
    /// The scheme of the store's URL.
    store: String,
    messages: usize,
    /// The number of deliveries for each receipt.
    receipts: BTreeMap<String, usize>,
    /// The number of deliveries that were not the first of their message.
    redeliveries: usize,
    /// The dead letters.
    dead: HashSet<usize>,
    /// The number of effects of each message.
    effects: BTreeMap<String, usize>,
    /// The messages whose record is completed.
    handled: HashSet<usize>,
}

impl RunReport {
    /// Checks that every message had one effect, and that there are no dead letters.
    ///
    /// # Panics
    ///
    /// Panics if this is false.
    pub fn assert_one_effect_each(&self) {
        for message in 0..self.messages {
            assert_eq!(self.effects(message), 1, "{message}");
        }
        assert_eq!(self.dead, HashSet::new());
    }

    /// Checks that every message had at most one effect, and every handled one exactly one.
    ///
    /// # Panics
    ///
    /// Panics if this is false. Panics also if the run proves nothing, because no consumer was
    /// killed between a claim and the completion of its record.
    pub fn assert_at_most_one_effect_each(&self) {
        for message in 0..self.messages {
            let effects = self.effects(message);
            assert!(effects <= 1, "{message}: {effects}");
            if self.handled.contains(&message) && !self.dead.contains(&message) {
                assert_eq!(effects, 1, "{message} was handled");
            }
        }
        assert!(
            !self.dead.is_empty(),
            "no attempt was lost, so the receiver refused no message"
        );
    }

    fn effects(&self, message: usize) -> usize {
        self.effects.get(&message.to_string()).copied().unwrap_or(0)
    }
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            store,
            redeliveries,
            dead,
            receipts,
            ..
        } = self;
        write!(
            f,
            "over {store}: {redeliveries} redeliveries, {} dead; {receipts:?}",
            dead.len()
        )
    }
}

/// The inputs of a consumer.
pub struct Consumer {
    pub broker: String,
    pub store: BoxStore,
    pub log: DeliveryLog,
    pub work: Work,
}

/// Runs a consumer until this process is killed, if a [`Run`] has started the process. Otherwise it
/// returns at once.
///
/// # Panics
///
/// Panics if the consumer ends, or if the store cannot be reached.
pub fn run_consumer(consume: impl AsyncFnOnce(Consumer)) {
    let variable = |name| std::env::var(name).unwrap();
    let Ok(url) = std::env::var(STORE) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let consumer = Consumer {
            broker: variable(BROKER),
            store: BoxStore::from_url(&url).await.unwrap(),
            log: DeliveryLog::open(variable(DELIVERY_LOG).as_ref()),
            work: Work {
                effects: Ledger::open(variable(EFFECTS).as_ref()),
                effects_table: pool(&url).await,
            },
        };
        consume(consumer).await;
    });
    panic!("the consumer ended by itself");
}

/// The work of a consumer. Each effect takes a short time, and the test may kill the consumer at
/// any moment of it.
#[derive(Clone)]
pub struct Work {
    effects: Ledger,
    effects_table: Option<PgPool>,
}

impl Work {
    /// Whether an effect can be in the transaction that completes its record.
    pub const fn has_transactions(&self) -> bool {
        self.effects_table.is_some()
    }

    /// Has the effect of a message. With a lease, the effect is in the transaction that completes
    /// the record. Without a lease, the effect is a line of the ledger, which is independent of the
    /// store.
    ///
    /// # Errors
    ///
    /// Fails if there is no effect, or if nobody knows whether there is one.
    ///
    /// # Panics
    ///
    /// Panics if there is a lease, but the store has no transactions.
    pub async fn take_effect(&self, message: &str, lease: Option<MessageLease>) -> Result<(), Error> {
        pause().await;
        let Some(lease) = lease else {
            self.effects.append_synced(message);
            pause().await;
            return Ok(());
        };
        let pool = self.effects_table.as_ref().expect("the store is in PostgreSQL");
        let mut transaction = pool.begin().await?;
        let insert = sqlx::query("INSERT INTO effects (message) VALUES ($1)").bind(message);
        insert.execute(&mut *transaction).await?;
        pause().await;
        lease.complete_in(&mut transaction).await?;
        transaction.commit().await?;
        Ok(())
    }
}

async fn pause() {
    tokio::time::sleep(up_to(40)).await;
}

async fn pool(url: &str) -> Option<PgPool> {
    match url.starts_with("postgres") {
        true => Some(PgPool::connect(url).await.unwrap()),
        false => None,
    }
}
