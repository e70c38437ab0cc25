//! The service: one delivery.

use std::fmt;
use std::future::Future;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::FutureExt;
use tower_service::Service;

use super::id::MessageId;
use super::layer::{OnMismatch, OnMissingId, Settings};
use super::lease::Lease;
use super::receipt::{name_of, Receipt, ReceiveError};
use crate::error::ErrorKind;
use crate::job::{Attempt, Ended, Found, Job, OnError, Refused, Settled, Verdict, Work, NO_RUNTIME};
use crate::protocol::{Fingerprint, IfLost, Outcome, Status, StorageKey};
use crate::store::{in_time, Store};
use crate::telemetry::{self, Event};
use crate::uncut::uncut;

/// A service that handles each message once; made by [`ReceiverLayer`](super::ReceiverLayer).
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
    S: Service<M> + Clone + Send + 'static,
    S::Response: Send + 'static,
    S::Error: Send + 'static,
    S::Future: Send,
{
    type Response = Receipt<S::Response>;
    type Error = ReceiveError<S::Error>;
    type Future = ReceiverFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(ReceiveError::Handler)
    }

    fn call(&mut self, message: M) -> Self::Future {
        // The service that was polled ready is the one that is called.
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
/// Dropped before the handler began, it does not begin. Dropped later, the handler goes on in a task of its own, and what came of it is
/// recorded.
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

/// A message that has come, and the service that is to handle it.
struct Delivery<S, St, M> {
    service: S,
    message: M,
    store: St,
    settings: Arc<Settings<M>>,
}

/// What a handler came to.
enum Given<T, E> {
    Failed(E),
    Handled(T),
    /// A check found out that the message was handled.
    Known,
    Panicked,
}

impl<S, St, M> Delivery<S, St, M>
where
    St: Store + Clone,
    M: Send + 'static,
    S: Service<M> + Send + 'static,
    S::Response: Send + 'static,
    S::Error: Send + 'static,
    S::Future: Send,
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

    /// The message's id; none if it is to be handled without one.
    fn id(&self) -> Result<Option<MessageId>, ReceiveError<S::Error>> {
        let id = self.settings.id_of(&self.message).map_err(ReceiveError::InvalidId)?;
        if id.is_none() && self.settings.on_missing_id != OnMissingId::Unprotected {
            return Err(ReceiveError::MissingId);
        }
        Ok(id)
    }

    /// Handles the message as often as it comes.
    async fn unprotected(self) -> Received<S::Response, S::Error> {
        if let Err(overloaded) = self.settings.terms.check_load() {
            telemetry::event(Event::Overloaded);
            return Err(ReceiveError::Store(overloaded));
        }
        let tracker = Arc::clone(&self.settings.terms.tracker);
        // Declared first, so that it goes last, when the tracker knows of the rest.
        let _attended = tracker.attend();
        let handling = handled(self.service, self.message);
        let Some(handling) = uncut(handling, Some(Arc::clone(&tracker))) else {
            return Err(ReceiveError::Store(NO_RUNTIME));
        };
        match handling.await {
            Given::Handled(output) => Ok(Receipt::First(output)),
            Given::Failed(error) => Err(ReceiveError::Handler(error)),
            Given::Known | Given::Panicked => Err(ReceiveError::Panicked),
        }
    }

    async fn once(self, id: &MessageId) -> Received<S::Response, S::Error> {
        let settings = Arc::clone(&self.settings);
        let fingerprint = match &settings.payload {
            Some(payload) => Fingerprint::of(payload(&self.message)),
            None => Fingerprint::NONE,
        };
        let (store, key) = (self.store.clone(), settings.storage_key(id));
        let job = Job {
            store: self.store.clone(),
            key,
            fingerprint,
            if_lost: settings.if_lost,
            terms: settings.terms.clone(),
        };
        match job.settle(self).await {
            Settled::Ran { given, recorded } => match (given, recorded) {
                (Given::Failed(error), _) => Err(ReceiveError::Handler(error)),
                (Given::Panicked, _) => Err(ReceiveError::Panicked),
                (_, Err(error)) => Err(ReceiveError::Unrecorded(error)),
                (Given::Handled(output), Ok(())) => Ok(Receipt::First(output)),
                (Given::Known, Ok(())) => Ok(Receipt::Duplicate),
            },
            Settled::Replay(_) => Ok(Receipt::Duplicate),
            Settled::Refused(refused) => match refused {
                Refused::InFlight(retry_after) => Ok(Receipt::InFlight { retry_after }),
                Refused::Mismatch => settings.mismatched(&store, &key, fingerprint).await,
                Refused::NotKept => Ok(Receipt::Duplicate),
                Refused::NotRun(error) => {
                    if error.kind() != ErrorKind::Overloaded {
                        telemetry::store_failed(&error);
                    }
                    Err(ReceiveError::Store(error))
                }
                Refused::Undecided => Ok(Receipt::InFlight {
                    retry_after: settings.terms.lease,
                }),
                Refused::Unknown => Ok(Receipt::Unknown),
                Refused::Unread(error) => Err(ReceiveError::Unrecorded(error)),
            },
        }
    }

    fn lease(&self, attempt: &Attempt) -> Lease {
        #[cfg(feature = "postgres")]
        return Lease::new(attempt.clone(), &self.store, self.settings.terms.retention);
        #[cfg(not(feature = "postgres"))]
        Lease::new(attempt.clone())
    }
}

