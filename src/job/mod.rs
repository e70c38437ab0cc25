//! A job that is done once: a call to others, or the handling of a message.

mod attempt;
mod drain;
mod engine;
mod held;
mod on_error;
mod renewal;
mod terms;
#[cfg(feature = "postgres")]
mod transaction;

pub use attempt::{Attempt, Found};
pub use drain::Drain;
pub(crate) use engine::{Ended, Job, Refused, Settled, Verdict, Work, NO_RUNTIME};
pub use on_error::OnError;
pub(crate) use renewal::Schedule;
pub(crate) use terms::Terms;
