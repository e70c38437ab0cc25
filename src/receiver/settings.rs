//! The settings of a layer.

use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;

use super::classes::ErrorClasses;
use super::id::MessageId;
use super::kinds::Variants;
use super::lease::MessageLease;
use crate::detach::TaskTracker;
use crate::engine::{EngineSettings, JobLeases, OnError, Recovered};

pub(super) type IdFn<M> = Arc<dyn Fn(&M) -> MessageId + Send + Sync>;
pub(super) type TypeFn<M> = Arc<dyn for<'m> Fn(&'m M) -> &'m str + Send + Sync>;
pub(super) type PayloadFn<M> = Arc<dyn for<'m> Fn(&'m M) -> &'m [u8] + Send + Sync>;
pub(super) type LeaseFn<M> = Arc<dyn Fn(&mut M, MessageLease) + Send + Sync>;
pub(super) type CheckFn<M> = Arc<dyn Fn(&M, MessageLease) -> BoxFuture<'static, Recovered<()>> + Send + Sync>;

pub(super) struct Settings<M> {
    pub(super) consumer: String,
    pub(super) engine: EngineSettings,
    pub(super) tracker: Arc<TaskTracker>,
    pub(super) leases: Arc<JobLeases>,
    pub(super) id: IdFn<M>,
    pub(super) kind: Option<TypeFn<M>>,
    pub(super) payload: Option<PayloadFn<M>>,
    pub(super) pass_lease: Option<LeaseFn<M>>,
    pub(super) check: Option<CheckFn<M>>,
    pub(super) error_classes: ErrorClasses,
    pub(super) on_error: OnError,
    pub(super) on_mismatch: OnMismatch,
    pub(super) on_missing_id: OnMissingId,
    /// Shared by all clones of the layer, so that they compare with each other.
    pub(super) variants: Arc<Variants>,
}

/// The treatment of a message whose id came with another payload before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnMismatch {
    /// The message is a duplicate. Use this for producers that change irrelevant parts, such as the
    /// time of sending. A message of another [type](super::ReceiverLayer::with_type) is still an
    /// error.
    Duplicate,
    /// The delivery fails with [`ReceiveError::Mismatch`](super::ReceiveError::Mismatch).
    #[default]
    Error,
}

/// The treatment of a message without an id, or with an empty one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnMissingId {
    /// The layer takes the [payload](super::ReceiverLayer::with_payload) as the id, so two messages
    /// with equal payloads are one message. Without a payload, the layer refuses the message.
    FromPayload,
    /// The delivery fails with [`ReceiveError::MissingId`](super::ReceiveError::MissingId).
    #[default]
    Refuse,
    /// The layer handles every delivery of the message.
    Unprotected,
}

impl<M> Clone for Settings<M> {
    fn clone(&self) -> Self {
        Self {
            consumer: self.consumer.clone(),
            engine: self.engine.clone(),
            tracker: Arc::clone(&self.tracker),
            leases: Arc::clone(&self.leases),
            id: Arc::clone(&self.id),
            kind: self.kind.clone(),
            payload: self.payload.clone(),
            pass_lease: self.pass_lease.clone(),
            check: self.check.clone(),
            error_classes: self.error_classes.clone(),
            on_error: self.on_error,
            on_mismatch: self.on_mismatch,
            on_missing_id: self.on_missing_id,
            variants: Arc::clone(&self.variants),
        }
    }
}

impl<M> fmt::Debug for Settings<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("consumer", &self.consumer)
            .field("engine", &self.engine)
            .field("error_classes", &self.error_classes)
            .field("on_error", &self.on_error)
            .field("on_mismatch", &self.on_mismatch)
            .field("on_missing_id", &self.on_missing_id)
            .finish_non_exhaustive()
    }
}
