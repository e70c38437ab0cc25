//! The layer and its settings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tower_layer::Layer;

use super::classes::{ErrorClasses, HandlerErrorClass};
use super::id::{InvalidMessageId, MessageId};
use super::kinds::Variants;
use super::lease::MessageLease;
use super::service::Receiver;
use super::settings::{OnMismatch, OnMissingId, Settings};
use crate::engine::{Drain, EngineSettings, OnError, OnLost, Recovered};
use crate::error::Error;
use crate::protocol::{IfLost, StorageKey};

/// Makes a service handle each message once, across all tasks, processes and crashes that share the
/// store. The guide [receiving messages](crate::guide::receiving) lists the guarantees.
///
/// # Defaults
///
/// | setting | default |
/// |---|---|
/// | [id](Self::with_id) | none: set it |
/// | [type](Self::with_type) | not compared; a duplicate of another variant is reported |
/// | [payload](Self::with_payload) | not compared |
/// | [missing id](Self::on_missing_id) | refused |
/// | [other payload under the same id](Self::on_mismatch) | an error |
/// | [failed handler](Self::on_error) | the message may be handled again |
/// | [errors that reject](Self::with_error_class) | none |
/// | lost attempt | unknown, and not handled again; or [at least once](Self::at_least_once), or a [check](Self::with_recovery) |
/// | largest number of [attempts](Self::with_max_attempts), once one was lost | 5 |
/// | [lease](Self::with_lease) | 30 s, renewed at a third |
/// | [retention](Self::with_retention) | 7 days from the end of the handler |
/// | [wait](Self::with_wait) for another delivery in flight | none |
///
/// Each message occupies a record for its retention. A [`MemoryStore`](crate::MemoryStore) has room
/// for 1,000,000 records, which at 7 days is 1.6 messages a second. At this bound the store refuses
/// new messages with an error, and still recognises duplicates.
#[must_use = "a layer does nothing until it is put around a service"]
pub struct ReceiverLayer<St, M> {
    store: St,
    settings: Arc<Settings<M>>,
}

impl<St, M> ReceiverLayer<St, M> {
    /// Creates a layer that records in `store` which messages `consumer` has handled. Two consumers
    /// of one message both handle it. All processes of one consumer need the same name.
    pub fn new(store: St, consumer: impl Into<String>) -> Self {
        let engine = EngineSettings {
            retention: Duration::from_secs(7 * 24 * 60 * 60),
            wait: Duration::ZERO,
            ..EngineSettings::default()
        };
        let settings = Settings {
            consumer: consumer.into(),
            engine,
            tracker: Arc::default(),
            leases: Arc::default(),
            id: Arc::new(|_| MessageId::missing()),
            kind: None,
            payload: None,
            pass_lease: None,
            check: None,
            error_classes: ErrorClasses::default(),
            on_error: OnError::default(),
            on_mismatch: OnMismatch::default(),
            on_missing_id: OnMissingId::default(),
            variants: Arc::new(Variants::new()),
        };
        Self {
            store,
            settings: Arc::new(settings),
        }
    }

    fn settings(&mut self) -> &mut Settings<M> {
        Arc::make_mut(&mut self.settings)
    }

    /// Sets the id of a message, which its producer chooses once and sends with every copy. A
    /// number that the broker assigns to each delivery does not work if the producer sends a
    /// message again. The function returns an owned id, such as `order.id.clone()`. **Without an
    /// id, the layer [refuses](OnMissingId::Refuse) every message.**
    ///
    /// If several messages are about one thing, the id of that thing is not enough. Make the type a
    /// part of the id, as in [`MessageId`]'s example. Otherwise the cancellation of order 1 counts
    /// as a duplicate of its placement, and is acknowledged without being handled.
    pub fn with_id<I: Into<MessageId>>(mut self, id: impl Fn(&M) -> I + Send + Sync + 'static) -> Self {
        self.settings().id = Arc::new(move |message| id(message).into());
        self
    }

