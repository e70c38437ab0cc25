//! The protocol that keeps the promise, pure: no I/O, no clock, no async, no HTTP.
//!
//! A [`Claim`] asks for a key; a [`Decision`] answers it; a [`Record`] is what a store keeps, and the functions of
//! [`Record`] are the one place where its life is code:
//!
//! ```text
//! absent ──claim──▶ in flight ──complete──▶ completed (kept answer | tombstone) ──retention──▶ absent
//!                    │  │  ▲
//!                    │  │  └── taken over (fence+1, attempt+1)  ◀── lease over, OnLost = Execute | Recover
//!                    │  └──── lease over, OnLost = Refuse, or attempts used up ──▶ unknown
//!                    └─ release: absent if this was the only attempt ever, else "lease over", evidence kept
//! unknown ──complete by the same owner, late──▶ completed          unknown ──resolve──▶ completed | absent
//! ```

mod claim;
mod codec;
mod fingerprint;
mod json;
mod key;
mod record;
mod scratch;
mod storage_key;
mod structured;

pub use claim::{
    Claim, Completion, Decision, Fence, Grant, IfLost, Nonce, Outcome, Owner, Release, Renewal, Resolution,
    ResolveResult, Snapshot, Status, StoredResponse,
};
#[cfg(feature = "postgres")]
pub(crate) use codec::Columns;
pub use fingerprint::Fingerprint;
pub(crate) use fingerprint::Hasher;
pub use json::CanonicalJson;
pub(crate) use key::KeyParser;
pub use key::{IdempotencyKey, InvalidKey, KeyError, KeySyntax};
pub use record::{Change, Record, Transition};
pub(crate) use storage_key::{KeyHasher, KeySpace};
pub use storage_key::{Scope, StorageKey};
pub(crate) use structured::quoted;
