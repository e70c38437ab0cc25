//! Processes that are killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{up_to, Ledger};

/// A process, which ends with this value.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).spawn();
        Self(child.unwrap_or_else(|error| {
            let program = Path::new(command.get_program()).display();
            panic!("`{program}` cannot be run; ./test installs what is missing ({error})")
        }))
    }

    /// SIGKILL: it learns nothing of its end.
    pub fn kill(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }

    /// Stops it for now (`-STOP`), or lets it go on (`-CONT`).
    ///
    /// # Panics
    ///
    /// If that cannot be.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.0.id().to_string()]).status();
        assert!(status.unwrap().success(), "{signal} is not delivered");
    }

    /// Whether it runs still, if only stopped for now.
    pub fn is_up(&mut self) -> bool {
        self.0.try_wait().is_ok_and(|status| status.is_none())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Some processes of one kind, of which one after the other is killed and started again. All end with this value.
pub struct Fleet<F> {
    start: F,
    members: Vec<Process>,
    kills: usize,
}

impl<F: Fn() -> Command> Fleet<F> {
    /// Starts so many.
    ///
    /// # Panics
    ///
    /// If one cannot be started.
    pub fn start(count: usize, start: F) -> Self {
        let members = (0..count).map(|_| member(&start)).collect();
        Self {
            start,
            members,
            kills: 0,
        }
    }

    /// Kills one of them by SIGKILL (no word, no cleaning up) and starts another in its place.
    ///
    /// # Panics
    ///
    /// If one has ended by itself.
    pub fn kill_one(&mut self) {
        self.replace_one().kill();
        self.kills += 1;
    }

    /// Does so again and again, each time after some effects more.
    ///
    /// # Panics
    ///
    /// If one has ended by itself, or those effects do not come.
    pub async fn kill_one_by_one(&mut self, kills: usize, effects: &Ledger, between: usize) {
        for _ in 0..kills {
            self.progress(effects, between).await;
            self.kill_one();
        }
    }

    /// Waits for some effects more, and then for up to 20 ms.
    ///
    /// # Panics
    ///
    /// If they do not come.
    pub async fn progress(&mut self, effects: &Ledger, more: usize) {
        let before = effects.lines().len();
        for _ in 0..12_000 {
            if effects.lines().len() >= before + more {
                tokio::time::sleep(up_to(20)).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("within a minute no {more} effects follow the {before}");
    }

    /// Puts another in the place of one, and gives that one out.
    ///
    /// # Panics
    ///
    /// If one has ended by itself.
    #[must_use = "it ends with its value"]
    pub fn replace_one(&mut self) -> Process {
        self.check();
        let chosen = rand::random_range(0..self.members.len());
        std::mem::replace(&mut self.members[chosen], member(&self.start))
    }

    /// Starts another in the place of each that has ended by itself. Says how many those were.
    ///
    /// # Panics
    ///
    /// If one cannot be started.
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

    /// # Panics
    ///
    /// If one has ended by itself.
    pub fn check(&mut self) {
        assert!(self.members.iter_mut().all(Process::is_up), "a process ended by itself");
    }

    /// How many were killed.
    pub fn kills(&self) -> usize {
        self.kills
    }
}

fn member(start: impl Fn() -> Command) -> Process {
    Process::start(start().stdout(Stdio::null()))
}

/// This very test binary, to run one of its tests alone: the one that plays a part when the environment tells it to.
///
/// # Panics
///
/// If the binary cannot be found.
pub fn this_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
    command
}

/// Runs a program, which must say these lines and succeed.
///
/// # Panics
///
/// If it does not.
pub fn assert_says(program: &str, lines: &[&str]) {
    let output = Command::new(program).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{failed}");
    for line in lines {
        assert!(said.contains(line), "{line}: {said}");
    }
}

/// Runs a program [`unprotected`](crate::unprotected), which must notice that it has not done what it promises.
///
/// # Panics
///
/// If it does not.
pub fn assert_fails_unprotected(program: &str) {
    let output = crate::unprotected(Command::new(program)).output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(failed.contains("that is not what was promised"), "{failed}");
}
