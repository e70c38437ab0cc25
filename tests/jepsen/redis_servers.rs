//! Redis: a server alone, a server with a replica, and a Cluster.

use std::time::Duration;

use crate::faults::{BEFORE_RESTART, Fault, Servers, local};
use crate::random::Random;
use crate::support::proxy::Proxy;
use crate::support::redis::RedisServer;
use crate::support::turned_clock::TurnedClock;

/// A server, perhaps with a replica.
pub(crate) struct Redis {
    primary: RedisServer,
    replica: Option<RedisServer>,
    proxies: Vec<Proxy>,
    clock: TurnedClock,
}

impl Redis {
    pub(crate) async fn start(processes: usize, has_replica: bool) -> (Self, Vec<Proxy>) {
        let clock = TurnedClock::new();
        let primary = RedisServer::within(&[], &clock.environment());
        let replica = has_replica.then(|| primary.replica());
        let mut proxies = Vec::new();
        for _ in 0..processes {
            proxies.push(Proxy::to(local(primary.port())).await);
        }
        let redis = Self {
            primary,
            replica,
            proxies: proxies.clone(),
            clock,
        };
        (redis, proxies)
    }

    /// The replica takes the place of the primary, which is lost with its data.
    fn fail_over(&mut self) {
        let Some(mut replica) = self.replica.take() else {
            return;
        };
        self.primary.kill();
        if !replica.is_running() {
            replica.restart();
        }
        replica.promote();
        for proxy in &self.proxies {
            proxy.lead_to(local(replica.port()));
        }
        self.primary = replica;
        self.replica = Some(self.primary.replica());
    }

    fn signal_replica(&self, signal: &str) {
        if let Some(replica) = &self.replica {
            replica.signal(signal);
        }
    }
}

impl Servers for Redis {
    fn faults(&self) -> Vec<Fault> {
        let replicated = [Fault::FailOverBehind, Fault::FailOver, Fault::PauseReplica];
        let mut faults = if self.replica.is_some() {
            replicated.to_vec()
        } else {
            Vec::new()
        };
        faults.extend([Fault::Kill, Fault::Pause, Fault::DiskFull]);
        faults.extend(Fault::NETWORK);
        faults.extend(Fault::CLOCK);
        faults
    }

    fn begin(&mut self, fault: Fault, random: &mut Random) {
        match fault {
            Fault::Kill => self.primary.kill(),
            Fault::Pause => self.primary.signal("-STOP"),
            Fault::Clock(seconds) => self.clock.set(seconds),
            Fault::DiskFull => {
                // A server that writes to its disk before it replies exits. Another one refuses
                // writes until there is room again.
                if random.chance(50) {
                    self.primary.command::<()>("CONFIG SET appendfsync everysec");
                }
                self.primary.limit_files("1");
            }
            Fault::PauseReplica => self.signal_replica("-STOP"),
            Fault::FailOverBehind => self.replica.iter_mut().for_each(RedisServer::kill),
            Fault::RestartBehind => {
                self.replica.iter_mut().for_each(RedisServer::kill);
                std::thread::sleep(BEFORE_RESTART);
                self.primary.restart();
            }
            _ => {}
        }
    }

    fn end(&mut self, fault: Fault) {
        match fault {
            Fault::Kill => self.primary.restart(),
            Fault::Pause => self.primary.signal("-CONT"),
            Fault::Clock(_) => self.clock.set(0),
            Fault::DiskFull => {
                self.primary.limit_files("unlimited");
                if self.primary.is_running() {
                    self.primary.wait_for("persistence", "aof_last_write_status:ok");
                    self.primary.command::<()>("CONFIG SET appendfsync always");
                } else {
                    self.primary.restart();
                }
            }
            Fault::PauseReplica => self.signal_replica("-CONT"),
            Fault::FailOver | Fault::FailOverBehind | Fault::RestartBehind => self.fail_over(),
            _ => {}
        }
    }

    fn url(&self) -> String {
        self.primary.url()
    }
}

/// Three primaries with a third of the slots each, and a replica of each. Clients reach each node by
/// a proxy, and so does the replica of the node.
pub(crate) struct Cluster {
    nodes: Vec<RedisServer>,
    proxies: Vec<Proxy>,
    /// The primary that a fault hits, and its replica.
    hit: (usize, usize),
}

