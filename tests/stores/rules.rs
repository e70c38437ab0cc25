//! Every transition of the model's records, replayed on the real record and on every store, so that
//! model and code cannot drift apart.

mod scale;

use std::collections::{BTreeSet, HashMap, VecDeque};

use futures::executor::block_on;
use futures::{StreamExt, stream};
use sqlx::Row;
use sqlx::postgres::PgRow;
use tower_idempotency::protocol::{Change, Fence, Record, Status, StorageKey, Transition};
use tower_idempotency::{Clock, MemoryStore, PostgresStore, RedisStore, Store, Timestamp};

use self::scale::{
    EXPIRES, FENCE, Scale, UNTIL, completion_of, nonce_of, outcome, outcome_of, release_of, renewal_of, span,
};
use super::support::postgres::PostgresServer;
use super::support::redis::RedisServer;
use super::support::rules::{Claim, IfLost, Operation, Owner, Reply, State, TICK, Time, step};
use super::support::{rules, settings};

const HOUR: u64 = 3_600_000_000;

/// The time of every pair of record and operation. All times of a record are shifted with it.
const NOW: Time = 32 * TICK;

/// The same time a little later. The clock of a server moves between a write of the test and the
/// operation, so a fence that the server gives is greater than each fence of the same tick.
const SOON: Time = NOW + TICK / 2;

/// Returns every operation that differs in its effect on the record. Claims have the lease that is
/// passed.
fn operations(record: Option<rules::Record>, lease: Time) -> Vec<Operation> {
    let mut operations = Vec::new();
    for (nonce, fingerprint) in [(1, 0), (2, 0), (1, 1)] {
        for if_lost in [IfLost::Execute, IfLost::Recover, IfLost::Refuse] {
            operations.push(Operation::Claim(Claim {
                fingerprint,
                nonce,
                lease,
                retention: 2 * TICK,
                if_lost,
                max_attempts: 2,
            }));
        }
    }
    let nobody = Owner { nonce: 9, fence: 1 };
    let owner = record.map_or(nobody, |record| record.owner);
    let (other_nonce, other_fence) = (!owner.nonce, owner.fence + 1);
    let claimants = [
        owner,
        Owner {
            nonce: other_nonce,
            ..owner
        },
        Owner {
            fence: other_fence,
            ..owner
        },
    ];
    let outcomes = [
        rules::Outcome::Rejected,
        rules::Outcome::Tombstone,
        rules::Outcome::Stored(7),
    ];
    for owner in claimants {
        operations.extend([
            Operation::Renew(owner, 0),
            Operation::Renew(owner, 2 * lease),
            Operation::Release(owner),
        ]);
        operations.extend(outcomes.map(|outcome| Operation::Complete(owner, outcome, TICK)));
    }
    for fence in [owner.fence, other_fence] {
        operations.push(Operation::Resolve(fence, None));
        operations.extend(outcomes.map(|outcome| Operation::Resolve(fence, Some((outcome, TICK)))));
    }
    operations
}

/// Returns the record as it would be if everything had happened at another time.
fn shifted(record: rules::Record, from: Time, to: Time) -> rules::Record {
    let shift = |time: Time| time + to - from;
    rules::Record {
        owner: Owner {
            fence: shift(record.owner.fence),
            ..record.owner
        },
        expires: shift(record.expires),
        state: match record.state {
            State::InFlight { until } => State::InFlight { until: shift(until) },
            state => state,
        },
        ..record
    }
}

/// Returns every record that operations can make while the clock moves by whole ticks in both
/// directions, as the record is at [`NOW`]. The owner's fence is at most `distance` ticks away.
fn reachable(distance: Time) -> BTreeSet<Option<rules::Record>> {
    let mut found = BTreeSet::from([None]);
    let mut last = vec![None];
    while let Some(record) = last.pop() {
        let operations = operations(record, TICK).into_iter();
        let changed = operations.map(|operation| step(record, operation, NOW, 0, None).1);
        let moved = [NOW + TICK, NOW - TICK].map(|from| record.map(|record| shifted(record, from, NOW)));
        for next in changed.chain(moved) {
            let is_near = next.is_none_or(|next| next.owner.fence.abs_diff(NOW) <= distance * TICK);
            if is_near && found.insert(next) {
                last.push(next);
            }
        }
    }
    found
}

/// Returns the reply with its remaining time in whole ticks, rounded up.
fn in_ticks(reply: Reply) -> Reply {
    match reply {
        Reply::Wait(left) => Reply::Wait(left.div_ceil(TICK) * TICK),
        reply => reply,
    }
}

