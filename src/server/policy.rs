//! The rules that decide which responses are stored, and how failures end an attempt.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Extensions, HeaderMap, Response, StatusCode, request, response};

use super::derived_keys::DerivedKeys;
use super::marks::{DoNotStore, StoreOutcomeOnly, StoreResponse, retention_of};
use crate::callback::Callback;
use crate::catch_panic::catch_panic_in;
use crate::engine::{OnError, Recovered};
#[cfg(feature = "postgres")]
use crate::http::grpc_code;
use crate::http::{Effect, GrpcOutcome, Refusal, grpc_result, is_grpc_response, is_typed_grpc};
use crate::protocol::{Fence, IdempotencyKey};

/// The application's check of a lost attempt.
#[derive(Clone, Debug)]
pub(super) struct RecoveryCheck(
    Callback<dyn Fn(LostAttempt) -> BoxFuture<'static, Recovered<Response<Bytes>>> + Send + Sync>,
);

/// A lost attempt, and the request that now needs its outcome. The `Debug` form hides the key and
/// the headers.
#[non_exhaustive]
pub struct LostAttempt {
    /// The client's key.
    pub key: IdempotencyKey,
    /// The fence of the *new* attempt, which is higher than that of the lost one. Let the third party
    /// refuse all lower fences before you query the effect there. Otherwise a request of the lost
    /// attempt that is still in flight may take effect after the query.
    pub fence: Fence,
    /// The number of the new attempt.
    pub attempt: u32,
    /// The head of the request.
    pub head: request::Parts,
    pub(super) derived_keys: DerivedKeys,
}

impl LostAttempt {
    /// Returns the same key as [`Lease::derive_key`](crate::Lease::derive_key) returned to the
    /// handler in the lost attempt. If the handler called the third party under this key, look for
    /// the effect under it.
    ///
    /// If several layers guard the handler with different keys, the handler gets the lease of the
    /// innermost one, and only the check of that layer derives the same keys.
    #[must_use]
    pub fn derive_key(&self, step: &str) -> String {
        self.derived_keys.key(step)
    }

    /// Returns the same id as [`Lease::derive_id`](crate::Lease::derive_id) returned to the handler
    /// in the lost attempt.
    #[must_use]
    pub fn derive_id(&self, step: &str) -> String {
        self.derived_keys.id(step)
    }
}

impl fmt::Debug for LostAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LostAttempt")
            .field("fence", &self.fence)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

impl RecoveryCheck {
    pub(super) fn new<F>(check: impl Fn(LostAttempt) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Recovered<Response<Bytes>>> + Send + 'static,
    {
        Self(Callback(Arc::new(move |lost| Box::pin(check(lost)))))
    }

    pub(super) fn call(&self, lost: LostAttempt) -> BoxFuture<'static, Recovered<Response<Bytes>>> {
        (self.0)(lost)
    }
}

/// The application's predicate, which decides by the head whether a response is stored.
pub(super) type StoreIf = Callback<dyn Fn(&response::Parts) -> bool + Send + Sync>;

/// The rules that decide which responses are stored.
#[derive(Clone, Debug, Default)]
pub(super) struct StorePolicy {
    pub(super) on_error: OnError,
    pub(super) store_if: Option<StoreIf>,
    pub(super) statuses: Statuses,
}

/// The statuses whose responses are stored, apart from failures, for which [`OnError`] decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Statuses {
    /// All statuses except [passing](is_passing) ones.
    #[default]
    Definite,
    /// The gRPC status decides for gRPC responses, and the rules of HTTP for all others.
    Grpc,
    /// The same as `Definite`, without 400 and 422, because Stripe does not save the results of
    /// requests that fail validation.
    Stripe,
    /// Only 2xx.
    SuccessOnly,
}

/// The judgement about a response, which decides how its attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    pub(super) verdict: Verdict,
    /// Whether the trailers of the response may change the verdict, in [`StorePolicy::judge_end`].
    pub(super) awaits_trailers: bool,
    /// How long an outcome is stored, if the verdict stores one.
    pub(super) retention: Duration,
}

impl Judgement {
    /// Returns the judgement about a response that is a stream. The layer stores only its outcome.
    pub(super) const fn of_stream(self) -> Self {
        let verdict = match self.verdict {
            Verdict::Store => Verdict::Tombstone,
            verdict => verdict,
        };
        Self { verdict, ..self }
    }
}

