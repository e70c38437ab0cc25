//! The scripts against the pure record: random histories, and random records with one operation
//! each.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;
use tower_idempotency::protocol::{
    Change, Claim, Decision, Fence, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Record, Resolution,
    ResolveResult, Snapshot, Status, StorageKey, Transition,
};
use tower_idempotency::{RedisStore, Store, Timestamp};

use super::{HOUR, RedisServer, claim, connect, stored};

/// One step of a random history. The test applies it to the store and to the pure record.
#[derive(Clone, Debug)]
enum Step {
    Claim(u8, IfLost, bool),
    Complete(u8, u8),
    GiveUp(u8),
    Release(u8),
    Renew(u8),
    Resolve(u8, bool),
}

fn if_lost() -> impl Strategy<Value = IfLost> {
    prop_oneof![Just(IfLost::Execute), Just(IfLost::Recover), Just(IfLost::Refuse)]
}

fn a_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0_u8..4, if_lost(), prop::bool::weighted(0.9)).prop_map(|(nonce, lost, same)| Step::Claim(nonce, lost, same)),
        1 => (0_u8..4, any::<u8>()).prop_map(|(nonce, body)| Step::Complete(nonce, body)),
        3 => (0_u8..4).prop_map(Step::GiveUp),
        1 => (0_u8..4).prop_map(Step::Release),
        1 => (0_u8..4).prop_map(Step::Renew),
        1 => (0_u8..4, any::<bool>()).prop_map(|(nonce, absent)| Step::Resolve(nonce, absent)),
    ]
}

/// The pure record, on a clock of its own. Leases are long, and an attempt is lost only if its
/// owner gives it up.
#[derive(Default)]
struct Model {
    record: Option<Record>,
    now: u64,
    /// The fence of the store for each fence of the model.
    fences: HashMap<u64, u64>,
    owners: [Option<(Owner, Owner)>; 4],
    last: (u64, u64),
}

impl Model {
    fn apply<R>(&mut self, transition: impl FnOnce(Option<&Record>, Timestamp) -> Transition<R>) -> R {
        self.now += 1;
        let transition = transition(
            self.record.as_ref(),
            Timestamp::from_micros(1_700_000_000_000_000 + self.now),
        );
        match transition.change {
            Change::Unchanged => {}
            Change::Put(record) => self.record = Some(record),
            Change::Remove => self.record = None,
        }
        transition.reply
    }

    /// The fences of the two differ, but their order must not.
    fn granted(&mut self, nonce: u8, wanted: Grant, got: Grant) {
        let (wanted, got) = (wanted.owner, got.owner);
        let pair = (wanted.fence.as_u64(), got.fence.as_u64());
        let order = |now: u64, last: u64| now.cmp(&last);
        assert_eq!(
            order(pair.0, self.last.0),
            order(pair.1, self.last.1),
            "{pair:?} after {:?}",
            self.last
        );
        assert_ne!(order(pair.1, self.last.1), Ordering::Less);
        self.last = pair;
        self.fences.insert(pair.0, pair.1);
        self.owners[usize::from(nonce)] = Some((wanted, got));
    }

    fn fence(&self, fence: Fence) -> Fence {
        Fence::new(self.fences[&fence.as_u64()])
    }

    fn owner(&self, nonce: u8) -> Option<(Owner, Owner)> {
        self.owners[usize::from(nonce)]
    }
}

