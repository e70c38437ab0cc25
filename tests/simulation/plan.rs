//! The plan of a simulation: the settings, the requests and the faults that follow from a seed.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::random::Random;

/// The way in which requests come to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Over HTTP, through the layer of a server.
    Http,
    /// As messages of a broker, through the layer of a receiver. A try is a delivery.
    Message,
    /// As one-time calls of the program itself. A try is a call.
    Once,
}

/// The guarantee that the application asks for, with a handler that fits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mode {
    /// The bank offers nothing. The layer refuses requests after a lost or failed attempt.
    AtMostOnce,
    /// The bank offers nothing. A handler fails only if it had no effect, and its key is released.
    ReleaseFailures,
    /// The bank deduplicates by the derived key, and lost attempts run again.
    AtLeastOnce,
    /// The bank refuses lower fences and can be asked. A check decides about lost attempts.
    Recover,
}

impl Mode {
    pub(crate) const ALL: [Self; 4] = [
        Self::AtMostOnce,
        Self::ReleaseFailures,
        Self::AtLeastOnce,
        Self::Recover,
    ];
}

/// One operation of a client: a payment under a key, sent until the client has a final response.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Operation {
    pub(crate) at: Duration,
    pub(crate) key: usize,
    /// Whether the client sends another body under the key, by mistake.
    pub(crate) is_other_body: bool,
    pub(crate) tries: Vec<Try>,
}

/// One request of an operation.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Try {
    pub(crate) process: usize,
    /// The runtime of the process that serves the request.
    pub(crate) runtime: usize,
    /// How long the client waits before it leaves.
    pub(crate) patience: Duration,
    /// The pause before the next request.
    pub(crate) pause: Duration,
    /// How long the body of the request stands still in its middle.
    pub(crate) stall: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fault {
    /// The process is killed after it has sent this number of further messages, and a new one starts
    /// at the end.
    Crash { process: usize, messages: u32 },
    /// The process stands still. Its clock stands still, too, or jumps at the end.
    Freeze { process: usize, jumps: bool },
    /// One runtime stands still, as if a handler blocked its thread. The clock of the process goes on.
    Block { process: usize, runtime: usize },
    /// One runtime of the process ends, and a new one starts when the fault ends.
    EndRuntime { process: usize, runtime: usize },
    /// The clock of the process runs at this percentage of the real speed.
    Slow { process: usize, percent: u32 },
    /// Messages between the process and the store are lost.
    CutStore {
        process: usize,
        requests: bool,
        replies: bool,
    },
    /// Messages between the process and the bank are lost.
    CutBank { process: usize },
    /// The store is restarted. It keeps its records, and drops its connections.
    StoreDown,
    /// Another server takes the place of the store. It lacks the writes that no process has seen. A
    /// wrong store also lacks writes that were seen.
    Failover { loses_seen: bool },
    /// Messages to and from the store take up to a second.
    StoreSlow,
    /// Messages to the store come twice. The second copy may come seconds later.
    Duplicate,
    /// The clock of the store jumps by this number of milliseconds.
    ClockJump { millis: i64 },
}

/// A fault, and the time for which it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Planned {
    pub(crate) at: Duration,
    pub(crate) lasts: Duration,
    pub(crate) fault: Fault,
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:?} for {:?}", self.fault, self.at, self.lasts)
    }
}

/// An operator looks at a key, and resolves it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Action {
    pub(crate) at: Duration,
    pub(crate) key: usize,
    pub(crate) is_mistaken: bool,
    /// Whether the operator rejects the request for good.
    pub(crate) rejects: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) kind: Kind,
    pub(crate) mode: Mode,
    pub(crate) processes: usize,
    /// The number of runtimes of each process.
    pub(crate) runtimes: usize,
    pub(crate) keys: usize,
    pub(crate) lease: Duration,
    pub(crate) wait: Duration,
    /// The lease and the wait of every other process, after a deployment that changes the settings.
    pub(crate) changed: (Duration, Duration),
    pub(crate) retention: Duration,
    pub(crate) max_attempts: u32,
    /// The chance, in percent, that an operation of several steps stands still for another moment.
    pub(crate) pause_percent: u32,
    pub(crate) operations: Vec<Operation>,
    pub(crate) faults: Vec<Planned>,
    /// The actions of operators, the last one first.
    pub(crate) resolutions: Vec<Action>,
}

impl Plan {
    /// The time in which operations begin and faults occur.
    pub(crate) const ACTIVE: Duration = Duration::from_secs(12);

