//! Receipt and effect in one transaction, without an earlier claim.

use std::time::Duration;

use sqlx::postgres::PgConnection;

use super::id::MessageId;
use super::receipt::{Receipt, ReceiveError};
use crate::error::Error;
use crate::protocol::{Claim, Completion, Decision, Fingerprint, Grant, IfLost, KeySpace, Nonce, Outcome};
use crate::store::PostgresStore;

/// Records in your transaction that a message is handled. Use this for handlers whose only effects
/// are in the PostgreSQL database that holds the records. The record and the effect commit
/// together, or neither does. There is no earlier claim. A handler with other effects needs a
/// [`ReceiverLayer`](super::ReceiverLayer).
///
/// ```no_run
/// # async fn example(pool: sqlx::PgPool, inbox: tower_idempotency::receiver::Inbox) -> Result<(), Box<dyn std::error::Error>> {
/// use std::convert::Infallible;
/// use tower_idempotency::receiver::{Disposition, Receipt};
///
/// let mut transaction = pool.begin().await?;
/// let receipt = inbox.receive(&mut transaction, "message-7").await?;
/// if receipt == Receipt::First(()) {
///     sqlx::query("UPDATE accounts SET balance = balance + 100 WHERE id = 7").execute(&mut *transaction).await?;
///     transaction.commit().await?;
/// }
/// // If the commit fails, have the message delivered again. If the commit took effect, the next
/// // copy is a duplicate.
/// match Disposition::of::<_, Infallible>(&Ok(receipt)) {
///     Disposition::Acknowledge => { /* ack */ }
///     Disposition::Redeliver(_after) => { /* a receiver layer is handling it */ }
///     Disposition::Reject => { /* it was rejected before, or a receiver layer has lost it */ }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Inbox {
    store: PostgresStore,
    consumer: String,
    space: KeySpace,
    retention: Duration,
}

impl Inbox {
    /// Creates the inbox of a consumer. It shares the records of a
    /// [`ReceiverLayer`](super::ReceiverLayer) of this name, namespace and secret that compares
    /// neither payloads nor types.
    #[must_use]
    pub fn new(store: PostgresStore, consumer: impl Into<String>) -> Self {
        Self {
            store,
            consumer: consumer.into(),
            space: KeySpace::default(),
            retention: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }

    /// Sets how long the store remembers a handled or rejected message. Default: 7 days.
    #[must_use]
    pub const fn with_retention(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// Sets a name that separates these messages from others in the same store. Default: empty.
    #[must_use]
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.space.namespace = namespace.into();
        self
    }

    /// Sets a secret that keys the hashes of the ids, as
    /// [`ReceiverLayer::with_secret`](super::ReceiverLayer::with_secret) does. Default: none.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the secret is shorter than 16 bytes.
    pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, Error> {
        self.space.set_secret(secret)?;
        Ok(self)
    }

    /// Records that a message is handled. After [`Receipt::First`], make the effect in the same
    /// transaction and commit. After any other receipt, roll back, because the message is a
    /// duplicate, was [rejected](Self::reject), or a [`ReceiverLayer`](super::ReceiverLayer) has
    /// it.
    ///
    /// If you must commit for the sake of other messages, record each message in a savepoint of its
    /// own. After any result other than [`Receipt::First`], roll back to that savepoint. Otherwise
    /// a message that a layer has lost is recorded as unknown.
    ///
    /// While another transaction records the same message, this waits for the end of that
    /// transaction. Record several messages in the same order everywhere, for example sorted by id.
    /// Otherwise two transactions can wait for each other until PostgreSQL ends one. Use READ
    /// COMMITTED, PostgreSQL's default. At the stricter levels, a transaction that conflicts with
    /// another one fails with [`StoreUnavailable`](crate::ErrorKind::StoreUnavailable), and your
    /// code has to run the whole transaction again.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped early, the message may be recorded or not, so roll the transaction
    /// back.
    ///
    /// # Errors
    ///
    /// [`MissingId`](ReceiveError::MissingId), [`InvalidId`](ReceiveError::InvalidId), and
    /// [`Store`](ReceiveError::Store) as for [`PostgresStore::claim_in`]. Roll back.
    pub async fn receive(
        &self,
        connection: &mut PgConnection,
        id: impl Into<MessageId> + Send,
    ) -> Result<Receipt<()>, ReceiveError<Error>> {
        self.record(connection, id.into(), Outcome::Tombstone).await
    }

    /// Records that a message is rejected for good, because no delivery of it can succeed. Roll
    /// back the transaction of its effect first, then call this in a transaction of its own, and
    /// commit. After [`Receipt::First`], put the message into the dead-letter queue. Every later
    /// copy is [`Receipt::Unknown`] until an operator [resolves](super::ReceiverLayer::storage_key)
    /// the key. Any other receipt has the meaning that it has for [`receive`](Self::receive).
    ///
    /// # Cancel safety
    ///
    /// As for [`receive`](Self::receive).
    ///
    /// # Errors
    ///
    /// As for [`receive`](Self::receive).
    pub async fn reject(
        &self,
        connection: &mut PgConnection,
        id: impl Into<MessageId> + Send,
    ) -> Result<Receipt<()>, ReceiveError<Error>> {
        self.record(connection, id.into(), Outcome::Rejected).await
    }

    async fn record(
        &self,
        connection: &mut PgConnection,
        id: MessageId,
        outcome: Outcome,
    ) -> Result<Receipt<()>, ReceiveError<Error>> {
        id.check().map_err(ReceiveError::InvalidId)?;
        if id.is_missing() {
            return Err(ReceiveError::MissingId);
        }
        let claim = Claim {
            key: self.space.message_key(&self.consumer, id.parts()),
            fingerprint: Fingerprint::NONE,
            nonce: Nonce::random(),
            // No other transaction sees the claim before its completion, so its lease does not
            // matter.
            lease: Duration::from_secs(1),
            retention: self.retention,
            if_lost: IfLost::Refuse,
            max_attempts: 1,
        };
        let decision = self.store.claim_in(connection, &claim).await;
        match decision.map_err(ReceiveError::Store)? {
            Decision::Execute(grant) | Decision::Recover(grant) => {
                self.complete(connection, &claim, grant, &outcome).await
            }
            Decision::NotStored | Decision::Replay(_) => Ok(Receipt::Duplicate),
            Decision::Wait { left } => Ok(Receipt::InFlight { retry_after: left }),
            Decision::Unknown => Ok(Receipt::Unknown),
            Decision::Mismatch => Err(ReceiveError::Mismatch),
        }
    }

    async fn complete(
        &self,
        connection: &mut PgConnection,
        claim: &Claim,
        grant: Grant,
        outcome: &Outcome,
    ) -> Result<Receipt<()>, ReceiveError<Error>> {
        const TAKEN: Error =
            Error::superseded("another attempt took the message over within the transaction; roll back");
        let completion = self
            .store
            .complete_in(connection, &claim.key, grant.owner, outcome, self.retention);
        match completion.await.map_err(ReceiveError::Store)? {
            Completion::Completed => Ok(Receipt::First(())),
            Completion::Superseded(_) => Err(ReceiveError::Store(TAKEN)),
        }
    }
}
