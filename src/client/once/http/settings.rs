//! The settings of a layer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::request::Parts;
use http::{Method, Response};

use crate::client::classes::ErrorClasses;
use crate::client::keys::ProviderProfile;
use crate::detach::TaskTracker;
use crate::engine::{Attempt, EngineSettings, JobLeases, Recovered};
use crate::http::ResponseHeaders;
use crate::protocol::Scope;

pub(super) type KeyFn = Arc<dyn Fn(&Parts) -> Option<String> + Send + Sync>;
pub(super) type ScopeFn = Arc<dyn Fn(&Parts) -> Option<Scope> + Send + Sync>;
pub(super) type AttemptFn = Arc<dyn Fn(&mut Parts, &Attempt) + Send + Sync>;
pub(super) type CheckFn = Arc<dyn Fn(LostCall) -> BoxFuture<'static, Recovered<Response<Bytes>>> + Send + Sync>;

#[derive(Clone)]
pub(super) struct Settings {
    pub(super) profile: ProviderProfile,
    pub(super) engine: EngineSettings,
    pub(super) tracker: Arc<TaskTracker>,
    pub(super) leases: Arc<JobLeases>,
    pub(super) methods: Vec<Method>,
    pub(super) key: Option<KeyFn>,
    pub(super) scope: Option<ScopeFn>,
    pub(super) send_key: bool,
    pub(super) keys_are_honoured: bool,
    pub(super) on_attempt: Option<AttemptFn>,
    pub(super) check: Option<CheckFn>,
    pub(super) classes: ErrorClasses,
    pub(super) request_limit: usize,
    pub(super) response_limit: usize,
    pub(super) body_timeout: Duration,
    pub(super) response_timeout: Duration,
    pub(super) response_headers: ResponseHeaders,
}

/// A lost call, for the recovery check. Its `Debug` form hides key and headers.
#[non_exhaustive]
pub struct LostCall {
    /// The key of the call.
    pub key: String,
    /// The attempt that makes the check. Raise its [fence](Attempt::fence) at the third party
    /// before you look for the effect.
    pub attempt: Attempt,
    /// The head of the request.
    pub head: Parts,
}

impl fmt::Debug for LostCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LostCall")
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}
