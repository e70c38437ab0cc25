//! What a handler may know about its attempt.

use std::fmt;

use crate::job::Attempt;
use crate::protocol::Fence;

/// The attempt under which a message is handled; given to the message by [`pass_lease`](super::ReceiverLayer::pass_lease).
#[derive(Clone)]
pub struct Lease {
    attempt: Attempt,
    #[cfg(feature = "postgres")]
    home: transaction::Home,
}

impl Lease {
    #[cfg(not(feature = "postgres"))]
    pub(super) const fn new(attempt: Attempt) -> Self {
        Self { attempt }
    }

    /// The number of this attempt at the message, from 1. One that failed and released its key is not counted (the broker counts
    /// deliveries), as long as none was lost before it; after one that was, all count.
    #[must_use]
    pub const fn attempt(&self) -> u32 {
        self.attempt.number()
    }

    /// Grows with every attempt at a message. Hand it to whatever can refuse an older one.
    #[must_use]
    pub const fn fence(&self) -> Fence {
        self.attempt.fence()
    }

    /// A key or an id for a third party: a UUID (version 8), the same in every attempt at this message, another for each `name`, and
    /// without a way back to the message's id; the payload makes no difference. Another consumer's name, namespace or secret does, though:
    /// whoever is renamed makes other ids. See [`Attempt::id`](crate::client::Attempt::id).
    #[must_use]
    pub fn id(&self, name: &str) -> String {
        self.attempt.id_of_key(name)
    }

    /// Whether the message is still held, as far as the last renewal knows. Once it is not, somebody else may be handling it.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.attempt.is_held()
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("attempt", &self.attempt())
            .field("fence", &self.fence())
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "postgres")]
mod transaction {
    use std::time::Duration;

    use sqlx::postgres::PgConnection;

    use super::Lease;
    use crate::error::{Error, ErrorKind};
    use crate::job::Attempt;
    use crate::protocol::{Completion, Outcome};
    use crate::store::{PostgresStore, Store};

    /// Where a lease finds the store of its receiver.
    #[derive(Clone)]
    pub(super) struct Home {
        store: Option<PostgresStore>,
        retention: Duration,
    }

    impl Lease {
        pub(in super::super) fn new<St: Store>(attempt: Attempt, store: &St, retention: Duration) -> Self {
            let store = PostgresStore::within(store).cloned();
            let home = Home { store, retention };
            Self { attempt, home }
        }

        /// Records that the message is handled *within a transaction of yours*, in the database that has the records: its
        /// effect and that it was handled commit together, or neither does.
        ///
        /// Do it last before the commit. Once it has succeeded, the lease is not renewed any more: if you then roll back, return. If the
        /// commit fails, return any error: the receiver reads from the record whether it took effect all the same, for which that is
        /// kept for a minute at least. Since every effect of such a handler is in the transaction, set
        /// [`at_least_once`](crate::receiver::ReceiverLayer::at_least_once). Use READ COMMITTED, PostgreSQL's default.
        ///
        /// # Cancel safety
        ///
        /// Dropped half-way, it may have taken effect or not; the receiver finds out after the transaction.
        ///
        /// # Errors
        ///
        /// [`Superseded`](ErrorKind::Superseded) when somebody else has taken the message over, or it is handled already; roll back and
        /// return any error. [`Configuration`](ErrorKind::Configuration) when the receiver's store is no [`PostgresStore`]. Otherwise as
        /// for [`Store::complete`]. In every case roll back.
        pub async fn complete_in(&self, connection: &mut PgConnection) -> Result<(), Error> {
            const NO_POSTGRES: Error = Error::new(
                ErrorKind::Configuration,
                "the receiver's store is not in PostgreSQL, so nothing can be completed in a transaction; make the layer with a \
                 PostgresStore",
            );
            const SUPERSEDED: Error = Error::new(
                ErrorKind::Superseded,
                "the message is handled already, or another attempt has taken it over; roll the transaction back",
            );
            /// The record is looked at after the transaction.
            const SHORTEST_RETENTION: Duration = Duration::from_secs(60);
            let store = self.home.store.as_ref().ok_or(NO_POSTGRES)?;
            // Before it is sent: dropped from here on, it may have arrived.
            self.attempt.set_in_transaction();
            let (key, owner) = (self.attempt.key(), self.attempt.grant().owner);
            let retention = self.home.retention.max(SHORTEST_RETENTION);
            let completion = store.complete_in(connection, key, owner, &Outcome::Tombstone, retention);
            let completed = match completion.await {
                Ok(Completion::Completed) => {
                    self.attempt.set_completed();
                    return Ok(());
                }
                Ok(Completion::Superseded(_)) => Err(SUPERSEDED),
                Err(error) => Err(error),
            };
            self.attempt.set_completion_failed();
            completed
        }
    }
}
