//! The client in Python, in a virtual environment that is made when it is first needed.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use harness::virtual_environment;

use crate::Error;

const REQUIREMENTS: &str = include_str!("../requirements.txt");
const FOLDER: &str = env!("CARGO_MANIFEST_DIR");

/// Runs the client against a server. Returns its output, line by line, and whether it found everything as it should be.
///
/// # Errors
///
/// If the virtual environment cannot be made. It needs `python3` with `venv` and, the first time, network access.
pub fn run_client(server: SocketAddr) -> Result<(String, bool), Error> {
    let python = virtual_environment("grpcio", REQUIREMENTS)?.join("bin/python");
    let output = Command::new(python)
        .arg(format!("{FOLDER}/client.py"))
        .arg(server.to_string())
        // A proxy is for other hosts.
        .env("no_proxy", "127.0.0.1")
        .stdin(Stdio::null())
        .output()?;
    let lines = [&output.stdout[..], &output.stderr].concat();
    Ok((String::from_utf8_lossy(&lines).into_owned(), output.status.success()))
}
