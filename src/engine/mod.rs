//! The life of an owned key, on the server, the client and the receiver: the claim, the run and the
//! record, and how each of them fails. This module knows neither HTTP nor messages.

mod attempt;
mod claim;
mod drain;
mod job;
mod lease_guard;
#[cfg(feature = "testing")]
mod made;
mod on_error;
mod on_lost;
mod owner;
mod renewal;
mod settings;
#[cfg(feature = "postgres")]
mod transaction;
mod waiting;

pub use attempt::{Attempt, Recovered};
pub(crate) use claim::{ClaimError, Claimer};
pub use drain::Drain;
pub(crate) use job::{Ended, Job, Refused, Settled, Verdict, Work, NO_RUNTIME};
#[cfg(feature = "testing")]
pub(crate) use made::Made;
#[cfg(all(feature = "testing", feature = "postgres"))]
pub(crate) use made::MADE_WITHOUT_STORE;
pub use on_error::OnError;
pub use on_lost::OnLost;
#[cfg(feature = "postgres")]
pub(crate) use owner::TransactionEnd;
pub(crate) use owner::{KeyOwner, Ownership};
pub(crate) use renewal::Schedule;
pub(crate) use settings::EngineSettings;
pub(crate) use waiting::{await_owner, Waited, Waiter};
