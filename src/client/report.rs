//! The evidence about one call: its attempts, the redirects that they followed, and the result of
//! each attempt.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{HeaderMap, Response, StatusCode, Uri};

use super::classes::{ErrorClass, ErrorClasses};
use super::follows::{Follows, follows_of};
use super::keys::{ProviderProfile, ResponseMeaning};

/// The evidence about one call. It is an extension of the request, so inner layers share it.
///
/// A status or an error describes the effect of the call only under two conditions. It must belong
/// to the caller's request, and not to a redirect that was followed. And no earlier attempt was
/// lost.
#[derive(Debug)]
pub(super) struct Report {
    progress: Arc<Mutex<Progress>>,
    /// The number of this copy. A retry clones the request and its extensions for each attempt, so
    /// two layers with the same copy see the same attempt.
    #[cfg_attr(
        not(any(feature = "follow-redirect", feature = "retry")),
        expect(dead_code, reason = "a redirect policy passes it on and a retry reads it")
    )]
    copy: u64,
    /// The number of redirect policies of this crate that the request has passed.
    watches: usize,
    /// Set if an unsafe request was sent on without its key in some attempt. The outer layers share
    /// it, because they may see the end of the attempt before this layer does, for example after a
    /// time limit.
    is_unkeyed: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Progress {
    attempts: u32,
    last: Option<Evidence>,
    /// An attempt was lost, and no later response has settled its effect.
    is_lost: bool,
    /// A response did not rule out that the server has processed the request. A later attempt that
    /// was not taken or was refused does not change that.
    may_be_processed: bool,
    /// The copy whose attempt has started. `None` once a layer has judged the attempt.
    open: Option<u64>,
    /// The number of copies of the report.
    copies: u64,
    hops: Hops,
    /// A redirect was followed around a retry that had judged its attempts. From then on, the retry
    /// sends other requests.
    is_redirected_around: bool,
    /// The targets of the last attempt, one for each redirect policy of this crate, outermost
    /// first. The layers read them after the attempt.
    targets: Vec<Uri>,
    /// Returns the redirects that the service may follow, as far as its type shows.
    follows: fn() -> Follows,
}

const SETTLED: ResponseMeaning = ResponseMeaning::Responded { settles: true };

/// The evidence about an attempt: the meaning of its result, and the facts that the head of its
/// response adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Evidence {
    pub(super) meaning: ResponseMeaning,
    head: Head,
    /// Whether the body of the response was lost, so that the outer layers get an error in place of
    /// the response.
    is_body_lost: bool,
}

/// The evidence in the head of a response, beyond its [`ResponseMeaning`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// The request had no effect. It was refused, or the client must send it to another target.
    NoEffect,
    /// The call took effect. The response itself may only mean that an earlier attempt under the
    /// same key arrived.
    Effect,
    /// The head shows neither, or there is no response.
    Neither,
}

impl Evidence {
    const UNKNOWN: Self = Self::of_error(ResponseMeaning::Unknown);

    const fn of_error(meaning: ResponseMeaning) -> Self {
        Self {
            meaning,
            head: Head::Neither,
            is_body_lost: false,
        }
    }

    fn of_head(profile: &ProviderProfile, status: StatusCode, headers: &HeaderMap, meaning: ResponseMeaning) -> Self {
        let head = if shows_effect(profile, status, headers) {
            Head::Effect
        } else if meaning == (ResponseMeaning::Responded { settles: false }) && shows_no_effect(status) {
            Head::NoEffect
        } else {
            Head::Neither
        };
        Self {
            meaning,
            head,
            is_body_lost: false,
        }
    }

    /// Returns the evidence of the same response, after its body was lost.
    #[cfg(feature = "retry")]
    pub(super) const fn without_body(self) -> Self {
        Self {
            is_body_lost: true,
            ..self
        }
    }

    /// Returns whether the response of the last attempt shows that no attempt of the call had an
    /// effect.
    pub(super) fn has_no_effect(self) -> bool {
        self.meaning == ResponseMeaning::NotTaken || self.head == Head::NoEffect
    }

