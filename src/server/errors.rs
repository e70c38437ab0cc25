//! The meaning of an error of the inner service.

use crate::catch_panic::catch_panic_in;
use crate::error::Classifiers;

/// The meaning of an error of the inner service, for
/// [`IdempotencyLayer::with_errors`](crate::IdempotencyLayer::with_errors).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "an application that classifies errors must know every class"
)]
pub enum ServiceFailure {
    /// The handler failed, or may have run. [`OnError`](crate::OnError) decides. This is the
    /// default for every error.
    Failed,
    /// The request did not reach the handler. The layer releases the key under every
    /// [`OnError`](crate::OnError).
    NotRun,
}

/// The functions with which the application classifies the errors of the inner service.
#[derive(Clone, Debug, Default)]
pub(super) struct ServiceErrors(Classifiers<ServiceFailure>);

impl ServiceErrors {
    pub(super) fn add<E: 'static>(&mut self, classify: impl Fn(&E) -> ServiceFailure + Send + Sync + 'static) {
        self.0.add(classify);
    }

    /// Classifies an error. If the application's function panics, the error counts as
    /// [`ServiceFailure::Failed`], because the handler may have run.
    pub(super) fn of<E: 'static>(&self, error: &E) -> ServiceFailure {
        let class = catch_panic_in(|| self.0.of(error));
        class.ok().flatten().unwrap_or(ServiceFailure::Failed)
    }
}
