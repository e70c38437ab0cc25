//! The name of the table, and the statements for it.

use std::fmt;
use std::sync::Arc;

use sqlx::AssertSqlSafe;

use super::session::IS_ALONE;
use crate::error::Error;

/// The name of a table, with or without a schema. It becomes a part of statements as text, so only
/// plain identifiers are accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TableName {
    schema: Option<String>,
    name: Arc<str>,
}

impl TableName {
    /// Parses `name` or `schema.name`, each of 1 to 48 characters of a to z, 0 to 9 and `_`, not
    /// beginning with a digit.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        const INVALID: Error = Error::configuration(
            "the name of the table cannot be used; write `name` or `schema.name`, each of 1 to 48 characters of a-z, 0-9 \
             and _, not beginning with a digit",
        );
        let (schema, name) = match text.split_once('.') {
            Some((schema, name)) => (Some(schema), name),
            None => (None, text),
        };
        if !is_identifier(name) || !schema.is_none_or(is_identifier) {
            return Err(INVALID);
        }
        Ok(Self {
            schema: schema.map(str::to_owned),
            name: name.into(),
        })
    }

    /// Makes a name from a valid identifier.
    pub(crate) fn of(name: &'static str) -> Self {
        debug_assert!(is_identifier(name), "{name}");
        Self {
            schema: None,
            name: name.into(),
        }
    }

    /// Returns the name without its schema, which is also the channel of the notifications.
    pub(crate) const fn name(&self) -> &Arc<str> {
        &self.name
    }
}

fn is_identifier(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=48).contains(&text.len()) && text.bytes().all(plain) && !text.as_bytes()[0].is_ascii_digit()
}

impl fmt::Display for TableName {
    /// Writes the name as it appears in SQL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "\"{schema}\".")?;
        }
        write!(f, "\"{}\"", self.name)
    }
}

/// The suffix of the tag in the rows of a statement that has not begun its transaction by itself.
pub(super) const IN_OPEN_TRANSACTION: &str = " in an open transaction";

/// The text of a statement for one table, and the tag that its rows repeat.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    tag: Arc<str>,
    text: Arc<str>,
    /// The text for sessions in which no transaction can be open. Its rows have the tag without a
    /// suffix.
    private: Arc<str>,
}

impl Statement {
    /// Makes a statement from a template. Its last parameter is the question that
    /// [`ask`](super::ask::Sending::ask) binds. Each row repeats that question, and a tag of the
    /// `name` and the table. So the store never mistakes a row of another statement, or of the same
    /// statement on another table, for a row of this one. If the statement runs in a transaction
    /// that was open before, the tag has a [suffix](IN_OPEN_TRANSACTION).
    pub(crate) fn new(name: &'static str, template: &str, table: &TableName) -> Self {
        // The server evaluates this expression to find the row, so it sets the lock timeout before
        // the statement waits for the lock on that row.
        const SET_LOCK_TIMEOUT: &str =
            "CASE WHEN {at}::text IS NULL THEN true ELSE set_config('lock_timeout', {at}, true) <> '' END";
        const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";
        const COLUMNS: &str = "r.version, r.state, r.kind, r.fingerprint, r.nonce, r.fence, r.attempt, r.lease, r.retention, \
                               r.lease_until, r.expires, r.head, r.body, r.now";
        const EXPIRED: &str =
            "({at} >= r.expires AND NOT (r.state = 0 AND {at} < least(r.lease_until, {at} + r.lease)))";
        const LOST: &str = "(r.state = 1 OR r.state = 0 AND {at} >= least(r.lease_until, {at} + r.lease))";
        let tag = format!("{name} {table}");
        let text = template
            .replace("{expired}", &EXPIRED.replace("{at}", "r.now"))
            .replace("{expired_now}", &EXPIRED.replace("{at}", NOW))
            .replace("{lost_now}", &LOST.replace("{at}", NOW))
            .replace("{now}", NOW)
            .replace("{columns}", COLUMNS)
            .replace("{notify}", "pg_notify('{name}', encode(r.key, 'hex'))::text")
            .replace("{name}", table.name())
            .replace("{table}", &table.to_string());
        let text = (1..10)
            .map(|number| format!("${number}"))
            .fold(text, |text, parameter| {
                text.replace(
                    &format!("{{set_lock_timeout {parameter}}}"),
                    &SET_LOCK_TIMEOUT.replace("{at}", &parameter),
                )
            });
        let marked = format!("CASE WHEN {IS_ALONE} THEN '{tag}' ELSE '{tag}{IN_OPEN_TRANSACTION}' END");
        Self {
            text: text.replace("{tag}", &marked).into(),
            private: text.replace("{tag}", &format!("'{tag}'")).into(),
            tag: tag.into(),
        }
    }

    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Returns the text as safe SQL. It consists only of a template of this crate and a parsed
    /// identifier.
    pub(crate) fn safe(&self, is_private: bool) -> AssertSqlSafe<Arc<str>> {
        AssertSqlSafe(Arc::clone(if is_private { &self.private } else { &self.text }))
    }
}

/// Defines a struct with one statement for each name. The template of a statement is the file
/// `sql/<name>.sql` beside the file that defines the struct.
macro_rules! statements {
    ($(#[$docs:meta])* $visibility:vis struct $statements:ident { $($name:ident),* $(,)? }) => {
        $(#[$docs])*
        $visibility struct $statements {
            $($visibility $name: $crate::store::Statement,)*
        }

        impl $statements {
            $visibility fn new(table: &$crate::store::TableName) -> Self {
                Self {
                    $($name: $crate::store::Statement::new(
                        stringify!($name),
                        include_str!(concat!("sql/", stringify!($name), ".sql")),
                        table,
                    ),)*
                }
            }
        }
    };
}
pub(crate) use statements;

statements! {
    /// All statements for a table.
    #[derive(Debug)]
    pub(super) struct Statements {
        begin, claim, complete, finish, inspect, peek, release, renew, resolve, schema, sweep, watch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn names_are_parsed_and_quoted() {
        assert_eq!(TableName::parse("records").unwrap().to_string(), "\"records\"");
        assert_eq!(TableName::parse("_a.b2").unwrap().to_string(), "\"_a\".\"b2\"");
    }

    #[test]
    fn a_name_that_is_no_plain_identifier_is_refused() {
        let long = "x".repeat(49);
        for name in [
            "",
            ".",
            "a.",
            ".b",
            "a.b.c",
            "1a",
            "A",
            "a-b",
            "a\"b",
            "a b",
            "a;drop table b",
            "ä",
            &long,
        ] {
            let error = TableName::parse(name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Configuration, "{name}");
        }
    }

    #[test]
    fn no_statement_contains_a_placeholder() {
        let statements = Statements::new(&TableName::parse("s.t").unwrap());
        let all = format!("{statements:?}");
        for placeholder in [
            "{now}",
            "{table}",
            "{name}",
            "{at}",
            "{expired",
            "{lost",
            "{columns}",
            "{notify}",
            "{set_lock_timeout",
            "{tag}",
        ] {
            assert!(!all.contains(placeholder), "{placeholder}");
        }
    }
}