async fn play(step: Step, model: &mut Model, store: &RedisStore, key: StorageKey) {
    match step {
        Step::Claim(nonce, if_lost, same) => {
            let fingerprint = if same {
                Fingerprint::of(b"pay")
            } else {
                Fingerprint::NONE
            };
            let claim = Claim {
                key,
                if_lost,
                fingerprint,
                ..claim(1, nonce)
            };
            let wanted = model.apply(|record, now| Record::claim(record, &claim, now));
            match (wanted, store.claim(&claim).await.unwrap()) {
                (Decision::Execute(wanted), Decision::Execute(got))
                | (Decision::Recover(wanted), Decision::Recover(got)) => {
                    assert_eq!((wanted.attempt, wanted.lease), (got.attempt, got.lease));
                    model.granted(nonce, wanted, got);
                }
                (Decision::Wait { .. }, Decision::Wait { left }) => assert!(left <= HOUR && !left.is_zero()),
                (wanted, got) => assert_eq!(got, wanted),
            }
        }
        Step::Complete(nonce, body) => {
            if let Some((mine, its)) = model.owner(nonce) {
                let outcome = match body % 4 {
                    0 => Outcome::Tombstone,
                    1 => Outcome::Rejected,
                    _ => stored(body.to_string()),
                };
                let wanted = model.apply(|record, now| Record::complete(record, mine, &outcome, HOUR, now));
                assert_eq!(store.complete(&key, its, &outcome, HOUR).await.unwrap(), wanted);
            }
        }
        Step::GiveUp(nonce) | Step::Renew(nonce) => {
            if let Some((mine, its)) = model.owner(nonce) {
                let lease = if matches!(step, Step::Renew(_)) {
                    HOUR
                } else {
                    Duration::ZERO
                };
                let wanted = model.apply(|record, now| Record::renew(record, mine, lease, now));
                assert_eq!(store.renew(&key, its, lease).await.unwrap(), wanted);
            }
        }
        Step::Release(nonce) => {
            if let Some((mine, its)) = model.owner(nonce) {
                let wanted = model.apply(|record, now| Record::release(record, mine, now));
                assert_eq!(store.release(&key, its).await.unwrap(), wanted);
            }
        }
        Step::Resolve(nonce, absent) => {
            if let Some((mine, its)) = model.owner(nonce) {
                let found = Resolution::Completed(stored("found"), HOUR);
                let resolution = if absent { Resolution::Absent } else { found };
                let wanted = model.apply(|record, now| Record::resolve(record, mine.fence, &resolution, now));
                let wanted = match wanted {
                    ResolveResult::Conflict(fence) => ResolveResult::Conflict(fence.map(|fence| model.fence(fence))),
                    ResolveResult::Resolved => ResolveResult::Resolved,
                };
                assert_eq!(store.resolve(&key, its.fence, &resolution).await.unwrap(), wanted);
            }
        }
    }
}

/// Returns the snapshot with the fence of the store and without the remaining time.
fn comparable(snapshot: Option<Snapshot>, fence: impl Fn(Fence) -> Fence) -> Option<Snapshot> {
    snapshot.map(|snapshot| Snapshot {
        fence: fence(snapshot.fence),
        status: match snapshot.status {
            Status::InFlight { .. } => Status::InFlight { left: HOUR },
            other => other,
        },
        ..snapshot
    })
}

fn key_of(case: u32) -> StorageKey {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&case.to_le_bytes());
    StorageKey::from_bytes(key)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Starts a server, a store and a runtime, because properties are not async.
