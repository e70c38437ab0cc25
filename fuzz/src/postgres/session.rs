//! The server's side of the protocol (PostgreSQL, chapter "Frontend/Backend Protocol").

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::row::{BOOL, Column, INT4, INT8, TEXT};
use super::{Place, Reply};

/// The type `text[]`.
const TEXTS: u32 = 1_009;

const TABLE: &str = "\"idempotency_records\"";

const STATEMENTS: [&str; 11] = [
    "begin", "claim", "complete", "finish", "inspect", "peek", "release", "renew", "resolve", "sweep", "watch",
];

/// The columns of the table, as `inspect` shows them.
const COLUMNS: [&str; 15] = [
    "key bytea",
    "version smallint",
    "state smallint",
    "kind smallint",
    "fingerprint bytea",
    "nonce bytea",
    "fence bigint",
    "attempt integer",
    "lease bigint",
    "retention bigint",
    "lease_until bigint",
    "expires bigint",
    "watched boolean",
    "head bytea",
    "body bytea",
];

/// A connection of the client.
pub(super) struct Session {
    connection: UnixStream,
    reply: Rc<Reply>,
    /// The number of this connection, which is the id of its process.
    process: i32,
    in_transaction: bool,
    /// The statements by their name on this connection, as the names of their templates.
    statements: HashMap<Vec<u8>, &'static str>,
    /// The statement that was parsed or bound last, and its question.
    current: (&'static str, [u8; 8]),
    out: Vec<u8>,
}

impl Session {
    /// Serves a connection until the client closes it.
    pub(super) async fn serve(connection: UnixStream, reply: Rc<Reply>) -> Option<()> {
        thread_local!(static PROCESS: Cell<i32> = const { Cell::new(0) });
        PROCESS.set(PROCESS.get() % 1_000 + 1);
        let mut session = Self {
            connection,
            reply,
            process: PROCESS.get(),
            in_transaction: false,
            statements: HashMap::new(),
            current: ("", [0; 8]),
            out: Vec::new(),
        };
        let startup = session.connection.read_u32().await.ok()?;
        session.body(startup).await?;
        session.place(Place::Startup).await?;
        session.message(b'R', &0_u32.to_be_bytes());
        session.message(b'K', &[session.process.to_be_bytes(), [0; 4]].concat());
        session.ready();
        loop {
            session.flush().await?;
            let kind = session.connection.read_u8().await.ok()?;
            let length = session.connection.read_u32().await.ok()?;
            let body = session.body(length).await?;
            session.answer(kind, &body).await?;
        }
    }

    async fn body(&mut self, length: u32) -> Option<Vec<u8>> {
        let mut body = vec![0; usize::try_from(length).ok()?.checked_sub(4)?];
        self.connection.read_exact(&mut body).await.ok()?;
        Some(body)
    }

    /// Sends the bytes of the input if this is their place, and ends the session.
    async fn place(&mut self, place: Place) -> Option<()> {
        let Reply::Bytes(at, bytes) = &*self.reply else {
            return Some(());
        };
        if *at != place {
            return Some(());
        }
        self.out.extend_from_slice(bytes);
        self.flush().await?;
        None
    }

    async fn flush(&mut self) -> Option<()> {
        let out = std::mem::take(&mut self.out);
        self.connection.write_all(&out).await.ok()
    }

    async fn answer(&mut self, kind: u8, body: &[u8]) -> Option<()> {
        match kind {
            b'Q' => {
                self.place(Place::Query).await?;
                self.query(&String::from_utf8_lossy(body));
            }
            b'P' => {
                let (name, rest) = text(body)?;
                let (sql, _) = text(rest)?;
                let sql = String::from_utf8_lossy(sql);
                let known = STATEMENTS
                    .into_iter()
                    .find(|known| sql.contains(&format!("'{known} {TABLE}")));
                self.current.0 = known.unwrap_or_default();
                self.statements.insert(name.to_vec(), self.current.0);
                self.message(b'1', &[]);
            }
            b'D' => {
                self.place(Place::Parse).await?;
                self.message(b't', &[0; 2]);
                let columns = self.columns();
                self.describe(&columns);
            }
            b'B' => {
                let (_, rest) = text(body)?;
                let (name, rest) = text(rest)?;
                self.current.0 = self.statements.get(name).copied()?;
                // The question is the last parameter. The formats of the results follow it.
                self.current.1 = rest
                    .len()
                    .checked_sub(12)
                    .and_then(|at| rest[at..at + 8].try_into().ok())?;
                self.message(b'2', &[]);
            }
            b'E' => {
                if self.current.0 != "inspect" {
                    self.place(Place::Execute).await?;
                }
                self.execute();
            }
            b'C' => self.message(b'3', &[]),
            b'S' => self.ready(),
            _ => return None,
        }
        Some(())
    }

