//! One attempt: sends the request, or checks a lost attempt, and decides the effect of the result
//! on the key.

use std::future::poll_fn;
use std::marker::PhantomData;
use std::sync::Arc;

use http::request::Parts;
use http::{Method, Request, Response, response};

use super::settings::{LostCall, Settings};
use crate::client::keys::ResponseMeaning;
use crate::client::report::{Evidence, OnlyUnsent, Report, evidence_of, shows_effect};
use crate::engine::{Attempt, Ended, Recovered, Verdict, Work};
use crate::http::{Collected, HttpService, RebuildBody, Shortfall, collect, has_body, is_cut_short, is_stream};
use crate::protocol::{IfLost, Outcome};

/// The work of one call.
pub(super) struct HttpCall<S, B> {
    pub(super) service: S,
    pub(super) settings: Arc<Settings>,
    pub(super) key: String,
    pub(super) head: Parts,
    pub(super) body: Collected,
    pub(super) type_of_body: PhantomData<fn(B)>,
}

/// The result of an attempt for its caller.
pub(super) enum Output<R, E> {
    Response(Response<R>),
    /// The body of the response broke off, or ended before its declared length.
    Broken,
    /// A response that does not show whether an earlier, lost attempt took effect.
    Doubtful,
    /// The error of an attempt without effect.
    Failed(E),
    /// The error of an attempt that may have taken effect, or that followed a lost attempt.
    Lost(E),
}

impl<S, B> Work for HttpCall<S, B>
where
    S: HttpService<B> + Clone,
    B: RebuildBody + Send + 'static,
{
    type Output = Output<S::ResponseBody, S::Error>;

    fn give_readiness_back(&mut self) {
        // A clone is not ready.
        self.service = self.service.clone();
    }

    /// The next call of a broken client gets the error from the client itself.
    async fn get_ready(&mut self) -> bool {
        poll_fn(|cx| self.service.poll_ready(cx)).await.is_ok()
    }

    async fn check(&mut self, attempt: &Attempt) -> Recovered<Ended<Self::Output>> {
        let HttpCall {
            settings, key, head, ..
        } = &*self;
        let Some(check) = &settings.check else {
            return Recovered::Unknown;
        };
        let lost = LostCall {
            key: key.clone(),
            attempt: attempt.clone(),
            head: head.clone(),
        };
        let checking = check(lost);
        match checking.await {
            Recovered::Happened(response) => {
                let (head, bytes) = response.into_parts();
                Recovered::Happened(self.settings.stored(head, Collected { bytes, trailers: None }))
            }
            Recovered::NotHappened => Recovered::NotHappened,
            Recovered::Unknown => Recovered::Unknown,
        }
    }

    async fn run(self, attempt: Attempt) -> Ended<Self::Output> {
        let HttpCall {
            mut service,
            settings,
            mut head,
            body,
            ..
        } = self;
        if !settings.send_key {
            head.headers.remove(&settings.profile.header);
        }
        if let Some(change) = &settings.on_attempt {
            change(&mut head, &attempt);
        }
        head.extensions.insert(attempt.clone());
        let outer = head.extensions.remove::<Report>();
        let report = Report::of::<S>(outer.as_ref());
        head.extensions.insert(report.clone());
        if !settings.keys_are_honoured {
            head.extensions.insert(OnlyUnsent);
        }
        let (is_later, method) = (attempt.number() > 1, head.method.clone());
        let result = service.call(Request::from_parts(head, body.rebuild())).await;
        let evidence = settings.evidence(&report, &result);
        if let Some(outer) = outer {
            outer.adopt(&report);
            // A layer further out sees the same response, but not the doubt about it, so report the
            // doubt.
            if evidence.meaning == ResponseMeaning::Unknown {
                outer.redirect();
            }
        }
        match result {
            // This response may only mean that the lost attempt arrived earlier.
            Ok(response) if is_later && settings.is_doubtful(&response) => Ended {
                output: Output::Doubtful,
                verdict: Verdict::GiveUp,
            },
            Ok(mut response) => {
                response.extensions_mut().insert(attempt);
                settings.responded(&method, response, evidence).await
            }
            Err(error) => settings.failed(error, evidence, is_later),
        }
    }
}

