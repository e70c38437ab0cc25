//! A NATS server with JetStream.

use std::process::Command;
use std::time::Duration;

use crate::port::free_port;
use crate::server::{Folder, Server};

/// A running `nats-server` that stores its streams on disk.
pub struct NatsServer {
    server: Server,
    folder: Folder,
    port: u16,
}

impl NatsServer {
    /// Starts a server.
    ///
    /// # Panics
    ///
    /// Panics if the server does not start.
    pub fn start() -> Self {
        let mut last = String::new();
        // Another process may take the free port before the server does, so try again.
        for _ in 0..5 {
            let (folder, port) = (Folder::new("nats"), free_port());
            let mut server = spawn(&folder, port);
            match server.wait_until_up(port, START_TIMEOUT) {
                Ok(()) => return Self { server, folder, port },
                Err(error) => last = error,
            }
        }
        panic!("{last}");
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Kills the server by SIGKILL, and starts it again with the same port and folder.
    ///
    /// # Panics
    ///
    /// Panics if the server does not start again.
    pub fn restart(&mut self) {
        self.server.kill();
        self.server = spawn(&self.folder, self.port);
        self.server.wait_until_up(self.port, START_TIMEOUT).unwrap();
    }
}

const START_TIMEOUT: Duration = Duration::from_secs(20);

fn spawn(folder: &Folder, port: u16) -> Server {
    let mut command = Command::new("nats-server");
    let command = command.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"]);
    Server::spawn("nats-server", command.arg(folder.path()), folder)
}
