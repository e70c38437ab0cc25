//! The layer and its settings.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::FutureExt;
use tower_layer::Layer;

use super::id::{InvalidMessageId, MessageId};
use super::lease::Lease;
use super::service::Receiver;
use crate::error::Error;
use crate::job::{Drain, Found, OnError, Terms};
use crate::protocol::{IfLost, StorageKey};

type IdFn<M> = Arc<dyn Fn(&M) -> MessageId + Send + Sync>;
type PayloadFn<M> = Arc<dyn for<'m> Fn(&'m M) -> &'m [u8] + Send + Sync>;
type LeaseFn<M> = Arc<dyn Fn(&mut M, Lease) + Send + Sync>;
type CheckFn<M> = Arc<dyn Fn(&M, Lease) -> BoxFuture<'static, Found<()>> + Send + Sync>;

/// Makes a service of messages handle each one once, across tasks, processes and crashes, as far as the store reaches. The
/// [module](super) says what it promises.
///
/// # Defaults
///
/// | setting | default |
/// |---|---|
/// | [id](Self::with_id) | none: set it |
/// | [payload](Self::with_payload) | not compared |
/// | [missing id](Self::on_missing_id) | refused |
/// | [other payload under the same id](Self::on_mismatch) | an error |
/// | [failed handler](Self::on_error) | the message may be handled again |
/// | lost attempt | unknown, and not handled again; or [at least once](Self::at_least_once), or a [question](Self::with_recovery) |
/// | [attempts](Self::with_max_attempts) lost before it is unknown all the same | 5 |
/// | [lease](Self::with_lease) | 30 s, renewed at a third |
/// | [retention](Self::with_retention) | 7 days from the end of the handler |
/// | [wait](Self::with_wait) for another delivery in flight | none |
///
/// A message takes a record for its retention, and a [`MemoryStore`](crate::MemoryStore) has room for 1,000,000: at 7 days that is 1.6
/// messages a second. Over its bound new messages are refused, loudly, and duplicates known as before.
#[must_use = "a layer does nothing until it is put around a service"]
pub struct ReceiverLayer<St, M> {
    store: St,
    settings: Arc<Settings<M>>,
}

pub(super) struct Settings<M> {
    pub(super) consumer: String,
    pub(super) terms: Terms,
    pub(super) id: IdFn<M>,
    pub(super) payload: Option<PayloadFn<M>>,
    pub(super) pass_lease: Option<LeaseFn<M>>,
    pub(super) check: Option<CheckFn<M>>,
    pub(super) if_lost: IfLost,
    pub(super) on_error: OnError,
    pub(super) on_mismatch: OnMismatch,
    pub(super) on_missing_id: OnMissingId,
}

/// What becomes of a message whose id came with another payload before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnMismatch {
    /// It is a duplicate. For producers that change what does not matter, such as the time of sending.
    Duplicate,
    /// It is an error, [`ReceiveError::Mismatch`](super::ReceiveError::Mismatch).
    #[default]
    Error,
}

/// What becomes of a message without an id, or with an empty one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnMissingId {
    /// Its [payload](ReceiverLayer::with_payload) is its id: two messages with equal payloads are one. Without a payload, it is refused.
    FromPayload,
    /// It is an error, [`ReceiveError::MissingId`](super::ReceiveError::MissingId).
    #[default]
    Refuse,
    /// It is handled as often as it comes.
    Unprotected,
}

impl<St, M> ReceiverLayer<St, M> {
    /// Records in `store` which messages `consumer` has handled. Two consumers of one message both handle it; all processes of one
    /// consumer need the same name.
    pub fn new(store: St, consumer: impl Into<String>) -> Self {
        let terms = Terms {
            retention: Duration::from_secs(7 * 24 * 60 * 60),
            wait: Duration::ZERO,
            ..Terms::default()
        };
        let settings = Settings {
            consumer: consumer.into(),
            terms,
            id: Arc::new(|_| MessageId::missing()),
            payload: None,
            pass_lease: None,
            check: None,
            if_lost: IfLost::Refuse,
            on_error: OnError::default(),
            on_mismatch: OnMismatch::default(),
            on_missing_id: OnMissingId::default(),
        };
        Self {
            store,
            settings: Arc::new(settings),
        }
    }

    fn settings(&mut self) -> &mut Settings<M> {
        Arc::make_mut(&mut self.settings)
    }

