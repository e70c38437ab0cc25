//! The effect of a failure on its key.

/// The effect of a failure of the handler on its key. A failure is a panic, an error of the
/// service, or, over HTTP, a 5xx or a 408 (for example of a timeout inside the layer).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnError {
    /// Over HTTP the layer stores and replays the failure, as Stripe does. A panic and an error of
    /// the service become a 500. A message counts as handled.
    Store,
    /// The receiver rejects the message for good, also if its handler panicked. It handles no copy
    /// of the message until an operator resolves the key or the retention is over, and
    /// [`Disposition::of`](crate::receiver::Disposition::of) returns `Reject`. Over HTTP, the
    /// effect is that of [`Unknown`](Self::Unknown).
    Reject,
    /// The failure passes through, and the next attempt runs. For handlers that have no effect when
    /// they fail.
    #[default]
    Release,
    /// The failure passes through, and the key is treated as if its owner had vanished: see
    /// [`OnLost`](crate::OnLost).
    Unknown,
}
