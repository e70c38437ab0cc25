//! PostgreSQL: a server alone, and a server with a standby.

use crate::faults::{BEFORE_RESTART, Fault, Servers, local};
use crate::random::Random;
use crate::support::postgres::PostgresServer;
use crate::support::proxy::Proxy;
use crate::support::turned_clock::TurnedClock;

/// The standby of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standby {
    Absent,
    Asynchronous,
    /// Commits wait for the standby, and the primary never restarts while its standby is down.
    Synchronous,
    /// Commits wait for the standby, and the primary restarts while its standby is down.
    SynchronousRestarted,
}

impl Standby {
    fn is_synchronous(self) -> bool {
        matches!(self, Self::Synchronous | Self::SynchronousRestarted)
    }

    fn faults(self) -> &'static [Fault] {
        match self {
            Self::Absent => &[],
            Self::Asynchronous => &Fault::REPLICATED,
            Self::Synchronous => &[Fault::FailOverBehind, Fault::FailOver, Fault::PauseReplica],
            Self::SynchronousRestarted => &[Fault::RestartBehind],
        }
    }
}

pub(crate) struct Postgres {
    primary: PostgresServer,
    standby: Option<PostgresServer>,
    kind: Standby,
    proxies: Vec<Proxy>,
    clock: TurnedClock,
}

impl Postgres {
    pub(crate) async fn start(processes: usize, standby: Standby) -> (Self, Vec<Proxy>) {
        let clock = TurnedClock::new();
        let primary = PostgresServer::within(clock.environment());
        primary.execute("CREATE TABLE payments (receipt bigserial PRIMARY KEY, key bigint NOT NULL, message text)");
        primary.execute("CREATE TABLE handled (consumer text NOT NULL, key bigint NOT NULL, message text NOT NULL)");
        if standby.is_synchronous() {
            // The standby copies this setting, and obeys it when it is promoted.
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'");
            // A standby tries to connect this often.
            primary.execute("ALTER SYSTEM SET wal_retrieve_retry_interval = '100 ms'");
        }
        let made = (standby != Standby::Absent).then(|| primary.standby());
        // From here on, commits wait for the standby.
        primary.execute("SELECT pg_reload_conf()");
        let mut proxies = Vec::new();
        for _ in 0..processes {
            proxies.push(Proxy::to(local(primary.port())).await);
        }
        let postgres = Self {
            primary,
            standby: made,
            kind: standby,
            proxies: proxies.clone(),
            clock,
        };
        (postgres, proxies)
    }

    /// Starts the primary again, and waits until a synchronous standby has every write. Meanwhile, the
    /// primary shows writes that the standby lacks.
    fn restart(&mut self) {
        self.primary.kill_hard();
        self.primary.run();
        if self.kind.is_synchronous() {
            self.primary.execute("COMMENT ON TABLE payments IS 'a write'");
        }
    }

    /// The standby takes the place of the primary, which is lost with its data.
    fn fail_over(&mut self) {
        let Some(mut standby) = self.standby.take() else {
            return;
        };
        self.primary.kill_hard();
        if !standby.is_running() {
            standby.run();
        }
        standby.promote();
        for proxy in &self.proxies {
            proxy.lead_to(local(standby.port()));
        }
        self.primary = standby;
        self.standby = Some(self.primary.standby());
    }

    fn signal_standby(&self, signal: &str) {
        if let Some(standby) = &self.standby {
            standby.signal(signal);
        }
    }
}

impl Servers for Postgres {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = self.kind.faults().to_vec();
        if self.kind == Standby::SynchronousRestarted {
            return faults;
        }
        faults.extend([Fault::Kill, Fault::Pause, Fault::DiskFull]);
        faults.extend(Fault::NETWORK);
        faults.extend(Fault::CLOCK);
        faults
    }

    fn begin(&mut self, fault: Fault, _: &mut Random) {
        match fault {
            Fault::Kill => self.primary.kill_hard(),
            Fault::Pause => self.primary.signal("-STOP"),
            Fault::Clock(seconds) => self.clock.set(seconds),
            Fault::DiskFull => self.primary.limit_files("1"),
            Fault::PauseReplica => self.signal_standby("-STOP"),
            Fault::FailOverBehind => self.standby.iter_mut().for_each(PostgresServer::kill_hard),
            Fault::RestartBehind => {
                self.standby.iter_mut().for_each(PostgresServer::kill_hard);
                std::thread::sleep(BEFORE_RESTART);
                self.primary.kill_hard();
                self.primary.run();
            }
            _ => {}
        }
    }

    fn end(&mut self, fault: Fault) {
        match fault {
            // A server whose disk was full has ended itself if it had to write.
            Fault::Kill | Fault::DiskFull => self.restart(),
            Fault::Pause => self.primary.signal("-CONT"),
            Fault::Clock(_) => self.clock.set(0),
            Fault::PauseReplica => self.signal_standby("-CONT"),
            Fault::FailOver | Fault::FailOverBehind | Fault::RestartBehind => self.fail_over(),
            _ => {}
        }
    }

    fn url(&self) -> String {
        self.primary.url()
    }
}
