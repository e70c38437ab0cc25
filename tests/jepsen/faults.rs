//! The faults, and the thread that causes them in an order that follows from a seed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::app::Process;
use crate::bank::{Bank, Event};
use crate::random::Random;
use crate::support::proxy::{Direction, Fate, Proxy};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server is killed with SIGKILL and restarted.
    Kill,
    /// The server stands still (SIGSTOP, SIGCONT).
    Pause,
    /// Bytes between processes and the server vanish in both directions, or in one.
    Cut(Option<Direction>),
    /// Bytes between processes and the server are delayed by this number of milliseconds.
    Slow(u64),
    /// The clock of the server is ahead of the true time, or behind it, by this number of seconds.
    Clock(i64),
    /// The server can write no byte to its disk.
    DiskFull,
    /// The replica or standby stands still.
    PauseReplica,
    /// The server is killed, and its replica or standby takes its place.
    FailOver,
    /// The same, after the replica or standby was down for the time of the fault. A replica that only
    /// stood still would find the missing writes in its socket.
    FailOverBehind,
    /// The same, and the server is also killed and restarted while the replica or standby is down. It
    /// then shows writes that wait for the replica or standby.
    RestartBehind,
}

impl Fault {
    /// The faults of a server with a replica or standby. The first one loses writes for sure if the
    /// store does not wait for the replica.
    pub(crate) const REPLICATED: [Self; 4] = [
        Self::FailOverBehind,
        Self::RestartBehind,
        Self::FailOver,
        Self::PauseReplica,
    ];
    pub(crate) const NETWORK: [Self; 4] = [
        Self::Cut(None),
        Self::Cut(Some(Direction::ToServer)),
        Self::Cut(Some(Direction::ToClient)),
        Self::Slow(700),
    ];
    pub(crate) const CLOCK: [Self; 2] = [Self::Clock(600), Self::Clock(-600)];

    fn lasts(self, random: &mut Random) -> Duration {
        match self {
            Self::FailOverBehind | Self::RestartBehind => random.millis(700..1_200),
            Self::FailOver => Duration::ZERO,
            Self::Pause | Self::PauseReplica => random.millis(100..3_000),
            _ => random.millis(100..1_500),
        }
    }
}

/// The time from the end of a replica to the restart of its primary.
pub(crate) const BEFORE_RESTART: Duration = Duration::from_millis(300);

/// The servers of a store.
pub(crate) trait Servers: Send {
    /// The faults that these servers can have, the most important one first.
    fn faults(&self) -> Vec<Fault>;

    fn begin(&mut self, fault: Fault, random: &mut Random);

    fn end(&mut self, fault: Fault);

    /// Returns the URL of the store without a proxy.
    fn url(&self) -> String;
}

/// The parts of a test that faults can hit.
#[derive(Clone)]
pub(crate) struct Targets {
    pub(crate) bank: Bank,
    pub(crate) servers: Arc<Mutex<Box<dyn Servers>>>,
    pub(crate) proxies: Vec<Proxy>,
    pub(crate) processes: Arc<Mutex<Vec<Process>>>,
}

impl Targets {
    /// Causes faults of the servers and of their network, one after the other, while the run goes
    /// on.
    pub(crate) fn disturb_servers(&self, goes_on: impl Fn() -> bool, mut random: Random) {
        let faults = self.servers.lock().unwrap().faults();
        let mut deck = vec![faults[0]];
        while goes_on() {
            let Some(fault) = deck.pop() else {
                deck.clone_from(&faults);
                random.shuffle(&mut deck);
                continue;
            };
            std::thread::sleep(random.millis(200..1_000));
            self.bank.note(None, Event::Fault(format!("{fault:?} begins")));
            self.begin(fault, &mut random);
            std::thread::sleep(fault.lasts(&mut random));
            if matches!(fault, Fault::FailOverBehind | Fault::RestartBehind) {
                self.wait_for_effects();
            }
            self.end(fault);
            self.bank.note(None, Event::Fault(format!("{fault:?} ends")));
        }
    }

    /// Waits for further effects, so that a failover has something to lose. A store that waits for its
    /// replica allows none, so this ends after 3 s.
    fn wait_for_effects(&self) {
        let is_effect = |event: &Event| matches!(event, Event::Charged { .. } | Event::Published { .. });
        let (before, until) = (self.bank.count(is_effect), self.bank.elapsed() + Duration::from_secs(3));
        while self.bank.count(is_effect) < before + 24 && self.bank.elapsed() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn begin(&self, fault: Fault, random: &mut Random) {
        let fate = match fault {
            Fault::Cut(None) => Fate::SwallowAll,
            Fault::Cut(Some(direction)) => Fate::Swallow(direction),
            Fault::Slow(millis) => Fate::Delay(Duration::from_millis(millis)),
            _ => return self.servers.lock().unwrap().begin(fault, random),
        };
        // All processes lose the server, or one of them.
        let only = random.below(2 * self.proxies.len());
        for (number, proxy) in self.proxies.iter().enumerate() {
            if only >= self.proxies.len() || only == number {
                proxy.set(fate);
            }
        }
    }

    fn end(&self, fault: Fault) {
        match fault {
            Fault::Cut(_) | Fault::Slow(_) => {
                for proxy in &self.proxies {
                    proxy.heal();
                }
            }
            _ => self.servers.lock().unwrap().end(fault),
        }
    }

    /// Kills and stops processes of the application, one after the other, while the run goes on.
    pub(crate) fn disturb_processes(&self, goes_on: impl Fn() -> bool, mut random: Random) {
        while goes_on() {
            std::thread::sleep(random.millis(300..1_500));
            let number = random.below(self.processes.lock().unwrap().len());
            let what = random.pick(&["kill", "stop"]);
            self.bank
                .note(None, Event::Fault(format!("{what} of process {number} begins")));
            if what == "kill" {
                self.processes.lock().unwrap()[number].kill();
                std::thread::sleep(random.millis(20..300));
                self.processes.lock().unwrap()[number].restart();
            } else {
                self.processes.lock().unwrap()[number].signal("-STOP");
                std::thread::sleep(random.millis(100..3_000));
                self.processes.lock().unwrap()[number].signal("-CONT");
            }
            self.bank
                .note(None, Event::Fault(format!("{what} of process {number} ends")));
        }
    }
}

/// Returns the address of a port of this machine.
pub(crate) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
