//! What went wrong with the database, in the crate's words.

use std::borrow::Cow;
use std::fmt;

use sqlx::error::DatabaseError;

use crate::error::{Error, ErrorKind};

/// What a server or a connection said. Not the error itself: its `Debug` form may show a row with its body.
#[derive(Debug)]
struct Cause(String);

impl Cause {
    fn of(error: &sqlx::Error) -> Self {
        Self(match code(error) {
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

/// What the server calls the error; PostgreSQL, appendix A.
fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(DatabaseError::code)
}

/// An operation that failed.
#[expect(clippy::needless_pass_by_value, reason = "it is handed to `map_err`")]
pub(crate) fn failed(error: sqlx::Error) -> Error {
    const OTHER_TABLE: Error = Error::new(
        ErrorKind::Configuration,
        "the table does not fit; make it with `migrate`, or compare its columns with `schema`",
    );
    const DENIED: Error = Error::new(
        ErrorKind::Configuration,
        "the database refused the role, its password or its rights; it needs SELECT, INSERT, UPDATE and DELETE on the \
         table",
    );
    match code(&error).as_deref() {
        // Undefined column, function and table; datatype mismatch.
        Some("42703" | "42883" | "42P01" | "42804") => OTHER_TABLE.with_source(Cause::of(&error)),
        // Insufficient privilege; class 28: invalid authorization specification; undefined database.
        Some("42501" | "28000" | "28P01" | "3D000") => DENIED.with_source(Cause::of(&error)),
        _ => Error::unavailable(Cause::of(&error)),
    }
}

/// A connection that could not be made: what will not mend by itself is a matter of configuration.
pub(super) fn of_connect(error: sqlx::Error) -> Error {
    const TLS: Error = Error::new(
        ErrorKind::Configuration,
        "the database does not speak TLS, or this program does not: enable the feature `postgres-rustls`, or change `sslmode`",
    );
    #[cfg(feature = "postgres-rustls")]
    if crate::store::tls::is_certificate_refused(&error) {
        const CERTIFICATE: Error = Error::new(
            ErrorKind::Configuration,
            "the database's certificate is not trusted, or is for another host or time; name the file of its authority in the \
             URL's `sslrootcert`",
        );
        return CERTIFICATE.with_source(Cause::of(&error));
    }
    match error {
        sqlx::Error::Tls(_) => TLS.with_source(Cause::of(&error)),
        error => failed(error),
    }
}
