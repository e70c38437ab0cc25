//! x
mod clock;
mod error;
mod http;
pub mod protocol;
mod sharded;
pub mod store;
pub use clock::{Clock, Timestamp};
pub use error::{Error, ErrorKind};
pub use protocol::{Scope};
pub use self::http::{Body, RebuildBody, Refusal, RefusalKind};
pub use store::{MemoryStore, Store};
