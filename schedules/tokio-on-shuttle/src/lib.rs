//! The part of tokio that the crate uses, on shuttle's tasks and with a clock that a test moves.
//!
//! `shuttle-tokio` has no `notified_owned`, and its timers fire at once. Here a timer fires when the
//! test moves the clock, so that a lost wake-up shows as a deadlock and no timer covers it.

pub mod runtime;
pub mod sync;
pub mod task;
pub mod time;

use shuttle::sync::Mutex;

pub use self::task::spawn;
