//! What a failure does to its key.

/// What a failure of the handler does to its key: a panic, an error of the service, or, over HTTP, a 5xx answer or a 408 (of a time-out
/// within the layer, say).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnError {
    /// Over HTTP the failure is kept and replayed, as Stripe does; a panic and an error of the service become a 500. A message counts
    /// as handled.
    Keep,
    /// The failure passes through, and the next attempt runs. For handlers that have no effect when they fail.
    #[default]
    Release,
    /// The failure passes through, and the key is treated as if its owner had vanished: see [`OnLost`](crate::OnLost).
    Unknown,
}