/// The effect of the attempt's end on its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is unknown whether the request took effect. The key is treated as if its owner were lost.
    GiveUp,
    /// The layer stores the response.
    Store,
    /// The layer releases the key, so that the next attempt can run.
    Release,
    /// The request took effect. The layer stores a tombstone, and the caller gets the response.
    Tombstone,
    /// The application's predicate panicked after the handler had run. The layer stores a
    /// tombstone, and the caller gets a refusal instead of the response.
    Unjudged,
}

impl StorePolicy {
    /// Returns the verdict about a response by its head, and whether the trailers may change the
    /// verdict. The order is the handler's own mark, then a refusal of an inner layer, then the
    /// predicate, then the status. A refusal that denies the effect takes precedence over
    /// [`StoreResponse`].
    fn verdict(&self, response: &response::Parts) -> (Verdict, bool) {
        if let Some(verdict) = self.of_marks(&response.extensions) {
            return (verdict, false);
        }
        if let Some(store_if) = &self.store_if {
            let verdict = if store_if(response) {
                Verdict::Store
            } else {
                Verdict::Release
            };
            return (verdict, false);
        }
        if self.is_of_grpc(response.status, &response.headers) {
            // If the head has no gRPC status, the status follows in the trailers. If the trailers
            // arrive too late, the request counts as done. If the head has a status, the trailers
            // may contradict it.
            let outcome = grpc_result(&response.headers, None);
            return (outcome.map_or(Verdict::Store, |outcome| self.of_grpc(outcome)), true);
        }
        (self.of_status(response.status), false)
    }

    fn of_status(&self, status: StatusCode) -> Verdict {
        // A timeout layer inside this layer also responds with 408, after it has aborted the
        // handler. So 408 is a failure.
        if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT {
            return self.of_failure();
        }
        if self.statuses.include(status) {
            Verdict::Store
        } else {
            Verdict::Release
        }
    }

    /// Returns the verdict by the marks of the handler or by the refusal of an inner layer, if
    /// there is one.
    fn of_marks(&self, marks: &Extensions) -> Option<Verdict> {
        if marks.is_empty() {
            return None;
        }
        let effect = marks.get::<Refusal>().map(Refusal::effect);
        if effect == Some(Effect::Nothing) || marks.get::<DoNotStore>().is_some() {
            return Some(Verdict::Release);
        }
        if marks.get::<StoreOutcomeOnly>().is_some() {
            return Some(Verdict::Tombstone);
        }
        if marks.get::<StoreResponse>().is_some() {
            return Some(Verdict::Store);
        }
        Some(match (effect?, self.on_error) {
            (Effect::Nothing, _) => Verdict::Release,
            (Effect::Failed, _) => self.of_failure(),
            (Effect::Done, _) => Verdict::Tombstone,
            (Effect::Unknown, OnError::Release) => Verdict::Release,
            // If the refusal were stored, later requests would get it even after the outcome has
            // become known.
            (Effect::Unknown, OnError::Store | OnError::Reject | OnError::Unknown) => Verdict::GiveUp,
        })
    }

    const fn of_grpc(&self, outcome: GrpcOutcome) -> Verdict {
        match outcome {
            GrpcOutcome::Done | GrpcOutcome::Definite => Verdict::Store,
            GrpcOutcome::Failed => self.of_failure(),
            GrpcOutcome::Passing => Verdict::Release,
        }
    }

    /// Judges an attempt by the head of its response. `retention` is the layer's setting. If the
    /// predicate panics, the key must not become free, because the handler has already run (I6).
    pub(super) fn judge(&self, head: &response::Parts, retention: Duration) -> Judgement {
        let verdict = catch_panic_in(|| self.verdict(head));
        let (verdict, awaits_trailers) = verdict.unwrap_or((Verdict::Unjudged, false));
        Judgement {
            verdict,
            awaits_trailers,
            retention: retention_of(head).unwrap_or(retention),
        }
    }

    /// Whether these settings are for gRPC, and the response is a gRPC response.
    pub(super) fn is_of_grpc(&self, status: StatusCode, head: &HeaderMap) -> bool {
        self.statuses == Statuses::Grpc && is_grpc_response(status, head)
    }

    /// Whether a response is a gRPC response. The content type shows that under all settings,
    /// because a selector may choose settings of HTTP for a gRPC request.
    pub(super) fn is_grpc_response(&self, status: StatusCode, head: &HeaderMap) -> bool {
        is_typed_grpc(status, head) || self.is_of_grpc(status, head)
    }

