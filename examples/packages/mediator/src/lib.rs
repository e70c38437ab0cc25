//! An integration service: each event from NATS JetStream becomes one order at a third party, whose
//! REST API cannot be changed.
//!
//! ```text
//! JetStream ──▶ ReceiverLayer ──▶ once() ──▶ IdempotencyKeyLayer ──▶ CallLayer ──▶ reqwest ──▶ the third party
//!     ▲              │ handled?      │ done?       the same key           repeats
//!     └── ack, nak, dead letter      └─ recorded response
//! ```
//!
//! JetStream delivers a message again if it is not acknowledged in time. Producers send an event
//! again if they do not know whether it was stored. The third party loses responses. Every process
//! may be killed at any time. [`Promise`] states the guarantees that hold nevertheless.

mod broker;
mod event;
mod mediation;
mod party;

pub use broker::{Broker, Settings};
pub use event::Event;
pub use mediation::{Mediation, MediationError, Mediator, Promise, Received};
pub use party::{Party, Switches};

/// Any error that does not concern a single message.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
