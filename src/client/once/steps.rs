//! Jobs of several steps, each of which is made once.

use std::sync::Arc;

use super::values::Once;
use crate::protocol::{Fingerprint, Scope};
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

impl<St: Store + Clone> Steps<St> {
    pub(super) const fn new(job: Once<St>) -> Self {
        Self { job, names: Vec::new() }
    }

    /// The next step. It takes its settings from the job, and may change them.
    #[must_use]
    pub fn step(&mut self, name: &str) -> Once<St> {
        self.names.push(name.into());
        let path = self.names.clone();
        self.job.clone().at(Place { path })
    }
}

/// Where in a job a step stands: the names of the steps up to it, its own the last.
#[derive(Clone, Debug)]
pub(super) struct Place {
    path: Vec<Arc<str>>,
}

impl Place {
    pub(super) fn position(&self) -> usize {
        self.path.len() - 1
    }

    pub(super) fn number(&self) -> u32 {
        u32::try_from(self.position()).unwrap_or(u32::MAX)
    }

    /// What is asked in this step: the same path, for the same input.
    pub(super) fn fingerprint(&self, input: &Fingerprint) -> Fingerprint {
        let path = Scope::of(self.path.iter().map(|name| name.as_bytes()));
        Fingerprint::of(Scope::of([path.as_bytes(), input.digest()]).as_bytes())
    }
}