impl Cluster {
    pub(crate) async fn start() -> (Self, Vec<Proxy>) {
        let (mut nodes, mut proxies) = (Vec::new(), Vec::new());
        for _ in 0..6 {
            let proxy = Proxy::to(local(1)).await;
            let port = proxy.address.port().to_string();
            let settings = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"];
            let announced = [
                "--cluster-announce-port",
                &port,
                "--cluster-replica-validity-factor",
                "0",
            ];
            let node = RedisServer::with(&[settings, announced].concat());
            proxy.lead_to(local(node.port()));
            nodes.push(node);
            proxies.push(proxy);
        }
        for (node, slots) in nodes.iter().zip(["0 5460", "5461 10922", "10923 16383"]) {
            node.command::<()>(&format!("CLUSTER ADDSLOTSRANGE {slots}"));
        }
        for node in &nodes[1..] {
            let bus = node.port() + 10_000;
            nodes[0].command::<()>(&format!("CLUSTER MEET 127.0.0.1 {} {bus}", node.port()));
        }
        let cluster = Self {
            nodes,
            proxies: proxies.clone(),
            hit: (0, 3),
        };
        cluster.nodes.iter().for_each(RedisServer::wait_for_cluster);
        for (replica, primary) in (3..6).zip(0..3) {
            cluster.replicate(replica, primary);
        }
        (cluster, proxies)
    }

    fn replicate(&self, replica: usize, primary: usize) {
        let id: String = self.nodes[primary].command("CLUSTER MYID");
        let command = format!("CLUSTER REPLICATE {id}");
        crate::run::until("the node knows its primary", || {
            self.nodes[replica].try_command(&command).is_ok()
        });
        self.nodes[replica].wait_for("replication", "master_link_status:up");
    }

    fn is_primary(&self, node: usize) -> bool {
        let role = self.nodes[node].try_command("INFO replication");
        role.is_ok_and(|info| info.contains("role:master"))
    }

    /// Waits until each pair has a primary and a replica with its data.
    fn wait_until_whole(&self) {
        crate::run::until("each primary of the Cluster has its replica", || {
            (0..3).all(|first| {
                let infos = [first, first + 3].map(|node| {
                    let info = self.nodes[node].try_command("INFO replication");
                    info.unwrap_or_default()
                });
                infos.iter().any(|info| info.contains("role:master"))
                    && infos.iter().any(|info| info.contains("master_link_status:up"))
            })
        });
        self.nodes.iter().for_each(RedisServer::wait_for_cluster);
    }

    /// The replica takes the place of its primary, which comes back as its replica.
    fn fail_over(&mut self) {
        let (primary, replica) = self.hit;
        self.nodes[primary].kill();
        if !self.nodes[replica].is_running() {
            self.nodes[replica].restart();
        }
        crate::run::until("the replica takes over", || {
            drop(self.nodes[replica].try_command("CLUSTER FAILOVER TAKEOVER"));
            self.is_primary(replica)
        });
        self.nodes[primary].restart();
        self.wait_until_whole();
    }
}

impl Servers for Cluster {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = Fault::REPLICATED.to_vec();
        faults.extend([Fault::Kill, Fault::Pause]);
        faults.extend(Fault::NETWORK);
        faults
    }

    fn begin(&mut self, fault: Fault, random: &mut Random) {
        let first = random.below(3);
        self.hit = if self.is_primary(first) {
            (first, first + 3)
        } else {
            (first + 3, first)
        };
        let (primary, replica) = self.hit;
        match fault {
            Fault::Kill => self.nodes[primary].kill(),
            Fault::Pause => self.nodes[primary].signal("-STOP"),
            Fault::PauseReplica => self.nodes[replica].signal("-STOP"),
            Fault::FailOverBehind => self.nodes[replica].kill(),
            Fault::RestartBehind => {
                self.nodes[replica].kill();
                std::thread::sleep(BEFORE_RESTART);
                self.nodes[primary].restart();
            }
            _ => {}
        }
    }

    fn end(&mut self, fault: Fault) {
        let (primary, replica) = self.hit;
        match fault {
            Fault::Kill => self.nodes[primary].restart(),
            Fault::Pause => self.nodes[primary].signal("-CONT"),
            Fault::PauseReplica => self.nodes[replica].signal("-CONT"),
            Fault::FailOver | Fault::FailOverBehind | Fault::RestartBehind => return self.fail_over(),
            _ => return,
        }
        std::thread::sleep(Duration::from_millis(200));
        self.wait_until_whole();
    }

    fn url(&self) -> String {
        let urls: Vec<String> = self.nodes.iter().map(|node| node.url_by(node.port())).collect();
        urls.join(",")
    }
}

impl Cluster {
    /// Returns the URLs of all nodes by their proxies.
    pub(crate) fn proxied_url(&self) -> String {
        let ports = self.proxies.iter().map(|proxy| proxy.address.port());
        let urls: Vec<String> = ports.map(|port| self.nodes[0].url_by(port)).collect();
        urls.join(",")
    }
}
