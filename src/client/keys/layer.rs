//! The layer that adds the key.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Method, Request};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::generator::{Cause, KeyGenerator, Outgoing};
use super::place::{InBody, InHeader, KeyPlacement, NoFirstSent, place_first_sent};
use super::profile::ProviderProfile;
use crate::protocol::KeyError;

/// A layer that gives every logical request of a client one idempotency key.
///
/// Put it *outside* of every layer that repeats requests (a retry, a redirect, a hedge), so that
/// all attempts carry the same key.
///
/// ```
/// use std::convert::Infallible;
/// use http::{Request, Response};
/// use tower::{service_fn, ServiceBuilder, ServiceExt};
/// use tower_idempotency::client::{IdempotencyKeyLayer, ProviderProfile};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let http = service_fn(|request: Request<String>| async move {
///     assert_eq!(request.headers()["idempotency-key"].len(), 36);
///     Ok::<_, Infallible>(Response::new("charged"))
/// });
/// let client = ServiceBuilder::new().layer(IdempotencyKeyLayer::new(ProviderProfile::stripe())).service(http);
/// let request = Request::post("/v1/charges").body("amount=100".to_owned()).unwrap();
/// assert_eq!(client.oneshot(request).await.unwrap().into_body(), "charged");
/// # }
/// ```
///
/// # Defaults
///
/// | setting | default |
/// |---|---|
/// | [generator](Self::with_generator) | [`KeyGenerator::uuid_v4`] |
/// | [methods](Self::with_methods) | POST and PATCH; other requests pass unchanged |
/// | place | the header field of the [`ProviderProfile`] |
///
/// A key that the caller has set takes precedence. If the server would reject that key, because it
/// is too long or the header field is repeated, the call fails and nothing is sent.
///
/// # Limits of the guarantee
///
/// With a random key, a crash between two attempts can cause a second effect. Use a
/// [`KeyDeriver`](super::KeyDeriver) to prevent that. The server decides whether it honours the
/// key, and for how long.
#[derive(Clone)]
pub struct IdempotencyKeyLayer<P = InHeader> {
    settings: Arc<Settings>,
    place: P,
}

#[derive(Clone)]
struct Settings {
    profile: ProviderProfile,
    generator: KeyGenerator,
    methods: Vec<Method>,
}

impl IdempotencyKeyLayer {
    /// Creates a layer that makes keys for a server with this profile.
    #[must_use]
    pub fn new(profile: ProviderProfile) -> Self {
        let settings = Settings {
            profile,
            generator: KeyGenerator::default(),
            methods: vec![Method::POST, Method::PATCH],
        };
        Self {
            settings: Arc::new(settings),
            place: InHeader,
        }
    }
}

impl<P> IdempotencyKeyLayer<P> {
    /// Sets the generator of the keys. Default: [`KeyGenerator::uuid_v4`].
    #[must_use]
    pub fn with_generator(mut self, generator: KeyGenerator) -> Self {
        Arc::make_mut(&mut self.settings).generator = generator;
        self
    }

    /// Sets the methods whose requests get a key. Default: POST and PATCH, because the other common
    /// methods are idempotent (RFC 9110 section 9.2.2).
    #[must_use]
    pub fn with_methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        Arc::make_mut(&mut self.settings).methods = methods.into_iter().collect();
        self
    }

    /// Puts the key into the body instead of a header field. The function also decides whether to
    /// replace a key that the body already has.
    ///
    /// ```
    /// use http::Request;
    /// use tower_idempotency::client::{IdempotencyKeyLayer, ProviderProfile};
    ///
    /// let square = IdempotencyKeyLayer::new(ProviderProfile::draft()).with_body_key(|request: &mut Request<String>, key: &str| {
    ///     let mut body: serde_json::Value = serde_json::from_str(request.body())?;
    ///     body["idempotency_key"] = key.into();
    ///     *request.body_mut() = body.to_string();
    ///     Ok::<_, serde_json::Error>(())
    /// });
    /// # drop(square);
    /// ```
    #[must_use]
    pub fn with_body_key<B, F, E>(self, place: F) -> IdempotencyKeyLayer<InBody<F>>
    where
        F: Fn(&mut Request<B>, &str) -> Result<(), E>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        IdempotencyKeyLayer {
            settings: self.settings,
            place: InBody(place),
        }
    }
}

impl<P> fmt::Debug for IdempotencyKeyLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyKeyLayer")
            .field("profile", &self.settings.profile)
            .field("generator", &self.settings.generator)
            .field("methods", &self.settings.methods)
            .finish_non_exhaustive()
    }
}

impl<S, P: Clone> Layer<S> for IdempotencyKeyLayer<P> {
    type Service = IdempotencyKeyService<S, P>;