impl Settings {
    /// Decides the effect of an error on the key.
    fn failed<R, E>(&self, error: E, evidence: Evidence, is_later: bool) -> Ended<Output<R, E>> {
        if !evidence.has_no_effect_by_error() {
            let is_doubtful = is_later && self.recognises_no_retry() && !evidence.has_effect();
            let verdict = match evidence.meaning {
                // A `CallLayer` saw the head of the response and lost its body.
                ResponseMeaning::Responded { settles: true } if !is_doubtful => self.without_body(),
                _ => Verdict::GiveUp,
            };
            let output = Output::Lost(error);
            return Ended { output, verdict };
        }
        // An earlier attempt was lost, and no recovery check has looked for its effect.
        let is_open = is_later && self.engine.if_lost == IfLost::Execute;
        Ended {
            output: if is_open {
                Output::Lost(error)
            } else {
                Output::Failed(error)
            },
            verdict: Verdict::Release,
        }
    }

    /// Decides the effect on the key if the head of a response shows that the call was made, and
    /// its body broke off. Sending the request again would repeat the effect (I3), also under
    /// `at_least_once`. Only a third party that honours keys would replay its response instead.
    const fn without_body(&self) -> Verdict {
        if self.keys_are_honoured {
            Verdict::GiveUp
        } else {
            Verdict::Store(Outcome::Tombstone)
        }
    }

    /// Reads a response, and decides its effect on the key.
    async fn responded<R: RebuildBody, E>(
        &self,
        method: &Method,
        response: Response<R>,
        evidence: Evidence,
    ) -> Ended<Output<R, E>> {
        let verdict = match evidence.meaning {
            _ if evidence.has_no_effect() => Verdict::Release,
            ResponseMeaning::Responded { settles: true } => Verdict::Store(Outcome::Tombstone),
            ResponseMeaning::NotTaken | ResponseMeaning::Responded { settles: false } | ResponseMeaning::Unknown => {
                Verdict::GiveUp
            }
        };
        let (head, body) = response.into_parts();
        if !matches!(verdict, Verdict::Store(_)) || is_stream(&head) {
            let output = Output::Response(Response::from_parts(head, body));
            return Ended { output, verdict };
        }
        match collect(body, self.response_limit, self.response_timeout).await {
            Ok(body) if !has_body(method, head.status) || !is_cut_short(&head, body.bytes.len()) => {
                self.stored(head, body)
            }
            Err(Shortfall::TooLarge(body) | Shortfall::TooSlow(body)) => Ended {
                output: Output::Response(Response::from_parts(head, R::rebuild(body))),
                verdict,
            },
            // A response without a body may declare the length that it would have.
            Err(Shortfall::Short(part)) if !has_body(method, head.status) => self.stored(head, part),
            Ok(_) | Err(Shortfall::Broken(_) | Shortfall::Short(_)) => Ended {
                output: Output::Broken,
                verdict: self.without_body(),
            },
        }
    }

    /// Returns whether a response leaves open if an earlier, lost attempt took effect, because the
    /// third party knows no keys.
    fn is_doubtful<R>(&self, response: &Response<R>) -> bool {
        self.recognises_no_retry() && !shows_effect(&self.profile, response.status(), response.headers())
    }

    /// Returns whether a lost request is sent again without a check of its effect, and without a
    /// key that the third party could recognise.
    fn recognises_no_retry(&self) -> bool {
        self.engine.if_lost == IfLost::Execute && !self.send_key
    }

    /// Returns the evidence of the call's effect in a result, including all requests that inner
    /// layers sent for the call.
    fn evidence<R, E: 'static>(&self, report: &Report, result: &Result<Response<R>, E>) -> Evidence {
        let own = evidence_of(&self.profile, &self.classes, Some(report), result);
        let (_, sum) = report.sum(own);
        // This layer interprets a response by its own profile.
        if result.is_ok() && sum.meaning != ResponseMeaning::Unknown {
            own
        } else {
            sum
        }
    }

    /// Returns the end of a call whose response is stored.
    fn stored<R: RebuildBody, E>(&self, head: response::Parts, body: Collected) -> Ended<Output<R, E>> {
        let response = self.response_headers.store(&head, &body);
        Ended {
            output: Output::Response(Response::from_parts(head, body.rebuild())),
            verdict: Verdict::Store(Outcome::Stored(response)),
        }
    }
}
