//! The scripts: one per operation, each one atomic step on one key.

use std::sync::OnceLock;

use redis::{cmd, Arg, Cmd, Value};

use super::failure;
use crate::error::{Error, ErrorKind};

/// A script, known to the server by its digest once it has run there.
#[derive(Debug)]
pub(super) struct Script {
    source: &'static str,
    digest: OnceLock<String>,
    /// The script to run if the server refuses this one because it takes no writes.
    instead: Option<&'static Script>,
}

/// A script that may change the record, with its flags.
///
/// A server that is full or cannot save its data refuses the writes of a script without flags, but not its reads. With
/// `allow-oom`, an owner can renew and end what it was granted. A replica refuses all scripts with flags, at no cost.
///
/// Every reply begins with the key that was asked for: should a connection ever fall out of step with its questions, nobody is
/// given what belongs to another key.
macro_rules! changing {
    ($flags:literal, $role:literal, $file:literal) => {
        concat!(
            $flags,
            include_str!("prelude.lua"),
            include_str!($role),
            include_str!($file),
            include_str!("finale.lua")
        )
    };
}

pub(super) static CLAIM: Script = Script {
    source: changing!("#!lua\n", "primary.lua", "claim.lua"),
    digest: OnceLock::new(),
    instead: Some(&CLAIM_WITHOUT_FLAGS),
};
/// The same without flags, for replication and for a server that refuses writes. Without replication, a claim that
/// replays needs no write.
pub(super) static CLAIM_WITHOUT_FLAGS: Script = Script::new(changing!("", "replica.lua", "claim.lua"));
pub(super) static COMPLETE: Script = Script::new(changing!("#!lua flags=allow-oom\n", "primary.lua", "complete.lua"));
pub(super) static PEEK: Script = Script::new(concat!(
    include_str!("prelude.lua"),
    include_str!("replica.lua"),
    include_str!("peek.lua")
));
pub(super) static RELEASE: Script = Script::new(changing!("#!lua flags=allow-oom\n", "primary.lua", "release.lua"));
pub(super) static RENEW: Script = Script::new(changing!("#!lua flags=allow-oom\n", "primary.lua", "renew.lua"));
pub(super) static RESOLVE: Script = Script::new(changing!("#!lua flags=allow-oom\n", "primary.lua", "resolve.lua"));

impl Script {
    const fn new(source: &'static str) -> Self {
        Self {
            source,
            digest: OnceLock::new(),
            instead: None,
        }
    }

    /// Returns the script to run if the server refuses this one because it takes no writes.
    pub(super) const fn instead(&self) -> Option<&'static Self> {
        self.instead
    }

    fn digest(&self) -> &str {
        let digest = || redis::Script::new(self.source).get_hash().to_owned();
        self.digest.get_or_init(digest)
    }

    /// Runs the script by its digest; the server answers NOSCRIPT when it does not know it (any more).
    pub(super) fn by_digest(&self, key: &[u8], arguments: &[&[u8]]) -> Cmd {
        // Names, lengths and ends of lines included.
        const BESIDE: usize = 128;
        const EACH: usize = 12;
        let bytes = arguments
            .iter()
            .fold(key.len(), |sum, argument| sum + argument.len() + EACH);
        let mut command = Cmd::with_capacity(4 + arguments.len(), BESIDE + bytes);
        command.arg("EVALSHA").arg(self.digest().as_bytes()).arg(1).arg(key);
        for argument in arguments {
            command.arg(*argument);
        }
        command
    }

    /// Runs the script with the key and the arguments of another one, by its digest.
    pub(super) fn by_digest_with(&self, other: &Cmd) -> Cmd {
        with_arguments_of(other, "EVALSHA", self.digest())
    }

    /// Runs the same from the script's source, which teaches it to the server in the same step.
    pub(super) fn by_source(&self, by_digest: &Cmd) -> Cmd {
        with_arguments_of(by_digest, "EVAL", self.source)
    }
}

fn with_arguments_of(other: &Cmd, name: &str, script: &str) -> Cmd {
    let mut command = cmd(name);
    command.arg(script);
    for argument in other.args_iter().skip(2) {
        if let Arg::Simple(argument) = argument {
            command.arg(argument);
        }
    }
    command
}

/// What a script returned: a word, and what belongs to it.
#[derive(Debug)]
pub(super) struct Reply {
    word: Vec<u8>,
    rest: std::vec::IntoIter<Value>,
}

impl Reply {
    /// Takes a reply apart.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::CorruptRecord`] when the script could not read the record; [`ErrorKind::StoreUnavailable`] when the reply
    /// is not one of ours, or to a question about another key.
    pub(super) fn of(value: Value, key: &[u8]) -> Result<Self, Error> {
        const CORRUPT: Error = Error::new(
            ErrorKind::CorruptRecord,
            "a stored record cannot be read: it is damaged, of a newer version, or its key holds another type of value",
        );
        let Value::Array(items) = value else {
            return Err(failure::STRANGE);
        };
        let mut rest = items.into_iter();
        if !matches!(rest.next(), Some(Value::BulkString(asked)) if asked == key) {
            return Err(failure::STRANGE);
        }
        match rest.next() {
            Some(Value::BulkString(word)) if word == b"corrupt" => Err(CORRUPT),
            Some(Value::BulkString(word)) => Ok(Self { word, rest }),
            _ => Err(failure::STRANGE),
        }
    }

    pub(super) fn word(&self) -> &[u8] {
        &self.word
    }

    /// The next number.
    pub(super) fn number(&mut self) -> Result<u64, Error> {
        match self.rest.next() {
            Some(Value::Int(number)) => u64::try_from(number).map_err(|_| failure::STRANGE),
            _ => Err(failure::STRANGE),
        }
    }

    /// The next byte string, where there is one.
    pub(super) fn bytes(&mut self) -> Result<Option<Vec<u8>>, Error> {
        match self.rest.next() {
            Some(Value::BulkString(bytes)) => Ok(Some(bytes)),
            Some(Value::Nil) | None => Ok(None),
            Some(_) => Err(failure::STRANGE),
        }
    }

    /// The next number, where there is one.
    pub(super) fn optional_number(&mut self) -> Result<Option<u64>, Error> {
        if self.rest.len() == 0 {
            return Ok(None);
        }
        self.number().map(Some)
    }
}
