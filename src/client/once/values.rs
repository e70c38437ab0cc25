//! One-time calls of any kind. Their values are stored as JSON.

use std::fmt;
use std::future::ready;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::failure::{Failure, OnceError};
use super::form::{decode, encode};
use super::setters::shared_setters;
use super::step_path::StepPath;
use crate::detach::TaskTracker;
use crate::engine::{Attempt, Drain, Ended, EngineSettings, Job, JobLeases, OnLost, Recovered, Settled, Verdict, Work};
use crate::error::Error;
use crate::protocol::{Fingerprint, IfLost, Scope};
use crate::store::Store;

/// Creates a call under `key` that is made once, across all tasks, processes and crashes that share
/// the store.
///
/// ```
/// use tower_idempotency::client::{once, Attempt, Failure};
/// use tower_idempotency::MemoryStore;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// async fn send(_: Attempt) -> Result<String, Failure<std::io::Error>> {
///     Ok("message 4711".to_owned())
/// }
///
/// let store = MemoryStore::new();
/// let first = once(store.clone(), "welcome-mail/user-7").run(send).await.unwrap();
/// let again = once(store, "welcome-mail/user-7").run(send).await.unwrap();
/// assert_eq!(again.value(), first.value());
/// assert!(!first.is_replay() && again.is_replay());
/// # }
/// ```
///
/// The call runs in its caller's task. If the caller drops the future after the call has begun, the
/// call continues in a task of its own, and its outcome is recorded. The call needs a tokio
/// runtime.
///
/// # The value
///
/// The store holds the value as JSON, and every caller, including the first one, gets the value
/// that is read from this JSON. If JSON or the type's `serde` attributes drop a part of the value
/// (a skipped field, a `NaN` in an `Option`), the first result lacks that part, too. Floats keep
/// every bit.
///
/// A value that JSON cannot hold, or that cannot be read back (a map whose keys are lists, a bare
/// `NaN`, an infinity, more than 127 levels of nesting, a `Serialize` that panics), is not stored.
/// The call was made, so it is not made again. The first caller gets the value unchanged, the
/// record says only that the call was made, and every later caller gets [`OnceError::NotStored`].
/// The log has an event `tombstone` for each such value.
#[must_use = "nothing happens before `run`"]
pub fn once<St: Store + Clone>(store: St, key: impl Into<String>) -> Once<St> {
    Once {
        store,
        key: key.into(),
        scope: None,
        input: None,
        engine: EngineSettings::default(),
        // Each call has its own drain, and all calls of a process share the bounds.
        tracker: Arc::new(TaskTracker::with_bounds_of_process()),
        leases: Arc::default(),
        path: None,
    }
}

/// A call that is made once. [`once`] and [`Steps::step`](super::Steps::step) make this type.
///
/// # What it promises
///
/// At most one call within the retention, by default. An attempt is lost if its process dies, its
/// lease ends, or it fails with [`Failure::Unknown`]. After a lost attempt, every call under the
/// key gets [`OnceError::Unknown`], until the retention is over. The next call after that is made.
///
/// [`at_least_once`](Self::at_least_once) makes the call again. Use it if the third party
/// deduplicates by the [id](Attempt::id). [`run_or_recover`](Self::run_or_recover) runs a check
/// before it makes the call again.
///
/// If the call panics, its outcome is unknown.
///
/// # Defaults
///
/// | setting | default |
/// |---|---|
/// | [lease](Self::with_lease) | 30 s, renewed at a third |
/// | [retention](Self::with_retention) | 24 h from the completion |
/// | [wait](Self::with_wait) for the same call elsewhere | 30 s |
/// | [attempts](Self::with_max_attempts) | 5 |
/// | [settle delay](Self::with_settle_delay) before the check of a lost attempt | none |
/// | [input](Self::with_input), [scope](Self::with_scope), [namespace](Self::with_namespace), [secret](Self::with_secret) | none |
#[derive(Clone)]
pub struct Once<St> {
    store: St,
    key: String,
    scope: Option<Scope>,
    input: Option<Fingerprint>,
    engine: EngineSettings,
    tracker: Arc<TaskTracker>,
    leases: Arc<JobLeases>,
    path: Option<StepPath>,
}

impl<St> Once<St> {
    shared_setters! {
        /// Makes the call again after a lost attempt, instead of leaving its outcome unknown. Use this
        /// for calls whose effect may happen twice, or whose third party deduplicates by the
        /// [id](Attempt::id) of the attempt.
        at_least_once;

        /// Sets what happens after a lost attempt. Default: [`OnLost::Refuse`]. To check the lost
        /// attempt first, call [`run_or_recover`](Self::run_or_recover).
        on_lost;
    }

    fn engine(&mut self) -> &mut EngineSettings {
        &mut self.engine
    }

