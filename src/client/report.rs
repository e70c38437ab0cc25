//! The evidence about one call: its attempts, the redirects that they followed, and the result of each attempt.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{Response, StatusCode, Uri};

use super::classes::{ErrorClass, ErrorClasses};
use super::follows::{follows_of, Follows};
use super::keys::{Meaning, Profile};

/// The evidence about one call. It is an extension of the request, so layers further in share it.
///
/// A status or an error describes the effect of the call only if it belongs to the request of the caller, and not to a
/// redirect that was followed, and only if no earlier attempt was lost.
#[derive(Debug)]
pub(super) struct Report {
    progress: Arc<Mutex<Progress>>,
    /// The number of this copy. A retry clones the request and its extensions for each attempt, so two layers with the
    /// same copy see the same attempt.
    #[cfg_attr(
        not(any(feature = "follow-redirect", feature = "retry")),
        expect(dead_code, reason = "a redirect policy passes it on and a retry reads it")
    )]
    copy: u64,
    /// The number of redirect policies of this crate that the request has passed.
    watches: usize,
    /// In some attempt, a request that is not safe was sent on without its key. The layers around this one share it,
    /// because they may see the end of the attempt before this layer does, for example after a time limit.
    is_unkeyed: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Progress {
    attempts: u32,
    last: Option<Meaning>,
    /// An attempt was lost, and no later response has settled its effect.
    is_lost: bool,
    /// A response has shown that the server dealt with the request. A later attempt that was not taken does not change that.
    is_settled: bool,
    /// The copy whose attempt has begun. It is `None` once a layer has judged the attempt.
    open: Option<u64>,
    /// The number of copies of the report.
    copies: u64,
    hops: Hops,
    /// A redirect was followed around a retry which had judged its attempts. What it sends from then on are other requests.
    is_redirected_around: bool,
    /// The targets of the last attempt, one for each redirect policy of this crate, outermost first. The layers read
    /// them after the attempt.
    targets: Vec<Uri>,
    /// Returns the redirects that the service may follow, as far as its type shows.
    follows: fn() -> Follows,
}

const SETTLED: Meaning = Meaning::Answered { settles: true };

/// The hops of the current attempt.
#[derive(Debug, Default)]
struct Hops {
    /// A client of this crate sends the attempt. The client reports every redirect, so its errors show whether the
    /// attempt was sent.
    is_sent: bool,
    /// A redirect was followed, or may have been followed.
    is_redirected: bool,
    /// A redirect policy of this crate has stopped at a redirect, so that redirect is the response. Any other result
    /// shows that a layer further out has followed it.
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

