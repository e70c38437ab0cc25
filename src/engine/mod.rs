//! The life of an owned key, on the server, the client and the receiver: the claim, the run and the
//! record, and how each of them fails. This module knows neither HTTP nor messages.

mod attempt;
mod claim;
mod drain;
mod held_lease;
mod job;
mod job_leases;
mod lease_guard;
#[cfg(feature = "testing")]
mod made;
mod on_error;
mod on_lost;
mod owner;
mod renewal;
mod schedule;
mod settings;
#[cfg(feature = "postgres")]
mod transaction;
mod transaction_state;
mod waiting;

pub use attempt::{Attempt, Recovered};
pub(crate) use claim::{ClaimError, Claimer};
pub use drain::Drain;
pub(crate) use held_lease::HeldLease;
pub(crate) use job::{Ended, Job, NO_RUNTIME, Refused, Settled, Verdict, Work};
pub(crate) use job_leases::JobLeases;
pub(crate) use lease_guard::{LeaseGuard, with_look};
#[cfg(all(feature = "testing", feature = "postgres"))]
pub(crate) use made::MADE_WITHOUT_STORE;
#[cfg(feature = "testing")]
pub(crate) use made::Made;
pub use on_error::OnError;
pub use on_lost::OnLost;
#[cfg(feature = "postgres")]
pub(crate) use owner::TransactionEnd;
pub(crate) use owner::{KeyOwner, Ownership};
pub(crate) use renewal::{RenewalTasks, Renewer};
pub(crate) use settings::EngineSettings;
#[cfg(feature = "postgres")]
pub(crate) use transaction_state::TransactionState;
pub(crate) use waiting::{POLL, Waited, Waiter, await_owner};
