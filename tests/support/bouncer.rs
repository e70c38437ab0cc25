//! A PgBouncer in front of the PostgreSQL server of a test.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::port::free_port;
use super::postgres::{PostgresServer, is_open, unprivileged};

/// A pooler on a free port. Dropping this value stops it.
pub struct Bouncer {
    child: Child,
    port: u16,
    settings: PathBuf,
}

impl Bouncer {
    /// Starts a pooler that lends a server connection for one `transaction`, `session` or
    /// `statement`. `further` has more lines of its settings.
    pub fn start(server: &PostgresServer, mode: &str, further: &str) -> Self {
        let port = free_port();
        let settings = server.give(&format!("pgbouncer-{port}.ini"), &settings(server, port, mode, further));
        Self {
            child: run(&settings, port),
            port,
            settings,
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Stops the pooler and starts it again on the same port in another mode.
    pub fn restart(&mut self, server: &PostgresServer, mode: &str, further: &str) {
        self.stop();
        std::fs::write(&self.settings, settings(server, self.port, mode, further)).unwrap();
        self.child = run(&self.settings, self.port);
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn settings(server: &PostgresServer, port: u16, mode: &str, further: &str) -> String {
    format!(
        "[databases]\npostgres = host=127.0.0.1 port={} user=app\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
         pool_mode = {mode}\ndefault_pool_size = 12\n{further}\n",
        server.port()
    )
}

fn run(settings: &Path, port: u16) -> Child {
    let installed = Path::new("/usr/sbin/pgbouncer");
    let mut command = Command::new(if installed.exists() {
        installed
    } else {
        Path::new("pgbouncer")
    });
    command.arg("-q").arg(settings).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // PgBouncer refuses to run as root, as PostgreSQL does.
    if let Some((user, group)) = unprivileged() {
        command.uid(user).gid(group);
    }
    let mut child = command
        .spawn()
        .expect("pgbouncer is not installed; run `./test`, which installs it");
    for _ in 0..800 {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "pgbouncer ended by itself: {ended:?}");
        if is_open(port) {
            return child;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    child.kill().unwrap();
    panic!("pgbouncer does not accept connections: {:?}", child.wait());
}