impl<S, St, M> Work for Delivery<S, St, M>
where
    St: Store + Clone,
    M: Send + 'static,
    S: Service<M> + Send + 'static,
    S::Response: Send + 'static,
    S::Error: Send + 'static,
    S::Future: Send,
{
    type Given = Given<S::Response, S::Error>;

    fn ask(&mut self, attempt: &Attempt) -> impl Future<Output = Found<Ended<Self::Given>>> + Send {
        let check = self.settings.check.as_ref();
        // The engine catches what panics within a future; a check may do so before it has made one.
        let asked = check.map(|check| {
            let ask = || check(&self.message, self.lease(attempt));
            catch_unwind(AssertUnwindSafe(ask))
        });
        async move {
            match asked {
                Some(Ok(asked)) => match asked.await {
                    Found::Happened(()) => Found::Happened(Ended {
                        given: Given::Known,
                        verdict: Verdict::Keep(Outcome::Tombstone),
                    }),
                    Found::NotHappened => Found::NotHappened,
                    Found::Unknown => Found::Unknown,
                },
                Some(Err(_)) | None => Found::Unknown,
            }
        }
    }

    async fn run(mut self, attempt: Attempt) -> Ended<Self::Given> {
        let settings = Arc::clone(&self.settings);
        let passed = catch_unwind(AssertUnwindSafe(|| {
            if let Some(pass) = &settings.pass_lease {
                let lease = self.lease(&attempt);
                pass(&mut self.message, lease);
            }
        }));
        let given = match passed {
            Ok(()) => handled(self.service, self.message).await,
            Err(_) => Given::Panicked,
        };
        let verdict = match (&given, settings.on_error) {
            (Given::Handled(_) | Given::Known, _) => Verdict::Keep(Outcome::Tombstone),
            (_, OnError::Keep) => Verdict::KeepFailure(Outcome::Tombstone),
            (_, OnError::Release) => Verdict::Release,
            (_, OnError::Unknown) => Verdict::GiveUp,
        };
        Ended { given, verdict }
    }
}

impl<M> Settings<M> {
    /// What came of a message whose payload is not the recorded one. Nothing is a duplicate of what is not recorded.
    async fn mismatched<T, E>(&self, store: &impl Store, key: &StorageKey, fingerprint: Fingerprint) -> Received<T, E> {
        let snapshot = in_time(self.terms.store_timeout, store.peek(key)).await;
        let snapshot = snapshot.inspect_err(telemetry::store_failed);
        let Some(snapshot) = snapshot.map_err(ReceiveError::Store)? else {
            return Ok(Receipt::InFlight {
                retry_after: Duration::ZERO,
            });
        };
        // In the meantime a copy of this very message took the key.
        if snapshot.fingerprint == fingerprint {
            return Ok(Receipt::InFlight {
                retry_after: Duration::ZERO,
            });
        }
        // From before payloads were compared, or after: there is nothing to compare.
        let is_compared = ![snapshot.fingerprint, fingerprint].contains(&Fingerprint::NONE);
        if is_compared && self.on_mismatch == OnMismatch::Error {
            return Err(ReceiveError::Mismatch);
        }
        if is_compared {
            telemetry::count_message("mismatch");
        }
        Ok(match snapshot.status {
            Status::Completed(_) => Receipt::Duplicate,
            Status::InFlight { left } => Receipt::InFlight {
                retry_after: left.min(self.terms.lease),
            },
            // A delivery with the recorded payload takes it over.
            Status::Lost if is_compared && self.if_lost != IfLost::Refuse => Receipt::InFlight {
                retry_after: self.terms.lease,
            },
            Status::Lost | Status::Unknown => Receipt::Unknown,
        })
    }
}

async fn handled<S: Service<M>, M>(mut service: S, message: M) -> Given<S::Response, S::Error> {
    let handling = AssertUnwindSafe(async move { service.call(message).await });
    match handling.catch_unwind().await {
        Ok(Ok(output)) => Given::Handled(output),
        Ok(Err(error)) => Given::Failed(error),
        Err(_) => {
            telemetry::event(Event::HandlerFailed);
            Given::Panicked
        }
    }
}
