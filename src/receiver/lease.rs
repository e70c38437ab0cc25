//! The attempt under which a message is handled.

use std::fmt;

use crate::engine::Attempt;
use crate::protocol::Fence;

/// The attempt under which a message is handled. [`pass_lease`](super::ReceiverLayer::pass_lease)
/// passes it to the handler.
#[derive(Clone)]
pub struct MessageLease {
    attempt: Attempt,
    #[cfg(feature = "postgres")]
    context: transaction::TransactionContext,
}

impl MessageLease {
    #[cfg(not(feature = "postgres"))]
    pub(super) const fn new(attempt: Attempt) -> Self {
        Self { attempt }
    }

    /// Returns a lease that a test made.
    #[cfg(feature = "testing")]
    pub(crate) fn made(made: &crate::engine::Made) -> Self {
        Self {
            attempt: made.attempt(),
            #[cfg(feature = "postgres")]
            context: transaction::TransactionContext::made(made),
        }
    }

    /// Returns the number of this attempt at the message, from 1. An attempt that failed and
    /// released its key does not count (the broker counts deliveries). Once an attempt was lost,
    /// all later ones count.
    #[must_use]
    pub const fn attempt(&self) -> u32 {
        self.attempt.number()
    }

    /// Returns the fence, which grows with every attempt at a message. Pass it to a third party
    /// that can refuse an older fence.
    #[must_use]
    pub const fn fence(&self) -> Fence {
        self.attempt.fence()
    }

    /// Returns a key or an id for a third party: a UUID (version 8) that is the same in every
    /// attempt at this message, differs for each `name`, and does not reveal the message's id. It
    /// does not depend on the payload, but on the consumer's name, the namespace and the secret, so
    /// a renamed consumer makes other ids. See [`Attempt::id`](crate::client::Attempt::id).
    #[must_use]
    pub fn id(&self, name: &str) -> String {
        self.attempt.id_of_key(name)
    }

    /// Returns whether this attempt still owns the message, as far as the last renewal knows.
    /// Otherwise another attempt may be handling the message.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.attempt.is_held()
    }
}

impl fmt::Debug for MessageLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MessageLease").field(&self.attempt).finish()
    }
}

#[cfg(feature = "postgres")]
mod transaction {
    use std::time::Duration;

    use sqlx::postgres::PgConnection;

    use super::MessageLease;
    use crate::engine::Attempt;
    use crate::error::Error;
    use crate::protocol::{Completion, Outcome};
    use crate::store::{PostgresStore, Store};

    const NO_POSTGRES: Error = Error::configuration(
        "the receiver's store is not in PostgreSQL, so nothing can be completed in a transaction; make the layer with a \
         PostgresStore",
    );

    /// The store of the receiver that made the lease, and the retention of its records.
    #[derive(Clone)]
    pub(super) struct TransactionContext {
        store: Result<PostgresStore, Error>,
        retention: Duration,
    }

    #[cfg(feature = "testing")]
    impl TransactionContext {
        pub(super) fn made(made: &crate::engine::Made) -> Self {
            Self {
                store: made.store.clone().ok_or(crate::engine::MADE_WITHOUT_STORE),
                retention: Duration::ZERO,
            }
        }
    }

    impl MessageLease {
        pub(in super::super) fn new<St: Store>(attempt: Attempt, store: &St, retention: Duration) -> Self {
            let store = PostgresStore::within(store).cloned().ok_or(NO_POSTGRES);
            let context = TransactionContext { store, retention };
            Self { attempt, context }
        }

        /// Records *within your transaction* that the message is handled, in the database that
        /// holds the records. The effect and the record commit together, or neither does.
        ///
        /// Call this last before the commit. The receiver does not renew the lease after this call,
        /// so return at once if you roll back. If the commit fails, return any error. The receiver
        /// then reads from the record whether the commit took effect. For this, the store retains
        /// the record for at least a minute. Since every effect of such a handler is in the
        /// transaction, set [`at_least_once`](crate::receiver::ReceiverLayer::at_least_once). Use
        /// READ COMMITTED, PostgreSQL's default.
        ///
        /// # Cancel safety
        ///
        /// If the future is dropped early, the completion may or may not have taken effect, and the
        /// server may still execute it. End the transaction before the handler returns. The receiver
        /// then reads the outcome from the record.
        ///
        /// # Errors
        ///
        /// [`Superseded`](crate::ErrorKind::Superseded) if another attempt has taken the message
        /// over, or the message is handled already. Return any error then.
        /// [`Configuration`](crate::ErrorKind::Configuration) if the receiver's store is no
        /// [`PostgresStore`], or the lease was made for a test without a store. Otherwise as for
        /// [`Store::complete`]. In every case roll back.
        pub async fn complete_in(&self, connection: &mut PgConnection) -> Result<(), Error> {
            const SUPERSEDED: Error = Error::superseded(
                "the message is handled already, or another attempt has taken it over; roll the transaction back",
            );
            /// The receiver reads the record after the transaction.
            const SHORTEST_RETENTION: Duration = Duration::from_secs(60);
            let store = self.context.store.as_ref().map_err(Clone::clone)?;
            // Set this before the completion is sent, because a completion that is dropped early
            // may still take effect.
            let lease = self.attempt.lease();
            lease.transaction.begin();
            let (key, owner) = (self.attempt.key(), lease.owner());
            let retention = self.context.retention.max(SHORTEST_RETENTION);
            let completion = store.complete_in(connection, key, owner, &Outcome::Tombstone, retention);
            let completed = match completion.await {
                Ok(Completion::Completed) => {
                    lease.transaction.succeed();
                    return Ok(());
                }
                Ok(Completion::Superseded(_)) => Err(SUPERSEDED),
                Err(error) => Err(error),
            };
            lease.fail_completion();
            completed
        }
    }
}
