//! The position of a step in its job.

use std::sync::Arc;

use crate::protocol::{Fingerprint, Scope};

/// The position of a step in its job: the names of the steps before it, then its own name.
#[derive(Clone, Debug)]
pub(super) struct StepPath {
    path: Vec<Arc<str>>,
}

impl StepPath {
    pub(super) const fn new(path: Vec<Arc<str>>) -> Self {
        Self { path }
    }

    pub(super) fn position(&self) -> usize {
        self.path.len() - 1
    }

    pub(super) fn number(&self) -> u32 {
        u32::try_from(self.position()).unwrap_or(u32::MAX)
    }

    /// Returns the fingerprint of this step, which covers its path and the input.
    pub(super) fn fingerprint(&self, input: &Fingerprint) -> Fingerprint {
        let path = Scope::of(self.path.iter().map(|name| name.as_bytes()));
        Fingerprint::of(Scope::of([path.as_bytes(), input.digest()]).as_bytes())
    }
}
