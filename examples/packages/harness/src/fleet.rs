//! Processes that are killed.

use std::process::{Child, Command, Stdio};

/// Some processes of one kind, of which one after the other is killed and started again. All end with this value.
pub struct Fleet<F> {
    start: F,
    members: Vec<Child>,
    kills: usize,
}

impl<F: Fn() -> Command> Fleet<F> {
    /// Starts so many.
    ///
    /// # Panics
    ///
    /// If one cannot be started.
    pub fn start(count: usize, start: F) -> Self {
        let members = (0..count).map(|_| spawn(start())).collect();
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
        self.check();
        let chosen = rand::random_range(0..self.members.len());
        let member = &mut self.members[chosen];
        member.kill().unwrap();
        member.wait().unwrap();
        *member = spawn((self.start)());
        self.kills += 1;
    }

    /// # Panics
    ///
    /// If one has ended by itself.
    pub fn check(&mut self) {
        for member in &mut self.members {
            let status = member.try_wait().unwrap();
            assert!(status.is_none(), "a process ended by itself: {status:?}");
        }
    }

    /// Starts another in the place of each that has ended by itself. Says how many those were.
    ///
    /// # Panics
    ///
    /// If one cannot be started.
    pub fn replace_ended(&mut self) -> usize {
        let mut ended = 0;
        for member in &mut self.members {
            if member.try_wait().unwrap().is_some() {
                *member = spawn((self.start)());
                ended += 1;
            }
        }
        ended
    }

    /// How many were killed.
    pub fn kills(&self) -> usize {
        self.kills
    }
}

impl<F> Drop for Fleet<F> {
    fn drop(&mut self) {
        for member in &mut self.members {
            drop(member.kill());
            drop(member.wait());
        }
    }
}

fn spawn(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
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
