//! `reqwest` as a tower service over `http` types.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{ready, Context, Poll};

use http::{Request, Response};
use pin_project_lite::pin_project;
use reqwest::{Body, Client, ClientBuilder, ResponseBuilderExt};
use tower_service::Service;

/// A `reqwest::Client` as a tower service over `http` types, for the layers of this module to go around.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_idempotency::client::{IdempotencyKeyLayer, Profile, ReqwestService};
///
/// # fn main() -> Result<(), reqwest::Error> {
/// let http = ReqwestService::build(reqwest::Client::builder())?;
/// let client = ServiceBuilder::new().layer(IdempotencyKeyLayer::new(Profile::stripe())).service(http);
/// # drop(client);
/// # Ok(())
/// # }
/// ```
///
/// Bodies stream in both directions, and an answer has its trailers. `reqwest::Response::from` gives the answer in `reqwest`'s own type,
/// with its URL, `text` and `json`.
///
/// A time-out of `reqwest` is one of each attempt. Repetition is better left to `CallLayer`, which knows of keys; what `reqwest`
/// repeats by itself was refused by the connection before it was sent.
#[derive(Clone, Debug)]
pub struct ReqwestService(Client);

impl ReqwestService {
    /// Builds a client that follows up to 10 redirects within an origin, all of which carry the key, and none to another origin:
    /// `reqwest` would send the key along. The answer is then the redirect itself.
    ///
    /// # Errors
    ///
    /// As `reqwest::ClientBuilder::build`.
    pub fn build(builder: ClientBuilder) -> Result<Self, reqwest::Error> {
        let redirects = reqwest::redirect::Policy::custom(|attempt| {
            let home = attempt.previous().last().map(reqwest::Url::origin);
            if home.as_ref() != Some(&attempt.url().origin()) {
                attempt.stop()
            } else if attempt.previous().len() > 10 {
                attempt.error("more than 10 redirects")
            } else {
                attempt.follow()
            }
        });
        builder.redirect(redirects).build().map(Self)
    }

    /// Takes a client as it is, with its own redirects: it sends the key wherever it is redirected to, unless its policy says
    /// otherwise.
    #[must_use]
    pub const fn from_client(client: Client) -> Self {
        Self(client)
    }
}

impl<B: Into<Body>> Service<Request<B>> for ReqwestService {
    type Response = Response<Body>;
    type Error = reqwest::Error;
    type Future = ReqwestFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), reqwest::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> ReqwestFuture {
        let state = match reqwest::Request::try_from(request) {
            Ok(request) => State::Sent {
                future: self.0.call(request),
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
        Sent { #[pin] future: <Client as Service<reqwest::Request>>::Future },
    }
}

impl Future for ReqwestFuture {
    type Output = Result<Response<Body>, reqwest::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Sent { future } => Poll::Ready(ready!(future.poll(cx)).map(into_http)),
            StateProjection::Invalid { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => Poll::Pending,
            },
        }
    }
}

/// With the URL in the extension by which `reqwest` knows it again.
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