    /// Returns the code of a gRPC response; `None` for any other response.
    #[cfg(feature = "postgres")]
    pub(super) fn grpc_code(&self, status: StatusCode, head: &HeaderMap, trailers: Option<&HeaderMap>) -> Option<u8> {
        let code = || grpc_code(head, trailers);
        self.is_grpc_response(status, head).then(code).flatten()
    }

    /// Returns the judgement about a response whose body has ended, or has broken off without
    /// trailers. A gRPC response without a status is a failure.
    pub(super) fn judge_end(
        &self,
        mut judgement: Judgement,
        head: &HeaderMap,
        trailers: Option<&HeaderMap>,
    ) -> Judgement {
        if judgement.awaits_trailers {
            let outcome = grpc_result(head, trailers);
            judgement.verdict = self.of_grpc(outcome.unwrap_or(GrpcOutcome::Failed));
        }
        judgement
    }

    /// Whether a response reports that its request took effect.
    #[cfg(feature = "postgres")]
    pub(super) fn reports_effect(&self, status: StatusCode, head: &HeaderMap, trailers: Option<&HeaderMap>) -> bool {
        if self.is_of_grpc(status, head) {
            return matches!(grpc_result(head, trailers), None | Some(GrpcOutcome::Done));
        }
        status.is_success() || status.is_redirection()
    }

    /// Returns the verdict about an attempt whose handler failed.
    pub(super) const fn of_failure(&self) -> Verdict {
        match self.on_error {
            OnError::Store => Verdict::Store,
            OnError::Release => Verdict::Release,
            OnError::Reject | OnError::Unknown => Verdict::GiveUp,
        }
    }
}

impl Statuses {
    fn include(self, status: StatusCode) -> bool {
        match self {
            Self::Definite | Self::Grpc => !is_passing(status),
            Self::Stripe => {
                let is_failed_validation = matches!(status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY);
                !is_failed_validation && !is_passing(status)
            }
            Self::SuccessOnly => status.is_success(),
        }
    }
}