    /// Sets the type of a message, such as `"order-cancelled"`, which must be the same in all
    /// messages of one id. A message of another type is
    /// [`ReceiveError::TypeMismatch`](super::ReceiveError::TypeMismatch), and a WARN event
    /// `type-mismatch` reports it. The store holds the first 8 bytes of a hash of the type.
    /// Default: none.
    ///
    /// Without this setting, the layer compares the variant of an enum (`std::mem::discriminant`)
    /// of each duplicate with the variant that this process remembers for the id, and reports a
    /// difference by the same event. The duplicate is acknowledged, and **its handler does not
    /// run**. The layer does not notice
    ///
    /// * a duplicate whose first message was handled by another process, or by this process before
    ///   it restarted,
    /// * a duplicate whose first message is forgotten: the table has 8,192 slots, and a message
    ///   with another id can overwrite any of them,
    /// * a duplicate whose first message failed and counts as handled
    ///   ([`OnError::Store`](crate::OnError::Store)), because the layer remembers only messages
    ///   whose handler succeeded,
    /// * types inside of a struct, such as a body that the handler parses. Set their type here.
    ///
    /// If the variants of your enum are not types of messages, set the same type for all of them,
    /// and nothing is reported.
    ///
    /// A record that was made before you set the type has no type, so the layer compares nothing
    /// with it.
    pub fn with_type(mut self, kind: impl for<'m> Fn(&'m M) -> &'m str + Send + Sync + 'static) -> Self {
        self.settings().kind = Some(Arc::new(kind));
        self
    }

    /// Sets the bytes that must be the same in all messages of one id. Default: none. If you add or
    /// remove this setting between two deliveries of an id, the layer has nothing to compare, and
    /// the second message is a duplicate.
    ///
    /// The function returns a slice of the message, so a message that is parsed must carry the
    /// bytes that it was parsed from:
    ///
    /// ```
    /// use tower_idempotency::receiver::ReceiverLayer;
    /// use tower_idempotency::MemoryStore;
    ///
    /// enum Order { Placed { id: String }, Cancelled { id: String } }
    /// struct Delivery { order: Order, raw: bytes::Bytes }
    ///
    /// let layer = ReceiverLayer::new(MemoryStore::new(), "billing").with_payload(|delivery: &Delivery| &delivery.raw);
    /// ```
    ///
    /// Do not serialize the message again to get the bytes, because two builds of the program can
    /// serialize it differently.
    pub fn with_payload(mut self, payload: impl for<'m> Fn(&'m M) -> &'m [u8] + Send + Sync + 'static) -> Self {
        self.settings().payload = Some(Arc::new(payload));
        self
    }

    /// Sets the treatment of a message whose id came with another payload before. Default: an
    /// error. The metric counts the message in either case.
    pub fn on_mismatch(mut self, on_mismatch: OnMismatch) -> Self {
        self.settings().on_mismatch = on_mismatch;
        self
    }

    /// Sets the treatment of a message without an id. Default: the layer refuses it.
    pub fn on_missing_id(mut self, on_missing_id: OnMissingId) -> Self {
        self.settings().on_missing_id = on_missing_id;
        self
    }

    /// Sets the treatment of a message whose handler returns an error or panics. Default:
    /// [`OnError::Release`], so that the message may be handled again. The broker counts the
    /// deliveries, and the layer does not. So give its queue a limit of deliveries and a
    /// dead-letter queue. [`OnError::Reject`] rejects each such message at once. To reject only
    /// some errors, use [`with_error_class`](Self::with_error_class).
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.settings().on_error = on_error;
        self
    }

    /// Sets a function that classifies the handler's errors: either another delivery may succeed,
    /// or no delivery can. `E` is the error type of the service. Default: every error follows
    /// [`on_error`](Self::on_error).
    ///
    /// ```
    /// # use tower::{service_fn, Layer, ServiceExt};
    /// use tower_idempotency::receiver::{Disposition, HandlerErrorClass, Receipt, ReceiveError, ReceiverLayer};
    /// use tower_idempotency::MemoryStore;
    ///
    /// #[derive(Debug, PartialEq)]
    /// enum BillingError { DatabaseDown, NoSuchCurrency }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let layer = ReceiverLayer::new(MemoryStore::new(), "billing")
    ///     .with_id(|order: &u64| *order)
    ///     .with_error_class(|error: &BillingError| match error {
    ///         BillingError::DatabaseDown => HandlerErrorClass::Redeliver,
    ///         BillingError::NoSuchCurrency => HandlerErrorClass::Reject,
    ///     });
    /// let consumer = layer.layer(service_fn(|_: u64| async { Err::<(), _>(BillingError::NoSuchCurrency) }));
    ///
    /// let rejected = consumer.clone().oneshot(7).await;
    /// assert!(matches!(rejected, Err(ReceiveError::Rejected(Some(BillingError::NoSuchCurrency)))));
    /// assert_eq!(Disposition::of(&rejected), Disposition::Reject);
    ///
    /// // A copy that the broker had sent already. The handler does not run again.
    /// let copy = consumer.oneshot(7).await;
    /// assert!(matches!(copy, Ok(Receipt::Unknown)));
    /// assert_eq!(Disposition::of(&copy), Disposition::Reject);
    /// # }
    /// ```
    ///
    /// The record of a rejected message is [unknown](crate::protocol::Status::Unknown) for the
    /// retention, also under [`at_least_once`](Self::at_least_once) and
    /// [`with_recovery`](Self::with_recovery). To handle the message after a repair,
    /// [resolve](Self::storage_key) its key as absent, then move the message from the dead-letter
    /// queue back to its queue.
    ///
    /// * If the store fails while the layer records the rejection, the delivery is rejected all the
    ///   same. The layer tries to record it for two more minutes, and no longer renews the lease.
    ///   Until the lease ends, a copy is in flight. After that a copy finds a lost attempt, unless
    ///   the rejection is recorded by then.
    /// * If the handler has committed its message with `MessageLease::complete_in`, the message is
    ///   handled, even if the handler then fails.
    /// * A panic has no error to classify. It follows [`on_error`](Self::on_error).
    /// * An error of `poll_ready` is not classified, because nothing ran.
    /// * If `E` is not the error type of the service, no error is classified, and a WARN event
    ///   `error-unclassified` reports each. A service behind tower's `Buffer` or `Timeout` has the
    ///   error type `tower::BoxError`.
    pub fn with_error_class<E: 'static>(
        mut self,
        classify: impl Fn(&E) -> HandlerErrorClass + Send + Sync + 'static,
    ) -> Self {
        self.settings().error_classes = ErrorClasses::by(classify);
        self
    }

    /// Handles a message again after a lost attempt, instead of leaving it unknown. Use this for
    /// handlers whose effect may happen twice, is in a transaction with the record, or is at a
    /// third party that deduplicates by [`MessageLease::id`].
    pub fn at_least_once(self) -> Self {
        self.on_lost(OnLost::Execute)
    }

    /// Sets what happens to a message whose attempt was lost. Default: [`OnLost::Refuse`]. Of this
    /// setter, [`at_least_once`](Self::at_least_once) and [`with_recovery`](Self::with_recovery),
    /// the last call counts.
    pub fn on_lost(mut self, on_lost: OnLost) -> Self {
        self.settings().engine.if_lost = on_lost.into();
        self
    }

    /// Sets a check that finds out whether a lost attempt took effect. The layer calls the check
    /// before it handles the message again.
    ///
    /// The guarantee of one effect needs one of two conditions. Either the check blocks the lost
    /// attempt, by raising the [fence](MessageLease::fence) at the third party before it looks for
    /// the effect. Or the requests of the lost attempt have settled before the check;
    /// [`with_settle_delay`](Self::with_settle_delay) narrows this gap.
    pub fn with_recovery<F>(mut self, check: impl Fn(&M, MessageLease) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Recovered<()>> + Send + 'static,
    {
        let settings = self.settings();
        settings.engine.if_lost = IfLost::Recover;
        settings.check = Some(Arc::new(move |message, lease| check(message, lease).boxed()));
        self
    }

    /// Sets a function that puts the lease of the attempt into the message, for the handler.
    /// Default: none. The layer does not call it for a message that is handled
    /// [unprotected](OnMissingId::Unprotected), because such a message has no lease.
    pub fn pass_lease(mut self, pass: impl Fn(&mut M, MessageLease) + Send + Sync + 'static) -> Self {
        self.settings().pass_lease = Some(Arc::new(pass));
        self
    }

    /// Sets a name that separates these messages from others in the same store. Default: empty.
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.settings().engine.space.namespace = namespace.into();
        self
    }

    /// Sets a secret that keys the hashes of the ids, so that a reader of the store cannot test
    /// guesses. Default: none. Every process needs the same secret.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) if the secret is shorter than 16 bytes.
    pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, Error> {
        self.settings().engine.space.set_secret(secret)?;
        Ok(self)
    }

    /// Sets how long an attempt may go without a renewal before it counts as lost. At least 1 s.
    /// Default: 30 s. While the handler runs, the layer renews the lease after each third of this
    /// time. The handler may run for longer than the lease.
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.settings().engine.set_lease(lease);
        self
    }

    /// Sets how long the store remembers a handled message, from the end of its handler. Default:
    /// 7 days. It should be longer than the time in which a message can be delivered again: by the
    /// broker, also from its dead-letter queue, or by the producer's retries.
    pub fn with_retention(mut self, retention: Duration) -> Self {
        self.settings().engine.retention = retention;
        self
    }

    /// Sets how long a delivery waits for another delivery of the same message that is in flight.
    /// Default: none. A delivery that waits occupies the consumer, and the broker's timeout runs
    /// meanwhile, but the delivery holds no capacity of the handler. Once the message is free, the
    /// time until the handler is ready counts as waiting time. If it runs out, the delivery is
    /// [`InFlight`](super::Receipt::InFlight).
    /// A delivery with [another payload](OnMismatch::Duplicate) does not wait.
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.settings().engine.wait = wait;
        self
    }

    /// Sets the largest number of attempts at a message. At least 1. Default: 5. If the last one is
    /// lost, the message is unknown, also under [`at_least_once`](Self::at_least_once) and
    /// [`with_recovery`](Self::with_recovery). The limit stops a message that kills every process
    /// that handles it. After a lost attempt, attempts that fail count as well, and so do
    /// deliveries that took the message over and were dropped before the handler began. So make a
    /// timeout around the consumer longer than the operations of your store take.
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.settings().engine.set_max_attempts(attempts);
        self
    }

    /// Sets the pause before the [check](Self::with_recovery), in which the requests of a lost
    /// attempt may settle. Default: none.
    pub fn with_settle_delay(mut self, delay: Duration) -> Self {
        self.settings().engine.settle_delay = delay;
        self
    }

    /// Sets how long one operation of the store may take. Default: 5 s.
    pub fn with_store_timeout(mut self, timeout: Duration) -> Self {
        self.settings().engine.store_timeout = timeout;
        self
    }

    /// Sets how long the layer repeats the operation that records a handled message while the store
    /// fails. Default: 10 s. After that, a task for which the delivery does not wait repeats the
    /// operation for twelve times as long, two minutes by default.
    pub fn with_completion_timeout(mut self, timeout: Duration) -> Self {
        self.settings().engine.completion_timeout = timeout;
        self
    }

    /// Sets how many handlers may continue in this process after their deliveries were dropped. At
    /// least 1. Default: 16,384. At this limit, every delivery fails with
    /// [`Overloaded`](crate::ErrorKind::Overloaded), even if its message was handled already, and
    /// the broker delivers the message again. The layer does not stop a handler whose delivery was
    /// dropped, so without a limit a consumer with its own timeout could start any number of
    /// handlers.
    pub fn with_max_detached(mut self, executions: usize) -> Self {
        self.settings().engine.set_max_detached(executions);
        self
    }

    /// Returns a drain that waits for handlers, also if they continue after their deliveries were
    /// dropped. Before the process ends, stop taking messages, then wait. Otherwise the end of the
    /// runtime stops the handlers in the middle.
    pub fn drain(&self) -> Drain {
        Drain::new(&self.settings.tracker)
    }

    /// Returns the storage key of a message's record, for `Store::peek` and `Store::resolve`. `id`
    /// is the id exactly as [`with_id`](Self::with_id) returns it. The functions of
    /// [`ids`](super::ids) add a prefix, so pass their result. If you have the message,
    /// [`storage_key_of`](Self::storage_key_of) is simpler.
    ///
    /// An operator resolves a message with an [unknown](super::Receipt::Unknown) outcome, or a
    /// [rejected](super::ReceiveError::Rejected) message, once it is known whether the message took
    /// effect:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::receiver::ReceiverLayer;
    /// use tower_idempotency::protocol::{Outcome, Resolution};
    /// use tower_idempotency::receiver::ids;
    /// use tower_idempotency::Store;
    ///
    /// # async fn resolve<St: Store + Clone>(store: St, layer: ReceiverLayer<St, ()>, had_its_effect: bool) -> Result<(), Box<dyn std::error::Error>> {
    /// // The consumer takes its ids from `ids::amqp`.
    /// let key = layer.storage_key(ids::amqp(Some("order-7")))?;
    /// let Some(record) = store.peek(&key).await? else {
    ///     return Err("no record: another id or namespace, or the retention is over".into());
    /// };
    /// let resolution = match had_its_effect {
    ///     true => Resolution::Completed(Outcome::Tombstone, Duration::from_secs(7 * 24 * 60 * 60)),
    ///     false => Resolution::Absent,
    /// };
    /// // The store refuses if another attempt has begun since.
    /// store.resolve(&key, record.fence, &resolution).await?;
    /// // Now deliver the message again. It is a duplicate, or the handler runs.
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidMessageId`] if the id is longer than 4096 bytes.
    pub fn storage_key(&self, id: impl Into<MessageId>) -> Result<StorageKey, InvalidMessageId> {
        let id = id.into();
        id.check()?;
        Ok(self.settings.storage_key(&id))
    }

    /// Returns the storage key of this message's record, also if its
    /// [payload](OnMissingId::FromPayload) is its id. Returns `None` if the message has no record.
    ///
    /// # Errors
    ///
    /// [`InvalidMessageId`] if the id is longer than 4096 bytes.
    pub fn storage_key_of(&self, message: &M) -> Result<Option<StorageKey>, InvalidMessageId> {
        let id = self.settings.id_of(message)?;
        Ok(id.map(|id| self.settings.storage_key(&id)))
    }
}

impl<M> Settings<M> {
    /// Returns the message's id, or the hash of its payload in place of the id.
    pub(super) fn id_of(&self, message: &M) -> Result<Option<MessageId>, InvalidMessageId> {
        let id = (self.id)(message);
        id.check()?;
        if !id.is_missing() {
            return Ok(Some(id));
        }
        Ok(match (self.on_missing_id, &self.payload) {
            (OnMissingId::FromPayload, Some(payload)) => {
                let digest = blake3::hash(payload(message));
                Some(MessageId::with_optional("payload", [&digest.as_bytes()[..]]))
            }
            _ => None,
        })
    }

    pub(super) fn storage_key(&self, id: &MessageId) -> StorageKey {
        self.engine.space.message_key(&self.consumer, id.parts())
    }
}

impl<S, St: Clone, M> Layer<S> for ReceiverLayer<St, M> {
    type Service = Receiver<S, St, M>;

    fn layer(&self, inner: S) -> Receiver<S, St, M> {
        Receiver::new(inner, self.store.clone(), Arc::clone(&self.settings))
    }
}

impl<St: Clone, M> Clone for ReceiverLayer<St, M> {
    fn clone(&self) -> Self {
        Self {
            store: self.store.clone(),
            settings: Arc::clone(&self.settings),
        }
    }
}

impl<St, M> fmt::Debug for ReceiverLayer<St, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceiverLayer")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
