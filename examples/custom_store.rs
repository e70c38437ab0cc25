//! A store of your own in under 100 lines: one file per key.
//!
//! ```text
//! cargo run --features axum --example custom_store
//! curl -i http://127.0.0.1:3000/orders -H 'Idempotency-Key: 1' -d 'two teapots'
//! ```
//!
//! Kill the server, start it again, and send the same request: the new process replays the response
//! of the old one. Kill the server within the second that an order takes, start it again, and send
//! the request again: nobody knows how far the order came, so after the end of its lease the server
//! responds with 409 `outcome-unknown`. `DIRECTORY` sets where the files are, and `LISTEN` sets
//! another address.
//!
//! # What the store promises
//!
//! The store fulfils the [contract](tower_idempotency::Store#contract). All the logic is in the
//! pure functions of [`Record`], and a mutex makes each step atomic. A record is on the disk before
//! a step returns: the store writes it to a second file, syncs and renames the file, and syncs the
//! directory.
//!
//! # What the store does not promise
//!
//! * **Several processes per directory.** The mutex protects one process only. Two processes on one
//!   directory would run one key twice.
//! * **Speed.** Steps run one at a time, and each step waits for the disk.
//! * **Housekeeping.** The store removes a file when its key is released, and overwrites a file
//!   when its key is used again after the retention. Delete files that are older than your longest
//!   retention and lease together. Only the size of the disk limits the number of files.
//! * **A steady clock across restarts.** If the clock of the machine is set back while the process
//!   is down, records are retained for longer.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::routing::post;
use tokio::net::TcpListener;
use tokio::time::{Sleep, sleep};
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Outcome, Owner, Record, Release, Renewal, Resolution, ResolveResult,
    Snapshot, StorageKey, Transition,
};
use tower_idempotency::{Clock, Error, IdempotencyLayer, Store, Timestamp};

/// Stores each record in a file of its own. Clones share the directory.
#[derive(Clone, Debug)]
pub struct DirectoryStore {
    path: PathBuf,
    clock: Clock,
    /// Locked for a whole step.
    step_lock: Arc<Mutex<()>>,
}

impl DirectoryStore {
    /// Opens the store in this directory, and creates the directory if it does not exist.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be created.
    pub fn open(path: PathBuf, clock: Clock) -> io::Result<Self> {
        fs::create_dir_all(&path)?;
        let step_lock = Arc::default();
        Ok(Self { path, clock, step_lock })
    }

    /// Runs one atomic step. The step runs to its end even if the caller drops the future.
    async fn step<R, T>(&self, key: &StorageKey, transition: T) -> Result<R, Error>
    where
        R: Send + 'static,
        T: FnOnce(Option<&Record>, Timestamp) -> Transition<R> + Send + 'static,
    {
        let (store, file) = (self.clone(), self.file(key));
        let step = tokio::task::spawn_blocking(move || {
            let _locked = store.step_lock.lock().unwrap_or_else(PoisonError::into_inner);
            let record = read(&file)?;
            let Transition { reply, change } = transition(record.as_ref(), store.clock.now());
            store.apply(change, &file).map_err(Error::unavailable)?;
            Ok(reply)
        });
        step.await.map_err(Error::unavailable)?
    }

    fn file(&self, key: &StorageKey) -> PathBuf {
        let name: String = key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        self.path.join(name)
    }

    fn apply(&self, change: Change, file: &Path) -> io::Result<()> {
        match change {
            Change::Unchanged => {}
            Change::Put(record) => self.write(file, &record.to_bytes())?,
            Change::Remove => fs::remove_file(file)?,
        }
        // Sync the directory even if nothing changed: the previous step may have failed exactly
        // here, and this step reports the record that the previous one wrote.
        File::open(&self.path)?.sync_all()
    }

    fn write(&self, file: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.path.join("next");
        let mut next = File::create(&temporary)?;
        next.write_all(bytes)?;
        next.sync_all()?;
        fs::rename(temporary, file)
    }
}

/// Reads the record of a file. An unreadable file is the live record of an owner, so it is an error
/// and never counts as absent.
fn read(file: &Path) -> Result<Option<Record>, Error> {
    match fs::read(file) {
        Ok(bytes) => Record::from_bytes(bytes.into()).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::unavailable(error)),
    }
}

impl Store for DirectoryStore {
    type Watch = Sleep;

    async fn claim(&self, claim: &Claim) -> Result<Decision, Error> {
        let (key, claim) = (claim.key, claim.clone());
        let claim = move |record: Option<&Record>, now| Record::claim(record, &claim, now);
        self.step(&key, claim).await
    }

    async fn renew(&self, key: &StorageKey, owner: Owner, lease: Duration) -> Result<Renewal, Error> {
        let renew = move |record: Option<&Record>, now| Record::renew(record, owner, lease, now);
        self.step(key, renew).await
    }

    async fn complete(
        &self,
        key: &StorageKey,
        owner: Owner,
        outcome: &Outcome,
        retention: Duration,
    ) -> Result<Completion, Error> {
        let outcome = outcome.clone();
        let complete = move |record: Option<&Record>, now| Record::complete(record, owner, &outcome, retention, now);
        self.step(key, complete).await
    }

    async fn release(&self, key: &StorageKey, owner: Owner) -> Result<Release, Error> {
        let release = move |record: Option<&Record>, now| Record::release(record, owner, now);
        self.step(key, release).await
    }

    async fn resolve(&self, key: &StorageKey, fence: Fence, resolution: &Resolution) -> Result<ResolveResult, Error> {
        let resolution = resolution.clone();
        let resolve = move |record: Option<&Record>, now| Record::resolve(record, fence, &resolution, now);
        self.step(key, resolve).await
    }

    async fn peek(&self, key: &StorageKey) -> Result<Option<Snapshot>, Error> {
        let peek = |record: Option<&Record>, now| Transition {
            reply: Record::peek(record, now),
            change: Change::Unchanged,
        };
        self.step(key, peek).await
    }

    /// Resolves a few times a second, whether or not the record changed. Each time the waiter reads
    /// the record again.
    async fn watch(&self, _: &StorageKey) -> Result<Sleep, Error> {
        Ok(sleep(Duration::from_millis(200)))
    }
}

async fn order(what: String) -> String {
    let process = std::process::id();
    println!("an order begins");
    sleep(Duration::from_secs(1)).await;
    println!("an order is taken");
    format!("process {process} took the order: {what}\n")
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let default = std::env::temp_dir().join("tower-idempotency-orders");
    let directory = std::env::var_os("DIRECTORY").map_or(default, PathBuf::from);
    let store = DirectoryStore::open(directory, Clock::system())?;
    let idempotency = IdempotencyLayer::new(store).with_lease(Duration::from_secs(3));
    let app = Router::new().route("/orders", post(order)).layer(idempotency);

    let address = std::env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await
}