    /// Sets the scope of the key, such as the caller that owns it. Default: none. Set a scope if
    /// two callers could use the same key.
    #[must_use]
    pub fn with_scope(mut self, scope: impl Into<Scope>) -> Self {
        self.scope = Some(scope.into());
        self
    }

    /// Sets the input of the call. A call with another input under the same key fails with
    /// [`OnceError::Mismatch`]. Default: none, so that all calls under a key count as the same
    /// call.
    #[must_use]
    pub fn with_input(mut self, input: impl AsRef<[u8]>) -> Self {
        self.input = Some(Fingerprint::of(input.as_ref()));
        self
    }

    /// Returns a drain that waits for this call, its clones and its steps, also if they continue
    /// after their callers have left. Call this before [`run`](Self::run), which consumes the call.
    /// To use one drain for many calls, see [`with_drain`](Self::with_drain).
    #[must_use]
    pub fn drain(&self) -> Drain {
        Drain::new(&self.tracker)
    }

    /// Makes `drain` wait for this call, too. Before the process ends, stop making calls, then
    /// wait:
    ///
    /// ```
    /// use tower_idempotency::client::{once, Failure};
    /// use tower_idempotency::{Drain, MemoryStore};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let (store, drain) = (MemoryStore::new(), Drain::default());
    /// let mail = |user: u32| {
    ///     let call = once(store.clone(), format!("welcome-mail/{user}")).with_drain(&drain);
    ///     call.run(|_| async { Ok::<_, Failure<std::io::Error>>("sent".to_owned()) })
    /// };
    /// mail(7).await.unwrap();
    /// drain.wait().await;
    /// # }
    /// ```
    #[must_use]
    pub fn with_drain(mut self, drain: &Drain) -> Self {
        self.tracker = drain.tracker();
        self
    }

    /// Sets how many calls may continue after their callers have left. The limit counts all calls
    /// of this process, or all calls of this [drain](Self::with_drain) if there is one. At the
    /// limit, a call is not made, and fails with [`OnceError::NotRun`] and
    /// [`Overloaded`](crate::ErrorKind::Overloaded). At least 1. Default: 16,384.
    #[must_use]
    pub fn with_max_detached(mut self, executions: usize) -> Self {
        self.engine.set_max_detached(executions);
        self
    }

    pub(super) fn at(mut self, path: StepPath) -> Self {
        self.path = Some(path);
        self
    }

    pub(super) const fn take_path(&mut self) -> Option<StepPath> {
        self.path.take()
    }
}

impl<St: Store + Clone> Once<St> {
    /// Makes the call, or returns the recorded result if it was already made.
    ///
    /// # Errors
    ///
    /// Every kind of [`OnceError`]. [`may_have_happened`](OnceError::may_have_happened) returns
    /// whether the call may have taken effect in spite of the error.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before the call begins, the call does not begin. If it is dropped
    /// later, the call continues, and its outcome is recorded.
    pub async fn run<T, E, F, Fut>(self, call: F) -> Result<Done<T>, OnceError<T, E>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        E: Send + 'static,
        F: FnOnce(Attempt) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, Failure<E>>> + Send + 'static,
    {
        let no_check = |_| ready(Recovered::Unknown);
        self.settle(Typed::new(no_check, call)).await
    }

