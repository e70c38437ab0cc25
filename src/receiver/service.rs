//! The service: one delivery.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use tower_service::Service;

use super::id::MessageId;
use super::kinds::{Difference, Variant, difference, fingerprint};
use super::lease::MessageLease;
use super::receipt::{Receipt, ReceiveError, name_of};
use super::settings::{OnMismatch, OnMissingId, Settings};
use crate::catch_panic::{catch_panic, catch_panic_in};
use crate::detach::detach_on_drop;
use crate::engine::{Attempt, Ended, Job, NO_RUNTIME, OnError, Recovered, Refused, Settled, Verdict, Work};
use crate::error::ErrorKind;
use crate::protocol::{Fingerprint, IfLost, Outcome, Status, StorageKey};
use crate::store::{Store, with_timeout};
use crate::telemetry::{self, Event};

/// A service that handles each message once. [`ReceiverLayer`](super::ReceiverLayer) makes this
/// service.
pub struct Receiver<S, St, M> {
    inner: S,
    store: St,
    settings: Arc<Settings<M>>,
}

impl<S, St, M> Receiver<S, St, M> {
    pub(super) const fn new(inner: S, store: St, settings: Arc<Settings<M>>) -> Self {
        Self { inner, store, settings }
    }
}

impl<S: Clone, St: Clone, M> Clone for Receiver<S, St, M> {
    fn clone(&self) -> Self {
        Self::new(self.inner.clone(), self.store.clone(), Arc::clone(&self.settings))
    }
}

impl<S: fmt::Debug, St, M> fmt::Debug for Receiver<S, St, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("inner", &self.inner)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl<S, St, M> Service<M> for Receiver<S, St, M>
where
    St: Store + Clone,
    M: Send + 'static,
    S: Service<M, Response: Send, Error: Send, Future: Send> + Clone + Send + 'static,
{
    type Response = Receipt<S::Response>;
    type Error = ReceiveError<S::Error>;
    type Future = ReceiverFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(ReceiveError::Handler)
    }

    fn call(&mut self, message: M) -> Self::Future {
        // Call the service that was polled ready and leave its clone behind; the clone is not
        // ready.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        let delivery = Delivery {
            service: ready,
            message,
            store: self.store.clone(),
            settings: Arc::clone(&self.settings),
        };
        ReceiverFuture {
            received: Box::pin(delivery.receive()),
        }
    }
}

/// The future of a [`Receiver`].
///
/// # Cancel safety
///
/// If the future is dropped before the handler begins, the handler does not begin. If it is dropped
/// later, the handler continues in a task of its own, and the layer records its result.
#[must_use = "futures do nothing unless they are polled"]
pub struct ReceiverFuture<T, E> {
    received: BoxFuture<'static, Received<T, E>>,
}

type Received<T, E> = Result<Receipt<T>, ReceiveError<E>>;

impl<T, E> Future for ReceiverFuture<T, E> {
    type Output = Received<T, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.received.as_mut().poll(cx)
    }
}

impl<T, E> fmt::Debug for ReceiverFuture<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceiverFuture").finish_non_exhaustive()
    }
}

/// A delivery of a message, and the service that handles it.
struct Delivery<S, St, M> {
    service: S,
    message: M,
    store: St,
    settings: Arc<Settings<M>>,
}

/// The bounds of a service that handles messages in a task.
trait Handler<M>: Service<M, Response: Send, Error: Send, Future: Send> + Clone + Send + 'static {}

impl<S, M> Handler<M> for S where S: Service<M, Response: Send, Error: Send, Future: Send> + Clone + Send + 'static {}

/// The result of a handler.
enum Output<T, E> {
    /// The handler failed. Holds its error and the treatment of the key.
    Failed(E, OnError),
    Handled(T),
    /// A check found out that the message was handled.
    Known,
    Panicked,
}

