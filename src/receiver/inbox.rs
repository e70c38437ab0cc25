//! Receipt and effect in one transaction, without a claim before.

use std::fmt;
use std::time::Duration;

use sqlx::postgres::PgConnection;

use super::id::MessageId;
use super::receipt::{Receipt, ReceiveError};
use crate::error::{Error, ErrorKind};
use crate::protocol::{Claim, Completion, Decision, Fingerprint, Grant, IfLost, KeySpace, Nonce, Outcome};
use crate::store::PostgresStore;

/// Notes within a transaction of yours that a message is handled: for handlers that touch nothing but that database. The message and
/// its effect are there together, or neither is, and nothing is claimed before; a handler that does more needs a
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
/// // Anything but a commit that succeeded: have it delivered again. If it took effect, the next copy is a duplicate.
/// match Disposition::of::<_, Infallible>(&Ok(receipt)) {
///     Disposition::Acknowledge => { /* ack */ }
///     Disposition::Redeliver(_after) => { /* a receiver layer has it */ }
///     Disposition::Reject => { /* and has lost it */ }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Inbox {
    store: PostgresStore,
    consumer: String,
    space: KeySpace,
    retention: Duration,
}

impl Inbox {
    /// The messages of a consumer; the same ones that a [`ReceiverLayer`](super::ReceiverLayer) of this name, namespace and secret has,
    /// as long as that compares no payloads.
    #[must_use]
    pub fn new(store: PostgresStore, consumer: impl Into<String>) -> Self {
        Self {
            store,
            consumer: consumer.into(),
            space: KeySpace::default(),
            retention: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }

    /// How long a handled message is remembered; 7 days by default.
    #[must_use]
    pub const fn with_retention(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// Separates these messages from others in the same store; empty by default.
    #[must_use]
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.space.namespace = namespace.into();
        self
    }

    /// Keys the hashes of the ids, as [`ReceiverLayer::with_secret`](super::ReceiverLayer::with_secret) does; none by default.
    ///
    /// # Errors
    ///
    /// [`Configuration`](ErrorKind::Configuration) when it is shorter than 16 bytes.
    pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, Error> {
        self.space.set_secret(secret)?;
        Ok(self)
    }

    /// Notes that a message is handled. [`Receipt::First`]: make its effect in the same transaction and commit. Otherwise roll back: it is
    /// a duplicate, or a [`ReceiverLayer`](super::ReceiverLayer) has it.
    ///
    /// Where you commit all the same, for the sake of other messages, note each in a savepoint of its own, and roll back to that: else a
    /// message that a layer has lost is written down as unknown.
    ///
    /// While another transaction notes the same message, it waits for the end of that one. Note several messages in one
    /// order everywhere, sorted by id, say; else two transactions can wait for each other until PostgreSQL ends one.
    /// Use READ COMMITTED, PostgreSQL's default. At the stricter levels, a transaction that conflicts with another one
    /// fails with [`StoreUnavailable`](ErrorKind::StoreUnavailable), and your code has to run the whole transaction
    /// again.
    ///
    /// # Cancel safety
    ///
    /// Dropped half-way, the message may be noted or not: roll the transaction back.
    ///
    /// # Errors
    ///
    /// [`MissingId`](ReceiveError::MissingId), [`InvalidId`](ReceiveError::InvalidId), and [`Store`](ReceiveError::Store) as for
    /// [`PostgresStore::claim_in`]. Roll back.
    pub async fn receive(
        &self,
        connection: &mut PgConnection,
        id: impl Into<MessageId> + Send,
    ) -> Result<Receipt<()>, ReceiveError<Error>> {
        let id = id.into();
        id.check().map_err(ReceiveError::InvalidId)?;
        if id.is_missing() {
            return Err(ReceiveError::MissingId);
        }
        let claim = Claim {
            key: self.space.message_key(&self.consumer, id.parts()),
            fingerprint: Fingerprint::NONE,
            nonce: Nonce::random(),
            // Nobody sees the claim before its completion.
            lease: Duration::from_secs(1),
            retention: self.retention,
            if_lost: IfLost::Refuse,
            max_attempts: 1,
        };
        let decision = self.store.claim_in(connection, &claim).await;
        match decision.map_err(ReceiveError::Store)? {
            Decision::Execute(grant) | Decision::Recover(grant) => self.complete(connection, &claim, grant).await,
            Decision::NotKept | Decision::Replay(_) => Ok(Receipt::Duplicate),
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
    ) -> Result<Receipt<()>, ReceiveError<Error>> {
        const TAKEN: Error = Error::new(
            ErrorKind::Superseded,
            "the message was taken over within the transaction; roll back",
        );
        let outcome = Outcome::Tombstone;
        let completion = self
            .store
            .complete_in(connection, &claim.key, grant.owner, &outcome, self.retention);
        match completion.await.map_err(ReceiveError::Store)? {
            Completion::Completed => Ok(Receipt::First(())),
            Completion::Superseded(_) => Err(ReceiveError::Store(TAKEN)),
        }
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("consumer", &self.consumer)
            .field("space", &self.space)
            .field("retention", &self.retention)
            .finish_non_exhaustive()
    }
}
