//! A server in a child process, and its folder.

use std::fs::File;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::{Ledger, Process};

/// A temporary folder. Dropping this value removes the folder, unless the test fails, because the
/// logs in the folder may then show the reason.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Creates a folder whose name contains `name`.
    ///
    /// # Panics
    ///
    /// Panics if the folder cannot be created.
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("idempotency-{name}-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the path of a file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Opens a ledger in the folder.
    ///
    /// # Panics
    ///
    /// Panics if the ledger cannot be opened.
    pub fn ledger(&self, name: &str) -> Ledger {
        Ledger::open(&self.file(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }
}

/// A server in a child process. Dropping this value kills the process, also while a test panics.
pub(crate) struct Server {
    name: &'static str,
    process: Process,
}

impl Server {
    /// Starts a server. Its output goes to a log in the folder.
    pub(crate) fn spawn(name: &'static str, command: &mut Command, folder: &Folder) -> Self {
        let log = folder.file("log");
        let log = File::options().create(true).append(true).open(log).unwrap();
        let process = Process::start(command.stdout(log.try_clone().unwrap()).stderr(log));
        Self { name, process }
    }

    /// Waits until a process listens on the port.
    pub(crate) fn wait_until_up(&mut self, port: u16, limit: Duration) -> Result<(), String> {
        let name = self.name;
        for _ in 0..limit.as_millis() / 20 {
            if !self.process.is_up() {
                return Err(format!("{name} ended by itself"));
            }
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(format!("{name} does not listen within {limit:?}"))
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }
}
