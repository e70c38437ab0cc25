//! Decides which requests are sent again, when, and how often.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Method, Request, Response};
use pin_project_lite::pin_project;
use tower::retry::Policy;
use tower::retry::budget::{Budget, TpsBudget};

use super::super::classes::{ErrorClass, ErrorClasses};
use super::super::keys::{IsKeyed, ProviderProfile, ResponseMeaning, RetryAdvice};
use super::super::report::{Evidence, OnlyUnsent, Report, evidence_of};
use super::after::retry_after;
use super::body::CloneBody;
use super::collect::IsLost;
use crate::clock::{Deadline, Timer, sleep};

/// A policy for `tower::retry`. It repeats a request only if the request has a key, if its method
/// is idempotent (RFC 9110 section 9.2.2), or if it is made under a
/// [`OnceLayer`](super::super::OnceLayer).
///
/// The policy repeats such a request after an error of the client, such as a timeout, and after a
/// response for which the [`ProviderProfile`] [advises](ProviderProfile::advice) it. It waits for
/// the time in `Retry-After`, plus a random time of at most
/// [`with_initial_backoff`](Self::with_initial_backoff). Without that field, it waits for a random
/// time between zero and a bound that doubles with every attempt ("full jitter").
///
/// The policy judges a response by its head. It does not repeat a request because the body of its
/// response breaks off later, unless the [`CallLayer`](super::CallLayer)
/// [collects](super::CallLayer::collect_responses) the body.
///
/// Under a [`OnceLayer`](super::super::OnceLayer), the policy repeats a request only if the server
/// provably did not take it. That is the case after an error that is known to come before the
/// sending, a 425 or a 429. A key in the header does not show that the server deduplicates by it.
/// [`OnceLayer::assume_keys_honoured`](super::super::OnceLayer::assume_keys_honoured) states that
/// the server does. The policy recognises the `OnceLayer` by an extension of the request, so layers
/// between the two must pass the extensions on.
///
/// # Defaults
///
/// | setting | default |
/// |---|---|
/// | [attempts](Self::with_max_attempts) | 5 |
/// | [initial](Self::with_initial_backoff) and [longest](Self::with_max_backoff) back-off | 200 ms, doubled up to 20 s |
/// | [horizon](Self::with_horizon) | 60 s, and at most nine tenths of the profile's retention |
/// | [budget](Self::with_budget) | tower's: a fifth of the requests, and 10 a second |
/// | [errors](Self::with_errors) | every error may have taken effect; with the feature `reqwest`, errors of `reqwest` before the sending are known |
///
/// # What it does not promise
///
/// The policy cannot undo a request. An attempt whose response was lost may have taken effect.
/// [`CallLayer`](super::CallLayer) distinguishes such a call from one that had no effect.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    settings: Arc<Settings>,
    sent: u32,
    deadline: Option<Deadline>,
}

#[derive(Clone, Debug)]
struct Settings {
    profile: ProviderProfile,
    max_attempts: u32,
    initial_backoff: Duration,
    max_backoff: Duration,
    horizon: Duration,
    budget: Arc<TpsBudget>,
    classes: ErrorClasses,
}

impl RetryPolicy {
    /// Creates a policy for a server with this profile.
    #[must_use]
    pub fn new(profile: ProviderProfile) -> Self {
        let settings = Settings {
            profile,
            max_attempts: 5,
            initial_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(20),
            horizon: Duration::from_secs(60),
            budget: Arc::default(),
            classes: ErrorClasses::default(),
        };
        Self {
            settings: Arc::new(settings),
            sent: 0,
            deadline: None,
        }
    }