/// Applies an operation to the real record.
fn apply(record: Option<&Record>, operation: Operation, scale: Scale, now: Timestamp) -> (Reply, Change) {
    fn split<R>(transition: Transition<R>, reply: impl FnOnce(R) -> Reply) -> (Reply, Change) {
        (reply(transition.reply), transition.change)
    }
    match operation {
        Operation::Claim(claim) => {
            let claim = scale.claim(key_of(0), claim);
            split(Record::claim(record, &claim, now), |decision| {
                scale.decision_of(decision)
            })
        }
        Operation::Renew(owner, lease) => {
            split(Record::renew(record, scale.owner(owner), span(lease), now), renewal_of)
        }
        Operation::Complete(owner, ended, retention) => {
            let (owner, ended) = (scale.owner(owner), outcome(ended));
            split(
                Record::complete(record, owner, &ended, span(retention), now),
                completion_of,
            )
        }
        Operation::Release(owner) => split(Record::release(record, scale.owner(owner), now), release_of),
        Operation::Resolve(fence, found) => {
            let (fence, found) = (Fence::new(scale.at(fence)), Scale::resolution(found));
            split(Record::resolve(record, fence, &found, now), |result| {
                scale.resolved_of(result)
            })
        }
    }
}

/// Applies an operation to a store.
async fn ask(store: &impl Store, key: StorageKey, operation: Operation, scale: Scale) -> Reply {
    match operation {
        Operation::Claim(claim) => scale.decision_of(store.claim(&scale.claim(key, claim)).await.unwrap()),
        Operation::Renew(owner, lease) => renewal_of(store.renew(&key, scale.owner(owner), span(lease)).await.unwrap()),
        Operation::Complete(owner, ended, retention) => {
            let (owner, ended) = (scale.owner(owner), outcome(ended));
            completion_of(store.complete(&key, owner, &ended, span(retention)).await.unwrap())
        }
        Operation::Release(owner) => release_of(store.release(&key, scale.owner(owner)).await.unwrap()),
        Operation::Resolve(fence, found) => {
            let (fence, found) = (Fence::new(scale.at(fence)), Scale::resolution(found));
            scale.resolved_of(store.resolve(&key, fence, &found).await.unwrap())
        }
    }
}

fn key_of(number: usize) -> StorageKey {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    StorageKey::from_bytes(key)
}

/// A record and an operation on it.
type Pair = (Option<rules::Record>, Operation);

/// Returns every pair of a record and an operation. [`reachable`] describes `distance`.
fn pairs(distance: Time) -> Vec<Pair> {
    let records = reachable(distance).into_iter();
    let pairs = records.flat_map(|record| {
        operations(record, TICK)
            .into_iter()
            .map(move |operation| (record, operation))
    });
    pairs.collect()
}

/// Returns the pairs for a server: all of them if `THOROUGH` is set, otherwise a part.
fn pairs_for_servers() -> Vec<Pair> {
    let part = if settings::is_thorough() { 1 } else { 13 };
    pairs(2).into_iter().step_by(part).collect()
}

#[test]
fn the_record_makes_every_transition_of_the_model() {
    let scale = Scale {
        now: 1_700_000_000_000_000,
    };
    for (record, operation) in pairs(2) {
        for now in [NOW, SOON] {
            let (reply, next) = step(record, operation, now, 0, None);
            let real = record.map(|record| Record::from_bytes(scale.bytes(record).into()).unwrap());
            let (got, change) = apply(real.as_ref(), operation, scale, Timestamp::from_micros(scale.at(now)));
            let got_next = match change {
                Change::Unchanged => real,
                Change::Put(record) => Some(record),
                Change::Remove => None,
            };
            let got_next = got_next.map(|record| record.to_bytes().to_vec());
            assert_eq!(got, in_ticks(reply), "{operation:?} on {record:?} at {now}");
            assert_eq!(
                got_next,
                next.map(|record| scale.bytes(record)),
                "{operation:?} on {record:?} at {now}"
            );
        }
    }
}

/// A lease of the memory store, whose owners live as long as the store.
const ENDLESS: Time = 1_000 * TICK;

/// A state of the memory store, which remembers the highest fence.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Remembered {
    record: Option<rules::Record>,
    now: Time,
    floor: Time,
}

/// Returns the reply to an operation, or to the passing of a tick, and the next state.
fn remember(state: Remembered, operation: Option<Operation>) -> (Option<Reply>, Remembered) {
    let Some(operation) = operation else {
        return (
            None,
            Remembered {
                now: state.now + TICK,
                ..state
            },
        );
    };
    let (reply, record) = step(state.record, operation, state.now, state.floor, None);
    let floor = record.map_or(state.floor, |record| state.floor.max(record.owner.fence));
    // The lease has no end, so the time that is left has no meaning.
    let reply = if let Reply::Wait(_) = reply {
        Reply::Wait(ENDLESS)
    } else {
        reply
    };
    (Some(reply), Remembered { record, floor, ..state })
}

