//! A run: messages, each of them a number, pass consumers that are killed.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::process::Command;

use sqlx::PgPool;
use tower_idempotency::protocol::{Status, StorageKey};
use tower_idempotency::receiver::MessageLease;
use tower_idempotency::{BoxStore, Store};

use crate::{this_test, up_to, Folder, Ledger, Told};

/// Why an effect failed.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

const BROKER: &str = "CONSUME_BROKER";
const EFFECTS: &str = "CONSUME_EFFECTS";
const STORE: &str = "CONSUME_STORE";
const TOLD: &str = "CONSUME_TOLD";

/// The ledgers of a run, its store, and where that is in PostgreSQL a table for effects beside it.
pub struct Run {
    url: String,
    store: BoxStore,
    effects_beside: Option<PgPool>,
    effects: Ledger,
    told: Told,
    _folder: Folder,
}

impl Run {
    /// # Panics
    ///
    /// If the store cannot be reached.
    pub async fn over(url: &str) -> Self {
        let folder = Folder::new("run");
        // The first one also makes the table, where there is one.
        let store = BoxStore::from_url(url).await.unwrap();
        let effects_beside = pool(url).await;
        if let Some(pool) = &effects_beside {
            let table = sqlx::raw_sql("CREATE TABLE effects (message text NOT NULL)");
            table.execute(pool).await.unwrap();
        }
        Self {
            url: url.to_owned(),
            store,
            effects_beside,
            effects: folder.ledger("effects"),
            told: Told::open(&folder.file("told")),
            _folder: folder,
        }
    }

    /// A process that runs the test `consume_if_told`, and there has a [`Part`].
    pub fn consumer(&self, broker: &str) -> Command {
        let mut command = this_test("consume_if_told");
        command
            .env(BROKER, broker)
            .env(STORE, &self.url)
            .env(EFFECTS, self.effects.path())
            .env(TOLD, self.told.path());
        command
    }

    pub const fn effects(&self) -> &Ledger {
        &self.effects
    }

    /// What came of messages of which these are dead, and whose records have these names.
    ///
    /// # Panics
    ///
    /// If the store cannot be reached; if one of them was lost, that is neither handled nor dead; or if nothing was delivered again.
    pub async fn seen<D: AsRef<[u8]>>(
        &self,
        messages: usize,
        dead: impl IntoIterator<Item = D>,
        key: impl Fn(usize) -> StorageKey,
    ) -> Seen {
        let dead = dead.into_iter();
        let mut seen = Seen {
            store: self.url.split(':').next().unwrap_or_default().to_owned(),
            messages,
            receipts: self.told.receipts(),
            redeliveries: self.told.redeliveries(),
            effects: self.effects.counts(),
            handled: HashSet::new(),
            dead: dead
                .map(|dead| String::from_utf8_lossy(dead.as_ref()).parse().unwrap())
                .collect(),
        };
        for message in 0..messages {
            let record = self.store.peek(&key(message)).await.unwrap();
            if record.is_some_and(|record| matches!(record.status, Status::Completed(_))) {
                seen.handled.insert(message);
            }
            let is_settled = seen.handled.contains(&message) || seen.dead.contains(&message);
            assert!(is_settled, "{message} was lost");
        }
        if let Some(pool) = &self.effects_beside {
            let rows = sqlx::query_as::<_, (String, i64)>("SELECT message, count(*) FROM effects GROUP BY message");
            for (message, count) in rows.fetch_all(pool).await.unwrap() {
                *seen.effects.entry(message).or_default() += usize::try_from(count).unwrap();
            }
        }
        assert!(
            seen.redeliveries > 0 && seen.receipts.contains_key("duplicate"),
            "{seen}"
        );
        seen
    }
}

/// What came of a run.
pub struct Seen {
    /// The scheme of the store's URL.
    store: String,
    messages: usize,
    /// How many deliveries got each receipt.
    receipts: BTreeMap<String, usize>,
    /// How many deliveries were not the first of their message.
    redeliveries: usize,
    /// Messages in the dead-letter place.
    dead: HashSet<usize>,
    /// Effects of each message.
    effects: BTreeMap<String, usize>,
    /// Messages whose record says that they were handled.
    handled: HashSet<usize>,
}

impl Seen {
    /// # Panics
    ///
    /// If it is not so.
    pub fn assert_one_effect_each(&self) {
        for message in 0..self.messages {
            assert_eq!(self.effects(message), 1, "{message}");
        }
        assert_eq!(self.dead, HashSet::new());
    }

    /// # Panics
    ///
    /// If it is not so; or if it was not put to the test, because no consumer was killed between a claim and its record.
    pub fn assert_at_most_one_effect_each(&self) {
        for message in 0..self.messages {
            let effects = self.effects(message);
            assert!(effects <= 1, "{message}: {effects}");
            if self.handled.contains(&message) && !self.dead.contains(&message) {
                assert_eq!(effects, 1, "{message} was handled");
            }
        }
        assert!(!self.dead.is_empty(), "nothing was lost, so that nothing was refused");
    }

    fn effects(&self, message: usize) -> usize {
        self.effects.get(&message.to_string()).copied().unwrap_or(0)
    }
}

impl fmt::Display for Seen {
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

/// What a consumer is to do.
pub struct Part {
    pub broker: String,
    pub store: BoxStore,
    pub told: Told,
    pub work: Work,
}

/// Plays the part of a consumer until this process is killed, where a [`Run`] has started it. Otherwise it does nothing.
///
/// # Panics
///
/// If the part ends, or the store cannot be reached.
pub fn play(part: impl AsyncFnOnce(Part)) {
    let variable = |name| std::env::var(name).unwrap();
    let Ok(url) = std::env::var(STORE) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let part_of_this = Part {
            broker: variable(BROKER),
            store: BoxStore::from_url(&url).await.unwrap(),
            told: Told::open(variable(TOLD).as_ref()),
            work: Work {
                effects: Ledger::open(variable(EFFECTS).as_ref()),
                effects_beside: pool(&url).await,
            },
        };
        part(part_of_this).await;
    });
    panic!("the consumer ended by itself");
}

/// How a consumer has its effects: each within a short while, at any moment of which it may be killed.
#[derive(Clone)]
pub struct Work {
    effects: Ledger,
    effects_beside: Option<PgPool>,
}

impl Work {
    /// Whether effects can be in the transactions of their records.
    pub const fn has_transactions(&self) -> bool {
        self.effects_beside.is_some()
    }

    /// Has an effect: with a lease in the transaction that records it, else in the ledger, of which the store knows nothing.
    ///
    /// # Errors
    ///
    /// When it is not there, or nobody knows.
    ///
    /// # Panics
    ///
    /// If there is a lease and there are no transactions.
    pub async fn take_effect(&self, message: &str, lease: Option<MessageLease>) -> Result<(), Error> {
        pause().await;
        let Some(lease) = lease else {
            self.effects.enter(message);
            pause().await;
            return Ok(());
        };
        let pool = self.effects_beside.as_ref().expect("a store in PostgreSQL");
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
