//! Replies of a PostgreSQL server, or of a proxy in its place.
//!
//! Each operation of the store returns the result that the row means by a model, or an error. A
//! damaged row is a corrupt record, and never an absent one. Bytes that are no reply are an error.
//! No reply makes the store panic or hang.

mod row;
mod session;

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Record, Release,
    Renewal, Resolution, ResolveResult, StorageKey, Transition,
};
use tower_idempotency::{PostgresStore, Store};

use self::row::Row;
use self::session::Session;
use crate::input::Input;
use crate::server::{check_error, with_server};

const HOUR: Duration = Duration::from_secs(3_600);
const KEY: StorageKey = StorageKey::from_bytes([7; 32]);
const OWNER: Owner = Owner {
    nonce: Nonce::from_bytes([9; 16]),
    fence: Fence::new(1_700_000_000_000_000),
};
/// The message of the client that gets the reply of the input.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Execute,
    Parse,
    Query,
    Startup,
}

/// The reply to the statement of an operation.
enum Reply {
    Row(Box<Row>),
    /// These bytes in the place of the reply to a message. The server then closes the connection.
    Bytes(Place, Vec<u8>),
}

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (operation, kind) = (input.byte() % 6, input.byte());
    let places = [Place::Execute, Place::Parse, Place::Query, Place::Startup];
    let reply = Rc::new(match kind & 1 {
        0 => Reply::Row(Box::new(Row::of(&mut input))),
        _ => Reply::Bytes(places[usize::from(kind >> 2 & 3)], input.rest().to_vec()),
    });
    let behind_pooler = kind & 2 != 0;
    let serving = Rc::clone(&reply);
    with_server(
        move |connection| Session::serve(connection, Rc::clone(&serving)),
        async |folder| {
            let store = store(folder, behind_pooler);
            match &*reply {
                Reply::Bytes(..) => fails(&store, operation).await,
                Reply::Row(row) => operate(&store, operation, row).await,
            }
        },
    );
}

fn store(folder: &Path, behind_pooler: bool) -> PostgresStore {
    let options = PgConnectOptions::new_without_pgpass()
        .host("localhost")
        .socket(folder)
        .username("app");
    let options = options.ssl_mode(sqlx::postgres::PgSslMode::Disable);
    let pool = PgPoolOptions::new()
        .test_before_acquire(false)
        .connect_lazy_with(options);
    let builder = PostgresStore::builder();
    let builder = if behind_pooler {
        builder.with_transaction_pooler()
    } else {
        builder
    };
    builder.with_pool(pool).unwrap()
}

fn claim() -> Claim {
    Claim {
        key: KEY,
        fingerprint: Fingerprint::new(1, [5; 32]),
        nonce: OWNER.nonce,
        lease: HOUR,
        retention: HOUR,
        if_lost: IfLost::Refuse,
        max_attempts: 5,
    }
}

/// Checks that an operation fails. The bytes cannot be its reply, because a reply repeats a random
/// number of the statement.
async fn fails(store: &PostgresStore, operation: u8) {
    let error = match operation {
        0 => store.claim(&claim()).await.err(),
        1 => store.peek(&KEY).await.err(),
        2 => store.complete(&KEY, OWNER, &Outcome::Tombstone, HOUR).await.err(),
        3 => store.renew(&KEY, OWNER, HOUR).await.err(),
        4 => store.release(&KEY, OWNER).await.err(),
        _ => store.resolve(&KEY, OWNER.fence, &Resolution::Absent).await.err(),
    };
    check_error(&error.expect("the operation fails"));
}

async fn operate(store: &PostgresStore, operation: u8, row: &Row) {
    let now = row.now();
    match operation {
        0 => row.check(store.claim(&claim()).await, |record| decision(row, record?)),
        1 if row.is_standby() => check_error(&store.peek(&KEY).await.unwrap_err()),
        1 => row.check(store.peek(&KEY).await, |record| Some(Record::peek(record, now))),
        2 => row.check(store.complete(&KEY, OWNER, &Outcome::Tombstone, HOUR).await, |record| {
            let transition = Record::complete(record, OWNER, &Outcome::Tombstone, HOUR, now);
            settled(row, Completion::Completed, transition)
        }),
        3 => row.check(store.renew(&KEY, OWNER, HOUR).await, |record| {
            settled(row, Renewal::Renewed, Record::renew(record, OWNER, HOUR, now))
        }),
        4 => row.check(store.release(&KEY, OWNER).await, |record| {
            settled(row, Release::Released, Record::release(record, OWNER, now))
        }),
        _ => {
            let resolution = Resolution::Absent;
            let resolved = store.resolve(&KEY, OWNER.fence, &resolution).await;
            row.check(resolved, |record| {
                let transition = Record::resolve(record, OWNER.fence, &resolution, now);
                settled(row, ResolveResult::Resolved, transition)
            });
        }
    }
}

/// Returns the result of a statement: `done` if it changed the record, or the reply of a transition
/// that changes nothing. `None` if the statement should have changed the record and has not, so
/// that the operation fails after some tries.
fn settled<T>(row: &Row, done: T, transition: Transition<T>) -> Option<T> {
    match transition.change {
        _ if row.is_changed() => Some(done),
        Change::Unchanged => Some(transition.reply),
        Change::Put(_) | Change::Remove => None,
    }
}

/// Returns the decision that a row with a record means.
fn decision(row: &Row, record: &Record) -> Option<Decision> {
    let claim = claim();
    if !row.is_changed() {
        let claimed = Record::claim(Some(record), &claim, row.now());
        return (claimed.change == Change::Unchanged).then_some(claimed.reply);
    }
    let until = match row.lease_end() {
        None => return Some(Decision::Unknown),
        Some(until) => until,
    };
    if row.owner().nonce != claim.nonce {
        let left = until.saturating_since(row.now());
        return Some(Decision::Wait { left });
    }
    let grant = Grant {
        owner: row.owner(),
        attempt: row.attempt(),
        lease: Some(claim.lease),
    };
    Some(match row.is_recovery() {
        true => Decision::Recover(grant),
        false => Decision::Execute(grant),
    })
}
