//! Jobs of several steps, each of which is made once.

use std::sync::Arc;

use super::step_path::StepPath;
use super::values::Once;
use crate::store::Store;

/// A job of several calls under one key: each is made once and its answer kept, so that a crash or a retry resumes after the last
/// one that was recorded. Made by [`Once::steps`].
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
/// A step is a [`Once`] of its own, with a record, a lease and a setting of its own for what to do when it is lost; two jobs that run
/// under one key at once meet at every step, and one of them makes it. What a later step does may depend on what earlier ones gave,
/// but the *list* of steps may not: each record says by which steps the job came to it, and another list is
/// [`OnceError::StepChanged`](super::OnceError::StepChanged) before anything runs. Steps may be added at the end.
///
/// It is no workflow engine: nothing starts a job again, there are no timers, no signals and no compensation. Temporal and Restate are
/// engines.
#[derive(Debug)]
pub struct Steps<St> {
    job: Once<St>,
    names: Vec<Arc<str>>,
}

impl<St: Store + Clone> Once<St> {
    /// A job of several calls under this key, each of which is made once.
    #[must_use]
    pub fn steps(self) -> Steps<St> {
        Steps::new(self)
    }
}

impl<St: Store + Clone> Steps<St> {
    pub(super) const fn new(job: Once<St>) -> Self {
        Self { job, names: Vec::new() }
    }

    /// The next step. It takes its settings from the job, and may change them.
    #[must_use]
    pub fn step(&mut self, name: &str) -> Once<St> {
        self.names.push(name.into());
        self.job.clone().at(StepPath::new(self.names.clone()))
    }
}
