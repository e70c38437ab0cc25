//! The protocol of tower-idempotency as a model: one key, the processes that want it, the store, a
//! network that loses, delays and duplicates, a clock, an operator, and a third party that counts
//! effects. The checker explores every order of their steps within the bounds of a
//! [`Configuration`].
//!
//! [`rules`] has the transitions of a record. The tests of the crate's stores include the same file
//! and compare each transition with the real stores.

mod configuration;
mod properties;
#[path = "../../tests/support/rules.rs"]
pub mod rules;
mod steps;
mod world;

pub use configuration::{Budget, Configuration, Effect};
pub use properties::{
    ATTEMPTS, CLAIMANT, EFFECTS, EVIDENCE, FENCES, ONE_EXECUTION, OWNER, REQUEST, SAME_RESPONSE, STORED, STUCK, USEFUL,
    WAIT,
};
pub use steps::Action;
pub use world::{Message, Phase, Process, World};
