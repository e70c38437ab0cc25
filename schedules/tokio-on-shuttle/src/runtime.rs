//! The one runtime of an execution.

use crate::task::JoinHandle;

/// A handle to the runtime.
#[derive(Clone, Debug)]
pub struct Handle(());

/// The identity of the runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(());

/// The guard of an entered runtime.
#[derive(Debug)]
pub struct EnterGuard(());

/// The error outside of a runtime, which does not occur here.
#[derive(Debug)]
pub struct TryCurrentError(());

impl Handle {
    pub fn try_current() -> Result<Self, TryCurrentError> {
        Ok(Self(()))
    }

    pub fn id(&self) -> Id {
        Id(())
    }

    pub fn enter(&self) -> EnterGuard {
        EnterGuard(())
    }

    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        crate::spawn(future)
    }
}
