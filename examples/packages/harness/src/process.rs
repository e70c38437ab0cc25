//! Processes that tests start and kill.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Ledger, up_to};

/// A process. Dropping this value kills the process.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts a process.
    ///
    /// # Panics
    ///
    /// Panics if the process cannot be started.
    pub fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).spawn();
        Self(child.unwrap_or_else(|error| {
            let program = Path::new(command.get_program()).display();
            panic!("cannot run `{program}` ({error}); run ./test, which installs the missing programs")
        }))
    }

    /// Kills the process by SIGKILL, which it cannot notice.
    pub fn kill(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }

    /// Pauses the process (`-STOP`), or resumes it (`-CONT`).
    ///
    /// # Panics
    ///
    /// Panics if the signal cannot be sent.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.0.id().to_string()]).status();
        assert!(status.unwrap().success(), "cannot send {signal}");
    }

    /// Whether the process has not ended. A paused process has not ended.
    pub fn is_up(&mut self) -> bool {
        self.0.try_wait().is_ok_and(|status| status.is_none())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Several processes of one kind. The tests kill one process after the other and start a new one in
/// its place. Dropping this value kills all of them.
pub struct Fleet<F> {
    start: F,
    members: Vec<Process>,
    kills: usize,
}

impl<F: Fn() -> Command> Fleet<F> {
    /// Starts `count` processes.
    ///
    /// # Panics
    ///
    /// Panics if a process cannot be started.
    pub fn start(count: usize, start: F) -> Self {
        let members = (0..count).map(|_| member(&start)).collect();
        Self {
            start,
            members,
            kills: 0,
        }
    }

    /// Kills a random process by SIGKILL, so that it cannot clean up, and starts a new one in its
    /// place.
    ///
    /// # Panics
    ///
    /// Panics if a process has ended by itself.
    pub fn kill_one(&mut self) {
        self.replace_one().kill();
        self.kills += 1;
    }

    /// Kills a process `kills` times, each time after `between` further effects.
    ///
    /// # Panics
    ///
    /// Panics if a process has ended by itself, or if the effects do not happen within a minute.
    pub async fn kill_one_by_one(&mut self, kills: usize, effects: &Ledger, between: usize) {
        for _ in 0..kills {
            self.progress(effects, between).await;
            self.kill_one();
        }
    }

    /// Waits for `more` further effects, and then for up to 20 ms.
    ///
    /// # Panics
    ///
    /// Panics if the effects do not happen within a minute.
    pub async fn progress(&mut self, effects: &Ledger, more: usize) {
        let before = effects.lines().len();
        for _ in 0..12_000 {
            if effects.lines().len() >= before + more {
                tokio::time::sleep(up_to(20)).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("after {before} effects, {more} further ones did not happen within a minute");
    }

    /// Starts a new process in the place of a random one, and returns the old one, which still
    /// runs.
    ///
    /// # Panics
    ///
    /// Panics if a process has ended by itself.
    #[must_use = "dropping the process kills it"]
    pub fn replace_one(&mut self) -> Process {
        self.check();
        let chosen = rand::random_range(0..self.members.len());
        std::mem::replace(&mut self.members[chosen], member(&self.start))
    }

    /// Starts a new process in the place of each one that has ended by itself. Returns the number
    /// of ended processes.
    ///
    /// # Panics
    ///
    /// Panics if a process cannot be started.
    pub fn replace_ended(&mut self) -> usize {
        let mut ended = 0;
        for process in &mut self.members {
            if !process.is_up() {
                *process = member(&self.start);
                ended += 1;
            }
        }
        ended
    }

    /// Checks that no process has ended.
    ///
    /// # Panics
    ///
    /// Panics if a process has ended by itself.
    pub fn check(&mut self) {
        assert!(self.members.iter_mut().all(Process::is_up), "a process ended by itself");
    }

    /// Returns the number of killed processes.
    pub fn kills(&self) -> usize {
        self.kills
    }
}

fn member(start: impl Fn() -> Command) -> Process {
    Process::start(start().stdout(Stdio::null()))
}

/// Returns a command that runs one test of the current test binary. The test behaves as a consumer
/// if environment variables say so.
///
/// # Panics
///
/// Panics if the path of the binary is unknown.
pub fn this_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
    command
}

/// Runs a program, and checks that it prints these texts and succeeds.
///
/// # Panics
///
/// Panics if the program fails or does not print one of the texts.
pub fn assert_prints(program: &str, lines: &[&str]) {
    let output = Command::new(program).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{errors}");
    for line in lines {
        assert!(printed.contains(line), "{line}: {printed}");
    }
}

/// Runs a program [`unprotected`](crate::unprotected), and checks that it reports a false claim.
///
/// # Panics
///
/// Panics if the program succeeds, or fails for another reason.
pub fn assert_fails_unprotected(program: &str) {
    let output = crate::unprotected(Command::new(program)).output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("the outcome is not as promised"), "{errors}");
}
