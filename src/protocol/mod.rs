//! The protocol that guarantees one effect per key. It is pure: no I/O, no clock, no async, no
//! HTTP.
//!
//! A [`Claim`] asks for a key, and a [`Decision`] is the reply. A store stores a [`Record`] per
//! key. The functions of [`Record`] are the one place that implements its life:
//!
//! ```text
//! absent ──claim──▶ in flight ──complete──▶ completed (stored response | tombstone) ──retention──▶ absent
//!                    │  │  ▲
//!                    │  │  └── taken over (fence+1, attempt+1)  ◀── lease expired, OnLost = Execute | Recover
//!                    │  └──── lease expired, OnLost = Refuse, or attempts used up ──▶ unknown
//!                    └─ release: absent if this was the only attempt ever, otherwise "lease expired", evidence stays
//! unknown ──late complete by the same owner──▶ completed          unknown ──resolve──▶ completed | absent
//! in flight ──complete with `Rejected`──▶ unknown
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
