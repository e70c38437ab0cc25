//! Jobs of several steps that are each made once.

use std::sync::Arc;

use super::step_path::StepPath;
use super::values::Once;
use crate::store::Store;

/// A job of several calls under one key, made by [`Once::steps`]. Each call is made once and its
/// response is stored. After a crash or a retry, the job resumes after the last recorded call.
///
/// ```
/// use tower_idempotency::client::{once, Failure, OnceError};
/// use tower_idempotency::MemoryStore;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), OnceError<u32, String>> {
/// let mut job = once(MemoryStore::new(), "order-4711").steps();
/// let draft = job.step("draft").run(|_| async { Ok::<_, Failure<String>>(17) }).await?;
/// let draft = *draft.value();
/// job.step("confirm").at_least_once().run(move |_| async move { Ok::<_, Failure<String>>(draft) }).await?;
/// # Ok(())
/// # }
/// ```
///
/// A step is a [`Once`] with its own record, lease and setting for lost attempts. If two jobs run
/// under one key at the same time, one of them makes each step, and the other one gets the stored
/// response.
///
/// The input of a later step may depend on the responses of earlier steps, but the *list* of steps
/// may not. The record of each step has a fingerprint of the input and of the names of all steps up
/// to it. A job with another list, or another input, fails with
/// [`OnceError::StepChanged`](super::OnceError::StepChanged) before the step runs. You may add
/// steps at the end.
///
/// A step can have steps of its own, by [`Once::steps`] in place of `run`. Their records have the
/// positions and the names of the outer steps, too.
///
/// This is not a workflow engine such as Temporal or Restate. Nothing restarts a job, and there are
/// no timers, signals or compensations.
#[derive(Debug)]
pub struct Steps<St> {
    job: Once<St>,
    outer: Option<Arc<StepPath>>,
    names: Vec<Arc<str>>,
}

impl<St: Store + Clone> Once<St> {
    /// Makes a job of several calls under this key. Each call is made once. If this is itself a
    /// step, its calls are separate from the other steps of the outer job.
    #[must_use]
    pub fn steps(self) -> Steps<St> {
        Steps::new(self)
    }
}

impl<St: Store + Clone> Steps<St> {
    pub(super) fn new(mut job: Once<St>) -> Self {
        Self {
            outer: job.take_path().map(Arc::new),
            job,
            names: Vec::new(),
        }
    }

    /// Returns the next step. It starts with the settings of the job, and you may change them.
    #[must_use]
    pub fn step(&mut self, name: &str) -> Once<St> {
        self.names.push(name.into());
        let path = StepPath::new(self.outer.clone(), self.names.clone());
        self.job.clone().at(path)
    }
}