/// Replays steps on a new memory store. Returns the last reply, and the record that the store
/// shows.
fn replayed(steps: &[Option<Operation>], scale: Scale) -> (Option<Reply>, Option<Shown>) {
    let clock = Clock::manual(Timestamp::from_micros(scale.now));
    let store = MemoryStore::builder().with_clock(clock.clone()).build();
    let mut last = None;
    for step in steps {
        last = match *step {
            None => {
                clock.advance(span(TICK));
                None
            }
            Some(operation) => Some(block_on(ask(&store, key_of(0), operation, scale))),
        };
    }
    let seen = block_on(store.peek(&key_of(0))).unwrap();
    let shown = seen.map(|seen| Shown {
        owner: Owner {
            nonce: nonce_of(&seen.nonce),
            fence: scale.time_of(seen.fence.as_u64()),
        },
        attempt: u8::try_from(seen.attempt).unwrap(),
        status: match seen.status {
            Status::InFlight { .. } => "in flight".to_owned(),
            Status::Lost => "lost".to_owned(),
            Status::Unknown => "unknown".to_owned(),
            Status::Completed(outcome) => format!("{:?}", outcome_of(outcome)),
        },
    });
    (last, shown)
}

/// The part of a record that a store shows.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    owner: Owner,
    attempt: u8,
    status: String,
}

impl Shown {
    fn of(state: Remembered) -> Option<Self> {
        let record = state.record.filter(|record| !record.is_expired(state.now, None))?;
        Some(Self {
            owner: record.owner,
            attempt: record.attempt,
            status: match record.state {
                State::InFlight { .. } if record.is_leased(state.now) => "in flight".to_owned(),
                State::InFlight { .. } => "lost".to_owned(),
                State::Unknown => "unknown".to_owned(),
                State::Tombstone => "Tombstone".to_owned(),
                State::Stored(body) => format!("Stored({body})"),
            },
        })
    }
}

/// The store cannot be given a record, so each record is made by the shortest sequence of steps.
#[test]
fn the_memory_store_makes_every_transition_of_the_model() {
    let scale = Scale {
        now: 1_700_000_000_000_000,
    };
    let first = Remembered {
        record: None,
        now: NOW,
        floor: 0,
    };
    let (mut found, mut paths, mut replays) = (BTreeSet::from([first]), VecDeque::from([(first, Vec::new())]), 0);
    while let Some((state, path)) = paths.pop_front() {
        let operations = operations(state.record, ENDLESS).into_iter().map(Some);
        for operation in operations.chain([None]) {
            let (reply, next) = remember(state, operation);
            let path: Vec<_> = path.iter().copied().chain([operation]).collect();
            assert_eq!(replayed(&path, scale), (reply, Shown::of(next)), "{path:#?}");
            replays += 1;
            let is_near = next.now <= NOW + 2 * TICK && next.floor <= next.now + 1;
            if is_near && found.insert(next) {
                paths.push_back((next, path));
            }
        }
    }
    println!("{replays} replays, {} states", found.len());
    assert!(replays > 10_000, "only {replays} transitions were replayed");
}

/// Returns the reply and the record that a server must show after an operation. A server may delete
/// an expired record at any time.
fn expected(pair: Pair, floor: Time, scale: Scale) -> (Reply, Option<Vec<u8>>) {
    let (reply, next) = step(pair.0, pair.1, SOON, floor, None);
    let next = next.filter(|record| !record.is_expired(SOON, None));
    (in_ticks(reply), next.map(|record| scale.timeless(scale.bytes(record))))
}

/// The number of pairs that a server gets at a time.
const PORTION: usize = 1_000;

/// Applies the operations of a portion at a time, each to the record under its own key.
async fn ask_all(store: &impl Store, portion: &[Pair], scale: Scale) -> Vec<Reply> {
    let asked = portion.iter().enumerate();
    let asked = asked.map(|(at, (_, operation))| ask(store, key_of(at), *operation, scale));
    stream::iter(asked).buffered(8).collect().await
}

