//! Replies of a Redis server, or of a proxy in its place.
//!
//! Each operation of the store returns the result that the reply means by a model, or an error. A
//! store connects only to a server whose replies show no wrong setting. No reply makes the store
//! panic or hang.

use std::rc::Rc;
use std::time::Duration;

use ::redis::{Value, parse_redis_value};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tower_idempotency::protocol::{
    Change, Claim, Completion, Decision, Fence, Fingerprint, Grant, IfLost, Nonce, Outcome, Owner, Record, Release,
    Renewal, Resolution, ResolveResult, Snapshot, Status, StorageKey,
};
use tower_idempotency::{Error, RedisStore, Store, Timestamp};

use crate::input::Input;
use crate::server::{check_error, with_server};

const HOUR: Duration = Duration::from_secs(3_600);
const KEY: StorageKey = StorageKey::from_bytes([7; 32]);
/// The name of the record with this key.
const NAME: &[u8] = b"idempotency:0707070707070707070707070707070707070707070707070707070707070707";
const OWNER: Owner = Owner {
    nonce: Nonce::from_bytes([9; 16]),
    fence: Fence::new(1),
};

/// The command that gets the reply of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Hello,
    Info,
    Rights,
    Script,
}

/// The replies of the server.
struct Replies {
    place: Place,
    reply: Vec<u8>,
    is_replicated: bool,
    /// Whether the server closes the connection after the reply.
    closes: bool,
}

pub fn property(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (operation, flags) = (input.byte() % 10, input.byte());
    let place = match operation {
        7 => Place::Hello,
        8 => Place::Info,
        9 => Place::Rights,
        _ => Place::Script,
    };
    let replies = Rc::new(Replies {
        place,
        reply: input.rest().to_vec(),
        is_replicated: flags & 2 != 0,
        closes: flags & 4 != 0,
    });
    let asks_replicas = flags & 1 != 0;
    let model = Model::of(&replies.reply, !asks_replicas || replies.is_replicated);
    let serving = Rc::clone(&replies);
    with_server(
        move |connection| serve(connection, Rc::clone(&serving)),
        async |folder| {
            let mut builder = RedisStore::builder();
            if asks_replicas {
                builder = builder.with_replication(1, Duration::from_millis(10));
            }
            let url = format!("redis+unix://{}/.s.PGSQL.5432", folder.display());
            match builder.connect(&url).await {
                Ok(store) if place == Place::Script => operate(&store, operation, &model).await,
                Ok(_) => model.check_connected(place),
                Err(error) => {
                    assert_ne!(place, Place::Script, "{error:?}");
                    check_error(&error);
                }
            }
        },
    );
}

