//! Receives messages and webhooks: brokers and webhook senders deliver at least once, and the
//! receiver handles each message once.
//!
//! [`ReceiverLayer`] makes any tower service of any type of message an idempotent receiver (Hohpe
//! and Woolf, *Enterprise Integration Patterns*). It records a message as handled only *after* its
//! handler has run, so that a message whose handler fails is not lost.
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
//! The guide [receiving messages](crate::guide::receiving) explains how to choose the id, the
//! guarantee after each kind of failure, and the reports to the broker. The guide
//! [webhooks](crate::guide::webhooks) explains the module `webhooks` (feature `webhooks`).

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

pub use batch::{Batch, receive_all};
pub use classes::HandlerErrorClass;
pub use id::{InvalidMessageId, MessageId};
#[cfg(feature = "postgres")]
pub use inbox::Inbox;
pub use layer::ReceiverLayer;
pub use lease::MessageLease;
pub use receipt::{Disposition, Receipt, ReceiveError};
pub use service::{Receiver, ReceiverFuture};
pub use settings::{OnMismatch, OnMissingId};
