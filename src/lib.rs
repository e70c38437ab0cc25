//! x
mod clock;
mod error;
pub mod protocol;
mod sharded;
pub use clock::{Clock, Timestamp};
pub use error::{Error, ErrorKind};
pub use protocol::{Scope};