async fn operate(store: &RedisStore, operation: u8, model: &Model) {
    let resolution = Resolution::Absent;
    match operation {
        0 => model.check(store.claim(&claim()).await, Model::decision),
        1 => model.check(store.peek(&KEY).await, Model::snapshot),
        2 => model.check(
            store.complete(&KEY, OWNER, &Outcome::Tombstone, HOUR).await,
            Model::completion,
        ),
        3 => model.check(store.renew(&KEY, OWNER, HOUR).await, Model::renewal),
        4 => model.check(store.release(&KEY, OWNER).await, Model::release),
        5 => model.check(store.resolve(&KEY, OWNER.fence, &resolution).await, Model::resolution),
        _ => drop(store.watch(&KEY).await.map_err(|error| check_error(&error))),
    }
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

/// The meaning of a reply.
struct Model {
    /// The reply, unless it is an error, is not whole, or belongs to another key.
    reply: Option<Vec<Value>>,
    whole: Option<Value>,
    is_replicated: bool,
    /// Whether the reply is the end of the input.
    is_last: bool,
}

impl Model {
    fn of(bytes: &[u8], is_replicated: bool) -> Self {
        let whole = parse_redis_value(bytes).and_then(Value::extract_error).ok();
        let reply = match &whole {
            Some(Value::Array(items)) if is_text(items.first(), NAME) => Some(items[1..].to_vec()),
            _ => None,
        };
        let shorter = bytes.split_last().map(|(_, shorter)| parse_redis_value(shorter));
        Self {
            reply,
            whole,
            is_replicated,
            is_last: shorter.is_some_and(|parsed| parsed.is_err()),
        }
    }

    /// Checks that a result is that of the model, or an error if the model has none.
    fn check<T: PartialEq + std::fmt::Debug>(&self, result: Result<T, Error>, by_model: fn(&Self) -> Option<T>) {
        match (result, by_model(self)) {
            (Ok(result), expected) => assert_eq!(Some(result), expected),
            (Err(error), Some(expected)) if self.is_last => panic!("{error:?} instead of {expected:?}"),
            (Err(error), _) => check_error(&error),
        }
    }

    fn check_connected(&self, place: Place) {
        let text = match &self.whole {
            Some(Value::BulkString(text)) => String::from_utf8_lossy(text).into_owned(),
            _ => String::new(),
        };
        let is_replica = text.lines().any(|line| line == "role:slave");
        assert!(place != Place::Info || !is_replica);
        assert!(place != Place::Rights || self.whole == Some(Value::Array(Vec::new())));
    }

    fn word(&self) -> Option<(&[u8], &[Value])> {
        match self.reply.as_deref()? {
            [Value::BulkString(word), rest @ ..] => Some((word, rest)),
            _ => None,
        }
    }

    fn decision(&self) -> Option<Decision> {
        let claim = claim();
        let (word, rest) = self.word()?;
        let decision = match (word, rest) {
            (b"execute" | b"recover", [fence, attempt, ..]) => {
                let grant = Grant {
                    owner: Owner {
                        fence: Fence::new(number(fence)?),
                        ..OWNER
                    },
                    attempt: u32::try_from(number(attempt)?).ok()?,
                    lease: Some(claim.lease),
                };
                match word {
                    b"execute" => Decision::Execute(grant),
                    _ => Decision::Recover(grant),
                }
            }
            (b"mismatch", _) => Decision::Mismatch,
            (b"unknown", _) => Decision::Unknown,
            (b"wait", [left, ..]) => Decision::Wait {
                left: Duration::from_micros(number(left)?),
            },
            (b"record", [now, record, ..]) => {
                let now = Timestamp::from_micros(number(now)?);
                let claimed = Record::claim(Some(&self::record(record)?), &claim, now);
                (claimed.change == Change::Unchanged).then_some(claimed.reply)?
            }
            _ => return None,
        };
        let needs_replicas = !matches!(decision, Decision::Mismatch | Decision::Unknown | Decision::Wait { .. });
        (self.is_replicated || !needs_replicas).then_some(decision)
    }

    fn snapshot(&self) -> Option<Option<Snapshot>> {
        match self.word()? {
            (b"absent", _) => Some(None),
            (b"record", [now, record, ..]) => {
                let (now, record) = (Timestamp::from_micros(number(now)?), self::record(record)?);
                (self.is_replicated || !record.is_completed()).then(|| Record::peek(Some(&record), now))
            }
            _ => None,
        }
    }

    fn completion(&self) -> Option<Completion> {
        match self.word()? {
            (b"completed", _) => self.is_replicated.then_some(Completion::Completed),
            (b"superseded", [] | [Value::Nil, ..]) => Some(Completion::Superseded(None)),
            (b"superseded", [record, ..]) => {
                let seen = Record::peek(Some(&self::record(record)?), Timestamp::from_micros(0));
                let stands = match seen?.status {
                    Status::Completed(outcome) => Some(outcome),
                    _ => None,
                };
                Some(Completion::Superseded(stands))
            }
            _ => None,
        }
    }

    fn renewal(&self) -> Option<Renewal> {
        match self.word()?.0 {
            b"renewed" => Some(Renewal::Renewed),
            b"superseded" => Some(Renewal::Superseded),
            _ => None,
        }
    }

    fn release(&self) -> Option<Release> {
        match self.word()?.0 {
            b"released" => Some(Release::Released),
            b"superseded" => Some(Release::Superseded),
            _ => None,
        }
    }

    fn resolution(&self) -> Option<ResolveResult> {
        match self.word()? {
            (b"resolved", _) => self.is_replicated.then_some(ResolveResult::Resolved),
            (b"conflict", []) => Some(ResolveResult::Conflict(None)),
            (b"conflict", [fence, ..]) => Some(ResolveResult::Conflict(Some(Fence::new(number(fence)?)))),
            _ => None,
        }
    }
}

fn is_text(value: Option<&Value>, text: &[u8]) -> bool {
    matches!(value, Some(Value::BulkString(bytes)) if bytes == text)
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

fn record(value: &Value) -> Option<Record> {
    match value {
        Value::BulkString(bytes) => Record::from_bytes(bytes.clone().into()).ok(),
        _ => None,
    }
}

/// Serves a connection until the client closes it.
async fn serve(mut connection: UnixStream, replies: Rc<Replies>) -> Option<()> {
    let mut received = Vec::new();
    loop {
        while let Some((command, length)) = command(&received) {
            received.drain(..length);
            let (reply, is_chosen) = replies.to(&command);
            connection.write_all(reply).await.ok()?;
            if is_chosen && replies.closes {
                return None;
            }
        }
        if connection.read_buf(&mut received).await.ok()? == 0 {
            return None;
        }
    }
}

impl Replies {
    /// Returns the reply to a command, and whether it is the reply of the input.
    fn to(&self, command: &[Vec<u8>]) -> (&[u8], bool) {
        let is_check = command.get(3).is_some_and(|key| key.ends_with(b":check"));
        let (place, usual): (_, &[u8]) = match command.first().map_or(&b""[..], Vec::as_slice) {
            b"HELLO" => (Place::Hello, b"%1\r\n+server\r\n+redis\r\n"),
            b"INFO" => (Place::Info, b"$0\r\n\r\n"),
            b"EVAL" if is_check => (Place::Rights, b"*0\r\n"),
            b"EVAL" | b"EVALSHA" | b"SSUBSCRIBE" => (Place::Script, b""),
            b"WAIT" if self.is_replicated => return (b":1\r\n", false),
            b"WAIT" => return (b":0\r\n", false),
            _ => return (b"+OK\r\n", false),
        };
        match place == self.place {
            true => (&self.reply, true),
            false => (usual, false),
        }
    }
}

/// Reads the first command of the received bytes, and returns its length too.
fn command(received: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let mut at = 0;
    let mut line = |sign: u8| {
        let rest = received.get(at..)?.strip_prefix(&[sign])?;
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let number: usize = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
        at += 1 + end + 2;
        if sign == b'$' {
            at += number + 2;
        }
        Some((number, at))
    };
    let (count, mut end) = line(b'*')?;
    let mut command = Vec::new();
    for _ in 0..count {
        let (length, after) = line(b'$')?;
        command.push(received.get(after - 2 - length..after - 2)?.to_vec());
        end = after;
    }
    (end <= received.len()).then_some((command, end))
}
