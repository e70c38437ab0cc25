//! A server with the API of SQS: `moto`, from PyPI. It runs in a virtual environment, which the
//! first run creates.

use std::error::Error;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::{Process, virtual_environment};

const REQUIREMENTS: &str = include_str!("../requirements.txt");

/// The deduplication window of FIFO queues. SQS has five minutes.
pub const WINDOW: Duration = Duration::from_secs(2);

/// The program of the server. It stores everything in memory and uses HTTP without TLS.
const SERVE: &str = "
import sys
import moto.sqs.models
from moto.server import main
moto.sqs.models.DEDUPLICATION_TIME_IN_SECONDS = int(sys.argv[1])
main(['-p', sys.argv[2]])
";

/// A server on a free port. Dropping this value ends the server.
#[derive(Debug)]
pub struct Moto {
    _process: Process,
    port: u16,
}

impl Moto {
    /// Starts a server.
    ///
    /// # Errors
    ///
    /// Fails if the virtual environment cannot be created. This needs `python3` with `venv` and,
    /// the first time, network access.
    ///
    /// # Panics
    ///
    /// Panics if the server does not listen within half a minute.
    pub fn start() -> Result<Self, Box<dyn Error + Send + Sync>> {
        let python = virtual_environment("moto", REQUIREMENTS)?.join("bin/python");
        // Another process may take the free port before the server does, so try again.
        for _ in 0..3 {
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            let mut command = Command::new(&python);
            command
                .args(["-c", SERVE, &WINDOW.as_secs().to_string(), &port.to_string()])
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let mut process = Process::start(&mut command);
            for _ in 0..600 {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() && process.is_up() {
                    return Ok(Self {
                        _process: process,
                        port,
                    });
                }
                if !process.is_up() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        panic!("the server does not listen on its port");
    }

    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}
