//! The client in Python. It runs in a virtual environment, which the first run creates.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use harness::virtual_environment;

use crate::Error;

const REQUIREMENTS: &str = include_str!("../requirements.txt");
const FOLDER: &str = env!("CARGO_MANIFEST_DIR");

/// Runs the client against a server. Returns the output of the client, and whether every claim was
/// true.
///
/// # Errors
///
/// Fails if the virtual environment cannot be created. This needs `python3` with `venv` and, the
/// first time, network access.
pub fn run_client(server: SocketAddr) -> Result<(String, bool), Error> {
    let python = virtual_environment("grpcio", REQUIREMENTS)?.join("bin/python");
    let output = Command::new(python)
        .arg(format!("{FOLDER}/client.py"))
        .arg(server.to_string())
        // A proxy of the environment cannot reach this host.
        .env("no_proxy", "127.0.0.1")
        .stdin(Stdio::null())
        .output()?;
    let lines = [&output.stdout[..], &output.stderr].concat();
    Ok((String::from_utf8_lossy(&lines).into_owned(), output.status.success()))
}
