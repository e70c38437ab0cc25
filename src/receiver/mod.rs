//! Receives messages and webhooks: brokers and webhook senders deliver at least once, and the receiver handles each message once.
//!
//! [`ReceiverLayer`] makes any tower service of any type of message an idempotent receiver (Hohpe and Woolf, *Enterprise Integration
//! Patterns*). It marks a message as handled only *after* its handler, so that a message whose handler fails is not lost.
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
//! # Guarantees
//!
//! | the handler's effect is in | strongest guarantee | requirement |
//! |---|---|---|
//! | the PostgreSQL database that also holds the record | exactly once | `MessageLease::complete_in` with [`at_least_once`](ReceiverLayer::at_least_once), or an `Inbox` (feature `postgres`) |
//! | a third party that deduplicates by a key or an id | exactly once | [`MessageLease::id`] with [`at_least_once`](ReceiverLayer::at_least_once) |
//! | a third party that can be asked | exactly once, if asking also blocks the lost attempt | [`with_recovery`](ReceiverLayer::with_recovery) |
//! | anything else | at most once across crashes (the default), or [at least once](ReceiverLayer::at_least_once) | |
//!
//! A process that dies leaves its message [in flight](Receipt::InFlight) until the lease is over, and then
//! [unknown](Receipt::Unknown). [`pass_lease`](ReceiverLayer::pass_lease) puts the lease into the message.
//!
//! Messages that are delivered again lose their place in the order. A message that is delivered again after its
//! retention counts as new.
//!
//! # Failures
//!
//! | failure | default | setting |
//! |---|---|---|
//! | an error after which another delivery may succeed, or a panic | handled again | [`on_error`](ReceiverLayer::on_error), if the handler may have had its effect when it fails |
//! | an error that no delivery mends (a poison message) | handled again, until the broker's limit of deliveries | [`with_error_class`](ReceiverLayer::with_error_class) rejects it at once and remembers that |
//! | another message under the id of a handled one | acknowledged, and **not handled** | a [`MessageId`] of several parts; [`with_type`](ReceiverLayer::with_type) and [`with_payload`](ReceiverLayer::with_payload) notice it |
//!
//! # Place
//!
//! Put the layer directly around the handler, inside of the code that acknowledges. A framework that reads the result of its innermost
//! service, as `apalis` does, needs the receiver as that service. Otherwise the framework does not see that a message is a duplicate.
//!
//! A broker's limit of deliveries also counts deliveries that were only [in flight](Receipt::InFlight), so leave room for them. A
//! handler that may run for longer than the broker waits must tell the broker so (JetStream's progress, SQS's visibility
//! timeout). The receiver does not run the second copy, but it cannot stop the broker from sending that copy.
//!
//! Functions that are given to the layer must not panic. The functions that identify a message run in the consumer's own task.

mod batch;
mod classes;
mod id;
pub mod ids;
#[cfg(feature = "postgres")]
mod inbox;
mod kinds;
mod layer;
mod lease;
mod receipt;
mod service;
mod settings;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "webhooks")]
pub mod webhooks;

pub use batch::{receive_all, Batch};
pub use classes::HandlerErrorClass;
pub use id::{InvalidMessageId, MessageId};
#[cfg(feature = "postgres")]
pub use inbox::Inbox;
pub use layer::ReceiverLayer;
pub use lease::MessageLease;
pub use receipt::{Disposition, Receipt, ReceiveError};
pub use service::{Receiver, ReceiverFuture};
pub use settings::{OnMismatch, OnMissingId};