    /// Sets the maximum number of attempts in total, at least 1. Default: 5.
    #[must_use]
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.settings().max_attempts = attempts.max(1);
        self
    }

    /// Sets the bound of the random pause before the second attempt. The bound doubles with every
    /// attempt, up to [`with_max_backoff`](Self::with_max_backoff). Default: 200 ms.
    #[must_use]
    pub fn with_initial_backoff(mut self, pause: Duration) -> Self {
        self.settings().initial_backoff = pause;
        self
    }

    /// Sets the longest bound of the random pause before an attempt. The bound of the first pause
    /// is never longer than this. Default: 20 s.
    #[must_use]
    pub fn with_max_backoff(mut self, pause: Duration) -> Self {
        self.settings().max_backoff = pause;
        self
    }

    /// Sets how long after the first attempt another attempt may start. Default: 60 s. The policy
    /// never repeats a request after nine tenths of the profile's retention, because the server may
    /// have deleted its record of the key.
    #[must_use]
    pub fn with_horizon(mut self, horizon: Duration) -> Self {
        self.settings().horizon = horizon;
        self
    }

    /// Sets the number of retries that all requests may make together. Clones of the policy share
    /// it. Default: tower's own budget. It allows retries for a fifth of the requests that succeed,
    /// and 10 a second, over the last 10 seconds.
    #[must_use]
    pub fn with_budget(mut self, budget: TpsBudget) -> Self {
        self.settings().budget = Arc::new(budget);
        self
    }

    /// Sets the classification of the client's errors by their effect. Default: every error may
    /// have taken effect, except for an error of `reqwest` that comes before the sending (feature
    /// `reqwest`). To classify errors of several types, call this method several times.
    ///
    /// The policy uses this classification only for an error of the request itself. An error that
    /// may belong to a later hop of a redirect never counts as "not sent". If the client follows
    /// redirects, put `SameOriginKey` into its redirect policy, so that this policy knows the hops.
    ///
    /// ```
    /// use std::io;
    /// use tower_idempotency::client::{ErrorClass, ProviderProfile, RetryPolicy};
    ///
    /// let policy = RetryPolicy::new(ProviderProfile::stripe()).with_errors(|error: &io::Error| match error.kind() {
    ///     io::ErrorKind::ConnectionRefused => ErrorClass::NotSent,
    ///     io::ErrorKind::InvalidInput => ErrorClass::Final,
    ///     _ => ErrorClass::Lost,
    /// });
    /// # drop(policy);
    /// ```
    #[must_use]
    pub fn with_errors<E: 'static>(mut self, classify: impl Fn(&E) -> ErrorClass + Send + Sync + 'static) -> Self {
        self.settings().classes.add(classify);
        self
    }

    fn settings(&mut self) -> &mut Settings {
        Arc::make_mut(&mut self.settings)
    }

    pub(super) fn profile(&self) -> &ProviderProfile {
        &self.settings.profile
    }

    /// Returns whether to repeat the request after this result of an attempt, and the evidence of
    /// the result about the effect.
    pub(super) fn read<R, E: 'static>(
        &self,
        result: &Result<Response<R>, E>,
        report: Option<&Report>,
    ) -> (RetryAdvice, Evidence) {
        let Settings { profile, classes, .. } = &*self.settings;
        let is_body_lost = |response: &Response<R>| response.extensions().get::<IsLost>().is_some();
        let advice = match result {
            // The caller did not receive the whole response, so the advice of its head does not
            // count.
            Ok(response) if is_body_lost(response) => RetryAdvice::Repeat,
            Ok(response) => profile.advice(response.status(), response.headers()),
            Err(error) => match classes.of(error, true) {
                ErrorClass::Final => RetryAdvice::Final,
                ErrorClass::Lost | ErrorClass::NotSent => RetryAdvice::Repeat,
            },
        };
        let evidence = evidence_of(profile, classes, report, result);
        match result {
            Ok(response) if is_body_lost(response) => (advice, evidence.without_body()),
            _ => (advice, evidence),
        }
    }

    fn may_repeat<B>(&self, request: &Request<B>) -> bool {
        is_idempotent(request.method())
            || request.headers().contains_key(&self.settings.profile.header)
            || request.extensions().get::<IsKeyed>().is_some()
            // Under a `OnceLayer`, the policy repeats only requests that the server did not take.
            || request.extensions().get::<OnlyUnsent>().is_some()
    }

    /// Returns the time until the next attempt, if there is one.
    fn pause<R, E>(&self, result: &Result<Response<R>, E>) -> Option<Duration> {
        let settings = &*self.settings;
        if self.sent >= settings.max_attempts {
            return None;
        }
        let requested = result
            .as_ref()
            .ok()
            .and_then(|response| retry_after(response.headers()));
        let pause = match requested {
            // Add a random time, so that not all clients retry at the same moment.
            Some(requested) => requested.saturating_add(up_to(settings.initial_backoff)),
            None => up_to(bound(settings.initial_backoff, settings.max_backoff, self.sent)),
        };
        (pause < self.deadline?.left()).then_some(pause)
    }
}

