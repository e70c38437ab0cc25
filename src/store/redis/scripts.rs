//! The scripts. There is one script per operation, and each script is one atomic step on one key.

use std::sync::OnceLock;

use redis::{Arg, Cmd, Value, cmd};

use super::failure;
use crate::error::Error;

/// A script. The server knows it by its digest once it has run there.
#[derive(Debug)]
pub(super) struct Script {
    source: &'static str,
    digest: OnceLock<String>,
    /// The script to run if the server refuses this one because it takes no writes.
    instead: Option<&'static Script>,
}

/// A script that may change the record, with its flags.
///
/// A server that is full or cannot save its data refuses the writes of a script without flags, but
/// not its reads. With `allow-oom`, an owner can renew and end its attempt on a full server. A
/// replica refuses all scripts with flags, at no cost.
///
/// Every reply begins with the key of the request. If the replies of a connection are out of step
/// with its requests, no caller gets the reply for another key (I4).
macro_rules! changing {
    ($flags:literal, $role:literal, $file:literal) => {
        concat!(
            $flags,
            include_str!("prelude.lua"),
            include_str!($role),
            include_str!($file),
            include_str!("commit.lua")
        )
    };
}

pub(super) static CLAIM: Script = Script {
    source: changing!("#!lua\n", "primary.lua", "claim.lua"),
    digest: OnceLock::new(),
    instead: Some(&CLAIM_WITHOUT_FLAGS),
};
/// The claim without flags, for replication and for a server that refuses writes. Without
/// replication, a claim that replays needs no write.
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

    /// Returns the command that runs the script by its digest. The server replies with NOSCRIPT if
    /// it does not know the script, or no longer knows it.
    pub(super) fn by_digest(&self, key: &[u8], arguments: &[&[u8]]) -> Cmd {
        // Command names, lengths and line ends are included.
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

    /// Returns the command that runs this script by its digest, with the key and the arguments of
    /// another command.
    pub(super) fn by_digest_with(&self, other: &Cmd) -> Cmd {
        with_arguments_of(other, "EVALSHA", self.digest())
    }

    /// Returns the command that runs the script from its source. The server stores the script in
    /// the same step.
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

/// The reply of a script: a word, and the values that belong to it.
#[derive(Debug)]
pub(super) struct Reply {
    word: Vec<u8>,
    rest: std::vec::IntoIter<Value>,
}

impl Reply {
    /// Parses a reply.
    ///
    /// # Errors
    ///
    /// [`CorruptRecord`](crate::ErrorKind::CorruptRecord) if the script could not read the record.
    /// [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable) if the reply is not one of ours, or
    /// belongs to a request for another key.
    pub(super) fn of(value: Value, key: &[u8]) -> Result<Self, Error> {
        const CORRUPT: Error = Error::corrupt_record(
            "a stored record cannot be read; it is damaged, has a newer version, or its key holds another type of value",
        );
        let Value::Array(items) = value else {
            return Err(failure::UNEXPECTED_REPLY);
        };
        let mut rest = items.into_iter();
        if !matches!(rest.next(), Some(Value::BulkString(name)) if name == key) {
            return Err(failure::UNEXPECTED_REPLY);
        }
        match rest.next() {
            Some(Value::BulkString(word)) if word == b"corrupt" => Err(CORRUPT),
            Some(Value::BulkString(word)) => Ok(Self { word, rest }),
            _ => Err(failure::UNEXPECTED_REPLY),
        }
    }

    pub(super) fn word(&self) -> &[u8] {
        &self.word
    }

    /// Returns the next value, which must be a number.
    pub(super) fn number(&mut self) -> Result<u64, Error> {
        match self.rest.next() {
            Some(Value::Int(number)) => u64::try_from(number).map_err(|_| failure::UNEXPECTED_REPLY),
            _ => Err(failure::UNEXPECTED_REPLY),
        }
    }

    /// Returns the next value if it is a byte string.
    pub(super) fn bytes(&mut self) -> Result<Option<Vec<u8>>, Error> {
        match self.rest.next() {
            Some(Value::BulkString(bytes)) => Ok(Some(bytes)),
            Some(Value::Nil) | None => Ok(None),
            Some(_) => Err(failure::UNEXPECTED_REPLY),
        }
    }

    /// Returns the next number; `None` if there are no more values.
    pub(super) fn optional_number(&mut self) -> Result<Option<u64>, Error> {
        if self.rest.len() == 0 {
            return Ok(None);
        }
        self.number().map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn reply(items: Vec<Value>) -> Result<Reply, Error> {
        Reply::of(Value::Array(items), b"k")
    }

    fn text(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    /// A reply for another key must reach no caller (I4).
    #[test]
    fn a_reply_that_no_script_returns_for_this_key_is_an_error() {
        let mut fine = reply(vec![text("k"), text("word"), Value::Int(7), text("bytes")]).unwrap();
        assert_eq!(fine.word(), b"word");
        assert_eq!(fine.number().unwrap(), 7);
        assert_eq!(fine.bytes().unwrap().unwrap(), b"bytes");
        assert_eq!((fine.bytes().unwrap(), fine.optional_number().unwrap()), (None, None));
        for items in [
            vec![],
            vec![text("k")],
            vec![text("other"), text("word")],
            vec![text("k"), Value::Int(1)],
            vec![Value::Nil, text("word")],
            vec![text("other"), text("corrupt")],
        ] {
            let error = reply(items.clone()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::StoreUnavailable, "{items:?}");
        }
        assert!(Reply::of(Value::Okay, b"k").is_err());
        let corrupt = reply(vec![text("k"), text("corrupt")]).unwrap_err();
        assert_eq!(corrupt.kind(), ErrorKind::CorruptRecord);
    }

    #[test]
    fn a_value_of_another_type_is_an_error() {
        for value in [Value::Int(-1), text("7"), Value::Nil] {
            let mut reply = reply(vec![text("k"), text("word"), value]).unwrap();
            assert!(reply.optional_number().is_err());
        }
        let mut number = reply(vec![text("k"), text("word"), Value::Int(1)]).unwrap();
        assert!(number.bytes().is_err());
    }
}
