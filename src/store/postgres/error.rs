//! Translation of the database's errors into the crate's errors.

use std::borrow::Cow;
use std::fmt;

use sqlx::error::DatabaseError;

use crate::error::Error;

/// The text of a server's or a connection's error. It does not hold the error itself, because the
/// `Debug` form of that may show a row with its body.
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

/// Returns the SQLSTATE code of an error (PostgreSQL, appendix A).
pub(super) fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(DatabaseError::code)
}

pub(super) const NO_TABLE: Error = Error::configuration(
    "the table does not exist, or the role may not see its schema; call `migrate()`, or GRANT USAGE ON SCHEMA .. to the role",
);
pub(super) const OTHER_TABLE: Error = Error::configuration(
    "the table has other columns or constraints; compare it with `schema()`, or choose another name",
);
pub(super) const DENIED: Error =
    Error::configuration("the role lacks a right on the table; GRANT SELECT, INSERT, UPDATE, DELETE ON .. to it");
pub(super) const READ_ONLY: Error = Error::configuration(
    "the database is read-only, because the server is a standby or `default_transaction_read_only` is on; connect to the \
     primary, or turn the setting off for the role",
);
const REFUSED: Error = Error::configuration(
    "the database does not exist, or the server refused the role or its password; correct the URL",
);
const NOT_UNDERSTOOD: Error =
    Error::configuration("the server does not understand a statement of the store; use PostgreSQL 13 or newer");
const DAMAGED: Error = Error::corrupt_record(
    "the table or its index is damaged on the server's disk; see the server's log, and run REINDEX if only the index is damaged",
);

/// Returns the error of an operation.
///
/// An error that lasts until an operator acts is of kind `Configuration`. All other errors can pass
/// by themselves, such as 53300 (too many connections), 53100 (disk full), 57P03 (the server
/// starts) and class 08.
#[expect(clippy::needless_pass_by_value, reason = "`map_err` passes it by value")]
pub(crate) fn failed(error: sqlx::Error) -> Error {
    let code = code(&error);
    let fault = match code.as_deref() {
        // Undefined table; invalid schema name.
        Some("42P01" | "3F000") => NO_TABLE,
        // Undefined column and function; datatype mismatch; no unique constraint for ON CONFLICT;
        // wrong type of object, such as a view; a NOT NULL column that is not ours; a generated
        // column.
        Some("42703" | "42883" | "42804" | "42P10" | "42809" | "23502" | "428C9") => OTHER_TABLE,
        // Insufficient privilege.
        Some("42501") => DENIED,
        // Class 28: invalid authorization specification; undefined database.
        Some("28000" | "28P01" | "3D000") => REFUSED,
        // Read-only transaction, or a server in recovery.
        Some("25006") => READ_ONLY,
        // Syntax error.
        Some("42601") => NOT_UNDERSTOOD,
        // Data or index corrupted.
        Some("XX001" | "XX002") => DAMAGED,
        _ => return Error::unavailable(Cause::of(&error)),
    };
    fault.with_source(Cause::of(&error))
}

/// Returns the error of a migration.
pub(crate) fn not_made(error: sqlx::Error) -> Error {
    const NOT_ALLOWED: Error = Error::configuration(
        "the table or its index is missing, and the role may not make it; run the SQL of `schema()` as a role that may",
    );
    match code(&error).as_deref() {
        Some("42501") => NOT_ALLOWED.with_source(Cause::of(&error)),
        _ => failed(error),
    }
}

/// Returns the error of a connection that could not be made. Errors that do not pass by themselves
/// are of kind `Configuration`.
pub(super) fn of_connect(error: sqlx::Error) -> Error {
    const TLS: Error = Error::configuration(
        "the database or this program does not support TLS; enable the feature `postgres-rustls`, or change `sslmode`",
    );
    #[cfg(feature = "postgres-rustls")]
    if crate::store::tls::is_certificate_refused(&error) {
        const CERTIFICATE: Error = Error::configuration(
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

#[cfg(test)]
pub(super) mod tests {
    use sqlx::error::ErrorKind as Violation;

    use super::*;
    use crate::error::ErrorKind;

    /// An error message of a server, with its SQLSTATE code.
    #[derive(Debug)]
    struct OfServer(&'static str);

    impl fmt::Display for OfServer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the server refused the statement")
        }
    }

    impl std::error::Error for OfServer {}

    impl DatabaseError for OfServer {
        fn message(&self) -> &'static str {
            "the server refused the statement"
        }

        fn code(&self) -> Option<Cow<'_, str>> {
            Some(self.0.into())
        }

        fn as_error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
            self
        }

        fn as_error_mut(&mut self) -> &mut (dyn std::error::Error + Send + Sync + 'static) {
            self
        }

        fn into_error(self: Box<Self>) -> Box<dyn std::error::Error + Send + Sync + 'static> {
            self
        }

        fn kind(&self) -> Violation {
            Violation::Other
        }
    }

    pub(in super::super) fn of_server(code: &'static str) -> sqlx::Error {
        sqlx::Error::Database(Box::new(OfServer(code)))
    }

    /// An error that lasts until an operator acts is a configuration error. An outage is not, because a
    /// retry may succeed.
    #[test]
    fn an_error_that_needs_an_operator_differs_from_one_that_passes() {
        for (code, kind, words) in [
            ("42P01", ErrorKind::Configuration, "migrate()"),
            ("3F000", ErrorKind::Configuration, "migrate()"),
            ("42703", ErrorKind::Configuration, "other columns"),
            ("42883", ErrorKind::Configuration, "other columns"),
            ("42804", ErrorKind::Configuration, "other columns"),
            ("42P10", ErrorKind::Configuration, "other columns"),
            ("42809", ErrorKind::Configuration, "other columns"),
            ("23502", ErrorKind::Configuration, "other columns"),
            ("428C9", ErrorKind::Configuration, "other columns"),
            ("42501", ErrorKind::Configuration, "GRANT"),
            ("28000", ErrorKind::Configuration, "password"),
            ("28P01", ErrorKind::Configuration, "password"),
            ("3D000", ErrorKind::Configuration, "does not exist"),
            ("25006", ErrorKind::Configuration, "read-only"),
            ("42601", ErrorKind::Configuration, "PostgreSQL 13"),
            ("XX001", ErrorKind::CorruptRecord, "damaged"),
            ("XX002", ErrorKind::CorruptRecord, "damaged"),
            ("53300", ErrorKind::StoreUnavailable, ""),
            ("53100", ErrorKind::StoreUnavailable, ""),
            ("57P03", ErrorKind::StoreUnavailable, ""),
            ("08006", ErrorKind::StoreUnavailable, ""),
        ] {
            for error in [failed(of_server(code)), of_connect(of_server(code))] {
                assert_eq!(error.kind(), kind, "{code}");
                assert!(error.to_string().contains(words), "{code}: {error}");
                let cause = std::error::Error::source(&error).unwrap().to_string();
                assert!(cause.contains(code) && cause.contains("the server refused"), "{cause}");
            }
        }
        let denied = not_made(of_server("42501"));
        assert!(denied.to_string().contains("may not make it"), "{denied}");
        assert_eq!(not_made(of_server("42P01")).to_string(), NO_TABLE.to_string());
    }
}
