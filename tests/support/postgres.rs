//! A PostgreSQL server for one test.
#![allow(dead_code, reason = "every test binary uses its own part")]
#![allow(unreachable_pub, reason = "every test binary includes this module as its own")]

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::port::free_port;

/// A server on a free port with its data in a temporary folder. Dropping this value ends the server
/// and removes the data.
pub struct PostgresServer {
    folder: PathBuf,
    port: u16,
    child: Option<Child>,
    environment: Vec<(&'static str, PathBuf)>,
    /// Held so that the next server of this process can copy the same cluster.
    cluster: Arc<NewCluster>,
}

/// The data of a server that has never run. The servers of a process copy it, which takes a tenth
/// of the time of `initdb`. The last server to end removes it.
struct NewCluster {
    folder: PathBuf,
}

impl NewCluster {
    fn of_this_process() -> Arc<Self> {
        static CURRENT: Mutex<Weak<NewCluster>> = Mutex::new(Weak::new());
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = current.upgrade() {
            return cluster;
        }
        let cluster = Arc::new(Self::make());
        *current = Arc::downgrade(&cluster);
        cluster
    }

    fn make() -> Self {
        let cluster = Self { folder: new_folder() };
        run_to_its_end(
            command_in(&cluster.folder, &cluster.folder.with_extension("log"), "initdb")
                .args(["--auth=trust", "--username=app", "--no-sync"])
                .args(["--encoding=UTF8", "--locale=C", "-D"])
                .arg(&cluster.folder),
        );
        cluster
    }
}

impl Drop for NewCluster {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.folder));
        drop(fs::remove_file(self.folder.with_extension("log")));
    }
}

impl PostgresServer {
    pub fn start() -> Self {
        Self::within(Vec::new())
    }

    /// Starts a server with these environment variables.
    pub fn within(environment: Vec<(&'static str, PathBuf)>) -> Self {
        let server = Self::without_data(environment, NewCluster::of_this_process());
        let copy = &mut server.command("cp");
        run_to_its_end(copy.arg("-a").arg(&server.cluster.folder).arg(server.data()));
        server.on_a_free_port()
    }

    /// Starts a standby that streams from this server, and waits until it is ready.
    pub fn standby(&self) -> Self {
        let server = Self::without_data(self.environment.clone(), Arc::clone(&self.cluster));
        let copy = &mut server.command("pg_basebackup");
        copy.args(["-h", "127.0.0.1", "-U", "app", "-p", &self.port.to_string()]);
        copy.args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "-D"]);
        run_to_its_end(copy.arg(server.data()));
        server.on_a_free_port()
    }

    fn without_data(environment: Vec<(&'static str, PathBuf)>, cluster: Arc<NewCluster>) -> Self {
        Self {
            folder: new_folder(),
            port: 0,
            child: None,
            environment,
            cluster,
        }
    }

    fn on_a_free_port(mut self) -> Self {
        // Another process may look for a port at the same time, and find the same one.
        let mut last = String::new();
        for _ in 0..5 {
            self.port = free_port();
            match self.try_to_run() {
                Ok(()) => return self,
                Err(error) => last = error,
            }
        }
        panic!("{last}");
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Makes a primary of this standby, and waits until it accepts writes.
    pub fn promote(&self) {
        run_to_its_end(self.command("pg_ctl").arg("promote").arg("-D").arg(self.data()));
    }

    /// Runs a statement.
    pub fn execute(&self, statement: &str) {
        let port = self.port.to_string();
        let arguments = [
            "-q",
            "-h",
            "127.0.0.1",
            "-U",
            "app",
            "-p",
            &port,
            "-c",
            statement,
            "postgres",
        ];
        run_to_its_end(self.command("psql").args(arguments));
    }

    /// Sends a signal to the server and to its child processes.
    pub fn signal(&self, signal: &str) {
        let Some(child) = &self.child else { return };
        // A server that stands still starts no further process.
        send("-STOP", &[child.id().to_string()]);
        let processes = self.processes();
        send(signal, &processes);
        if signal != "-STOP" {
            send("-CONT", &processes);
        }
    }

    /// Whether the test has started the server and not killed it.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Kills the server and its child processes with SIGKILL. Waits until all have ended, because the
    /// server does not start again while one of them still has its memory.
    pub fn kill_hard(&mut self) {
        self.signal("-KILL");
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
        // The server may have started a process while its processes were listed.
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            send("-KILL", &left);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets no file of the server grow beyond this number of bytes, or without a limit if it is
    /// `unlimited`.
    pub fn limit_files(&self, bytes: &str) {
        for process in &self.processes() {
            // The process may have ended in the meantime.
            let limit = Command::new("prlimit")
                .args(["--pid", process, &format!("--fsize={bytes}:")])
                .stderr(Stdio::null())
                .status();
            let _: ExitStatus = limit.unwrap();
        }
    }

    /// Returns the ids of the processes of the server: all that work in its data folder. A process
    /// that ends leaves the folder after it has given back its memory.
    fn processes(&self) -> Vec<String> {
        let data = self.data().canonicalize().unwrap();
        let all = fs::read_dir("/proc").unwrap().flatten();
        let own = all.filter(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|folder| folder == data));
        own.map(|process| process.file_name().to_string_lossy().into_owned())
            .collect()
    }

    pub fn url(&self) -> String {
        self.url_by(self.port)
    }

    /// Returns the URL of this server through a proxy that listens on another port.
    pub fn url_by(&self, port: u16) -> String {
        format!("postgres://app@127.0.0.1:{port}/postgres")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Writes a file that only the server can read.
    pub fn give(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        if let Some((user, group)) = unprivileged() {
            chown(&path, Some(user), Some(group)).unwrap();
        }
        path
    }

    /// Kills the server as a power cut does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGQUIT stops the server and its children at once, without a checkpoint.
            let stopped = Command::new("kill").args(["-QUIT", &child.id().to_string()]).status();
            assert!(stopped.unwrap().success());
            child.wait().unwrap();
        }
    }

    /// Starts the server again with the same port and data.
    pub fn run(&mut self) {
        if let Err(error) = self.try_to_run() {
            panic!("{error}");
        }
    }

    fn try_to_run(&mut self) -> Result<(), String> {
        let child = self
            .command("postgres")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .arg("-D")
            .arg(self.data())
            .args(["-p", &self.port.to_string(), "-k"])
            .arg(&self.folder)
            .args([
                "-c",
                "listen_addresses=127.0.0.1",
                "-c",
                "max_connections=200",
                "-c",
                "recovery_init_sync_method=syncfs",
            ])
            .spawn()
            .unwrap();
        self.child = Some(child);
        for _ in 0..3_000 {
            // Look at the process first, because another server may listen on the port.
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                let log = fs::read_to_string(self.log()).unwrap();
                return Err(format!("postgres ended with {status}:\n{log}"));
            }
            if self.is_ready() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(format!(
            "postgres does not accept connections; its log is {}",
            self.log().display()
        ))
    }

    fn is_ready(&self) -> bool {
        let ready = Command::new(binary("pg_isready"))
            .args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()])
            .status();
        ready.unwrap().success()
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    fn command(&self, name: &str) -> Command {
        command_in(&self.folder, &self.log(), name)
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.kill();
        if !std::thread::panicking() {
            drop(fs::remove_dir_all(&self.folder));
        }
    }
}

