//! `reqwest` as a tower service over `http` types.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response, StatusCode};
use pin_project_lite::pin_project;
use reqwest::redirect::{Action, Attempt, Policy};
use reqwest::{Body, Client, ClientBuilder, ResponseBuilderExt, Url};
use tokio::task::futures::TaskLocalFuture;
use tower_service::Service;

use super::report::Report;

/// A `reqwest::Client` as a tower service over `http` types. The layers of this module go around
/// it.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_idempotency::client::{IdempotencyKeyLayer, ProviderProfile, ReqwestService};
///
/// # fn main() -> Result<(), reqwest::Error> {
/// let http = ReqwestService::build(reqwest::Client::builder())?;
/// let client = ServiceBuilder::new().layer(IdempotencyKeyLayer::new(ProviderProfile::stripe())).service(http);
/// # drop(client);
/// # Ok(())
/// # }
/// ```
///
/// Bodies stream in both directions, and a response has its trailers. `reqwest::Response::from`
/// converts the response to `reqwest`'s own type, with its URL, `text` and `json`.
///
/// A timeout of `reqwest` covers one attempt, with the redirects that it follows.
#[derive(Clone, Debug)]
pub struct ReqwestService {
    client: Client,
    /// Whether every redirect and every retry of the client is reported.
    is_transparent: bool,
}

impl ReqwestService {
    /// Builds a client that follows up to 10 redirects. It follows them only within an origin, so
    /// no other origin gets a key.
    ///
    /// After a method that is not safe (RFC 9110 section 9.2.1), the client follows only 307 and
    /// 308, which preserve key and body. It returns a 301, 302 or 303 as the response. The server
    /// has processed that request, and the status of the page that the redirect points to shows
    /// nothing about the effect. The client also returns every other redirect that it does not
    /// follow as the response. More than 10 redirects are an error.
    ///
    /// The client itself repeats no request, because `build` replaces the builder's `retry` and
    /// `redirect`. Use `CallLayer` for retries; it knows which requests it may repeat.
    ///
    /// # Errors
    ///
    /// As for `reqwest::ClientBuilder::build`.
    pub fn build(builder: ClientBuilder) -> Result<Self, reqwest::Error> {
        let client = builder
            .redirect(Policy::custom(follow))
            .retry(reqwest::retry::never())
            .build()?;
        Ok(Self {
            client,
            is_transparent: true,
        })
    }

    /// Wraps a client as it is, with its own redirects and retries. The client sends the key to
    /// every origin that it is redirected to, unless its own policy prevents that.
    ///
    /// `reqwest` does not show whether an error, or a response from the requested URL, belongs to
    /// the request or to a later request that the client sent itself. Therefore, after a method
    /// that is not safe, the layers of this crate report "unknown" for every error after the
    /// sending started, and for every response that is neither a success nor a redirect. For
    /// example, a [`OnceLayer`](super::OnceLayer) does not free the key after a 401, 404 or 429.
    /// [`build`](Self::build) and
    /// [`from_client_without_redirects`](Self::from_client_without_redirects) make a client whose
    /// statuses can be trusted.
    #[must_use]
    pub const fn from_client(client: Client) -> Self {
        Self {
            client,
            is_transparent: false,
        }
    }

    /// Wraps a client that follows no redirects and repeats no request itself. The caller of this
    /// function vouches that the client was built with `redirect::Policy::none()` and without a
    /// `retry` policy. `reqwest`'s default retries are fine, because they repeat only requests that
    /// the server has refused to process.
    ///
    /// With any other client, the error or the status of a later request can free a key, and the
    /// next attempt can have a second effect. In doubt, use [`from_client`](Self::from_client).
    #[must_use]
    pub const fn from_client_without_redirects(client: Client) -> Self {
        Self {
            client,
            is_transparent: true,
        }
    }
}

tokio::task_local! {
    /// The request whose future is being polled. The redirect policy needs it, because `reqwest`
    /// passes the policy neither the method nor the extensions.
    static SENT: Sent;
}

struct Sent {
    is_safe: bool,
    report: Option<Report>,
}

/// The redirect policy of [`ReqwestService::build`].
fn follow(attempt: Attempt<'_>) -> Action {
    const MOST: usize = 10;
    let home = attempt.previous().last().map(Url::origin);
    let is_same_request = matches!(
        attempt.status(),
        StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT
    );
    let may_follow = is_same_request || SENT.try_with(|sent| sent.is_safe).unwrap_or(false);
    if !may_follow || home != Some(attempt.url().origin()) {
        return attempt.stop();
    }
    if attempt.previous().len() > MOST {
        return attempt.error("more than 10 redirects");
    }
    let report = SENT.try_with(|sent| sent.report.clone()).ok().flatten();
    if let Some(report) = report {
        report.redirect();
    }
    attempt.follow()
}

impl<B: Into<Body>> Service<Request<B>> for ReqwestService {
    type Response = Response<Body>;
    type Error = reqwest::Error;
    type Future = ReqwestFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), reqwest::Error>> {
        self.client.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> ReqwestFuture {
        let is_safe = request.method().is_safe();
        let report = request.extensions().get::<Report>().cloned();
        if let Some(report) = &report {
            report.send();
        }
        let state = match reqwest::Request::try_from(request) {
            Ok(request) => State::Sent {
                report: report.clone(),
                is_doubtful: !self.is_transparent && !is_safe,
                has_waited: false,
                future: SENT.scope(Sent { is_safe, report }, self.client.call(request)),
            },
            Err(error) => State::Invalid { error: Some(error) },
        };
        ReqwestFuture { state }
    }
}

pin_project! {
    /// The future of [`ReqwestService`].
    pub struct ReqwestFuture {
        #[pin]
        state: State,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State {
        Invalid { error: Option<reqwest::Error> },
        Sent {
            report: Option<Report>,
            // Whether the client may redirect or repeat the request without a report.
            is_doubtful: bool,
            has_waited: bool,
            #[pin]
            future: TaskLocalFuture<Sent, <Client as Service<reqwest::Request>>::Future>,
        },
    }
}

impl Future for ReqwestFuture {
    type Output = Result<Response<Body>, reqwest::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Sent {
                report,
                is_doubtful,
                has_waited,
                future,
            } => {
                let polled = future.poll(cx);
                let may_be_another = match &polled {
                    // An error at the first poll comes before the client has sent anything.
                    Poll::Pending => *is_doubtful,
                    // After the first poll, an invalid URL must be the target of a redirect.
                    Poll::Ready(Err(error)) => *has_waited && error.is_builder(),
                    Poll::Ready(Ok(_)) => false,
                };
                *has_waited = true;
                if let (true, Some(report)) = (may_be_another, report) {
                    report.redirect();
                }
                polled.map_ok(into_http)
            }
            StateProjection::Invalid { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => Poll::Pending,
            },
        }
    }
}

/// Converts a response, and puts its URL into the extension from which `reqwest::Response::from`
/// reads it.
fn into_http(response: reqwest::Response) -> Response<Body> {
    let named = Response::builder().url(response.url().clone()).body(());
    let mut response = Response::from(response);
    if let Ok(named) = named {
        response.extensions_mut().extend(named.into_parts().0.extensions);
    }
    response
}

impl fmt::Debug for ReqwestFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReqwestFuture").finish_non_exhaustive()
    }
}
