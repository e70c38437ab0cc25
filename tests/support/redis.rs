//! Redis servers for tests, each on a free port with its own folder. Dropping the value ends the
//! server.
#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(unreachable_pub, reason = "every test binary includes this module as its own")]

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use redis::{Cmd, FromRedisValue};

use super::port::free_port;

/// A running `redis-server`. Dropping it kills the server, even during a panic.
pub struct RedisServer {
    child: Child,
    port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(&'static str, PathBuf)>,
}

impl RedisServer {
    /// Starts a server that writes everything to disk at once.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// Starts a server with further settings, written as on the command line: `["--maxmemory",
    /// "10mb"]`.
    pub fn with(settings: &[&str]) -> Self {
        Self::within(settings, &[])
    }

    /// Starts a server with further settings and environment variables.
    pub fn within(settings: &[&str], environment: &[(&'static str, PathBuf)]) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("idempotency-redis-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut last = String::new();
        // Another process may look for a port at the same time, and find the same one.
        for _ in 0..5 {
            let port = free_port();
            let arguments = arguments(port, &folder, settings);
            let child = spawn(&arguments, environment);
            let mut server = Self {
                child,
                port,
                folder: folder.clone(),
                arguments,
                environment: environment.to_owned(),
            };
            match server.wait_until_up() {
                Ok(()) => return server,
                Err(error) => last = error,
            }
            std::fs::create_dir_all(&folder).unwrap();
        }
        panic!("these tests need `redis-server`, which ./test installs; it does not start: {last}");
    }

    /// Starts a replica of this server, with the same environment variables.
    pub fn replica(&self) -> Self {
        let port = self.port.to_string();
        let replica = Self::within(&["--replicaof", "127.0.0.1", &port], &self.environment);
        replica.wait_for("replication", "master_link_status:up");
        replica
    }

    /// Makes a primary of this replica, also after a restart.
    pub fn promote(&mut self) {
        self.command::<()>("REPLICAOF NO ONE");
        self.arguments.extend(["--replicaof", "no", "one"].map(str::to_owned));
    }

    pub fn url(&self) -> String {
        self.url_by(self.port)
    }

    /// Returns the URL of this server through a proxy that listens on another port.
    pub fn url_by(&self, port: u16) -> String {
        format!("redis://127.0.0.1:{port}/")
    }

    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Writes a file into the folder of the server.
    pub fn give(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Kills the server with SIGKILL.
    pub fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// Restarts the server with the same port and data.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.arguments, &self.environment);
        self.wait_until_up().unwrap();
    }

    /// Restarts the server with further settings.
    pub fn restart_with(&mut self, settings: &[&str]) {
        self.arguments.extend(settings.iter().map(|word| (*word).to_owned()));
        self.restart();
    }

    /// Pauses the process (SIGSTOP) or resumes it (SIGCONT).
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Lets no file of the server grow beyond this number of bytes, or without a limit if it is
    /// `unlimited`.
    pub fn limit_files(&self, bytes: &str) {
        let process = self.child.id().to_string();
        // The server may have ended in the meantime.
        let limit = Command::new("prlimit")
            .args(["--pid", &process, &format!("--fsize={bytes}:")])
            .stderr(Stdio::null())
            .status();
        let _: ExitStatus = limit.unwrap();
    }

    /// Runs a command on a new connection.
    pub fn run<T: FromRedisValue>(&self, command: &Cmd) -> T {
        command.query(&mut self.connect()).unwrap()
    }

    /// Runs commands on a new connection, all in one exchange.
    pub fn run_all(&self, commands: &redis::Pipeline) {
        commands.exec(&mut self.connect()).unwrap();
    }

    /// Opens a connection, with several attempts.
    ///
    /// When a child process of the test ends, the kernel interrupts a read that has a time limit
    /// (`EINTR`), and the client does not repeat that read.
    fn connect(&self) -> redis::Connection {
        let client = redis::Client::open(self.url()).unwrap();
        for _ in 0..9 {
            if let Ok(connection) = client.get_connection_with_timeout(Duration::from_secs(2)) {
                return connection;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        client.get_connection_with_timeout(Duration::from_secs(2)).unwrap()
    }

    /// Whether the process of the server runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Runs a command whose words are separated by spaces, on a server that may be away.
    pub fn try_command(&self, words: &str) -> redis::RedisResult<String> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_connection_with_timeout(Duration::from_secs(1))?;
        connection.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut command = Cmd::new();
        command.arg(words.split(' ').collect::<Vec<_>>());
        command.query(&mut connection)
    }

    /// Runs a command whose words are separated by spaces.
    pub fn command<T: FromRedisValue>(&self, words: &str) -> T {
        let mut words = words.split(' ');
        let mut command = redis::cmd(words.next().unwrap());
        for word in words {
            command.arg(word);
        }
        self.run(&command)
    }

    /// Removes the folder of the server and waits until the server notices.
    pub fn lose_its_disk(&self) {
        std::fs::remove_dir_all(&self.folder).unwrap();
        self.command::<()>("BGSAVE");
        self.wait_for("persistence", "rdb_last_bgsave_status:err");
    }

    /// Waits until a section of INFO has this line.
    pub fn wait_for(&self, section: &str, line: &str) {
        for _ in 0..500 {
            if self
                .command::<String>(&format!("INFO {section}"))
                .lines()
                .any(|found| found == line)
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("INFO never has the line {line}");
    }

    /// Waits until the node of a cluster serves its slots.
    pub fn wait_for_cluster(&self) {
        for _ in 0..500 {
            if self.command::<String>("CLUSTER INFO").contains("cluster_state:ok") {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the cluster does not form");
    }

    /// Returns how often a command was called, directly or by scripts.
    pub fn calls(&self, command: &str) -> u64 {
        let info = self.command::<String>("INFO commandstats");
        let prefix = format!("cmdstat_{command}:calls=");
        info.lines()
            .find_map(|line| line.strip_prefix(&prefix)?.split(',').next()?.parse().ok())
            .unwrap_or(0)
    }

    fn wait_until_up(&mut self) -> Result<(), String> {
        for _ in 0..500 {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Err(format!("redis-server ended with {status}"));
            }
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() && self.replies() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err("redis-server does not reply within 10 s".to_owned())
    }

    /// Whether the server has loaded its data. A server that asks for a password is also up.
    fn replies(&self) -> bool {
        let Ok(client) = redis::Client::open(self.url()) else {
            return false;
        };
        match client.get_connection_with_timeout(Duration::from_secs(1)) {
            Ok(mut connection) => match redis::cmd("PING").query::<String>(&mut connection) {
                Ok(_) => true,
                Err(error) => error.code() == Some("NOAUTH"),
            },
            Err(error) => error.code() == Some("NOAUTH"),
        }
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

fn arguments(port: u16, folder: &std::path::Path, settings: &[&str]) -> Vec<String> {
    let port = port.to_string();
    let folder = folder.to_str().unwrap();
    let ours = [
        "--port",
        &port,
        "--bind",
        "127.0.0.1",
        "--dir",
        folder,
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--daemonize",
        "no",
        "--loglevel",
        "warning",
        "--repl-diskless-sync-delay",
        "0",
    ];
    ours.iter().chain(settings).map(|word| (*word).to_owned()).collect()
}

fn spawn(arguments: &[String], environment: &[(&str, PathBuf)]) -> Child {
    // A write beyond the limit of `limit_files` fails, as on a full disk, instead of ending the server.
    Command::new("env")
        .args(["--ignore-signal=XFSZ", "redis-server"])
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
