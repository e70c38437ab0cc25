//! Retries of requests. [`RetryPolicy`] decides for `tower::retry`. [`CallLayer`] also reports the
//! outcome, and can collect the response.

mod after;
mod body;
mod call;
mod collect;
mod delivery;
mod policy;
mod whole;

pub use body::CloneBody;
pub use call::{Call, CallError, CallFuture, CallLayer};
pub use collect::{BodyError, CollectError};
pub use delivery::{CallOutcome, CallReport};
pub use policy::{Backoff, RetryPolicy};
pub use whole::{CollectingCall, CollectingCallFuture, CollectingCallLayer};
