//! The bounds of the HTTP services that the layers call.

use http::{Request, Response};
use tower_service::Service;

use super::body::RebuildBody;

/// An HTTP service that takes requests with the body `B`, and can be called from a task. The layer
/// can read the bodies of its responses and rebuild them.
///
/// This trait stands for a list of bounds that the crate would otherwise repeat. The public implementations of
/// `Service` list these bounds themselves, so that the docs and the compiler's errors show them.
pub(crate) trait HttpService<B>:
    Service<Request<B>, Response = Response<<Self as HttpService<B>>::ResponseBody>, Error: Send, Future: Send>
    + Send
    + 'static
{
    /// The body of the service's responses.
    type ResponseBody: RebuildBody<Error: Send> + Send + 'static;
}

impl<S, B, R> HttpService<B> for S
where
    S: Service<Request<B>, Response = Response<R>, Error: Send, Future: Send> + Send + 'static,
    R: RebuildBody<Error: Send> + Send + 'static,
{
    type ResponseBody = R;
}