    pub(crate) fn of(seed: u64) -> Self {
        let mut random = Random::new(seed, 1);
        let kind = random.pick(&[Kind::Http, Kind::Http, Kind::Message, Kind::Once]);
        let mode = random.pick(&Mode::ALL);
        let processes = 1 + random.below(3);
        let runtimes = random.pick(&[1, 1, 2]);
        // In some histories, many requests with the same keys come at the same time.
        let is_crowded = random.chance(30);
        let keys = 1 + random.below(if is_crowded { 2 } else { 4 });
        let within = if is_crowded { 2_500 } else { 8_000 };
        let lease = random.pick(&[1_000, 2_000, 3_000]);
        let wait = random.pick(&[0, 300, 2_000, 4_000]);
        let max_attempts = random.pick(&[3, 1_000, 1_000]);
        let operations = (0..3 + random.below(12)).map(|_| operation(&mut random, (processes, runtimes), keys, within));
        let mut plan = Self {
            seed,
            kind,
            mode,
            processes,
            runtimes,
            keys,
            lease: Duration::from_millis(lease),
            wait: Duration::from_millis(wait),
            changed: (Duration::from_millis(lease), Duration::from_millis(wait)),
            retention: DAY,
            max_attempts,
            pause_percent: [50, 90, 98][usize::try_from(seed % 3).unwrap()],
            operations: operations.collect(),
            faults: Vec::new(),
            resolutions: Vec::new(),
        };
        let mut random = Random::new(seed, 2);
        plan.faults = (0..random.below(7))
            .map(|_| fault(&mut random, mode, (processes, runtimes)))
            .collect();
        if random.chance(40) && plan.may_expire() {
            plan.retention = SHORT_RETENTION;
        }
        if random.chance(30) {
            plan.changed = (
                Duration::from_millis(random.pick(&[1_000, 2_000, 3_000])),
                Duration::from_millis(random.pick(&[0, 300, 2_000])),
            );
        }
        let mut random = Random::new(seed, 5);
        let actions = (0..random.below(10)).map(|_| Action {
            at: random.millis(1_000..15_000),
            key: random.below(keys),
            is_mistaken: random.chance(40),
            rejects: random.chance(10),
        });
        plan.resolutions = actions.collect();
        plan.resolutions.sort_by_key(|action| std::cmp::Reverse(action.at));
        plan.operations.sort_by_key(|operation| operation.at);
        plan.faults.sort_by_key(|fault| fault.at);
        plan
    }

    /// Whether records may expire during the simulation: only if no attempt can act after its record
    /// has expired. So no clock jumps, and processes stand still for less than 5 s in all. A bank
    /// that deduplicates is excluded, because it would return the receipt of an attempt whose record
    /// has expired.
    fn may_expire(&self) -> bool {
        let stands = self.faults.iter().map(|planned| match planned.fault {
            Fault::Freeze { .. } | Fault::Block { .. } => planned.lasts,
            Fault::ClockJump { .. } => DAY,
            _ => Duration::ZERO,
        });
        matches!(self.mode, Mode::AtMostOnce | Mode::ReleaseFailures) && stands.sum::<Duration>() < FREEZE_LIMIT
    }

    /// The lease and the wait of a process.
    pub(crate) fn settings(&self, incarnation: usize) -> (Duration, Duration) {
        match incarnation % 2 {
            0 => (self.lease, self.wait),
            _ => self.changed,
        }
    }

    pub(crate) fn longest_lease(&self) -> Duration {
        self.lease.max(self.changed.0)
    }

    pub(crate) fn longest_wait(&self) -> Duration {
        self.wait.max(self.changed.1)
    }

    /// A short name of the whole plan. It tells whether a later version of the simulation still
    /// makes the same plan from the seed.
    pub(crate) fn tag(&self) -> String {
        let hash = Sha256::digest(serde_json::to_vec(self).unwrap());
        hash[..4].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

const DAY: Duration = Duration::from_secs(86_400);
/// Longer than any handler, with all messages on their way.
const SHORT_RETENTION: Duration = Duration::from_secs(15);
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

fn operation(random: &mut Random, (processes, runtimes): (usize, usize), keys: usize, within: u64) -> Operation {
    let tries = (0..1 + random.below(5)).map(|_| Try {
        process: random.below(processes),
        runtime: random.below(runtimes),
        patience: match random.chance(50) {
            true => random.millis(5..900),
            false => Duration::from_secs(60),
        },
        pause: random.millis(1..1_500),
        stall: match random.chance(15) {
            true => random.millis(0..800),
            false => Duration::ZERO,
        },
    });
    Operation {
        tries: tries.collect(),
        at: random.millis(0..within),
        key: random.below(keys),
        is_other_body: random.chance(8),
    }
}

fn fault(random: &mut Random, mode: Mode, (processes, runtimes): (usize, usize)) -> Planned {
    let (process, runtime) = (random.below(processes), random.below(runtimes));
    let of_a_runtime = [
        Fault::Block { process, runtime },
        Fault::EndRuntime { process, runtime },
    ];
    let fault = match random.below(12) {
        _ if runtimes > 1 && random.chance(30) => random.pick(&of_a_runtime),
        0..=2 => Fault::Crash {
            process,
            messages: random.pick(&[0, 1, 1, 2, 2, 3, 4, 6, 10]),
        },
        3 => Fault::Freeze { process, jumps: true },
        4 => Fault::Freeze { process, jumps: false },
        5 => Fault::Slow {
            process,
            percent: random.pick(&[50, 80, 120, 200]),
        },
        6 => Fault::CutStore {
            process,
            requests: true,
            replies: random.chance(50),
        },
        7 => Fault::CutStore {
            process,
            requests: false,
            replies: true,
        },
        // Under `ReleaseFailures`, a handler must know whether it had an effect.
        8 if mode != Mode::ReleaseFailures => Fault::CutBank { process },
        8 | 9 => random.pick(&[Fault::StoreDown, Fault::Failover { loses_seen: false }]),
        10 => random.pick(&[Fault::StoreSlow, Fault::Duplicate]),
        _ => Fault::ClockJump {
            millis: random.pick(&[-600_000, -2_000, -300, 300, 2_000, 600_000]),
        },
    };
    // A runtime may be blocked for longer than any request waits.
    let longest = if matches!(fault, Fault::Block { .. }) {
        8_000
    } else {
        4_000
    };
    Planned {
        at: random.millis(0..10_000),
        lasts: random.millis(10..longest),
        fault,
    }
}