fn stage() -> (RedisServer, tokio::runtime::Runtime, RedisStore) {
    let server = RedisServer::with(&["--appendonly", "no"]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let store = runtime.block_on(connect(&server));
    (server, runtime, store)
}

#[test]
fn the_store_decides_as_the_pure_record_does() {
    let (_server, runtime, store) = stage();
    let case = std::cell::Cell::new(0);
    proptest!(config(400), |(steps in prop::collection::vec(a_step(), 1..50))| {
        case.set(case.get() + 1);
        let key = key_of(case.get());
        let mut model = Model::default();
        runtime.block_on(async {
            for step in steps {
                play(step, &mut model, &store, key).await;
                let wanted = model.apply(|record, now| Transition { reply: Record::peek(record, now), change: Change::Unchanged });
                let wanted = comparable(wanted, |fence| model.fence(fence));
                assert_eq!(comparable(store.peek(&key).await.unwrap(), |fence| fence), wanted);
            }
        });
    });
}

/// A record on the server, with its times in hours from now.
#[derive(Clone, Debug)]
struct Seed {
    state: u8,
    recover: bool,
    same: bool,
    nonce: u8,
    fence: i64,
    attempt: u32,
    lease: i64,
    ends: i64,
    expires: i64,
}

fn a_seed() -> impl Strategy<Value = Seed> {
    let hours = || prop_oneof![Just(-9_i64), Just(-3), Just(3), Just(5), Just(9)];
    (
        0_u8..4,
        any::<bool>(),
        prop::bool::weighted(0.9),
        0_u8..2,
        hours(),
        1_u32..4,
        prop_oneof![Just(0), Just(1), Just(7)],
        hours(),
        hours(),
    )
        .prop_map(
            |(state, recover, same, nonce, fence, attempt, lease, ends, expires)| Seed {
                state,
                recover,
                same,
                nonce,
                fence,
                attempt,
                lease,
                ends,
                expires,
            },
        )
}

const MICROS: i64 = 3_600_000_000;

impl Seed {
    fn fence(&self, now: u64) -> u64 {
        now.saturating_add_signed(self.fence * MICROS)
    }

    fn bytes(&self, now: u64) -> Vec<u8> {
        let at = |hours: i64| now.saturating_add_signed(hours * MICROS).to_le_bytes();
        let span = |hours: i64| (hours * MICROS).to_le_bytes();
        let fingerprint = if self.same {
            Fingerprint::of(b"pay")
        } else {
            Fingerprint::NONE
        };
        let mut bytes = vec![1, self.state, u8::from(self.recover), fingerprint.algorithm()];
        bytes.extend(fingerprint.digest());
        bytes.extend([self.nonce; 16]);
        bytes.extend(self.fence(now).to_le_bytes());
        bytes.extend(self.attempt.to_le_bytes());
        bytes.extend(span(self.lease));
        bytes.extend(span(2));
        bytes.extend(if self.state == 0 { at(self.ends) } else { [0; 8] });
        bytes.extend(at(self.expires));
        if self.state == 3 {
            bytes.extend(4_u32.to_le_bytes());
            bytes.extend(b"headbody");
        }
        bytes
    }
}

/// Checks that two records are equal. Numbers that hold a time may differ by ten seconds.
fn assert_alike(got: Option<&[u8]>, wanted: Option<&[u8]>) {
    let (Some(got), Some(wanted)) = (got, wanted) else {
        return assert_eq!(got, wanted);
    };
    assert_eq!(
        (&got[..52], &got[60..80], &got[96..]),
        (&wanted[..52], &wanted[60..80], &wanted[96..])
    );
    for at in [52, 80, 88] {
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert!(
            number(got).abs_diff(number(wanted)) < 10_000_000,
            "bytes {at}: {} {}",
            number(got),
            number(wanted)
        );
    }
}

fn blurred(text: &str) -> String {
    // Replaces the digits, because durations and fences hold the time. The test compares their
    // values in the record.
    let digits = |c: char| if c.is_ascii_digit() { '#' } else { c };
    let mut blurred: String = text.chars().map(digits).filter(|c| *c != '.').collect();
    while blurred.contains("##") {
        blurred = blurred.replace("##", "#");
    }
    blurred.replace("#ms", "#s").replace("#µs", "#s").replace("#ns", "#s")
}

#[test]
fn every_operation_on_every_record_matches_the_pure_record() {
    let (server, runtime, store) = stage();
    let case = std::cell::Cell::new(1_000_000);
    proptest!(config(4_000), |(seed in a_seed(), operation in 0_u8..5, if_lost in if_lost(), nonce in 0_u8..2, zero: bool, owns: bool)| {
        case.set(case.get() + 1);
        let key = key_of(case.get());
        let name = format!("idempotency:{}", key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        let (seconds, micros): (u64, u64) = server.command("TIME");
        let now = seconds * 1_000_000 + micros;
        let bytes = seed.bytes(now);
        server.run::<()>(redis::cmd("SET").arg(&name).arg(&bytes));
        let record = Record::from_bytes(bytes.clone().into()).unwrap();
        let (record, at) = (Some(&record), Timestamp::from_micros(now));

        let fence = Fence::new(if owns { seed.fence(now) } else { 7 });
        let owner = Owner { nonce: Nonce::from_bytes([nonce; 16]), fence };
        let lease = if zero { Duration::ZERO } else { HOUR };
        let outcome = if zero { Outcome::Tombstone } else { stored("new") };
        let found = Resolution::Completed(outcome.clone(), lease);
        let resolution = if zero { Resolution::Absent } else { found };
        let asked = Claim { key, if_lost, lease: if zero { Duration::ZERO } else { HOUR }, max_attempts: 3, ..claim(1, nonce) };
        let (got, wanted, change) = runtime.block_on(async {
            macro_rules! both {
                ($got:expr, $wanted:expr) => {{
                    let wanted = $wanted;
                    (format!("{:?}", $got.await.unwrap()), format!("{:?}", wanted.reply), wanted.change)
                }};
            }
            match operation {
                0 => both!(store.claim(&asked), Record::claim(record, &asked, at)),
                1 => both!(store.renew(&key, owner, lease), Record::renew(record, owner, lease, at)),
                2 => both!(store.complete(&key, owner, &outcome, lease), Record::complete(record, owner, &outcome, lease, at)),
                3 => both!(store.release(&key, owner), Record::release(record, owner, at)),
                _ => both!(store.resolve(&key, fence, &resolution), Record::resolve(record, fence, &resolution, at)),
            }
        });
        assert_eq!(blurred(&got), blurred(&wanted));
        let wanted = match change {
            Change::Unchanged => Some(bytes.into()),
            Change::Put(record) => Some(record.to_bytes()),
            Change::Remove => None,
        };
        let got: Option<Vec<u8>> = server.run(redis::cmd("GET").arg(&name));
        assert_alike(got.as_deref(), wanted.as_deref());
    });
}