    /// Makes the call, or returns the recorded result if it was already made. After a lost attempt,
    /// this first calls `check`, which finds out whether that attempt took effect. The check may
    /// run several times under one key, once in each attempt. Two checks do not run at the same
    /// time, as long as the attempts keep their leases.
    ///
    /// # What it does not promise
    ///
    /// The guarantee of one effect needs one of two conditions. Either the check blocks the lost
    /// attempt, by raising the [fence](Attempt::fence) at the third party before it looks for the
    /// effect. Or the request of the lost attempt has settled before the check;
    /// [`with_settle_delay`](Self::with_settle_delay) narrows this gap. A request that arrives
    /// after the check has an effect of its own.
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run).
    ///
    /// # Cancel safety
    ///
    /// As for [`run`](Self::run).
    pub async fn run_or_recover<T, E, C, CFut, F, Fut>(mut self, check: C, call: F) -> Result<Done<T>, OnceError<T, E>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        E: Send + 'static,
        C: FnOnce(Attempt) -> CFut + Send + 'static,
        CFut: Future<Output = Recovered<T>> + Send + 'static,
        F: FnOnce(Attempt) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, Failure<E>>> + Send + 'static,
    {
        self.engine.if_lost = IfLost::Recover;
        self.settle(Typed::new(check, call)).await
    }

    async fn settle<T, E, W>(self, work: W) -> Result<Done<T>, OnceError<T, E>>
    where
        T: DeserializeOwned,
        W: Work<Output = (Result<T, Failure<E>>, u32)>,
    {
        const EMPTY: Error =
            Error::configuration("the key of a one-time call is empty; use a key that identifies the call");
        if self.key.is_empty() {
            return Err(OnceError::NotRun(EMPTY));
        }
        let path = self.path.clone();
        let is_checked = self.engine.if_lost == IfLost::Recover;
        let settled = self.job().settle(work).await;
        match settled {
            Settled::Ran {
                output: (Ok(value), attempt),
                recorded: Ok(()),
            } => Ok(Done {
                value,
                attempt: Some(attempt),
            }),
            Settled::Ran {
                output: (Ok(value), _),
                recorded: Err(error),
            } => Err(OnceError::Unrecorded {
                output: Box::new(value),
                error,
            }),
            Settled::Ran {
                output: (Err(failure), attempt),
                ..
            } => Err(match failure {
                // This error describes the current attempt only. An earlier lost attempt that was
                // not checked may have taken effect.
                Failure::NotDone(error) if attempt == 1 || is_checked => OnceError::Failed(error),
                Failure::NotDone(error) | Failure::Unknown(error) => OnceError::Unknown(Some(error)),
            }),
            Settled::Replay(response) => match decode(&response) {
                Ok(value) => Ok(Done { value, attempt: None }),
                Err(cause) => Err(OnceError::Unreadable(cause)),
            },
            Settled::Refused(refused) => Err(match (OnceError::refused(refused), path) {
                (OnceError::Mismatch, Some(path)) => OnceError::StepChanged {
                    position: path.position(),
                },
                (error, _) => error,
            }),
        }
    }

    fn job(self) -> Job<St> {
        let input = self.input.unwrap_or(Fingerprint::NONE);
        let steps = self.path.as_ref().map(StepPath::numbers).unwrap_or_default();
        Job {
            key: self.engine.space.call_key(self.scope.as_ref(), &self.key, &steps),
            fingerprint: self.path.map_or(input, |path| path.fingerprint(&input)),
            store: self.store,
            settings: self.engine,
            tracker: self.tracker,
            leases: self.leases,
        }
    }
}

impl<St> fmt::Debug for Once<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Once")
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

/// The result of a one-time call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done<T> {
    value: T,
    attempt: Option<u32>,
}

impl<T> Done<T> {
    /// Returns the value of the call.
    #[must_use]
    pub const fn value(&self) -> &T {
        &self.value
    }

    /// Returns the value of the call, by value.
    #[must_use]
    pub fn into_value(self) -> T {
        self.value
    }

    /// Returns whether the call was made earlier and this is its stored value.
    #[must_use]
    pub const fn is_replay(&self) -> bool {
        self.attempt.is_none()
    }

    /// Returns the number of the attempt under the key, from 1. Returns `None` for a replay.
    #[must_use]
    pub const fn attempt(&self) -> Option<u32> {
        self.attempt
    }
}

type Types<T, E, CFut, Fut> = PhantomData<fn() -> (T, E, CFut, Fut)>;

/// A check and a call, with their types.
struct Typed<C, F, T, E, CFut, Fut> {
    check: Option<C>,
    call: F,
    types: Types<T, E, CFut, Fut>,
}

impl<C, F, T, E, CFut, Fut> Typed<C, F, T, E, CFut, Fut> {
    const fn new(check: C, call: F) -> Self {
        Self {
            check: Some(check),
            call,
            types: PhantomData,
        }
    }
}

impl<C, F, T, E, CFut, Fut> Work for Typed<C, F, T, E, CFut, Fut>
where
    T: Serialize + DeserializeOwned + Send + 'static,
    E: Send + 'static,
    C: FnOnce(Attempt) -> CFut + Send + 'static,
    CFut: Future<Output = Recovered<T>> + Send + 'static,
    F: FnOnce(Attempt) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T, Failure<E>>> + Send + 'static,
{
    type Output = (Result<T, Failure<E>>, u32);

    async fn check(&mut self, attempt: &Attempt) -> Recovered<Ended<Self::Output>> {
        let Some(check) = self.check.take() else {
            return Recovered::Unknown;
        };
        match check(attempt.clone()).await {
            Recovered::Happened(value) => Recovered::Happened(stored(value, attempt.number())),
            Recovered::NotHappened => Recovered::NotHappened,
            Recovered::Unknown => Recovered::Unknown,
        }
    }

    async fn run(self, attempt: Attempt) -> Ended<Self::Output> {
        let number = attempt.number();
        match (self.call)(attempt).await {
            Ok(value) => stored(value, number),
            Err(failure) => Ended {
                verdict: match failure {
                    Failure::NotDone(_) => Verdict::Release,
                    Failure::Unknown(_) => Verdict::GiveUp,
                },
                output: (Err(failure), number),
            },
        }
    }
}

/// Returns the end of a call that returned `value`: the outcome to store, and the value for the
/// caller.
fn stored<T: Serialize + DeserializeOwned, E>(value: T, attempt: u32) -> Ended<(Result<T, Failure<E>>, u32)> {
    let (value, outcome) = encode(value);
    Ended {
        output: (Ok(value), attempt),
        verdict: Verdict::Store(outcome),
    }
}
