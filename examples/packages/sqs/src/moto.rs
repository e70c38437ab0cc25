//! A server that speaks SQS: `moto`, from PyPI, in a virtual environment that is made when it is first needed.

use std::error::Error;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::{virtual_environment, Process};

const REQUIREMENTS: &str = include_str!("../requirements.txt");

/// For how long the server removes copies from FIFO queues. SQS does it for five minutes.
pub const WINDOW: Duration = Duration::from_secs(2);

/// It keeps everything in memory, and speaks plain HTTP.
const SERVE: &str = "
import sys
import moto.sqs.models
from moto.server import main
moto.sqs.models.DEDUPLICATION_TIME_IN_SECONDS = int(sys.argv[1])
main(['-p', sys.argv[2]])
";

/// A server on a free port, which ends with this value.
#[derive(Debug)]
pub struct Moto {
    _process: Process,
    port: u16,
}

impl Moto {
    /// # Errors
    ///
    /// If the virtual environment cannot be made. It needs `python3` with `venv` and, the first time, network access.
    ///
    /// # Panics
    ///
    /// When the server does not listen within half a minute.
    pub fn start() -> Result<Self, Box<dyn Error + Send + Sync>> {
        let python = virtual_environment("moto", REQUIREMENTS)?.join("bin/python");
        // Between finding a port and taking it, another process may take it.
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
        panic!("the server does not listen");
    }

    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}
