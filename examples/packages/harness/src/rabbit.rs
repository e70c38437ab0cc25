//! A RabbitMQ server.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::port::free_port;
use crate::server::{Folder, Server};

/// A running `rabbitmq-server`, with its own Erlang port mapper.
pub struct RabbitServer {
    _broker: Server,
    _mapper: Server,
    _folder: Folder,
    port: u16,
}

impl RabbitServer {
    /// Starts a server. This takes some seconds.
    ///
    /// # Panics
    ///
    /// Panics if the server does not start.
    pub fn start() -> Self {
        let mut last = String::new();
        // Another process may take a free port before the server does, so try again.
        for _ in 0..3 {
            let folder = Folder::new("rabbit");
            let [port, distribution, mapping] = [(); 3].map(|()| free_port());
            // Start the port mapper in the foreground. Without one, Erlang would start one in the
            // background and leave it behind.
            let mut mapper = Command::new("epmd");
            let mapper = mapper.args(["-address", "127.0.0.1", "-port", &mapping.to_string()]);
            let mut mapper = Server::spawn("epmd", mapper, &folder);
            let mut broker = spawn(&folder, port, distribution, mapping);
            let up = mapper.wait_until_up(mapping, START_TIMEOUT);
            match up.and_then(|()| broker.wait_until_up(port, START_TIMEOUT)) {
                Ok(()) => {
                    return Self {
                        _broker: broker,
                        _mapper: mapper,
                        _folder: folder,
                        port,
                    };
                }
                Err(error) => last = error,
            }
        }
        panic!("{last}");
    }

    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }
}

const START_TIMEOUT: Duration = Duration::from_secs(60);

fn spawn(folder: &Folder, port: u16, distribution: u16, mapping: u16) -> Server {
    let config = folder.file("rabbitmq.conf");
    std::fs::write(&config, "loopback_users = none\nlog.console = true\nlog.file = false\n").unwrap();
    std::fs::write(folder.file("plugins"), "[].").unwrap();
    // Debian's wrapper on the `PATH` changes the user and the log.
    let script = ["/usr/lib/rabbitmq/bin/rabbitmq-server"].into_iter();
    let script = script.map(Path::new).find(|path| path.exists());
    let mut command = Command::new(script.unwrap_or(Path::new("rabbitmq-server")));
    command
        .current_dir(folder.path())
        // Erlang stores its cookie there.
        .env("HOME", folder.path())
        // The script then replaces itself by the broker. Otherwise a kill would end only the
        // script.
        .env("RUNNING_UNDER_SYSTEMD", "true")
        .env("ERL_EPMD_PORT", mapping.to_string())
        .env("RABBITMQ_NODENAME", format!("rabbit-{port}@localhost"))
        .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
        .env("RABBITMQ_NODE_PORT", port.to_string())
        .env("RABBITMQ_DIST_PORT", distribution.to_string())
        .env("RABBITMQ_CONF_ENV_FILE", folder.file("no-environment"))
        .env("RABBITMQ_CONFIG_FILE", &config)
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", folder.file("plugins"))
        .env("RABBITMQ_MNESIA_BASE", folder.file("data"))
        .env("RABBITMQ_LOG_BASE", folder.path())
        .env("RABBITMQ_PID_FILE", folder.file("pid"));
    Server::spawn("rabbitmq-server", &mut command, folder)
}
