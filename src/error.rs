//! The error type of the crate.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// An error of this crate.
///
/// The type is opaque. [`kind`](Self::kind) shows what to do about the error, and
/// [`source`](StdError::source) is its cause. Neither `Display` nor `Debug` ever shows a key, a
/// body or a credential, as long as the causes that a store passes in do not. Clones share the
/// cause.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    what: &'static str,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// The class of an [`Error`], which shows what a caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting of the crate or of a server is wrong. Examples are a URL, a missing table, a
    /// missing right, and a server that is read-only or may evict records. The constructors find
    /// most of these errors. Operations report later changes on the server, such as a dropped table
    /// or a demoted primary. Retries fail until an operator corrects the setting.
    Configuration,
    /// A record cannot be read, because its bytes are damaged or of a newer version. It is a live
    /// record of some request, never "absent".
    CorruptRecord,
    /// This process runs as many executions without a caller as its limit allows. Nothing was
    /// claimed.
    Overloaded,
    /// The store has reached its record budget and accepts no new keys for now. Nothing was
    /// recorded.
    StoreFull,
    /// Another attempt has taken the key over, or the key is completed already. Roll back the
    /// transaction of this attempt.
    Superseded,
    /// The store could not be reached or did not respond. It is unknown whether the operation took
    /// effect.
    StoreUnavailable,
}

impl Error {
    /// Creates an error of `kind`. `what` states in one static sentence what is wrong and what to
    /// do.
    #[must_use]
    pub const fn new(kind: ErrorKind, what: &'static str) -> Self {
        Self {
            kind,
            what,
            source: None,
        }
    }

    pub(crate) const fn configuration(what: &'static str) -> Self {
        Self::new(ErrorKind::Configuration, what)
    }

    pub(crate) const fn corrupt_record(what: &'static str) -> Self {
        Self::new(ErrorKind::CorruptRecord, what)
    }

    pub(crate) const fn store_unavailable(what: &'static str) -> Self {
        Self::new(ErrorKind::StoreUnavailable, what)
    }

    pub(crate) const fn superseded(what: &'static str) -> Self {
        Self::new(ErrorKind::Superseded, what)
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// Creates the error of a store that could not be reached or did not respond. `source` is the
    /// cause.
    #[must_use]
    pub fn unavailable(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::new(ErrorKind::StoreUnavailable, "the idempotency store did not reply").with_source(source)
    }

    /// Returns the class of the error.
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

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

type Classify<C> = Arc<dyn Fn(&dyn Any) -> Option<C> + Send + Sync>;

/// The functions by which an application classifies errors. Each accepts one type of error.
pub(crate) struct Classifiers<C>(Vec<Classify<C>>);

impl<C> Classifiers<C> {
    pub(crate) fn add<E: 'static>(&mut self, classify: impl Fn(&E) -> C + Send + Sync + 'static) {
        self.0.push(Arc::new(move |error| error.downcast_ref().map(&classify)));
    }

    /// Returns the class of an error. Returns `None` if no function accepts errors of its type. If
    /// several functions accept the same type, the last one decides.
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