/// Whether the layer passes a response with this status on without storing it. With these statuses,
/// the handler did not act, or the response depends on header fields outside the fingerprint, so
/// the same request may succeed later. A 408 and a 5xx are failures instead.
const fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_ACCEPTABLE
            | StatusCode::PROXY_AUTHENTICATION_REQUIRED
            | StatusCode::PRECONDITION_FAILED
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::EXPECTATION_FAILED
            | StatusCode::MISDIRECTED_REQUEST
            | StatusCode::TOO_EARLY
            | StatusCode::UPGRADE_REQUIRED
            | StatusCode::PRECONDITION_REQUIRED
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::RefusalKind;

    fn verdict(policy: &StorePolicy, status: u16, mark: impl FnOnce(&mut response::Parts)) -> Verdict {
        let mut parts = Response::builder().status(status).body(()).unwrap().into_parts().0;
        mark(&mut parts);
        policy.verdict(&parts).0
    }

    #[test]
    fn definite_responses_are_stored_and_passing_ones_are_not() {
        let policy = StorePolicy::default();
        for status in [200, 201, 204, 301, 400, 402, 409, 410, 411, 413, 422, 424, 451] {
            assert_eq!(verdict(&policy, status, |_| {}), Verdict::Store, "{status}");
        }
        let passing = [
            401, 403, 404, 405, 406, 407, 408, 412, 415, 417, 421, 425, 426, 428, 429, 431,
        ];
        for status in passing.into_iter().chain([500, 502, 503, 504]) {
            assert_eq!(verdict(&policy, status, |_| {}), Verdict::Release, "{status}");
        }
    }

    #[test]
    fn failures_follow_their_setting() {
        for (on_error, wanted) in [
            (OnError::Store, Verdict::Store),
            (OnError::Release, Verdict::Release),
            (OnError::Reject, Verdict::GiveUp),
            (OnError::Unknown, Verdict::GiveUp),
        ] {
            let policy = StorePolicy {
                on_error,
                ..StorePolicy::default()
            };
            assert_eq!(verdict(&policy, 500, |_| {}), wanted);
            assert_eq!(verdict(&policy, 408, |_| {}), wanted);
            assert_eq!(verdict(&policy, 429, |_| {}), Verdict::Release);
        }
    }

    /// Regression: every refusal of an inner layer counted as a sign that the request had no
    /// effect.
    #[test]
    fn a_refusal_of_an_inner_layer_is_judged_by_its_effect() {
        use RefusalKind::{
            HandlerFailed, Mismatch, OutcomeUnknown, OutcomeUnrecorded, ResponseBroken, ResponseNotStored,
        };
        use Verdict::{GiveUp, Release, Store, Tombstone};
        let of = |on_error, refusal: Refusal| {
            let policy = StorePolicy {
                on_error,
                ..StorePolicy::default()
            };
            verdict(&policy, refusal.status().as_u16(), |parts| {
                parts.extensions.insert(refusal);
            })
        };
        for (refusal, by_store, by_release, by_unknown) in [
            (Refusal::new(HandlerFailed), Store, Release, GiveUp),
            (Refusal::new(OutcomeUnknown), GiveUp, Release, GiveUp),
            (Refusal::new(OutcomeUnrecorded), GiveUp, Release, GiveUp),
            (Refusal::new(ResponseBroken), Tombstone, Tombstone, Tombstone),
            (Refusal::new(ResponseNotStored), Tombstone, Tombstone, Tombstone),
            (Refusal::new(Mismatch), Release, Release, Release),
            (Refusal::new(RefusalKind::Outstanding), Release, Release, Release),
            (Refusal::new(RefusalKind::StoreUnavailable), Release, Release, Release),
            // The inner handler ran, and another attempt took its key over.
            (Refusal::new(Mismatch).after_run(), GiveUp, Release, GiveUp),
        ] {
            assert_eq!(of(OnError::Store, refusal.clone()), by_store, "{refusal:?}");
            assert_eq!(of(OnError::Release, refusal.clone()), by_release, "{refusal:?}");
            assert_eq!(of(OnError::Unknown, refusal.clone()), by_unknown, "{refusal:?}");
        }
    }

    #[test]
    fn success_only_stores_only_successes_and_failures_follow_their_setting() {
        let policy = StorePolicy {
            statuses: Statuses::SuccessOnly,
            on_error: OnError::Unknown,
            ..StorePolicy::default()
        };
        for status in [200, 202, 204] {
            assert_eq!(verdict(&policy, status, |_| {}), Verdict::Store, "{status}");
        }
        for status in [302, 304, 400, 401, 404, 409, 410, 422, 429] {
            assert_eq!(verdict(&policy, status, |_| {}), Verdict::Release, "{status}");
        }
        for status in [408, 500, 503] {
            assert_eq!(verdict(&policy, status, |_| {}), Verdict::GiveUp, "{status}");
        }
        let gone = verdict(&policy, 410, |parts| {
            parts.extensions.insert(StoreResponse);
        });
        assert_eq!(gone, Verdict::Store);
    }

    #[test]
    fn a_mark_wins_over_the_predicate_and_do_not_store_wins_over_all() {
        let success_only = StorePolicy {
            store_if: Some(Callback(Arc::new(|response| response.status.is_success()))),
            ..StorePolicy::default()
        };
        assert_eq!(verdict(&success_only, 404, |_| {}), Verdict::Release);
        assert_eq!(
            verdict(&success_only, 404, |parts| {
                parts.extensions.insert(StoreResponse);
            }),
            Verdict::Store
        );
        let both = |parts: &mut response::Parts| {
            parts.extensions.insert(StoreResponse);
            parts.extensions.insert(DoNotStore);
        };
        assert_eq!(verdict(&success_only, 200, both), Verdict::Release);
    }

    #[test]
    fn store_outcome_only_applies_to_every_status_unless_do_not_store_is_set() {
        let policy = StorePolicy::default();
        for status in [200, 404, 503] {
            let marked = verdict(&policy, status, |parts| {
                parts.extensions.insert(StoreResponse);
                parts.extensions.insert(StoreOutcomeOnly);
            });
            assert_eq!(marked, Verdict::Tombstone, "{status}");
        }
        let vetoed = verdict(&policy, 200, |parts| {
            parts.extensions.insert(StoreOutcomeOnly);
            parts.extensions.insert(DoNotStore);
        });
        assert_eq!(vetoed, Verdict::Release);
    }

    #[test]
    fn stripe_stores_definite_failures_but_no_failed_validation() {
        let policy = StorePolicy {
            statuses: Statuses::Stripe,
            ..StorePolicy::default()
        };
        for status in [200, 402, 409] {
            assert_eq!(verdict(&policy, status, |_| {}), Verdict::Store, "{status}");
        }
        for status in [400, 401, 404, 422, 429] {
            assert_eq!(verdict(&policy, status, |_| {}), Verdict::Release, "{status}");
        }
    }
}
