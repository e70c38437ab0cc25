//! The position of a step in its job.

use std::sync::Arc;

use crate::protocol::{Fingerprint, Scope};

/// The position of a step in its job: the names of the steps before it, then its own name.
#[derive(Clone, Debug)]
pub(super) struct StepPath {
    /// The step that the job is a part of.
    outer: Option<Arc<StepPath>>,
    names: Vec<Arc<str>>,
}

impl StepPath {
    pub(super) const fn new(outer: Option<Arc<Self>>, names: Vec<Arc<str>>) -> Self {
        Self { outer, names }
    }

    pub(super) fn position(&self) -> usize {
        self.names.len() - 1
    }

    /// Returns the positions of the outer steps, outermost first, then the position of this step.
    pub(super) fn numbers(&self) -> Vec<u32> {
        let mut numbers = self.outer.as_ref().map(|outer| outer.numbers()).unwrap_or_default();
        numbers.push(u32::try_from(self.position()).unwrap_or(u32::MAX));
        numbers
    }

    /// Returns the fingerprint of this step, which covers its path, the paths of the outer steps,
    /// and the input.
    pub(super) fn fingerprint(&self, input: &Fingerprint) -> Fingerprint {
        let names = Scope::of(self.names.iter().map(|name| name.as_bytes()));
        let input = match &self.outer {
            Some(outer) => outer.fingerprint(input),
            None => *input,
        };
        Fingerprint::of(Scope::of([names.as_bytes(), input.digest()]).as_bytes())
    }
}
