//! The evidence that a request collects on its way: how often it was sent, where to, and how each attempt ended.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{Response, StatusCode};

use super::classes::{ErrorClass, ErrorClasses};
use super::keys::{Meaning, Profile};

/// The evidence about one call; an extension of its request, shared with the layers further in.
///
/// A status or an error says something about the request that was asked about only if no other request stands between them: a
/// redirect that was followed, or an earlier attempt that was lost.
#[derive(Clone, Debug)]
pub(super) struct Report(Arc<Mutex<Progress>>);

#[derive(Debug)]
struct Progress {
    attempts: u32,
    last: Option<Meaning>,
    /// An attempt was lost, and no later response has settled its effect.
    is_lost: bool,
    /// An attempt has begun that no layer has judged yet.
    is_open: bool,
    hops: Hops,
    /// Whether the service follows redirects, as far as its type shows.
    follows: fn() -> bool,
}

/// The hops of the current attempt.
#[derive(Debug, Default)]
struct Hops {
    /// A request that is not safe was sent on without its key.
    #[cfg_attr(not(feature = "retry"), expect(dead_code, reason = "only a retry asks for it"))]
    is_unkeyed: bool,
    /// A client of ours sends the attempt. It reports every redirect, so its own errors say whether the attempt was sent.
    is_sent: bool,
    /// A redirect was followed, or nothing rules out that one was.
    is_redirected: bool,
    /// A redirect policy of ours reports every hop, of this attempt and of the next.
    is_watched: bool,
}

impl Hops {
    /// Forgets the attempt that has ended.
    fn forget(&mut self) {
        *self = Self {
            is_watched: self.is_watched,
            ..Self::default()
        };
    }
}

