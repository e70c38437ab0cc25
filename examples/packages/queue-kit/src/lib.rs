//! What the examples of queues share: a Redis server of their own, processes that can be killed, and the books by which is counted
//! what happened.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tower_idempotency::receiver::{MessageId, OnMissingId, Receipt, ReceiveError, ReceiverLayer};

#[path = "../../../../tests/support/redis.rs"]
mod server;

pub use server::RedisServer;

/// A temporary folder; gone with this value.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    #[must_use]
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("idempotency-{name}-{}-{count}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary folder can be made");
        Self(path)
    }

    #[must_use]
    pub fn book(&self, name: &str) -> Book {
        Book::open(&self.0.join(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// An append-only file of lines that many processes write to. What is written survives the kill of its writer.
#[derive(Debug)]
pub struct Book {
    file: File,
    path: PathBuf,
}

impl Book {
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let file = File::options().create(true).append(true).open(path);
        Self {
            file: file.unwrap_or_else(|error| panic!("{} cannot be opened: {error}", path.display())),
            path: path.to_owned(),
        }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a line in one write: another process's line is before or after it, never within.
    pub fn note(&self, line: impl fmt::Display) {
        let line = format!("{line}\n");
        (&self.file)
            .write_all(line.as_bytes())
            .expect("the book can be written");
    }

    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let content = fs::read_to_string(&self.path).expect("the book can be read");
        content.lines().map(str::to_owned).collect()
    }

    /// How often each line stands in it.
    #[must_use]
    pub fn tally(&self) -> BTreeMap<String, usize> {
        let mut tally = BTreeMap::new();
        for line in self.lines() {
            *tally.entry(line).or_default() += 1;
        }
        tally
    }

    /// How many lines begin with a word.
    #[must_use]
    pub fn count(&self, word: &str) -> usize {
        let lines = self.lines();
        lines.iter().filter(|line| line.split(' ').next() == Some(word)).count()
    }
}

/// A process of ours, which ends with this value.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).spawn();
        Self(child.unwrap_or_else(|error| panic!("{} cannot be run: {error}", command.get_program().display())))
    }

    /// SIGKILL: it learns nothing of its end.
    pub fn kill(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }

    /// Stops it for now (`-STOP`), or lets it go on (`-CONT`).
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.0.id().to_string()]).status();
        assert!(
            status.expect("there is a `kill`").success(),
            "{signal} is not delivered"
        );
    }

    /// Whether it runs still.
    pub fn is_up(&mut self) -> bool {
        self.0.try_wait().is_ok_and(|status| status.is_none())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One word for what came of a delivery.
pub const fn word<T, E>(received: &Result<Receipt<T>, ReceiveError<E>>) -> &'static str {
    match received {
        Ok(Receipt::First(_)) => "first",
        Ok(Receipt::Duplicate) => "duplicate",
        Ok(Receipt::InFlight { .. }) => "in-flight",
        Ok(Receipt::Unknown) => "unknown",
        Err(ReceiveError::Handler(_) | ReceiveError::Panicked) => "failed",
        Err(_) => "not-received",
    }
}

/// What became of the messages that were sent, by the books.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Took effect once.
    pub once: usize,
    /// Had no effect, and lie in the dead-letter place.
    pub dead: usize,
    /// Had several effects.
    pub repeated: Vec<String>,
    /// Had no effect, and lie nowhere.
    pub lost: Vec<String>,
}

impl Outcome {
    pub fn of(sent: impl IntoIterator<Item = String>, effects: &BTreeMap<String, usize>, dead: &[String]) -> Self {
        let mut outcome = Self {
            once: 0,
            dead: 0,
            repeated: Vec::new(),
            lost: Vec::new(),
        };
        for id in sent {
            match effects.get(&id) {
                Some(1) => outcome.once += 1,
                Some(_) => outcome.repeated.push(id),
                None if dead.contains(&id) => outcome.dead += 1,
                None => outcome.lost.push(id),
            }
        }
        outcome
    }

    /// At most one effect each, and none lost.
    #[must_use]
    pub fn is_as_promised(&self) -> bool {
        self.repeated.is_empty() && self.lost.is_empty()
    }
}

/// A pause of up to so long, at random.
#[must_use]
pub fn up_to(longest: Duration) -> Duration {
    longest.mul_f64(rand::random_range(0.0..1.0))
}

/// A number from the environment.
#[must_use]
pub fn number(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name} is no number: {value}")),
        Err(_) => default,
    }
}

/// The layer, or with `UNPROTECTED` in the environment one that lets every delivery through: for the tests of the tests.
#[must_use]
pub fn unless_told<St, M>(layer: ReceiverLayer<St, M>) -> ReceiverLayer<St, M> {
    if std::env::var_os("UNPROTECTED").is_none() {
        return layer;
    }
    layer
        .with_id(|_| MessageId::missing())
        .on_missing_id(OnMissingId::Unprotected)
}