    /// Replies to a simple query. Its values are texts.
    fn query(&mut self, sql: &str) {
        if sql.starts_with("BEGIN") {
            self.in_transaction = true;
            self.message(b'C', b"BEGIN\0");
        }
        if sql.starts_with("COMMIT") || sql.starts_with("ROLLBACK") {
            self.in_transaction = false;
        }
        let column: Option<Column> = match sql {
            _ if sql.contains("pg_backend_pid()") => Some(("pid", INT4, Some(self.process.to_string().into()))),
            _ if sql.starts_with("SELECT transaction_timestamp()") => Some(("is_open", BOOL, Some(b"f".to_vec()))),
            _ => None,
        };
        if let Some(column) = column {
            let columns = [column];
            self.describe(&columns);
            self.row(&columns);
        }
        self.message(b'C', b"SELECT 1\0");
        self.ready();
    }

    fn execute(&mut self) {
        // `finish` has no row, so that a completion also needs its second statement.
        let has_row =
            self.current.0 == "inspect" || self.current.0 != "finish" && matches!(&*self.reply, Reply::Row(_));
        if has_row {
            let columns = self.columns();
            self.row(&columns);
        }
        self.message(b'C', b"SELECT 1\0");
    }

    /// Returns the row of the current statement.
    fn columns(&self) -> Vec<Column> {
        let (name, mut question) = self.current;
        let mut tag = format!("{name} {TABLE}");
        let mut columns = match &*self.reply {
            _ if name == "inspect" => inspected(),
            Reply::Bytes(..) => Vec::new(),
            Reply::Row(row) => {
                question[0] ^= u8::from(row.is_earlier());
                if row.is_of_other_statement() {
                    tag.insert(0, 'x');
                } else if row.is_in_transaction() {
                    tag.push_str(" in an open transaction");
                }
                row.columns()
            }
        };
        columns.push(("statement", TEXT, Some(tag.into())));
        columns.push(("question", INT8, Some(question.to_vec())));
        columns
    }

    fn describe(&mut self, columns: &[Column]) {
        let mut body = count(columns.len()).to_vec();
        for (name, kind, _) in columns {
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(&[0; 7]);
            body.extend_from_slice(&kind.to_be_bytes());
            body.extend_from_slice(&[0; 8]);
        }
        self.message(b'T', &body);
    }

    fn row(&mut self, columns: &[Column]) {
        let mut body = count(columns.len()).to_vec();
        for (_, _, value) in columns {
            match value {
                Some(value) => {
                    body.extend_from_slice(&length(value.len()));
                    body.extend_from_slice(value);
                }
                None => body.extend_from_slice(&[0xff; 4]),
            }
        }
        self.message(b'D', &body);
    }

    fn ready(&mut self) {
        let status = if self.in_transaction { b'T' } else { b'I' };
        self.message(b'Z', &[status]);
    }

    fn message(&mut self, kind: u8, body: &[u8]) {
        self.out.push(kind);
        self.out.extend_from_slice(&length(body.len() + 4));
        self.out.extend_from_slice(body);
    }
}

/// Returns the row of a table that a store can use.
fn inspected() -> Vec<Column> {
    let [yes, no] = [Some(vec![1]), Some(vec![0])];
    vec![
        ("exists", BOOL, yes.clone()),
        ("persistence", TEXT, Some(b"p".to_vec())),
        ("columns", TEXTS, Some(texts(&COLUMNS))),
        ("indexed", BOOL, yes),
        ("missing", TEXTS, Some(texts(&[]))),
        ("read_only", BOOL, no.clone()),
        ("filtered", BOOL, no),
        ("version", INT4, Some(150_000_u32.to_be_bytes().to_vec())),
    ]
}

/// Encodes an array with one dimension.
fn texts(texts: &[&str]) -> Vec<u8> {
    let dimensions = length(usize::from(!texts.is_empty()));
    let mut array = [dimensions, [0; 4], TEXT.to_be_bytes()].concat();
    if !texts.is_empty() {
        array.extend_from_slice(&[length(texts.len()), length(1)].concat());
    }
    for text in texts {
        array.extend_from_slice(&length(text.len()));
        array.extend_from_slice(text.as_bytes());
    }
    array
}

/// Splits a text with a zero at its end from the rest.
fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

fn length(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap().to_be_bytes()
}

fn count(count: usize) -> [u8; 2] {
    u16::try_from(count).unwrap().to_be_bytes()
}
