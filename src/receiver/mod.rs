//! Receiving: brokers deliver at least once, webhooks are sent again until they are answered; here each message is handled once.
//!
//! [`ReceiverLayer`] makes any tower service of any type of message an idempotent receiver (Hohpe and Woolf, *Enterprise Integration
//! Patterns*). It marks a message as handled only *after* its handler, so that one whose handler fails is not lost.
//!
//! ```
//! use std::convert::Infallible;
//! use tower::{service_fn, ServiceBuilder, ServiceExt};
//! use tower_idempotency::receiver::{Disposition, Receipt, ReceiverLayer};
//! use tower_idempotency::MemoryStore;
//!
//! struct Order { id: String }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let consumer = ServiceBuilder::new()
//!     .layer(ReceiverLayer::new(MemoryStore::new(), "billing").with_id(|order: &Order| order.id.clone()))
//!     .service(service_fn(|_: Order| async { Ok::<_, Infallible>("billed") }));
//!
//! let order = || Order { id: "order-7".to_owned() };
//! let first = consumer.clone().oneshot(order()).await;
//! let again = consumer.oneshot(order()).await;
//! assert!(matches!(first, Ok(Receipt::First("billed"))));
//! assert!(matches!(again, Ok(Receipt::Duplicate)));
//! assert_eq!(Disposition::of(&again), Disposition::Acknowledge);
//! # }
//! ```
//!
//! # What it promises
//!
//! | the handler's effect is in | strongest promise | what it needs |
//! |---|---|---|
//! | the same PostgreSQL as the record | exactly once | `Lease::complete_in` with [`at_least_once`](ReceiverLayer::at_least_once), or an `Inbox` (feature `postgres`) |
//! | a third party that heeds a key or an id | exactly once | [`Lease::id`] with [`at_least_once`](ReceiverLayer::at_least_once) |
//! | a third party that can be asked | exactly once, if the question shuts the lost attempt out | [`with_recovery`](ReceiverLayer::with_recovery) |
//! | anything else | at most once across crashes (the default), or [at least once](ReceiverLayer::at_least_once) | |
//!
//! A handler that returns an error or panics has its message handled again, by default: where it may have had its effect by then, say
//! so with [`on_error`](ReceiverLayer::on_error). One whose process died leaves the message [in flight](Receipt::InFlight) until the
//! lease is over, and then [unknown](Receipt::Unknown). The lease comes into the message by [`pass_lease`](ReceiverLayer::pass_lease).
//!
//! Order is not promised: what is redelivered comes later than it did. Neither is anything about a message that is redelivered
//! after its retention.
//!
//! # Where it goes
//!
//! Directly around the handler, inside of whatever acknowledges: a framework that looks at the result of its innermost service, as
//! `apalis` does for its jobs, must have the receiver as that service, or it never hears of duplicates. A broker's limit of deliveries
//! counts those that were only [in flight](Receipt::InFlight), too: leave room for them. And a handler that may run for longer than the
//! broker waits must tell the broker so (JetStream's progress, SQS's visibility timeout): the receiver keeps its second copy from
//! running, not from coming.
//!
//! Functions that are given to the layer must not panic; those that identify a message run in the consumer's own task.

mod batch;
mod id;
pub mod ids;
#[cfg(feature = "postgres")]
mod inbox;
mod layer;
mod lease;
mod receipt;
mod service;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "webhooks")]
pub mod webhooks;

pub use batch::{receive_all, Batch};
pub use id::{InvalidMessageId, MessageId};
#[cfg(feature = "postgres")]
pub use inbox::Inbox;
pub use layer::{OnMismatch, OnMissingId, ReceiverLayer};
pub use lease::Lease;
pub use receipt::{Disposition, Receipt, ReceiveError};
pub use service::{Receiver, ReceiverFuture};
