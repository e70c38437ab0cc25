//! The other half of an integration: calls to others that must take effect once, although we are retried and may crash.
//!
//! What can be promised depends on what the third party offers:
//!
//! | the third party offers | use | promise |
//! |---|---|---|
//! | idempotency keys | [`IdempotencyKeyLayer`], with a key that is [derived](KeyDeriver) from what our own caller sent | one effect, also across crashes of ours, as long as the other side keeps its keys |
//! | ids made by the client | [`KeyDeriver::derive`], [`Attempt::id`] or [`Lease::derive_id`](crate::Lease::derive_id) as the id | one effect: a second creation meets the first |
//! | drafts: create one, then a transition that is idempotent by nature | `Once::steps` | one effect: at worst a second draft that is never confirmed |
//! | an existence check | `Once::run_or_recover`, or [`OnceLayer::with_recovery`] | one effect, if the check shuts out the lost attempt or that has settled before it is asked |
//! | nothing | `Once` or [`OnceLayer`] | at most once, or at least once: choose; what is unknown is reported as unknown |
//!
//! # Where the layers go
//!
//! Outermost first:
//!
//! | layer | where the third party honours keys | where it offers nothing |
//! |---|---|---|
//! | [`OnceLayer`] | if you record its responses on this side, too; with [`assume_keys_honoured`](OnceLayer::assume_keys_honoured), so that retries repeat a lost request | needed |
//! | [`IdempotencyKeyLayer`] | needed: one logical request has one key | not needed; the caller sets the key of the call, in the header field or by [`OnceLayer::with_key`] |
//! | `CallLayer`, or `tower::retry` with `RetryPolicy` (feature `retry`) | repeats under the same key | repeats a request only if the server provably did not take it: a refused connection, a 425, a 429 |
//! | a time-out | for each attempt | for each attempt |
//! | `FollowRedirect` with `KeyAtHome` in its policy (feature `follow-redirect`) | only around a client that follows no redirects | the same |
//! | the client, such as `ReqwestService` (feature `reqwest`) | | |
//!
//! Do not put a retry of your own below [`OnceLayer`]: it can send one call several times, and the layer cannot prevent
//! that. Do not follow redirects on your own without `KeyAtHome`, because the layers would take the response to a later
//! request for the response to the first one.
//!
//! # What it does not promise
//!
//! A third party that keeps its keys for a day knows nothing of them on the next: everything here ends with the other side's
//! retention. And nobody can tell a lost request from a lost answer where the other side offers nothing to tell them by; what
//! came of such a call is unknown, and is never reported as done or as failed.

mod classes;
mod follows;
mod keys;
mod length;
mod once;
#[cfg(feature = "follow-redirect")]
mod redirect;
mod report;
#[cfg(feature = "reqwest")]
mod reqwest;
#[cfg(feature = "retry")]
mod retry;

#[cfg(feature = "reqwest")]
pub use self::reqwest::{ReqwestFuture, ReqwestService};
pub use crate::job::{Attempt, Found};
pub use classes::ErrorClass;
pub use keys::{
    Advice, IdempotencyKeyLayer, InBody, InHeader, KeyDeriver, KeyFuture, KeyMaker, KeyOrigin, Keyed, KeyedError,
    Meaning, Outgoing, PlaceKey, Profile,
};
#[cfg(feature = "once")]
pub use once::{once, Done, Failure, Once, Steps};
pub use once::{LostCall, OnceClient, OnceError, OnceFuture, OnceLayer};
#[cfg(feature = "follow-redirect")]
pub use redirect::KeyAtHome;
#[cfg(feature = "retry")]
pub use retry::{
    BodyError, Call, CallError, CallFuture, CallLayer, CallOutcome, CloneBody, CollectError, CollectingCall,
    CollectingCallFuture, CollectingCallLayer, Delivery, Pause, RetryPolicy,
};