/// Returns whether the method is idempotent (RFC 9110 section 9.2.2).
fn is_idempotent(method: &Method) -> bool {
    method.is_safe() || [Method::PUT, Method::DELETE].contains(method)
}

/// Returns the bound of the pause after `sent` attempts.
fn bound(first: Duration, longest: Duration, sent: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(sent.saturating_sub(1));
    first.saturating_mul(doubled).min(longest)
}

fn up_to(bound: Duration) -> Duration {
    let nanos = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(rand::random_range(0..=nanos))
}

impl<B, R, E> Policy<Request<B>, Response<R>, E> for RetryPolicy
where
    B: CloneBody,
    E: 'static,
{
    type Future = Backoff;

    fn retry(&mut self, request: &mut Request<B>, result: &mut Result<Response<R>, E>) -> Option<Backoff> {
        self.sent += 1;
        let extensions = request.extensions();
        let report = extensions.get::<Report>();
        let (advice, evidence) = self.read(result, report);
        let has_lost_key = report.is_some_and(Report::has_lost_key);
        // If an inner layer has judged the attempt, its result counts, because only that layer has
        // seen the hops.
        let known = report.map_or(evidence, |report| report.sum(evidence).1);
        // A layer between this retry and the inner layer may have replaced the response.
        let is_replaced = result.is_ok() && evidence.meaning != ResponseMeaning::NotTaken;
        // A key in a header field does not show that the server deduplicates by it
        // (`OnceLayer::assume_keys_honoured`).
        let may_have_effect = known.meaning != ResponseMeaning::NotTaken || is_replaced;
        let is_forbidden = may_have_effect && extensions.get::<OnlyUnsent>().is_some();
        if advice == RetryAdvice::Final {
            self.settings.budget.deposit();
            return None;
        }
        if is_forbidden || has_lost_key {
            return None;
        }
        let pause = self.pause(result)?;
        self.settings.budget.withdraw().then(|| Backoff { sleep: sleep(pause) })
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        if self.sent == 0 {
            let Settings { horizon, profile, .. } = &*self.settings;
            let known = profile.retention.mul_f64(0.9);
            self.deadline = Some(Deadline::after((*horizon).min(known)));
        }
        if let Some(report) = request.extensions().get::<Report>() {
            report.begin();
        }
        if !self.may_repeat(request) {
            return None;
        }
        let mut clone = Request::new(request.body().try_clone()?);
        clone.method_mut().clone_from(request.method());
        clone.uri_mut().clone_from(request.uri());
        *clone.version_mut() = request.version();
        clone.headers_mut().clone_from(request.headers());
        clone.extensions_mut().clone_from(request.extensions());
        Some(clone)
    }
}

pin_project! {
    /// The pause before another attempt.
    #[derive(Debug)]
    pub struct Backoff {
        #[pin]
        sleep: Timer,
    }
}

impl Future for Backoff {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.project().sleep.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_doubles_up_to_the_longest_and_never_overflows() {
        let bound = |sent| bound(Duration::from_millis(200), Duration::from_secs(20), sent).as_millis();
        assert_eq!(
            [1, 2, 3, 7, 8, 9, 40, u32::MAX].map(bound),
            [200, 400, 800, 12_800, 20_000, 20_000, 20_000, 20_000]
        );
    }

    #[test]
    fn the_jitter_is_full_and_has_no_bound_that_is_too_long() {
        assert!(up_to(Duration::MAX) > Duration::ZERO);
        let bound = Duration::from_secs(1);
        let pauses: Vec<Duration> = (0..1000).map(|_| up_to(bound)).collect();
        assert!(pauses.iter().all(|pause| *pause <= bound));
        assert!(pauses.iter().any(|pause| *pause < bound / 10) && pauses.iter().any(|pause| *pause > bound * 9 / 10));
    }
}