impl Report {
    /// A report for a request that `S` is going to send.
    pub(super) fn of<S>() -> Self {
        Self(Arc::new(Mutex::new(Progress {
            attempts: 0,
            last: None,
            is_lost: false,
            is_open: false,
            hops: Hops::default(),
            follows: follows_redirects::<S>,
        })))
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an attempt. An earlier one that no layer has judged counts as lost.
    #[cfg(feature = "retry")]
    pub(super) fn begin(&self) {
        let mut progress = self.progress();
        progress.is_lost |= progress.is_open;
        progress.is_open = true;
        progress.hops.forget();
    }

    /// Records that a client of ours sends the attempt. If it does so twice, a retry between that is none of ours repeats it, and the
    /// first request counts as lost.
    #[cfg(feature = "reqwest")]
    pub(super) fn send(&self) {
        let mut progress = self.progress();
        progress.is_lost |= progress.hops.is_sent;
        progress.hops.is_sent = true;
    }

    /// Records that a redirect policy of ours sees the attempt, and will see its redirects.
    #[cfg(feature = "follow-redirect")]
    pub(super) fn watch(&self) {
        self.progress().hops.is_watched = true;
    }

    /// Records that a redirect is followed, or that it cannot be ruled out.
    pub(super) fn redirect(&self) {
        self.progress().hops.is_redirected = true;
    }

    /// Records that a request which is not safe is sent on without its key.
    #[cfg(feature = "follow-redirect")]
    pub(super) fn lose_key(&self) {
        self.progress().hops.is_unkeyed = true;
    }

    /// Whether the attempt went on without its key: the server that it reached cannot recognise a repetition.
    #[cfg(feature = "retry")]
    pub(super) fn has_lost_key(&self) -> bool {
        self.progress().hops.is_unkeyed
    }

    /// Records the end of an attempt.
    pub(super) fn enter(&self, meaning: Meaning) {
        let mut progress = self.progress();
        progress.attempts += 1;
        progress.last = Some(meaning);
        progress.is_open = false;
        progress.hops.forget();
        match meaning {
            Meaning::Unknown => progress.is_lost = true,
            Meaning::Answered { settles: true } => progress.is_lost = false,
            Meaning::Answered { settles: false } | Meaning::NotTaken => {}
        }
    }

    /// The number of attempts, and what is known about their effect; `last` is the end of the last one, if no layer has judged it.
    pub(super) fn sum(&self, last: Meaning) -> (u32, Meaning) {
        let is_judged = {
            let progress = self.progress();
            progress.last.is_some() && !progress.is_open
        };
        if !is_judged {
            self.enter(last);
        }
        let progress = self.progress();
        let meaning = match progress.last {
            Some(meaning) if !progress.is_lost => meaning,
            _ => Meaning::Unknown,
        };
        (progress.attempts, meaning)
    }

    /// Whether a response or an error may belong to a later hop of a redirect.
    fn may_be_redirected<R>(&self, response: Option<&Response<R>>) -> bool {
        let progress = self.progress();
        let Hops {
            is_redirected,
            is_watched,
            ..
        } = progress.hops;
        is_redirected || (!is_watched && ((progress.follows)() || response.is_some_and(has_passed_redirects)))
    }

    /// Whether the client reports its redirects, so that its own errors say whether the request was sent.
    fn is_vouched(&self) -> bool {
        self.progress().hops.is_sent
    }
}

/// Whether a service contains a `FollowRedirect`, of any version of `tower-http`.
///
/// Without a policy of ours in it, `FollowRedirect` leaves no other trace of an error that belongs to a later hop: it takes off the
/// extensions of what it sends on. A box around it hides the type, so this is a second line of defence; the first is
/// [`KeyAtHome`](super::KeyAtHome).
fn follows_redirects<S>() -> bool {
    std::any::type_name::<S>().contains("::FollowRedirect<")
}

/// Whether a `FollowRedirect` has handed this response out. It marks every response, also one that it did not redirect.
#[cfg(feature = "follow-redirect")]
fn has_passed_redirects<R>(response: &Response<R>) -> bool {
    let uri = response.extensions().get::<tower_http::follow_redirect::RequestUri>();
    uri.is_some()
}

#[cfg(not(feature = "follow-redirect"))]
const fn has_passed_redirects<R>(_: &Response<R>) -> bool {
    false
}

/// An extension of requests that are made at most once: a retry further in may repeat them only if the server provably did not take
/// them.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnlyUnsent;

/// What the end of an attempt says about the effect of the request that was sent first.
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

/// What the status of a later hop says about the first request: a 404, 409, 429 or 503 is that of another request. A success shows
/// that the first one was dealt with, and so does a redirect that is not to be sent again (RFC 9110 section 15.4).
fn after_redirect(status: StatusCode) -> Meaning {
    match status.as_u16() {
        200..=306 => Meaning::Answered { settles: true },
        _ => Meaning::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLED: Meaning = Meaning::Answered { settles: true };
    const REFUSED: Meaning = Meaning::Answered { settles: false };

    fn outcome(meanings: &[Meaning]) -> Meaning {
        let report = Report::of::<()>();
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
        ] {
            assert_eq!(outcome(meanings), expected, "{meanings:?}");
        }
    }

    #[cfg(feature = "retry")]
    #[test]
    fn an_attempt_that_nobody_judged_is_lost() {
        let report = Report::of::<()>();
        report.begin();
        report.begin();
        assert_eq!(report.sum(Meaning::NotTaken).1, Meaning::Unknown);
        let report = Report::of::<()>();
        report.begin();
        report.enter(Meaning::NotTaken);
        report.begin();
        assert_eq!(
            report.sum(Meaning::Unknown),
            (2, Meaning::Unknown),
            "its own end counts"
        );
    }

    #[cfg(feature = "follow-redirect")]
    #[test]
    fn a_service_that_follows_redirects_is_known_by_its_type() {
        use tower_http::follow_redirect::FollowRedirect;
        assert!(follows_redirects::<Option<FollowRedirect<String>>>());
        assert!(!follows_redirects::<Option<String>>());
    }
}
