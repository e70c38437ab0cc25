//! A job that is done once: a call to others, or the handling of a message.

mod attempt;
mod engine;
mod terms;

pub use attempt::{Attempt, Found};
pub(crate) use engine::{Ended, Job, Refused, Settled, Verdict, Work};
pub(crate) use terms::Terms;
