//! Virtual environments of Python, for programs from PyPI.

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Returns a virtual environment of this name in the target folder, with these packages. The first
/// process that needs the environment creates it.
///
/// # Errors
///
/// Fails if the virtual environment cannot be created. This needs `python3` with `venv` and, the
/// first time, network access.
pub fn virtual_environment(name: &str, requirements: &str) -> Result<PathBuf, Box<dyn Error + Send + Sync>> {
    let program = std::env::current_exe()?;
    // Cargo puts this file into every target folder that it uses.
    let mut folders = program
        .ancestors()
        .filter(|folder| folder.join(".rustc_info.json").exists());
    let target = folders
        .next()
        .ok_or("this program is not in a target folder; start it with cargo")?;
    let environment = target.join(name);
    let made = environment.join("made-of");
    let lock = File::create(target.join(format!("{name}.lock")))?;
    lock.lock()?;
    if fs::read_to_string(&made).is_ok_and(|packages| packages == requirements) {
        return Ok(environment);
    }
    eprintln!("creating a virtual environment for {name} in {}", environment.display());
    drop(fs::remove_dir_all(&environment));
    run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    fs::write(environment.join("requirements.txt"), requirements)?;
    install(&environment)?;
    fs::write(made, requirements)?;
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
        return Err(format!("{command:?} ended with {status}; install python3 and venv, as ./test does").into());
    }
    Ok(())
}