/// Creates a temporary folder that belongs to the user that runs the server.
fn new_folder() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let folder = std::env::temp_dir().join(format!("postgres-{process}-{count}"));
    fs::create_dir_all(&folder).unwrap();
    if let Some((user, group)) = unprivileged() {
        chown(&folder, Some(user), Some(group)).unwrap();
    }
    folder
}

/// Returns a command that runs in a folder as the user that runs the server. The command appends
/// its output to a log.
fn command_in(folder: &Path, log: &Path, name: &str) -> Command {
    let log = File::options().create(true).append(true).open(log).unwrap();
    let mut command = Command::new(binary(name));
    command
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    if let Some((user, group)) = unprivileged() {
        command.uid(user).gid(group);
    }
    command
}

/// Sends a signal to processes. Some of them may have ended.
fn send(signal: &str, processes: &[String]) {
    let status = Command::new("kill")
        .arg(signal)
        .args(processes)
        .stderr(Stdio::null())
        .status();
    let _: ExitStatus = status.unwrap();
}

fn run_to_its_end(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?} failed: {status}");
}

/// Returns the ids of the user and group `postgres` if this process is root, because the server
/// refuses to run as root.
pub fn unprivileged() -> Option<(u32, u32)> {
    let id = |arguments: &[&str]| {
        let output = Command::new("id").args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse::<u32>().ok()
    };
    if id(&["-u"]) != Some(0) {
        return None;
    }
    let user = id(&["-u", "postgres"]).expect("there is no user `postgres`; run `./test`, which installs the server");
    Some((user, id(&["-g", "postgres"]).unwrap()))
}

/// Returns the path of a server binary: of the newest version that Debian has installed, otherwise
/// from `PATH`.
fn binary(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let installed = versions.map(|version| version.path().join("bin").join(name));
    installed
        .filter(|path| path.exists())
        .max()
        .unwrap_or_else(|| Path::new(name).to_owned())
}

/// Whether a server listens on this port.
pub fn is_open(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}
