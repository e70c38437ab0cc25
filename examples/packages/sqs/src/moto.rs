//! A server that speaks SQS: `moto`, from PyPI, in a virtual environment that is made when it is first needed.

use std::error::Error;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::Process;

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
    /// When the virtual environment cannot be made: that takes `python3` with `venv`, and for the first time a network.
    ///
    /// # Panics
    ///
    /// When the server does not listen within half a minute.
    pub fn start() -> Result<Self, Box<dyn Error + Send + Sync>> {
        let python = environment()?.join("bin/python");
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

/// The virtual environment in the target folder: made once, by whichever process is first.
fn environment() -> Result<PathBuf, Box<dyn Error + Send + Sync>> {
    let program = std::env::current_exe()?;
    // Cargo puts this file into every target folder.
    let mut folders = program
        .ancestors()
        .filter(|folder| folder.join("CACHEDIR.TAG").exists());
    let target = folders
        .next()
        .ok_or("this program is not in a target folder of Cargo's")?;
    let (environment, made) = (target.join("moto"), target.join("moto/made-of"));
    let lock = File::create(target.join("moto.lock"))?;
    lock.lock()?;
    if fs::read_to_string(&made).is_ok_and(|requirements| requirements == REQUIREMENTS) {
        return Ok(environment);
    }
    eprintln!("making a virtual environment for moto in {}", environment.display());
    drop(fs::remove_dir_all(&environment));
    run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    fs::write(environment.join("requirements.txt"), REQUIREMENTS)?;
    install(&environment)?;
    fs::write(made, REQUIREMENTS)?;
    Ok(environment)
}

fn install(environment: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
    run(Command::new(environment.join("bin/python"))
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "-r"])
        .arg(environment.join("requirements.txt")))
}

fn run(command: &mut Command) -> Result<(), Box<dyn Error + Send + Sync>> {
    let status = command.stdin(Stdio::null()).status()?;
    if !status.success() {
        return Err(
            format!("{command:?} ended with {status}; it needs python3 with venv, which ./test installs").into(),
        );
    }
    Ok(())
}
