//! The access of a lease to the store and the settings of its layer.

use std::sync::Arc;

use super::guard::Shared;
use super::settings::Values;
use crate::error::Error;
use crate::store::{PostgresStore, Store};

const NO_POSTGRES: Error = Error::configuration(
    "the layer's store is not a `PostgresStore`, so it cannot complete a record in a transaction; \
     create the layer with a `PostgresStore`",
);

/// The store and the settings with which a lease completes its record in a transaction.
#[derive(Clone)]
pub(super) struct TransactionContext {
    store: Arc<dyn AnyStore>,
    pub(super) settings: Arc<Values>,
}

impl TransactionContext {
    pub(super) fn postgres(&self) -> Result<&PostgresStore, Error> {
        self.store.postgres()
    }

    pub(super) fn new<St: Store>(shared: &Arc<Shared<St>>, settings: &Arc<Values>) -> Self {
        Self {
            store: Arc::clone(shared) as Arc<dyn AnyStore>,
            settings: Arc::clone(settings),
        }
    }
}

#[cfg(feature = "testing")]
impl TransactionContext {
    /// Returns the context of a lease for a test, with the default settings of a layer.
    pub(super) fn made(made: &crate::engine::Made) -> Self {
        Self {
            store: Arc::new(MadeStore(made.store.clone())),
            settings: Arc::default(),
        }
    }
}

/// A store of any type that may be a [`PostgresStore`].
trait AnyStore: Send + Sync {
    fn postgres(&self) -> Result<&PostgresStore, Error>;
}

/// The store of a lease for a test, if there is one.
#[cfg(feature = "testing")]
struct MadeStore(Option<PostgresStore>);

#[cfg(feature = "testing")]
impl AnyStore for MadeStore {
    fn postgres(&self) -> Result<&PostgresStore, Error> {
        self.0.as_ref().ok_or(crate::engine::MADE_WITHOUT_STORE)
    }
}

impl<St: Store> AnyStore for Shared<St> {
    fn postgres(&self) -> Result<&PostgresStore, Error> {
        PostgresStore::within(&self.store).ok_or(NO_POSTGRES)
    }
}