/// Compares the replies and records of a server with the model.
fn compare(portion: &[Pair], replies: &[Reply], records: Vec<Option<Vec<u8>>>, scale: Scale, is_remembered: bool) {
    assert_eq!((replies.len(), records.len()), (portion.len(), portion.len()));
    for ((pair, reply), record) in portion.iter().zip(replies).zip(records) {
        let floor = pair.0.filter(|_| is_remembered).map_or(0, |record| record.owner.fence);
        let (wanted, next) = expected(*pair, floor, scale);
        assert_eq!(*reply, wanted, "{pair:?}");
        let record = record.map(|bytes| scale.timeless(bytes));
        // An expired record may stay as it is.
        let expired = pair.0.filter(|record| record.is_expired(SOON, None));
        let expired = expired.map(|record| scale.timeless(scale.bytes(record)));
        assert!(
            record == next || next.is_none() && record == expired,
            "{pair:?}: {record:?} instead of {next:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_redis_scripts_make_every_transition_of_the_model() {
    let server = RedisServer::with(&["--appendonly", "no"]);
    let store = RedisStore::connect(&server.url()).await.unwrap();
    for portion in pairs_for_servers().chunks(PORTION) {
        server.command::<()>("FLUSHALL");
        let (seconds, micros): (u64, u64) = server.command("TIME");
        let scale = Scale {
            now: seconds * 1_000_000 + micros,
        };
        let (mut set, mut get) = (redis::pipe(), redis::cmd("MGET"));
        for (at, (record, _)) in portion.iter().enumerate() {
            let hex: String = key_of(at).as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            let name = format!("idempotency:{hex}");
            get.arg(&name);
            if let Some(record) = record {
                set.set(&name, scale.bytes(*record)).ignore();
            }
        }
        server.run_all(&set);
        let replies = ask_all(&store, portion, scale).await;
        compare(portion, &replies, server.run(&get), scale, false);
    }
}

/// Returns the record as a row of the table.
fn row(key: StorageKey, record: rules::Record, scale: Scale) -> String {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let bytes = scale.bytes(record);
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let (head, body) = match record.state {
        State::Stored(body) => ("'head'".to_owned(), format!("'\\x{}'", hex(&[body]))),
        _ => ("NULL".to_owned(), "NULL".to_owned()),
    };
    format!(
        "('\\x{}', 1, {}, {}, '\\x{}', '\\x{}', {}, {}, {}, {}, {}, {}, {head}, {body})",
        hex(key.as_bytes()),
        bytes[1],
        bytes[2],
        hex(&bytes[3..36]),
        hex(&bytes[36..52]),
        number(FENCE.start),
        record.attempt,
        number(64),
        number(72),
        number(UNTIL.start),
        number(EXPIRES.start),
    )
}

/// Returns a row of the table in the layout of the record's bytes.
fn bytes_of(row: &PgRow) -> Vec<u8> {
    let state: i16 = row.get("state");
    let number = |column| row.get::<i64, _>(column).to_le_bytes();
    let mut bytes = vec![
        1,
        u8::try_from(state).unwrap(),
        u8::try_from(row.get::<i16, _>("kind")).unwrap(),
    ];
    bytes.extend(row.get::<&[u8], _>("fingerprint"));
    bytes.extend(row.get::<&[u8], _>("nonce"));
    bytes.extend(number("fence"));
    bytes.extend(row.get::<i32, _>("attempt").to_le_bytes());
    bytes.extend(number("lease"));
    bytes.extend(number("retention"));
    // The end of the lease has a meaning only in flight.
    bytes.extend(if state == 0 { number("lease_until") } else { [0; 8] });
    bytes.extend(number("expires"));
    if let Some(head) = row.get::<Option<&[u8]>, _>("head") {
        bytes.extend(u32::try_from(head.len()).unwrap().to_le_bytes());
        bytes.extend(head);
        bytes.extend(row.get::<&[u8], _>("body"));
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn the_postgres_statements_make_every_transition_of_the_model() {
    const COLUMNS: &str = "key, version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, lease_until, expires, head, body";
    let server = PostgresServer::start();
    let store = PostgresStore::connect(&server.url()).await.unwrap();
    for portion in pairs_for_servers().chunks(PORTION) {
        let now: i64 = sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
            .fetch_one(store.pool())
            .await
            .unwrap();
        let scale = Scale {
            now: u64::try_from(now).unwrap(),
        };
        let records = portion.iter().enumerate();
        let rows = records.filter_map(|(at, (record, _))| record.map(|record| row(key_of(at), record, scale)));
        let rows: Vec<_> = rows.collect();
        let mut text = "TRUNCATE idempotency_records; ".to_owned();
        if !rows.is_empty() {
            text += &format!("INSERT INTO idempotency_records ({COLUMNS}) VALUES {}", rows.join(", "));
        }
        sqlx::raw_sql(sqlx::AssertSqlSafe(text))
            .execute(store.pool())
            .await
            .unwrap();
        let replies = ask_all(&store, portion, scale).await;
        let rows = sqlx::query("SELECT * FROM idempotency_records")
            .fetch_all(store.pool())
            .await
            .unwrap();
        let mut records: HashMap<Vec<u8>, Vec<u8>> = rows.iter().map(|row| (row.get("key"), bytes_of(row))).collect();
        let records = (0..portion.len())
            .map(|at| records.remove(&key_of(at).as_bytes()[..]))
            .collect();
        // A row that has expired still holds its fence.
        compare(portion, &replies, records, scale, true);
    }
}