    /// Which message it is: what its producer chose once, and sends with every copy. A broker's own number of a delivery will not
    /// do where the producer sends again. The id is owned: `order.id.clone()`. **Without this, every message is
    /// [refused](OnMissingId::Refuse)**.
    pub fn with_id<I: Into<MessageId>>(mut self, id: impl Fn(&M) -> I + Send + Sync + 'static) -> Self {
        self.settings().id = Arc::new(move |message| id(message).into());
        self
    }

    /// What must be the same in all messages of one id; nothing by default. A message that was handled before this was set, or after it
    /// was taken away, has nothing to compare, and is a duplicate.
    pub fn with_payload(mut self, payload: impl for<'m> Fn(&'m M) -> &'m [u8] + Send + Sync + 'static) -> Self {
        self.settings().payload = Some(Arc::new(payload));
        self
    }

    /// What becomes of a message whose id came with another payload before; an error by default. It is counted either way.
    pub fn on_mismatch(mut self, on_mismatch: OnMismatch) -> Self {
        self.settings().on_mismatch = on_mismatch;
        self
    }

    /// What becomes of a message without an id; refused by default.
    pub fn on_missing_id(mut self, on_missing_id: OnMissingId) -> Self {
        self.settings().on_missing_id = on_missing_id;
        self
    }

    /// What becomes of a message whose handler fails or panics; by default it may be handled again. How often, the broker counts: give
    /// its queue a limit of deliveries and a dead-letter place.
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.settings().on_error = on_error;
        self
    }

    /// Handles a message again whose attempt was lost, instead of leaving it unknown. For handlers whose effect may come twice, or is
    /// in a transaction with the record, or at a third party that heeds [`Lease::id`].
    pub fn at_least_once(mut self) -> Self {
        self.settings().if_lost = IfLost::Execute;
        self
    }

    /// Asks what became of an attempt that was lost, before the message is handled again.
    ///
    /// One effect is promised where the check shuts the lost attempt out, by raising the [fence](Lease::fence) at the third party
    /// before it looks, or where what that attempt sent has settled before the check ([`with_settling`](Self::with_settling) narrows
    /// the gap).
    pub fn with_recovery<F>(mut self, check: impl Fn(&M, Lease) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Found<()>> + Send + 'static,
    {
        let settings = self.settings();
        settings.if_lost = IfLost::Recover;
        settings.check = Some(Arc::new(move |message, lease| check(message, lease).boxed()));
        self
    }

    /// Puts the lease of the attempt into the message, for its handler. A message that is handled [unprotected](OnMissingId::Unprotected)
    /// has none.
    pub fn pass_lease(mut self, pass: impl Fn(&mut M, Lease) + Send + Sync + 'static) -> Self {
        self.settings().pass_lease = Some(Arc::new(pass));
        self
    }

    /// Separates these messages from others in the same store; empty by default.
    pub fn with_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.settings().terms.space.namespace = namespace.into();
        self
    }

    /// Keys the hashes of the ids, so that who reads the store cannot test guesses; none by default. Every process needs the same.
    ///
    /// # Errors
    ///
    /// [`Configuration`](crate::ErrorKind::Configuration) when it is shorter than 16 bytes.
    pub fn with_secret(mut self, secret: &[u8]) -> Result<Self, Error> {
        self.settings().terms.space.set_secret(secret)?;
        Ok(self)
    }

    /// How long an attempt may go without a sign of life before it counts as lost; 30 s by default, at least 1 s. It is renewed at a
    /// third while the handler runs, however long that takes.
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.settings().terms.set_lease(lease);
        self
    }

    /// How long a handled message is remembered, from the end of its handler; 7 days by default. It should exceed everything that can
    /// deliver a message again: the broker's own retention, the dead-letter queue included, and the producer's retries.
    pub fn with_retention(mut self, retention: Duration) -> Self {
        self.settings().terms.retention = retention;
        self
    }

    /// How long a delivery waits for another one of the same message that is in flight; not at all by default. Waiting takes the
    /// consumer's time and the broker's patience. One with [another payload](OnMismatch::Duplicate) does not wait.
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.settings().terms.wait = wait;
        self
    }

    /// After how many attempts in all a message whose attempts are lost is unknown all the same; 5 by default, 1 or more. It stops a
    /// message that kills whoever handles it. Once one was lost, those that fail after it count as well, and so do deliveries that
    /// took the message over and were dropped before its handler began: give a delivery the time that your store takes.
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.settings().terms.max_attempts = attempts.max(1);
        self
    }

    /// How long to let what a lost attempt sent settle before the [check](Self::with_recovery); not at all by default.
    pub fn with_settling(mut self, delay: Duration) -> Self {
        self.settings().terms.settling = delay;
        self
    }

    /// How long one operation of the store may take, and for how long it is repeated when it is to record that a message was handled;
    /// 5 s and 10 s by default. Without its caller it is repeated for twelve times as long, two minutes.
    pub fn with_store_timeouts(mut self, operation: Duration, recording: Duration) -> Self {
        let terms = &mut self.settings().terms;
        (terms.store_timeout, terms.completion_timeout) = (operation, recording);
        self
    }

    /// Sets how many handlers may continue in this process after their deliveries were dropped. At least 1. Default:
    /// 16,384. At this limit, every delivery fails with [`Overloaded`](crate::ErrorKind::Overloaded), even if its
    /// message was handled already, and the broker delivers the message again. The layer does not stop a handler whose
    /// delivery was dropped, so without a limit a consumer with its own timeout could start any number of handlers.
    pub fn with_max_detached(mut self, executions: usize) -> Self {
        self.settings().terms.set_max_detached(executions);
        self
    }

    /// Waits for handlers that go on although their deliveries were dropped: before the process ends, stop taking messages, then
    /// wait. Else the runtime's end stops them in the middle.
    pub fn drain(&self) -> Drain {
        Drain::new(&self.settings.terms.tracker)
    }

    /// The name of a message's record in the store: for `Store::peek` and `Store::resolve`.
    ///
    /// What to do with a message of [unknown](super::Receipt::Unknown) outcome, once somebody has found out what became of it:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::receiver::ReceiverLayer;
    /// use tower_idempotency::protocol::{Outcome, Resolution};
    /// use tower_idempotency::Store;
    ///
    /// # async fn resolve<St: Store + Clone>(store: St, layer: ReceiverLayer<St, ()>, had_its_effect: bool) -> Result<(), Box<dyn std::error::Error>> {
    /// let key = layer.storage_key("order-7")?;
    /// if let Some(record) = store.peek(&key).await? {
    ///     let resolution = match had_its_effect {
    ///         true => Resolution::Completed(Outcome::Tombstone, Duration::from_secs(7 * 24 * 60 * 60)),
    ///         false => Resolution::Absent,
    ///     };
    ///     // Refused, if another attempt began since.
    ///     store.resolve(&key, record.fence, &resolution).await?;
    /// }
    /// // Now deliver it again: a duplicate, or handled anew.
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the id is too long.
    pub fn storage_key(&self, id: impl Into<MessageId>) -> Result<StorageKey, InvalidMessageId> {
        let id = id.into();
        id.check()?;
        Ok(self.settings.storage_key(&id))
    }

    /// The name of the record of this very message, also where its [payload](OnMissingId::FromPayload) stands for its id; `None` where
    /// it has no record.
    ///
    /// # Errors
    ///
    /// When the id is too long.
    pub fn storage_key_of(&self, message: &M) -> Result<Option<StorageKey>, InvalidMessageId> {
        let id = self.settings.id_of(message)?;
        Ok(id.map(|id| self.settings.storage_key(&id)))
    }
}

impl<M> Settings<M> {
    /// The message's id, or what stands for it; none if it has neither.
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
        self.terms.space.message_key(&self.consumer, id.parts())
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

impl<M> Clone for Settings<M> {
    fn clone(&self) -> Self {
        Self {
            consumer: self.consumer.clone(),
            terms: self.terms.clone(),
            id: Arc::clone(&self.id),
            payload: self.payload.clone(),
            pass_lease: self.pass_lease.clone(),
            check: self.check.clone(),
            if_lost: self.if_lost,
            on_error: self.on_error,
            on_mismatch: self.on_mismatch,
            on_missing_id: self.on_missing_id,
        }
    }
}

impl<M> fmt::Debug for Settings<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("consumer", &self.consumer)
            .field("terms", &self.terms)
            .field("if_lost", &self.if_lost)
            .field("on_error", &self.on_error)
            .field("on_mismatch", &self.on_mismatch)
            .field("on_missing_id", &self.on_missing_id)
            .finish_non_exhaustive()
    }
}

impl<St, M> fmt::Debug for ReceiverLayer<St, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceiverLayer")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
