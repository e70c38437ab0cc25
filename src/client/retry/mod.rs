//! Sending again what may be sent again: [`RetryPolicy`] decides, for `tower::retry`; [`CallLayer`] also says what became of it.

mod after;
mod body;
mod call;
mod delivery;
mod policy;

pub use body::CloneBody;
pub use call::{Call, CallError, CallFuture, CallLayer};
pub use delivery::{CallOutcome, Delivery};
pub use policy::{Pause, RetryPolicy};
