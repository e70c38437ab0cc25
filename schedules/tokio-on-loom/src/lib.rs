//! The part of tokio that the crate uses, on loom's threads. Each task is a thread. Every timer
//! fires at once.

#[path = "../../tokio-on-shuttle/src/runtime.rs"]
pub mod runtime;
#[path = "../../tokio-on-shuttle/src/sync.rs"]
pub mod sync;
pub mod task;
pub mod time;

use loom::sync::Mutex;

pub use self::task::spawn;