    /// Returns the same for a caller that got an error. A response counts only if the error
    /// replaced it because its body was lost. An outer layer may have acted on any other response
    /// unseen. For example, it may have followed a redirect, or sent the request again after a 401.
    /// The error then belongs to that later request.
    pub(super) fn has_no_effect_by_error(self) -> bool {
        self.has_no_effect() && (self.meaning == ResponseMeaning::NotTaken || self.is_body_lost)
    }

    /// Returns whether the call took effect, even if the server recognises no keys and an earlier
    /// attempt was lost.
    pub(super) fn has_effect(self) -> bool {
        self.meaning == SETTLED && self.head == Head::Effect
    }
}

/// Returns whether a response shows that the call took effect, even if the server recognises no
/// keys and an earlier attempt was lost. A 409 or 422 does not show it, because it may only mean
/// that the lost attempt arrived earlier.
pub(super) fn shows_effect(profile: &ProviderProfile, status: StatusCode, headers: &HeaderMap) -> bool {
    status.is_success() || profile.is_replay(headers)
}

/// Returns whether a response that does not [settle](ResponseMeaning::Responded) the effect shows
/// that the request had no effect. Either the server asks the client to send the same request to
/// another target (RFC 9110 sections 15.4.8 and 15.4.9), or it refused the request before acting on
/// it (RFC 9110 section 15.5, RFC 6585, RFC 7725). A status without a registered meaning shows
/// nothing. Some proxies respond with 499 after they have passed the request on.
fn shows_no_effect(status: StatusCode) -> bool {
    matches!(
        status.as_u16(),
        307 | 308 | 400 | 401 | 403..=407 | 411 | 413..=417 | 421 | 423 | 426 | 428 | 431 | 451
    )
}

/// The hops of the current attempt.
#[derive(Debug, Default)]
struct Hops {
    /// A client of this crate sends the attempt. It reports every redirect, so its errors show
    /// whether the attempt was sent.
    is_sent: bool,
    /// A redirect was followed, or may have been followed.
    is_redirected: bool,
    /// A redirect policy of this crate has stopped at a redirect, so that redirect is the response.
    /// Any other result shows that an outer layer has followed it.
    is_stopped: bool,
    /// The number of redirect policies of this crate that have seen the request of this attempt.
    #[cfg(feature = "follow-redirect")]
    watches: usize,
}

impl Progress {
    /// Records that another request than the caller's is sent.
    fn redirect(&mut self) {
        self.hops.is_redirected = true;
        self.is_redirected_around |= self.is_judged();
    }

    /// Sets the target that the redirect policy at the depth `watches` sees.
    fn set_target(&mut self, watches: usize, target: Uri) {
        self.targets.truncate(watches);
        self.targets.push(target);
    }

    /// Returns whether a layer has judged the last attempt, and no other attempt has started.
    const fn is_judged(&self) -> bool {
        self.last.is_some() && self.open.is_none()
    }
}

impl Clone for Report {
    fn clone(&self) -> Self {
        let mut progress = self.progress();
        progress.copies += 1;
        Self {
            progress: Arc::clone(&self.progress),
            copy: progress.copies,
            watches: self.watches,
            is_unkeyed: Arc::clone(&self.is_unkeyed),
        }
    }
}