impl<S, St, M> Delivery<S, St, M>
where
    St: Store + Clone,
    M: Send + 'static,
    S: Handler<M>,
{
    async fn receive(self) -> Received<S::Response, S::Error> {
        let received = match self.id() {
            Ok(Some(id)) => self.once(&id).await,
            Ok(None) => {
                telemetry::count_message("unprotected");
                return self.unprotected().await;
            }
            Err(error) => Err(error),
        };
        telemetry::count_message(name_of(&received));
        received
    }

    /// Returns the message's id, or `None` to handle it without one.
    fn id(&self) -> Result<Option<MessageId>, ReceiveError<S::Error>> {
        let id = self.settings.id_of(&self.message).map_err(ReceiveError::InvalidId)?;
        if id.is_none() && self.settings.on_missing_id != OnMissingId::Unprotected {
            return Err(ReceiveError::MissingId);
        }
        Ok(id)
    }

    /// Handles the message without a record.
    async fn unprotected(self) -> Received<S::Response, S::Error> {
        if let Err(overloaded) = self.settings.engine.check_load(&self.settings.tracker) {
            telemetry::event(Event::Overloaded);
            return Err(ReceiveError::Store(overloaded));
        }
        let tracker = Arc::clone(&self.settings.tracker);
        // Declared first so that it drops last, after abandoned work has been handed to the
        // tracker.
        let _attended = tracker.attend();
        let on_error = self.settings.on_error;
        let handling = handled(self.service, self.message, self.settings);
        let Some(handling) = detach_on_drop(handling, Some(Arc::clone(&tracker))) else {
            return Err(ReceiveError::Store(NO_RUNTIME));
        };
        match handling.await {
            Output::Handled(output) => Ok(Receipt::First(output)),
            Output::Failed(error, end) => Err(failed(error, end)),
            Output::Known | Output::Panicked => Err(panicked(on_error)),
        }
    }

    /// Handles the message once, under the key of its id.
    async fn once(self, id: &MessageId) -> Received<S::Response, S::Error> {
        let settings = Arc::clone(&self.settings);
        let fingerprint = settings.fingerprint(&self.message);
        let variant = Variant::of(&self.message);
        let (store, key) = (self.store.clone(), settings.storage_key(id));
        let job = Job {
            store: self.store.clone(),
            key,
            fingerprint,
            settings: settings.engine.clone(),
            tracker: Arc::clone(&settings.tracker),
            leases: Arc::clone(&settings.leases),
        };
        let received = match job.settle(self).await {
            Settled::Ran { output, recorded } => match (output, recorded) {
                (Output::Failed(error, end), _) => Err(failed(error, end)),
                (Output::Panicked, _) => Err(panicked(settings.on_error)),
                (_, Err(error)) => Err(ReceiveError::Unrecorded(error)),
                (Output::Handled(output), Ok(())) => Ok(Receipt::First(output)),
                (Output::Known, Ok(())) => Ok(Receipt::Duplicate),
            },
            Settled::Replay(_) => Ok(Receipt::Duplicate),
            Settled::Refused(refused) => match refused {
                Refused::InFlight(retry_after) => Ok(Receipt::InFlight { retry_after }),
                Refused::Mismatch => settings.mismatched(&store, &key, fingerprint).await,
                Refused::NotStored => Ok(Receipt::Duplicate),
                Refused::NotRun(error) => {
                    if error.kind() != ErrorKind::Overloaded {
                        telemetry::store_failed(&error);
                    }
                    Err(ReceiveError::Store(error))
                }
                Refused::Undecided => Ok(Receipt::InFlight {
                    retry_after: settings.engine.lease,
                }),
                Refused::Unknown => Ok(Receipt::Unknown),
                Refused::Unread(error) => Err(ReceiveError::Unrecorded(error)),
            },
        };
        settings.compare_variants(&key, variant, &received);
        received
    }

    fn lease(&self, attempt: &Attempt) -> MessageLease {
        #[cfg(feature = "postgres")]
        return MessageLease::new(attempt.clone(), &self.store, self.settings.engine.retention);
        #[cfg(not(feature = "postgres"))]
        MessageLease::new(attempt.clone())
    }
}

impl<S, St, M> Work for Delivery<S, St, M>
where
    St: Store + Clone,
    M: Send + 'static,
    S: Handler<M>,
{
    type Output = Output<S::Response, S::Error>;

    fn give_readiness_back(&mut self) {
        // A clone is not ready.
        self.service = self.service.clone();
    }

    /// The next delivery to a broken handler gets the error from the handler itself.
    async fn get_ready(&mut self) -> bool {
        poll_fn(|cx| self.service.poll_ready(cx)).await.is_ok()
    }

    fn check(&mut self, attempt: &Attempt) -> impl Future<Output = Recovered<Ended<Self::Output>>> + Send {
        let check = self.settings.check.as_ref();
        // The engine catches a panic of the future, but not a panic of the function that makes the
        // future.
        let checking = check.map(|check| {
            let make = || check(&self.message, self.lease(attempt));
            catch_panic_in(make)
        });
        async move {
            match checking {
                Some(Ok(checking)) => match checking.await {
                    Recovered::Happened(()) => Recovered::Happened(Ended {
                        output: Output::Known,
                        verdict: Verdict::Store(Outcome::Tombstone),
                    }),
                    Recovered::NotHappened => Recovered::NotHappened,
                    Recovered::Unknown => Recovered::Unknown,
                },
                Some(Err(_)) | None => Recovered::Unknown,
            }
        }
    }

    async fn run(mut self, attempt: Attempt) -> Ended<Self::Output> {
        let settings = Arc::clone(&self.settings);
        // A panic of the application's `pass_lease` function counts as a panic of the handler.
        let passed = catch_panic_in(|| {
            if let Some(pass) = &settings.pass_lease {
                let lease = self.lease(&attempt);
                pass(&mut self.message, lease);
            }
        });
        let output = match passed {
            Ok(()) => handled(self.service, self.message, Arc::clone(&settings)).await,
            Err(_) => Output::Panicked,
        };
        let verdict = match &output {
            Output::Handled(_) | Output::Known => Verdict::Store(Outcome::Tombstone),
            Output::Failed(_, end) => verdict_of(*end),
            Output::Panicked => verdict_of(settings.on_error),
        };
        Ended { output, verdict }
    }
}

