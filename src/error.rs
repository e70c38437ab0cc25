//! The one error type of the crate.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// Why something could not be done.
///
/// Opaque: ask [`kind`](Self::kind) what to do about it and [`source`](StdError::source) what caused it. Neither its
/// `Display` nor its `Debug` form ever holds a key, a body or a credential, as long as the causes that a store passes in
/// do not. Clones share the cause.
#[derive(Clone)]
pub struct Error {
    kind: ErrorKind,
    what: &'static str,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// What an [`Error`] means to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting of the crate or of a server is wrong: a URL, a missing table, a missing right, a server that is
    /// read-only or may evict records. The constructors find most of these. Operations report what changes on the
    /// server later, such as a table that is dropped or a primary that is demoted. Retries fail until an operator has
    /// corrected the setting.
    Configuration,
    /// A record cannot be read: its bytes are damaged or of a newer version. It is somebody's live record, never "absent".
    CorruptRecord,
    /// This process runs as many executions without a caller as its limit allows. Nothing was claimed.
    Overloaded,
    /// The store has reached its record budget and takes no new keys for now. Nothing was recorded.
    StoreFull,
    /// Another attempt has taken the key over, or it is completed already. What was done within a transaction must be rolled back.
    Superseded,
    /// The store could not be reached or did not answer. Whether the operation took effect is not known.
    StoreUnavailable,
}

impl Error {
    /// An error of `kind`; `what` says in one static sentence what was wrong and what to do.
    #[must_use]
    pub const fn new(kind: ErrorKind, what: &'static str) -> Self {
        Self {
            kind,
            what,
            source: None,
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// An error of a store that could not be reached or did not answer, caused by `source`.
    #[must_use]
    pub fn unavailable(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::new(ErrorKind::StoreUnavailable, "the idempotency store did not answer").with_source(source)
    }

    /// What the error means.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.kind)
            .field("what", &self.what)
            .field("source", &self.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

type Classify<C> = Arc<dyn Fn(&dyn Any) -> Option<C> + Send + Sync>;

/// The functions by which an application classifies errors, each for one type of error.
pub(crate) struct Classifiers<C>(Vec<Classify<C>>);

impl<C> Classifiers<C> {
    pub(crate) fn add<E: 'static>(&mut self, classify: impl Fn(&E) -> C + Send + Sync + 'static) {
        self.0.push(Arc::new(move |error| error.downcast_ref().map(&classify)));
    }

    /// Returns the class of an error, or `None` if no function takes errors of its type. If several functions take the same
    /// type, the last one decides.
    pub(crate) fn of<E: 'static>(&self, error: &E) -> Option<C> {
        self.0.iter().rev().find_map(|classify| classify(error))
    }
}

impl<C> Clone for Classifiers<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C> Default for Classifiers<C> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<C> fmt::Debug for Classifiers<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Classifiers({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_cause_and_shows_its_kind() {
        let cause = std::io::Error::other("connection reset");
        let error = Error::unavailable(cause);
        assert_eq!(error.kind(), ErrorKind::StoreUnavailable);
        assert_eq!(error.source().unwrap().to_string(), "connection reset");
        assert!(format!("{error:?}").contains("StoreUnavailable"));
    }
}