impl Report {
    /// Creates a report for a request that `S` will send. `outer` is the report of the layer around
    /// this one.
    pub(super) fn of<S>(outer: Option<&Self>) -> Self {
        let progress = Progress {
            attempts: 0,
            last: None,
            is_lost: false,
            may_be_processed: false,
            open: None,
            copies: 0,
            hops: Hops::default(),
            is_redirected_around: false,
            targets: Vec::new(),
            follows: follows_of::<S>,
        };
        Self {
            progress: Arc::new(Mutex::new(progress)),
            copy: 0,
            watches: 0,
            is_unkeyed: outer.map(|outer| Arc::clone(&outer.is_unkeyed)).unwrap_or_default(),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts an attempt. An earlier attempt that no layer has judged counts as lost. If an outer
    /// layer has started the attempt with the same copy, nothing changes.
    #[cfg(feature = "retry")]
    pub(super) fn begin(&self) {
        let mut progress = self.progress();
        if progress.open == Some(self.copy) {
            return;
        }
        progress.is_lost |= progress.open.is_some();
        progress.open = Some(self.copy);
        progress.hops = Hops::default();
    }

    /// Records that a client of this crate sends the attempt. If the client sends one attempt
    /// twice, a foreign retry layer has repeated it, and the first request counts as lost.
    #[cfg(feature = "reqwest")]
    pub(super) fn send(&self) {
        let mut progress = self.progress();
        progress.is_lost |= progress.hops.is_sent;
        progress.hops.is_sent = true;
    }

    /// Records that a redirect policy of this crate sees a request and will report its redirects.
    /// Returns the report for the inner layers and policies.
    ///
    /// For a policy, each request of its `FollowRedirect` looks like a first one. If the policy has
    /// seen a request of this attempt before, an outer layer has followed a redirect or repeated
    /// the request, so this is another request. If two policies see the same request, it does not
    /// count as another one, because each policy passes its number on.
    #[cfg(feature = "follow-redirect")]
    #[must_use]
    pub(super) fn watch(&self, target: &Uri) -> Self {
        let mut progress = self.progress();
        if progress.hops.watches > self.watches {
            progress.redirect();
        } else {
            progress.set_target(self.watches, target.clone());
        }
        let watches = self.watches + 1;
        progress.hops.watches = progress.hops.watches.max(watches);
        Self {
            progress: Arc::clone(&self.progress),
            copy: self.copy,
            watches,
            is_unkeyed: Arc::clone(&self.is_unkeyed),
        }
    }

    /// Copies the target from the report of an inner layer whose call has ended.
    pub(super) fn adopt(&self, inner: &Self) {
        let target = inner.progress().targets.first().cloned();
        if let Some(target) = target {
            self.progress().set_target(self.watches, target);
        }
    }

    /// Records that a redirect policy returns a redirect as the response.
    #[cfg(feature = "follow-redirect")]
    pub(super) fn stop(&self) {
        self.progress().hops.is_stopped = true;
    }

    /// Records that a redirect is followed, or may be followed without a report.
    pub(super) fn redirect(&self) {
        self.progress().redirect();
    }

    /// Records that an unsafe request goes to another origin without its key.
    #[cfg(feature = "follow-redirect")]
    pub(super) fn lose_key(&self) {
        self.is_unkeyed.store(true, std::sync::atomic::Ordering::Release);
    }

    /// Returns whether an attempt went to another origin without its key. The server there cannot
    /// recognise a repeated request.
    #[cfg(feature = "retry")]
    pub(super) fn has_lost_key(&self) -> bool {
        self.is_unkeyed.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Records the end of an attempt.
    pub(super) fn enter(&self, evidence: Evidence) {
        let mut progress = self.progress();
        // An inner retry within the redirects cannot know that it judges another request.
        let evidence = match evidence.meaning {
            SETTLED => evidence,
            _ if progress.is_redirected_around || progress.may_be_processed => Evidence::UNKNOWN,
            _ => evidence,
        };
        progress.attempts += 1;
        progress.last = Some(evidence);
        progress.open = None;
        progress.hops = Hops::default();
        match evidence.meaning {
            ResponseMeaning::Unknown => progress.is_lost = true,
            SETTLED => (progress.is_lost, progress.may_be_processed) = (false, true),
            ResponseMeaning::Responded { settles: false } => progress.may_be_processed = !evidence.has_no_effect(),
            ResponseMeaning::NotTaken => {}
        }
    }

    /// Returns the number of attempts, and the evidence about their effect. `last` is the result of
    /// the last attempt, as the caller of this function reads it. If an inner layer has judged that
    /// attempt, its judgement counts. If that layer saw the request processed but the caller sees a
    /// refusal, the refusal belongs to another request, and the result is unknown.
    pub(super) fn sum(&self, last: Evidence) -> (u32, Evidence) {
        let is_judged = self.progress().is_judged();
        if !is_judged {
            self.enter(last);
        }
        let progress = self.progress();
        let evidence = match (progress.last, last.meaning) {
            (Some(judged), ResponseMeaning::NotTaken | ResponseMeaning::Responded { settles: false })
                if judged.meaning == SETTLED =>
            {
                Evidence::UNKNOWN
            }
            (Some(judged), _) if !progress.is_lost => judged,
            _ => Evidence::UNKNOWN,
        };
        (progress.attempts, evidence)
    }

    /// Returns whether a response or an error may belong to a later hop of a redirect.
    fn may_be_redirected<R>(&self, response: Option<&Response<R>>) -> bool {
        let progress = self.progress();
        // The first policy inside of this layer puts the mark into a response.
        let target = progress.targets.get(self.watches);
        let is_redirect = response.is_some_and(|response| response.status().is_redirection());
        progress.hops.is_redirected
            || progress.is_redirected_around
            || (progress.hops.is_stopped && !is_redirect)
            || response
                .and_then(target_in_mark)
                .is_some_and(|marked| target != Some(marked))
            || match (progress.follows)() {
                Follows::Obedient => false,
                // This copy has passed a policy, so that policy reports. Inner policies are not
                // known.
                Follows::Reporting => self.watches == 0 && target.is_none(),
                Follows::Silent => true,
            }
    }

    /// Returns whether the client reports its redirects, so that its own errors show whether the
    /// request was sent.
    fn is_vouched(&self) -> bool {
        self.progress().hops.is_sent
    }
}

/// Returns the target of the request that a response belongs to. `FollowRedirect` of `tower-http`
/// 0.7 marks every response with it, even if it followed no redirect. The marks of other versions
/// have other types.
#[cfg(feature = "follow-redirect")]
fn target_in_mark<R>(response: &Response<R>) -> Option<&Uri> {
    let mark = response.extensions().get::<tower_http::follow_redirect::RequestUri>()?;
    Some(&mark.0)
}

#[cfg(not(feature = "follow-redirect"))]
const fn target_in_mark<R>(_: &Response<R>) -> Option<&Uri> {
    None
}

/// An extension of requests that may be sent only once. An inner retry layer may repeat such a
/// request only if the server provably did not take it.
///
/// Layers between the two must preserve the extensions of the request.
/// [`SameOriginKey`](super::SameOriginKey) puts this extension back into the requests of later
/// hops.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnlyUnsent;

/// Returns the evidence of an attempt's result about the effect of the request that was sent first.
pub(super) fn evidence_of<R, E: 'static>(
    profile: &ProviderProfile,
    classes: &ErrorClasses,
    report: Option<&Report>,
    result: &Result<Response<R>, E>,
) -> Evidence {
    let is_redirected = report.is_some_and(|report| report.may_be_redirected(result.as_ref().ok()));
    match result {
        Ok(response) => {
            let (status, headers) = (response.status(), response.headers());
            let meaning = if is_redirected {
                after_redirect(status)
            } else {
                profile.meaning(status, headers)
            };
            Evidence::of_head(profile, status, headers, meaning)
        }
        Err(_) if is_redirected => Evidence::UNKNOWN,
        Err(error) => match classes.of(error, report.is_some_and(Report::is_vouched)) {
            ErrorClass::Final | ErrorClass::NotSent => Evidence::of_error(ResponseMeaning::NotTaken),
            ErrorClass::Lost => Evidence::UNKNOWN,
        },
    }
}

/// Returns the meaning of a later hop's status for the first request. A 404, 409, 429 or 503
/// belongs to the later request and shows nothing. A success shows that the server has processed
/// the first request, and so does a redirect other than 307 and 308 (RFC 9110 section 15.4).
fn after_redirect(status: StatusCode) -> ResponseMeaning {
    match status.as_u16() {
        200..=306 => ResponseMeaning::Responded { settles: true },
        _ => ResponseMeaning::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSED: ResponseMeaning = ResponseMeaning::Responded { settles: false };

    fn of(meaning: ResponseMeaning) -> Evidence {
        Evidence::of_error(meaning)
    }

    /// Returns the evidence of a response with this status and no header.
    fn response(status: u16) -> Evidence {
        let (status, headers) = (StatusCode::from_u16(status).unwrap(), HeaderMap::new());
        let profile = ProviderProfile::draft();
        Evidence::of_head(&profile, status, &headers, profile.meaning(status, &headers))
    }

    fn sum(attempts: impl ExactSizeIterator<Item = Evidence>) -> Evidence {
        let report = Report::of::<()>(None);
        let entered = attempts.len();
        attempts.for_each(|evidence| report.enter(evidence));
        let (attempts, evidence) = report.sum(Evidence::UNKNOWN);
        assert_eq!(usize::try_from(attempts), Ok(entered.max(1)));
        evidence
    }

    /// An unregistered status, such as 499, may come from a proxy that has passed the request on.
    #[test]
    fn a_refusal_shows_no_effect_unless_an_earlier_attempt_may_have_had_one() {
        for (statuses, has_no_effect) in [
            (&[401][..], true),
            (&[413], true),
            (&[401, 413], true),
            (&[429, 401], true),
            (&[401, 429], true),
            (&[499], false),
            (&[499, 401], false),
            (&[499, 429], false),
            (&[500, 401], false),
            (&[201, 401], false),
        ] {
            let evidence = sum(statuses.iter().map(|status| response(*status)));
            assert_eq!(evidence.has_no_effect(), has_no_effect, "{statuses:?}");
        }
    }

    #[test]
    fn a_lost_attempt_stays_unknown_until_a_response_settles_it() {
        use ResponseMeaning::{NotTaken, Unknown};
        for (meanings, expected) in [
            (&[][..], Unknown),
            (&[SETTLED], SETTLED),
            (&[REFUSED], REFUSED),
            (&[NotTaken], NotTaken),
            (&[NotTaken, NotTaken], NotTaken),
            (&[Unknown, SETTLED], SETTLED),
            // A login that expired between two attempts shows nothing about the first attempt.
            (&[Unknown, REFUSED], Unknown),
            (&[Unknown, NotTaken], Unknown),
            (&[Unknown, NotTaken, SETTLED], SETTLED),
            (&[NotTaken, Unknown], Unknown),
            // For example, a 202 is repeated until the server is done. Later responses do not undo
            // the effect.
            (&[SETTLED, NotTaken], Unknown),
            (&[SETTLED, REFUSED], Unknown),
            (&[SETTLED, NotTaken, SETTLED], SETTLED),
        ] {
            let evidence = sum(meanings.iter().map(|meaning| of(*meaning)));
            assert_eq!(evidence.meaning, expected, "{meanings:?}");
        }
    }

    #[cfg(feature = "retry")]
    #[test]
    fn an_attempt_that_no_layer_judged_is_lost() {
        let report = Report::of::<()>(None);
        let repeated = report.clone();
        report.begin();
        repeated.begin();
        assert_eq!(
            report.sum(of(ResponseMeaning::NotTaken)).1.meaning,
            ResponseMeaning::Unknown
        );
        let report = Report::of::<()>(None);
        report.begin();
        report.begin();
        assert_eq!(
            report.sum(of(ResponseMeaning::NotTaken)),
            (1, of(ResponseMeaning::NotTaken)),
            "two layers begin one attempt"
        );
        let report = Report::of::<()>(None);
        report.begin();
        report.enter(of(ResponseMeaning::NotTaken));
        report.begin();
        assert_eq!(
            report.sum(Evidence::UNKNOWN),
            (2, Evidence::UNKNOWN),
            "its own end counts"
        );
    }
}
