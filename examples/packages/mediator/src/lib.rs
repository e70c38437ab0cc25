//! An integration service: each event that comes from NATS JetStream becomes one order at a third party, whose REST API cannot be
//! changed.
//!
//! ```text
//! JetStream ──▶ ReceiverLayer ──▶ once() ──▶ IdempotencyKeyLayer ──▶ CallLayer ──▶ reqwest ──▶ the third party
//!     ▲              │ handled?      │ done?       the same key           repeats
//!     └── ack, nak, dead letter      └─ its answer
//! ```
//!
//! JetStream delivers again whatever is not acknowledged in time, producers send again what they cannot tell was stored, the third
//! party loses answers, and all of it may be killed at any time. What holds all the same, [`Promise`] says.

mod broker;
mod event;
mod mediation;
mod party;

pub use broker::{Broker, Settings};
pub use event::Event;
pub use mediation::{Mediation, MediationError, Mediator, Promise, Received};
pub use party::{Party, Switches};

/// Whatever can go wrong outside of a message.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