/// Returns the end of a message whose handler failed.
const fn verdict_of(end: OnError) -> Verdict {
    match end {
        OnError::Store => Verdict::StoreFailure(Outcome::Tombstone),
        OnError::Reject => Verdict::StoreFailure(Outcome::Rejected),
        OnError::Release => Verdict::Release,
        OnError::Unknown => Verdict::GiveUp,
    }
}

/// Returns the result of a delivery whose handler failed. A rejection counts even if the store
/// could not record it, because the message then goes to the dead-letter queue, and only another
/// copy of it may be handled again.
fn failed<E>(error: E, end: OnError) -> ReceiveError<E> {
    match end {
        OnError::Reject => ReceiveError::Rejected(Some(error)),
        OnError::Store | OnError::Release | OnError::Unknown => ReceiveError::Handler(error),
    }
}

/// Returns the result of a delivery whose handler panicked.
fn panicked<E>(on_error: OnError) -> ReceiveError<E> {
    match on_error {
        OnError::Reject => ReceiveError::Rejected(None),
        OnError::Store | OnError::Release | OnError::Unknown => ReceiveError::Panicked,
    }
}

impl<M> Settings<M> {
    fn fingerprint(&self, message: &M) -> Fingerprint {
        let kind = self.kind.as_ref().map(|kind| kind(message));
        let payload = self.payload.as_ref().map(|payload| payload(message));
        fingerprint(kind, payload)
    }

    /// Warns about a duplicate whose enum variant differs from that of the earlier message. If the
    /// layer has a [type](super::ReceiverLayer::with_type), such a duplicate is a mismatch instead.
    fn compare_variants<T, E>(&self, key: &StorageKey, variant: Variant, received: &Received<T, E>) {
        match received {
            _ if self.kind.is_some() => {}
            Ok(Receipt::First(_)) => self.variants.remember(key, variant),
            Ok(Receipt::Duplicate) if self.variants.differs(key, variant) => telemetry::event(Event::TypeMismatch),
            _ => {}
        }
    }

    /// Returns the result of a message whose fingerprint differs from the recorded one. If the
    /// record is gone, the message may be delivered again at once.
    async fn mismatched<T, E>(&self, store: &impl Store, key: &StorageKey, fingerprint: Fingerprint) -> Received<T, E> {
        let snapshot = with_timeout(self.engine.store_timeout, store.peek(key)).await;
        let snapshot = snapshot.inspect_err(telemetry::store_failed);
        let Some(snapshot) = snapshot.map_err(ReceiveError::Store)? else {
            return Ok(Receipt::InFlight {
                retry_after: Duration::ZERO,
            });
        };
        // A copy of the same message has taken the key in the meantime.
        if snapshot.fingerprint == fingerprint {
            return Ok(Receipt::InFlight {
                retry_after: Duration::ZERO,
            });
        }
        let difference = difference(&snapshot.fingerprint, &fingerprint);
        if difference == Difference::Type {
            telemetry::event(Event::TypeMismatch);
            return Err(ReceiveError::TypeMismatch);
        }
        let is_compared = difference == Difference::Payload;
        if is_compared && self.on_mismatch == OnMismatch::Error {
            return Err(ReceiveError::Mismatch);
        }
        if is_compared {
            telemetry::count_message("mismatch");
        }
        Ok(match snapshot.status {
            Status::Completed(_) => Receipt::Duplicate,
            Status::InFlight { left } => Receipt::InFlight {
                retry_after: left.min(self.engine.lease),
            },
            // A later delivery with the recorded payload takes the key over.
            Status::Lost if is_compared && self.engine.if_lost != IfLost::Refuse => Receipt::InFlight {
                retry_after: self.engine.lease,
            },
            Status::Lost | Status::Unknown => Receipt::Unknown,
        })
    }
}

/// Handles the message. A classifier that panics counts as a handler that panics.
async fn handled<S, M>(mut service: S, message: M, settings: Arc<Settings<M>>) -> Output<S::Response, S::Error>
where
    S: Service<M, Error: 'static>,
{
    let handling = catch_panic(async move {
        let handled = service.call(message).await;
        handled.map_err(|error| {
            let end = settings.error_classes.end_of(&error, settings.on_error);
            (error, end)
        })
    });
    match handling.await {
        Ok(Ok(output)) => Output::Handled(output),
        Ok(Err((error, end))) => Output::Failed(error, end),
        Err(_) => {
            telemetry::event(Event::HandlerFailed);
            Output::Panicked
        }
    }
}
