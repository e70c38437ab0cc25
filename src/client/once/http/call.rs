//! One attempt: what is sent, what is asked about a lost one, and what an answer does to the key.

use std::marker::PhantomData;
use std::sync::Arc;

use http::request::Parts;
use http::{response, Request, Response};
use tower_service::Service;

use super::layer::{LostCall, Settings};
use crate::client::classes::ErrorClass;
use crate::client::keys::Meaning;
use crate::http::{collect, is_stream, Collected, RebuildBody, Shortfall};
use crate::job::{Attempt, Ended, Found, Verdict, Work};
use crate::protocol::{IfLost, Outcome};

/// A call that is to be made.
pub(super) struct HttpCall<S, B> {
    pub(super) service: S,
    pub(super) settings: Arc<Settings>,
    pub(super) key: String,
    pub(super) head: Parts,
    pub(super) body: Collected,
    pub(super) type_of_body: PhantomData<fn(B)>,
}

/// What an attempt gives its caller.
pub(super) enum Given<R, E> {
    Answer(Response<R>),
    /// The answer broke off while it was read.
    Broken,
    /// An answer that leaves open what became of an attempt that was lost before.
    Doubtful,
    /// And the number of the attempt.
    Error(E, u32),
}

impl<S, B, R> Work for HttpCall<S, B>
where
    S: Service<Request<B>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: RebuildBody + Send + 'static,
    R: RebuildBody + Send + 'static,
    R::Error: Send,
{
    type Given = Given<R, S::Error>;

    async fn ask(&mut self, attempt: &Attempt) -> Found<Ended<Self::Given>> {
        let HttpCall {
            settings, key, head, ..
        } = &*self;
        let Some(check) = &settings.check else {
            return Found::Unknown;
        };
        let lost = LostCall {
            key: key.clone(),
            attempt: attempt.clone(),
            head: head.clone(),
        };
        let asked = check(lost);
        match asked.await {
            Found::Happened(response) => {
                let (head, bytes) = response.into_parts();
                Found::Happened(self.settings.keep(head, Collected { bytes, trailers: None }))
            }
            Found::NotHappened => Found::NotHappened,
            Found::Unknown => Found::Unknown,
        }
    }

    async fn run(self, attempt: Attempt) -> Ended<Self::Given> {
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
        let number = attempt.number();
        match service.call(Request::from_parts(head, body.rebuild())).await {
            // It may say no more than that the lost attempt was there before.
            Ok(response) if number > 1 && settings.is_doubtful(&response) => Ended {
                given: Given::Doubtful,
                verdict: Verdict::GiveUp,
            },
            Ok(mut response) => {
                response.extensions_mut().insert(attempt);
                settings.answered(response).await
            }
            Err(error) => Ended {
                verdict: match settings.classes.of(&error) {
                    ErrorClass::Final | ErrorClass::NotSent => Verdict::Release,
                    ErrorClass::Lost => Verdict::GiveUp,
                },
                given: Given::Error(error, number),
            },
        }
    }
}

impl Settings {
    /// Reads an answer, and decides what becomes of the key.
    async fn answered<R: RebuildBody, E>(&self, response: Response<R>) -> Ended<Given<R, E>> {
        let verdict = match self.meaning(&response) {
            Meaning::Answered { settles: true } => Verdict::Keep(Outcome::Tombstone),
            Meaning::Answered { settles: false } | Meaning::NotTaken => Verdict::Release,
            Meaning::Unknown => Verdict::GiveUp,
        };
        let (head, body) = response.into_parts();
        if !matches!(verdict, Verdict::Keep(_)) || is_stream(&head) {
            let given = Given::Answer(Response::from_parts(head, body));
            return Ended { given, verdict };
        }
        let given = match collect(body, self.answer_limit).await {
            Ok(body) => return self.keep(head, body),
            Err(Shortfall::TooLarge(body)) => Given::Answer(Response::from_parts(head, R::rebuild(body))),
            Err(Shortfall::Broken(_)) => Given::Broken,
        };
        Ended { given, verdict }
    }

    /// Whether an answer leaves open what became of an attempt that was lost before, at a third party that knows nothing of keys.
    fn is_doubtful<R>(&self, response: &Response<R>) -> bool {
        let is_asked_blindly = self.if_lost == IfLost::Execute && !self.send_key;
        is_asked_blindly && !response.status().is_success() && !self.profile.is_replay(response.headers())
    }

    /// What an answer means, over all the attempts that were made for it.
    fn meaning<R>(&self, response: &Response<R>) -> Meaning {
        #[cfg(feature = "retry")]
        if let Some(delivery) = response.extensions().get::<crate::client::retry::Delivery>() {
            if delivery.outcome() == crate::client::retry::CallOutcome::Unknown {
                return Meaning::Unknown;
            }
        }
        self.profile.meaning(response.status(), response.headers())
    }

    fn keep<R: RebuildBody, E>(&self, head: response::Parts, body: Collected) -> Ended<Given<R, E>> {
        let answer = self.answers.store(&head, &body);
        Ended {
            given: Given::Answer(Response::from_parts(head, body.rebuild())),
            verdict: Verdict::Keep(Outcome::Kept(answer)),
        }
    }
}
