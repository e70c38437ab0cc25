//! A job that is done once: a call to others, or the handling of a message.

mod attempt;
mod drain;
mod job;
mod lease_guard;
#[cfg(feature = "testing")]
mod made;
mod on_error;
mod on_lost;
mod renewal;
mod settings;
#[cfg(feature = "postgres")]
mod transaction;

pub use attempt::{Attempt, Recovered};
pub use drain::Drain;
pub(crate) use job::{Ended, Job, Refused, Settled, Verdict, Work, NO_RUNTIME};
#[cfg(feature = "testing")]
pub(crate) use made::Made;
#[cfg(all(feature = "testing", feature = "postgres"))]
pub(crate) use made::MADE_WITHOUT_STORE;
pub use on_error::OnError;
pub use on_lost::OnLost;
pub(crate) use renewal::Schedule;
pub(crate) use settings::EngineSettings;