    /// Whether a layer has judged the last attempt, and no other attempt has begun.
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
    /// A report for a request that `S` is going to send. `outer` is the report of the layer around this one.
    pub(super) fn of<S>(outer: Option<&Self>) -> Self {
        let progress = Progress {
            attempts: 0,
            last: None,
            is_lost: false,
            is_settled: false,
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

    /// Begins an attempt. An earlier attempt that no layer has judged counts as lost. If a layer further out has begun
    /// the attempt with the same copy, nothing changes.
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

    /// Records that a client of this crate sends the attempt. If the client sends one attempt twice, a foreign retry
    /// layer has repeated it, and the first request counts as lost.
    #[cfg(feature = "reqwest")]
    pub(super) fn send(&self) {
        let mut progress = self.progress();
        progress.is_lost |= progress.hops.is_sent;
        progress.hops.is_sent = true;
    }

    /// Records that a redirect policy of this crate sees a request, and will report its redirects. Returns the report for
    /// the layers and policies further in.
    ///
    /// A policy sees each request of its `FollowRedirect` as a first one. If it has seen a request of this attempt
    /// before, a layer further out has followed a redirect or repeated the request, so this one is another request. Two
    /// policies that see the same request do not count as that, because each passes its number on.
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

    /// Takes over the target from the report of a layer further in, whose call has ended.
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

    /// Records that a redirect is followed, or may be followed unseen.
    pub(super) fn redirect(&self) {
        self.progress().redirect();
    }

    /// Records that an unsafe request goes to another origin without its key.
    #[cfg(feature = "follow-redirect")]
    pub(super) fn lose_key(&self) {
        self.is_unkeyed.store(true, std::sync::atomic::Ordering::Release);
    }

    /// Whether an attempt went to another origin without its key, so that the server there cannot recognise a
    /// repetition.
    #[cfg(feature = "retry")]
    pub(super) fn has_lost_key(&self) -> bool {
        self.is_unkeyed.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Records the end of an attempt.
    pub(super) fn enter(&self, meaning: Meaning) {
        let mut progress = self.progress();
        // A retry within the redirects cannot know that it judges another request.
        let meaning = match meaning {
            SETTLED => meaning,
            _ if progress.is_redirected_around || progress.is_settled => Meaning::Unknown,
            _ => meaning,
        };
        progress.attempts += 1;
        progress.last = Some(meaning);
        progress.open = None;
        progress.hops = Hops::default();
        match meaning {
            Meaning::Unknown => progress.is_lost = true,
            SETTLED => (progress.is_lost, progress.is_settled) = (false, true),
            Meaning::Answered { settles: false } | Meaning::NotTaken => {}
        }
    }

    /// Returns the number of attempts, and what is known about their effect. `last` is the result of the last attempt,
    /// as the caller of this function reads it. If a layer further in has judged that attempt, its judgement counts. If
    /// that layer saw the request processed but the caller sees a refusal, the refusal belongs to another request, and the
    /// result is unknown.
    pub(super) fn sum(&self, last: Meaning) -> (u32, Meaning) {
        let is_judged = self.progress().is_judged();
        if !is_judged {
            self.enter(last);
        }
        let progress = self.progress();
        let meaning = match (progress.last, last) {
            (Some(SETTLED), Meaning::NotTaken | Meaning::Answered { settles: false }) => Meaning::Unknown,
            (Some(meaning), _) if !progress.is_lost => meaning,
            _ => Meaning::Unknown,
        };
        (progress.attempts, meaning)
    }

    /// Whether a response or an error may belong to a later hop of a redirect.
    fn may_be_redirected<R>(&self, response: Option<&Response<R>>) -> bool {
        let progress = self.progress();
        // The mark in a response comes from the first policy behind this layer.
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
                // This copy has passed a policy, so that policy reports. Policies further in are not known.
                Follows::Reporting => self.watches == 0 && target.is_none(),
                Follows::Silent => true,
            }
    }

    /// Whether the client reports its redirects, so that its own errors say whether the request was sent.
    fn is_vouched(&self) -> bool {
        self.progress().hops.is_sent
    }
}

/// Returns the target of the request that a response belongs to. `FollowRedirect` of `tower-http` 0.7 marks every response
/// with it, also if it followed no redirect. The marks of other versions have other types.
#[cfg(feature = "follow-redirect")]
fn target_in_mark<R>(response: &Response<R>) -> Option<&Uri> {
    let mark = response.extensions().get::<tower_http::follow_redirect::RequestUri>()?;
    Some(&mark.0)
}

#[cfg(not(feature = "follow-redirect"))]
const fn target_in_mark<R>(_: &Response<R>) -> Option<&Uri> {
    None
}

/// An extension of requests that are sent at most once. A retry layer further in may repeat such a request only if the
/// server provably did not take it.
///
/// Layers between the two must keep the extensions of the request. [`KeyAtHome`](super::KeyAtHome) puts this one back
/// into the requests of later hops.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnlyUnsent;

/// Returns what the result of an attempt says about the effect of the request that was sent first.
pub(super) fn meaning_of<R, E: 'static>(
    profile: &Profile,
    classes: &ErrorClasses,
    report: Option<&Report>,
    result: &Result<Response<R>, E>,
) -> Meaning {
    let is_redirected = report.is_some_and(|report| report.may_be_redirected(result.as_ref().ok()));
    match result {
        Ok(response) if is_redirected => after_redirect(response.status()),
        Ok(response) => profile.meaning(response.status(), response.headers()),
        Err(_) if is_redirected => Meaning::Unknown,
        Err(error) => match classes.of(error, report.is_some_and(Report::is_vouched)) {
            ErrorClass::Final | ErrorClass::NotSent => Meaning::NotTaken,
            ErrorClass::Lost => Meaning::Unknown,
        },
    }
}

/// Returns what the status of a later hop says about the first request. A 404, 409, 429 or 503 belongs to the later
/// request, and says nothing. A success shows that the server has processed the first request, and so does a redirect
/// other than 307 and 308 (RFC 9110 section 15.4).
fn after_redirect(status: StatusCode) -> Meaning {
    match status.as_u16() {
        200..=306 => Meaning::Answered { settles: true },
        _ => Meaning::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSED: Meaning = Meaning::Answered { settles: false };

    fn outcome(meanings: &[Meaning]) -> Meaning {
        let report = Report::of::<()>(None);
        for meaning in meanings {
            report.enter(*meaning);
        }
        let (attempts, outcome) = report.sum(Meaning::Unknown);
        assert_eq!(usize::try_from(attempts), Ok(meanings.len().max(1)));
        outcome
    }

    #[test]
    fn a_lost_attempt_stays_unknown_until_a_response_settles_it() {
        use Meaning::{NotTaken, Unknown};
        for (meanings, expected) in [
            (&[][..], Unknown),
            (&[SETTLED], SETTLED),
            (&[REFUSED], REFUSED),
            (&[NotTaken], NotTaken),
            (&[NotTaken, NotTaken], NotTaken),
            (&[Unknown, SETTLED], SETTLED),
            // A login that expired between two attempts says nothing about the first.
            (&[Unknown, REFUSED], Unknown),
            (&[Unknown, NotTaken], Unknown),
            (&[Unknown, NotTaken, SETTLED], SETTLED),
            (&[NotTaken, Unknown], Unknown),
            // A 202 that is repeated until the server is done: what comes after it does not undo the effect.
            (&[SETTLED, NotTaken], Unknown),
            (&[SETTLED, REFUSED], Unknown),
            (&[SETTLED, NotTaken, SETTLED], SETTLED),
        ] {
            assert_eq!(outcome(meanings), expected, "{meanings:?}");
        }
    }

    #[cfg(feature = "retry")]
    #[test]
    fn an_attempt_that_no_layer_judged_is_lost() {
        let report = Report::of::<()>(None);
        let repeated = report.clone();
        report.begin();
        repeated.begin();
        assert_eq!(report.sum(Meaning::NotTaken).1, Meaning::Unknown);
        let report = Report::of::<()>(None);
        report.begin();
        report.begin();
        assert_eq!(
            report.sum(Meaning::NotTaken),
            (1, Meaning::NotTaken),
            "two layers begin one attempt"
        );
        let report = Report::of::<()>(None);
        report.begin();
        report.enter(Meaning::NotTaken);
        report.begin();
        assert_eq!(
            report.sum(Meaning::Unknown),
            (2, Meaning::Unknown),
            "its own end counts"
        );
    }
}
