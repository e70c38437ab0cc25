//! What went wrong with the database, in the crate's words.

use std::fmt;

use crate::error::{Error, ErrorKind};

/// What a server or a connection said. Not the error itself: its `Debug` form may show a row with its body.
#[derive(Debug)]
struct Cause(String);

impl Cause {
    fn of(error: &sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|error| error.code());
        Self(match code {
            Some(code) => format!("{error} (SQLSTATE {code})"),
            None => error.to_string(),
        })
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Cause {}

/// An operation that failed.
pub(super) fn failed(error: sqlx::Error) -> Error {
    const OTHER_TABLE: Error = Error::new(
        ErrorKind::Configuration,
        "the table of the records does not fit; make it with `PostgresStore::migrate`, or compare its columns with \
         `PostgresStore::schema`",
    );
    const DENIED: Error = Error::new(
        ErrorKind::Configuration,
        "the database refused the role, its password or its rights; it needs SELECT, INSERT, UPDATE and DELETE on the table of \
         the records",
    );
    let code = error.as_database_error().and_then(|error| error.code());
    match code.as_deref() {
        // PostgreSQL, appendix A: undefined column, function and table; datatype mismatch.
        Some("42703" | "42883" | "42P01" | "42804") => OTHER_TABLE.with_source(Cause::of(&error)),
        // Insufficient privilege; class 28: invalid authorization specification; undefined database.
        Some("42501" | "28000" | "28P01" | "3D000") => DENIED.with_source(Cause::of(&error)),
        _ => Error::unavailable(Cause::of(&error)),
    }
}