    fn layer(&self, inner: S) -> IdempotencyKeyService<S, P> {
        IdempotencyKeyService {
            inner,
            layer: self.clone(),
        }
    }
}

/// A client whose requests have keys. [`IdempotencyKeyLayer`] makes it.
#[derive(Clone, Debug)]
pub struct IdempotencyKeyService<S, P = InHeader> {
    inner: S,
    layer: IdempotencyKeyLayer<P>,
}

impl<S, P> IdempotencyKeyService<S, P> {
    /// Returns the inner client.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Adds the key to a request.
    fn key<B, E>(&self, request: &mut Request<B>) -> Result<(), KeyPlacementError<E>>
    where
        P: KeyPlacement<B>,
    {
        let Settings {
            profile,
            generator,
            methods,
        } = &*self.layer.settings;
        if !methods.contains(request.method()) {
            return Ok(());
        }
        let place = &self.layer.place;
        let mut is_new = false;
        if !place.is_placed(profile, request).map_err(KeyPlacementError::Key)? {
            let head = Outgoing {
                method: request.method(),
                uri: request.uri(),
                headers: request.headers(),
                extensions: request.extensions(),
            };
            let mut text = [0; 36];
            let key = generator.make(head, &mut text).map_err(KeyPlacementError::Generator)?;
            place.place(profile, request, &key).map_err(KeyPlacementError::of)?;
            is_new = generator.is_random();
        }
        place_first_sent(profile, request, is_new).map_err(|NoFirstSent| KeyPlacementError::FirstSent)
    }
}

impl<S, P, B> Service<Request<B>> for IdempotencyKeyService<S, P>
where
    S: Service<Request<B>>,
    P: KeyPlacement<B>,
{
    type Response = S::Response;
    type Error = KeyPlacementError<S::Error>;
    type Future = KeyFuture<S::Future, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(KeyPlacementError::Service)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let state = match self.key(&mut request) {
            Ok(()) => State::Sent {
                future: self.inner.call(request),
            },
            Err(error) => State::Refused { error: Some(error) },
        };
        KeyFuture { state }
    }
}

pin_project! {
    /// The future of [`IdempotencyKeyService`].
    #[derive(Debug)]
    pub struct KeyFuture<F, E> {
        #[pin]
        state: State<F, E>,
    }
}

pin_project! {
    #[project = StateProjection]
    #[derive(Debug)]
    enum State<F, E> {
        Refused { error: Option<KeyPlacementError<E>> },
        Sent { #[pin] future: F },
    }
}

impl<F, T, E> Future for KeyFuture<F, E>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, KeyPlacementError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Sent { future } => future.poll(cx).map_err(KeyPlacementError::Service),
            StateProjection::Refused { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => Poll::Pending,
            },
        }
    }
}

/// The error of a call through [`IdempotencyKeyService`].
#[derive(Debug)]
#[non_exhaustive]
pub enum KeyPlacementError<E> {
    /// The server requires the date of the first attempt, and the layer does not know it. Nothing
    /// was sent.
    ///
    /// The layer sets the date itself only if it has just made the key at random, because no
    /// earlier attempt can have sent such a key. For any other key, put the time into the request's
    /// [`KeyOrigin`](super::KeyOrigin::with_first_sent), or set the header field.
    FirstSent,
    /// The server would not accept the key. Nothing was sent.
    Key(KeyError),
    /// The generator made no key, or the key could not be added to the request. Nothing was sent.
    Generator(Box<dyn std::error::Error + Send + Sync>),
    /// The error of the inner client.
    Service(E),
}

impl<E> KeyPlacementError<E> {
    fn of(cause: Cause) -> Self {
        match cause.downcast::<KeyError>() {
            Ok(error) => Self::Key(*error),
            Err(cause) => Self::Generator(cause),
        }
    }
}

impl<E: fmt::Display> fmt::Display for KeyPlacementError<E> {
    /// Displays a [`Service`](Self::Service) error with that error's own text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FirstSent => {
                "the request was not sent because the server requires the date of its first attempt; set the date by \
                 `KeyOrigin::with_first_sent`, or as a header field"
            }
            Self::Key(_) => {
                "the request was not sent because the server would not accept its idempotency key; the source of this \
                 error shows what is wrong with the key"
            }
            Self::Generator(_) => "the request was not sent because no idempotency key could be made for it",
            Self::Service(error) => return error.fmt(f),
        })
    }
}

impl<E: std::error::Error + 'static> std::error::Error for KeyPlacementError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::FirstSent => None,
            Self::Key(error) => Some(error),
            Self::Generator(cause) => Some(&**cause),
            // `Display` shows this error already, so the chain continues with its cause.
            Self::Service(error) => error.source(),
        }
    }
}
