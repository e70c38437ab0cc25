//! An exchange that continues without its caller.

use std::sync::Arc;

use tokio::runtime::Handle;

use super::singleflight::InFlight;
use crate::detach::{Detach, DetachOnDrop, TaskTracker};
use crate::telemetry::{self, Event};

/// The exchange of one request, polled in place. If the caller leaves after the claim, the exchange
/// continues in a task. Otherwise the exchange is dropped, and its guards release everything (I11).
pub(super) type Running<R, E> = DetachOnDrop<Result<http::Response<R>, E>, IfGuarded>;

/// Continues an abandoned exchange only if it has claimed its key.
pub(super) struct IfGuarded {
    pub(super) in_flight: Arc<InFlight>,
    pub(super) tracker: Arc<TaskTracker>,
}

impl Detach for IfGuarded {
    fn detach(&self, runtime: &Handle, rest: impl Future<Output = ()> + Send + 'static) {
        if self.in_flight.is_guarded() {
            telemetry::event(Event::Rescued);
            self.in_flight.set_detached();
            self.tracker.detach(runtime, rest);
        }
    }
}
